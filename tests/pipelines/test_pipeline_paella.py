import json
import logging
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import VQModel
from diffusers.callbacks import PipelineCallback
from PIL import Image
from pipelines.tiny_paella import CONDITION_DIM, NUM_CODES, WINDOW, tiny_paella_components, tiny_unet
from torch import Generator

from diffusers_ext.models.token_codec import decode_indices
from diffusers_ext.models.vq_gumbel import GumbelVQModel
from diffusers_ext.pipelines.paella.base import _runs_plain_forward
from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline
from diffusers_ext.schedulers.scheduling_discrete_renoising import DiscreteRenoisingScheduler

PROMPTS = ["a large red circle on the left", "a small blue star", ""]


def make_pipe(**options) -> PaellaPipeline:
    pipe = PaellaPipeline(**{**tiny_paella_components(), **options})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> PaellaPipeline:
    return make_pipe()


def seeded(*seeds: int) -> list[Generator]:
    return [Generator().manual_seed(seed) for seed in seeds]


def tokens(pipe: PaellaPipeline, prompt="a small red star", seed=0, **options) -> torch.Tensor:
    """Sampled tokens of a short run."""
    options = {"num_inference_steps": 3, "generator": Generator().manual_seed(seed), **options}
    return pipe(prompt, output_type="latent", **options).images


def count_runs(pipe: PaellaPipeline) -> list[str]:
    """A list that grows by a name whenever a component computes."""
    runs: list[str] = []
    for name in ("text_encoder", "unet"):
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    pipe.unet.token_embedding.register_forward_pre_hook(lambda *_: runs.append("unet"))
    pipe.vqvae.decoder.register_forward_pre_hook(lambda *_: runs.append("vqvae"))
    pipe.vqvae.encoder.register_forward_pre_hook(lambda *_: runs.append("vqvae"))
    return runs


# --- networks that were trained on classes

CLASS_LABELS = [f"class {k}" for k in range(CONDITION_DIM)]
NO_CLIP = {"tokenizer": None, "text_encoder": None}


def test_classes_by_number_or_name_are_one_hot_conditions(tmp_path):
    make_pipe(**NO_CLIP, id2label=dict(enumerate(CLASS_LABELS))).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["id2label"]["3"] == "class 3"  # no list of strings
    pipe = PaellaPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.class_names == CLASS_LABELS
    one_hot = torch.eye(CONDITION_DIM)[[3, 5]]
    assert torch.equal(pipe.encode_labels(torch.tensor([3, 5])), one_hot)
    call = {"num_inference_steps": 2, "output_type": "latent", "num_images_per_prompt": 2}
    found = pipe(class_labels=["class 3", 5], generator=Generator().manual_seed(0), **call).images
    wanted = pipe(prompt_embeds=one_hot, generator=Generator().manual_seed(0), **call).images
    assert found.shape[0] == 4 and torch.equal(found, wanted)
    assert make_pipe(**NO_CLIP)(class_labels=3, **call).images.shape[0] == 2  # a folder from before, without names


@pytest.mark.parametrize(
    ("options", "call", "error", "message"),
    [
        (NO_CLIP, {"class_labels": CONDITION_DIM}, ValueError, "`class_labels` is 12: .* classes 0 to 11"),
        (
            NO_CLIP,
            {"class_labels": "class 3"},
            ValueError,
            "has no `class_names`: name a class by its number",
        ),
        (NO_CLIP, {"class_labels": []}, ValueError, "`class_labels` is empty"),
        (NO_CLIP, {"class_labels": 0.5}, TypeError, "name of a class or its number, received 0.5"),
        (NO_CLIP | {"id2label": CLASS_LABELS}, {"class_labels": "clas 3"}, ValueError, "did you mean 'class 3'"),
        (NO_CLIP | {"id2label": CLASS_LABELS}, {"prompt": "a"}, ValueError, "pass `prompt_embeds` or `class_labels`"),
        (NO_CLIP, {"class_labels": 1, "prompt": "a"}, ValueError, "Pass one of .* and `class_labels`; received more"),
        ({}, {"class_labels": 1}, ValueError, "`class_labels` is for networks that were trained on classes"),
        (
            NO_CLIP,
            {"class_labels": [1, 2], "regions": "columns", "height": 1},
            ValueError,
            "`height` must be a multiple",
        ),
    ],
)
def test_bad_classes_are_refused_before_any_model_runs(options, call, error, message):
    pipe = make_pipe(**options)
    runs = []
    pipe.unet.token_embedding.register_forward_pre_hook(lambda *_: runs.append("unet"))
    with pytest.raises(error, match=message):
        pipe(**call)
    assert not runs


