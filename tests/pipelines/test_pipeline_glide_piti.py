"""GLIDE and PITI: two stages, inpainting, what conditions become, what is refused. Recorded numbers: tests/parity."""

import math

import diffusers
import pytest
import torch
from PIL import Image
from pipelines.tiny_glide import LABELS, PALETTE, SIDE, tiny_condition, tiny_decoder, tiny_glide, tiny_piti
from pipelines.tiny_ldm import tiny_mask, tiny_picture

from diffusers_ext import NormalizedCFGScheduler, PITIPipeline, RespacedScheduler
from diffusers_ext.conditions.geometry import geometry_condition
from diffusers_ext.conditions.sketches import distance_map
from diffusers_ext.pipelines.piti.pipeline_piti import truncate_to_8_bits


def run(pipe, seed=0, **options):
    call = {"num_inference_steps": 3, "output_type": "pt"} | options
    if pipe.upscales:
        call = {"upscale_num_inference_steps": 2} | call
    return pipe(generator=torch.Generator().manual_seed(seed), **call).images


def test_both_stages_report_their_steps():
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((pipe.stage, step, pipe.num_timesteps, pipe.guidance_scale, tuple(tensors["latents"].shape)))

    images = run(tiny_glide(), prompt=["a red circle", "a star"], callback_on_step_end=watch, guidance_scale=2.0)
    assert images.shape == (2, 3, 16, 16)
    assert seen == [("base", k, 3, 2.0, (2, 3, 8, 8)) for k in range(3)] + [
        ("upscale", k, 2, 1.0, (2, 3, 16, 16)) for k in range(2)
    ]


def test_an_interrupted_run_ends_with_what_its_stage_has():
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True

    assert run(tiny_glide(), prompt="a star", callback_on_step_end=stop).shape == (1, 3, 8, 8)


def test_respacings_and_the_checkpoints_own_steps():
    pipe, seen = tiny_glide(), []
    pipe.scheduler = RespacedScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", timestep_respacing="4"
    )
    pipe.upscale_scheduler = RespacedScheduler(
        variance_type="learned_range", sampler="ddim", timestep_respacing="2,1,1"
    )
    pipe(
        "a star",
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=lambda pipe, step, t, tensors: seen.append((pipe.stage, int(t))),
    )
    assert len([t for stage, t in seen if stage == "base"]) == 4
    assert [t for stage, t in seen if stage == "upscale"] == [667, 334, 333, 0]
    with pytest.raises(ValueError, match="`timestep_respacing` is 'often'"):
        pipe("a star", num_inference_steps="often")


def test_a_text_that_is_cut_off_is_quoted_whatever_ran_before(caplog):
    pipe = tiny_glide()
    for _ in range(2):
        caplog.clear()
        pipe.encode_prompt("a red circle and a blue star on the left of a small green ring")
        assert [record.message.partition("cut off")[1] for record in caplog.records] == ["cut off"]
        run(pipe, prompt="a star")  # both stages


def test_a_solver_made_of_a_respaced_config_runs_the_usual_steps_and_a_plain_one_takes_respacings():
    pipe, seen = tiny_glide(upscale=False), []
    respaced = RespacedScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", timestep_respacing="4"
    )
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(respaced.config)

    def count(pipe, step, t, tensors):
        seen.append(int(t))

    call = {"generator": torch.Generator().manual_seed(0), "callback_on_step_end": count, "output_type": "pt"}
    assert pipe("a star", **call).images.isfinite().all() and len(seen) == 100
    pipe.scheduler = RespacedScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    seen.clear()
    pipe("a star", num_inference_steps="2,1,1", **call)
    assert len(seen) == 4


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_kept_part_of_an_image_stays(kind):
    """Whatever the network predicts."""
    pipe = tiny_glide(inpaint=True)
    for name in ("scheduler", "upscale_scheduler"):
        scheduler = getattr(pipe, name)
        setattr(pipe, name, type(scheduler).from_config(scheduler.config, prediction_type=kind))
    picture = tiny_picture(1)
    images = run(pipe, prompt="a star", image=picture, mask_image=tiny_mask())
    known = torch.tensor(list(picture.tobytes())).view(16, 16, 3).permute(2, 0, 1) / 255
    torch.testing.assert_close(images[0, :, :, :8], known[:, :, :8], atol=0.02, rtol=0)
    assert (images[0, :, :, 8:] - known[:, :, 8:]).abs().mean() > 0.1


