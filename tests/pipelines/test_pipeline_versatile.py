"""All modes of Versatile Diffusion on tiny real components."""

import math
import runpy
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler
from PIL import Image
from pipelines.tiny_paella import quiet, seeded, tiny_picture
from pipelines.tiny_versatile import tiny_versatile_components

from diffusers_ext.conditions.focus import rescale_ranks, select_ranks
from diffusers_ext.guidance import classifier_free_guidance
from diffusers_ext.pipelines.versatile.color_matching import match_color_statistics
from diffusers_ext.pipelines.versatile.optimus_text import sentence_ids
from diffusers_ext.pipelines.versatile.pipeline_versatile import VersatilePipeline
from diffusers_ext.pipelines.versatile.pipeline_versatile_edit import VersatileEditPipeline
from diffusers_ext.schedulers.gaussian import signal_and_noise

STEPS = {"num_inference_steps": 2}
LATENT = {**STEPS, "output_type": "latent", "return_dict": False}
FLOWS = [("text", "image"), ("image", "image"), ("image", "text"), ("text", "text")]


@pytest.fixture(scope="module")
def pipe() -> VersatilePipeline:
    return quiet(VersatilePipeline(**tiny_versatile_components()))


def condition(kind: str) -> dict:
    return {"prompt": "a red circle"} if kind == "text" else {"image": tiny_picture(1)}


def latents_of(pipe, *args, seed: int = 0, **options) -> torch.Tensor:
    return pipe(*args, generator=torch.Generator().manual_seed(seed), **{**LATENT, **options})[0]


@pytest.mark.parametrize(("context_type", "data_type"), FLOWS)
def test_four_flows(pipe, context_type, data_type):
    call = {**condition(context_type), "data_type": data_type, "num_images_per_prompt": 2, **STEPS}
    result = pipe(**call, generator=torch.Generator().manual_seed(0))
    made, other = (result.images, result.texts) if data_type == "image" else (result.texts, result.images)
    assert len(made) == 2 and other is None
    again = pipe(**call, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
    if data_type == "image":
        assert all(isinstance(image, Image.Image) and image.size == (16, 16) for image in made)
        assert all(np.array_equal(*pair) for pair in zip(made, again, strict=True))
    else:
        assert all(isinstance(text, str) for text in made) and made == again
    latents = latents_of(pipe, **condition(context_type), data_type=data_type)
    assert latents.shape == ((1, 4, 8, 8) if data_type == "image" else (1, 6))


@torch.no_grad()
@pytest.mark.parametrize(("context_type", "data_type"), FLOWS)
def test_sampling_is_the_plain_loop(pipe, context_type, data_type):
    """DDIM with guidance, one half after the other, from contexts that were encoded apart."""
    if context_type == "text":
        cond, null = pipe.encode_prompt("a red circle")
    else:
        kind = "zeros" if data_type == "image" else "black"
        cond, null = pipe.encode_image(tiny_picture(1), null_image=kind)
    noise = torch.randn((1, 4, 8, 8) if data_type == "image" else (1, 6), generator=torch.Generator().manual_seed(0))
    scheduler = tiny_versatile_components()["scheduler"]
    scheduler.set_timesteps(3)
    x = noise
    for t in scheduler.timesteps:
        halves = [pipe.unet(x, t, c, data_type=data_type, context_type=context_type).sample for c in (cond, null)]
        x = scheduler.step(classifier_free_guidance(*halves, 3.0), t, x).prev_sample
    actual = pipe(
        **condition(context_type), data_type=data_type, latents=noise, **{**LATENT, "num_inference_steps": 3}
    )
    torch.testing.assert_close(actual[0], x, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_contexts_are_normalised_by_the_pooled_token(pipe):
    text, _ = pipe.encode_prompt(["a red circle", "a blue star on the left"])
    assert text.shape == (2, 10, 12)
    ids = pipe.tokenizer(["a red circle", "a blue star on the left"], padding="max_length", max_length=10).input_ids
    ends = [row.index(pipe.tokenizer.eos_token_id) for row in ids]
    for sample, end in enumerate(ends):
        assert text[sample, end].norm() == pytest.approx(1, abs=1e-5)
        assert abs(float(text[sample, end - 1].norm()) - 1) > 1e-3
    image, zeros = pipe.encode_image(tiny_picture(1))
    assert image.shape == (1, 5, 12) and not zeros.any()
    assert image[0, 0].norm() == pytest.approx(1, abs=1e-5) and abs(float(image[0, 1].norm()) - 1) > 1e-3


@torch.no_grad()
def test_dual_context_is_a_mixture_of_both(pipe):
    both = {"prompt": "a red circle", "image": tiny_picture(1)}
    alone = {kind: latents_of(pipe, **condition(kind)) for kind in ("text", "image")}
    assert torch.equal(latents_of(pipe, **both, text_ratio=1), alone["text"])
    assert torch.equal(latents_of(pipe, **both, text_ratio=0), alone["image"])
    mixed = latents_of(pipe, **both, text_ratio=0.3)
    assert all(not torch.allclose(mixed, other) for other in alone.values())
    text, null_text = pipe.encode_prompt("a red circle")
    image, null_image = pipe.encode_image(tiny_picture(1))
    given = latents_of(
        pipe, prompt_embeds=text, negative_prompt_embeds=null_text, image_embeds=image,
        negative_image_embeds=null_image, text_ratio=0.3,
    )  # fmt: skip
    torch.testing.assert_close(given, mixed)
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["context_ratios"]), with_kwargs=True)
    latents_of(pipe, **both, text_ratio=0.3, data_type="text")  # two contexts for a text: the original could not
    hook.remove()
    assert seen == [[0.3, 0.7]] * 2


