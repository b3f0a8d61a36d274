"""What every public pipeline owes to its users, checked over the table of `contract.py`: one section a promise."""

import copy
import inspect
import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import accelerate
import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    PipelineCallback,
    SD3CFGCutoffCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
)
from PIL import Image
from pipelines.contract import (
    CASES,
    GUIDED_CASES,
    ONE_EACH,
    ONE_NETWORK,
    Result,
    assert_alike,
    equal,
    networks,
    owner_of,
    sample,
)
from pipelines.tiny_ldm import tiny_mask, tiny_unet
from pipelines.tiny_paella import quiet, tiny_picture
from safetensors.torch import load_file
from torch.nn.utils import prune

import diffusers_ext
from diffusers_ext import NormalizedCFGScheduler
from diffusers_ext.guidance import guide
from diffusers_ext.models.encoders_ldm import LDMSpatialRescaler
from diffusers_ext.training_utils.lora import add_lora, save_lora

ALL = pytest.mark.parametrize("name", CASES)


def test_every_public_pipeline_is_in_the_table():
    public = {
        name
        for name in diffusers_ext.__all__
        if isinstance(getattr(diffusers_ext, name), type)
        and issubclass(getattr(diffusers_ext, name), diffusers.DiffusionPipeline)
    }
    assert {case.pipeline for case in CASES.values()} == public


@ALL
def test_same_seed_same_result(name):
    assert equal(sample(CASES[name].build(), name), sample(CASES[name].build(), name))


# --- wrapped components: torch.compile, DDP, unknown wrappers


WRAPPERS = {
    "compile": torch.compile,
    "parallel": lambda part: torch.compile(torch.nn.DataParallel(torch.compile(part))),
}


@pytest.fixture
def nothing_is_compiled():
    """Compiled networks run as they are written: what is tested is how they are called, not the compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@ALL
def test_wrapped_components_change_no_result(name, wrapper):
    pipe = CASES[name].build()
    expected = sample(pipe, name)
    for part, network in networks(pipe).items():
        setattr(*owner_of(pipe, part), WRAPPERS[wrapper](network))
    assert_alike(sample(pipe, name), expected)


@pytest.mark.usefixtures("nothing_is_compiled")
@pytest.mark.parametrize("name", ONE_EACH)
def test_pipeline_with_wrapped_components_is_saved_like_the_bare_one(name, tmp_path):
    pipe = CASES[name].build()
    expected = sample(pipe, name)
    for part, network in networks(pipe).items():
        owner, name_there = owner_of(pipe, part)
        owner.register_modules(**{name_there: WRAPPERS["parallel"](network)})
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert_alike(sample(loaded, name), expected)


class Shell(torch.nn.Module):
    """A wrapper that nobody knows."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("name", ONE_EACH)
def test_unknown_wrapper_is_refused_by_name(name):
    pipe = CASES[name].build()
    for part, network in networks(pipe).items():
        owner, part = owner_of(pipe, part)
        with pytest.raises(TypeError, match=rf"`{part}` is a Shell, which has no `config`.*Assign the network"):
            setattr(owner, part, Shell(network))
        with pytest.raises(TypeError, match=rf"`{part}` is a Shell"):
            owner.register_modules(**{part: Shell(network)})
        assert getattr(owner, part) is network


class Transparent(Shell):
    """A wrapper that hands on everything, as peft's do."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@pytest.mark.parametrize("name", ONE_EACH)
def test_wrapper_that_shows_a_config_is_refused_with_the_network_that_it_holds(name):
    pipe = CASES[name].build()
    for part, network in networks(pipe).items():
        owner, part = owner_of(pipe, part)
        with pytest.raises(ValueError, match=rf"`{part}` is a Transparent around .*assign the .*wrapper's `inner`"):
            setattr(owner, part, Transparent(network))
        assert getattr(owner, part) is network


def test_peft_model_is_refused_with_the_network_that_it_holds():
    pipe = CASES["ldm-text"].build()
    adapted = peft.get_peft_model(pipe.unet, peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="`unet` is a PeftModel around .*assign the .*wrapper's `base_model.model`"):
        pipe.unet = adapted
    pipe.unet = adapted.base_model.model
    sample(pipe, "ldm-text")


# --- offloading, group offloading, layerwise casting


@ALL
def test_sequential_offload_changes_no_result(name):
    """As `enable_sequential_cpu_offload` does, which itself wants an accelerator: weights lie on the meta device."""
    pipe = CASES[name].build()
    expected = sample(pipe, name)
    for network in networks(pipe).values():
        accelerate.cpu_offload(network, torch.device("cpu"), offload_buffers=len(network._parameters) > 0)
    assert all(next(network.parameters()).is_meta for part, network in networks(pipe).items() if "unet" in part)
    assert_alike(sample(pipe, name), expected)


@pytest.fixture
def poison():
    """Memory that was given back holds not-a-number: what is offloaded to a disk and read all the same shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@ALL
def test_group_offload_changes_no_result(name, level, tmp_path):
    pipe = CASES[name].build()
    expected = sample(pipe, name)
    # diffusers' VQModel declares that it cannot, as its own pipelines find
    unfit = [part for part, network in networks(pipe).items() if not getattr(network, "_supports_group_offloading", 1)]
    assert all(type(networks(pipe)[part]) is diffusers.VQModel for part in unfit)
    for part in networks(pipe):  # a folder each: files are named after the places in a network
        owner, name_there = owner_of(pipe, part)
        others = [other for other in networks(owner) if other != name_there]
        if part not in unfit:
            owner.enable_group_offload(
                onload_device=torch.device("cpu"),
                offload_type=level,
                num_blocks_per_group=1,
                offload_to_disk_path=str(tmp_path / part),
                exclude_modules=others,
            )
    unets = [network for part, network in networks(pipe).items() if "unet" in part]
    assert all(any(weight.isnan().any() for weight in unet.parameters()) for unet in unets)
    assert_alike(sample(pipe, name), expected)


@pytest.mark.parametrize("name", ONE_EACH)
def test_group_offload_of_a_whole_pipeline_works_or_names_the_part(name):
    pipe = CASES[name].build()
    expected = sample(pipe, name)
    options = {"onload_device": torch.device("cpu"), "offload_type": "leaf_level"}
    if any(type(network) is diffusers.VQModel for network in networks(pipe).values()):
        with pytest.raises(ValueError, match="VQModel.* does not support group offloading"):
            pipe.enable_group_offload(**options)
        pipe, options["exclude_modules"] = CASES[name].build(), "vqvae"
    pipe.enable_group_offload(**options)
    assert_alike(sample(pipe, name), expected)


