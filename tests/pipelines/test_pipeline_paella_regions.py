"""Several prompts in one picture, and frames on the way from one prompt to another."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines.tiny_paella import CONDITION_DIM, count_runs, quiet, seeded, tiny_paella_components

from diffusers_ext import PaellaPipeline
from diffusers_ext.conditions.regions import (
    interpolate_vectors,
    mix_vectors,
    ramp_map,
    region_map,
    region_weights,
    strip_weights,
)

PAIR = ["a small red star", "a large blue ring"]


def make_pipe(**options) -> PaellaPipeline:
    return quiet(PaellaPipeline(**{**tiny_paella_components(), **options}))


@pytest.fixture(scope="module")
def pipe() -> PaellaPipeline:
    """Shared, so no test may change it."""
    return make_pipe()


def tokens(pipe, prompt, seed=0, **options) -> torch.Tensor:
    options = {"num_inference_steps": 3, "generator": seeded(seed)[0], **options}
    return pipe(prompt, output_type="latent", **options).images


# --- the tensor functions


def test_slerp_goes_along_the_arc_at_even_speed():
    a, b = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    frames = interpolate_vectors(torch.stack([a, b]), 7, "slerp")
    torch.testing.assert_close(frames.norm(dim=1), torch.full((7,), 3.0))
    angles = torch.atan2(frames[:, 1], frames[:, 0])
    torch.testing.assert_close(angles, torch.linspace(0, math.pi / 2, 7))
    # unequal lengths: the direction turns as between unit vectors' weights, the magnitudes stay in
    half = mix_vectors(a, 2 * b, torch.tensor(0.5), "slerp")
    torch.testing.assert_close(half, math.sin(math.pi / 4) * (a + 2 * b))


@pytest.mark.parametrize("interpolation", ["lerp", "slerp"])
def test_interpolation_meets_every_prompt_exactly(interpolation):
    vectors = torch.randn(3, 5, generator=seeded(0)[0])
    frames = interpolate_vectors(vectors, 9, interpolation)
    assert frames.shape == (9, 5) and torch.equal(frames[[0, 4, 8]], vectors)
    half = frames[2]
    between = (vectors[0] + vectors[1]) / 2
    assert torch.nn.functional.cosine_similarity(half, between, dim=0) > 0.8
    assert torch.allclose(half, between) == (interpolation == "lerp")
    assert interpolate_vectors(vectors.bfloat16(), 4, interpolation).dtype == torch.bfloat16


def test_slerp_without_an_arc_is_lerp():
    a = torch.tensor([1.0, 2.0])
    weight = torch.tensor(0.25)
    for b in (3 * a, -a, torch.zeros(2)):
        torch.testing.assert_close(mix_vectors(a, b, weight, "slerp"), torch.lerp(a, b, 0.25))


def test_ramps_turn_with_the_side():
    vectors = torch.randn(2, 5, generator=seeded(0)[0])
    columns, rows = ramp_map(vectors, 4, 6, "column_ramp"), ramp_map(vectors, 6, 4, "row_ramp")
    assert columns.shape == (5, 4, 6) and torch.equal(columns, rows.transpose(1, 2))
    assert torch.equal(columns[:, 2, 0], vectors[0]) and torch.equal(columns[:, 2, 5], vectors[1])
    torch.testing.assert_close(columns[:, 0, 1], vectors[0] + (vectors[1] - vectors[0]) / 5)


def test_strips_are_equal_and_in_order():
    weights = strip_weights(3, 4, 12, "columns")
    assert weights.shape == (3, 4, 12) and weights.argmax(dim=0)[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert strip_weights(2, 5, 4, "rows").argmax(dim=0)[:, 0].tolist() == [0, 0, 0, 1, 1]  # as near as it goes


def test_boxes_masks_and_weights_mean_the_same():
    left = np.zeros((8, 12), dtype=np.uint8)
    left[:, :6] = 255
    wanted = strip_weights(2, 4, 6, "columns")
    for regions in [
        [(0, 0, 6, 8), (6, 0, 12, 8)],
        [Image.fromarray(left), Image.fromarray(255 - left)],
        [left > 0, None],
        [None, [6, 0, 12, 8]],
        np.stack([left > 0, left == 0]),
        torch.from_numpy(np.stack([left, 255 - left])) / 255,
        wanted,
    ]:
        assert torch.equal(region_weights(regions, 2, 8, 12, 2), wanted)
    vectors = torch.randn(2, 5, generator=seeded(0)[0])
    mapped = region_map(vectors, wanted)
    assert torch.equal(mapped[:, 1, 2], vectors[0]) and torch.equal(mapped[:, 1, 3], vectors[1])


def test_an_edge_inside_a_token_mixes_by_area():
    weights = region_weights([(0, 0, 5, 8), None], 2, 8, 12, 4)
    torch.testing.assert_close(weights[0, 0], torch.tensor([1.0, 0.25, 0.0]))
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(2, 3))


# --- regions


def test_logits_far_from_the_border_are_the_single_prompts(pipe):
    """The network is convolutional: beyond its reach a place sees one condition only."""
    x, t = torch.randint(24, (1, 8, 64), generator=seeded(0)[0]), torch.tensor(0.3)
    embeds = pipe.encode_prompt(PAIR)[0]
    spatial = pipe.encode_regions(PAIR, "columns", 16, 128)
    assert spatial.shape == (1, CONDITION_DIM, 8, 64)
    with torch.no_grad():
        both = pipe.unet(x, t, spatial).sample
        left, right = pipe.unet(x, t, embeds[:1]).sample, pipe.unet(x, t, embeds[1:]).sample
    torch.testing.assert_close(both[..., :20], left[..., :20], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[..., 44:], right[..., 44:], rtol=1e-4, atol=1e-5)
    assert (both - left)[..., 44:].abs().max() > 0.01  # the prompts do differ


def test_each_region_draws_what_its_prompt_draws_alone(pipe):
    call = {"height": 16, "width": 256, "num_inference_steps": 2}
    both = tokens(pipe, PAIR, regions="columns", **call)
    assert both.shape == (1, 8, 128)
    assert torch.equal(both[..., :32], tokens(pipe, PAIR[0], **call)[..., :32])
    assert torch.equal(both[..., 96:], tokens(pipe, PAIR[1], **call)[..., 96:])
    assert not torch.equal(both[..., 96:], tokens(pipe, PAIR[0], **call)[..., 96:])


def test_one_prompt_everywhere_is_the_plain_call(pipe):
    plain = tokens(pipe, PAIR[0])
    same = [PAIR[0]] * 2
    for regions in ("columns", "rows", "row_ramp", "column_ramp", [(0, 0, 7, 16), None]):
        assert torch.equal(plain, tokens(pipe, same, regions=regions)), regions
    assert torch.equal(plain, tokens(pipe, PAIR[:1], regions=[None]))


def test_regions_are_turned_with_the_picture(pipe):
    left_right, top_down = tokens(pipe, PAIR, regions="columns"), tokens(pipe, PAIR, regions="rows")
    assert not torch.equal(left_right, top_down)
    assert torch.equal(left_right, tokens(pipe, PAIR, regions=[(0, 0, 8, 16), (8, 0, 16, 16)]))
    assert torch.equal(left_right, tokens(pipe, PAIR[::-1], regions=[(8, 0, 16, 16), None]))
    embeds = pipe.encode_prompt(PAIR)[0]
    assert torch.equal(left_right, tokens(pipe, None, prompt_embeds=embeds, regions="columns"))


def test_maps_are_conditions_like_any_other(pipe):
    """One call of several such pictures, several images of one, negative prompts."""
    maps = [pipe.encode_regions(PAIR, regions) for regions in ("columns", "row_ramp")]
    together = tokens(pipe, None, prompt_embeds=torch.cat(maps), generator=seeded(0, 1))
    assert torch.equal(together[:1], tokens(pipe, PAIR, regions="columns", generator=seeded(0)))
    assert torch.equal(together[1:], tokens(pipe, PAIR, regions="row_ramp", generator=seeded(1)))
    two = tokens(pipe, PAIR, regions="columns", num_images_per_prompt=2, generator=seeded(0, 1))
    assert torch.equal(two[:1], together[:1]) and two.shape == (2, 8, 8)
    curved = pipe.encode_regions(PAIR, "row_ramp", interpolation="slerp")
    assert torch.equal(curved[0, :, 0, 0], maps[1][0, :, 0, 0]) and not torch.allclose(curved, maps[1])
    negative = tokens(pipe, PAIR, regions="columns", negative_prompt="a cross", generator=seeded(0))
    assert negative.shape == (1, 8, 8) and not torch.equal(negative, together[:1])


def test_the_null_branch_of_a_map_is_zeros(pipe):
    seen = {}
    names = ["prompt_embeds", "negative_prompt_embeds"]

    def watch(pipeline, i, t, tensors):
        seen.update(tensors)

    tokens(pipe, PAIR, regions="columns", callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names)
    assert seen["negative_prompt_embeds"].shape == seen["prompt_embeds"].shape == (1, CONDITION_DIM, 8, 8)
    assert seen["negative_prompt_embeds"].abs().max() == 0 and seen["prompt_embeds"].abs().max() > 0


# --- interpolation


def frames_of(pipe, prompt=PAIR, num_frames=5, interpolation="lerp", **options) -> torch.Tensor:
    options = {"num_inference_steps": 3, "generator": seeded(0)[0], "output_type": "latent", **options}
    return pipe.interpolate(prompt, num_frames, interpolation, **options).images


@pytest.mark.parametrize("interpolation", ["lerp", "slerp"])
def test_first_and_last_frame_are_plain_calls(pipe, interpolation):
    frames = frames_of(pipe, interpolation=interpolation)
    assert frames.shape == (5, 8, 8)
    assert torch.equal(frames[:1], tokens(pipe, PAIR[0])) and torch.equal(frames[4:], tokens(pipe, PAIR[1]))
    embeds = interpolate_vectors(pipe.encode_prompt(PAIR)[0], 5, interpolation)
    assert torch.equal(frames[2:3], tokens(pipe, None, prompt_embeds=embeds[2:3]))


def test_the_way_leads_through_every_prompt(pipe):
    frames = frames_of(pipe, [*PAIR, "a green cross"], 5)
    assert torch.equal(frames[2:3], tokens(pipe, PAIR[1])) and torch.equal(frames[4:], tokens(pipe, "a green cross"))


def test_all_frames_share_the_noise(pipe):
    still = frames_of(pipe, [PAIR[0]] * 2, 4, batch_size=3)
    assert torch.equal(still, tokens(pipe, PAIR[0]).expand(4, -1, -1))
    torch.manual_seed(3)
    unseeded = frames_of(pipe, [PAIR[0]] * 2, 3, generator=None)
    assert torch.equal(unseeded[0], unseeded[2]) and not torch.equal(unseeded[0], still[0])


def test_the_generator_moves_as_in_one_plain_call(pipe):
    one, many = seeded(0, 0)
    tokens(pipe, PAIR[0], generator=one)
    frames_of(pipe, generator=many, batch_size=2)
    assert torch.equal(one.get_state(), many.get_state())


def test_frames_do_not_depend_on_the_batch(pipe):
    wanted = frames_of(pipe)
    for batch_size in (1, 2, 7):
        assert torch.equal(wanted, frames_of(pipe, batch_size=batch_size))


def test_arguments_reach_the_frames(pipe):
    latents = torch.randint(24, (1, 8, 12), generator=seeded(4)[0])
    call = {"negative_prompt": "a cross", "guidance_scale": 2.0, "temperature": 0.5, "renoise_steps": 1}
    frames = frames_of(pipe, num_frames=2, latents=latents, **call)
    assert torch.equal(frames[1:], tokens(pipe, PAIR[1], latents=latents, **call))
    embeds = pipe.encode_prompt(PAIR)[0]
    assert torch.equal(frames, frames_of(pipe, None, 2, prompt_embeds=embeds, latents=latents, **call))
    assert frames_of(pipe, num_frames=2, height=24, width=12).shape == (2, 12, 6)


def test_output_types_of_frames(pipe):
    seen = {kind: frames_of(pipe, num_frames=3, output_type=kind, batch_size=2) for kind in ("pil", "np", "pt")}
    assert [image.size for image in seen["pil"]] == [(16, 16)] * 3
    assert seen["np"].shape == (3, 16, 16, 3) and seen["pt"].shape == (3, 3, 16, 16)
    np.testing.assert_allclose(seen["np"], seen["pt"].permute(0, 2, 3, 1).numpy())
    plain = pipe.interpolate(PAIR, 2, num_inference_steps=1, return_dict=False)
    assert isinstance(plain, tuple) and len(plain[0]) == 2


# --- what is refused, before any model runs

LEFT, RIGHT = (0, 0, 8, 16), (8, 0, 16, 16)
HALF = np.zeros((16, 16), dtype=np.uint8)
HALF[:, :8] = 255
BAD_REGIONS = [
    ({"regions": "diagonal"}, ValueError, "one of columns, rows, column_ramp, row_ramp, or one box.*'diagonal'"),
    ({"regions": 3}, TypeError, "`regions` must be a string, a list .*received int"),
    ({"regions": [LEFT]}, ValueError, "`regions` holds 1 regions for 2 prompts; pass one a prompt"),
    ({"regions": []}, ValueError, "`regions` holds 0 regions for 2 prompts"),
    ({"regions": [LEFT, (10, 0, 16, 16)]}, ValueError, "leave 32 of 256 pixels without a prompt, .* x=8, y=0.*None"),
    ({"regions": [(0, 0, 9, 16), RIGHT]}, ValueError, "overlap in 16 pixels; at x=8, y=0 both prompt 0 and prompt 1"),
    ({"regions": [HALF, HALF]}, ValueError, "overlap in 128 pixels; at x=0, y=0.*weights that sum to 1"),
    ({"regions": [None, None]}, ValueError, "holds None 2 times; only one prompt"),
    ({"regions": [(0, 0, 16, 16), None]}, ValueError, r"`regions\[1\]` covers no pixel"),
    (
        {"regions": [LEFT, (8, 0, 20, 16)]},
        ValueError,
        r"`regions\[1\]` must be a box .*within 16x16.*\(8, 0, 20, 16\)",
    ),
    ({"regions": [LEFT, (16, 0, 8, 16)]}, ValueError, r"`regions\[1\]`.*left < right"),
    ({"regions": [LEFT, (8, 16)]}, ValueError, r"`regions\[1\]` must be a box \(left, top, right, bottom\)"),
    (
        {"regions": [HALF, HALF[:8]]},
        ValueError,
        r"`regions\[1\]` must be one mask of 16x16 pixels, received 1 of 16x8",
    ),
    ({"regions": [HALF // 2, None]}, ValueError, r"`regions\[0\]` must be binary.*127"),
    ({"regions": [HALF, "right"]}, TypeError, r"`regions\[1\]` must be a PIL picture.*received str"),
    ({"regions": torch.full((2, 16, 16), 0.4)}, ValueError, "sum to 1.*sums go from 0.8 to 0.8"),
    ({"regions": torch.tensor([2.0, -1.0])[:, None, None].expand(2, 8, 8)}, ValueError, "the least is -1"),
    ({"regions": torch.full((2, 16, 8), 0.5)}, ValueError, r"\(n, 16, 16\) in pixels or \(n, 8, 8\) in tokens"),
    ({"regions": "columns", "prompt": "a star"}, ValueError, "At least two prompts.*received 1"),
    (
        {"regions": "row_ramp", "prompt": ["a star"]},
        ValueError,
        "goes through 2 to 8 prompts in this size, received 1",
    ),
    ({"regions": "columns", "prompt": ["a"] * 9}, ValueError, "8 places do not hold 9 prompts"),
    ({"regions": "columns", "prompt": None}, ValueError, "exactly one of `prompt` and `prompt_embeds`"),
    ({"regions": "rows", "width": 18}, ValueError, "`width` must be a multiple of 4"),
    (
        {"regions": "rows", "prompt": None, "prompt_embeds": torch.zeros(2, CONDITION_DIM, 8, 8)},
        ValueError,
        r"is a map over the grid already; with `regions` it must have shape \(n, d\)",
    ),
    ({"regions": "rows", "negative_prompt": ["a", "b"]}, ValueError, "holds 2 texts for 1 prompts"),
    ({"regions": "rows", "generator": seeded(0, 1)}, ValueError, "a list of 2, but 1 images"),
]
BAD_FRAMES = [
    ({"prompt": "a star"}, ValueError, "at least 2 prompts, received 1"),
    ({"prompt": None}, ValueError, "exactly one of `prompt` and `prompt_embeds`"),
    ({"num_frames": 1}, ValueError, "`num_frames` must be at least 2, received 1"),
    ({"num_frames": 2.0}, TypeError, "`num_frames` must be an integer"),
    ({"prompt": ["a", "b", "c"], "num_frames": 2}, ValueError, "`num_frames` must be at least 3"),
    ({"interpolation": "cubic"}, ValueError, "`interpolation` must be one of lerp, slerp; received 'cubic'"),
    ({"generator": seeded(0, 1)}, TypeError, "`generator` must be one torch.Generator, since all frames share"),
    ({"negative_prompt": ["a", "b"]}, TypeError, "`negative_prompt` must be one text for all frames"),
    ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
    ({"latents": torch.zeros(5, 8, 8).long()}, ValueError, r"`latents` must have shape \(1, 8, 8\)"),
    ({"height": 17}, ValueError, "`height` must be a multiple of 4"),
    ({"temperature": -1.0}, ValueError, "temperature"),
    ({"renoise_steps": 99}, ValueError, "renoise_steps"),
    ({"output_type": "gif"}, ValueError, "`output_type` must be one of"),
    (
        {"prompt": None, "prompt_embeds": torch.zeros(2, CONDITION_DIM, 8, 8)},
        ValueError,
        r"shape \(n, d\), one vector",
    ),
]


@pytest.fixture(scope="module")
def watched():
    pipe = make_pipe()
    return pipe, count_runs(pipe)


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_REGIONS, ids=[str(k) for k in range(len(BAD_REGIONS))])
def test_bad_regions_are_refused_before_any_model_runs(watched, arguments, error, message):
    pipe, runs = watched
    runs.clear()
    with pytest.raises(error, match=message):
        pipe(**{"prompt": PAIR, **arguments})
    assert runs == []


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_FRAMES, ids=[str(k) for k in range(len(BAD_FRAMES))])
def test_bad_interpolations_are_refused_before_any_model_runs(watched, arguments, error, message):
    pipe, runs = watched
    runs.clear()
    with pytest.raises(error, match=message):
        pipe.interpolate(**{"prompt": PAIR, **arguments})
    assert runs == []


def test_slerp_belongs_to_ramps(watched):
    pipe, runs = watched
    runs.clear()
    with pytest.raises(ValueError, match="`interpolation='slerp'` belongs to the ramps column_ramp, row_ramp"):
        pipe.encode_regions(PAIR, "columns", interpolation="slerp")
    assert runs == []