@torch.no_grad()
def test_layer_mixing_draws_one_context_a_layer(pipe):
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["layer_choices"]), with_kwargs=True)
    both = {"prompt": "a red circle", "image": tiny_picture(1), "mixing": "layer"}
    first = latents_of(pipe, **both, num_inference_steps=4)
    again = latents_of(pipe, **both, num_inference_steps=4)
    hook.remove()
    assert torch.equal(first, again) and seen[:4] == seen[4:]
    assert all(len(choices) == pipe.unet.num_context_layers for choices in seen)
    assert {choice for choices in seen for choice in choices} == {0, 1} and len(set(map(tuple, seen[:4]))) > 1


@torch.no_grad()
def test_several_texts_and_pictures_follow_each_other_as_tokens(pipe):
    pictures = [tiny_picture(seed) for seed in (1, 2, 3)]
    single = [pipe.encode_image(picture)[0] for picture in pictures]
    three, null = pipe.encode_image([pictures], image_weights=[1, 0.5, 0])
    torch.testing.assert_close(three, torch.cat([single[0], 0.5 * single[1], 0 * single[2]], dim=1))
    assert null.shape == three.shape == (1, 15, 12) and not null.any()
    texts, null = pipe.encode_prompt([["a red circle", "a star"]], prompt_weights=[1, 0.25])
    parts = [pipe.encode_prompt(text)[0] for text in ("a red circle", "a star")]
    torch.testing.assert_close(texts, torch.cat([parts[0], 0.25 * parts[1]], dim=1))
    empty = pipe.encode_prompt("")[0]
    torch.testing.assert_close(null, torch.cat([empty, empty], dim=1))
    blended = latents_of(pipe, [["a red circle", "a star"]], [pictures], image_weights=[1, 0.5, 0.2])
    assert blended.shape == (1, 4, 8, 8) and blended.isfinite().all()
    # one entry for all samples, samples side by side
    two = latents_of(pipe, ["a red circle", "a star"], [pictures[:2]])
    assert two.shape == (2, 4, 8, 8)


@torch.no_grad()
def test_a_masked_picture_is_read_where_the_mask_is_white(pipe):
    picture = tiny_picture(1)
    left = np.zeros((16, 16), dtype=np.uint8)
    left[:, :8] = 255
    masked, _ = pipe.encode_image(picture, image_masks=Image.fromarray(left))
    assert not masked[0, [2, 4]].any() and masked[0, [1, 3]].abs().min() > 0  # tokens: whole, then 2 x 2 patches
    changed = np.array(picture)
    changed[:, 8:] = 255 - changed[:, 8:]
    other, _ = pipe.encode_image(Image.fromarray(changed), image_masks=left / 255)
    torch.testing.assert_close(masked, other)
    whole, _ = pipe.encode_image(picture, image_masks=np.ones((16, 16)))
    torch.testing.assert_close(whole, pipe.encode_image(picture)[0])
    nested, _ = pipe.encode_image([[picture, picture]], image_masks=[[None, left]])
    torch.testing.assert_close(nested, torch.cat([whole, masked], dim=1))


@torch.no_grad()
def test_a_picture_is_read_whole_whatever_its_shape_and_that_of_the_result(pipe):
    wide = np.asarray(tiny_picture(1, 16, 48))
    left = np.zeros((16, 48), dtype=np.uint8)
    left[:, :24] = 255
    masked, _ = pipe.encode_image(Image.fromarray(wide), image_masks=left)
    assert not masked[0, [2, 4]].any() and masked[0, [1, 3]].abs().min() > 0
    for part, changes in ((slice(0, 8), True), (slice(40, 48), False)):  # both edges
        changed = wide.copy()
        changed[:, part] = 255 - changed[:, part]
        other, _ = pipe.encode_image(Image.fromarray(changed), image_masks=left)
        assert torch.allclose(masked[0, 3], other[0, 3], atol=1e-3) != changes
    call = {"guidance_scale": 1, **LATENT}
    read = []
    hook = pipe.image_encoder.register_forward_pre_hook(lambda module, args: read.append(args[0].clone()))
    for size in ({}, {"height": 16, "width": 48}):
        pipe(image=Image.fromarray(wide), **size, **call)
    hook.remove()
    assert torch.equal(*read)


@torch.no_grad()
def test_focus_changes_the_local_tokens(pipe):
    plain, _ = pipe.encode_image(tiny_picture(1))
    for level in (0.0, 0.8):
        focused, _ = pipe.encode_image(tiny_picture(1), focus=level)
        assert torch.equal(focused[:, 0], plain[:, 0])
        torch.testing.assert_close(focused[:, 1:], rescale_ranks(plain[:, 1:], level))
        assert not torch.allclose(focused, plain)
    two, _ = pipe.encode_image([[tiny_picture(1), tiny_picture(1)]], focus=[0.5, 0.8])
    torch.testing.assert_close(two, torch.cat([plain, focused], dim=1))