class Parked(accelerate.hooks.ModelHook):
    """Model offloading without an accelerator: of all networks only the one that was called last has its weights."""

    def __init__(self, parked: list):
        self.parked, self.weights = parked, None

    def init_hook(self, module):
        self.module = module
        self.park()
        return module

    def park(self):
        self.weights = [weight.data for weight in self.module.parameters()]
        for weight in self.module.parameters():
            weight.data = torch.full_like(weight.data, float("nan"))

    def pre_forward(self, module, *args, **kwargs):
        if self.weights is not None:
            for other in self.parked:
                if other is not self and other.weights is None:
                    other.park()
            for weight, data in zip(module.parameters(), self.weights, strict=True):
                weight.data = data
            self.weights = None
        return args, kwargs


@ALL
def test_model_offload_changes_no_result(name):
    pipe, parked = CASES[name].build(), []
    expected = sample(pipe, name)
    for network in networks(pipe).values():
        parked.append(Parked(parked))
        accelerate.hooks.add_hook_to_module(network, parked[-1])
    assert_alike(sample(pipe, name), expected)


def test_a_stage_of_a_cascade_is_offloaded_before_the_next_one_runs():
    pipe = CASES["cascaded"].build()
    wanted, hooks = sample(pipe, "cascaded"), {}
    pipe.enable_model_cpu_offload(device="cpu")

    def note(pipe, step, timestep, tensors):
        hooks.setdefault(pipe.stage, pipe.base._all_hooks)  # diffusers offloads a pipeline by making its hooks anew

    assert_alike(sample(pipe, "cascaded", callback_on_step_end=note), wanted)
    assert hooks["base"] is not hooks["upscale_1"]


@pytest.mark.parametrize("name", ONE_EACH)
def test_layerwise_casting_is_the_pipeline_with_rounded_weights(name):
    pipe, rounded = CASES[name].build(), CASES[name].build()
    for part, network in networks(pipe).items():
        if isinstance(network, diffusers.ModelMixin):
            network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
            for key, weight in network.named_parameters():
                if weight.dtype == torch.float8_e4m3fn:
                    other = networks(rounded)[part].get_parameter(key)
                    other.data = other.data.to(torch.float8_e4m3fn).to(torch.float32)
    for part in (part for part in networks(pipe) if "unet" in part):
        assert any(weight.dtype == torch.float8_e4m3fn for weight in networks(pipe)[part].parameters())
    assert_alike(sample(pipe, name), sample(rounded, name))


# --- public helpers


# the stages of a cascade compute nothing but the run with their parameters
@pytest.mark.parametrize("name", [name for name in ONE_EACH if not name.startswith("cascaded")])
def test_public_helpers_keep_gradients(name):
    """For textual inversion and the like: only a whole run is without."""
    pipe, made = CASES[name].build(), []
    if hasattr(pipe, "encode_prompt"):
        encoded = pipe.encode_prompt("a red circle")
        made.append(encoded if isinstance(encoded, torch.Tensor) else encoded[0])
    if hasattr(pipe, "encode_image"):
        encoded = pipe.encode_image([tiny_picture(1)])
        made.append(encoded if isinstance(encoded, torch.Tensor) else encoded[0])
    if hasattr(pipe, "encode_conditions"):
        made.append(pipe.encode_conditions(pipe.read_conditions(**CASES[name].inputs())))
    if hasattr(pipe, "decode_latents"):
        made.append(pipe.decode_latents(torch.randn(1, first_stage(pipe).config.latent_channels, 4, 4)))
    assert made and all(tensor.requires_grad for tensor in made)


def first_stage(pipe):
    return pipe.vae if hasattr(pipe, "vae") else pipe.vqvae


# --- callbacks: cut-off, scales changed in a run, tensors given and taken


# one tokenizer or first stage is enough for what the loop does
# and one stage: a second one counts its steps anew, see test_pipeline_glide_piti.py
GUIDED_ONCE = [name for name in GUIDED_CASES if not name.endswith(("-f4", "-gumbel", "-vq", "-upscaled"))]
GUIDED = pytest.mark.parametrize("name", GUIDED_ONCE)


def _setting(scale, at=0, **returned):
    """A callback that sets the guidance scale after a step."""

    def callback(pipe, step, timestep, tensors):
        if step == at:
            pipe._guidance_scale = scale
            return returned

    return callback


@pytest.mark.parametrize("several", [1, 2])
@GUIDED
def test_cutoff_callback_turns_guidance_off_and_keeps_the_condition(name, several):
    pipe = CASES[name].build()
    run = {"num_inference_steps": 3, "num_images_per_prompt": several}
    wanted = sample(pipe, name, callback_on_step_end=_setting(1.0), **run)
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    assert equal(sample(pipe, name, callback_on_step_end=cutoff, **run), wanted)
    assert pipe.guidance_scale == 1.0
    assert equal(sample(pipe, name, callback_on_step_end=MultiPipelineCallbacks([cutoff, cutoff]), **run), wanted)

    def of_the_documentation(pipe, step, timestep, tensors):  # diffusers' guide: "Dynamic classifier-free guidance"
        if step == 0:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return tensors

    names = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert equal(sample(pipe, name, callback_on_step_end=of_the_documentation, **names, **run), wanted)


@GUIDED
def test_argument_zero_still_ignores_the_condition(name):
    pipe = CASES[name].build()
    ignored = sample(pipe, name, guidance_scale=0.0)
    assert equal(sample(pipe, name, guidance_scale=0.0, callback_on_step_end=lambda *_: {}), ignored)
    assert not equal(sample(pipe, name, guidance_scale=1.0, output_type="latent"), sample(
        pipe, name, guidance_scale=0.0, output_type="latent"
    ))  # fmt: skip


@pytest.mark.parametrize(("before", "after"), [(1.0, 5.0), (5.0, 1.0), (5.0, 2.0)])
@pytest.mark.parametrize("name", [name for name in GUIDED_ONCE if name != "cascaded"])  # whose latents change size
def test_scale_set_in_a_run_is_followed(name, before, after):
    pipe = CASES[name].build()
    first = {}

    def change(pipe, step, timestep, tensors):
        if step == 0:
            first["latents"] = tensors["latents"]
            pipe._guidance_scale = after

    run = {"num_inference_steps": 3, "output_type": "latent"}
    changed = sample(pipe, name, guidance_scale=before, callback_on_step_end=change, **run)
    # the same as a run under the other scale that goes on from the same first step
    callback = lambda pipe, step, timestep, tensors: dict(first) if step == 0 else None  # noqa: E731
    assert equal(changed, sample(pipe, name, guidance_scale=after, callback_on_step_end=callback, **run))
    assert not equal(changed, sample(pipe, name, guidance_scale=before, **run))


@pytest.mark.parametrize("scale", [-1.0, float("nan"), "high"])
def test_bad_scale_set_in_a_run_is_refused(scale):
    pipe = CASES["paella"].build()
    with pytest.raises((ValueError, TypeError), match="`guidance_scale` must be"):
        sample(pipe, "paella", callback_on_step_end=_setting(scale))


@pytest.mark.parametrize("name", ["ldm-unconditional", "ldm-upscale", "ldm-text"])
def test_guidance_that_the_network_cannot_give_is_refused_in_a_run_too(name):
    pipe = CASES[name].build()
    scale = {}
    if name != "ldm-unconditional":  # which has no scale
        pipe.register_to_config(null_condition=False)
        scale = {"guidance_scale": 1.0}
    with pytest.raises(ValueError, match="`guidance_scale` is 5.0, but"):
        sample(pipe, name, **scale, callback_on_step_end=_setting(5.0))


