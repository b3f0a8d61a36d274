"""Label maps to pictures, of any size."""

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines.tiny_ldm import LABELS, PALETTE, count_runs, seeded, tiny_labels, tiny_ldm

from diffusers_ext import LDMSpatialRescaler

MAP = tiny_labels(0)


@pytest.fixture(scope="module")
def pipe():
    return tiny_ldm("semantic")


def sample(pipe, label_map=MAP, *, seed=0, output_type="latent", **call):
    return pipe(label_map, num_inference_steps=2, generator=seeded(seed), output_type=output_type, **call).images


def maps_seen(pipe, *args, **call):
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 3:].clone()))
    sample(pipe, *args, **call)
    hook.remove()
    return seen


def test_all_forms_of_a_map_mean_the_same(pipe):
    expected = sample(pipe)
    small, colored = MAP.astype(np.uint8), Image.fromarray(np.array(PALETTE, dtype=np.uint8)[MAP])
    indexed = Image.fromarray(small)
    indexed.putpalette(sum(PALETTE, []))
    assert indexed.mode == "P"
    for form in (small, torch.tensor(MAP), [MAP], MAP[None], Image.fromarray(small), indexed, colored):
        assert torch.equal(sample(pipe, form), expected)
    assert (sample(pipe, tiny_labels(1)) - expected).abs().max() > 1e-4


def test_the_network_sees_the_rescaled_map_behind_the_latents(pipe):
    first, *_ = maps_seen(pipe, guidance_scale=3.0)
    assert not first[0].any()  # nothing is known there
    torch.testing.assert_close(first[1:], pipe.spatial_rescaler(torch.tensor(MAP)[None]))


def test_any_size_and_resizing_of_the_map(pipe):
    large = tiny_labels(0, 40, 24)
    assert sample(pipe, large).shape == (1, 3, 10, 6)
    doubled = MAP.repeat(2, axis=0).repeat(2, axis=1)
    assert torch.equal(sample(pipe, MAP, height=32, width=32), sample(pipe, doubled))


def test_several_maps_and_pictures(pipe):
    maps = [MAP, tiny_labels(1)]
    both = pipe(
        maps, num_inference_steps=2, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3), output_type="latent"
    ).images
    torch.testing.assert_close(both[3:], sample(pipe, maps[1], seed=3), atol=1e-5, rtol=1e-5)


def test_tiles_get_their_part_of_the_rescaled_map(pipe):
    labels = torch.tensor(tiny_labels(0, 40, 24))[None]
    whole = pipe.encode_labels(labels).concat
    seen = maps_seen(pipe, tiny_labels(0, 40, 24), tile_size=16, guidance_scale=1.0)
    torch.testing.assert_close(seen[0], whole[..., :4, :4])


BAD = [
    (
        np.full((16, 16), 4),
        ValueError,
        r"holds 1 unknown label\(s\), 4 at x=0, y=0: this model knows .* 0 to 3",
    ),
    (np.full((16, 16), 255, np.uint8), ValueError, r"255 at x=0, y=0.*unlabelled \(often 255\) needs a label"),
    (np.full((16, 16), -1), ValueError, r"-1 at x=0"),
    (np.zeros((16, 16)), TypeError, r"`label_map` must hold integers, one label a pixel, received torch\.float64"),
    (np.zeros((16, 18), int), ValueError, r"`label_map\.width` must be a multiple of 8.*18, nearest valid: 16 or 24"),
    (np.zeros(16, int), ValueError, r"`label_map` must have shape \(H, W\) or \(b, H, W\), received \(16,\)"),
    ([], ValueError, r"`label_map` is an empty list"),
    ([MAP, tiny_labels(0, 8, 16)], ValueError, r"different sizes: 16x8, 16x16"),
    ("map.png", TypeError, r"`label_map` must be a PIL picture, an integer array or tensor.*received str"),
    (Image.new("RGBA", (16, 16)), ValueError, r"mode 'RGBA'; the modes L, P and I hold labels"),
    (Image.new("RGB", (16, 16), (9, 99, 199)), ValueError, r"has the colour \(9, 99, 199\) in row 0, column 0"),
]


@pytest.mark.parametrize(("label_map", "error", "message"), BAD)
def test_bad_maps_are_refused_before_any_network_runs(pipe, label_map, error, message):
    runs = count_runs(pipe)
    with pytest.raises(error, match=message):
        sample(pipe, label_map)
    assert not runs


def test_colours_need_a_palette_and_sizes_must_meet():
    pipe = tiny_ldm("semantic", label_palette=None)
    with pytest.raises(ValueError, match=r"a coloured picture, but the pipeline has no `label_palette`"):
        sample(pipe, Image.new("RGB", (16, 16)))
    pipe = tiny_ldm("semantic", spatial_rescaler=LDMSpatialRescaler(len(LABELS), 3, num_stages=1))
    with pytest.raises(ValueError, match=r"`spatial_rescaler` shrinks maps by 2, `vqvae` pictures by 4"):
        sample(pipe)
    with pytest.raises(ValueError, match=r"built without spatial_rescaler"):
        sample(tiny_ldm("semantic", spatial_rescaler=None))
