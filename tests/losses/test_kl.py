"""The KL autoencoder's terms against hand computation and against diffusers' posterior."""

import math

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from diffusers_ext.losses.adversarial import vanilla_discriminator_loss
from diffusers_ext.losses.kl import kl_divergence, latent_scale, reconstruction_nll, sample_posterior


def test_divergence_by_hand():
    mean, logvar = torch.tensor([1.0, -2.0]), torch.tensor([0.0, math.log(4.0)])
    moments = torch.stack([mean, logvar]).view(1, 2, 1, 2)  # one latent channel, two positions
    expected = 0.5 * (1 + 1 - 1 - 0) + 0.5 * (4 + 4 - 1 - math.log(4.0))
    torch.testing.assert_close(kl_divergence(moments), torch.tensor([expected]))
    assert kl_divergence(torch.zeros(3, 4, 2, 2)).tolist() == [0, 0, 0]  # the prior itself


def test_posterior_is_that_of_diffusers_clamping_included():
    moments = 30 * torch.randn(2, 6, 4, 4)
    posterior = DiagonalGaussianDistribution(moments)
    torch.testing.assert_close(kl_divergence(moments), posterior.kl())
    noise = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(sample_posterior(moments, noise), posterior.mean + posterior.std * noise)
    assert kl_divergence(moments.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("logvar", [0.0, 0.7])
def test_both_reductions_by_hand(logvar):
    """As the originals write them: element by element, the perceptual distance spread over its sample's elements."""
    image, target = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    distance, weight, s = torch.tensor([0.3, 0.5]), 0.8, torch.tensor(logvar)
    elements = (image - target).abs() + weight * distance.view(2, 1, 1, 1)
    error = (image - target).abs().mean() + weight * distance.mean()
    summed = reconstruction_nll(error, 3 * 4 * 4, logvar=s)
    torch.testing.assert_close(summed, (elements / s.exp() + s).sum() / 2)
    mean = reconstruction_nll(error, 3 * 4 * 4, logvar=s, reduction="mean")
    torch.testing.assert_close(mean, (elements / s.exp() + s).mean())
    if not logvar:
        torch.testing.assert_close(mean, elements.mean())
        assert reconstruction_nll(error, 3 * 4 * 4, reduction="mean") is error  # not even rounding


def test_a_learned_log_variance_settles_at_the_log_of_the_error():
    s, error = torch.nn.Parameter(torch.tensor(math.log(0.25))), torch.tensor(0.25)
    reconstruction_nll(error, 48, logvar=s).backward()
    assert s.grad.abs() < 1e-5
    with torch.no_grad():
        s += 1
    s.grad = None
    reconstruction_nll(error, 48, logvar=s).backward()
    assert s.grad.item() == pytest.approx(48 * (1 - 1 / math.e))


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="`reduction` must be 'sum' or 'mean', got 'none'"):
        reconstruction_nll(torch.tensor(1.0), 3, reduction="none")


def test_latent_scale_makes_unit_variance():
    latents = 5 + 3 * torch.randn(8, 2, 4, 4)
    scale = latent_scale(latents)
    assert scale == pytest.approx(1 / latents.double().std().item())  # unbiased, one number for all channels
    assert (scale * latents).std().item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("latents", [torch.ones(2, 3, 4, 4), torch.full((2, 3), torch.nan), torch.ones(1)])
def test_latents_without_a_scale_are_refused(latents):
    with pytest.raises(ValueError, match="The standard deviation of the latents is .*--scale_samples 0"):
        latent_scale(latents)


def test_vanilla_discriminator_loss_is_binary_cross_entropy():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    expected = 0.5 * (entropy(real, torch.ones(2)) + entropy(fake, torch.zeros(2)))
    torch.testing.assert_close(vanilla_discriminator_loss(real, fake), expected)