class Reader(PipelineCallback):
    """Asks for tensors as diffusers' callbacks do, and keeps what it gets."""

    tensor_inputs: list = []

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        self.got = dict(callback_kwargs)
        return callback_kwargs


@GUIDED
def test_pipeline_callback_gets_the_tensors_that_it_names(name):
    pipe = CASES[name].build()
    reader = Reader()
    reader.tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    if name in ("versatile-dual", "versatile-image-to-image", "versatile-edit"):
        reader.tensor_inputs += ["image_embeds", "negative_image_embeds"]
    result = sample(pipe, name, callback_on_step_end=reader, num_images_per_prompt=2)
    assert list(reader.got) == reader.tensor_inputs
    assert all(len(tensor) == 2 for tensor in reader.got.values())
    assert reader.got["prompt_embeds"].shape == reader.got["negative_prompt_embeds"].shape
    assert not any(torch.equal(reader.got["latents"], reader.got[one]) for one in reader.tensor_inputs[1:])
    assert not torch.equal(reader.got["prompt_embeds"], reader.got["negative_prompt_embeds"])
    assert equal(result, sample(pipe, name, num_images_per_prompt=2))  # what is returned unchanged changes nothing
    if name == "versatile-edit":
        return  # the contexts of its second half, which the reader got last, do not fit its first half
    # the null branch in place of the condition is guidance that cancels
    null = {"prompt_embeds": reader.got["negative_prompt_embeds"], **({
        "image_embeds": reader.got["negative_image_embeds"]} if "image_embeds" in reader.got else {})}  # fmt: skip
    run = {"num_images_per_prompt": 2, "output_type": "latent", "num_inference_steps": 4}
    changed = sample(pipe, name, callback_on_step_end=lambda p, i, t, k: null if i == 0 else None, **run)
    assert not equal(changed, sample(pipe, name, **run))


def _refused(pipe, name, error, match, **options):
    """Before any network runs."""
    runs = []
    hooks = [part.register_forward_pre_hook(lambda *_: runs.append(1)) for part in networks(pipe).values()]
    with pytest.raises(error, match=match):
        sample(pipe, name, **options)
    for hook in hooks:
        hook.remove()
    assert not runs


@pytest.mark.parametrize("name", ONE_EACH)
def test_callbacks_that_do_not_fit_are_refused(name):
    pipe = CASES[name].build()
    unknown = Reader()
    unknown.tensor_inputs = ["latents", "image_latents"]
    for callback, needs in [
        (SDXLCFGCutoffCallback(cutoff_step_ratio=0.5), "SDXLCFGCutoffCallback, which needs .*add_text_embeds"),
        (SD3CFGCutoffCallback(cutoff_step_ratio=0.5), "SD3CFGCutoffCallback, which needs .*pooled_prompt_embeds"),
        (IPAdapterScaleCutoffCallback(cutoff_step_ratio=0.5), "IPAdapterScaleCutoffCallback, which needs an IP-Ad"),
        (MultiPipelineCallbacks([Reader(), unknown]), "Reader, which needs image_latents"),
    ]:
        _refused(pipe, name, ValueError, f"`callback_on_step_end` holds a {needs}", callback_on_step_end=callback)
    _refused(pipe, name, TypeError, "must be a function or a PipelineCallback", callback_on_step_end=3)
    names = "callback_on_step_end_tensor_inputs"
    _refused(pipe, name, TypeError, f"`{names}` must be a list of names", **{names: "latents"})
    _refused(pipe, name, ValueError, rf"`{names}` holds \['noise'\]; allowed are \['latents'", **{names: ["noise"]})


@pytest.mark.parametrize("name", ONE_EACH)
def test_what_a_callback_returns_is_checked(name):
    pipe = CASES[name].build()
    latents = sample(pipe, name, output_type="latent")
    for returned, error, match in [
        ({"latents": latents[:, :1]}, ValueError, "returned `latents` of shape .*; the run needs"),
        ({"latents": latents.bool()}, TypeError, "returned torch.bool as `latents`"),
        ({"latents": None}, TypeError, "returned NoneType as `latents`"),
        ({"latent": latents}, ValueError, r"returned \['latent'\], which this call does not have"),
        ([latents], TypeError, "must return a dictionary of tensors, or None .* received list"),
    ]:
        with pytest.raises(error, match=match):
            sample(pipe, name, callback_on_step_end=lambda *_, returned=returned: returned)


def test_preview_is_for_reading():
    pipe = CASES["ldm-text"].build()
    with pytest.raises(ValueError, match="another `pred_original_sample`: it is for reading"):
        sample(
            pipe,
            "ldm-text",
            callback_on_step_end=lambda p, i, t, tensors: {"pred_original_sample": tensors["latents"]},
        )


def test_callback_sees_the_layouts_of_all_tiles():
    pipe, reader = CASES["ldm-layout"].build(), Reader()
    reader.tensor_inputs = ["prompt_embeds", "negative_prompt_embeds"]
    run = {"height": 24, "width": 24, "tile_size": 16}
    wanted = sample(pipe, "ldm-layout", callback_on_step_end=_setting(1.0), **run)
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    assert equal(sample(pipe, "ldm-layout", callback_on_step_end=cutoff, **run), wanted)
    sample(pipe, "ldm-layout", callback_on_step_end=reader, **run)
    assert reader.got["prompt_embeds"].shape == reader.got["negative_prompt_embeds"].shape
    assert reader.got["prompt_embeds"].ndim == 4


# --- normalised guidance: an option of latent and Versatile Diffusion, and a scheduler for all of Gaussian noise


RESCALED = [name for name in GUIDED_ONCE if name.startswith(("ldm", "versatile"))]
# beside those, whose scheduler guides in the next test; a cascade has a scheduler a stage
GUIDED_BY_SCHEDULER = [name for name in GUIDED_CASES if name.startswith(("cascaded-", "glide", "piti"))]


@pytest.mark.parametrize("name", RESCALED)
def test_guidance_rescale_is_a_share_of_normalised_guidance(name):
    pipe, run = CASES[name].build(), {"guidance_scale": 6.0, "output_type": "latent"}
    plain = sample(pipe, name, **run)
    assert equal(sample(pipe, name, guidance_rescale=0.0, **run), plain)
    rescaled = sample(pipe, name, guidance_rescale=0.7, **run)
    assert pipe.guidance_rescale == 0.7 and not equal(rescaled, plain)
    assert equal(sample(pipe, name, **run), plain) and pipe.guidance_rescale == 0.0  # a call leaves nothing behind
    unguided = run | {"guidance_scale": 1.0}
    assert equal(sample(pipe, name, guidance_rescale=0.7, **unguided), sample(pipe, name, **unguided))
    pipe.scheduler = NormalizedCFGScheduler(pipe.scheduler, guidance_rescale=0.7)
    assert equal(sample(pipe, name, **run), rescaled)


