"""Noise prediction losses against hand-computed values and identities."""

import math

import pytest
import torch
from noise_levels import scaled_linear_betas

from diffusers_ext.losses.diffusion import (
    VARIATIONAL_KINDS,
    VariationalLoss,
    discretized_log_likelihood,
    gaussian_divergence,
    latent_diffusion_loss,
    noise_error,
    posterior_variance,
    vlb_weights,
)


def test_schedule_by_hand():
    betas = scaled_linear_betas(0.01, 0.09, 3)
    torch.testing.assert_close(betas, torch.tensor([0.01, 0.04, 0.09], dtype=torch.float64))
    variance = posterior_variance(betas)
    abar = [0.99, 0.99 * 0.96, 0.99 * 0.96 * 0.91]
    assert variance[0].item() == 0.0
    assert variance[2].item() == pytest.approx(0.09 * (1 - abar[1]) / (1 - abar[2]))
    weights = vlb_weights(betas)
    assert weights[2].item() == pytest.approx(0.09**2 / (2 * variance[2].item() * 0.91 * (1 - abar[2])), rel=1e-6)
    assert weights[0] == weights[1] and weights.dtype == torch.float32


def test_the_bound_weighs_noise_as_the_divergence_of_the_posteriors():
    """w_t |eps - eps'|^2 = |mu~(x_0) - mu~(x_0')|^2 / (2 beta~_t): where the weights come from."""
    betas = scaled_linear_betas(0.0015, 0.0195)
    abar = (1 - betas).cumprod(0)
    t = 500
    x_t, eps, guess = torch.randn(3, 4, dtype=torch.float64)
    x0, x0_guess = ((x_t - (1 - abar[t]).sqrt() * e) / abar[t].sqrt() for e in (eps, guess))
    to_mean = abar[t - 1].sqrt() * betas[t] / (1 - abar[t])
    divergence = (to_mean * (x0 - x0_guess)).square().sum() / (2 * posterior_variance(betas)[t])
    assert float(vlb_weights(betas)[t] * (eps - guess).square().sum()) == pytest.approx(float(divergence), rel=1e-6)


def test_loss_by_hand():
    prediction = torch.tensor([[[[1.0, 3.0]]], [[[0.0, 0.0]]]], requires_grad=True)
    noise = torch.tensor([[[[0.0, 1.0]]], [[[2.0, -2.0]]]])
    assert noise_error(prediction, noise, "l1").tolist() == [1.5, 2.0]
    assert noise_error(prediction, noise).tolist() == [2.5, 4.0]
    weights, timesteps = torch.tensor([1.0, 10.0, 100.0]), torch.tensor([2, 0])
    losses = latent_diffusion_loss(prediction, noise, timesteps, weights, loss_type="l1", vlb_weight=0.5)
    assert losses["loss_simple"].item() == 1.75 and losses["loss_vlb"].item() == 76.0
    assert losses["loss"].item() == 1.75 + 0.5 * 76.0 and losses["loss"].requires_grad
    logvar = torch.tensor([0.0, 0.0, 1.0])
    scaled = latent_diffusion_loss(prediction, noise, timesteps, weights, loss_type="l1", logvar=logvar)["loss"]
    assert scaled.item() == pytest.approx((1.5 / 2.718281828 + 1 + 2.0) / 2)


def test_another_loss_type_is_refused():
    with pytest.raises(ValueError, match=r"`loss_type` is 'huber': it must be one of l1, l2"):
        noise_error(torch.zeros(1, 1), torch.zeros(1, 1), "huber")


# The variational loss: its recorded numbers are in tests/parity (losses_hybrid_vlb).


