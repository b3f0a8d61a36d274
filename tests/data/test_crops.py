"""Crops: what is drawn, that picture, map and small picture are cut alike, what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.data.crops import Crop, draw_crop, draw_patch, prepare_image


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_an_unscaled_crop_is_the_pixels_themselves():
    image = picture(9, 7)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for flip in (False, True):
        cut = Crop((9, 7), left=3, top=2, side=4, flip=flip).image(image, 4)
        expected = pixels[:, 2:6, 3:7]
        assert torch.equal(((cut + 1) * 127.5).round().byte(), expected.flip(2) if flip else expected)


def test_the_middle_of_a_picture_is_what_other_recipes_cut():
    image = picture(64, 64)
    crop = draw_crop(image.size, 32, generator(), center_crop=True)
    assert (crop.left, crop.top, crop.side, crop.flip) == (0, 0, 64, False) and crop.box == (0, 0, 1, 1)
    torch.testing.assert_close(crop.image(image, 32), prepare_image(image, 32, center_crop=True))


def test_sides_and_places_follow_the_range():
    draws = generator()
    crops = [draw_crop((100, 60), 16, draws, scale=(0.5, 1.0), random_flip=True) for _ in range(2000)]
    sides = np.array([crop.side for crop in crops])
    assert sides.min() == 30 and sides.max() == 59  # int(60 * U(0.5, 1))
    assert abs(sides.mean() - 44.5) < 4 * (30**2 / 12 / 2000) ** 0.5
    assert all(0 <= c.left <= 100 - c.side and 0 <= c.top <= 60 - c.side for c in crops)
    assert max(c.left + c.side for c in crops) == 100 and min(c.left for c in crops) == 0
    assert abs(np.mean([c.flip for c in crops]) - 0.5) < 4 * (0.25 / 2000) ** 0.5


def test_a_range_from_zero_starts_at_the_resolution():
    draws = generator()
    sides = {draw_crop((50, 40), 32, draws, scale=(0, 1)).side for _ in range(500)}
    assert sides == set(range(32, 41))
    assert draw_crop((50, 20), 32, draws, scale=(0, 1)).side == 20  # a small picture is taken whole


def test_options_change_no_later_draw():
    states = []
    for options in ({}, {"center_crop": True}, {"random_flip": True, "scale": (0.5, 1)}, {"scale": (0, 1)}):
        draws = generator()
        draw_crop((50, 40), 32, draws, **options)
        states.append(draws.get_state())
    draws = generator()
    draw_patch((50, 40), 32, draws, multiple=4)
    assert all(torch.equal(state, draws.get_state()) for state in states)


def test_maps_are_cut_like_their_pictures():
    labels = np.random.default_rng(0).integers(0, 5, (40, 50), dtype=np.uint8)
    image = Image.fromarray(np.repeat(labels[..., None] * 20, 3, axis=2))
    crop = Crop((50, 40), left=7, top=3, side=32, flip=True)
    cut = crop.labels(Image.fromarray(labels), 32)
    assert cut.dtype == torch.int64
    torch.testing.assert_close(cut * 20 / 127.5 - 1, crop.image(image, 32)[0])
    assert set(crop.labels(Image.fromarray(labels), 16).unique().tolist()) <= set(range(5))  # never mixed


def test_a_pair_is_cut_alike_and_never_resampled():
    low = picture(12, 10)
    high = low.resize((48, 40), Image.Resampling.NEAREST)
    for seed in range(8):
        crop = draw_patch(high.size, 16, generator(seed), multiple=4, random_flip=True)
        assert crop.left % 4 == crop.top % 4 == 0 and crop.side == 16
        small, large = crop.image(low, 4), crop.image(high, 16)
        torch.testing.assert_close(small.repeat_interleave(4, 1).repeat_interleave(4, 2), large, rtol=0, atol=0)
    middle = draw_patch(high.size, 16, generator(), multiple=4, center_crop=True)
    assert (middle.left, middle.top) == (16, 12)


def test_area_is_the_mean_of_blocks():
    image = picture(8, 8)
    cut = Crop((8, 8), 0, 0, 8).image(image, 4, "area")
    blocks = torch.from_numpy(np.array(image)).float().view(4, 2, 4, 2, 3).mean((1, 3)).permute(2, 0, 1)
    assert ((cut + 1) * 127.5 - blocks).abs().max() <= 1  # rounded twice
    assert Crop((8, 8), 0, 0, 8).image(image, 16, "area").shape == (3, 16, 16)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Crop((8, 8), 0, 0, 8).labels(picture(8, 8), 8), "mode 'RGB', but must have one channel"),
        (lambda: Crop((8, 8), 0, 0, 8).labels(Image.new("L", (8, 9)), 8), "has 8x9 pixels, its picture 8x8"),
        (lambda: draw_patch((40, 30), 32, generator()), "40x30 pixels, a crop without resizing needs 32 a side"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