@torch.no_grad()
def test_what_stands_for_no_picture(pipe):
    nulls = {kind: pipe.encode_image(tiny_picture(1), null_image=kind)[1] for kind in ("zeros", "grey", "black")}
    for kind, value in (("grey", 127), ("black", 0)):
        picture = Image.new("RGB", (16, 16), (value,) * 3)
        torch.testing.assert_close(nulls[kind], pipe.encode_image(picture)[0])
    for data_type, default in (("image", "zeros"), ("text", "black")):  # what the authors do now
        call = {"image": tiny_picture(1), "data_type": data_type}
        made = {kind: latents_of(pipe, **call, null_image=kind) for kind in nulls}
        assert torch.equal(latents_of(pipe, **call), made[default])
        assert not torch.allclose(made["zeros"], made["grey"]) and not torch.allclose(made["black"], made["grey"])


@torch.no_grad()
def test_starting_from_the_picture(pipe):
    picture = tiny_picture(1)
    call = {"image": picture, "num_inference_steps": 10}
    kept = pipe(**call, strength=0).images[0]
    assert np.array_equal(np.asarray(kept), np.asarray(picture))  # a fidelity of 1
    stretched = pipe(image=tiny_picture(1, 10, 14), num_inference_steps=2, strength=0.1).images[0]
    assert stretched.size == (16, 16)  # too few steps to run one
    times = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, a, kw: times.append(int(a[1])), with_kwargs=True)
    latents_of(pipe, **call, strength=0.35)
    hook.remove()
    assert times == [201, 101, 1]  # noised to 301: three of ten steps are left
    clean = pipe.vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mean * pipe.vae.config.scaling_factor
    distances = []
    for strength in (0.2, 0.5, 0.9):
        made = latents_of(
            pipe,
            image=Image.new("RGB", (16, 16), (127,) * 3),
            strength=strength,
            guidance_scale=1,
            num_inference_steps=10,
        )
        distances.append(float((made - clean).square().mean()))
    assert distances == sorted(distances)


@torch.no_grad()
def test_starting_from_the_picture_with_two_passes_a_step(pipe):
    heun = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    part = quiet(VersatilePipeline(**{**pipe.components, "scheduler": heun, "default_sample_size": 8}))
    levels = []
    part(
        image=PICTURE,
        num_inference_steps=5,
        strength=0.5,
        generator=seeded(0)[0],
        callback_on_step_end=lambda pipe, i, t, tensors: levels.append(tensors["latents"].std().item()),
    )
    assert len(levels) == 3 and len(set(levels)) == 3  # two steps, the last one without its second pass


def test_flows_with_a_dtype_for_each_part(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    dtypes = {"unet": torch.float16, "default": torch.float32}
    part = VersatilePipeline.from_pretrained(tmp_path, flows=["text-to-image"], dtype=dtypes)
    assert part.unet.dtype == torch.float16 and part.vae.dtype == torch.float32
    part = VersatilePipeline.from_pretrained(tmp_path, flows=["text-to-image"], unet=None, dtype=torch.bfloat16)
    assert part.unet.flows == ["text-to-image"] and part.unet.dtype == torch.bfloat16


@torch.no_grad()
def test_colours_of_the_source(pipe):
    picture = Image.fromarray((np.asarray(tiny_picture(1)) // 4 + np.array([120, 20, 60])).astype(np.uint8))
    call = {"image": picture, "output_type": "pt", **STEPS}
    plain = pipe(**call, generator=seeded(0)[0]).images
    simple = pipe(**call, color_adjust="simple", generator=seeded(0)[0]).images
    source = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    torch.testing.assert_close(simple, match_color_statistics(plain, source))
    histogram = pipe(**call, color_adjust="histogram", generator=seeded(0)[0]).images
    gaps = [float((one.mean((2, 3)) - source.mean((2, 3))).abs().mean()) for one in (simple, histogram, plain)]
    assert gaps == sorted(gaps) and gaps[0] < gaps[2]


@torch.no_grad()
@pytest.mark.parametrize("data_type", ["image", "text"])
def test_each_generator_makes_its_own_result(pipe, data_type):
    call = {
        "prompt": ["a red circle", "a star"],
        "data_type": data_type,
        "num_images_per_prompt": 2,
        **STEPS,
        "eta": 1.0,
    }
    both = pipe(**call, generator=seeded(1, 2, 3, 4))
    made = both.images if data_type == "image" else both.texts
    alone = pipe(prompt="a star", data_type=data_type, **STEPS, eta=1.0, generator=seeded(4))
    last = (alone.images if data_type == "image" else alone.texts)[0]
    if data_type == "text":
        assert made[3] == last and len(set(made)) > 1
    else:
        assert np.abs(np.asarray(made[3]).astype(int) - np.asarray(last)).max() <= 1


def test_editing_by_way_of_the_caption(pipe):
    result = pipe.edit_image(
        tiny_picture(1),
        "a blue star",
        "a red circle",
        num_images_per_prompt=2,
        generator=seeded(1, 2),
        temperature=0,
        **STEPS,
    )
    assert len(result.images) == len(result.texts) == 2 and all(isinstance(text, str) for text in result.texts)
    # the same by hand
    generators = seeded(1, 2)
    found = pipe(image=tiny_picture(1), data_type="text", num_images_per_prompt=2, generator=generators, **LATENT)[0]
    ids = sentence_ids(pipe.encoder_tokenizer, ["a red circle", "a blue star"])
    away, towards = pipe.optimus.encode(ids).mean
    edited = found - torch.outer(found @ away, away) / away.square().sum() + towards
    assert pipe.decode_texts(edited, temperature=0) == result.texts
    texts, null = pipe.encode_prompt([[text, "a blue star"] for text in result.texts])
    local = select_ranks(pipe.encode_image(tiny_picture(1))[0][:, 1:], 0, 10)
    images = pipe(
        prompt_embeds=texts, negative_prompt_embeds=null, image_embeds=local, text_ratio=0.67,
        negative_image_embeds=torch.zeros_like(local), generator=generators, **STEPS,
    ).images  # fmt: skip
    assert all(np.array_equal(*pair) for pair in zip(images, result.images, strict=True))


def test_the_method_is_the_pipeline_for_editing(pipe, tmp_path):
    """Shared components, a folder of the other class, and the folder that it saves itself: equal results."""
    call = {"image": PICTURE, "prompt": "a blue star", "negative_prompt": "a red circle", **STEPS, "eta": 0.5}
    wanted = pipe.edit_image(**call, generator=seeded(1)[0], output_type="pt")
    pipe.save_pretrained(tmp_path / "versatile")
    editors = [VersatileEditPipeline.from_pipe(pipe), VersatileEditPipeline.from_pretrained(tmp_path / "versatile")]
    editors[0].save_pretrained(tmp_path / "edit")
    editors.append(VersatileEditPipeline.from_pretrained(tmp_path / "edit"))
    for editor in editors:
        images, texts = quiet(editor)(**call, generator=seeded(1)[0], output_type="pt", return_dict=False)
        assert torch.equal(images, wanted.images) and texts == wanted.texts
    assert type(VersatilePipeline.from_pretrained(tmp_path / "edit")) is VersatilePipeline
    back = quiet(VersatilePipeline.from_pipe(editors[0]))
    assert back.unet is pipe.unet and torch.equal(latents_of(back, "a star"), latents_of(pipe, "a star"))


def test_callback_of_editing_follows_both_halves(pipe):
    editor = quiet(VersatileEditPipeline.from_pipe(pipe))
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), tensors["latents"].ndim))
        pipe._interrupt = step == stop

    call = {"image": PICTURE, "prompt": "a star", "negative_prompt": "a", **STEPS, "callback_on_step_end": callback}
    stop = 9
    editor(**call)
    assert seen == [(0, 501, 2), (1, 1, 2), (2, 501, 4), (3, 1, 4)] and editor.num_timesteps == 4
    seen.clear()
    stop = 0
    assert len(editor(**call).images) == 1 and len(seen) == 1  # nothing is run after the interruption


