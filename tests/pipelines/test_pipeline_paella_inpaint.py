import runpy

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pipelines.tiny_paella import NUM_CODES, count_runs, quiet, seeded, tiny_paella_components, tiny_picture

from diffusers_ext import DiscreteRenoisingScheduler, PaellaInpaintPipeline, PaellaPipeline
from diffusers_ext.conditions.inpainting import continue_pixels
from diffusers_ext.models.token_codec import decode_indices, encode_indices

PROMPT = "a small red star"
PICTURE = tiny_picture()


def make_pipe(**options) -> PaellaInpaintPipeline:
    return quiet(PaellaInpaintPipeline(**{**tiny_paella_components(), **options}))


@pytest.fixture(scope="module")
def pipe() -> PaellaInpaintPipeline:
    """Shared, so no test may change it."""
    return make_pipe()


def box_mask(left=4, top=6, right=12, bottom=14, height=16, width=16) -> np.ndarray:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def token_mask(**box) -> torch.Tensor:
    """Of a box on the token grid."""
    return torch.from_numpy(box_mask(**box)[::2, ::2] > 0)


def own_tokens(pipe, picture=PICTURE) -> torch.Tensor:
    """Of the picture as it is."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    return encode_indices(pipe.vqvae, pixels)


def kept_tokens(pipe, picture=PICTURE, mask=None) -> torch.Tensor:
    """Of the picture whose kept pixels go on into the hole, by default the box."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    mask = box_mask() if mask is None else mask
    return encode_indices(pipe.vqvae, continue_pixels(pixels, torch.from_numpy(mask > 0)[None]))


def picture_on(left, top, right, bottom) -> Image.Image:
    """The picture on a larger canvas, continued by its edge pixels."""
    return Image.fromarray(np.pad(np.array(PICTURE), ((top, bottom), (left, right), (0, 0)), mode="edge"))


def tokens(pipe, prompt=PROMPT, image=PICTURE, mask_image="box", seed=0, **options) -> torch.Tensor:
    mask_image = box_mask() if isinstance(mask_image, str) else mask_image
    options = {"num_inference_steps": 3, "generator": seeded(seed)[0], **options}
    return pipe(prompt, image, mask_image, output_type="latent", **options).images


# --- what is kept, what is drawn


