"""Resizing by definition: interpolation without, area and cubic with regard to the factor."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.degradations.resizing import BATCH_RESIZE_METHODS, RESIZE_METHODS, resize, resize_batch

PICTURE = torch.rand(3, 24, 36, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", RESIZE_METHODS)
@pytest.mark.parametrize("size", [(12, 18), (7, 11), (24, 36), (31, 50), (1, 1), (48, 9)])
def test_sizes_and_constants(method, size):
    assert resize(PICTURE, *size, method).shape == (3, *size)
    torch.testing.assert_close(resize(torch.full_like(PICTURE, 0.3), *size, method), torch.full((3, *size), 0.3))
    torch.testing.assert_close(resize(PICTURE, 24, 36, method), PICTURE)


def test_area_is_the_mean_of_what_a_pixel_covers():
    blocks = PICTURE.reshape(3, 8, 3, 9, 4).mean((2, 4))
    torch.testing.assert_close(resize(PICTURE, 8, 9, "area"), blocks)
    row = torch.tensor([[[0.0, 3.0, 6.0]]])  # two pixels of 1.5 old ones each
    torch.testing.assert_close(resize(row, 1, 2, "area"), torch.tensor([[[1.0, 5.0]]]))
    torch.testing.assert_close(resize(row, 1, 4, "area"), torch.tensor([[[0.0, 2.0, 4.0, 6.0]]]))


def test_linear_and_cubic_look_at_the_nearest_pixels_only():
    """Halved, a new pixel lies between two old ones: weights 1/2, 1/2, or a/8 and 1/2 - a/8 with a = -0.75."""
    row = torch.tensor([[[0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]])  # between old pixels 0 | 1, 2 | 3, 4 | 5, 6 | 7
    torch.testing.assert_close(resize(row, 1, 4, "linear"), torch.tensor([[[0.0, 0.5, 0.0, 0.0]]]))
    outer, inner = -0.75 / 8, 0.5 + 0.75 / 8
    torch.testing.assert_close(resize(row, 1, 4, "cubic"), torch.tensor([[[0.0, inner, outer, 0.0]]]))


@pytest.mark.parametrize("size", [(6, 9), (8, 15), (50, 70)])
def test_antialiased_is_that_of_pil(size):
    for channel in PICTURE:
        expected = Image.fromarray(channel.numpy()).resize(size[::-1], Image.Resampling.BICUBIC)
        actual = resize(channel[None], *size, "antialiased")[0]
        torch.testing.assert_close(actual, torch.from_numpy(np.array(expected)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PICTURE, 8, 8, "lanczos"), r"`method` is 'lanczos': it must be one of linear, cubic, area, antialiased"),
        ((PICTURE[0], 8, 8, "area"), r"`image` is torch\.float32 of shape \(24, 36\): expected floating point"),
        ((PICTURE.byte(), 8, 8, "area"), r"`image` is torch\.uint8"),
        ((PICTURE, 0, 8, "area"), r"`height` and `width` are 0 and 8: both must be at least 1"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        resize(*arguments)


@pytest.mark.parametrize("method", BATCH_RESIZE_METHODS)
def test_batches_of_a_cascade(method):
    """Recorded numbers are in tests/parity (resize_choices)."""
    images = torch.stack([PICTURE, PICTURE.flip(-1)]) * 2 - 1
    small = resize_batch(images, 8, 12, method)
    assert small.shape == (2, 3, 8, 12) and small.dtype == torch.float32
    torch.testing.assert_close(small[1:], resize_batch(images[1:], 8, 12, method))
    flat = resize_batch(torch.full_like(images, 0.2), 8, 12, method)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.2), atol=1 / 255, rtol=0)
    if method != "nearest":  # which looks at one corner of each pixel
        torch.testing.assert_close(small[1], small[0].flip(-1), atol=1 / 127, rtol=0)
    if method == "area":
        torch.testing.assert_close(small[0], resize(images[0], 8, 12, "area"))
    if method.startswith("pil"):
        levels = (small + 1) * 127.5
        torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PICTURE[None], 8, 8, "cubic"), r"`method` is 'cubic': it must be one of area, bicubic_antialias"),
        ((PICTURE, 8, 8), r"`images` is torch\.float32 of shape \(3, 24, 36\): expected floating point"),
        ((PICTURE[None], 8, 0), r"`height` and `width` are 8 and 0"),
    ],
)
def test_batch_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        resize_batch(*arguments)