@torch.no_grad()
def test_negative_prompt_weights_and_guidance(pipe):
    plain = latents_of(pipe, "a red circle")
    assert torch.equal(latents_of(pipe, "a red circle", negative_prompt=""), plain)
    assert not torch.allclose(latents_of(pipe, "a red circle", negative_prompt="a blue star"), plain)
    assert torch.equal(
        latents_of(pipe, "a star", negative_prompt="a star"), latents_of(pipe, "a star", guidance_scale=1)
    ) or torch.allclose(
        latents_of(pipe, "a star", negative_prompt="a star"),
        latents_of(pipe, "a star", guidance_scale=1),
        atol=1e-3,
    )
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda m, a, kw: calls.append(len(a[0])), with_kwargs=True)
    latents_of(pipe, "a star", guidance_scale=1)
    latents_of(pipe, "a star")
    hook.remove()
    assert calls == [1, 1, 2, 2]  # no null branch without guidance
    short = latents_of(pipe, prompt_embeds=torch.randn(1, 4, 12), negative_prompt_embeds=torch.randn(1, 7, 12))
    assert short.shape == plain.shape  # of other lengths, so one after the other


def test_callback_and_interruption(pipe):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        if step == 1:
            pipe._interrupt = True
        return {"latents": torch.zeros_like(tensors["latents"])}

    latents = latents_of(pipe, "a star", num_inference_steps=4, callback_on_step_end=callback)
    assert seen == [(0, 751, ["latents"]), (1, 501, ["latents"])] and not latents.any()
    assert pipe.num_timesteps == 4 and pipe.guidance_scale == 3.0


def test_output_types(pipe):
    call = {"prompt": "a star", **STEPS}
    assert pipe(**call, output_type="np").images.shape == (1, 16, 16, 3)
    pixels = pipe(**call, output_type="pt").images
    assert pixels.shape == (1, 3, 16, 16) and 0 <= pixels.min() and pixels.max() <= 1
    assert pipe(**call, height=8, width=12).images[0].size == (12, 8)
    assert pipe(**call, data_type="text", output_type="latent").texts.shape == (1, 6)