@pytest.mark.parametrize("name", RESCALED)
def test_guidance_rescale_set_in_a_run_is_followed(name):
    pipe = CASES[name].build()
    first = {}

    def change(pipe, step, timestep, tensors):
        if step == 0:
            first["latents"] = tensors["latents"]
            pipe._guidance_rescale = 1.0

    run = {"num_inference_steps": 3, "output_type": "latent"}
    changed = sample(pipe, name, callback_on_step_end=change, **run)
    callback = lambda pipe, step, timestep, tensors: dict(first) if step == 0 else None  # noqa: E731
    assert equal(changed, sample(pipe, name, guidance_rescale=1.0, callback_on_step_end=callback, **run))
    with pytest.raises(ValueError, match="`guidance_rescale` is 3.0: it must lie between 0"):
        sample(pipe, name, callback_on_step_end=lambda pipe, *_: setattr(pipe, "_guidance_rescale", 3.0))


@pytest.mark.parametrize("name", RESCALED)
def test_bad_guidance_rescale_is_refused(name):
    pipe = CASES[name].build()
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"`guidance_rescale` must lie in \[0, 1\].*0 is plain guidance"):
            sample(pipe, name, guidance_rescale=wrong)
    for wrong in ("high", True, None):
        with pytest.raises(TypeError, match="`guidance_rescale` must be a number"):
            sample(pipe, name, guidance_rescale=wrong)
    pipe.scheduler = NormalizedCFGScheduler(pipe.scheduler)
    with pytest.raises(ValueError, match="`guidance_rescale` is 0.5, but `scheduler` is a NormalizedCFGScheduler"):
        sample(pipe, name, guidance_rescale=0.5)


@pytest.mark.parametrize("name", GUIDED_BY_SCHEDULER)
def test_a_scheduler_that_guides_gets_both_predictions(name):
    pipe, plain = CASES[name].build(), CASES[name].build()
    run, unguided = ({"guidance_scale": scale, "output_type": "latent"} for scale in (6.0, 1.0))
    pipe.scheduler = NormalizedCFGScheduler(plain.scheduler, guidance_rescale=0.0)
    assert equal(sample(pipe, name, **run), sample(plain, name, **run))
    pipe.scheduler = NormalizedCFGScheduler(plain.scheduler)
    assert not equal(sample(pipe, name, **run), sample(plain, name, **run))
    assert equal(sample(pipe, name, **unguided), sample(plain, name, **unguided))


# --- one generator an image


def _batch(name, number):
    """The options that ask for so many images of the case."""
    return {"batch_size" if CASES[name].pipeline == "LDMUnconditionalPipeline" else "num_images_per_prompt": number}


def _seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


EXTRAS = {"": {}, "layers": {"mixing": "layer"}, "noisy": {"eta": 1.0}, "words": {"temperature": 1.0}}


def _extras(name):
    found = [""]
    if name == "versatile-dual":
        found += ["layers"]
    if not name.startswith("paella"):
        found += ["noisy"]
    return found


@pytest.mark.parametrize(("name", "extra"), [(name, extra) for name in CASES for extra in _extras(name)])
def test_image_depends_on_its_own_generator_alone(name, extra):
    pipe = CASES[name].build()
    if CASES[name].returns_texts and extra == "":
        extra = "words"
    run = {**EXTRAS[extra], "num_inference_steps": 3}
    together = sample(pipe, name, generator=_seeded(3, 4, 5), **_batch(name, 3), **run)
    other = sample(pipe, name, generator=tuple(_seeded(8, 4, 9)), **_batch(name, 3), **run)  # tuples work as well
    alone = sample(pipe, name, generator=_seeded(4), **run)
    assert_alike(together[1:2], alone, atol=1e-4)
    assert_alike(other[1:2], alone, atol=1e-4)
    assert not equal(together[:1], other[:1]) or CASES[name].returns_texts


# --- threads


def _sharing(pipe):
    """A pipeline with a scheduler of its own on the networks of another."""
    if isinstance(pipe, diffusers_ext.CascadedDiffusionPipeline):
        stages = {name: stage for name, stage in pipe.components.items() if stage is not None}
        return quiet(type(pipe)(**{name: _sharing(stage) for name, stage in stages.items()}))
    return quiet(type(pipe).from_pipe(pipe, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config)))


@ALL
def test_threads_that_share_the_networks_get_exact_results(name):
    alone, shared = CASES[name].build(), CASES[name].build()
    # prompts of several lengths, so that a setting of the tokenizer that is torn shows
    changes = [
        {"prompt": text} if "prompt" in CASES[name].inputs() else {}
        for text in ("a", "a red star", "a large blue star on the left")
    ]
    wanted = [sample(alone, name, seed=seed, **change) for seed, change in enumerate(changes)]

    def run(seed: int):
        pipe = _sharing(shared)
        return [sample(pipe, name, seed=seed, **changes[seed]) for _ in range(2)]

    with ThreadPoolExecutor(3) as pool:
        for found, one in zip(pool.map(run, range(3)), wanted, strict=True):
            assert all(equal(result, one) for result in found)


def test_a_mask_of_one_thread_is_not_seen_by_another():
    shared = CASES["versatile-image-to-image"].build()
    picture, mask = tiny_picture(1), tiny_mask()
    masked, whole = ({"image": [picture] * 8, "image_masks": masks} for masks in ([mask] * 8, None))
    wanted = [shared.encode_image(**call)[0] for call in (masked, whole)]
    assert not torch.allclose(*wanted, atol=1e-2)

    def run(k: int):
        pipe = _sharing(shared)
        return [pipe.encode_image(**(masked, whole)[k])[0] for _ in range(10)]

    with ThreadPoolExecutor(2) as pool:
        for found, one in zip(pool.map(run, range(2)), wanted, strict=True):
            assert all(torch.equal(tokens, one) for tokens in found)


ENCODERS = pytest.mark.parametrize("name", ["paella", "ldm-text", "versatile-text-to-image"])


@ENCODERS
def test_prompts_of_threads_are_encoded_apart(name, caplog):
    shared = CASES[name].build()
    texts = ["a", "a red circle", "a large blue star on the left"]
    wanted = [shared.encode_prompt(text)[0] for text in texts]

    def run(k: int):
        pipe = _sharing(shared)
        return all(torch.equal(pipe.encode_prompt(texts[k])[0], wanted[k]) for _ in range(40))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(run, range(3)))
    assert not caplog.records  # nothing was cut off


# --- adapters, saving


ONE = pytest.mark.parametrize("name", ONE_NETWORK)


def save_random_lora(name, folder, seed=0) -> Result:
    """LoRA of rank 2 as the recipes save it, of random numbers; what the pipeline draws with it."""
    pipe = CASES[name].build()
    add_lora(pipe.unet, 2)
    generator = torch.Generator().manual_seed(seed)
    for key, matrix in pipe.unet.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(matrix, std=0.3, generator=generator)
    save_lora(pipe.unet, folder)
    return sample(pipe, name)


