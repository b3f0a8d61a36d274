"""Cascades of tiny stages: what goes from stage to stage, what is refused, and stages that come and go."""

import gc
import json
import shutil

import diffusers
import numpy
import pytest
import torch
from pipelines.tiny_cascaded import (
    CLASSES,
    small_picture,
    tiny_base,
    tiny_cascade,
    tiny_scheduler,
    tiny_unet,
    tiny_upscale,
)
from pipelines.tiny_paella import quiet

import diffusers_ext
from diffusers_ext import CascadedDiffusionPipeline, TruncatedConditioningScheduler
from diffusers_ext.conditions.images import image_batch
from diffusers_ext.models.unet_cascaded import CascadedUNet
from diffusers_ext.pipelines import drawing
from diffusers_ext.schedulers.scheduling_respaced import adm_scheduler
from diffusers_ext.training_utils.lora import add_lora
from pipelines import tiny_ldm

STEPS = 4


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipe, *labels, seeds=(0, 1), **options):
    labels = labels or ("circle", "star")
    run = {"num_inference_steps": STEPS, "output_type": "latent", "generator": seeded(*seeds), "return_dict": False}
    return pipe(list(labels), **run | options)[0]


# --- what goes from stage to stage


def test_truncated_the_next_stage_takes_what_the_first_was_stopped_at():
    pipe, generator = tiny_cascade(2), seeded(0, 1)
    found = draw(pipe, noise_level=402, conditioning_mode="truncated")
    run = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False, "generator": generator}
    noisy = pipe.base(["circle", "star"], stop_level=402, **run)[0]
    assert not bool((noisy.abs() <= 1).all())  # neither clamped nor rounded
    stage = pipe.upscale_1
    wanted = stage.run(
        2,
        (16, 16),
        lambda device: stage.encode_low_res(noisy, [0, 2], level=402, is_noisy=True, device=device),
        num_inference_steps=STEPS,
        generator=generator,
    )
    assert torch.equal(found, wanted)


def test_non_truncated_the_finished_images_are_clamped_and_noised():
    """Draws of each generator: noise and steps of the first stage; noise, augmentation and steps of the second."""
    pipe, generator = tiny_cascade(2), seeded(0, 1)
    found = draw(pipe, noise_level=402, conditioning_mode="non_truncated")
    run = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False, "generator": generator}
    clean = pipe.base(["circle", "star"], **run)[0].clamp(-1, 1)
    stage = pipe.upscale_1
    wanted = stage.run(
        2,
        (16, 16),
        lambda device: stage.encode_low_res(clean, [0, 2], level=402, generator=generator, device=device),
        num_inference_steps=STEPS,
        generator=generator,
    )
    assert torch.equal(found, wanted)
    assert not torch.equal(found, draw(pipe, noise_level=402, conditioning_mode="truncated"))


def test_no_noise_at_all():
    pipe = tiny_cascade(3)
    clean = draw(pipe, noise_level=0)
    assert torch.equal(draw(pipe, conditioning_mode="none"), clean)
    assert not torch.equal(draw(pipe), clean)  # the stages' own level


def test_truncated_is_the_default_where_the_stage_before_can_stop():
    pipe = tiny_cascade(2)
    assert torch.equal(draw(pipe), draw(pipe, conditioning_mode="truncated"))
    pipe.base.scheduler = pipe.base.scheduler.scheduler  # without the adapter
    assert torch.equal(draw(pipe), draw(pipe, conditioning_mode="non_truncated"))
    assert torch.equal(draw(pipe, conditioning_mode="truncated"), draw(tiny_cascade(2)))  # it stops all the same


def test_levels_steps_and_guidance_may_differ_by_stage():
    pipe, seen = tiny_cascade(3), []

    def look(pipe, step, timestep, tensors):
        seen.append((pipe.stage, step, pipe.num_timesteps, pipe.guidance_scale))

    options = {"noise_level": [0, 251], "num_inference_steps": [3, 2, 4], "guidance_scale": [None, 2.0, 3.0]}
    draw(pipe, callback_on_step_end=look, **options)
    by_stage = {stage: [entry[1:] for entry in seen if entry[0] == stage] for stage in pipe.stage_names}
    assert by_stage["base"] == [(step, 3, 1.0) for step in range(3)]
    assert by_stage["upscale_1"][0] == (0, len(by_stage["upscale_1"]), 2.0)  # stopped at 251
    assert by_stage["upscale_2"] == [(step, 4, 3.0) for step in range(4)]
    assert pipe.stage is None


def test_the_level_is_told_to_the_network_and_changes_its_input():
    stage = tiny_upscale()
    low, told = 2 * image_batch(small_picture()) - 1, []
    stage.unet.register_forward_pre_hook(lambda module, inputs: told.append(inputs[4]))
    for level in (0, 1, 500.5):
        stage(small_picture(), "star", noise_level=level, num_inference_steps=1)
        assert told[-1].tolist() == [level]
    condition = stage.encode_low_res(low, [2], level=1000, generator=seeded(0))
    assert float(condition.low_res.std()) == pytest.approx(1.0, abs=0.15)  # nothing but noise
    assert torch.equal(stage.encode_low_res(low, [2], level=0).low_res, low)
    for kind, clean in (("log_snr", 20.0), ("alpha_cumprod", 1.0)):
        other = tiny_upscale(unet={"aug_cond_type": kind})
        assert other.encode_low_res(low, [2]).level.tolist() == [clean]


