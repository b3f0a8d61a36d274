"""Schedulers that hold another one: config, files, what is handed on, and what is not."""

import copy
import inspect
import json
import pickle
from types import SimpleNamespace

import diffusers
import pytest
import torch

import diffusers_ext
from diffusers_ext import NormalizedCFGScheduler
from diffusers_ext.schedulers.gaussian import ldm_scheduler, scheduler_chain, scheduler_setting, step_arguments

ADAPTERS = ["NormalizedCFGScheduler", "TruncatedConditioningScheduler"]
EACH = pytest.mark.parametrize("name", ADAPTERS)


def adapter(name, scheduler=None, **own):
    return getattr(diffusers_ext, name)(scheduler, **own)


@EACH
def test_config_is_json_and_names_what_is_held(name, tmp_path):
    held = diffusers.DPMSolverMultistepScheduler.from_config(ldm_scheduler().config, solver_order=3)
    made = adapter(name, held)
    made.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == name
    assert saved["scheduler"]["_class_name"] == "DPMSolverMultistepScheduler"
    assert saved["scheduler"]["beta_end"] == saved["beta_end"] == 0.0195
    loaded = getattr(diffusers_ext, name).from_pretrained(tmp_path)
    assert type(loaded.scheduler) is diffusers.DPMSolverMultistepScheduler
    assert loaded.scheduler.config["solver_order"] == 3
    assert torch.equal(loaded.alphas_cumprod, held.alphas_cumprod)
    assert dict(loaded.config) == dict(made.config)
    again = getattr(diffusers_ext, name).from_config(loaded.config)
    assert dict(again.config) == dict(made.config)
    # older files hold them under "scheduler" alone
    older = {key: value for key, value in saved.items() if key in ("scheduler", "_class_name", *made._internal_dict)}
    assert dict(getattr(diffusers_ext, name).from_config(older).config) == dict(made.config)


@EACH
def test_own_arguments_and_adapters_in_adapters_survive_saving(name, tmp_path):
    inner = diffusers_ext.TruncatedConditioningScheduler(ldm_scheduler(), stop_level=12.5)
    adapter(name, inner).save_pretrained(tmp_path)
    loaded = getattr(diffusers_ext, name).from_pretrained(tmp_path)
    assert loaded.scheduler.config["stop_level"] == 12.5 and len(scheduler_chain(loaded)) == 3
    assert torch.equal(loaded.alphas_cumprod, ldm_scheduler().alphas_cumprod)


@EACH
def test_config_of_another_scheduler_is_wrapped_and_no_default_is_built(name, tmp_path):
    kind = getattr(diffusers_ext, name)
    own = ldm_scheduler()
    with pytest.raises(ValueError, match=rf"`config` names no scheduler that {name} could hold.*Call `{name}\("):
        kind.from_config(own.config)  # of an object that was not loaded: it does not say of which class
    with pytest.raises(ValueError, match="`config` names no scheduler"):
        kind.from_config({"_class_name": name})
    with pytest.raises(ValueError, match="`config` is a str"):
        kind.from_config("folder")
    own.save_pretrained(tmp_path)
    for config in (diffusers.DDIMScheduler.from_pretrained(tmp_path).config, json.loads(own.to_json_string())):
        wrapped = kind.from_config(config)
        assert type(wrapped.scheduler) is diffusers.DDIMScheduler
        assert torch.equal(wrapped.alphas_cumprod, own.alphas_cumprod)
    # and a stock folder is wrapped too
    assert torch.equal(kind.from_pretrained(tmp_path).alphas_cumprod, own.alphas_cumprod)
    made, unused = kind.from_config(config, return_unused_kwargs=True, other=1)
    assert unused == {"other": 1} and isinstance(made, kind)


@EACH
def test_other_schedulers_are_made_of_its_config_and_of_its_file(name, tmp_path):
    """The lines that every guide of diffusers shows; with the held one's betas and not with defaults."""
    own = ldm_scheduler()
    made = adapter(name, adapter(name, own))
    made.save_pretrained(tmp_path)
    assert made.compatibles
    for kind in [*made.compatibles, diffusers.UniPCMultistepScheduler]:
        assert isinstance(kind, type)
        try:
            others = kind.from_config(made.config), kind.from_pretrained(tmp_path)
        except ImportError:  # a package of its own is missing
            continue
        for other in others:
            if hasattr(other, "alphas_cumprod"):  # EDM's levels are their own
                # ours are float64, theirs products of 1000 float32 numbers
                torch.testing.assert_close(other.alphas_cumprod.float(), own.alphas_cumprod, rtol=1e-5, atol=0)
            assert scheduler_setting(other, "steps_offset", 1) == 1


@EACH
@pytest.mark.parametrize(
    "class_name", ["UNet2DModel", "DiffusionPipeline", "os.system", "__import__", "Nothing", None, 3, "PaellaUNet"]
)
def test_classes_that_are_no_schedulers_are_not_looked_up(name, class_name):
    with pytest.raises(ValueError, match="names the class .*must be a scheduler of diffusers or of diffusers_ext"):
        adapter(name, {"_class_name": class_name})