@torch.no_grad()
def test_save_and_load_all_or_the_flows_that_are_needed(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    expected = latents_of(pipe, "a red circle", tiny_picture(1))
    whole = quiet(VersatilePipeline.from_pretrained(tmp_path))
    assert whole.config.default_sample_size == 8 and whole.config.default_guidance_scale == 3.0
    torch.testing.assert_close(latents_of(whole, "a red circle", tiny_picture(1)), expected)
    texts = {"data_type": "text", **STEPS}
    assert (
        whole("a star", **texts, generator=seeded(0)[0]).texts == pipe("a star", **texts, generator=seeded(0)[0]).texts
    )

    part = quiet(VersatilePipeline.from_pretrained(tmp_path, flows=["text-to-image"]))
    torch.testing.assert_close(latents_of(part, "a red circle"), latents_of(pipe, "a red circle"))
    absent = [name for name, component in part.components.items() if component is None]
    assert sorted(absent) == [
        "decoder_tokenizer",
        "encoder_tokenizer",
        "feature_extractor",
        "image_encoder",
        "optimus",
    ]
    size, all_sizes = (sum(p.numel() for p in one.unet.parameters()) for one in (part, pipe))
    assert size < 0.6 * all_sizes
    for call, message in [
        (
            {"image": tiny_picture(1)},
            r"needs the flow image-to-image; the loaded network has text-to-image, of image-to",
        ),
        ({"prompt": "a star", "data_type": "text"}, r"needs the flow text-to-text"),
    ]:
        with pytest.raises(ValueError, match=message):
            part(**call)
    with pytest.raises(ValueError, match=r"'text-to-video' is unknown.*image-to-image, text-to-image"):
        VersatilePipeline.from_pretrained(tmp_path, flows=["text-to-video"])
    texts_only = VersatilePipeline.from_pretrained(tmp_path, flows=["image-to-text"], dtype=torch.bfloat16)
    assert texts_only.vae is None and texts_only.text_encoder is None and texts_only.unet.dtype == torch.bfloat16


LONG = "a red circle and a blue star on the left"
MASK = np.ones((16, 16))
PICTURE = tiny_picture(1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({}, ValueError, r"nothing to start from: pass `prompt`, `image`"),
        ({"prompt": []}, ValueError, r"`prompt` holds an empty list"),
        ({"prompt": [[]]}, ValueError, r"`prompt` holds an empty list"),
        ({"image": []}, ValueError, r"`image` holds an empty list; pass at least one picture"),
        ({"prompt": 3}, TypeError, r"`prompt` must be a string, a list, or a list of lists, received int"),
        ({"prompt": ["a", 3]}, TypeError, r"`prompt` must hold a string each, received int"),
        ({"image": "cat.png"}, TypeError, r"`image` must be a picture, .* received str"),
        ({"image": ["cat.png"]}, TypeError, r"`image` must hold a picture each, received str"),
        ({"prompt": [["a", "star"], ["star"]]}, ValueError, r"`prompt` holds samples of 1 and 2 entries"),
        ({"prompt": ["a", "star", "on"], "image": [PICTURE] * 2}, ValueError, r"3 samples and `image` 2"),
        ({"prompt": "a", "negative_prompt": ["a", "star"]}, ValueError, r"holds 2 texts for 1 samples"),
        ({"prompt": "a", "data_type": "video"}, ValueError, r"`data_type` is 'video'; allowed are 'image', 'text'"),
        ({"prompt": "a", "text_ratio": 1.5}, ValueError, r"`text_ratio` must lie in \[0, 1\], received 1\.5"),
        ({"prompt": "a", "text_ratio": "half"}, TypeError, r"`text_ratio` must be a number, received 'half'"),
        ({"prompt": [["a", "star"]], "prompt_weights": [0, 0]}, ValueError, r"`prompt_weights` sums to 0"),
        ({"prompt": "a", "prompt_weights": [1, 1]}, ValueError, r"`prompt_weights` holds 2 numbers for 1 texts"),
        ({"prompt": "a", "prompt_weights": [-1]}, ValueError, r"`prompt_weights` must be finite, at least 0"),
        ({"prompt": "a", "prompt_weights": ["1"]}, TypeError, r"`prompt_weights` must hold numbers, received '1'"),
        ({"prompt": "a", "image_weights": [1]}, ValueError, r"`image_weights` is given, but there is no picture"),
        ({"image": PICTURE, "focus": 2}, ValueError, r"`focus` must be finite, at least 0 and at most 1"),
        ({"image": PICTURE, "image_masks": MASK[:8]}, ValueError, r"of shape \(8, 16\) for a picture of \(16, 16\)"),
        ({"image": PICTURE, "image_masks": 0 * MASK}, ValueError, r"mask that is 0 everywhere"),
        ({"image": PICTURE, "image_masks": 2 * MASK}, ValueError, r"`image_masks` holds values from 2 to 2"),
        ({"image": PICTURE, "image_masks": [[MASK, MASK]]}, ValueError, r"\[2\] masks a sample and `image` \[1\]"),
        ({"prompt": "a", "image_masks": MASK}, ValueError, r"`image_masks` is given without `image`"),
        ({"image": PICTURE, "image_masks": "white"}, TypeError, r"`image_masks` must be a mask \(or None\)"),
        ({"prompt": "a", "mixing": "model"}, ValueError, r"`mixing` is 'model'; allowed are 'attention', 'layer'"),
        ({"image": PICTURE, "null_image": "white"}, ValueError, r"`null_image` is 'white'; allowed are 'zeros'"),
        ({"image": PICTURE, "strength": 1.2}, ValueError, r"`strength` must lie in \[0, 1\], received 1\.2"),
        ({"prompt": "a", "strength": 0.5}, ValueError, r"`strength` is 0\.5: it works for pictures made"),
        ({"image": PICTURE, "strength": 0.5, "data_type": "text"}, ValueError, r"makes texts from 1"),
        ({"image": [[PICTURE] * 2], "color_adjust": "simple"}, ValueError, r"`color_adjust` is 'simple'.*from 2"),
        ({"image": PICTURE, "color_adjust": "none"}, ValueError, r"`color_adjust` is 'none'; .*'histogram' or None"),
        ({"prompt": "a", "height": 10}, ValueError, r"`height` must be a multiple of 4.*autoencoder 2 x network 2"),
        ({"prompt": "a", "num_inference_steps": 0}, ValueError, r"`num_inference_steps` must be at least 1"),
        ({"prompt": "a", "guidance_scale": -1}, ValueError, r"`guidance_scale` must be finite and at least 0"),
        ({"prompt": "a", "output_type": "jpg"}, ValueError, r"`output_type` must be one of"),
        ({"prompt": "a", "eta": 2}, ValueError, r"`eta` must lie in \[0, 1\]"),
        ({"prompt": "a", "temperature": -1}, ValueError, r"`temperature` is -1"),
        ({"prompt": "a", "temperature": "hot"}, TypeError, r"`temperature` must be a number"),
        ({"prompt": "a", "num_images_per_prompt": 0}, ValueError, r"`num_images_per_prompt` must be at least 1"),
        ({"prompt": "a", "generator": seeded(1, 2)}, ValueError, r"`generator` is a list of 2, but 1 "),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 4, 6), "height": 16}, ValueError, r"of shape \(1, 4, 8, 6\)"),
        ({"prompt": "a", "data_type": "text", "latents": torch.zeros(1, 5)}, ValueError, r"of shape \(1, 6\)"),
        ({"prompt": "a", "latents": "noise"}, TypeError, r"`latents` must be a floating-point tensor"),
        ({"prompt": "a", "callback_on_step_end_tensor_inputs": ["x"]}, ValueError, r"allowed are \['latents', "),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 3, 12)}, ValueError, r"`prompt` and `prompt_embeds` are"),
        ({"image": PICTURE, "image_embeds": torch.zeros(1, 3, 12)}, ValueError, r"`image` and `image_embeds` are"),
        ({"prompt_embeds": torch.zeros(1, 3, 12)}, ValueError, r"`prompt_embeds` needs `negative_prompt_embeds`"),
        ({"prompt_embeds": torch.zeros(1, 3, 9), "guidance_scale": 1}, ValueError, r"have shape \(b, tokens, 12\)"),
        ({"prompt_embeds": torch.full((1, 3, 12), math.nan), "guidance_scale": 1}, ValueError, r"not finite \(NaN"),
        ({"image": PICTURE, "negative_prompt": "a"}, ValueError, r"`negative_prompt` is 'a', but the call has no"),
        ({"image": PICTURE, "negative_prompt": 3}, ValueError, r"`negative_prompt` is 3, but the call has no"),
        ({"prompt": "a", "focus": 0.0}, ValueError, r"`focus` is given, but there is no picture in `image`"),
        ({"prompt": "a", "data_type": "text", "max_text_length": 1}, ValueError, r"max_text_length` must be at least"),
        ({"prompt": "a", "data_type": "text", "max_text_length": 99}, ValueError, r"`max_text_length` is 99: .* 2"),
        ({"prompt": "a", "data_type": "text", "max_text_length": "x"}, TypeError, r"max_text_length` must be an"),
        ({"negative_image_embeds": torch.zeros(1, 3, 12)}, ValueError, r"is given without `image_embeds`"),
        ({"prompt_embeds": torch.zeros(2, 3, 12), "negative_prompt_embeds": torch.zeros(3, 3, 12)}, ValueError,
         r"holds 3 samples and `prompt_embeds` 2"),
    ],
)  # fmt: skip
def test_bad_input(pipe, call, error, message):
    runs = []
    watched = (pipe.unet, pipe.vae.encoder, pipe.image_encoder, pipe.text_encoder, pipe.optimus.encoder)
    hooks = [model.register_forward_pre_hook(lambda *_: runs.append(1)) for model in watched]
    try:
        with pytest.raises(error, match=message):
            pipe(**call, **({} if "num_inference_steps" in call else STEPS))
    finally:
        for hook in hooks:
            hook.remove()
    assert not runs  # refused before any model ran


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"prompt": ["a"]}, TypeError, r"`prompt` must be one string, received list"),
        ({"negative_prompt": None}, TypeError, r"`negative_prompt` must be one string, received NoneType"),
        ({"image": [PICTURE] * 2}, ValueError, r"`image` holds 2 samples of 1 pictures: one picture is edited"),
        ({"image": [[PICTURE] * 2]}, ValueError, r"`image` holds 1 samples of 2 pictures"),
        ({"text_ratio": 2}, ValueError, r"`text_ratio` must lie in \[0, 1\], received 2"),
        ({"output_type": "jpg"}, ValueError, r"`output_type` must be one of"),
        ({"height": 10}, ValueError, r"`height` must be a multiple of 4"),
        ({"temperature": -1}, ValueError, r"`temperature` is -1"),
        ({"max_text_length": 99}, ValueError, r"`max_text_length` is 99"),
        ({"num_inference_steps": 0}, ValueError, r"`num_inference_steps` must be at least 1"),
    ],
)
def test_bad_input_of_editing(pipe, call, error, message):
    runs = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(error, match=message):
        pipe.edit_image(**{"image": PICTURE, "prompt": "a", "negative_prompt": "star", **STEPS, **call})
    hook.remove()
    assert not runs