def test_quantised_images_are_those_of_8_bit_files():
    pipe, low = tiny_cascade(2), []
    pipe.upscale_1.unet.register_forward_pre_hook(lambda module, inputs: low.append(inputs[3]))
    draw(pipe, noise_level=0)
    draw(pipe, noise_level=0, quantize_between_stages=True)
    plain, rounded = low[0], low[-1]
    assert torch.equal(rounded, ((plain + 1) * 127.5).to(torch.uint8).float() / 127.5 - 1)
    assert not torch.equal(plain, rounded) and bool((plain.abs() <= 1).all())


def test_start_stop_and_intermediates():
    pipe = tiny_cascade(3)
    whole = pipe("star", num_inference_steps=2, generator=seeded(0), output_type="pt", return_intermediates=True)
    assert {name: tuple(images.shape) for name, images in whole.intermediates.items()} == {
        "base": (1, 3, 8, 8), "upscale_1": (1, 3, 16, 16), "upscale_2": (1, 3, 32, 32)
    }  # fmt: skip
    assert torch.equal(whole.images, whole.intermediates["upscale_2"])
    first = pipe("star", num_inference_steps=2, generator=seeded(0), output_type="pt", stop_stage="base").images
    assert torch.equal(first, pipe.base("star", num_inference_steps=2, generator=seeded(0), output_type="pt").images)
    for side, stages in ((8, ["upscale_1", "upscale_2"]), (16, ["upscale_2"])):
        picture = small_picture(side)
        out = pipe("star", image=picture, num_inference_steps=2, generator=seeded(0), return_intermediates=True)
        assert list(out.intermediates) == stages and out.images[0].size == (32, 32)
    alone = pipe.upscale_2(picture, "star", num_inference_steps=2, generator=seeded(0), output_type="pt").images
    again = pipe("star", image=[picture], start_stage="upscale_2", num_inference_steps=2, generator=seeded(0),
                 output_type="pt", return_dict=False)  # fmt: skip
    assert len(again) == 1 and torch.equal(again[0], alone)
    two = pipe(["star", "circle"], image=[picture] * 2, num_images_per_prompt=2, num_inference_steps=1)
    assert len(two.images) == 4


def test_an_interrupt_ends_the_cascade():
    pipe, seen = tiny_cascade(3), []

    def stop(pipe, step, timestep, tensors):
        seen.append(pipe.stage)
        pipe._interrupt = pipe.stage == "upscale_1"

    assert draw(pipe, callback_on_step_end=stop).shape[-1] == 16
    assert seen[-1] == "upscale_1" and seen.count("upscale_1") == 1


def test_unconditional_stages_and_classes_of_some_stages():
    pipe = tiny_cascade(2, classes=False)
    run = {"num_inference_steps": 2, "output_type": "pt"}
    assert pipe(num_images_per_prompt=3, **run).images.shape == (3, 3, 16, 16)
    pipe.base = tiny_base()
    assert pipe(["star", 0], num_images_per_prompt=2, **run).images.shape == (4, 3, 16, 16)


@pytest.mark.parametrize(
    "name", ["DDIM", "DPMSolverMultistep", "EulerDiscrete", "SASolver", "UniPCMultistep", "Respaced"]
)
def test_any_sampler_in_any_stage(name):
    """Also of a network with a learned variance, which not all of them read; Euler keeps clean + sigma * noise."""
    pipe, sizes = tiny_cascade(2), {}
    own = pipe.base.scheduler.config
    kind = getattr(diffusers, f"{name}Scheduler", None) or getattr(diffusers_ext, f"{name}Scheduler")
    pipe.base.scheduler = TruncatedConditioningScheduler(kind.from_config(own))
    pipe.upscale_1.scheduler = kind.from_config(own)
    pipe.upscale_1.unet.register_forward_pre_hook(lambda module, inputs: sizes.update(low=inputs[3]))
    pipe.base.scheduler.set_timesteps(10)
    level = pipe.base.scheduler.valid_stop_levels()[2]
    images = draw(pipe, num_inference_steps=10, noise_level=level)
    assert bool(images.isfinite().all()) and 0.3 < float(sizes["low"].std()) < 5.0


def test_the_sampler_of_adm_runs_as_itself():
    pipe = tiny_base(scheduler=adm_scheduler("cosine", variance_type="learned_range"))
    images = pipe("star", num_inference_steps=3, generator=seeded(0), output_type="latent", return_dict=False)[0]
    scheduler, generator = adm_scheduler("cosine", variance_type="learned_range"), seeded(0)
    scheduler.set_timesteps(3)
    sample = torch.randn(1, 3, 8, 8, generator=generator[0])
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = pipe.unet(sample, t, torch.tensor([2])).sample
        sample = scheduler.step(output, t, sample, generator=generator).prev_sample
    torch.testing.assert_close(images, sample)


