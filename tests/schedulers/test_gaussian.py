"""What the pipelines ask of a Gaussian scheduler, over all that diffusers and this library have."""

import inspect

import diffusers
import pytest
import torch
from diffusers.utils.dummy_pt_objects import DummyObject

import diffusers_ext
from diffusers_ext.pipelines.checks import check_timesteps
from diffusers_ext.schedulers.gaussian import (
    check_gaussian_scheduler,
    guided_step,
    ldm_scheduler,
    scheduler_attribute,
    scheduler_setting,
    set_steps,
    signal_and_noise,
    step_arguments,
)

NAMES = sorted(
    name
    for name in {*dir(diffusers), *diffusers_ext.__all__}  # after the import above, diffusers has ours as well
    if "Scheduler" in name
    and inspect.isclass(cls := getattr(diffusers, name))
    and not isinstance(cls, DummyObject)  # of packages that are not installed
    and issubclass(cls, diffusers.SchedulerMixin)
    and hasattr(cls, "step")
    and cls.__module__.startswith("diffusers.")
)
SOUND = {  # those that users swap in
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler",
    "LCMScheduler", "TCDScheduler", "SASolverScheduler", "RespacedScheduler",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_schedulers_are_refused_or_lead_to_the_picture(name):
    """With the exact prediction for one clean picture, an accepted scheduler ends at it."""
    own = ldm_scheduler()
    try:
        scheduler = getattr(diffusers, name).from_config(own.config)
    except (TypeError, ValueError, ImportError):  # does not take such a config
        assert name not in SOUND
        return
    try:
        check_gaussian_scheduler(scheduler, "APipeline")
        scheduler.set_timesteps(25)
        check_timesteps(scheduler, 25)
    except ValueError as error:
        assert name not in SOUND and name in str(error) and "from_pretrained(<checkpoint>" in str(error)
        return
    clean, generator = torch.full((1, 1, 8, 8), 0.5), torch.Generator().manual_seed(0)
    latents = torch.randn(clean.shape, generator=generator) * scheduler.init_noise_sigma
    arguments = step_arguments(scheduler, eta=0.0, generator=generator)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, t)
        signal, noise = signal_and_noise(own, t)
        latents = scheduler.step((scaled - signal * clean) / noise, t, latents, **arguments, return_dict=False)[0]
    assert (
        latents - clean
    ).abs().mean() < 0.05  # the last step of some goes to timestep 0, where 0.04 of noise is left


SPACED = [
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "SASolverScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
]


@pytest.mark.parametrize(("spacing", "held"), [("use_karras_sigmas", True), ("use_exponential_sigmas", False)])
@pytest.mark.parametrize("name", SPACED)
def test_other_spacings_lead_to_the_picture_from_cosine_betas(name, spacing, held):
    """Of their timesteps the first ones may be the same: the sampler still begins with the first of them."""
    inner = getattr(diffusers, name)(beta_schedule="squaredcos_cap_v2", **{spacing: True})
    scheduler = diffusers_ext.NormalizedCFGScheduler(inner) if held else inner
    set_steps(scheduler, 15, "cpu")
    clean, generator = torch.full((1, 1, 8, 8), 0.5), torch.Generator().manual_seed(0)
    latents = torch.randn(clean.shape, generator=generator) * scheduler.init_noise_sigma
    arguments = step_arguments(scheduler, generator=generator)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, t)
        signal, noise = signal_and_noise(scheduler, t)
        latents = scheduler.step((scaled - signal * clean) / noise, t, latents, **arguments, return_dict=False)[0]
    assert (latents - clean).abs().mean() < 0.05


class Holder:
    """An adapter without a config entry of its own but the inner one."""

    def __init__(self, scheduler):
        self.scheduler = scheduler
        self.config = {"scheduler": dict(scheduler.config)}

    def step(self, model_output, timestep, sample, **inner):
        return self.scheduler.step(model_output, timestep, sample, **inner)


def test_what_an_adapter_holds_is_found():
    inner = ldm_scheduler()
    held = Holder(Holder(inner))
    wanted = {"eta": 1.0, "generator": None}
    assert step_arguments(held, **wanted) == wanted
    assert step_arguments(Holder(diffusers.PNDMScheduler()), **wanted) == {}
    assert step_arguments(Holder(diffusers.DDPMScheduler()), **wanted) == {"generator": None}
    assert scheduler_setting(held, "num_train_timesteps") == 1000
    assert scheduler_setting(held, "no_such", 3) == 3
    assert scheduler_attribute(held, "alphas_cumprod") is inner.alphas_cumprod
    check_gaussian_scheduler(held, "APipeline")
    with pytest.raises(ValueError, match="`scheduler` is a Holder, which has no `alphas_cumprod`"):
        check_gaussian_scheduler(Holder(diffusers.EDMEulerScheduler()), "APipeline")
    open_step = type("Open", (), {"step": lambda self, model_output, timestep, sample, **rest: None})()
    assert step_arguments(open_step, **wanted) == wanted


class Guiding(Holder):
    """Takes both predictions, and a generator through the scheduler that it holds."""

    def step(self, model_output, timestep, sample, model_output_uncond=None, guidance_scale=None, **inner):
        self.got = (model_output, model_output_uncond, guidance_scale)
        return self.scheduler.step(model_output, timestep, sample, **inner)


@pytest.mark.parametrize("wrap", [lambda inner: inner, Holder, Guiding, lambda inner: Holder(Guiding(inner))])
def test_both_predictions_go_to_a_scheduler_that_guides(wrap):
    cond, uncond, sample = torch.randn(3, 1, 4, 2, 2)
    inner = ldm_scheduler()
    inner.set_timesteps(4)
    t = inner.timesteps[1]
    scheduler = wrap(inner)
    after, guided = guided_step(scheduler, cond, uncond, 3.0, t, sample, channels=3, eta=0.0)
    torch.testing.assert_close(guided[:, :3], uncond[:, :3] + 3 * (cond - uncond)[:, :3])
    assert torch.equal(guided[:, 3:], cond[:, 3:])
    guiding = next((one for one in (scheduler, getattr(scheduler, "scheduler", None)) if hasattr(one, "got")), None)
    output = guided if guiding is None else cond
    assert torch.equal(after, inner.step(output, t, sample, return_dict=False)[0])
    if guiding is not None:
        assert guiding.got[1] is uncond and guiding.got[2] == 3.0
        alone, _ = guided_step(scheduler, cond, None, 3.0, t, sample)
        assert guiding.got == (cond, None, None) and torch.equal(alone, after)
