import runpy

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pipelines.tiny_paella import NUM_CODES, count_runs, quiet, seeded, tiny_paella_components, tiny_picture

from diffusers_ext import DiscreteRenoisingScheduler, PaellaImg2ImgPipeline, PaellaInpaintPipeline, PaellaPipeline
from diffusers_ext.models.token_codec import decode_indices, encode_indices

PROMPT = "a small red star"
PICTURE = tiny_picture()


def make_pipe(**options) -> PaellaImg2ImgPipeline:
    return quiet(PaellaImg2ImgPipeline(**{**tiny_paella_components(), **options}))


@pytest.fixture(scope="module")
def pipe() -> PaellaImg2ImgPipeline:
    """Shared, so no test may change it."""
    return make_pipe()


def own_tokens(pipe, picture=PICTURE) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    return encode_indices(pipe.vqvae, pixels)


def tokens(pipe, prompt=PROMPT, image=PICTURE, seed=0, **options) -> torch.Tensor:
    options = {"num_inference_steps": 6, "generator": seeded(seed)[0], **options}
    return pipe(prompt, image, output_type="latent", **options).images


# --- the algorithm


def test_loop_equals_the_plain_form(pipe):
    """The notebook's editing: 24 steps from the 8th, from tokens noised to 8/24, renoised to the previous ones."""
    generator = seeded(5)[0]
    with torch.no_grad():
        ids = pipe.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
        cond = pipe.text_encoder(ids).text_embeds
        own = own_tokens(pipe)
        uniforms = torch.rand(1, 8, 8, generator=generator)
        noise = torch.randint(NUM_CODES, (1, 8, 8), generator=generator)
        x = torch.where(uniforms < np.cos(np.pi / 2 * 8 / 24), noise, own)
        scheduler = DiscreteRenoisingScheduler.from_config(pipe.scheduler.config, renoise_mode="prev")
        scheduler.set_timesteps(24, start_index=8)
        assert len(scheduler.timesteps) == 16
        for t in scheduler.timesteps:
            null_logits = pipe.unet(x, t, torch.zeros_like(cond)).sample
            guided = null_logits + 6.0 * (pipe.unet(x, t, cond).sample - null_logits)
            x = scheduler.step(guided, t, x, generator=generator).prev_sample
    out = pipe(PROMPT, PICTURE, guidance_scale=6.0, generator=seeded(5)[0], output_type="latent").images
    assert torch.equal(x, out) and pipe.num_timesteps == 16


@pytest.mark.parametrize(("strength", "steps"), [(0.0, 0), (0.04, 0), (0.25, 2), (2 / 3, 5), (1.0, 8), (1, 8)])
def test_strength_chooses_the_first_step(pipe, strength, steps):
    seen = []
    out = tokens(
        pipe,
        strength=strength,
        num_inference_steps=8,
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(float(t)),
    )
    assert seen == [pytest.approx((8 - steps + i) / 8) for i in range(steps)] and pipe.num_timesteps == steps
    assert torch.equal(out, own_tokens(pipe)) == (steps == 0)


def test_full_strength_is_text_to_image_and_forgets_the_picture(pipe):
    text = PaellaPipeline.from_pipe(pipe)
    plain = quiet(text)(PROMPT, num_inference_steps=6, generator=seeded(0)[0], output_type="latent").images
    assert torch.equal(plain, tokens(pipe, strength=1.0, renoise_mode="start"))
    assert torch.equal(plain, tokens(pipe, image=tiny_picture(1), strength=1.0, renoise_mode="start"))
    assert not torch.equal(tokens(pipe), tokens(pipe, image=tiny_picture(1)))


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75])
def test_the_first_tokens_keep_the_schedules_share(strength):
    pipe, seen = make_pipe(), []
    pipe.unet.token_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokens(pipe, strength=strength, num_inference_steps=4, guidance_scale=1.0, num_images_per_prompt=16)
    share = (seen[0] != own_tokens(pipe)).float().mean().item()
    expected = np.cos(np.pi / 2 * (1 - strength)) * (1 - 1 / NUM_CODES)
    assert share == pytest.approx(expected, abs=0.06)


def test_renoise_mode_is_for_this_call_only(pipe):
    modes = [tokens(pipe, renoise_mode=mode) for mode in ("prev", "start", "rand")]
    assert torch.equal(modes[0], tokens(pipe))
    assert not torch.equal(modes[0], modes[1]) and not torch.equal(modes[0], modes[2])
    assert pipe.scheduler.config.renoise_mode == "start"
    still = tokens(pipe, renoise_steps=0, temperature=0.0)
    assert torch.equal(still, tokens(pipe, renoise_steps=0, temperature=0.0, renoise_mode="rand"))