def test_a_sampler_that_guides_stops_as_well():
    pipe = tiny_cascade(2)
    plain = draw(pipe, guidance_scale=3.0)
    held = pipe.base.scheduler.scheduler
    pipe.base.scheduler = TruncatedConditioningScheduler(diffusers_ext.NormalizedCFGScheduler(held))
    normalised = draw(pipe, guidance_scale=3.0)
    assert bool(normalised.isfinite().all()) and not torch.equal(normalised, plain)
    pipe.base.scheduler = diffusers_ext.NormalizedCFGScheduler(TruncatedConditioningScheduler(held))
    assert torch.equal(draw(pipe, guidance_scale=3.0), normalised)
    pipe.base.scheduler = TruncatedConditioningScheduler(held)
    assert torch.equal(draw(pipe, guidance_scale=3.0), plain)


# --- a first stage of another kind


def ldm_cascade(task, classes=None, **changes):
    first = tiny_ldm.tiny_ldm(task)  # 16 x 16 pixels
    stage = tiny_upscale(2, classes=task == "class" if classes is None else classes, **changes)
    return quiet(CascadedDiffusionPipeline(base=first, upscale_1=stage))


@pytest.mark.parametrize("task", ["class", "text", "unconditional"])
def test_the_first_stage_may_be_any_pipeline_that_returns_images(task, tmp_path):
    pipe, seen = ldm_cascade(task), []
    condition = {"class": {"class_labels": ["star", "circle"]}, "text": {"prompt": ["a red circle", "a star"]}}
    given = condition.get(task, {"num_images_per_prompt": 2})
    run = {"num_inference_steps": 2, "output_type": "pt", **given}

    def look(pipe, step, timestep, tensors):
        seen.append((pipe.stage, list(tensors)))

    out = pipe(**run, generator=seeded(0, 1), callback_on_step_end=look, return_intermediates=True)
    assert {stage for stage, _ in seen} == {"base", "upscale_1"}
    assert out.images.shape == (2, 3, 32, 32)
    size = {} if task == "unconditional" else {"output_type": "pt"}
    count = {"batch_size": 2, "output_type": "pt"} if task == "unconditional" else given
    alone = pipe.base(**count, **size, height=16, width=16, num_inference_steps=2, generator=seeded(0, 1)).images
    torch.testing.assert_close(out.intermediates["base"], alone)
    pipe.save_pretrained(tmp_path)
    for stage_by_stage in (False, True):
        loaded = quiet(CascadedDiffusionPipeline.from_pretrained(tmp_path, stage_by_stage=stage_by_stage))
        torch.testing.assert_close(loaded(**run, generator=seeded(0, 1)).images, out.images, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=f"before upscale_1 is a {type(pipe.base).__name__}.*non_truncated"):
        pipe(**run, conditioning_mode="truncated")


def test_a_first_stage_of_another_kind_draws_as_many_as_the_others():
    pipe, run = ldm_cascade("class", classes=False), {"num_inference_steps": 1, "output_type": "pt"}
    for labels in (torch.tensor([2, 0]), numpy.array([2, 0]), ("star", "circle")):
        found = pipe(labels, generator=seeded(0, 1), **run).images
        assert torch.equal(found, pipe([2, 0], generator=seeded(0, 1), **run).images)
    pipe, labels = ldm_cascade("text", classes=True), ["star", "circle"]
    wanted = pipe(labels, ["a star"] * 2, generator=seeded(0, 1), **run).images
    assert torch.equal(pipe(labels, "a star", generator=seeded(0, 1), **run).images, wanted)
    assert len(pipe("star", ["a star", "a circle"], **run).images) == 2


def test_a_cascade_may_be_the_first_stage():
    pipe = quiet(CascadedDiffusionPipeline(base=tiny_cascade(2), upscale_1=tiny_upscale(2)))
    run = {"num_inference_steps": 2, "output_type": "pt", "return_intermediates": True}
    found = pipe(["star", "circle"], generator=seeded(0, 1), **run)
    alone = pipe.base(["star", "circle"], num_inference_steps=2, output_type="pt", generator=seeded(0, 1)).images
    torch.testing.assert_close(found.intermediates["base"], alone)
    assert found.images.shape == (2, 3, 32, 32)


def test_what_a_first_stage_of_another_kind_needs_is_refused_before_it_runs():
    options = {"class_labels": ["star", "circle"], "prompt": ["a", "b", "c"]}
    pipe = ldm_cascade("text", classes=True)
    refused(pipe, "`class_labels` holds 2 for 3 prompts; pass one for all", **options)
    refused(pipe, "`prompt` is missing: LDMTextPipeline, the first stage")
    pipe = ldm_cascade("class", classes=False)
    refused(pipe, "`class_labels` is missing: LDMClassConditionalPipeline, the first stage", class_labels=None)
    refused(pipe, "holds \\['image'\\]; allowed are", callback_on_step_end=print,
            callback_on_step_end_tensor_inputs=["image"])  # fmt: skip
    pipe.base = tiny_ldm.tiny_ldm("upscale")
    refused(pipe, "base is a LDMUpscalePipeline, which needs `image`: .*`image=...`", class_labels=None)