def variational(kind: str = "rescaled_mse", count: int = 50) -> tuple[VariationalLoss, dict[str, torch.Tensor]]:
    """A loss, and the arguments of its `forward` for four samples, the first of them at timestep 0."""
    torch.manual_seed(0)
    betas = scaled_linear_betas(0.01, 0.3, count)
    abar = (1 - betas).cumprod(0).float()
    timesteps = torch.tensor([0, 1, count // 2, count - 1])
    clean = (torch.randint(0, 256, (4, 2, 3, 3)) / 127.5 - 1).float()
    noise = torch.randn_like(clean)
    signal = abar[timesteps].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
    output = torch.cat([noise + 0.1 * torch.randn_like(noise), torch.randn_like(noise)], dim=1)
    call = {"model_output": output, "noise": noise, "clean": clean, "noisy": noisy, "timesteps": timesteps}
    return VariationalLoss(betas, kind), call


def test_kinds_are_made_of_the_same_two_terms():
    losses = {}
    for kind in VARIATIONAL_KINDS:
        loss, call = variational(kind)
        losses[kind] = loss(**call)
        assert all(value.shape == (4,) and value.dtype == torch.float32 for value in losses[kind].values())
    bound = losses["kl"]["loss"]
    torch.testing.assert_close(losses["rescaled_kl"]["loss"], 50 * bound)
    torch.testing.assert_close(losses["mse"]["vb"], bound)
    torch.testing.assert_close(losses["rescaled_mse"]["vb"], 0.05 * bound)
    for kind in ("mse", "rescaled_mse"):
        error = noise_error(call["model_output"][:, :2], call["noise"])
        torch.testing.assert_close(losses[kind]["mse"], error)
        torch.testing.assert_close(losses[kind]["loss"], error + losses[kind]["vb"])


@pytest.mark.parametrize("kind", VARIATIONAL_KINDS)
def test_the_bound_of_the_hybrid_teaches_the_variance_alone(kind):
    loss, call = variational(kind)
    output = call["model_output"].requires_grad_()
    loss(**call)["vb"].sum().backward()
    assert output.grad[:, 2:].any() and bool(output.grad[:, :2].any()) == kind.endswith("kl")


def test_the_bound_is_zero_where_the_network_knows_the_posterior():
    loss, call = variational()
    exact = torch.cat([call["noise"], -torch.ones_like(call["noise"])], dim=1)  # v = -1: beta~
    terms = loss.bound_term(exact, call["clean"], call["noisy"], call["timesteps"])
    assert terms[0] > 0  # of timestep 0: the likelihood of 8-bit levels
    torch.testing.assert_close(terms[1:], torch.zeros(3), atol=1e-4, rtol=0)
    assert (loss.bound_term(exact + 0.5, call["clean"], call["noisy"], call["timesteps"])[1:] > 1e-3).all()


def test_variance_lies_between_the_two_natural_ones():
    loss, call = variational()
    betas = scaled_linear_betas(0.01, 0.3, 50)
    for v, variance in [(1.0, betas), (-1.0, posterior_variance(betas))]:
        output = torch.cat([call["noise"], torch.full_like(call["noise"], v)], dim=1)
        found = loss.predict(output, call["noisy"], call["timesteps"])
        expected = variance[call["timesteps"]].float()
        torch.testing.assert_close(found.log_variance[1:, 0, 0, 0].exp(), expected[1:])
        torch.testing.assert_close(found.pred_original_sample, call["clean"], atol=1e-4, rtol=1e-4)


def test_likelihood_of_all_levels_sums_to_one():
    levels = torch.arange(256) / 127.5 - 1
    for mean, std in [(0.0, 0.2), (-0.99, 0.05), (1.3, 0.4)]:
        log = discretized_log_likelihood(levels, torch.full_like(levels, mean), torch.full_like(levels, math.log(std)))
        assert log.exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_divergence_is_that_of_torch():
    mean, log_variance, other_mean, other_log_variance = torch.randn(4, 5)
    normal = torch.distributions.Normal
    ours, other = normal(mean, (log_variance / 2).exp()), normal(other_mean, (other_log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(ours, other)
    torch.testing.assert_close(gaussian_divergence(mean, log_variance, other_mean, other_log_variance), expected)


def test_prior_vanishes_with_the_signal():
    clean = torch.ones(2, 1, 2, 2)
    much, little = (VariationalLoss(scaled_linear_betas(0.01, 0.3, count)).prior(clean) for count in (100, 3))
    assert much.shape == (2,) and much.max() < 1e-3 < little.min()


def test_tables_follow_the_module_and_lie_in_no_checkpoint():
    loss, _ = variational()
    assert not loss.state_dict() and all(buffer.dtype == torch.float32 for buffer in loss.buffers())
    assert all(buffer.is_meta for buffer in loss.to("meta").buffers())


def test_variational_loss_refuses():
    betas = scaled_linear_betas(0.01, 0.3, 5)
    with pytest.raises(ValueError, match=r"`kind` is 'l2': it must be one of mse, rescaled_mse, kl, rescaled_kl"):
        VariationalLoss(betas, "l2")
    with pytest.raises(ValueError, match=r"`betas` has shape \(1,\)"):
        VariationalLoss(betas[:1])
    loss, call = variational()
    with pytest.raises(ValueError, match=r"`model_output` has 2 channels and `noisy` 2: a learned variance needs 4"):
        loss(**{**call, "model_output": call["noise"]})