def test_editing_names_the_flow_that_is_not_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    part = quiet(VersatilePipeline.from_pretrained(tmp_path, flows=["image-to-text", "image-to-image"]))
    with pytest.raises(ValueError, match=r"needs the flow text-to-image; the loaded network has"):
        part.edit_image(PICTURE, "a", "star")


def test_empty_texts_beside_pictures_do_not_count(pipe):
    alone, beside = (pipe(text, PICTURE, generator=seeded(1), **LATENT)[0] for text in (None, " "))
    assert torch.equal(alone, beside)
    assert not torch.equal(pipe("a", PICTURE, generator=seeded(1), **LATENT)[0], alone)
    blind = quiet(VersatilePipeline(**{**pipe.components, "text_encoder": None, "default_sample_size": 8}))
    alone = blind(None, PICTURE, generator=seeded(1), **LATENT)[0]
    for text, share in (("", 0.5), ("a", 0)):  # what does not count needs no encoder
        assert torch.equal(blind(text, PICTURE, text_ratio=share, generator=seeded(1), **LATENT)[0], alone)


def test_texts_are_as_long_as_the_decoder_writes(pipe):
    """By default 30 tokens, or fewer where the decoder was built for fewer."""
    optimus = pipe.optimus
    shorter = type(optimus).from_config({**optimus.config, "decoder_max_length": 12})
    part = quiet(VersatilePipeline(**{**pipe.components, "optimus": shorter}))
    assert isinstance(part("a", data_type="text", **STEPS).texts[0], str)
    assert isinstance(part.edit_image(PICTURE, "a", "star", **STEPS).texts[0], str)