def test_the_first_stage_may_be_a_stock_pipeline(tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    stock = quiet(diffusers.DDPMPipeline(unet=unet.eval(), scheduler=diffusers.DDPMScheduler()))
    pipe = quiet(CascadedDiffusionPipeline.from_stages([stock, tiny_upscale(1, classes=False)]))
    run = {"num_inference_steps": 2, "num_images_per_prompt": 2, "output_type": "pt"}
    wanted = pipe(**run, generator=seeded(0, 1)).images
    assert wanted.shape == (2, 3, 16, 16)
    pipe.save_pretrained(tmp_path)
    loaded = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    torch.testing.assert_close(loaded(**run, generator=seeded(0, 1)).images, wanted)
    pipe.upscale_1 = tiny_upscale(2, classes=False)
    with pytest.raises(ValueError, match="base, a DDPMPipeline, made 2 images of 8x8 pixels; the next .* 16x16"):
        pipe(**run)


# --- stages in files


def live_networks():
    return [one for one in gc.get_objects() if isinstance(one, CascadedUNet) and not one.conv_in.weight.is_meta]


def test_stage_by_stage_no_more_than_one_is_in_memory(tmp_path):
    pipe = tiny_cascade(3)
    wanted = draw(pipe)
    pipe.save_pretrained(tmp_path)
    del pipe
    gc.collect()
    before, seen = len(live_networks()), {}
    pipe = quiet(CascadedDiffusionPipeline.from_pretrained(tmp_path, stage_by_stage=True))
    assert pipe.base is None and pipe.stage_names == ["base", "upscale_1", "upscale_2"]

    def look(pipe, step, timestep, tensors):
        seen[pipe.stage] = len(live_networks()) - before

    assert torch.equal(draw(pipe, callback_on_step_end=look), wanted)
    assert seen == {"base": 1, "upscale_1": 1, "upscale_2": 1} and len(live_networks()) == before
    pipe.load_stages("upscale_1")  # stays
    assert pipe.base is None and pipe.upscale_1.unet is not None
    assert torch.equal(draw(pipe), wanted)
    # what was never read is copied, and nothing else is left beside it
    (tmp_path / "base" / "checkpoint-1").mkdir()
    pipe.save_pretrained(tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy" / "base").iterdir()) == [
        "model_index.json", "scheduler", "unet"
    ]  # fmt: skip
    assert torch.equal(draw(quiet(CascadedDiffusionPipeline.from_pretrained(tmp_path / "copy"))), wanted)


def test_what_is_asked_of_all_stages_holds_for_those_that_are_read_later(tmp_path):
    tiny_cascade(2).save_pretrained(tmp_path)
    lazy = CascadedDiffusionPipeline.from_pretrained(tmp_path, stage_by_stage=True).to(torch.bfloat16).to("cpu")
    lazy.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    lazy.set_progress_bar_config(disable=True)
    assert draw(lazy, noise_level=0).dtype == torch.bfloat16 and lazy.base is None
    shared = CascadedDiffusionPipeline.from_pipe(lazy)  # of where its stages lie
    for pipe in (lazy, shared):
        pipe.load_stages("base")
        assert pipe.base.dtype == torch.bfloat16 and pipe.base.unet.conv_in._diffusers_hook.hooks
    assert lazy.base._progress_bar_config == {"disable": True}
    lazy.remove_all_hooks()
    lazy.load_stages()
    assert lazy.upscale_1.dtype == torch.bfloat16 and not hasattr(lazy.upscale_1.unet.conv_in, "_diffusers_hook")


def test_stages_that_are_offloaded_to_a_disk_have_files_of_their_own(tmp_path):
    pipe = tiny_cascade(3)
    wanted = draw(pipe)
    options = {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path)}
    pipe.enable_group_offload(torch.device("cpu"), **options)
    assert torch.equal(draw(pipe), wanted)


def test_variants_of_the_weights(tmp_path):
    """Of every stage: diffusers hands a pipeline within a pipeline only what its signature names."""
    pipe = tiny_cascade(2)
    pipe.save_pretrained(tmp_path, variant="v2", max_shard_size="10KB")
    files = [path.name for path in (tmp_path / "upscale_1" / "unet").glob("*.safetensors*")]
    assert len(files) > 2 and all(".v2" in name for name in files)
    for stage_by_stage in (False, True):
        loaded = CascadedDiffusionPipeline.from_pretrained(tmp_path, variant="v2", stage_by_stage=stage_by_stage)
        assert torch.equal(draw(quiet(loaded)), draw(pipe))
    assert torch.equal(draw(quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path, variant="v2"))), draw(pipe))
    with pytest.raises(ValueError, match="variant=v3"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path, variant="v3")


def test_a_stage_whose_weights_were_cut_short_is_found_before_another_runs(tmp_path):
    tiny_cascade(2).save_pretrained(tmp_path / "one")
    lazy = quiet(CascadedDiffusionPipeline.from_pretrained(tmp_path / "one", stage_by_stage=True))
    file = tmp_path / "one" / "upscale_1" / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    seen: list[int] = []
    for call in (
        lambda: lazy(0, num_inference_steps=2, callback_on_step_end=lambda *args: seen.append(1) or {}),
        lambda: lazy.save_pretrained(tmp_path / "two"),
    ):
        with pytest.raises(ValueError, match=r"upscale_1/unet/.*safetensors' is damaged or incomplete"):
            call()
    assert not seen and not (tmp_path / "two").exists()


