"""What all seven latent-diffusion pipelines have in common, each on tiny real components."""

import inspect
import json
import re

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from pipelines.tiny_ldm import (
    TASKS,
    count_runs,
    pipeline_class,
    quiet,
    seeded,
    tiny_first_stage,
    tiny_inputs,
    tiny_ldm,
    tiny_unet,
)

from diffusers_ext.schedulers.gaussian import ldm_scheduler

SCHEDULERS = {
    "DDIM": (DDIMScheduler, {}),
    "PNDM": (PNDMScheduler, {"skip_prk_steps": True}),
    "DPM-Solver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "Euler": (EulerDiscreteScheduler, {}),
    "UniPC": (UniPCMultistepScheduler, {}),
}
CONDITIONAL = [task for task in TASKS if task != "unconditional"]


@pytest.fixture(scope="module")
def pipes():
    """One pipeline a task, for tests that leave it as it is."""
    return {task: tiny_ldm(task) for task in TASKS}


def sample(pipe, task, *, size=(16, 16), seed=0, steps=2, output_type="latent", **changes):
    call = {"num_inference_steps": steps, "generator": seeded(seed), "output_type": output_type}
    return pipe(**tiny_inputs(task, *size) | call | changes).images


@pytest.mark.parametrize("task", TASKS)
def test_sizes_ranges_and_output_types(pipes, task):
    pipe = pipes[task]
    latents = sample(pipe, task, size=(16, 24))
    assert latents.shape == (1, 3, 4, 6) and torch.isfinite(latents).all()
    pixels = sample(pipe, task, size=(16, 24), output_type="pt")
    assert pixels.shape == (1, 3, 16, 24) and 0 <= pixels.min() < pixels.max() <= 1
    array = sample(pipe, task, size=(16, 24), output_type="np")
    np.testing.assert_array_equal(array, pixels.permute(0, 2, 3, 1).numpy())
    (picture,) = sample(pipe, task, size=(16, 24), output_type="pil")
    assert picture.size == (24, 16)
    np.testing.assert_allclose(np.asarray(picture), array[0] * 255, atol=0.51)
    (plain,) = pipe(
        **tiny_inputs(task, 16, 24), num_inference_steps=2, generator=seeded(0), output_type="pt", return_dict=False
    )
    assert torch.equal(plain, pixels)
    if task != "inpaint":  # which puts the known pixels back
        decoded = pipe.vqvae.decode(latents / 0.5).sample
        torch.testing.assert_close(pixels, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-6, rtol=0)


WEAK = ldm_scheduler(0.0005, 0.009).config | {"timestep_spacing": "trailing", "steps_offset": 0}  # keeps samples small


@pytest.fixture(scope="module")
def solutions(pipes):
    """What many steps of DDIM make of one noise."""
    results = {}
    for task, pipe in pipes.items():
        own, pipe.scheduler = pipe.scheduler, DDIMScheduler.from_config(WEAK)
        results[task] = sample(pipe, task, steps=16)
        pipe.scheduler = own
    return results


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("task", TASKS)
def test_every_scheduler_solves_the_same_equation(pipes, solutions, task, name):
    """From the same noise, all of them reach the same latents, up to their own errors.

    Without `scale_model_input` Euler would miss them by 11 to 20 %.
    """
    pipe, (cls, options) = pipes[task], SCHEDULERS[name]
    own, pipe.scheduler = pipe.scheduler, cls.from_config(WEAK, **options)
    reached = sample(pipe, task, steps=10)
    pipe.scheduler = own
    error = (reached - solutions[task]).norm() / solutions[task].norm()
    assert error < 0.06, f"{float(error):.3f}"


@pytest.mark.parametrize("task", TASKS)
def test_picture_k_depends_on_generator_k_alone(pipes, task):
    pipe, several = pipes[task], "batch_size" if task == "unconditional" else "num_images_per_prompt"
    both = sample(pipe, task, generator=seeded(3, 4), eta=1.0, **{several: 2})
    for number, seed in enumerate((3, 4)):
        torch.testing.assert_close(both[number : number + 1], sample(pipe, task, seed=seed, eta=1.0))
    assert (both[0] - both[1]).abs().max() > 0.1
    deterministic = sample(pipe, task, seed=3)
    assert (both[0] - deterministic[0]).abs().max() > 0.1  # eta reaches the scheduler