def test_too_long_texts_are_cut_with_a_warning(pipe, caplog):
    cut = pipe.encode_prompt(LONG)[0]
    assert "this part of the prompt was cut off: 'the left'" in caplog.text
    torch.testing.assert_close(cut, pipe.encode_prompt("a red circle and a blue star on")[0])
    caplog.clear()
    pipe.edit_image(PICTURE, LONG, "star " * 40, **STEPS)
    assert "text autoencoder reads 32 tokens" in caplog.text and "'star star" in caplog.text


@pytest.mark.parametrize(
    ("missing", "call", "message"),
    [
        (
            "vae",
            {"prompt": "a"},
            r"without vae; a picture to be made .*\. Load it without `flows`, or pass `vae",
        ),
        ("optimus", {"prompt": "a", "data_type": "text"}, r"loaded without optimus; a text to be made"),
        ("text_encoder", {"prompt": "a"}, r"loaded without text_encoder; a text needs them"),
        ("feature_extractor", {"image": PICTURE}, r"loaded without feature_extractor; a picture needs them"),
    ],
)
def test_missing_components(missing, call, message):
    pipe = quiet(VersatilePipeline(**{**tiny_versatile_components(), missing: None}))
    with pytest.raises(ValueError, match=message):
        pipe(**call, **STEPS)
    if missing == "optimus":
        assert pipe(**call, **LATENT)[0].shape == (1, 6)  # latents need no decoder
        with pytest.raises(ValueError, match=r"loaded without optimus; a text to be made needs them"):
            pipe.edit_image(PICTURE, "a", "star")


def test_components_that_do_not_fit():
    components = tiny_versatile_components()
    unet = components["unet"]
    types = {"data_types": dict(unet.config.data_types), "context_types": {"image": 12, "text": 14}}
    types["data_types"]["image"] = {"kind": "map", "channels": 3}
    other = type(unet).from_config({**unet.config, **types})
    pipe = quiet(VersatilePipeline(**{**components, "unet": other}))
    with pytest.raises(
        ValueError, match=r"text_encoder\.config\.projection_dim is 12, the network needs 14; vae.* is 4, "
    ):
        pipe("a star", **STEPS)
    with pytest.raises(
        ValueError, match=r"do not fit: text_encoder\.config\.projection_dim is 12, the network needs 14\."
    ):
        pipe("a star", data_type="text", **STEPS)


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "versatile"
    pipe.save_pretrained(folder)
    return folder


def test_entry_file_as_a_script(saved, repo_root, tmp_path, capsys):
    main = runpy.run_path(str(repo_root / "pipelines" / "versatile.py"))["main"]
    tiny_picture(1).save(tmp_path / "picture.png")
    common = [str(saved), "--num_inference_steps", "1", "--num_images_per_prompt", "2"]
    out = ["--output", str(tmp_path / "out.png")]
    main(
        [
            *common,
            "--prompt",
            "a red circle",
            "a star",
            "--image",
            str(tmp_path / "picture.png"),
            "--focus",
            "0.8",
            *out,
        ]
    )
    assert Image.open(tmp_path / "out.png").size == (32, 16)
    assert capsys.readouterr().out.startswith("2 pictures: ")
    words = ["--temperature", "0", "--max_text_length", "5"]
    main([*common, "--image", str(tmp_path / "picture.png"), "--make", "text", *words])
    assert capsys.readouterr().out.count("\n") == 2  # one a line; a text may be empty
    with pytest.raises(SystemExit):
        main(common)
    assert "pass --prompt, --image, or both" in capsys.readouterr().err