def test_stages_whose_folders_are_gone(tmp_path):
    tiny_cascade(2).save_pretrained(tmp_path / "one")
    lazy = CascadedDiffusionPipeline.from_pretrained(tmp_path / "one", stage_by_stage=True)
    shutil.rmtree(tmp_path / "one" / "upscale_1")
    with pytest.raises(ValueError, match="one' names a stage upscale_1, but has no pipeline in a folder upscale_1"):
        CascadedDiffusionPipeline.from_pretrained(tmp_path / "one", stage_by_stage=True)
    given = CascadedDiffusionPipeline.from_pretrained(tmp_path / "one", upscale_1=tiny_upscale())
    assert draw(quiet(given)).shape[-1] == 16
    for call in (lambda: lazy("star"), lambda: lazy.save_pretrained(tmp_path / "two")):
        with pytest.raises(ValueError, match="upscale_1' holds no pipeline: a stage of a cascade is a folder"):
            call()
    assert not (tmp_path / "two").exists()


def test_stages_from_folders_of_their_own_and_in_place_of_saved_ones(tmp_path):
    pipe = tiny_cascade(3)
    wanted = draw(pipe)
    for name in pipe.stage_names:
        getattr(pipe, name).save_pretrained(tmp_path / name)
    folders = [tmp_path / "base", str(tmp_path / "upscale_1"), pipe.upscale_2]
    for stage_by_stage in (True, False):
        made = quiet(CascadedDiffusionPipeline.from_stages(folders, stage_by_stage=stage_by_stage))
        assert (made.base is None) == stage_by_stage and torch.equal(draw(made), wanted)
    pipe.save_pretrained(tmp_path / "all")
    index = json.loads((tmp_path / "all" / "model_index.json").read_text())
    assert index["base"] == ["diffusers_ext", "CascadedBasePipeline"] and index["upscale_3"] == [None, None]
    scheduler = json.loads((tmp_path / "all" / "base" / "model_index.json").read_text())["scheduler"]
    assert scheduler == ["diffusers_ext", "TruncatedConditioningScheduler"]
    other = tiny_base(unet={"seed": 5})
    loaded = quiet(CascadedDiffusionPipeline.from_pretrained(tmp_path / "all", base=other))
    assert loaded.base is other and not torch.equal(draw(loaded), wanted)
    for stage_by_stage in (True, False):
        options = {"upscale_1": str(tmp_path / "upscale_1"), "upscale_2": None, "stage_by_stage": stage_by_stage}
        loaded = quiet(CascadedDiffusionPipeline.from_pretrained(tmp_path / "all", **options))
        assert torch.equal(draw(loaded), draw(pipe, stop_stage="upscale_1"))
    shared = quiet(CascadedDiffusionPipeline.from_pipe(pipe))
    assert shared.base is pipe.base and torch.equal(draw(shared), wanted)
    half = CascadedDiffusionPipeline.from_pretrained(tmp_path / "all", dtype={"base": torch.bfloat16})
    assert (half.base.dtype, half.upscale_1.dtype) == (torch.bfloat16, torch.float32)
    for dtype in (torch.bfloat16, {"base": torch.bfloat16, "default": torch.bfloat16}):
        plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "all", dtype=dtype)
        assert plain.base.dtype == plain.upscale_1.dtype == torch.bfloat16
    lazy = CascadedDiffusionPipeline.from_pretrained(tmp_path / "all", stage_by_stage=True).to(torch.bfloat16)
    lazy.load_stages()
    assert lazy.upscale_2.dtype == lazy.dtype == torch.bfloat16


def test_a_stage_that_was_missing_is_saved_when_it_is_assigned(tmp_path):
    pipe = tiny_cascade(2)
    pipe.upscale_2 = tiny_upscale(2)
    pipe.save_pretrained(tmp_path)
    assert draw(quiet(CascadedDiffusionPipeline.from_pretrained(tmp_path))).shape[-1] == 32