@pytest.mark.parametrize("task", TASKS)
def test_given_latents_are_the_noise(pipes, task):
    noise = torch.randn(1, 3, 4, 4, generator=seeded(0)[0])
    inputs = {name: value for name, value in tiny_inputs(task).items() if name not in ("height", "width")}
    ours = pipes[task](**inputs, num_inference_steps=2, latents=noise, output_type="latent").images
    assert torch.equal(ours, sample(pipes[task], task))
    pipe = tiny_ldm(task, scheduler=EulerDiscreteScheduler.from_config(pipes[task].scheduler.config))
    assert pipe.scheduler.init_noise_sigma > 1
    assert torch.equal(pipe.prepare_latents(1, 16, 16, latents=noise), noise * pipe.scheduler.init_noise_sigma)


@pytest.mark.parametrize("task", TASKS)
def test_one_tile_is_the_whole_and_several_cover_it(pipes, task):
    pipe = pipes[task]
    whole = sample(pipe, task, size=(16, 24), output_type="pt")
    torch.testing.assert_close(sample(pipe, task, size=(16, 24), output_type="pt", tile_size=32), whole)
    tiled = sample(pipe, task, size=(40, 24), output_type="pt", tile_size=(16, 64), tile_stride=12)
    assert tiled.shape == (1, 3, 40, 24) and torch.isfinite(tiled).all()


@pytest.mark.parametrize("task", TASKS)
def test_no_network_ever_sees_more_than_a_tile(task):
    pipe = tiny_ldm(task)
    sizes = {"unet": set(), "encoder": set(), "decoder": set()}
    modules = {"unet": pipe.unet, "encoder": pipe.vqvae.encoder, "decoder": pipe.vqvae.decoder}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, args, name=name: sizes[name].add(tuple(args[0].shape[-2:])))
    sample(pipe, task, size=(40, 32), output_type="pt", tile_size=(16, 24))
    assert sizes["unet"] == sizes["decoder"] == {(4, 6)}
    assert sizes["encoder"] == ({(16, 24)} if task == "inpaint" else set())


@pytest.mark.parametrize("task", CONDITIONAL)
def test_guidance_scale_one_needs_half_the_work(task):
    pipe = tiny_ldm(task)
    batches = []
    pipe.unet.register_forward_pre_hook(lambda _, args: batches.append(args[0].clone()))
    plain = sample(pipe, task, guidance_scale=1.0)
    guided = sample(pipe, task, guidance_scale=4.0)
    assert [len(batch) for batch in batches] == [1, 1, 2, 2]
    assert (guided - plain).abs().max() > 1e-4
    extra = batches[-1][:, 3:]
    if extra.shape[1]:  # unconditional first: its maps are zeros
        assert not extra[0].any() and extra[1].any()


@pytest.mark.parametrize("task", CONDITIONAL)
def test_guidance_is_affine_in_the_scale(pipes, task):
    results = [sample(pipes[task], task, steps=1, guidance_scale=scale) for scale in (1.0, 2.0, 3.0)]
    first, second = results[1] - results[0], results[2] - results[1]
    assert first.abs().max() > 1e-3
    assert (second - first).norm() < 0.01 * first.norm()


@pytest.mark.parametrize("task", TASKS)
def test_save_and_load(pipes, task, tmp_path):
    pipes[task].save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == pipeline_class(task).__name__
    own = {
        "class": ("class_embedder", ["diffusers_ext", "LDMClassEmbedder"]),
        "text": ("bert", ["latent_diffusion", "LDMBertModel"]),
        "layout": ("layout_encoder", ["diffusers_ext", "LDMLayoutEncoder"]),
        "semantic": ("spatial_rescaler", ["diffusers_ext", "LDMSpatialRescaler"]),
    }.get(task, ("vqvae", ["diffusers", "AutoencoderKL"]))
    assert index[own[0]] == own[1]
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is pipeline_class(task)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in pipes[task].config.items() if k[0] != "_"
    }
    torch.testing.assert_close(sample(quiet(loaded), task), sample(pipes[task], task))


def test_a_network_with_a_constant_number_of_heads_and_a_vq_first_stage(tmp_path):
    pipe = tiny_ldm("unconditional", first_stage="vq", unet=tiny_unet(heads=2))
    expected = sample(pipe, "unconditional", output_type="pt")
    pipe.save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded.unet).__name__ == "LDMUNet"
    torch.testing.assert_close(sample(loaded, "unconditional", output_type="pt"), expected)