# --- pictures, sizes


def test_pictures_in_every_form(pipe):
    base, pixels = tokens(pipe), np.array(PICTURE)
    as_tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for form in [pixels, pixels / 255.0, as_tensor[None], as_tensor / 255, [PICTURE], own_tokens(pipe)]:
        assert torch.equal(base, tokens(pipe, image=form))


def test_sizes(pipe):
    assert tokens(pipe, image=tiny_picture(0, 24, 12)).shape == (1, 12, 6)
    odd = tiny_picture(0, 37, 19)
    assert tokens(pipe, image=odd, height=32, width=16).shape == (1, 16, 8)
    assert tokens(pipe, width=32).shape == (1, 8, 16)
    flat = Image.new("RGB", (37, 19), (200, 30, 90))
    resized = tokens(pipe, image=flat, height=16, width=16, strength=0)
    assert torch.equal(resized, own_tokens(pipe, Image.new("RGB", (16, 16), (200, 30, 90))))
    assert torch.equal(tokens(pipe, height=16, width=16), tokens(pipe))


def test_output_types_agree(pipe):
    call = {"image": PICTURE, "num_inference_steps": 3}
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


# --- determinism, conditions, callbacks


def test_a_batch_with_a_list_of_generators_equals_single_runs(pipe):
    prompts, pictures = [PROMPT, "a large blue ring"], [PICTURE, tiny_picture(1)]
    together = tokens(pipe, prompts, pictures, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3))
    alone = [tokens(pipe, prompts[k // 2], pictures[k // 2], generator=seeded(k)) for k in range(4)]
    assert torch.equal(together, torch.cat(alone))
    shared = tokens(pipe, prompts, generator=seeded(0, 1))
    assert torch.equal(shared[1:], tokens(pipe, prompts[1], generator=seeded(1)))
    assert torch.equal(tokens(pipe), tokens(pipe)) and not torch.equal(tokens(pipe), tokens(pipe, seed=1))


def test_given_random_tokens(pipe):
    latents = torch.randint(NUM_CODES, (1, 8, 8), generator=seeded(9)[0])
    kept = latents.clone()
    assert torch.equal(tokens(pipe, latents=latents), tokens(pipe, latents=latents)) and torch.equal(latents, kept)
    assert not torch.equal(tokens(pipe, latents=latents), tokens(pipe, latents=(latents + 1) % NUM_CODES))


def test_conditions_other_than_text(pipe):
    embeds, null = pipe.encode_prompt(PROMPT, negative_prompt="a ring")
    assert torch.equal(tokens(pipe), tokens(pipe, None, prompt_embeds=embeds))
    wanted = tokens(pipe, negative_prompt="a ring")
    assert torch.equal(wanted, tokens(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=null))
    regions = PaellaPipeline.from_pipe(pipe).encode_regions(["a star", "a ring"], "columns", 16, 16)
    assert not torch.equal(tokens(pipe, None, prompt_embeds=regions), tokens(pipe, "a star"))


def test_sampled_tokens_of_the_picture():
    pipe = make_pipe(**tiny_paella_components(gumbel=True))
    fixed = tokens(pipe, strength=0, num_images_per_prompt=2)
    assert torch.equal(fixed, own_tokens(pipe).expand(2, -1, -1))
    drawn = tokens(pipe, strength=0, num_images_per_prompt=2, generator=seeded(0, 1), sample_mode="sample")
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1:], tokens(pipe, strength=0, generator=seeded(1), sample_mode="sample"))


def test_callbacks():
    pipe, steps = make_pipe(), []

    def callback(pipeline, i, t, tensors):
        assert pipeline is pipe and set(tensors) == set(pipe._callback_tensor_inputs)
        steps.append(i)
        pipe._interrupt = i == 1
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 1 else None

    names = pipe._callback_tensor_inputs
    out = tokens(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert steps == [0, 1] and out.abs().max() == 0


# --- what is refused, before any model runs

BAD_CALLS = [
    ({"image": None}, ValueError, "`image` is needed"),
    ({"image": 3}, TypeError, "`image` must be a PIL picture.*received int"),
    ({"image": [PICTURE, 3]}, TypeError, "`image` must be a PIL picture.*received int"),
    ({"image": Image.new("LAB", (16, 16))}, ValueError, "mode 'LAB'"),
    ({"image": np.full((16, 16, 3), 255.0)}, ValueError, r"floats in \[0, 1\], received 255 to 255.*uint8"),
    ({"image": np.zeros((0, 16, 3))}, ValueError, "`image` is empty"),
    ({"image": [PICTURE] * 3, "prompt": ["a", "b"]}, ValueError, "`image` holds 3 pictures for 2 prompts"),
    (
        {"image": tiny_picture(0, 17, 16)},
        ValueError,
        "`image.height` must be a multiple of 4 .*nearest valid: 16 or 20",
    ),
    ({"image": tiny_picture(0, 17, 16), "height": 18}, ValueError, "`height` must be a multiple of 4 pixels"),
    ({"image": tiny_picture(0, 4, 16)}, ValueError, "`image.height` .* at least 8; received 4"),
    (
        {"image": torch.zeros(1, 8, 8).long(), "width": 32},
        ValueError,
        "16x16 pixels, which cannot be resized to 32x16",
    ),
    ({"image": torch.full((1, 8, 8), -1)}, ValueError, "`image` must hold token indices 0 to 23, received -1 to -1"),
    ({"width": "16"}, TypeError, "`width` must be an integer"),
    ({"strength": 1.01}, ValueError, r"`strength` must lie in \[0, 1\], received 1.01: 0 returns the picture"),
    ({"strength": -1}, ValueError, r"`strength` must lie in \[0, 1\], received -1"),
    ({"strength": float("inf")}, ValueError, r"`strength` must lie in \[0, 1\], received inf"),
    ({"strength": None}, TypeError, "`strength` must be a number, received None"),
    ({"strength": True}, TypeError, "`strength` must be a number, received True"),
    ({"renoise_mode": "previous"}, ValueError, "renoise_mode.*'previous'"),
    ({"sample_mode": "sample"}, ValueError, "needs a GumbelVQModel"),
    ({"prompt": None}, ValueError, "exactly one of `prompt` and `prompt_embeds`; received neither"),
    ({"generator": seeded(0, 1)}, ValueError, "`generator` is a list of 2, but 1 images"),
    ({"latents": torch.zeros(1, 8, 6).long()}, ValueError, r"`latents` must have shape \(1, 8, 8\)"),
    ({"num_inference_steps": 0}, ValueError, "`num_inference_steps` must be at least 1"),
    ({"guidance_scale": -2}, ValueError, "`guidance_scale` must be finite and at least 0"),
    ({"temperature": float("nan")}, ValueError, "temperature"),
    ({"output_type": "jpg"}, ValueError, "`output_type` must be one of"),
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
        pipe(**{"prompt": PROMPT, "image": PICTURE, **arguments})
    assert runs == []


def test_the_watch_sees_a_good_call(watched):
    pipe, runs = watched
    runs.clear()
    pipe(PROMPT, PICTURE, num_inference_steps=2)
    assert set(runs) == {"text_encoder", "unet", "encoder", "decoder"}


# --- sharing, disk, entry file


def test_from_pipe_shares_both_ways_and_keeps_dtypes():
    inpaint = PaellaInpaintPipeline(**tiny_paella_components(image_encoder=True))
    inpaint.vqvae.to(torch.bfloat16)
    pipe = quiet(PaellaImg2ImgPipeline.from_pipe(inpaint))
    back = PaellaInpaintPipeline.from_pipe(pipe)
    for name, component in inpaint.components.items():
        assert component is not None
        assert getattr(pipe, name) is component and getattr(back, name) is component, name
    assert pipe.vqvae.dtype == torch.bfloat16 and pipe.unet.dtype == torch.float32
    assert pipe.config.default_sample_size == 8 and back.config.default_guidance_scale == 3.0
    assert tokens(pipe).shape == (1, 8, 8)  # mixed dtypes work
    assert pipe(PROMPT, PICTURE, num_inference_steps=2, output_type="np").images.dtype == np.float32


def test_entry_file_and_disk(tmp_path, repo_root, capsys):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path / "pipe"))
    assert type(loaded) is PaellaImg2ImgPipeline and torch.equal(tokens(loaded), tokens(pipe))
    entry_file = repo_root / "pipelines" / "paella_img2img.py"
    custom = DiffusionPipeline.from_pretrained(
        tmp_path / "pipe", custom_pipeline=str(entry_file), trust_remote_code=True
    )
    assert type(custom).__name__ == "PaellaImg2ImgPipeline" and torch.equal(tokens(quiet(custom)), tokens(pipe))
    PICTURE.save(tmp_path / "picture.png")
    arguments = [str(tmp_path / "pipe"), "a star", "a ring", "--image", str(tmp_path / "picture.png"), "--width", "32"]
    arguments += ["--num_images_per_prompt", "3", "--num_inference_steps", "3", "--output", str(tmp_path / "grid.png")]
    runpy.run_path(str(entry_file))["main"](arguments)
    assert "6 pictures, one row a prompt" in capsys.readouterr().out
    assert Image.open(tmp_path / "grid.png").size == (3 * 32, 2 * 16)