def test_encoders_run_once_a_call():
    pipe, calls = tiny_piti(), []
    for encoder in (pipe.encoder, pipe.upscale_encoder):
        encoder.register_forward_hook(lambda module, *_: calls.append(module))
    run(pipe, **tiny_condition(), guidance_scale=2.0)
    assert calls == [pipe.encoder, pipe.encoder, pipe.upscale_encoder]  # condition and null, then the upsampler's


def test_label_ids_and_their_colours_are_one_condition():
    pipe, labels = tiny_piti(), tiny_condition()["label_map"]
    colours = Image.fromarray(torch.tensor(PALETTE, dtype=torch.uint8)[labels].numpy())
    assert torch.equal(pipe.read_conditions(label_map=labels), pipe.read_conditions(label_map=colours))
    expected = torch.tensor(PALETTE)[labels].permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(pipe.read_conditions(label_map=labels), expected)


def test_geometry_in_lists_and_arrays_is_the_same():
    pipe, given = tiny_piti("geometry"), tiny_condition("geometry")
    found = pipe.read_conditions(**given)
    arrays = {"normals": given["normals"].permute(1, 2, 0).numpy(), "depth": given["depth"][..., None].numpy()}
    assert torch.equal(pipe.read_conditions(**arrays), found)
    listed = {name: [values, values] for name, values in given.items()}
    assert torch.equal(pipe.read_conditions(**listed), found.expand(2, -1, -1, -1))


def test_sketches_become_distance_maps_and_none_is_the_null_condition(caplog):
    pipe, sketch = tiny_piti("sketch"), tiny_condition("sketch")["sketch"]
    found = pipe.read_conditions(sketch=sketch)
    torch.testing.assert_close(found[0], distance_map(sketch[None] > 0).float() / 127.5 - 1)
    assert not caplog.records
    empty = pipe.read_conditions(sketch=Image.new("L", (SIDE, SIDE), 200))  # grey is no line
    assert torch.equal(empty, torch.ones_like(empty))
    assert "`sketch` has no lines" in caplog.text and "null condition" in caplog.text


def test_geometry_has_normals_then_depth_in_colours():
    given = tiny_condition("geometry")
    depth = given["depth"].clone()
    depth[0] = 0  # unknown
    found = geometry_condition(given["normals"][None], depth[None])
    assert found.shape == (1, 6, SIDE, SIDE) and found.abs().max() <= 1
    assert (found[0, 3:, 0] == -1).all()
    near, far = (found[0, 3:].flatten(1)[:, depth.flatten() == d].mean(1) for d in (depth[1:].min(), depth.max()))
    assert near[2] > near[0] and far[0] > far[2]  # blue is near, red is far


def test_normalised_guidance_by_the_scheduler():
    plain, pipe = tiny_piti(upscale=False), tiny_piti(upscale=False)
    pipe.scheduler = NormalizedCFGScheduler(pipe.scheduler)
    condition = tiny_condition()
    assert torch.equal(run(pipe, **condition, guidance_scale=1.0), run(plain, **condition, guidance_scale=1.0))
    normalised = run(pipe, **condition, guidance_scale=8.0, output_type="latent")
    guided = run(plain, **condition, guidance_scale=8.0, output_type="latent")
    assert not torch.equal(normalised, guided)