@ONE
def test_adapters_by_the_names_of_diffusers(name, tmp_path):
    """A folder, a file, a dict with `unet.` before its keys; two adapters, weights, off and on, fused, unloaded."""
    with_lora = save_random_lora(name, tmp_path / "a")
    other = save_random_lora(name, tmp_path / "b", seed=1)
    pipe = CASES[name].build()
    plain, kind = sample(pipe, name), type(pipe.unet)
    assert pipe.get_active_adapters() == [] and pipe.get_list_adapters() == {}
    pipe.load_lora_weights(tmp_path / "a", adapter_name="a")
    assert equal(sample(pipe, name), with_lora) and not equal(with_lora, plain)
    matrices = load_file(tmp_path / "b" / "pytorch_lora_weights.safetensors")
    pipe.load_lora_weights({f"unet.{key}": value for key, value in matrices.items()}, adapter_name="b")
    assert pipe.get_list_adapters() == {"unet": ["a", "b"]}
    pipe.set_adapters(["a", "b"], [0.0, 1.0])
    assert_alike(sample(pipe, name), other)
    pipe.set_adapters("a")
    assert pipe.get_active_adapters() == ["a"]
    pipe.disable_lora()
    assert equal(sample(pipe, name), plain)
    pipe.enable_lora()
    pipe.delete_adapters("b")
    assert pipe.get_list_adapters() == {"unet": ["a"]}
    pipe.fuse_lora()
    assert pipe.fused_loras == {"a"} and pipe.num_fused_loras == 1
    assert_alike(sample(pipe, name), with_lora)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert type(pipe.unet) is kind and pipe.get_list_adapters() == {} and pipe.num_fused_loras == 0
    assert_alike(sample(pipe, name), plain)


@ONE
def test_a_pipeline_with_an_adapter_is_not_saved_as_it_is(name, tmp_path):
    """Loaded, added or fused: refused with the way out, which leads to a folder that draws the same."""
    with_lora = save_random_lora(name, tmp_path)
    pipe = CASES[name].build()
    pipe.load_lora_weights(str(tmp_path / "pytorch_lora_weights.safetensors"))
    way_out = r"`unet` \(.*\) would not load back .* Call `pipe.fuse_lora\(\)` .* `pipe.unload_lora_weights\(\)`"
    for step in ("loaded", "fused"):
        with pytest.raises(ValueError, match=way_out):
            pipe.save_pretrained(tmp_path / step)
        assert not (tmp_path / step).exists()
        if step == "loaded":
            with pytest.raises(ValueError, match=way_out):
                pipe.push_to_hub("user/refused")  # offline: refused before it asks the Hub for a repository
            pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "saved")
    loaded = type(pipe).from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.unet) is type(CASES[name].build().unet)
    weights = pipe.unet.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.unet.state_dict().items())
    assert_alike(sample(loaded, name), with_lora)


@ONE
def test_adapters_of_another_network_are_refused_before_they_change_anything(name, tmp_path):
    pipe = CASES[name].build()
    plain, keys = sample(pipe, name), list(pipe.unet.state_dict())
    layer, linear = next((k, m) for k, m in pipe.unet.named_modules() if isinstance(m, torch.nn.Linear))
    fitting = {
        f"{layer}.lora_A.weight": torch.zeros(2, linear.in_features),
        f"{layer}.lora_B.weight": torch.zeros(linear.out_features, 2),
    }
    misshaped = fitting | {f"{layer}.lora_A.weight": torch.zeros(2, linear.in_features + 1)}
    for matrices, message in [
        ({}, "found no matrices in the given matrices"),
        ({"te.q.lora_down.weight": torch.zeros(2, 2)}, "te.q.lora_down.weight, which are no LoRA matrices of unet"),
        (fitting | {"nowhere.lora_A.weight": torch.zeros(2, 2)}, "matrices of another network than this .*: nowhere"),
        (misshaped, rf"another network than this .*: {layer}.lora_A.weight \(2, {linear.in_features + 1}\) beside"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(matrices)
    for call in ("fuse_lora", "unfuse_lora", "disable_lora", "enable_lora"):
        with pytest.raises(ValueError, match="unet has no adapter: call `load_lora_weights` before"):
            getattr(pipe, call)()
    pipe.unload_lora_weights()  # nothing to do
    assert list(pipe.unet.state_dict()) == keys and equal(sample(pipe, name), plain)
    pipe.load_lora_weights(fitting, adapter_name="zero")
    with pytest.raises(ValueError, match=r"`adapter_names` holds \['one'\]; the pipeline's adapters are \['zero'\]"):
        pipe.set_adapters(["zero", "one"])
    with pytest.raises(ValueError, match=r"`components` is \['text_encoder'\]: LoRA matrices are in \['unet'\] alone"):
        pipe.fuse_lora(components=["text_encoder"])
    with pytest.raises(ValueError, match=r"`unet_lora_layers` is missing: pass `peft.get_peft_model_state_dict"):
        type(pipe).save_lora_weights(tmp_path)
    type(pipe).save_lora_weights(tmp_path, peft.get_peft_model_state_dict(pipe.unet, adapter_name="zero"))
    assert sorted(load_file(tmp_path / "pytorch_lora_weights.safetensors")) == sorted(f"unet.{k}" for k in fitting)
    assert pipe.lora_state_dict(tmp_path).keys() == fitting.keys()
    assert equal(sample(pipe, name), plain)


def in_fp8(network):
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def quantised(network):
    torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear}, inplace=True)


def pruned(network):
    layer = next(m for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)))
    prune.l1_unstructured(layer, "weight", 0.5)


def offloaded(network):
    accelerate.cpu_offload(network, torch.device("cpu"))


@ONE
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_fp8, "stored as torch.float8_e4m3fn .* as after `enable_layerwise_casting`. Save before"),
        (quantised, "its config describes weights that it does not have .* Undo that, or save before it"),
        (pruned, "its config describes weights that it does not have .* Undo that, or save before it"),
        (offloaded, r"its weights are offloaded .* Call `pipe.remove_all_hooks\(\)`"),
    ],
)
def test_what_the_files_do_not_hold_is_not_saved(name, change, message, tmp_path):
    pipe = CASES[name].build()
    change(pipe.unet)
    with pytest.raises(ValueError, match=rf"`unet` \(.*\) would not load back as it is: .*{message}"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@ALL
def test_weights_that_are_not_finite_are_not_saved(name, tmp_path):
    pipe = CASES[name].build()
    part, network = next(iter(networks(pipe).items()))
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=rf"`{part.split('.')[-1]}` \(.*\) has weights that are not finite \(.*\)"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@ONE
def test_matrices_that_are_not_finite_are_not_saved(name, tmp_path):
    matrices = {"conv_in.lora_A.weight": torch.full((1, 1), float("inf"))}
    with pytest.raises(ValueError, match="`unet_lora_layers` holds matrices that are not finite .*conv_in"):
        type(CASES[name].build()).save_lora_weights(tmp_path, matrices)
    assert not list(tmp_path.iterdir())


def test_what_loads_back_equal_is_saved(tmp_path):
    """Weights kept in bfloat16, compiled, with fused projections."""
    name = "ldm-text"
    for change in (
        lambda pipe: pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32),
        lambda pipe: setattr(pipe, "unet", torch.compile(pipe.unet, backend="eager")),
        lambda pipe: pipe.unet.fuse_qkv_projections(),
    ):
        pipe = CASES[name].build()
        change(pipe)
        pipe.save_pretrained(tmp_path)
        loaded = type(pipe).from_pretrained(tmp_path, dtype=torch.float32)
        loaded.set_progress_bar_config(disable=True)
        assert_alike(sample(loaded, name), sample(pipe, name))


