import runpy

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pipelines.tiny_paella import CONDITION_DIM, count_runs, quiet, seeded, tiny_paella_components, tiny_picture

from diffusers_ext import PaellaImageVariationPipeline, PaellaInpaintPipeline, PaellaPipeline
from diffusers_ext.models.token_codec import decode_indices

PICTURE = tiny_picture()


def make_pipe(**options) -> PaellaImageVariationPipeline:
    return quiet(PaellaImageVariationPipeline(**{**tiny_paella_components(image_encoder=True), **options}))


@pytest.fixture(scope="module")
def pipe() -> PaellaImageVariationPipeline:
    """Shared, so no test may change it."""
    return make_pipe()


def tokens(pipe, image=PICTURE, seed=0, **options) -> torch.Tensor:
    options = {"num_inference_steps": 3, "generator": seeded(seed)[0], **options}
    return pipe(image, output_type="latent", **options).images


# --- the condition


def test_vectors_are_projected_and_not_normalised(pipe):
    embeds = pipe.encode_image([PICTURE, tiny_picture(1, 40, 20)])
    with torch.no_grad():
        pixels = pipe.feature_extractor([PICTURE, tiny_picture(1, 40, 20)], return_tensors="pt").pixel_values
        wanted = pipe.image_encoder(pixels).image_embeds
    torch.testing.assert_close(embeds, wanted)
    assert embeds.shape == (2, CONDITION_DIM) and (embeds.norm(dim=1) - 1).abs().min() > 1e-3
    assert embeds.requires_grad  # for whoever learns a picture; a whole run keeps none


def test_encode_image_needs_only_the_image_parts(pipe):
    alone = PaellaImageVariationPipeline(
        None, None, None, pipe.unet, None, image_encoder=pipe.image_encoder, feature_extractor=pipe.feature_extractor
    )
    assert torch.equal(alone.encode_image(PICTURE), pipe.encode_image(PICTURE))


def test_a_variation_is_text_to_image_with_the_pictures_vector(pipe):
    text = quiet(PaellaPipeline.from_pipe(pipe))
    call = {"num_inference_steps": 3, "output_type": "latent", "negative_prompt": "a ring", "guidance_scale": 2.0}
    wanted = text(prompt_embeds=text.encode_image(PICTURE), generator=seeded(0)[0], **call).images
    assert torch.equal(wanted, pipe(PICTURE, generator=seeded(0)[0], **call).images)
    assert torch.equal(tokens(pipe), tokens(pipe, None, prompt_embeds=pipe.encode_image(PICTURE)))


def test_tokens_follow_picture_and_seed(pipe):
    base = tokens(pipe)
    assert torch.equal(base, tokens(pipe))
    assert not torch.equal(base, tokens(pipe, tiny_picture(1))) and not torch.equal(base, tokens(pipe, seed=1))
    ignored = [tokens(pipe, tiny_picture(seed), guidance_scale=0) for seed in (0, 1)]
    assert torch.equal(ignored[0], ignored[1])


def test_the_null_branch_is_zeros_and_callbacks_see_it(pipe):
    seen, names = [], ["prompt_embeds", "negative_prompt_embeds"]
    tokens(
        pipe,
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors),
        callback_on_step_end_tensor_inputs=names,
    )
    assert len(seen) == 3 and torch.equal(seen[0]["prompt_embeds"], pipe.encode_image(PICTURE))
    assert seen[0]["negative_prompt_embeds"].abs().max() == 0
    other = tokens(pipe, negative_prompt_embeds=torch.ones(1, CONDITION_DIM))
    assert not torch.equal(other, tokens(pipe))


def test_pictures_in_every_form(pipe):
    base, pixels = tokens(pipe), np.array(PICTURE)
    as_tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for form in [pixels, pixels / 255.0, as_tensor, as_tensor[None] / 255, [PICTURE]]:
        assert torch.equal(base, tokens(pipe, form))


# --- what comes out


def test_sizes_do_not_depend_on_the_picture(pipe):
    assert tokens(pipe, tiny_picture(0, 33, 57)).shape == (1, 8, 8)
    assert tokens(pipe, height=24, width=12).shape == (1, 12, 6)
    assert tokens(pipe, latents=torch.zeros(1, 4, 10, dtype=torch.long)).shape == (1, 4, 10)


def test_output_types_agree(pipe):
    seen = {
        kind: pipe(PICTURE, num_inference_steps=2, generator=seeded(0)[0], output_type=kind).images
        for kind in ("latent", "pt", "np", "pil")
    }
    with torch.no_grad():
        decoded = (decode_indices(pipe.vqvae, seen["latent"]) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(seen["pt"], decoded)
    np.testing.assert_allclose(seen["np"], decoded.permute(0, 2, 3, 1).numpy())
    assert seen["pil"][0].size == (16, 16)
    plain = pipe(PICTURE, num_inference_steps=2, generator=seeded(0)[0], output_type="latent", return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], seen["latent"])