def test_saves_and_loads_with_options(tmp_path):
    pipe = tiny_piti()
    pipe.scheduler = NormalizedCFGScheduler(pipe.scheduler, guidance_scale=2.0)
    pipe.save_pretrained(tmp_path)
    loaded = PITIPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.label_palette.tolist() == PALETTE and type(loaded.scheduler) is NormalizedCFGScheduler
    torch.testing.assert_close(run(loaded, **tiny_condition()), run(pipe, **tiny_condition()))
    assert PITIPipeline(**pipe.components | {"upscale_unet": None}).upscales is False


def test_eight_bits_are_cut_not_rounded():
    grey = torch.tensor([-1.2, -1.0, 0.0, 0.0039, 0.999, 1.0])
    assert ((truncate_to_8_bits(grey) + 1) * 127.5).round().tolist() == [0, 0, 127, 127, 254, 255]


GEOMETRY = tiny_condition("geometry")


@pytest.mark.parametrize(
    "build, call, error, message",
    [
        (tiny_piti, {}, ValueError, "draws from `label_map`; received nothing"),
        (tiny_piti, tiny_condition("sketch"), ValueError, "draws from `label_map`; received sketch"),
        (
            tiny_piti,
            {"label_map": torch.tensor([[0, LABELS + 3]])},
            ValueError,
            rf"`label_map` .*{LABELS + 3}.*0 to {LABELS - 1}",
        ),
        (
            lambda: tiny_piti("geometry"),
            GEOMETRY | {"depth": torch.full((SIDE, SIDE), math.nan)},
            ValueError,
            f"`depth` holds {SIDE * SIDE} values that are not finite",
        ),
        (lambda: tiny_piti("geometry"), GEOMETRY | {"depth": -GEOMETRY["depth"]}, ValueError, "`depth` goes down to"),
        (
            lambda: tiny_piti("geometry"),
            GEOMETRY | {"depth": GEOMETRY["depth"][:8]},
            ValueError,
            r"`normals` has shape .* and `depth` \(1, 8, 32\)",
        ),
        (lambda: tiny_piti("geometry"), GEOMETRY | {"normals": 3 * GEOMETRY["normals"]}, ValueError, "unit vectors"),
        (lambda: tiny_piti("geometry"), GEOMETRY | {"depth": tiny_picture()}, TypeError, "`depth` is Image"),
        (
            lambda: tiny_piti("geometry"),
            GEOMETRY | {"depth": torch.ones(SIDE, SIDE, dtype=torch.int64)},
            TypeError,
            "`depth` is torch.int64",
        ),
        (
            lambda: tiny_piti("geometry"),
            {"normals": torch.zeros(0, 3, SIDE, SIDE), "depth": torch.zeros(0, SIDE, SIDE)},
            ValueError,
            "`normals` is empty",
        ),
        (
            lambda: tiny_piti("geometry"),
            GEOMETRY | {"depth": [GEOMETRY["depth"], GEOMETRY["depth"][:8]]},
            ValueError,
            r"`depth` holds maps of different shapes: \(32, 32\), \(8, 32\)",
        ),
        (tiny_piti, {"label_map": Image.new("RGBA", (SIDE, SIDE))}, ValueError, "`label_map` is .* of mode 'RGBA'"),
        (tiny_piti, {"label_map": Image.new("RGB", (9, 9), (9, 99, 9))}, ValueError, "`label_map` has the colour"),
        (tiny_piti, tiny_condition() | {"upscale_temperature": math.nan}, ValueError, "`upscale_temperature` is nan"),
        (tiny_glide, {"prompt": "a", "upscale_temperature": "hot"}, TypeError, "`upscale_temperature` must be a num"),
        (
            tiny_glide,
            {"prompt": "a", "upscale_latents": torch.zeros(1, 3, 8, 8)},
            ValueError,
            "`upscale_latents` must",
        ),
        (
            tiny_glide,
            {"prompt": "a", "upscale_num_inference_steps": 1001},
            ValueError,
            "`upscale_num_inference_steps` must be at most 1000",
        ),
        (tiny_glide, {"prompt": "a", "image": tiny_picture()}, ValueError, "draws whole images"),
        (lambda: tiny_glide(inpaint=True), {"prompt": "a"}, ValueError, "`image` is None, .* fills parts"),
        (
            lambda: tiny_glide(upscale=False),
            {"prompt": "a", "upscale_num_inference_steps": 2},
            ValueError,
            "the pipeline has no `upscale_unet`",
        ),
        (tiny_glide, {"prompt": "a", "latents": torch.zeros(1, 3, 4, 4)}, ValueError, r"`latents` must have shape"),
        (tiny_glide, {"prompt": ["a", "b"], "negative_prompt": ["c"] * 3}, ValueError, "`negative_prompt` holds 3"),
    ],
)
def test_bad_input_is_refused_before_a_network_runs(build, call, error, message):
    pipe = build()
    for network in (pipe.unet, getattr(pipe, "encoder", None), getattr(pipe, "text_encoder", None)):
        if network is not None:
            network.register_forward_pre_hook(lambda *_: pytest.fail("a network ran"))
    with pytest.raises(error, match=f"(?s){message}"):
        pipe(**call, num_inference_steps=2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"upscale_unet": tiny_decoder(3, 16)}, "`upscale_unet` takes 3 channels"),
        ({"unet": tiny_decoder(6)}, "`unet` takes 6 channels"),
        ({"unet": tiny_decoder(sample_size=None)}, "`unet.config.sample_size` must be one side .*received None"),
        ({"condition_type": "sketch"}, "`encoder` takes 3 channels, but a condition of type 'sketch' has 1"),
        ({"upscale_encoder": None}, "without upscale_encoder"),
        ({"upscale_scheduler": None}, "without upscale_scheduler"),
        (
            {"upscale_unet": tiny_decoder(6, 16, out_channels=3)},
            "`upscale_scheduler` reads a learned variance .*, but `upscale_unet` predicts none",
        ),
    ],
)
def test_components_that_do_not_fit_are_named(change, message):
    pipe = tiny_piti()
    pipe = PITIPipeline(**pipe.components | {"label_palette": PALETTE} | change)
    with pytest.raises(ValueError, match=message):
        pipe(**tiny_condition())
    with pytest.raises(ValueError, match="`condition_type` is 'text'"):
        PITIPipeline(**pipe.components, condition_type="text")
    with pytest.raises(ValueError, match=r"colour \(0, 0, 0\) for labels 0 and 4"):
        PITIPipeline(**pipe.components, label_palette=[*PALETTE, [0, 0, 0]])
    for wrong in ([], "coco182", [[0, 0, 0], [0, 0]], [[0, 0, 256]], [[0.5, 0, 0]]):
        with pytest.raises(ValueError, match="`label_palette` must be a list of .red, green, blue."):
            PITIPipeline(**pipe.components, label_palette=wrong)