def test_adapters_belong_to_a_stage(tmp_path):
    pipe = tiny_cascade(2)
    for call in (pipe.get_list_adapters, pipe.fuse_lora, pipe.unload_lora_weights):
        with pytest.raises(ValueError, match=r"a network a stage \(base, upscale_1\).*`pipe.base.load_lora_weights"):
            call()
    add_lora(pipe.upscale_1.unet, 2)
    with pytest.raises(ValueError, match="`unet` .* would not load back as it is"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_cascade_itself_has_no_network_and_no_scheduler():
    pipe = tiny_cascade(2)
    for name in ("unet", "scheduler"):
        with pytest.raises(ValueError, match=rf"has a {name} a stage \(base, upscale_1\).*`pipe.base.{name} = ...`"):
            setattr(pipe, name, getattr(pipe.base, name))


def test_a_stage_can_be_taken_out_whether_it_was_read_or_not(tmp_path):
    tiny_cascade(3).save_pretrained(tmp_path)
    for lazily in (True, False):
        pipe = CascadedDiffusionPipeline.from_pretrained(tmp_path, stage_by_stage=lazily)
        pipe.upscale_2 = None
        assert pipe.stage_names == ["base", "upscale_1"]
        pipe.save_pretrained(tmp_path / str(lazily))
        again = CascadedDiffusionPipeline.from_pretrained(tmp_path / str(lazily), stage_by_stage=True)
        assert again.stage_names == ["base", "upscale_1"]


def test_the_command_draws_with_it(tmp_path):
    tiny_cascade(2).save_pretrained(tmp_path)
    images, settings = drawing.draw(str(tmp_path), {"class_label": "star", "steps": 2, "num": 2}, seed=3)
    assert [image.size for image in images] == [(16, 16)] * 2 and settings["pipeline"] == "CascadedDiffusionPipeline"
    tiny_cascade(2, classes=False).save_pretrained(tmp_path / "plain")
    images, _ = drawing.draw(str(tmp_path / "plain"), {"steps": 2, "noise_level": 0.0})
    assert images[0].size == (16, 16)


# --- bad input


def refused(pipe, match, error=ValueError, **options):
    """Before any network runs."""
    runs = []
    for stage in (getattr(pipe, name) for name in pipe.stage_names):
        stage.unet.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(error, match=match):
        pipe(**{"class_labels": "star", "num_inference_steps": 2} | options)
    assert not runs


def test_stages_that_do_not_chain_are_named():
    pipe = quiet(CascadedDiffusionPipeline(base=tiny_base(), upscale_1=tiny_upscale(1), upscale_2=tiny_upscale(1)))
    refused(pipe, r"do not chain: upscale_2 takes images of 8x8 .*but upscale_1 makes 16x16")
    pipe = quiet(CascadedDiffusionPipeline(base=tiny_base(), upscale_1=tiny_upscale(2)))
    refused(pipe, r"do not chain: upscale_1 takes images of 16x16 .*but base makes 8x8")


def test_noise_for_a_stage_that_was_not_trained_with_it():
    options = {"augmentation": "blur", "default_noise_level": None, "conditioning_scheduler": None}
    pipe = tiny_cascade(2)
    pipe.upscale_1 = tiny_upscale(unet={"aug_cond_type": None}, **options)
    refused(pipe, "upscale_1: `noise_level` is 101, but this stage was not trained with n.*'blur'", noise_level=101)
    assert draw(pipe).shape[-1] == 16
    pipe.upscale_2 = tiny_upscale(2)
    each = "Or pass a list of `noise_level`, one for each of upscale_1, upscale_2.$"
    refused(pipe, f"upscale_1: .*not trained with noise.*{each}", noise_level=101)
    assert draw(pipe, noise_level=[0, 101]).shape[-1] == 32
    pipe = tiny_cascade(2)
    pipe.upscale_1 = tiny_upscale(conditioning_scheduler=None, default_noise_level=None)
    refused(pipe, "upscale_1: The pipeline was built without conditioning_scheduler", noise_level=101)
    pipe.upscale_1.conditioning_scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    refused(pipe, "upscale_1: `conditioning_scheduler` is a FlowMatchEulerDiscreteScheduler, which has no `alphas_cum")
    pipe.upscale_1.scheduler = None
    refused(pipe, "upscale_1: The pipeline was built without scheduler")


def test_a_stage_of_one_level_takes_no_other():
    fixed = {"unet": {"aug_cond_type": None}, "truncation_level": 301, "default_noise_level": None}
    pipe = tiny_cascade(2)
    pipe.upscale_1 = tiny_upscale(**fixed)
    wanted = draw(pipe, noise_level=301)
    assert torch.equal(draw(pipe), wanted)
    refused(pipe, "upscale_1: `noise_level` is 201, but this stage was trained at level 301 alone", noise_level=201)
    refused(pipe, "trained at level 301 alone", conditioning_mode="none")
    with pytest.raises(ValueError, match="trained at level 301 alone"):
        pipe.upscale_1(small_picture(), "star", noise_level=0)


def test_a_first_stage_that_was_trained_down_to_a_level_stops_there():
    pipe = tiny_cascade(2)
    pipe.base = tiny_base(min_timestep=301)
    assert torch.equal(draw(pipe, noise_level=402), draw(tiny_cascade(2), noise_level=402))
    message = "base: `stop_level` is {}, but the network of this stage was trained from timestep 301 on"
    refused(pipe, message.format(201), noise_level=201)
    refused(pipe, message.format(0), noise_level=402, conditioning_mode="non_truncated")
    refused(pipe, message.format(0), noise_level=0)
    alone = pipe.base("star", num_inference_steps=2, generator=seeded(0), output_type="latent").images
    same = tiny_base()("star", num_inference_steps=2, generator=seeded(0), output_type="latent", stop_level=301).images
    assert torch.equal(alone, same)
    run = {"num_inference_steps": 2, "output_type": "latent"}  # as the last stage of a run it ends as alone
    assert torch.equal(pipe("star", generator=seeded(0), stop_stage="base", **run).images, same)


def test_schedules_that_disagree():
    pipe = tiny_cascade(2)
    for other in (tiny_scheduler(num_train_timesteps=500), tiny_scheduler(beta_schedule="linear")):
        pipe.upscale_1 = tiny_upscale(conditioning_scheduler=other)
        refused(pipe, "upscale_1 was trained with images whose noise followed another schedule.*non_truncated")
        assert draw(pipe, conditioning_mode="non_truncated").shape[-1] == 16


def test_unknown_classes():
    pipe = tiny_cascade(2)
    refused(pipe, "base: `class_labels` is 'stars', .*did you mean 'star'", class_labels="stars")
    refused(pipe, "`class_labels` is 3: this model knows the classes 0 to 2", class_labels=3)
    refused(pipe, "`class_labels` is missing: this stage draws classes, .*circle", class_labels=None)
    refused(pipe, "`class_labels` is empty", class_labels=[])
    refused(pipe, "must be the name of a class or its number", TypeError, class_labels=1.5)
    refused(tiny_cascade(2, classes=False), "`class_labels` is 1, but none of the stages base", class_labels=1)
    with pytest.raises(ValueError, match="knows no classes"):
        tiny_base(classes=False)(1)


def test_a_number_that_means_another_class_in_another_stage():
    """Names lead to each stage's own numbers."""
    upscale = tiny_upscale(1, class_names=CLASSES[::-1])
    pipe = quiet(CascadedDiffusionPipeline(base=tiny_base(), upscale_1=upscale))
    options = {"num_inference_steps": 2, "output_type": "pt"}
    seen = []
    upscale.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2].tolist()))
    pipe(["circle", "star"], **options)
    assert seen[0] == [2, 0]
    with pytest.raises(ValueError, match="means 'circle' in base and 'star' in upscale_1: pass the name"):
        pipe(0, **options)
    pipe(1, **options)  # in the middle of both lists