def test_a_batch_with_a_list_of_generators_equals_single_runs(pipe):
    pictures = [PICTURE, tiny_picture(1, 24, 40)]
    together = tokens(pipe, pictures, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3))
    assert torch.equal(together, torch.cat([tokens(pipe, pictures[k // 2], generator=seeded(k)) for k in range(4)]))


# --- what is refused, before any model runs

BAD_CALLS = [
    ({"image": None}, ValueError, "exactly one of `image` and `prompt_embeds`; received neither"),
    ({"prompt_embeds": torch.zeros(1, CONDITION_DIM)}, ValueError, "received both"),
    ({"image": []}, ValueError, "`image` is an empty list"),
    ({"image": "picture.png"}, TypeError, "`image` must be a PIL picture.*received str"),
    ({"image": Image.new("LAB", (8, 8))}, ValueError, "mode 'LAB'"),
    ({"image": torch.zeros(2, 8, 8).long()}, ValueError, r"\(3, H, W\) or \(b, 3, H, W\) as a tensor"),
    ({"image": torch.zeros(3, 8, 8).long()}, TypeError, "must hold uint8 or floating-point values.*int64"),
    ({"image": torch.full((3, 8, 8), 2.0)}, ValueError, r"floats in \[0, 1\], received 2 to 2"),
    ({"image": None, "prompt_embeds": torch.zeros(1, 5)}, ValueError, r"`prompt_embeds` must have shape \(n, 12\)"),
    ({"height": 17}, ValueError, "`height` must be a multiple of 4 pixels.*nearest valid: 16 or 20"),
    ({"num_inference_steps": 0}, ValueError, "`num_inference_steps` must be at least 1"),
    ({"negative_prompt": ["a", "b"]}, ValueError, "`negative_prompt` holds 2 texts for 1 prompts"),
    ({"generator": seeded(0, 1)}, ValueError, "`generator` is a list of 2, but 1 images"),
    ({"latents": torch.zeros(2, 8, 8).long()}, ValueError, r"`latents` must have shape \(1, 8, 8\)"),
    ({"guidance_scale": "5"}, TypeError, "`guidance_scale` must be a number"),
    ({"renoise_steps": 99}, ValueError, "renoise_steps"),
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
        pipe(**{"image": PICTURE, **arguments})
    assert runs == []


def test_the_watch_sees_a_good_call(watched):
    pipe, runs = watched
    runs.clear()
    pipe(PICTURE, num_inference_steps=1)
    assert set(runs) == {"image_encoder", "unet", "decoder"}


def test_components_that_do_not_fit_are_named():
    blind = make_pipe(image_encoder=None, feature_extractor=None)
    with pytest.raises(ValueError, match="built without image_encoder and feature_extractor.*pass `prompt_embeds`"):
        blind(PICTURE)
    assert tokens(blind, None, prompt_embeds=torch.zeros(1, CONDITION_DIM)).shape == (1, 8, 8)
    pipe = make_pipe()
    pipe.image_encoder.config.projection_dim = 13
    with pytest.raises(
        ValueError, match="image_encoder.config.projection_dim=13 differs from unet.config.condition_dim"
    ):
        pipe(PICTURE)
    assert tokens(make_pipe(tokenizer=None, text_encoder=None)).shape == (1, 8, 8)


# --- sharing, disk, entry file


def test_from_pipe_shares_both_ways_and_keeps_dtypes():
    text = PaellaPipeline(**tiny_paella_components(image_encoder=True))
    text.image_encoder.to(torch.bfloat16)
    pipe = quiet(PaellaImageVariationPipeline.from_pipe(text))
    back = PaellaInpaintPipeline.from_pipe(pipe)
    for name, component in text.components.items():
        assert component is not None
        assert getattr(pipe, name) is component and getattr(back, name) is component, name
    assert pipe.image_encoder.dtype == torch.bfloat16 and pipe.unet.dtype == torch.float32
    assert tokens(pipe).shape == (1, 8, 8)  # mixed dtypes work
    # a text checkpoint's image tower may come later
    blind = PaellaPipeline(**tiny_paella_components())
    parts = {name: getattr(text, name) for name in ("image_encoder", "feature_extractor")}
    parts["image_encoder"].to(torch.float32)
    assert tokens(quiet(PaellaImageVariationPipeline.from_pipe(blind, **parts))).shape == (1, 8, 8)


def test_entry_file_and_disk(tmp_path, repo_root, capsys):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path / "pipe"))
    assert type(loaded) is PaellaImageVariationPipeline and torch.equal(tokens(loaded), tokens(pipe))
    entry_file = repo_root / "pipelines" / "paella_image_variation.py"
    custom = DiffusionPipeline.from_pretrained(
        tmp_path / "pipe", custom_pipeline=str(entry_file), trust_remote_code=True
    )
    assert type(custom).__name__ == "PaellaImageVariationPipeline"
    assert torch.equal(tokens(quiet(custom)), tokens(pipe))
    PICTURE.save(tmp_path / "picture.png")
    arguments = [str(tmp_path / "pipe"), str(tmp_path / "picture.png"), "--width", "32"]
    arguments += ["--num_images_per_prompt", "3", "--num_inference_steps", "2", "--output", str(tmp_path / "grid.png")]
    runpy.run_path(str(entry_file))["main"](arguments)
    assert "3 pictures, one row a given picture" in capsys.readouterr().out
    assert Image.open(tmp_path / "grid.png").size == (3 * 32, 16)