# --- pictures and masks


READS_PICTURES = [name for name, case in CASES.items() if "image" in case.inputs()]
READS_MASKS = [name for name, case in CASES.items() if "mask_image" in case.inputs()]


def _other_forms(picture, form):
    """The same grey picture or mask, as another file or array would hold it."""
    grey = np.asarray(picture.convert("L"))
    return {
        "alpha": lambda: Image.fromarray(grey).convert("RGBA"),
        "palette": lambda: Image.fromarray(grey).convert("P"),
        "16 bits": lambda: Image.fromarray(grey.astype(np.uint16) * 257),
        "32 bits": lambda: Image.fromarray(grey.astype(np.int32)),
        "floats": lambda: Image.fromarray(grey.astype(np.float32) / np.float32(254.99995)),
        "one channel": lambda: grey[..., None],
    }[form]()


@pytest.mark.parametrize("name", READS_PICTURES)
def test_pictures_and_masks_of_other_forms_are_the_same_to_the_pipeline(name):
    pipe, call = CASES[name].build(), dict(CASES[name].inputs())
    call["image"] = call["image"].convert("L")
    if name == "versatile-image-to-image":
        call["image_masks"] = tiny_mask()
    wanted = sample(pipe, name, **call, num_inference_steps=1)
    for form in ("alpha", "palette", "16 bits", "32 bits", "floats", "one channel"):
        changed = {key: _other_forms(call[key], form) for key in ("image", "mask_image", "image_masks") if key in call}
        assert_alike(sample(pipe, name, **call | changed, num_inference_steps=1), wanted, atol=1e-4)


@pytest.mark.parametrize("name", READS_MASKS)
def test_a_brush_on_nothing_is_the_mask_it_shows(name):
    pipe, call = CASES[name].build(), dict(CASES[name].inputs())
    brush = np.full((16, 16, 4), 255, dtype=np.uint8)
    brush[..., 3] = np.asarray(call["mask_image"].convert("L"))
    assert equal(sample(pipe, name, **call), sample(pipe, name, **call | {"mask_image": Image.fromarray(brush)}))


# --- schedulers: wrong kinds, adapters


GAUSSIAN = [name for name in ONE_NETWORK if not name.startswith("paella")]


@pytest.mark.parametrize("name", ONE_NETWORK)
def test_schedulers_of_other_kinds_are_refused(name):
    pipe = CASES[name].build()
    kinds = [
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.EDMEulerScheduler(),
        diffusers.EDMDPMSolverMultistepScheduler(),
        diffusers.IPNDMScheduler(),
        diffusers.CMStochasticIterativeScheduler(),
    ]
    if name.startswith("paella"):
        kinds += [diffusers.DDIMScheduler(), diffusers.VQDiffusionScheduler(num_vec_classes=24)]
        way_out = "draws tokens and needs a DiscreteRenoisingScheduler.*from_pretrained"
    else:
        own = pipe.scheduler.config
        kinds += [
            diffusers_ext.DiscreteRenoisingScheduler(num_vec_classes=24),
            diffusers.VQDiffusionScheduler(num_vec_classes=24),
            diffusers.DDIMInverseScheduler.from_config(own),
            diffusers.DPMSolverMultistepInverseScheduler.from_config(own),
            diffusers.UniPCMultistepScheduler.from_config(
                own, use_flow_sigmas=True, prediction_type="flow_prediction"
            ),
            diffusers.RePaintScheduler.from_config(own),
            diffusers.ScoreSdeVeScheduler(),
            diffusers.UnCLIPScheduler(),  # knows no betas but its own
            diffusers.CogVideoXDDIMScheduler.from_config(own),  # the default shifts the levels
        ]
        way_out = "EulerDiscreteScheduler.from_pretrained"
    for scheduler in kinds:
        pipe.scheduler = scheduler
        match = rf"(?s)`scheduler` is a {type(scheduler).__name__}.*{way_out}"
        _refused(pipe, name, ValueError, match, num_inference_steps=3)


class Adapter(diffusers.SchedulerMixin, diffusers.ConfigMixin):
    """Holds another scheduler, as those of the library that guide or truncate do."""

    config_name = "scheduler_config.json"

    @diffusers.configuration_utils.register_to_config
    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.register_to_config(scheduler={"_class_name": type(scheduler).__name__, **scheduler.config})

    timesteps = property(lambda self: self.scheduler.timesteps)
    init_noise_sigma = property(lambda self: self.scheduler.init_noise_sigma)

    def set_timesteps(self, *args, **kwargs):
        self.scheduler.set_timesteps(*args, **kwargs)

    def scale_model_input(self, sample, timestep):
        return self.scheduler.scale_model_input(sample, timestep)

    def add_noise(self, *args):
        return self.scheduler.add_noise(*args)

    def step(self, model_output, timestep, sample, model_output_uncond=None, guidance_scale=1.0, **inner):
        model_output = guide(model_output, model_output_uncond, guidance_scale, channels=sample.shape[1])
        return self.scheduler.step(model_output, timestep, sample, **inner)


@pytest.mark.parametrize("name", [*GAUSSIAN, "versatile-text-to-text", "ldm-unconditional-known"])
def test_adapters_get_all_arguments_of_a_step(name):
    pipe = CASES[name].build()
    run = {"eta": 1.0, "num_inference_steps": 3, "output_type": "latent"}
    wanted = sample(pipe, name, **run)
    pipe.scheduler = Adapter(Adapter(pipe.scheduler))
    assert equal(sample(pipe, name, **run), wanted)
    assert not equal(sample(pipe, name, **run, seed=1), wanted)
    with pytest.raises(ValueError, match="`num_inference_steps` must be at most 1000"):
        sample(pipe, name, num_inference_steps=1001)
    if "pred_original_sample" in pipe._callback_tensor_inputs:
        seen = []
        sample(
            pipe,
            name,
            callback_on_step_end=lambda p, i, t, tensors: seen.append(tensors["pred_original_sample"]),
            callback_on_step_end_tensor_inputs=["pred_original_sample"],
        )
        assert len(seen) == 2 and all(bool(clean.isfinite().all()) for clean in seen)