@pytest.mark.parametrize("task", TASKS)
def test_half_precision_and_from_pipe_which_keeps_it(task):
    pipe = tiny_ldm(task).to(torch.bfloat16)
    shared = quiet(pipeline_class(task).from_pipe(pipe))
    assert shared.unet is pipe.unet and shared.unet.dtype == torch.bfloat16
    latents = sample(shared, task)
    assert latents.dtype == torch.bfloat16 and torch.isfinite(latents).all()
    assert sample(shared, task, output_type="np", tile_size=8).dtype == np.float32


def test_callbacks_see_and_change_the_run(pipes):
    pipe, seen = pipes["text"], []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds", "pred_original_sample"]
    result = sample(pipe, "text", steps=3, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=names)
    assert not result.any()
    latent, context = (1, 3, 4, 4), (1, 10, 16)
    shapes = dict(zip(names, (latent, context, context, latent), strict=True))
    assert seen == [(0, 667, shapes), (1, 334, shapes), (2, 1, shapes)] and pipe.num_timesteps == 3

    def stop(pipe, step, timestep, tensors):
        seen.append("once")
        pipe._interrupt = True

    sample(pipe, "text", steps=3, callback_on_step_end=stop)
    assert seen[3:] == ["once"]

    def replace(pipe, step, timestep, tensors):
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    replaced = sample(
        pipe, "text", steps=3, callback_on_step_end=replace, callback_on_step_end_tensor_inputs=["prompt_embeds"]
    )
    assert (replaced - sample(pipe, "text", steps=3)).abs().max() > 1e-4


def test_the_previewed_clean_latents_are_those_of_the_scheduler(pipes):
    """DDIM's last step goes to timestep 0, which is almost clean; Euler's goes to zero noise."""
    pipe, seen = pipes["class"], []

    def watch(pipe, step, timestep, tensors):
        seen.append(tensors["pred_original_sample"])
        return {}

    names = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": ["pred_original_sample"]}
    own = pipe.scheduler
    try:
        for cls in (DDIMScheduler, EulerDiscreteScheduler):
            pipe.scheduler = cls.from_config(own.config)
            result = sample(pipe, "class", steps=3, **names)
            # from timestep 1 on, the last step is short
            torch.testing.assert_close(seen[-1], result, atol=0.15, rtol=0.02)
    finally:
        pipe.scheduler = own


@pytest.mark.parametrize("task", TASKS)
def test_the_order_of_offloading_names_every_network(pipes, task):
    pipe = pipes[task]
    named = pipe.model_cpu_offload_seq.split("->")
    modules = [name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)]
    assert sorted(named) == sorted(modules)