# --- what comes out


def test_output_types_agree(pipe):
    seen = {
        kind: pipe(PROMPTS, num_inference_steps=2, generator=seeded(0, 1, 2), output_type=kind).images
        for kind in ("latent", "pt", "np", "pil")
    }
    assert seen["latent"].shape == (3, 8, 8) and seen["latent"].dtype == torch.long
    decoded = (decode_indices(pipe.vqvae, seen["latent"]) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(seen["pt"], decoded)
    assert seen["np"].shape == (3, 16, 16, 3) and seen["np"].min() >= 0 and seen["np"].max() <= 1
    np.testing.assert_allclose(seen["np"], seen["pt"].permute(0, 2, 3, 1).numpy())
    assert [image.size for image in seen["pil"]] == [(16, 16)] * 3
    np.testing.assert_allclose(np.stack([np.array(image) for image in seen["pil"]]), seen["np"] * 255, atol=0.51)


def test_tuple_holds_what_the_output_holds(pipe):
    assert torch.equal(
        tokens(pipe),
        pipe(
            "a small red star", num_inference_steps=3, generator=seeded(0)[0], output_type="latent", return_dict=False
        )[0],
    )


def test_tokens_follow_prompt_seed_and_steps(pipe):
    base = tokens(pipe)
    assert torch.equal(base, tokens(pipe))
    assert not torch.equal(base, tokens(pipe, "a large blue ring"))
    assert not torch.equal(base, tokens(pipe, seed=1))
    assert not torch.equal(base, tokens(pipe, num_inference_steps=4))


def test_sizes_from_default_arguments_and_latents(pipe):
    assert tokens(pipe, height=24, width=12).shape == (1, 12, 6)
    assert tokens(pipe, width=32).shape == (1, 8, 16)
    assert tokens(pipe, latents=torch.zeros(1, 4, 10, dtype=torch.long)).shape == (1, 4, 10)
    assert pipe("a star", height=24, width=12, num_inference_steps=1, output_type="np").images.shape == (1, 24, 12, 3)


def test_gumbel_tokenizer():
    pipe = make_pipe(**tiny_paella_components(gumbel=True))
    assert isinstance(pipe.vqvae, GumbelVQModel)
    images = pipe("a star", num_inference_steps=2, generator=seeded(0)[0], output_type="pt").images
    assert images.shape == (1, 3, 16, 16) and images.std() > 0


# --- the algorithm


def test_loop_equals_the_plain_form(pipe):
    """Two separate forwards a step, guided logits, the same generator: u + s (c - u), initial tokens renoised."""
    with torch.no_grad():
        ids = pipe.tokenizer(PROMPTS[0], padding="max_length", return_tensors="pt").input_ids
        cond = pipe.text_encoder(ids).text_embeds
        generator = seeded(5)[0]
        initial = x = torch.randint(NUM_CODES, (1, 8, 8), generator=generator)
        scheduler = DiscreteRenoisingScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            logits_cond = pipe.unet(x, t, cond).sample
            logits_null = pipe.unet(x, t, torch.zeros_like(cond)).sample
            guided = logits_null + 2.5 * (logits_cond - logits_null)
            x = scheduler.step(guided, t, x, initial_noise=initial, generator=generator).prev_sample
    assert torch.equal(x, tokens(pipe, PROMPTS[0], seed=5, guidance_scale=2.5, num_inference_steps=4))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, 7.5])