def test_the_usual_palette_knows_what_coco_leaves_unlabelled():
    pipe = PITIPipeline(**tiny_piti().components)
    found = pipe.read_conditions(label_map=torch.full((SIDE, SIDE), 182))
    assert (found == -1).all()  # black


def saved_prior(folder):
    prior = tiny_glide(upscale=False)
    prior.save_pretrained(folder)
    return prior


@pytest.mark.parametrize("condition_type", ["label_map", "sketch", "geometry"])
def test_conditions_share_a_prior_as_matrices_beside_their_encoder(condition_type, tmp_path):
    """At full rank the change of the weights is whole; biases and norms stay the prior's."""
    prior, pipe = saved_prior(tmp_path / "prior"), tiny_piti(condition_type)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            if parameter.ndim > 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    pipe.save_adapter(tmp_path / "shared" / "one", tmp_path / "prior", rank=300)
    assert not (tmp_path / "shared" / "one" / "unet").exists()
    loaded = PITIPipeline.from_prior(tmp_path / "prior", tmp_path / "shared", subfolder="one")
    loaded.set_progress_bar_config(disable=True)
    given = tiny_condition(condition_type)
    assert loaded.config["condition_type"] == condition_type and not loaded.get_list_adapters()
    torch.testing.assert_close(run(loaded, **given), run(pipe, **given), rtol=1e-3, atol=1e-3)
    for before, after in zip(prior.unet.parameters(), loaded.unet.parameters(), strict=True):
        assert (before.ndim > 1) != torch.equal(before, after)
    loaded.save_pretrained(tmp_path / "whole")  # a pipeline like any other
    again = PITIPipeline.from_pretrained(tmp_path / "whole")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(run(again, **given), run(loaded, **given))