ONE_LOOP = ["ldm-text", "ldm-unconditional-known", "versatile-text-to-image", "cascaded-base", "glide", "piti"]


@pytest.mark.parametrize("name", ONE_LOOP)
def test_any_spacing_of_the_noise_runs_all_of_its_steps(name):
    """With cosine betas, several of the first timesteps are the same."""
    pipe, seen = CASES[name].build(), []
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True)
    pipe.scheduler.set_timesteps(12)
    assert pipe.scheduler.timesteps[0] == pipe.scheduler.timesteps[1]
    sample(pipe, name, num_inference_steps=12, callback_on_step_end=lambda p, *_: seen.append(p.scheduler.step_index))
    assert seen == [*range(1, 13)]


@pytest.mark.parametrize("name", ONE_LOOP)
def test_steps_that_a_scheduler_cannot_make_are_refused(name):
    pipe, betas = CASES[name].build(), {"beta_schedule": "squaredcos_cap_v2"}
    pipe.scheduler = diffusers.PNDMScheduler(**betas)
    match = "`num_inference_steps` must be at least 4 with PNDMScheduler, .*`skip_prk_steps=True`"
    _refused(pipe, name, ValueError, match, num_inference_steps=3)
    pipe.scheduler = diffusers.KDPM2AncestralDiscreteScheduler(**betas)
    match = "`num_inference_steps`=2 makes KDPM2AncestralDiscreteScheduler run timesteps that are no numbers"
    _refused(pipe, name, ValueError, match, num_inference_steps=2)
    # made of an adapter's config, whose betas it keeps and does not use
    adapter = NormalizedCFGScheduler(diffusers.DDPMScheduler(**betas))
    pipe.scheduler = diffusers.UnCLIPScheduler.from_config(adapter.config)
    _refused(pipe, name, ValueError, "UnCLIPScheduler, which takes no betas from a config", num_inference_steps=3)


@pytest.mark.parametrize("name", ["cascaded-base", "glide", "piti"])
def test_solvers_without_a_learned_variance_leave_that_of_the_network_out(name):
    """Their own code does so for a prediction of the noise alone."""
    pipe = CASES[name].build()
    for kind in (diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverSinglestepScheduler):
        for prediction_type in ("epsilon", "v_prediction", "sample"):
            drawn = []
            for variance_type in ("learned_range", None):
                pipe.scheduler = kind(variance_type=variance_type, prediction_type=prediction_type)
                drawn.append(sample(pipe, name, output_type="latent"))
            assert equal(*drawn)


@pytest.mark.parametrize("name", ["glide-upscaled", "piti-upscaled", "cascaded"])
def test_stages_may_share_one_scheduler(name):
    pipe, run = CASES[name].build(), {"num_inference_steps": 5}
    if name == "cascaded":
        run = {"num_inference_steps": [5, 3], "conditioning_mode": "non_truncated"}
    pipes = [stage for stage in pipe.components.values() if isinstance(stage, diffusers.DiffusionPipeline)] or [pipe]
    places = [(one, part) for one in pipes for part in ("scheduler", "upscale_scheduler") if hasattr(one, part)]
    assert len(places) == 2
    scheduler = diffusers.UniPCMultistepScheduler(beta_schedule="squaredcos_cap_v2")
    for one, part in places:
        setattr(one, part, copy.deepcopy(scheduler))
    wanted = sample(pipe, name, **run, output_type="latent")
    for one, part in places:
        setattr(one, part, scheduler)
    assert equal(sample(pipe, name, **run, output_type="latent"), wanted)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("paella")])
def test_schedule_is_checked_before_a_network_runs(name):
    _refused(CASES[name].build(), name, ValueError, "start at timestep 1000", num_inference_steps=1000)


# --- parts that are missing or of a wrong kind


@pytest.mark.parametrize("name", [name for name in CASES if name != "cascaded"])  # which is shorter without a stage
def test_missing_parts_are_named(name):
    whole = CASES[name].build()
    wanted, parts = sample(whole, name), whole.components
    for part in parts:
        built_without = quiet(type(whole)(**{**_arguments(whole), part: None}))
        whole.register_modules(**{part: None})
        for pipe in (whole, built_without):
            try:
                assert equal(sample(pipe, name), wanted)  # the call has no need of it
            except ValueError as error:
                assert part in str(error), (part, error)
            else:
                assert part not in ("unet", "scheduler")
        whole.register_modules(**{part: parts[part]})


def _arguments(pipe):
    """Everything that its constructor takes, as it was given."""
    options = inspect.signature(type(pipe).__init__).parameters.keys() & pipe.config.keys()
    return {**{name: pipe.config[name] for name in options}, **pipe.components}


@ONE
def test_a_missing_part_is_named_by_encoders_and_properties(name):
    arguments = {"encode_prompt": "a star", "encode_image": tiny_picture(1), "get_label_ids": 1}
    for part in CASES[name].build().components:
        pipe = CASES[name].build()
        pipe = quiet(type(pipe)(**_arguments(pipe) | {part: None}))
        uses = {key: partial(getattr(pipe, key), value) for key, value in arguments.items() if hasattr(pipe, key)}
        for key in dir(type(pipe)):
            if isinstance(getattr(type(pipe), key, None), property):
                uses[key] = partial(getattr, pipe, key)
        for key, use in uses.items():
            try:
                use()
            except ValueError as error:
                assert re.search(rf"without [\w, ]*\b{part}\b", str(error)), f"{part}, {key}: {error}"


@ONE
def test_a_network_of_a_wrong_class_is_refused_before_anything_runs(name):
    pipe = CASES[name].build()
    strangers = {"unet": LDMSpatialRescaler(3), "vqvae": pipe.unet, "vae": pipe.unet, "text_encoder": pipe.unet}
    for part, stranger in strangers.items():
        if part in pipe.components:
            message = rf"`{part}` is a {type(stranger).__name__}, {type(pipe).__name__} needs a "
            with pytest.raises(ValueError, match=message):
                setattr(pipe, part, stranger)
            with pytest.raises(ValueError, match=message):
                type(pipe)(**pipe.components | {part: stranger})


def test_the_message_names_the_pipelines_that_take_the_network():
    pipe = CASES["paella"].build()
    with pytest.raises(ValueError, match="A UNet2DConditionModel belongs into .*LDMTextPipeline"):
        pipe.unet = tiny_unet(context=True)


# --- long prompts, options without effect


LONG = "a red circle and a blue star on the left of a small green ring"
# editing reads its texts by the text autoencoder too, which cuts elsewhere: see test_pipeline_versatile.py
READS_PROMPTS = [name for name in CASES if "prompt" in CASES[name].inputs() and name != "versatile-edit"]


