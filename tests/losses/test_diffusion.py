"""Noise prediction losses against hand-computed values and identities."""

import pytest
import torch
from noise_levels import scaled_linear_betas

from diffusers_ext.losses.diffusion import (
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