@EACH
def test_what_is_no_scheduler_is_refused(name):
    for wrong in (3, "DDIMScheduler", torch.nn.Linear(1, 1), diffusers.DDIMScheduler):
        with pytest.raises(TypeError, match=r"`scheduler` is a \w+: pass a scheduler, or the config of one"):
            adapter(name, wrong)
    made = adapter(name, ldm_scheduler())
    with pytest.raises(ValueError, match="it must hold another one"):
        made.scheduler = made


@EACH
def test_only_public_names_are_handed_on(name):
    made = adapter(name, ldm_scheduler())
    assert made.final_alpha_cumprod is made.scheduler.final_alpha_cumprod
    for missing in ("_internal", "__deepcopy__", "nothing"):
        with pytest.raises(AttributeError, match=missing):
            getattr(made, missing)
    assert made._internal_dict is not made.scheduler._internal_dict
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert dict(other.config) == dict(made.config) and other.scheduler is not made.scheduler
        other.scheduler.betas.zero_()
    assert bool((made.betas > 0).all())
    assert len(made) == len(made.scheduler)


@EACH
def test_values_of_the_config_and_names_that_there_are_not(name, recwarn):
    """As diffusers' schedulers: the one with a warning, the other with the scheduler's own name."""
    made = adapter(name, ldm_scheduler())
    made.register_to_config(test_attribute=5)
    assert made.test_attribute == made.config.test_attribute == 5
    assert f"`test_attribute` directly via '{name}' object" in str(recwarn.pop(FutureWarning).message)
    with pytest.raises(AttributeError, match=f"^'{name}' object has no attribute 'does_not_exist'$"):
        made.does_not_exist  # noqa: B018


@EACH
def test_a_solver_that_is_assigned_is_the_one_that_is_saved(name):
    made = adapter(name, ldm_scheduler())
    made.scheduler = diffusers.EulerDiscreteScheduler.from_config(made.config)
    assert made.config["scheduler"]["_class_name"] == "EulerDiscreteScheduler"
    made.set_timesteps(5)
    assert made.init_noise_sigma == made.scheduler.init_noise_sigma and len(made.timesteps) == 5
    loaded = type(made).from_config(made.config)
    assert type(loaded.scheduler) is diffusers.EulerDiscreteScheduler


@EACH
def test_a_run_is_that_of_the_held_scheduler(name):
    for kind in (diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler, diffusers.HeunDiscreteScheduler):
        results = []
        for scheduler in (kind.from_config(ldm_scheduler().config), adapter(name, kind.from_config(
            ldm_scheduler().config))):  # fmt: skip
            generator = torch.Generator().manual_seed(0)
            scheduler.set_timesteps(6)
            sample = torch.randn(2, 3, 4, 4, generator=generator) * scheduler.init_noise_sigma
            arguments = step_arguments(scheduler, eta=1.0, generator=generator)
            for t in scheduler.timesteps:
                prediction = 0.9 * scheduler.scale_model_input(sample, t)
                sample = scheduler.step(prediction, t, sample, **arguments, return_dict=False)[0]
            noise = torch.randn(sample.shape, generator=generator)
            results.append((sample, scheduler.add_noise(sample, noise, scheduler.timesteps[1:2])))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@EACH
@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_signatures_are_those_of_the_held_scheduler(name, kind):
    """There diffusers' pipelines look for `eta`, `generator` and `timesteps`; what they miss they leave out, and then
    the same seed gives other images."""
    held = getattr(diffusers, kind)()
    made = adapter(name, adapter(name, held))
    for method in ("step", *(["set_timesteps"] if name == "NormalizedCFGScheduler" else [])):  # the other has its own
        taken = inspect.signature(getattr(held, method)).parameters
        shown = inspect.signature(getattr(made, method)).parameters
        assert set(taken) <= set(shown) and "inner" not in shown
        inherited = taken.keys() - inspect.signature(getattr(type(made), method)).parameters
        assert all(shown[one].default == taken[one].default for one in inherited)


def test_pipelines_of_diffusers_find_what_the_held_scheduler_takes():
    pipe, generator = diffusers.StableDiffusionPipeline, torch.Generator()
    for held in (diffusers.DDIMScheduler(), diffusers.DDPMScheduler(), diffusers.EulerDiscreteScheduler()):
        made = NormalizedCFGScheduler(held)
        found, wanted = (
            pipe.prepare_extra_step_kwargs(SimpleNamespace(scheduler=one), generator, 0.5) for one in (made, held)
        )
        assert found == wanted and found["generator"] is generator
    made.set_timesteps(timesteps=[900, 400])
    assert made.timesteps.tolist() == [900, 400]


def test_a_solver_made_of_an_adapters_config_holds_nothing(recwarn):
    """Its config keeps the value "scheduler", which diffusers would warn of if it were asked for as an attribute."""
    solver = diffusers.DPMSolverMultistepScheduler.from_config(NormalizedCFGScheduler(ldm_scheduler()).config)
    recwarn.clear()
    assert scheduler_chain(solver) == [solver] and scheduler_setting(solver, "beta_end") == 0.0195
    assert not [warning for warning in recwarn if "scheduler" in str(warning.message)]