def test_guided_logits_with_and_without_the_split_forward(pipe, scale):
    """Mixing features ahead of the head gives the logits of two forwards, to float32 rounding."""
    generator = seeded(0)[0]
    x = torch.randint(NUM_CODES, (2, 8, 8), generator=generator)
    cond, null = torch.randn(2, 2, CONDITION_DIM, generator=generator)
    t = torch.tensor(0.25)
    pipe._guidance_scale = scale
    with torch.no_grad():
        wanted = torch.lerp(pipe.unet(x, t, null).sample, pipe.unet(x, t, cond).sample, scale)
        split = pipe._predict(x, t, cond, null)
        runs = count_runs(pipe)  # a watched forward is called as a whole
        whole = pipe._predict(x, t, cond, null)
    assert "unet" in runs
    torch.testing.assert_close(split, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-4)


def compile_in_place(pipe: PaellaPipeline) -> None:
    pipe.unet.compile(backend="eager")


def compile_wrapped(pipe: PaellaPipeline) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def hook(pipe: PaellaPipeline) -> None:
    add_hook_to_module(pipe.unet, ModelHook())  # what accelerate's offloading does


@pytest.mark.parametrize("wrap", [compile_in_place, compile_wrapped, hook])
def test_a_wrapped_forward_is_called_as_a_whole(pipe, wrap):
    base = tokens(pipe)
    assert _runs_plain_forward(pipe.unet)
    wrap(pipe)
    assert not _runs_plain_forward(pipe.unet)
    assert torch.equal(base, tokens(pipe))


@pytest.mark.parametrize(("scale", "batch"), [(1.0, 2), (0.0, 2), (3.0, 4)])
def test_scale_that_cancels_a_branch_runs_one(pipe, scale, batch):
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    tokens(pipe, PROMPTS[:2], guidance_scale=scale)
    assert seen == [batch] * 3


def test_scale_zero_ignores_the_prompt(pipe):
    assert torch.equal(tokens(pipe, PROMPTS[0], guidance_scale=0), tokens(pipe, PROMPTS[1], guidance_scale=0))


def test_default_scale_is_the_pipelines(pipe):
    assert torch.equal(tokens(pipe), tokens(pipe, guidance_scale=3.0))
    assert pipe.guidance_scale == 3.0 and not torch.equal(tokens(pipe), tokens(pipe, guidance_scale=6.0))


def test_temperature_and_renoise_steps_are_for_this_call_only(pipe):
    base = tokens(pipe)
    cold = tokens(pipe, temperature=0.0, renoise_steps=0)
    assert pipe.scheduler.temperatures.tolist() == [0.0] * 3
    assert not torch.equal(base, cold)
    assert torch.equal(cold, tokens(pipe, temperature=(0.0, 0.0), renoise_steps=0))
    assert torch.equal(base, tokens(pipe))


def test_given_initial_tokens(pipe):
    latents = torch.randint(NUM_CODES, (1, 8, 8))
    kept = latents.clone()
    assert torch.equal(tokens(pipe, latents=latents), tokens(pipe, latents=latents))
    assert not torch.equal(tokens(pipe, latents=latents), tokens(pipe, latents=(latents + 1) % NUM_CODES))
    assert torch.equal(latents, kept)
    drawn = pipe.prepare_latents(2, 16, 24, generator=seeded(3, 4))
    assert drawn.shape == (2, 8, 12)
    assert torch.equal(drawn[1:], pipe.prepare_latents(1, 16, 24, generator=seeded(4)[0]))


# --- determinism


