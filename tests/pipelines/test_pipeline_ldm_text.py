"""Text to image with latent diffusion: prompts, embeddings, and equality with diffusers' own pipeline."""

import logging as python_logging

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, LDMTextToImagePipeline
from diffusers.pipelines.auto_pipeline import AutoPipelineForText2Image
from diffusers.utils import logging
from pipelines.tiny_ldm import count_runs, quiet, seeded, tiny_bert, tiny_ldm, tiny_tokenizer

from diffusers_ext import LDMTextPipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_ldm("text")


def sample(pipe, *args, seed=0, output_type="latent", **call):
    return pipe(*args, num_inference_steps=2, generator=seeded(seed), output_type=output_type, **call).images


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_equal_to_the_stock_pipeline_and_loads_what_it_saves(pipe, tmp_path, scale):
    """With what the stock pipeline takes for granted: 77 tokens, and a first stage of factor 8."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 77
    vqvae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        latent_channels=3,
    ).eval()
    stock = quiet(LDMTextToImagePipeline(vqvae, tiny_bert(tokenizer), tokenizer, pipe.unet, pipe.scheduler))
    stock.save_pretrained(tmp_path)
    ours = quiet(LDMTextPipeline.from_pretrained(tmp_path))
    assert ours.latent_scale == 0.18215
    prompts, noise = ["a red circle", "a blue star on the left"], torch.randn(2, 3, 4, 6)
    call = {"height": 32, "width": 48, "latents": noise, "num_inference_steps": 3, "guidance_scale": scale}
    np.testing.assert_allclose(
        ours(prompts, output_type="np", **call).images, stock(prompts, output_type="np", **call).images, atol=1e-5
    )


def test_what_the_network_is_told(pipe):
    """Unconditional first; the empty text, or the negative one, in its place."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    sample(pipe, "a red circle", guidance_scale=2.0)
    sample(pipe, "a red circle", guidance_scale=2.0, negative_prompt="blue")
    hook.remove()
    for contexts, null in ((seen[0], ""), (seen[2], "blue")):
        tokens = pipe.tokenizer([null, "a red circle"], padding="max_length", max_length=10, return_tensors="pt")
        torch.testing.assert_close(contexts, pipe.bert(tokens.input_ids)[0])


def test_prompts_negative_prompts_and_embeddings_agree(pipe):
    prompts, negative = ["a red circle", "a blue star"], ["green", "small"]
    both = pipe(
        prompts,
        num_inference_steps=2,
        negative_prompt=negative,
        num_images_per_prompt=2,
        output_type="latent",
        generator=seeded(0, 1, 2, 3),
    ).images
    assert both.shape == (4, 3, 4, 4)
    for number in (0, 3):
        alone = sample(pipe, prompts[number // 2], seed=number, negative_prompt=negative[number // 2])
        torch.testing.assert_close(both[number : number + 1], alone, atol=1e-5, rtol=1e-5)
    embeds, null = pipe.encode_prompt(prompts[1], negative_prompt=negative[1])
    again = sample(pipe, seed=3, prompt_embeds=embeds, negative_prompt_embeds=null)
    torch.testing.assert_close(both[3:], again, atol=1e-5, rtol=1e-5)
    assert (sample(pipe, prompts[0]) - sample(pipe, prompts[1])).abs().max() > 1e-4
    assert pipe.encode_prompt(prompts, 2, do_classifier_free_guidance=False)[1] is None


def test_prompts_need_only_tokenizer_and_encoder(pipe):
    bare = LDMTextPipeline(None, pipe.bert, pipe.tokenizer, None, None)
    embeds, null = bare.encode_prompt("a red circle")
    torch.testing.assert_close(embeds, pipe.encode_prompt("a red circle")[0])
    assert null.shape == embeds.shape


def test_embeddings_need_neither_tokenizer_nor_encoder(pipe, tmp_path):
    embeds, null = pipe.encode_prompt("a star")
    LDMTextPipeline(pipe.vqvae, None, None, pipe.unet, pipe.scheduler).save_pretrained(tmp_path)
    bare = quiet(LDMTextPipeline.from_pretrained(tmp_path))
    call = {"prompt_embeds": embeds, "negative_prompt_embeds": null}
    torch.testing.assert_close(sample(bare, **call), sample(pipe, "a star"), atol=1e-5, rtol=1e-5)
    assert sample(bare, prompt_embeds=embeds, guidance_scale=1.0).shape == (1, 3, 4, 4)
    for call in ({"prompt": "a star"}, {"prompt_embeds": embeds}):
        with pytest.raises(ValueError, match=r"built without bert or tokenizer: pass `prompt_embeds`.*for guidance"):
            sample(bare, **call)


def test_a_network_without_the_empty_text_may_still_be_guided_away_from_a_text():
    pipe = tiny_ldm("text", null_condition=False)
    assert sample(pipe, "a star", guidance_scale=2.0, negative_prompt="green").shape == (1, 3, 4, 4)


def test_what_does_not_fit_is_cut_with_a_warning(pipe, caplog):
    logging.enable_propagation()
    with caplog.at_level(python_logging.WARNING):
        sample(pipe, "a large red circle on the left of a small blue star")
    logging.disable_propagation()
    assert "reads 10 tokens; this part of the prompt was cut off: 'a small blue star'" in caplog.text


def test_auto_pipeline_finds_it(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = AutoPipelineForText2Image.from_pretrained(tmp_path)
    assert type(loaded) is LDMTextPipeline


EMBEDS = torch.zeros(1, 10, 16)
BAD = [
    ({}, ValueError, r"Pass exactly one of `prompt` and `prompt_embeds`; received neither"),
    ({"prompt": "a", "prompt_embeds": EMBEDS}, ValueError, r"received both"),
    ({"prompt": 3}, TypeError, r"`prompt` must be a string or a list of strings, received int"),
    ({"prompt": []}, ValueError, r"`prompt` is an empty list"),
    (
        {"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": EMBEDS},
        ValueError,
        r"at most one of `negative_prompt` and `negative_prompt_embeds`",
    ),
    ({"prompt": "a", "negative_prompt": ["b", "c"]}, ValueError, r"There are 2 negative prompts for 1 prompts"),
    ({"prompt_embeds": torch.zeros(1, 10, 8)}, ValueError, r"`prompt_embeds` must have shape \(n, l, 16\)"),
    ({"prompt_embeds": np.zeros((1, 10, 16))}, TypeError, r"`prompt_embeds` must be a floating-point tensor"),
    (
        {"prompt": "a", "negative_prompt_embeds": torch.zeros(1, 4, 16)},
        ValueError,
        r"Negative prompts are 4 vectors long, prompts 10",
    ),
    ({"prompt_embeds": torch.zeros(1, 4, 16)}, ValueError, r"Negative prompts are 10 vectors long, prompts 4"),
    ({"prompt": "a", "num_images_per_prompt": 0}, ValueError, r"`num_images_per_prompt` must be at least 1"),
    ({"prompt": "a", "height": 18}, ValueError, r"`height` must be a multiple of 4.*18, nearest valid: 16 or 20"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_refused_before_any_network_runs(pipe, call, error, message):
    runs = count_runs(pipe)
    with pytest.raises(error, match=message):
        sample(pipe, **call)
    assert not runs


def test_another_tokenizer_is_refused():
    pipe = tiny_ldm("text")
    pipe.tokenizer.add_tokens(["purple"])
    with pytest.raises(ValueError, match=r"The tokenizer gives token \d+, the text encoder knows 0 to"):
        sample(pipe, "purple")