def test_stops_off_the_grid():
    pipe = tiny_cascade(2)
    pipe.base.scheduler.scheduler = diffusers.DDIMScheduler.from_config(pipe.base.scheduler.config)
    pipe.base.scheduler.set_timesteps(2)
    (valid, _) = pipe.base.scheduler.valid_stop_levels()
    refused(
        pipe,
        rf"base: `stop_level` is 201, where DDIMScheduler does not .* at {valid}, 0.*non_truncated",
        noise_level=201,
    )
    assert draw(pipe, num_inference_steps=2, noise_level=valid).shape[-1] == 16
    pipe.base.scheduler.scheduler = diffusers.LCMScheduler.from_config(pipe.base.scheduler.config)
    refused(pipe, "base: LCMScheduler cannot stop at a level of noise", noise_level=201)


def test_missing_stages():
    pipe = quiet(CascadedDiffusionPipeline(base=tiny_base(), upscale_2=tiny_upscale(2)))
    refused(pipe, "built without upscale_1, but the run goes from 'base' to 'upscale_2'; it has base, upscale_2")
    assert draw(pipe, stop_stage="base").shape[-1] == 8
    refused(pipe, "`stop_stage` is 'upscale_3', .* without upscale_3; it has base, upscale_2", stop_stage="upscale_3")
    pipe = quiet(CascadedDiffusionPipeline(upscale_1=tiny_upscale()))
    refused(pipe, "built without base")
    assert pipe("star", image=small_picture(), num_inference_steps=1).images[0].size == (16, 16)
    with pytest.raises(ValueError, match="The cascade has no stages"):
        CascadedDiffusionPipeline()(1)


def test_pictures_of_the_wrong_size_and_places_to_start():
    pipe = tiny_cascade(3)
    wrong = "`image` is 12x12 pixels, the wrong size.*upscale_1 takes 8x8, upscale_2 takes 16x16"
    refused(pipe, wrong, image=small_picture(12))
    refused(pipe, "the wrong size for `start_stage`='upscale_2'", image=small_picture(8), start_stage="upscale_2")
    refused(pipe, "'upscale_1', but there is no `image` to start from", start_stage="upscale_1")
    refused(pipe, "'base', which takes no `image`", image=small_picture(8), start_stage="base")
    lacks = "`start_stage` is 'upscale_3', but .* without upscale_3; it has base, upscale_1, upscale_2. Name one"
    refused(pipe, lacks, image=small_picture(8), start_stage="upscale_3", stop_stage="upscale_3")
    refused(
        pipe,
        "`stop_stage` is 'upscale_1', which comes before 'upscale_2'",
        image=small_picture(16),
        stop_stage="upscale_1",
    )
    refused(pipe, "`start_stage` is 'sr'; allowed are 'base', 'upscale_1', 'upscale_2' or None", start_stage="sr")
    with pytest.raises(ValueError, match="`image` is 40x40 pixels: this stage makes images of 16x16"):
        tiny_upscale(low_res_size=None)(small_picture(40), "star")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"num_inference_steps": [2, 2]},
            ValueError,
            "`num_inference_steps` holds 2: pass .* list of 3.*upscale_2",
        ),
        ({"noise_level": [1, 2, 3]}, ValueError, "`noise_level` holds 3: .* list of 2, one for each of upscale_1"),
        ({"num_inference_steps": 1001}, ValueError, "base: `num_inference_steps` must be at most 1000"),
        ({"num_inference_steps": [2, 0, 2]}, ValueError, "upscale_1: `num_inference_steps` must be at least 1"),
        ({"guidance_scale": [1, 1, -1]}, ValueError, "upscale_2: `guidance_scale` must be finite"),
        ({"noise_level": -1}, ValueError, "upscale_1: `noise_level` is -1: it must lie between 0"),
        ({"noise_level": 1001}, ValueError, "upscale_1: `noise_level` is 1001: it must lie between 0 .* 1000"),
        ({"noise_level": float("nan")}, ValueError, "upscale_1: `noise_level` is nan: .* between 0 .clean. and 1000"),
        ({"num_inference_steps": 2.5}, TypeError, "base: `num_inference_steps` must be an integer, received 2.5.$"),
        ({"noise_level": 250.5}, ValueError, "`stop_level` is 250.5, .* at any whole level up to 501.*non_truncated"),
        ({"noise_level": "much"}, TypeError, "upscale_1: `noise_level` must be a number"),
        (
            {"noise_level": 5, "conditioning_mode": "none"},
            ValueError,
            '`noise_level` of upscale_1 is 5, .* "none"',
        ),
        ({"conditioning_mode": "both"}, ValueError, "`conditioning_mode` is 'both'; allowed are 'truncated'"),
        ({"prompt": "a star"}, ValueError, "`prompt` is 'a star', but none of the stages base, upscale_1, upscale_2"),
        ({"negative_prompt": "a star"}, ValueError, "`negative_prompt` is 'a star', but none of the stages base"),
        ({"eta": 2}, ValueError, r"`eta` must lie in \[0, 1\]"),
        ({"output_type": "jpg"}, ValueError, "`output_type` must be one of"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, ValueError, "base: `latents` must have shape"),
        ({"generator": [torch.Generator()] * 2}, ValueError, "`generator` is a list of 2, but 1 images"),
    ],
)
def test_other_bad_arguments(options, error, match):
    refused(tiny_cascade(3), match, error, **options)