@pytest.mark.parametrize("renoise_mode", ["start", "prev", "rand"])
@pytest.mark.parametrize("renoise_positions", ["random", "confidence"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_kept_tokens_stand_still(renoise_mode, renoise_positions, strength):
    pipe = make_pipe()
    options = {"renoise_mode": renoise_mode, "renoise_positions": renoise_positions}
    pipe.scheduler = DiscreteRenoisingScheduler.from_config(pipe.scheduler.config, **options)
    own, hole = (kept_tokens if strength == 1 else own_tokens)(pipe), token_mask()
    out = tokens(pipe, num_images_per_prompt=3, num_inference_steps=4, strength=strength)
    assert torch.equal(out[:, ~hole], own[:, ~hole].expand(3, -1))
    assert (out[:, hole] != own[:, hole]).float().mean() > 0.3


def test_the_hole_follows_prompt_and_surroundings(pipe):
    hole = token_mask()
    base = tokens(pipe)
    assert not torch.equal(base[:, hole], tokens(pipe, "a large blue ring")[:, hole])
    assert not torch.equal(base[:, hole], tokens(pipe, image=tiny_picture(1))[:, hole])
    assert not torch.equal(base, tokens(pipe, seed=1)) and torch.equal(base, tokens(pipe))


def test_loop_equals_the_plain_form(pipe):
    """Two forwards a step, the hole filled with the first draws, known tokens put back: `sample` with a mask."""
    own, hole, generator = kept_tokens(pipe), token_mask()[None], seeded(5)[0]
    with torch.no_grad():
        ids = pipe.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
        cond = pipe.text_encoder(ids).text_embeds
        initial = x = torch.where(hole, torch.randint(NUM_CODES, (1, 8, 8), generator=generator), own)
        scheduler = DiscreteRenoisingScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            null_logits = pipe.unet(x, t, torch.zeros_like(cond)).sample
            guided = null_logits + 2.5 * (pipe.unet(x, t, cond).sample - null_logits)
            x = scheduler.step(guided, t, x, initial_noise=initial, mask=hole, generator=generator).prev_sample
    assert torch.equal(x, tokens(pipe, seed=5, guidance_scale=2.5, num_inference_steps=4))


def test_a_pixel_of_the_mask_repaints_its_token(pipe):
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[5, 9] = 1
    seen = [tokens(pipe, mask_image=mask, seed=seed) for seed in range(8)]
    changed = torch.cat(seen) != kept_tokens(pipe, mask=mask)
    assert changed.any(dim=0).nonzero().tolist() == [[2, 4]]


def test_masks_and_pictures_in_every_form(pipe):
    base, mask, pixels = tokens(pipe), box_mask(), np.array(PICTURE)
    masks = [Image.fromarray(mask), Image.fromarray(mask).convert("RGB"), Image.fromarray(mask).convert("1")]
    masks += [mask > 0, mask // 255, mask[None, ..., None], [mask], torch.from_numpy(mask / 255.0)]
    masks += [torch.from_numpy(mask // 255)[None, None].long()]
    for form in masks:
        assert torch.equal(base, tokens(pipe, mask_image=form))
    as_tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for form in [pixels, pixels / 255.0, pixels[None], as_tensor, as_tensor[None] / 255, [PICTURE], kept_tokens(pipe)]:
        assert torch.equal(base, tokens(pipe, image=form))
    grey = PICTURE.convert("L")
    assert torch.equal(tokens(pipe, image=grey), tokens(pipe, image=grey.convert("RGB")))


def test_strength(pipe):
    own = own_tokens(pipe)
    runs = count_runs(quick := make_pipe())
    assert torch.equal(tokens(quick, strength=0.0), own) and "unet" not in runs
    assert torch.equal(tokens(quick, strength=1), tokens(pipe))
    runs.clear()
    tokens(quick, strength=0.5, num_inference_steps=8)
    assert runs.count("unet") == 4 and quick.num_timesteps == 4


def test_strength_starts_from_the_noised_picture(pipe):
    """What the network sees first: the hole's own tokens, replaced with the schedule's share."""
    seen = []
    watched = make_pipe()
    watched.unet.token_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokens(watched, strength=0.25, num_inference_steps=4, guidance_scale=1.0, num_images_per_prompt=16)
    hole, own = token_mask(), own_tokens(pipe)
    share = (seen[0][:, hole] != own[:, hole]).float().mean().item()
    expected = np.cos(np.pi * 0.75 / 2) * (1 - 1 / NUM_CODES)
    assert share == pytest.approx(expected, abs=0.06)
    assert torch.equal(seen[0][:, ~hole], own[:, ~hole].expand(16, -1))


# --- outpainting


def test_outpainting_keeps_the_picture_where_it_is_put(pipe):
    for position, left, rows, columns in [
        ("center", 8, slice(2, 10), slice(4, 12)),
        ((12, 4), 12, slice(2, 10), slice(6, 14)),
    ]:
        out = tokens(pipe, mask_image=None, height=24, width=32, position=position)
        own = own_tokens(pipe, picture_on(left, 4, 16 - left, 4))
        assert out.shape == (1, 12, 16) and torch.equal(out[:, rows, columns], own[:, rows, columns])
    own = own_tokens(pipe, picture_on(0, 0, 16, 0))[:, :, :8]
    wide = tokens(pipe, mask_image=None, width=32, position=(0, 0))
    assert wide.shape == (1, 8, 16) and torch.equal(wide[:, :, :8], own)


def test_outpainting_is_one_masked_run_on_the_canvas(pipe):
    around = np.ones((24, 32), dtype=bool)
    around[4:20, 8:24] = False
    canvas = kept_tokens(pipe, picture_on(8, 4, 8, 4), around)
    wanted = tokens(pipe, image=canvas, mask_image=around)
    assert torch.equal(wanted, tokens(pipe, mask_image=None, height=24, width=32))
    around[4:20, 8:24] = box_mask() > 0
    canvas = kept_tokens(pipe, picture_on(8, 4, 8, 4), around)
    wanted = tokens(pipe, image=canvas, mask_image=around)
    assert torch.equal(wanted, tokens(pipe, height=24, width=32))  # a hole as well


def test_a_small_picture_on_a_canvas(pipe):
    """A picture may be smaller than the network's smallest grid, as long as the canvas is not."""
    picture = tiny_picture(3, 4, 6)
    out = tokens(pipe, image=picture, mask_image=None, height=16, width=16, position=(2, 8))
    wide = Image.fromarray(np.pad(np.array(picture), ((8, 4), (2, 8), (0, 0)), mode="edge"))
    assert torch.equal(out[:, 4:6, 1:4], own_tokens(pipe, wide)[:, 4:6, 1:4])


# --- pixels


def test_overlay_puts_the_pixels_back(pipe):
    call = {"num_inference_steps": 2, "image": PICTURE, "mask_image": (mask := box_mask()), "height": 24}
    drawn, overlaid = (
        np.array(pipe(PROMPT, generator=seeded(0)[0], apply_overlay=overlay, **call).images[0])
        for overlay in (False, True)
    )
    canvas = np.full((24, 16), True)
    canvas[4:20] = mask > 0
    assert np.array_equal(overlaid[canvas], drawn[canvas])
    assert np.array_equal(overlaid[4:20][mask == 0], np.array(PICTURE)[mask == 0])
    assert not np.array_equal(drawn[4:20][mask == 0], np.array(PICTURE)[mask == 0])


def test_output_types_agree(pipe):
    call = {"image": PICTURE, "mask_image": box_mask(), "num_inference_steps": 2}
    seen = {
        kind: pipe(PROMPT, generator=seeded(0)[0], output_type=kind, **call).images
        for kind in ("latent", "pt", "np", "pil")
    }
    with torch.no_grad():
        decoded = (decode_indices(pipe.vqvae, seen["latent"]) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(seen["pt"], decoded)
    np.testing.assert_allclose(seen["np"], decoded.permute(0, 2, 3, 1).numpy())
    assert seen["pil"][0].size == (16, 16)
    plain = pipe(PROMPT, generator=seeded(0)[0], output_type="latent", return_dict=False, **call)
    assert isinstance(plain, tuple) and torch.equal(plain[0], seen["latent"])


# --- determinism, batches


def test_a_batch_with_a_list_of_generators_equals_single_runs(pipe):
    prompts, pictures = [PROMPT, "a large blue ring"], [PICTURE, tiny_picture(1)]
    masks = [box_mask(), box_mask(0, 0, 8, 8)]
    together = tokens(pipe, prompts, pictures, masks, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3))
    alone = [tokens(pipe, prompts[k // 2], pictures[k // 2], masks[k // 2], generator=seeded(k)) for k in range(4)]
    assert torch.equal(together, torch.cat(alone))
    shared = tokens(pipe, prompts, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3))
    assert torch.equal(shared[2:3], tokens(pipe, prompts[1], generator=seeded(2)))


def test_given_random_tokens(pipe):
    latents = torch.randint(NUM_CODES, (1, 8, 8), generator=seeded(9)[0])
    assert torch.equal(tokens(pipe, latents=latents), tokens(pipe, latents=latents))
    moved = torch.where(token_mask(), latents, (latents + 1) % NUM_CODES)
    assert torch.equal(tokens(pipe, latents=latents), tokens(pipe, latents=moved))  # read in the hole only
    assert not torch.equal(tokens(pipe, latents=latents), tokens(pipe, latents=(latents + 1) % NUM_CODES))


def test_conditions_other_than_text(pipe):
    embeds, null = pipe.encode_prompt(PROMPT, negative_prompt="a ring")
    assert torch.equal(tokens(pipe), tokens(pipe, None, prompt_embeds=embeds))
    wanted = tokens(pipe, negative_prompt="a ring")
    assert torch.equal(wanted, tokens(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=null))
    regions = PaellaPipeline.from_pipe(pipe).encode_regions(["a star", "a ring"], "columns", 16, 32)
    assert tokens(pipe, None, mask_image=None, width=32, prompt_embeds=regions).shape == (1, 8, 16)


def test_sampled_tokens_of_the_picture():
    pipe = make_pipe(**tiny_paella_components(gumbel=True))
    hole = token_mask()
    fixed = tokens(pipe, num_images_per_prompt=2)[:, ~hole]
    assert torch.equal(fixed[0], fixed[1]) and torch.equal(fixed[:1], kept_tokens(pipe)[:, ~hole])
    drawn = tokens(pipe, num_images_per_prompt=2, generator=seeded(0, 1), sample_mode="sample")
    assert not torch.equal(drawn[0][~hole], drawn[1][~hole])
    assert torch.equal(drawn[1:], tokens(pipe, generator=seeded(1), sample_mode="sample"))


# --- callbacks


def test_callbacks_and_interrupt():
    pipe = make_pipe()
    pipe.scheduler = DiscreteRenoisingScheduler.from_config(pipe.scheduler.config, renoise_mode="rand")
    own, hole, steps = kept_tokens(pipe), token_mask(), []

    def stop(pipeline, i, t, tensors):
        steps.append(i)
        assert set(tensors) == {"latents", "pred_original_sample"}
        assert torch.equal(tensors["pred_original_sample"][:, ~hole], own[:, ~hole])
        assert not torch.equal(tensors["latents"][:, ~hole], own[:, ~hole])  # renoised as well in this mode
        pipeline._interrupt = True

    names = ["latents", "pred_original_sample"]
    out = tokens(pipe, num_inference_steps=6, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=names)
    assert steps == [0] and torch.equal(out[:, ~hole], own[:, ~hole])
    zeros = tokens(pipe, callback_on_step_end=lambda p, i, t, tensors: {"latents": 0 * tensors["latents"]})
    assert zeros[:, hole].abs().max() == 0 and torch.equal(zeros[:, ~hole], own[:, ~hole])


# --- what is refused, before any model runs

ALL, NONE = np.full((16, 16), 255, dtype=np.uint8), np.zeros((16, 16), dtype=np.uint8)
BAD_CALLS = [
    ({"image": None}, ValueError, "`image` is needed"),
    ({"image": "picture.png"}, TypeError, "`image` must be a PIL picture.*received str"),
    ({"image": []}, ValueError, "`image` is an empty list"),
    ({"image": Image.new("LAB", (16, 16))}, ValueError, "`image` is .*mode 'LAB', which has no conversion"),
    ({"image": np.zeros((16, 16))}, ValueError, r"\(H, W, 3\).*received \(16, 16\)"),
    ({"image": torch.zeros(1, 16, 16, 3)}, ValueError, r"\(b, 3, H, W\) as a tensor, received \(1, 16, 16, 3\)"),
    ({"image": torch.zeros(3, 16, 16) - 1}, ValueError, r"floats in \[0, 1\], received -1 to -1.*\(image \+ 1\) / 2"),
    ({"image": torch.full((3, 16, 16), torch.nan)}, ValueError, r"floats in \[0, 1\], received nan"),
    ({"image": np.zeros((16, 16, 3), dtype=np.int32)}, TypeError, "uint8 or floating-point.*int32"),
    ({"image": [PICTURE, tiny_picture(0, 16, 20)]}, ValueError, "different sizes: 16x16, 20x16"),
    ({"image": [PICTURE] * 2}, ValueError, "`image` holds 2 pictures for 1 prompts"),
    (
        {"image": tiny_picture(0, 17, 16)},
        ValueError,
        "`image.height` must be a multiple of 2 .*nearest valid: 16 or 18",
    ),
    (
        {"image": tiny_picture(0, 16, 18)},
        ValueError,
        "`image.width` must be a multiple of 4 .*nearest valid: 16 or 20",
    ),
    ({"image": torch.zeros(8, 8, dtype=torch.long)}, ValueError, r"shape \(b, h, w\), received \(8, 8\)"),
    ({"image": torch.full((1, 8, 8), NUM_CODES)}, ValueError, "`image` must hold token indices 0 to 23"),
    ({"mask_image": NONE}, ValueError, "nothing to draw.*Paint white.*larger `height`"),
    ({"mask_image": None}, ValueError, "nothing to draw.*missing"),
    ({"mask_image": ALL}, ValueError, "nothing to keep.*PaellaPipeline"),
    ({"mask_image": [box_mask(), NONE], "prompt": ["a", "b"]}, ValueError, "nothing to draw"),
    ({"mask_image": [box_mask(), ALL], "prompt": ["a", "b"]}, ValueError, "nothing to keep"),
    ({"mask_image": ALL[:8]}, ValueError, r"`mask_image` is 16x8 pixels, `image` is 16x16.*mask.resize\(\(16, 16\)"),
    ({"mask_image": np.zeros((24, 16)), "height": 24}, ValueError, "covers the picture, not the canvas"),
    (
        {"mask_image": ALL // 2},
        ValueError,
        r"must be binary, black \(0\).*1 other value\(s\), 127 at x=0, y=0.*Threshold",
    ),
    ({"mask_image": np.full((16, 16), 0.5)}, ValueError, "must be binary.* 0.5 at x=0, y=0"),
    ({"mask_image": np.full((16, 16), np.nan)}, ValueError, "`mask_image` holds values from nan to nan"),
    ({"mask_image": Image.new("LAB", (16, 16))}, ValueError, "`mask_image` is .*mode 'LAB', which has no"),
    ({"mask_image": [ALL, ALL[:8]]}, ValueError, "masks of different sizes: 16x8, 16x16"),
    ({"mask_image": []}, ValueError, "`mask_image` is an empty list"),
    ({"mask_image": [box_mask()] * 3}, ValueError, "`mask_image` holds 3 pictures for 1 prompts"),
    ({"mask_image": np.zeros((1, 2, 16, 16))}, ValueError, "`mask_image` must have shape"),
    ({"mask_image": "mask.png"}, TypeError, "`mask_image` must be a PIL picture.*received str"),
    ({"height": 12}, ValueError, "`height`=12 is smaller than the picture, whose height is 16"),
    ({"width": 8}, ValueError, "`width`=8 is smaller than the picture"),
    ({"width": 18}, ValueError, "`width` must be a multiple of 4 .*nearest valid: 16 or 20"),
    (
        {"width": 32, "position": (3, 0)},
        ValueError,
        r"`position` \(left\) must be a multiple of 2 .*0 to 16.*received 3",
    ),
    ({"width": 32, "position": (18, 0)}, ValueError, r"`position` \(left\).*received 18"),
    ({"width": 32, "position": (0, 2)}, ValueError, r"`position` \(top\) .* from 0 to 0.*received 2"),
    ({"width": 32, "position": (-2, 0)}, ValueError, "received -2"),
    ({"width": 32, "position": (1.5, 0)}, TypeError, r"`position \(left\)` must be an integer"),
    ({"width": 32, "position": "left"}, TypeError, "`position` must be \"center\" or .*'left'"),
    ({"width": 32, "strength": 0.5}, ValueError, "`strength`=0.5 starts from the picture's own tokens"),
    ({"strength": 1.5}, ValueError, r"`strength` must lie in \[0, 1\], received 1.5"),
    ({"strength": -0.1}, ValueError, r"`strength` must lie in \[0, 1\], received -0.1"),
    ({"strength": float("nan")}, ValueError, r"`strength` must lie in \[0, 1\], received nan"),
    ({"strength": "1"}, TypeError, "`strength` must be a number, received '1'"),
    ({"sample_mode": "mean"}, ValueError, "`sample_mode` must be one of argmax, sample; received 'mean'"),
    ({"sample_mode": "sample"}, ValueError, "needs a GumbelVQModel: a VQModel.*Use 'argmax'"),
    ({"apply_overlay": 1}, TypeError, "`apply_overlay` must be True or False, received 1"),
    ({"apply_overlay": True, "output_type": "latent"}, ValueError, "output_type='latent' has none|'latent'` has none"),
    ({"apply_overlay": True, "image": torch.zeros(1, 8, 8).long()}, ValueError, "`image` holds tokens: pass pixels"),
    ({"prompt": None}, ValueError, "exactly one of `prompt` and `prompt_embeds`; received neither"),
    ({"generator": seeded(0, 1)}, ValueError, "`generator` is a list of 2, but 1 images"),
    ({"latents": torch.zeros(1, 8, 8).long(), "width": 32}, ValueError, r"`latents` must have shape \(1, 8, 16\)"),
    ({"num_inference_steps": 0}, ValueError, "`num_inference_steps` must be at least 1"),
    ({"renoise_steps": 99}, ValueError, "renoise_steps"),
    ({"output_type": "jpg"}, ValueError, "`output_type` must be one of"),
    ({"callback_on_step_end_tensor_inputs": ["mask"]}, ValueError, r"holds \['mask'\]; allowed are"),
]


@pytest.fixture(scope="module")
def watched():
    pipe = make_pipe()
    return pipe, count_runs(pipe)


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CALLS, ids=[str(k) for k in range(len(BAD_CALLS))])
def test_bad_input_is_refused_before_any_model_runs(watched, arguments, error, message):
    pipe, runs = watched
    runs.clear()
    with pytest.raises(error, match=message):
        pipe(**{"prompt": PROMPT, "image": PICTURE, "mask_image": box_mask(), **arguments})
    assert runs == []


def test_the_watch_sees_a_good_call(watched):
    pipe, runs = watched
    runs.clear()
    pipe(PROMPT, PICTURE, box_mask(), num_inference_steps=1)
    assert set(runs) == {"text_encoder", "unet", "encoder", "decoder"}


# --- sharing, disk, entry file


def test_from_pipe_shares_both_ways_and_keeps_dtypes():
    text = quiet(PaellaPipeline(**tiny_paella_components(image_encoder=True)))
    text.unet.to(torch.bfloat16)
    inpaint = quiet(PaellaInpaintPipeline.from_pipe(text))
    back = PaellaPipeline.from_pipe(inpaint)
    for name, component in text.components.items():
        assert component is not None
        assert getattr(inpaint, name) is component and getattr(back, name) is component, name
    assert text.unet.dtype == torch.bfloat16 and text.vqvae.dtype == torch.float32
    assert inpaint.config.default_sample_size == 8 and back.config.default_guidance_scale == 3.0
    assert torch.equal(tokens(inpaint)[:, ~token_mask()], kept_tokens(text)[:, ~token_mask()])  # mixed dtypes work


def test_entry_file_and_disk(tmp_path, repo_root, capsys):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path / "pipe"))
    assert type(loaded) is PaellaInpaintPipeline and torch.equal(tokens(loaded), tokens(pipe))
    entry_file = repo_root / "pipelines" / "paella_inpaint.py"
    custom = DiffusionPipeline.from_pretrained(
        tmp_path / "pipe", custom_pipeline=str(entry_file), trust_remote_code=True
    )
    assert type(custom).__name__ == "PaellaInpaintPipeline" and torch.equal(tokens(quiet(custom)), tokens(pipe))
    PICTURE.save(tmp_path / "picture.png")
    Image.fromarray(box_mask()).save(tmp_path / "mask.png")
    files = ["--image", str(tmp_path / "picture.png"), "--output", str(tmp_path / "grid.png")]
    short = ["--num_images_per_prompt", "3", "--num_inference_steps", "2"]
    main = runpy.run_path(str(entry_file))["main"]
    main([str(tmp_path / "pipe"), "a red star", *files, *short, "--mask_image", str(tmp_path / "mask.png")])
    assert Image.open(tmp_path / "grid.png").size == (3 * 16, 16)
    main([str(tmp_path / "pipe"), "a red star", *files, *short, "--width", "32", "--position", "0", "0"])
    assert Image.open(tmp_path / "grid.png").size == (3 * 32, 16)
    assert capsys.readouterr().out.count("3 pictures, one row a prompt") == 2
