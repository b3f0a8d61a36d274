"""Guidance by gradients, where everything can be written down."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch.nn import functional as F

from diffusers_ext.pipelines.ldm.picture_guidance import guide_prediction, low_resolution_guidance
from diffusers_ext.schedulers.gaussian import ldm_scheduler, signal_and_noise, split_prediction

KINDS = ("epsilon", "v_prediction", "sample")


def scheduler(kind: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler.from_config(ldm_scheduler().config, prediction_type=kind)


def prediction_of(kind: str, clean, noise, signal, level):
    return {"epsilon": noise, "sample": clean, "v_prediction": signal * noise - level * clean}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_taken_apart(kind):
    clean, noise = torch.randn(2, 1, 3, 4, 4)
    signal, level = signal_and_noise(scheduler(kind), torch.tensor(300))
    abar = float(scheduler().alphas_cumprod[300])
    assert signal == pytest.approx(abar**0.5) and level == pytest.approx((1 - abar) ** 0.5)
    noisy = signal * clean + level * noise
    found = split_prediction(
        scheduler(kind), prediction_of(kind, clean, noise, signal, level), noisy, torch.tensor(300)
    )
    torch.testing.assert_close(found[0], clean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], noise, atol=1e-5, rtol=1e-4)


def test_levels_between_timesteps_are_those_of_schedulers_that_use_them():
    euler = EulerDiscreteScheduler.from_config(ldm_scheduler().config, timestep_spacing="linspace")
    euler.set_timesteps(7)
    assert any(float(t) % 1 for t in euler.timesteps)
    for t, sigma in zip(euler.timesteps, euler.sigmas, strict=False):
        signal, level = signal_and_noise(euler, t)
        assert level / signal == pytest.approx(float(sigma), rel=1e-4)
        assert signal**2 + level**2 == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_along_the_gradient_by_hand(kind):
    """A network that is right about the noise, a decoder that doubles, a loss with a known gradient."""
    noise, target, noisy = torch.randn(3, 2, 3, 4, 4)
    t = torch.tensor(400)
    signal, level = signal_and_noise(scheduler(), t)

    def predict(_, z):
        return prediction_of(kind, (z - level * noise) / signal, noise, signal, level)

    def loss(pictures):
        return (pictures - target).square().sum(dim=(1, 2, 3)) / 2

    guided = guide_prediction(predict, lambda z: 2 * z, loss, 0.1, scheduler(kind), t, noisy)
    clean = (noisy - level * noise) / signal
    gradient = (2 * clean - target) * 2 / signal  # of the loss with respect to the noisy latents
    new_clean, new_noise = split_prediction(scheduler(kind), guided, noisy, t)
    torch.testing.assert_close(new_noise, noise + 0.1 * level * gradient, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(signal * new_clean + level * new_noise, noisy, atol=1e-5, rtol=1e-4)
    assert loss(2 * new_clean).sum() < loss(2 * clean).sum()
    assert not guided.requires_grad


def test_the_loss_of_a_small_picture():
    large = torch.rand(2, 3, 16, 24)
    small = F.interpolate(large, size=(4, 6), mode="bicubic", antialias=True).clamp(0, 1)
    loss = low_resolution_guidance(small)(2 * large - 1)
    assert loss.shape == (2,) and loss.max() < 0.05
    one = low_resolution_guidance(small[0])(2 * large - 1)
    assert one[0] < 0.05 < one[1]
    shrunk = F.interpolate(large, size=(4, 6), mode="bicubic", antialias=True)[1]
    torch.testing.assert_close(one[1], 2 * (shrunk - small[0]).square().sum())


@pytest.mark.parametrize("size", [1e-8, 1e-5, 1.0])
def test_gradients_of_any_size_survive_float16(size):
    """Also in a network whose inner gradients are 1000 times as large as those at its ends."""
    noise, target, noisy = torch.randn(3, 2, 3, 4, 4)
    t = torch.tensor(400)

    def loss(pictures):
        return size * (pictures.float() - target).square().sum(dim=(1, 2, 3))

    def gradient(dtype):
        def predict(_, z):
            return 0 * z + noise.to(dtype)

        def decode(z):
            return (1e-3 * z.to(dtype)) * 1e3

        arguments = (predict, decode, loss, 1 / size, scheduler("epsilon"), t, noisy.to(dtype))
        return (guide_prediction(*arguments).float() - noise) / 1000

    torch.testing.assert_close(gradient(torch.float16), gradient(torch.float32), atol=1e-3, rtol=2e-2)