@pytest.mark.parametrize("name", READS_PROMPTS)
def test_long_prompts_are_cut_with_a_warning_that_quotes_the_rest(name, caplog):
    pipe = CASES[name].build()
    short = sample(
        pipe, name, prompt="a red circle and a blue star on", negative_prompt="a red circle and a blue star on"
    )
    assert not [record for record in caplog.records if "cut off" in record.message]  # others warn of other things
    cut = sample(pipe, name, prompt=LONG, negative_prompt=LONG)
    assert equal(cut, short)
    quoted = [record for record in caplog.records if "cut off" in record.message]
    assert [record.message.endswith("cut off: 'the left of a small green ring'") for record in quoted] == [True] * 2
    assert {record.name for record in quoted} == {type(pipe).__module__}


# --- not-a-number from a network


@ALL
def test_not_a_number_is_an_error(name):
    pipe = CASES[name].build()
    wanted = sample(pipe, name)
    for part, network in networks(pipe).items():
        broken = copy.deepcopy(network)
        for parameter in broken.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
        owner, name_there = owner_of(pipe, part)
        owner.register_modules(**{name_there: broken})
        try:
            assert equal(sample(pipe, name), wanted)  # the call has no need of it
        except ValueError as error:
            assert "finite" in str(error), (part, error)
        else:
            assert name_there != "unet"
        owner.register_modules(**{name_there: network})


@pytest.mark.parametrize("name", [name for name in ONE_EACH if not CASES[name].returns_texts])
def test_pictures_are_float32_whatever_the_networks_dtype(name):
    pipe = CASES[name].build().to(torch.bfloat16)
    images = sample(pipe, name)
    assert images.dtype == torch.float32 and bool(((images >= 0) & (images <= 1)).all())


@pytest.mark.parametrize("name", [*ONE_EACH, "glide-upscaled", "piti-upscaled"])
def test_each_network_alone_may_be_in_half_precision(name):
    """`dtype={"unet": torch.bfloat16}` of diffusers' `from_pretrained`. A stage takes what another one made."""
    pipe = CASES[name].build()
    for network in networks(pipe).values():
        network.to(torch.bfloat16)
        images = sample(pipe, name)
        assert CASES[name].returns_texts or bool(((images >= 0) & (images <= 1)).all())
        network.to(torch.float32)


# --- pipelines made of another's components


TRAINED_SIZE = ["paella", "paella-variation", "ldm-class", "ldm-text", "ldm-layout", "ldm-unconditional"]
TRAINED_SIZE += ["versatile-text-to-image", "versatile-dual"]


def _without_size(name):
    """The options of a call that do not say how large the result is."""
    taken = inspect.signature(getattr(diffusers_ext, CASES[name].pipeline).__call__).parameters
    return {key: None for key in ("height", "width") if key in taken}


@pytest.mark.parametrize("name", TRAINED_SIZE)
def test_pipeline_made_of_components_samples_the_size_of_its_network(name):
    pipe = CASES[name].build()
    pipe.unet.register_to_config(sample_size=12)
    options = {"class_names", "num_classes", "max_objects", "null_condition"} & pipe.config.keys()
    made = quiet(type(pipe)(**pipe.components, **{option: pipe.config[option] for option in options}))
    side = 12 * made.vae_scale_factor
    assert sample(made, name, **_without_size(name)).shape[-2:] == (side, side)
    shared = quiet(type(pipe).from_pipe(made))
    assert sample(shared, name, **_without_size(name)).shape[-2:] == (side, side)


@pytest.mark.parametrize("pair", [[4, 8], (4, 8), {"height": 4, "width": 8}, {"0": 4, "1": 8}])
@pytest.mark.parametrize("name", TRAINED_SIZE)
def test_default_size_may_be_a_pair(name, pair):
    pipe = CASES[name].build()
    parts = _arguments(pipe)
    made = quiet(type(pipe)(**{**parts, "default_sample_size": pair}))
    height, width = 4 * made.vae_scale_factor, 8 * made.vae_scale_factor
    assert sample(made, name, **_without_size(name)).shape[-2:] == (height, width)
    recorded = json.loads(made.to_json_string())["default_sample_size"]
    assert recorded == {"0": 4, "1": 8}  # no list, which the Hub route takes for a component
    for wrong in (0, [4], [4, 8, 2], "4x8", 4.5):
        with pytest.raises(ValueError, match="`default_sample_size` must be one side or \\(height, width\\)"):
            type(pipe)(**{**parts, "default_sample_size": wrong})


def test_default_size_of_a_pair_survives_saving(tmp_path):
    pipe = CASES["paella"].build()
    made = quiet(type(pipe)(**{**_arguments(pipe), "default_sample_size": (4, 8)}))
    made.save_pretrained(tmp_path)
    loaded = quiet(type(pipe).from_pretrained(tmp_path))
    assert equal(sample(loaded, "paella"), sample(made, "paella"))


# --- loading: folders of another family, dtypes


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each pipeline saved, in half precision."""
    saved = {}
    for name in ONE_EACH:
        saved[name] = tmp_path_factory.mktemp(name) / "pipe"
        CASES[name].build().to(torch.bfloat16).save_pretrained(saved[name])
    return saved


@pytest.mark.parametrize("name", ONE_EACH)
def test_without_a_dtype_all_parts_are_float32_and_with_one_they_have_it(name, folders):
    cls = getattr(diffusers_ext, CASES[name].pipeline)
    for options, wanted in (
        ({}, lambda part: torch.float32),
        ({"dtype": torch.bfloat16}, lambda part: torch.bfloat16),
        ({"dtype": {"unet": torch.float16}}, lambda part: torch.float16 if part == "unet" else torch.float32),
    ):
        pipe = cls.from_pretrained(folders[name], **options)
        found = {key: part.dtype for key, part in networks(pipe).items()}
        assert found == {key: wanted(key.split(".")[-1]) for key in found}


# pipelines that load the same checkpoints
MODES = [
    {case.pipeline for case in CASES.values() if case.pipeline.startswith(family)}
    for family in ("Paella", "Versatile")
]


def test_a_folder_of_another_pipeline_is_refused_and_its_own_class_named(folders):
    for name, folder in folders.items():
        saver = CASES[name].pipeline
        for other in ONE_EACH:
            cls = getattr(diffusers_ext, CASES[other].pipeline)
            if cls.__name__ == saver or any({cls.__name__, saver} <= names for names in MODES):
                assert type(cls.from_pretrained(folder)) is cls
                continue
            with pytest.raises(ValueError, match=rf"is no checkpoint of {cls.__name__}: .*`{saver}\.from_pretrained`"):
                cls.from_pretrained(folder)


def test_a_stock_folder_is_judged_by_its_parts(tmp_path):
    parts = CASES["ldm-text"].build().components
    diffusers.LDMTextToImagePipeline(**parts).save_pretrained(tmp_path)
    assert diffusers_ext.LDMTextPipeline.from_pretrained(tmp_path).bert is not None
    message = "its `unet` is a UNet2DConditionModel, wanted is a PaellaUNet.*`LDMTextToImagePipeline.from_pretrained`"
    with pytest.raises(ValueError, match=message):
        diffusers_ext.PaellaPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it has no `class_embedder`, a LDMClassEmbedder"):
        diffusers_ext.LDMClassConditionalPipeline.from_pretrained(tmp_path)