def test_a_batch_with_a_list_of_generators_equals_single_runs(pipe):
    together = tokens(pipe, PROMPTS, generator=seeded(0, 1, 2))
    alone = [tokens(pipe, prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    assert torch.equal(together, torch.cat(alone))
    in_lists = [tokens(pipe, [prompt], generator=seeded(seed)) for seed, prompt in enumerate(PROMPTS)]
    assert torch.equal(together, torch.cat(in_lists))


def test_a_sample_does_not_depend_on_its_company(pipe):
    first = tokens(pipe, PROMPTS, generator=seeded(0, 1, 2))
    long = " ".join(["a star"] * 30)
    second = tokens(pipe, [long, PROMPTS[1], "a ring"], generator=seeded(7, 1, 8))
    assert torch.equal(first[1], second[1])


def test_images_per_prompt_come_prompt_by_prompt(pipe):
    four = tokens(pipe, PROMPTS[:2], num_images_per_prompt=2, generator=seeded(0, 1, 2, 3))
    repeated = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert torch.equal(four, tokens(pipe, repeated, generator=seeded(0, 1, 2, 3)))


# --- conditions


def test_text_vectors_are_projected_and_not_normalised(pipe):
    embeds, null = pipe.encode_prompt(PROMPTS)
    ids = pipe.tokenizer(PROMPTS, padding=True, return_tensors="pt").input_ids  # shorter padding, same vectors
    torch.testing.assert_close(embeds, pipe.text_encoder(ids).text_embeds)
    assert (embeds.norm(dim=1) - 1).abs().min() > 1e-3
    assert torch.equal(null, torch.zeros_like(embeds))
    assert embeds[2].abs().max() > 0  # the empty text is a text


def test_encode_prompt_needs_only_the_text_parts(pipe):
    alone = PaellaPipeline(None, pipe.tokenizer, pipe.text_encoder, None, None)
    embeds, null = alone.encode_prompt(PROMPTS[:2], 2, negative_prompt="a ring")
    assert embeds.shape == null.shape == (4, CONDITION_DIM)
    assert torch.equal(embeds[0], embeds[1]) and torch.equal(null[0], null[3])
    assert alone.encode_prompt("a star", do_classifier_free_guidance=False)[1] is None
    embeds, null = alone.encode_prompt(PROMPTS[0], negative_prompt="a ring")
    given = tokens(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=null)
    assert torch.equal(given, tokens(pipe, PROMPTS[0], negative_prompt="a ring"))
    assert torch.equal(given, tokens(pipe, None, prompt_embeds=embeds, negative_prompt="a ring"))


def test_negative_prompt_replaces_the_zero_vector(pipe):
    base = tokens(pipe, PROMPTS, generator=seeded(0, 1, 2))
    one = tokens(pipe, PROMPTS, negative_prompt="a ring", generator=seeded(0, 1, 2))
    assert not torch.equal(base, one)
    assert torch.equal(one, tokens(pipe, PROMPTS, negative_prompt=["a ring"] * 3, generator=seeded(0, 1, 2)))
    zeros = torch.zeros(1, CONDITION_DIM)
    assert torch.equal(base, tokens(pipe, PROMPTS, negative_prompt_embeds=zeros, generator=seeded(0, 1, 2)))


def test_a_constant_map_equals_its_vector(pipe):
    embeds, _ = pipe.encode_prompt(PROMPTS[0])
    spatial = embeds[:, :, None, None].expand(-1, -1, 8, 8)
    assert torch.equal(tokens(pipe, None, prompt_embeds=spatial), tokens(pipe, PROMPTS[0]))
    null = torch.ones(1, CONDITION_DIM)
    assert torch.equal(
        tokens(pipe, None, prompt_embeds=spatial, negative_prompt_embeds=null),
        tokens(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=null),
    )


def test_a_long_prompt_warns_with_the_cut_text(pipe, caplog):
    words = "a red circle on the left of a blue star at the bottom".split()
    room = WINDOW - 2
    with caplog.at_level(logging.WARNING):
        logger = logging.getLogger("diffusers_ext.pipelines.paella.pipeline_paella")
        logger.addHandler(caplog.handler)
        embeds, _ = pipe.encode_prompt([" ".join(words), "a star"])
        logger.removeHandler(caplog.handler)
    messages = {record.getMessage() for record in caplog.records}
    assert len(messages) == 1
    assert repr(" ".join(words[room:])) in messages.pop()
    torch.testing.assert_close(embeds[:1], pipe.encode_prompt(" ".join(words[:room]))[0])


def test_a_tokenizer_without_the_encoders_end_token_is_refused(pipe):
    pipe.text_encoder.config.eos_token_id = len(pipe.tokenizer) - 1
    with pytest.raises(ValueError, match=r"ends no text with token \d+.*eos_token_id is 4"):
        pipe("a star")


def test_a_tokenizer_beyond_the_encoders_vocabulary_is_refused(pipe):
    pipe.text_encoder.config.vocab_size = 6
    with pytest.raises(ValueError, match=r"The tokenizer gives token \d+, the text encoder knows 0 to 5"):
        pipe("a star")


# --- callbacks


def test_callback_sees_and_replaces_tensors(pipe):
    seen = []

    def callback(pipeline, i, t, tensors):
        assert pipeline is pipe and set(tensors) == set(PaellaPipeline._callback_tensor_inputs)
        assert tensors["latents"].shape == (1, 8, 8) and tensors["negative_prompt_embeds"].abs().max() == 0
        seen.append((i, float(t)))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 2 else {}

    out = tokens(
        pipe,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=PaellaPipeline._callback_tensor_inputs,
    )
    assert seen == [(0, 0.0), (1, pytest.approx(1 / 3)), (2, pytest.approx(2 / 3))]
    assert out.abs().max() == 0 and pipe.num_timesteps == 3


def test_callback_that_changes_nothing_changes_nothing(pipe):
    assert torch.equal(tokens(pipe), tokens(pipe, callback_on_step_end=lambda pipe, i, t, tensors: tensors))
    assert torch.equal(tokens(pipe), tokens(pipe, callback_on_step_end=lambda pipe, i, t, tensors: None))


def test_callback_may_change_guidance_and_prompt(pipe):
    def unguide(pipeline, i, t, tensors):
        pipeline._guidance_scale = 1.0
        return tensors

    other, _ = pipe.encode_prompt("a large ring")
    changed = tokens(pipe, callback_on_step_end=unguide)
    assert not pipe.do_classifier_free_guidance
    assert not torch.equal(changed, tokens(pipe))
    swapped = tokens(
        pipe,
        callback_on_step_end=lambda pipe, i, t, tensors: {"prompt_embeds": other},
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert not torch.equal(swapped, tokens(pipe))


def test_interrupt_skips_the_remaining_steps_of_this_call_only(pipe):
    runs = count_runs(pipe)

    def stop(pipeline, i, t, tensors):
        pipeline._interrupt = True
        return tensors

    stopped = tokens(pipe, callback_on_step_end=stop, num_inference_steps=5)
    assert runs.count("unet") == 2  # one call, counted at the network and at its embedding
    assert stopped.shape == (1, 8, 8)
    runs.clear()
    tokens(pipe, num_inference_steps=5)
    assert runs.count("unet") == 10


def test_pipeline_callback_names_its_own_tensors(pipe):
    class Watch(PipelineCallback):
        tensor_inputs = ["pred_original_sample"]
        seen = 0

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            assert list(callback_kwargs) == ["pred_original_sample"]
            self.seen += 1
            return callback_kwargs

    watch = Watch()
    tokens(pipe, callback_on_step_end=watch)
    assert watch.seen == 3


# --- what is refused, before any model runs


def vectors(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def grid(*shape: int, dtype=torch.long) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD_CALLS = [
    ({"prompt": None}, ValueError, "exactly one of `prompt` and `prompt_embeds`; received neither"),
    ({"prompt_embeds": vectors(1, CONDITION_DIM)}, ValueError, "received both"),
    ({"prompt": []}, ValueError, "`prompt` is an empty list"),
    ({"prompt": 3}, TypeError, "`prompt` must be a string or a list of strings, received int"),
    ({"prompt": ["a", None]}, TypeError, "`prompt` must hold strings, received NoneType"),
    ({"prompt": {"a": 1}}, TypeError, "received dict"),
    ({"negative_prompt": []}, ValueError, "`negative_prompt` is an empty list"),
    ({"negative_prompt": ["a", "b", "c"]}, ValueError, "`negative_prompt` holds 3 texts for 2 prompts"),
    ({"negative_prompt": ["a"]}, ValueError, "`negative_prompt` holds 1 texts for 2 prompts"),
    ({"negative_prompt": 1.0}, TypeError, "`negative_prompt` must be a string"),
    ({"negative_prompt": "a", "negative_prompt_embeds": vectors(2, CONDITION_DIM)}, ValueError, "received both"),
    ({"negative_prompt_embeds": vectors(3, CONDITION_DIM)}, ValueError, "holds 3 conditions for 2 prompts"),
    ({"negative_prompt_embeds": vectors(2, 5)}, ValueError, r"shape \(n, 12\) or \(n, 12, 8, 8\).*\(2, 5\)"),
    ({"negative_prompt_embeds": vectors(2, CONDITION_DIM, 8, 8)}, ValueError, "is a map over the grid"),
    ({"prompt": None, "prompt_embeds": [[0.0]]}, TypeError, "`prompt_embeds` must be a floating-point tensor"),
    ({"prompt": None, "prompt_embeds": grid(1, CONDITION_DIM)}, TypeError, "received torch.int64"),
    ({"prompt": None, "prompt_embeds": vectors(CONDITION_DIM)}, ValueError, "`prompt_embeds` must have shape"),
    ({"prompt": None, "prompt_embeds": vectors(0, CONDITION_DIM)}, ValueError, "n >= 1"),
    ({"prompt": None, "prompt_embeds": vectors(1, CONDITION_DIM, 4, 8)}, ValueError, r"received \(1, 12, 4, 8\)"),
    ({"height": 17}, ValueError, "`height` must be a multiple of 4 pixels.*received 17, nearest valid: 16 or 20"),
    ({"width": 30}, ValueError, "`width` must be a multiple of 4 .*nearest valid: 28 or 32"),
    ({"height": 4}, ValueError, "at least 8; received 4, nearest valid: 8"),
    ({"height": 0}, ValueError, "at least 8; received 0, nearest valid: 8"),
    ({"width": -16}, ValueError, "at least 8; received -16, nearest valid: 8"),
    ({"height": 16.0}, TypeError, "`height` must be an integer, received 16.0"),
    ({"width": "16"}, TypeError, "`width` must be an integer, received '16'"),
    ({"num_inference_steps": 0}, ValueError, "`num_inference_steps` must be at least 1, received 0"),
    ({"num_inference_steps": -1}, ValueError, "`num_inference_steps` must be at least 1, received -1"),
    ({"num_inference_steps": 2.5}, TypeError, "`num_inference_steps` must be an integer, received 2.5"),
    ({"num_inference_steps": None}, TypeError, "`num_inference_steps` must be an integer, received None"),
    ({"num_inference_steps": True}, TypeError, "`num_inference_steps` must be an integer, received True"),
    ({"num_images_per_prompt": 0}, ValueError, "`num_images_per_prompt` must be at least 1, received 0"),
    ({"guidance_scale": float("nan")}, ValueError, "`guidance_scale` must be finite and at least 0, received nan"),
    ({"guidance_scale": float("inf")}, ValueError, "received inf"),
    ({"guidance_scale": -1}, ValueError, "`guidance_scale` must be finite and at least 0, received -1"),
    ({"guidance_scale": "5"}, TypeError, "`guidance_scale` must be a number, received '5'"),
    ({"guidance_scale": torch.ones(2)}, TypeError, "`guidance_scale` must be a number"),
    ({"temperature": -1.0}, ValueError, "temperature"),
    ({"temperature": (1.0, float("nan"))}, ValueError, "temperature"),
    ({"renoise_steps": 99}, ValueError, "renoise_steps"),
    ({"output_type": "jpg"}, ValueError, "`output_type` must be one of pil, np, pt, latent; received 'jpg'"),
    ({"generator": seeded(0)}, ValueError, "`generator` is a list of 1, but 2 images"),
    ({"generator": seeded(0, 1), "num_images_per_prompt": 2}, ValueError, "a list of 2, but 4 images"),
    ({"generator": []}, ValueError, "`generator` is a list of 0, but 2 images"),
    ({"generator": 42}, TypeError, "`generator` must be a torch.Generator or a list of them, received int"),
    ({"generator": [1, 2]}, TypeError, "received int in the list"),
    ({"latents": vectors(2, 8, 8)}, TypeError, "`latents` must be an int64 tensor.*received torch.float32"),
    ({"latents": [[0]]}, TypeError, "received list"),
    ({"latents": grid(1, 8, 8)}, ValueError, r"`latents` must have shape \(2, 8, 8\).*received \(1, 8, 8\)"),
    ({"latents": grid(2, 64)}, ValueError, r"received \(2, 64\)"),
    ({"latents": grid(2, 8, 8), "height": 32}, ValueError, r"shape \(2, 16, 8\)"),
    ({"latents": grid(2, 7, 8)}, ValueError, "received 14, nearest valid: 12 or 16"),
    ({"latents": grid(2, 8, 8) + NUM_CODES}, ValueError, "token indices 0 to 23, received 24 to 24"),
    ({"latents": grid(2, 8, 8) - 1}, ValueError, "received -1 to -1"),
    (
        {"callback_on_step_end_tensor_inputs": ["latents", "logits"]},
        ValueError,
        r"`callback_on_step_end_tensor_inputs` holds \['logits'\]; allowed are \['latents'",
    ),
]


@pytest.fixture(scope="module")
def watched() -> tuple[PaellaPipeline, list[str]]:
    pipe = make_pipe()
    return pipe, count_runs(pipe)


@pytest.mark.parametrize(
    ("arguments", "error", "message"), BAD_CALLS, ids=lambda value: re.sub(r" object at 0x\w+", "", str(value))[:50]
)
def test_bad_input_is_refused_before_any_model_runs(watched, arguments, error, message):
    pipe, runs = watched
    runs.clear()
    with pytest.raises(error, match=message):
        pipe(**{"prompt": PROMPTS[:2], **arguments})
    assert runs == []


def test_the_watch_sees_a_good_call(watched):
    pipe, runs = watched
    runs.clear()
    pipe(PROMPTS[:2], num_inference_steps=1)
    assert set(runs) == {"text_encoder", "unet", "vqvae"}


def test_components_that_do_not_fit_are_named(pipe):
    runs = count_runs(pipe)
    pipe.scheduler = DiscreteRenoisingScheduler(num_vec_classes=NUM_CODES + 1)
    with pytest.raises(ValueError, match="unet.config.num_vq_embeddings=24,.*scheduler.config.num_vec_classes=25"):
        pipe("a star")
    wide = make_pipe(unet=type(pipe.unet).from_config(tiny_unet().config, condition_dim=CONDITION_DIM + 1))
    with pytest.raises(ValueError, match="projection_dim=12 differs from unet.config.condition_dim=13"):
        wide("a star")
    with pytest.raises(ValueError, match="built without vqvae"):
        make_pipe(vqvae=None)("a star")
    with pytest.raises(ValueError, match="built without tokenizer or text_encoder; pass `prompt_embeds`"):
        make_pipe(text_encoder=None)("a star")
    assert runs == []
    assert tokens(make_pipe(text_encoder=None, tokenizer=None), None, prompt_embeds=vectors(1, 12)).shape == (1, 8, 8)


def test_logits_that_are_no_numbers_end_the_call(pipe):
    with torch.no_grad():
        pipe.unet.proj_out.bias[3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        pipe("a star", num_inference_steps=2)


# --- state, dtypes


def test_call_leaves_the_components_as_they_were(pipe):
    before = {
        name: {k: v.clone() for k, v in getattr(pipe, name).state_dict().items()}
        for name in ("unet", "vqvae", "text_encoder")
    }
    configs = {name: dict(getattr(pipe, name).config) for name in ("unet", "vqvae", "scheduler")}
    pipe("a star", num_inference_steps=2, temperature=0.5)
    for name, state in before.items():
        after = getattr(pipe, name).state_dict()
        assert all(torch.equal(value, after[key]) and value.dtype == after[key].dtype for key, value in state.items())
    assert configs == {name: dict(getattr(pipe, name).config) for name in configs}
    assert torch.is_grad_enabled()


def test_bfloat16_draws_nearly_what_float32_draws():
    exact = make_pipe()
    half = make_pipe().to(torch.bfloat16)
    one_step = {"num_inference_steps": 1, "temperature": 0.0, "num_images_per_prompt": 8}
    latents = torch.randint(NUM_CODES, (8, 8, 8), generator=seeded(0)[0])
    wanted, got = (tokens(p, latents=latents, **one_step) for p in (exact, half))
    assert (wanted == got).float().mean() > 0.9
    image = half("a star", num_inference_steps=2, output_type="np").images
    assert image.dtype == np.float32 and np.isfinite(image).all()
    assert half.unet.dtype == half.vqvae.dtype == half.text_encoder.dtype == torch.bfloat16


def test_from_pipe_shares_components_and_keeps_their_dtypes():
    pipe = make_pipe()
    pipe.unet.to(torch.bfloat16)
    other = PaellaPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet and other.vqvae is pipe.vqvae and other.scheduler is pipe.scheduler
    assert pipe.unet.dtype == torch.bfloat16 and pipe.text_encoder.dtype == torch.float32
    assert other.config.default_sample_size == 8 and other.config.default_guidance_scale == 3.0
    other.set_progress_bar_config(disable=True)
    assert torch.equal(tokens(pipe), tokens(other))  # mixed dtypes work
    assert PaellaPipeline.from_pipe(pipe, dtype=torch.float32).unet.dtype == torch.float32
    gumbel = PaellaPipeline.from_pipe(make_pipe(**tiny_paella_components(gumbel=True)))
    assert type(gumbel.vqvae) is GumbelVQModel and type(other.vqvae) is VQModel


# --- on disk


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A saved pipeline and the tokens that it draws."""
    folder = tmp_path_factory.mktemp("paella")
    pipe = make_pipe()
    pipe.save_pretrained(folder)
    return folder, tokens(pipe)


@pytest.mark.parametrize("options", [{}, {"gumbel": True, "image_encoder": True}])
def test_save_and_load(tmp_path, options):
    pipe = make_pipe(**tiny_paella_components(**options))
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    loaded = PaellaPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(tokens(pipe), tokens(loaded))
    assert (loaded.image_encoder is not None) == bool(options)
    assert loaded.config.default_sample_size == 8 and loaded.scheduler.config.typical_mass == 0.6
    assert loaded.tokenizer.model_max_length == WINDOW
    assert PaellaPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_index_names_the_components(saved):
    index = json.loads((saved[0] / "model_index.json").read_text())
    assert index["_class_name"] == "PaellaPipeline"
    assert index["vqvae"] == ["diffusers", "VQModel"]
    assert index["tokenizer"][0] == "transformers" and index["text_encoder"][1] == "CLIPTextModelWithProjection"
    assert index["image_encoder"] == [None, None]
    assert index["default_sample_size"] == 8 and index["default_guidance_scale"] == 3.0


SAMPLE = """
import torch
pipe.set_progress_bar_config(disable=True)
out = pipe("a small red star", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent")
print("TOKENS", out.images.flatten().tolist())
"""


def tokens_of(result) -> torch.Tensor:
    line = next(line for line in result.stdout.splitlines() if line.startswith("TOKENS "))
    return torch.tensor(json.loads(line.removeprefix("TOKENS "))).view(1, 8, 8)


def test_a_fresh_process_loads_it(saved, run_python):
    folder, wanted = saved
    load = "from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline\n"
    result = run_python(load + f"pipe = PaellaPipeline.from_pretrained({str(folder)!r})" + SAMPLE)
    assert torch.equal(tokens_of(result), wanted)


# --- the entry file


def test_entry_file_as_custom_pipeline_in_a_fresh_process(saved, run_python, repo_root):
    folder, wanted = saved
    load = (
        "from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(folder)!r}, trust_remote_code=True,"
        f" custom_pipeline={str(repo_root / 'pipelines' / 'paella.py')!r})\n"
        "assert type(pipe).__name__ == 'PaellaPipeline', type(pipe)"
    )
    assert torch.equal(tokens_of(run_python(load + SAMPLE)), wanted)


def test_entry_file_as_script(saved, repo_root, tmp_path, capsys):
    options = ["--num_images_per_prompt", "3", "--num_inference_steps", "2", "--width", "24", "--output"]
    entry = runpy.run_path(str(repo_root / "pipelines" / "paella.py"))
    entry["main"]([str(saved[0]), "a red star", "a blue ring", *options, str(tmp_path / "grid.png")])
    assert "6 pictures, one row a prompt" in capsys.readouterr().out
    assert Image.open(tmp_path / "grid.png").size == (3 * 24, 2 * 16)


def test_entry_file_without_the_package_says_what_to_install(run_python, repo_root):
    block = "import sys; sys.modules['diffusers_ext'] = None; import runpy; "
    script = repo_root / "pipelines" / "paella.py"
    result = run_python(block + f"runpy.run_path({str(script)!r})", check=False)
    assert result.returncode != 0 and "pip install . in a checkout" in result.stderr