def test_entry_file_of_editing_as_a_script(saved, repo_root, tmp_path, capsys):
    main = runpy.run_path(str(repo_root / "pipelines" / "versatile_edit.py"))["main"]
    tiny_picture(1).save(tmp_path / "picture.png")
    words = ["--prompt", "a star", "--negative_prompt", "a red circle", "--max_text_length", "5"]
    steps = ["--num_inference_steps", "1", "--num_images_per_prompt", "2"]
    files = ["--image", str(tmp_path / "picture.png"), "--output", str(tmp_path / "out.png")]
    main([str(saved), *words, *steps, *files])
    assert Image.open(tmp_path / "out.png").size == (32, 16)
    assert capsys.readouterr().out.count("\n") == 3  # a caption each, and the file


def test_loading_in_a_fresh_process_and_as_custom_pipeline(saved, run_python, repo_root):
    """By diffusers' own loader after the import, and without it through the entry file."""
    code = """
from diffusers import DiffusionPipeline
{}
print(type(pipe).__name__, pipe.unet.flows[1], pipe("a star", data_type="text", num_inference_steps=1).texts.__len__())
"""
    load = f"import diffusers_ext\npipe = DiffusionPipeline.from_pretrained({str(saved)!r})"
    assert "VersatilePipeline text-to-image 1" in run_python(code.format(load)).stdout
    script = str(repo_root / "pipelines" / "versatile.py")
    load = (
        f"pipe = DiffusionPipeline.from_pretrained({str(saved)!r}, custom_pipeline={script!r}, trust_remote_code=True)"
    )
    assert "VersatilePipeline text-to-image 1" in run_python(code.format(load)).stdout


@pytest.mark.parametrize("exact_start", [True, False])
@pytest.mark.parametrize(
    "name",
    ["DDIM", "DDPM", "LCM", "TCD", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"],
)
def test_level_that_a_picture_starts_from(pipe, name, exact_start):
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(pipe.scheduler.config)
    part = quiet(VersatilePipeline(**{**pipe.components, "scheduler": scheduler, "default_sample_size": 8}))
    noise, read = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    hook = part.unet.register_forward_pre_hook(lambda _, args: read.append((args[0], args[1])))
    part(
        image=PICTURE, strength=0.5, exact_start=exact_start, latents=noise, num_inference_steps=10, guidance_scale=1,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    hook.remove()
    pixels = torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)[None] / 127.5 - 1
    posterior = part.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(1))
    clean, (scaled, t) = posterior * part.vae.config.scaling_factor, read[0]
    signal, level = signal_and_noise(scheduler, t)
    error = (scaled - signal * clean - level * noise).abs().max()
    by_timestep = name in ("DDIM", "DDPM", "LCM", "TCD")
    assert (error < 1e-3) == (exact_start or not by_timestep)
    assert len(part.scheduler.timesteps) >= 10
    with pytest.raises(ValueError, match="`exact_start` is True, but `strength` is 1"):
        part(image=PICTURE, exact_start=True, **STEPS)
    with pytest.raises(TypeError, match="`exact_start` must be True or False"):
        part(image=PICTURE, exact_start=1, **STEPS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"prompt": "a", "text_ratio": 0.3},
            r"`text_ratio` is 0.3, .* has `prompt` and `image`; this one makes images",
        ),
        ({"image": PICTURE, "mixing": "layer"}, r"`mixing` is 'layer', but has an effect only in a call that has"),
        ({"prompt": "a", "null_image": "grey"}, r"`null_image` is 'grey', .* has `image`; .* images from `prompt`"),
        ({"prompt": "a", "temperature": 0.5}, r"`temperature` is 0.5, .* makes texts; this one makes images"),
        ({"prompt": "a", "max_text_length": 9}, r"`max_text_length` is 9"),
        ({"prompt": "a", "merge_repeats": False}, r"`merge_repeats` is False"),
        ({"prompt": "a", "data_type": "text", "height": 8}, r"`height` is 8, .* makes images; this one makes texts"),
        ({"image": PICTURE, "data_type": "text", "width": 8}, r"`width` is 8"),
    ],
)
def test_options_without_effect_are_refused(pipe, call, message):
    with pytest.raises(ValueError, match=message):
        pipe(**call, **STEPS)
    neutral = {"text_ratio": 0.5, "mixing": "attention", "null_image": None, "temperature": 1.0}
    assert pipe("a", **neutral, merge_repeats=True, max_text_length=None, **LATENT)[0].shape[1] == 4


def test_a_callback_asks_for_no_context_that_the_call_lacks(pipe):
    with pytest.raises(ValueError, match=r"needs \['image_embeds'\], but the call has no picture"):
        pipe("a", callback_on_step_end=lambda *_: {}, callback_on_step_end_tensor_inputs=["image_embeds"], **STEPS)


def test_guidance_set_in_a_run_needs_the_null_branch_of_embeddings(pipe):
    def callback(pipe, step, timestep, tensors):
        pipe._guidance_scale = 3.0

    embeds = pipe.encode_prompt("a")[0]
    with pytest.raises(ValueError, match="set to 3.0 in the run, but the call has no `negative_prompt_embeds`"):
        pipe(prompt_embeds=embeds, guidance_scale=1, callback_on_step_end=callback, **STEPS)
