"""Layout to image: boxes and names, tokens of tiles, boxes drawn over the sample."""

import numpy as np
import pytest
import torch
from pipelines.tiny_ldm import count_runs, seeded, tiny_ldm, tiny_picture

from diffusers_ext.conditions.layout import LayoutObject

BOXES = [(0.1, 0.2, 0.5, 0.9), (0.6, 0.0, 1.0, 0.4)]
NAMES = ["circle", "star"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_ldm("layout")


def sample(pipe, boxes=BOXES, names=NAMES, *, seed=0, output_type="latent", **call):
    return pipe(boxes, names, num_inference_steps=2, generator=seeded(seed), output_type=output_type, **call).images


def tokens_seen(pipe, **call):
    seen = []
    hook = pipe.layout_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    sample(pipe, **call)
    hook.remove()
    return seen


def test_boxes_become_the_recorded_tokens(pipe):
    """A grid of 11 x 11 points: token = 11 y + x; class first; 127 is "none"; the whole picture as crop."""
    null, whole = tokens_seen(pipe, guidance_scale=2.0)
    assert whole == [[0, 2 * 11 + 1, 9 * 11 + 5, 2, 6, 4 * 11 + 10, *[127] * 6, 0, 10 * 11 + 10]]
    assert null == [[127] * 14]
    assert len(tokens_seen(pipe)) == 1


def test_names_numbers_and_arrays_mean_the_same(pipe):
    expected = sample(pipe)
    assert torch.equal(sample(pipe, np.array(BOXES), [0, 2]), expected)
    assert torch.equal(sample(pipe, torch.tensor(BOXES).double().numpy(), ["circle", 2]), expected)
    assert (sample(pipe, BOXES[::-1]) - expected).abs().max() > 1e-4


def test_several_layouts(pipe):
    layouts = [BOXES, BOXES[:1]], [NAMES, NAMES[1:]]
    both = pipe(
        *layouts, num_inference_steps=2, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3), output_type="latent"
    ).images
    torch.testing.assert_close(both[1:2], sample(pipe, seed=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[3:], sample(pipe, BOXES[:1], NAMES[1:], seed=3), atol=1e-5, rtol=1e-5)


def test_each_tile_is_told_its_place_and_what_it_shows(pipe):
    """24 x 16 pixels in tiles of 16: two tiles; what a tile does not show, it is not told."""
    seen = tokens_seen(pipe, height=24, width=16, tile_size=16, tile_stride=8, guidance_scale=2.0)
    circle, star = [0, 23, 104], [2, 6, 54]
    upper = [*circle, *star, *[127] * 6, 0, 7 * 11 + 10]
    lower = [*circle, *star, *[127] * 6, 3 * 11, 120]
    assert sorted(seen) == sorted([[upper], [lower], [[127] * 14]])
    high = [(0.6, 0.0, 1.0, 0.3)]  # above the lower tile, which begins at 1/3
    assert [[127] * 12 + [33, 120]] in tokens_seen(pipe, boxes=high, names=["star"], height=24, tile_size=16)


def test_flags_and_crops_are_the_checkpoints(pipe):
    plain = tiny_ldm("layout", encode_crop=False, use_group_flag=False, num_classes=5)
    assert plain.layout_tokenizer.length == 12 and plain.layout_tokenizer.num_classes == 5
    assert sample(plain, height=24, tile_size=16).shape == (1, 3, 6, 4)  # boxes relative to the tile
    assert pipe.read_layouts(BOXES, NAMES)[0][0] == LayoutObject(0, pytest.approx((0.1, 0.2, 0.4, 0.7)))


def test_boxes_are_drawn_over_the_sample(pipe):
    images = [tiny_picture(0, 64, 64), tiny_picture(1, 64, 64)]
    drawn = pipe.draw_boxes(images, BOXES, NAMES)
    assert [picture.size for picture in drawn] == [(64, 64)] * 2
    for before, after in zip(images, drawn, strict=True):
        changed = (np.asarray(before) != np.asarray(after)).any(axis=-1)
        assert changed[13:57, 6].all() and changed[57, 6:32].all()  # left and lower side of the first box
        assert not changed[60:].any() and not changed[30:50, 40:].any()
    colors = {tuple(np.asarray(drawn[0])[57, 20]), tuple(np.asarray(drawn[0])[25, 50])}
    assert len(colors) == 2
    (one,) = pipe.draw_boxes(images[0], [BOXES], [NAMES])
    assert np.array_equal(np.asarray(one), np.asarray(drawn[0]))
    with pytest.raises(ValueError, match=r"`images` holds 2 pictures for 3 layouts"):
        pipe.draw_boxes(images, [BOXES] * 3, [NAMES] * 3)


BAD = [
    ([], [], ValueError, r"`boxes` is empty: a layout needs at least one box"),
    ([[]], [[]], ValueError, r"`boxes\[0\]` holds 0 boxes and `names\[0\]` 0 names: .* 1 to 4"),
    (BOXES, NAMES[:1], ValueError, r"`boxes` holds 2 boxes and `names` 1 names: pass one name a box"),
    (BOXES * 3, NAMES * 3, ValueError, r"`boxes` holds 6 boxes and `names` 6 names: .* 1 to 4 of them"),
    (
        [(0.5, 0.1, 1.2, 0.4)],
        ["star"],
        ValueError,
        r"`boxes\[0\]` is \(0\.5, 0\.1, 1\.2, 0\.4\): corners are",
    ),
    ([(10, 20, 50, 60)], ["star"], ValueError, r"divide pixels by width and height"),
    ([(0.5, 0.1, np.nan, 0.4)], ["star"], ValueError, r"corners are fractions"),
    (
        [(0.5, 0.5, 0.2, 0.2)],
        ["star"],
        ValueError,
        r"expected \(x0, y0, x1, y1\) with x0 < x1 .* \(not width",
    ),
    ([(0.5, 0.5, 0.2)], ["star"], TypeError, r"`boxes\[0\]` must be four numbers"),
    (
        [(0.1, 0.1, 0.2, 0.2)],
        ["sttar"],
        ValueError,
        r"`names\[0\]` is 'sttar', which is no class.*did you mean 'st",
    ),
    ([(0.1, 0.1, 0.2, 0.2)], [7], ValueError, r"`names\[0\]` is 7: this model knows the classes 0 to 2"),
    ([BOXES], NAMES, ValueError, r"`boxes` holds 1 boxes and `names` 2 names"),
    ([BOXES], [NAMES, NAMES], ValueError, r"`boxes` holds 1 layouts, `names` 2"),
    ("all", NAMES, TypeError, r"`boxes` must be a list, received str"),
    ([BOXES[0]], [["star"]], TypeError, r"`boxes\[0\]\[0\]` must be four numbers .* received 0\.1|`boxes\[0\]`"),
]


@pytest.mark.parametrize(("boxes", "names", "error", "message"), BAD, ids=lambda value: str(value)[:30])
def test_bad_layouts_are_refused_before_any_network_runs(pipe, boxes, names, error, message):
    runs = count_runs(pipe)
    with pytest.raises((ValueError, TypeError) if "|" in message else error, match=message):
        sample(pipe, boxes, names)
    assert not runs


def test_pipelines_that_cannot_be():
    with pytest.raises(ValueError, match=r"knows neither `class_names` nor `num_classes`"):
        sample(tiny_ldm("layout", class_names=None))
    with pytest.raises(ValueError, match=r"`max_objects`=9 is 29 tokens long, layout_encoder takes 14"):
        sample(tiny_ldm("layout", max_objects=9))