BAD = [
    ({"num_inference_steps": 0}, ValueError, r"`num_inference_steps` must be at least 1, received 0"),
    ({"num_inference_steps": 1001}, ValueError, r"must be at most 1000, the steps of the training; received 1001"),
    ({"num_inference_steps": 1000}, ValueError, r"=1000 makes DDIMScheduler start at timestep 1000, the last one"),
    ({"num_inference_steps": 2.5}, TypeError, r"`num_inference_steps` must be an integer, received 2\.5"),
    ({"guidance_scale": -1.0}, ValueError, r"`guidance_scale` must be finite and at least 0"),
    ({"eta": 1.5}, ValueError, r"`eta` must lie in \[0, 1\], received 1\.5"),
    ({"eta": "no"}, TypeError, r"`eta` must be a number, received 'no'"),
    ({"output_type": "jpeg"}, ValueError, r"`output_type` must be one of pil, np, pt, latent; received 'jpeg'"),
    ({"generator": [torch.Generator()] * 3}, ValueError, r"`generator` is a list of 3, but 1 images"),
    ({"latents": torch.zeros(1, 3, 4, 5)}, ValueError, r"`latents` must have shape \(1, 3, 4, 4\).*\(1, 3, 4, 5\)"),
    ({"latents": torch.zeros(1, 3, 4, 4).long()}, TypeError, r"`latents` must be a floating-point tensor"),
    ({"latents": torch.full((1, 3, 4, 4), torch.nan)}, ValueError, r"`latents` holds values that are not finite"),
    ({"tile_stride": 8}, ValueError, r"`tile_stride` is 8, but there is no `tile_size`"),
    ({"tile_size": 8, "tile_stride": 12}, ValueError, r"`tile_stride` is 12 with tiles of 8 pixels: tiles must"),
    (
        {"tile_size": 8, "tile_stride": 3},
        ValueError,
        r"`tile_stride` must be a multiple of 4 pixels \(whole l",
    ),
    ({"tile_size": (8, 8, 8)}, ValueError, r"`tile_size` must be one number of pixels or \(height, width\)"),
    ({"tile_size": 0}, ValueError, r"`tile_size` must be at least 1, received 0"),
    (
        {"callback_on_step_end_tensor_inputs": ["weights"]},
        ValueError,
        r"holds \['weights'\]; allowed are \['latents'",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("task", TASKS)
def test_bad_input_is_refused_before_any_network_runs(pipes, task, changes, error, message):
    if task == "unconditional" and "guidance_scale" in changes:
        return  # has no such argument
    pipe = pipes[task]
    runs = count_runs(pipe)
    with pytest.raises(error, match=message):
        sample(pipe, task, **changes)
    assert not runs


@pytest.mark.parametrize("task", TASKS)
def test_components_that_do_not_match(task):
    pipe = tiny_ldm(task)
    with pytest.raises(ValueError, match=r"first stage does not match the U-Net: latents of `vqvae` have 4 .*pred"):
        sample(tiny_ldm(task, vqvae=tiny_first_stage(latent_channels=4)), task)
    takes_context = task in ("class", "text", "layout")
    with pytest.raises(ValueError, match=r"`unet` is a UNet2D(Condition)?Model, LDM\w+Pipeline needs a UNet2D"):
        sample(tiny_ldm(task, unet=tiny_unet(context=not takes_context)), task)
    with pytest.raises(ValueError, match=r"`unet` takes 5 channels, LDM\w+Pipeline gives it"):
        sample(tiny_ldm(task, unet=tiny_unet(5, context=takes_context)), task)
    with pytest.raises(ValueError, match=r"was built without unet.*; sampling needs"):
        sample(tiny_ldm(task, unet=None), task)
    with pytest.raises(ValueError, match=r"scale of the latents must be positive, but is -1\.0"):
        sample(tiny_ldm(task, latent_scale=-1.0), task)
    assert pipe.latent_scale == 0.5


@pytest.mark.parametrize("task", ["layout", "semantic", "upscale", "inpaint", "text"])
def test_guidance_without_a_null_condition_is_refused(task):
    pipe = tiny_ldm(task, null_condition=False)
    sample(pipe, task)  # the default is then no guidance
    assert pipe.guidance_scale == 1.0
    with pytest.raises(ValueError, match=r"`guidance_scale` is 3\.0, but the network was not trained without its"):
        sample(pipe, task, guidance_scale=3.0)
    assert sample(pipe, task, guidance_scale=1.0).shape == (1, 3, 4, 4)


def test_default_size_and_scale_are_the_checkpoints():
    pipe = tiny_ldm("class", default_sample_size=6, default_guidance_scale=2.5)
    images = pipe("star", num_inference_steps=1, output_type="pt").images
    assert images.shape == (1, 3, 24, 24) and pipe.guidance_scale == 2.5
    pipe = tiny_ldm("class")
    assert pipe("star", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 16, 16)
    assert pipe.guidance_scale == 3.0  # the authors'
    pipe.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match=r"`height` and `width` are needed: neither"):
        pipe("star", num_inference_steps=1)
    assert pipe("star", 8, 12, num_inference_steps=1, output_type="pt").images.shape == (1, 3, 8, 12)


def documented(task: str) -> dict[str, str]:
    """The text of each argument of a task's call, from its help."""
    doc = inspect.getdoc(pipeline_class(task).__call__)
    block = doc.split("Args:\n")[1].split("\n\n")[0]
    return {name: " ".join(text.split()) for name, text in re.findall(r"^    (\w+): ((?:.|\n {5,})+)", block, re.M)}


@pytest.mark.parametrize("task", TASKS)
def test_the_help_of_a_call_tells_all_its_arguments(task):
    wanted = [name for name in inspect.signature(pipeline_class(task).__call__).parameters if name != "self"]
    assert list(documented(task)) == wanted
    options = [name for name in inspect.signature(pipeline_class(task).__init__).parameters if name != "self"]
    block = inspect.getdoc(pipeline_class(task)).split("Args:\n")[1]
    assert re.findall(r"^    (\w+): ", block, re.M) == options


@pytest.mark.parametrize("name", ["eta", "generator", "latents", "tile_stride", "return_dict", "guidance_scale"])
def test_what_means_the_same_is_told_in_the_same_words(name):
    texts = {text for task in TASKS if (text := documented(task).get(name)) is not None}
    assert len(texts) == 1, texts