def test_a_small_rank_keeps_what_changed_most(tmp_path):
    saved_prior(tmp_path / "prior")
    pipe = tiny_piti(upscale=False)
    weight = pipe.unet.conv_in.weight
    generator = torch.Generator().manual_seed(0)
    columns, rows = ((2, 16, 1, 1, 1), (2, *weight.shape[1:]))
    strong, weak = torch.randn(columns, generator=generator) * torch.randn(rows, generator=generator)[:, None]
    weak *= 0.01
    with torch.no_grad():
        weight += strong + weak
    pipe.to(torch.float16).save_adapter(tmp_path / "one", tmp_path / "prior", rank=1)
    matrices = PITIPipeline.lora_state_dict(tmp_path / "one")
    assert {value.dtype for value in matrices.values()} == {torch.float16}
    change = (matrices["conv_in.lora_B.weight"].flatten(1) @ matrices["conv_in.lora_A.weight"].flatten(1)).float()
    assert (change - strong.flatten(1)).norm() < 0.05 * strong.norm()
    loaded = PITIPipeline.from_prior(tmp_path / "prior", tmp_path / "one", dtype=torch.float16)
    assert loaded.unet.dtype == loaded.encoder.dtype == torch.float16


def test_adapters_of_other_networks_and_ranks_are_refused(tmp_path):
    saved_prior(tmp_path / "prior")
    pipe = tiny_piti(upscale=False)
    with pytest.raises(ValueError, match="`rank` must be at least 1, received 0"):
        pipe.save_adapter(tmp_path / "one", tmp_path / "prior", rank=0)
    tiny_glide(inpaint=True, upscale=False).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"`base` has no layer conv_in with a weight \(16, 3, 3, 3\)"):
        pipe.save_adapter(tmp_path / "one", tmp_path / "other", rank=2)
    broken = tiny_piti(upscale=False)
    torch.nn.init.constant_(broken.unet.conv_in.weight, torch.nan)
    with pytest.raises(ValueError, match=r"`unet` .* has weights that are not finite \(conv_in.weight\)"):
        broken.save_adapter(tmp_path / "one", tmp_path / "prior", rank=2)
    broken.unet.save_pretrained(tmp_path / "broken" / "unet")
    with pytest.raises(ValueError, match="layer conv_in are not finite"):
        pipe.save_adapter(tmp_path / "one", tmp_path / "broken", rank=2)
    assert not (tmp_path / "one").exists()  # nothing half
    pipe.save_adapter(tmp_path / "one", tmp_path / "prior", rank=2)
    with pytest.raises(ValueError, match="no U-Net: load it with `PITIPipeline.from_prior"):
        PITIPipeline.from_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="no U-Net: load it with `PITIPipeline.from_prior"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "one")
    whole = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "one", unet=pipe.unet)
    assert type(whole) is PITIPipeline and whole.unet is pipe.unet
    with pytest.raises(ValueError, match="matrices of another network"):
        PITIPipeline.from_prior(tmp_path / "other", tmp_path / "one")