def test_guidance_needs_a_null_class():
    pipe = tiny_cascade(2)
    pipe.upscale_1 = tiny_upscale(unet={"num_class_embeds": 3, "null_class": None})
    refused(pipe, "upscale_1: `guidance_scale` is 2.0, but .*without a null class", guidance_scale=2.0)
    refused(pipe, "Or pass a list of `guidance_scale`, one for each of base, upscale_1.$", guidance_scale=2.0)
    assert draw(pipe, guidance_scale=[2.0, None]).shape[-1] == 16

    def turn_on(pipe, step, timestep, tensors):
        pipe._guidance_scale = 2.0

    with pytest.raises(ValueError, match="`guidance_scale` is 2.0, but"):
        draw(pipe, callback_on_step_end=turn_on)


def test_a_learned_variance_that_no_network_predicts():
    message = "`scheduler` reads a learned variance .*, but `unet` predicts none: .*'fixed_small'"
    pipe = quiet(CascadedDiffusionPipeline(base=tiny_base(unet={"out_channels": 3}), upscale_1=tiny_upscale()))
    refused(pipe, message)
    pipe.base.scheduler = tiny_scheduler(variance_type="fixed_small")
    assert draw(pipe).shape[-1] == 16
    pipe.base.unet = tiny_unet(0, out_channels=4)
    refused(pipe, "`unet` predicts 4 channels for images of 3: expected are 3 for the noise, or 6")


def test_stages_of_the_wrong_kind():
    for options, match in [
        ({"base": tiny_upscale()}, "`base` is a CascadedUpscalePipeline: it must be a pipeline that draws images"),
        ({"base": tiny_unet(0)}, "`base` is a CascadedUNet"),
        ({"base": tiny_base(), "upscale_1": tiny_base()}, "`upscale_1` is a CascadedBasePipeline: it must be a Casc"),
        ({"upscale_1": "user/upscale"}, "`upscale_1` is a str: it must be a CascadedUpscalePipeline"),
    ]:
        with pytest.raises(TypeError, match=match):
            CascadedDiffusionPipeline(**options)
    with pytest.raises(ValueError, match="must be a list of 1 to 4 pipelines, folders or names.*received list of 5"):
        CascadedDiffusionPipeline.from_stages([tiny_base()] * 5)
    with pytest.raises(ValueError, match="`hub_stages` is 'middle'; allowed are 'base'"):
        CascadedDiffusionPipeline(hub_stages={"middle": "user/repo"})
    with pytest.raises(ValueError, match="takes a low-resolution image .*belongs into a CascadedUpscalePipeline"):
        tiny_base(unet={"low_res_channels": 3})("star")
    with pytest.raises(ValueError, match="takes no low-resolution image .*belongs into a CascadedBasePipeline"):
        tiny_upscale(unet={"low_res_channels": 0, "aug_cond_type": None})(small_picture(), "star")
    with pytest.raises(ValueError, match="`unet` predicts 4 channels for images of 3"):
        tiny_base(unet={"out_channels": 4})("star")
    with pytest.raises(ValueError, match="`augmentation` is 'noise'; allowed are 'none', 'blur', 'truncated'"):
        tiny_upscale(augmentation="noise")


def test_stages_of_the_wrong_kind_are_refused_before_any_is_read(tmp_path):
    tiny_cascade(2).save_pretrained(tmp_path)
    for places, match in [
        (("upscale_1", "base"), "`base` is a CascadedUpscalePipeline: it must be a pipeline that draws images"),
        (("base", "base"), "`upscale_1` is a CascadedBasePipeline: it must be a CascadedUpscalePipeline"),
    ]:
        pipe = CascadedDiffusionPipeline.from_stages([tmp_path / place for place in places], stage_by_stage=True)
        with pytest.raises(TypeError, match=match):
            pipe("star")


def test_a_folder_that_is_no_stage(tmp_path):
    for name in (tmp_path, tmp_path / "nothing", "runs/nothing", "a/b/c"):
        with pytest.raises(ValueError, match="holds no pipeline: a stage of a cascade is a folder with a model_index"):
            CascadedDiffusionPipeline.from_stages([name])
    pipe = CascadedDiffusionPipeline.from_stages([tmp_path], stage_by_stage=True)
    with pytest.raises(ValueError, match="holds no pipeline: a stage of a cascade is a folder with a model_index"):
        pipe("star")
