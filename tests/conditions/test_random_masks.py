"""Random holes as LaMa's: strokes and boxes of the documented sizes, never nothing and never everything."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from diffusers_ext.conditions import masks
from diffusers_ext.conditions.masks import mask_batch, random_mask


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", ["large", "medium"])
@pytest.mark.parametrize("shape", [(8, 8), (8, 100), (40, 24), (65, 64)])
def test_binary_and_never_of_one_kind(size, shape):
    one = generator(1)
    for _ in range(100):
        mask = random_mask(*shape, one, size=size)
        assert mask.shape == (1, *shape) and mask.dtype == torch.float32
        assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask_batch(mask[None]).shape == (1, *shape)  # what the pipeline takes


def test_the_generator_decides():
    first, again = ([random_mask(64, 64, one) for _ in range(30)] for one in (generator(), generator()))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({mask.numpy().tobytes() for mask in first}) == 30


def test_shares_and_areas():
    """Half of the large ones and three in thirteen of the medium ones are boxes; large holes are larger."""
    areas = {}
    for size, share in (("large", 1 / 2), ("medium", 0.3 / 1.3)):
        one = generator()
        sample = torch.stack([random_mask(128, 128, one, size=size) for _ in range(240)])[:, 0]
        changes = (sample[:, 1:] != sample[:, :-1]).any(2).sum(1)  # rows unlike the one above: at most two a box
        assert (changes <= 10).float().mean().item() == pytest.approx(share, abs=0.09)
        areas[size] = sample.mean((1, 2))
    assert 0.25 < areas["large"].mean() < 0.5 and areas["medium"].mean() < areas["large"].mean() - 0.05
    assert areas["large"].std() > 0.15  # from a spot to most of the picture


@pytest.mark.parametrize(("size", "low", "high", "margin"), [("large", 30, 150, 10), ("medium", 10, 50, 0)])
@pytest.mark.parametrize("scale", [1, 2])
def test_boxes_have_the_documented_sides(size, low, high, margin, scale):
    setting, one = replace(masks._MASK_SETTINGS[size], boxes=(1, 1)), generator()
    found = []
    for _ in range(200):
        picture = Image.new("L", (256 * scale, 300 * scale))
        masks._draw_boxes(picture, setting, one)
        left, top, right, bottom = picture.getbbox()
        assert np.array(picture)[top:bottom, left:right].all()
        assert min(left, top, 256 * scale - right, 300 * scale - bottom) >= margin * scale
        found += [right - left, bottom - top]
    assert low * scale <= min(found) < 1.3 * low * scale and 0.9 * high * scale < max(found) <= high * scale


@pytest.mark.parametrize("side", [64, 128])
def test_strokes_have_the_documented_width_and_length(side):
    setting = replace(masks._MASK_SETTINGS["large"], strokes=(1, 1), width=(40, 40), length=(40, 40))
    one, extents, radii = generator(), [], []
    for _ in range(60):
        picture = Image.new("L", (side, side))
        masks._draw_strokes(picture, setting, one)
        inside = ndimage.distance_transform_edt(np.pad(np.array(picture), 1, mode="edge"))
        radii.append(inside.max() * 256 / side)
        left, top, right, bottom = picture.getbbox()
        extents.append(max(right - left, bottom - top) * 256 / side)
    assert 18 < min(radii) < 23 and np.median(radii) < 29  # half the width; more where parts join
    assert 40 <= min(extents) and 120 < max(extents) <= 5 * 40 + 40 + 8


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((64, 64, generator()), {"size": "thin"}, ValueError, r"`size` is 'thin': it must be one of large, medium"),
        ((7, 64, generator()), {}, ValueError, r"`height` and `width` are 7 and 64: both must be at least 8"),
        ((64, 64, 3), {}, TypeError, r"`generator` is int: it must be a torch\.Generator on the CPU"),
    ],
)
def test_rejects(arguments, options, error, message):
    with pytest.raises(error, match=message):
        random_mask(*arguments, **options)
