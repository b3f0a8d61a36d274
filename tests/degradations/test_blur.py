"""The blur of Cascaded Diffusion's augmentation; its recorded numbers are in tests/parity."""

import pytest
import torch

from diffusers_ext.degradations.blur import blur_augmentation, gaussian_blur_3x3

IMAGES = torch.rand(6, 3, 5, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_weights_of_the_kernel_and_the_mirrored_border():
    """cascaded_diffusion.md: sigma 0.5 has the weights 0.106507 and 0.786986."""
    dot = torch.zeros(1, 1, 5, 5)
    dot[..., 2, 2] = 1
    row = torch.tensor([0.106507, 0.786986, 0.106507])
    blurred = gaussian_blur_3x3(dot, 0.5)[0, 0]
    torch.testing.assert_close(blurred[1:4, 1:4], torch.outer(row, row), atol=1e-6, rtol=0)
    assert blurred.sum() == pytest.approx(1, abs=1e-6)
    edge = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])  # beside the edge lies the second pixel again
    torch.testing.assert_close(gaussian_blur_3x3(edge, 0.5)[0, 0, 0], torch.tensor([0.786986, 0.213014]))


def test_one_sigma_a_sample():
    sigma = torch.linspace(0.3, 1.2, 6)
    together = gaussian_blur_3x3(IMAGES, sigma)
    for image, one, expected in zip(IMAGES, sigma, together, strict=True):
        torch.testing.assert_close(gaussian_blur_3x3(image[None], one)[0], expected)
    assert gaussian_blur_3x3(IMAGES.bfloat16(), sigma).dtype == torch.bfloat16


def test_augmentation_blurs_each_image_or_leaves_it():
    images = IMAGES[:1].expand(400, -1, -1, -1)
    found = blur_augmentation(images, sigma_range=(0.4, 1.0), generator=torch.Generator().manual_seed(3))
    changed = (found != images).flatten(1).any(1)
    assert 160 < changed.sum() < 240  # half of 400, standard deviation 10
    assert torch.equal(found[~changed], images[~changed])
    least, most = (gaussian_blur_3x3(images[:1], sigma) - images[:1] for sigma in (0.4, 1.0))
    strength = (found - images)[changed].flatten(1).norm(dim=1)
    assert (strength >= 0.999 * least.norm()).all() and (strength <= 1.001 * most.norm()).all()
    assert strength.unique().numel() == changed.sum()  # each has its own sigma
    assert torch.equal(blur_augmentation(images, probability=0.0), images)
    assert (blur_augmentation(images, probability=1.0) != images).flatten(1).any(1).all()


def test_augmentation_depends_on_the_samples_own_generator():
    def generators(order):
        return [torch.Generator().manual_seed(seed) for seed in order]

    order = [5, 2, 9, 1, 7, 3]
    expected = blur_augmentation(IMAGES, generator=generators(order))
    for i, seed in enumerate(order):
        alone = blur_augmentation(IMAGES[i : i + 1], generator=generators([seed]))
        torch.testing.assert_close(alone[0], expected[i])
    assert not torch.equal(blur_augmentation(IMAGES, generator=generators(order[::-1])), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_blur_3x3(IMAGES[0], 0.5), r"`images` is torch.float32 of shape \(3, 5, 7\)"),
        (lambda: gaussian_blur_3x3(IMAGES[..., :1], 0.5), r"sides of at least 2"),
        (lambda: gaussian_blur_3x3(IMAGES.byte(), 0.5), r"`images` is torch.uint8"),
        (lambda: gaussian_blur_3x3(IMAGES, 0.0), r"`sigma` is 0.0: pass one number above 0"),
        (lambda: gaussian_blur_3x3(IMAGES, torch.ones(2)), r"`sigma` is \[1.0, 1.0\]: .*each of 6 images"),
        (lambda: blur_augmentation(IMAGES, sigma_range=(0.6, 0.4)), r"`sigma_range` is \(0.6, 0.4\)"),
        (lambda: blur_augmentation(IMAGES, sigma_range=(0.0, 0.4)), r"from a number above 0"),
        (lambda: blur_augmentation(IMAGES, probability=1.5), r"`probability` is 1.5"),
        (lambda: blur_augmentation(IMAGES, generator=[torch.Generator()]), r"`generator` holds 1 generators"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
