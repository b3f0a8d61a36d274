"""L0 smoothing: what it does to images. Numbers of the original: tests/parity."""

import pytest
import torch

from diffusers_ext.degradations.l0 import l0_smooth


def step_image(noise: float) -> torch.Tensor:
    image = torch.full((3, 24, 32), -0.5)
    image[:, :, 16:] = 0.5
    return image + noise * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))


def test_noise_goes_and_the_edge_stays():
    smooth = l0_smooth(step_image(0.03), 0.01)
    flat = smooth[:, 2:-2, 2:14]
    assert flat.std() < 0.005 and step_image(0.03)[:, 2:-2, 2:14].std() > 0.02
    assert (smooth[:, :, 17].mean() - smooth[:, :, 14].mean()) > 0.95
    assert smooth.min() > -0.6 and smooth.max() < 0.6  # not the black image of the released call


def test_the_input_stays_and_strength_counts():
    image = step_image(0.1)
    before = image.clone()
    weak, strong = l0_smooth(image, 0.0001), l0_smooth(image, 0.02)
    assert torch.equal(image, before)
    assert (weak - image).abs().mean() < (strong - image).abs().mean()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(1, 3, 8, 8), 0.01), r"`image` is torch\.float32 of shape \(1, 3, 8, 8\)"),
        ((torch.zeros(3, 8, 8).byte(), 0.01), r"`image` is torch\.uint8"),
        ((torch.zeros(3, 8, 8), 0.0), "`strength` is 0.0"),
        ((torch.zeros(3, 8, 8), 0.01, 1.0), "`kappa` 1.0"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        l0_smooth(*arguments)
