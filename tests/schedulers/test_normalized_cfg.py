"""Normalised guidance as a scheduler around others. Recorded numbers: tests/parity."""

import diffusers
import pytest
import torch

from diffusers_ext import NormalizedCFGScheduler, RespacedScheduler, normalized_guidance
from diffusers_ext.schedulers.gaussian import guided_step, ldm_scheduler

GENERATOR = torch.Generator().manual_seed(0)
COND, UNCOND, SAMPLE = (torch.randn(2, 3, 8, 8, generator=GENERATOR) for _ in range(3))
HELD = {
    "DDIM": lambda: diffusers.DDIMScheduler(),
    "DPM-Solver++": lambda: diffusers.DPMSolverMultistepScheduler(),
    "Euler": lambda: diffusers.EulerDiscreteScheduler(),
    "respaced": lambda: RespacedScheduler(sampler="ddim"),
}


@pytest.mark.parametrize("name", HELD)
def test_every_solver_gets_the_normalised_prediction(name):
    plain, guiding = HELD[name](), NormalizedCFGScheduler(HELD[name]())
    for scheduler in (plain, guiding):
        scheduler.set_timesteps(4)
    ours = theirs = SAMPLE
    for t in plain.timesteps:
        theirs = plain.step(normalized_guidance(COND, UNCOND, 4.0), t, theirs, return_dict=False)[0]
        ours, shown = guided_step(guiding, COND, UNCOND, 4.0, t, ours)
        assert torch.equal(shown, normalized_guidance(COND, UNCOND, 4.0))  # what callbacks make the clean image of
    assert torch.equal(ours, theirs)


def test_own_scale_options_and_a_plain_step():
    scheduler = NormalizedCFGScheduler(HELD["DDIM"](), guidance_scale=3.0, guidance_rescale=0.5, per_channel=True)
    scheduler.set_timesteps(4)
    t, plain = scheduler.timesteps[0], HELD["DDIM"]()
    plain.set_timesteps(4)
    mixed = normalized_guidance(COND, UNCOND, 3.0, guidance_rescale=0.5, per_channel=True)
    assert torch.equal(scheduler.step(COND, t, SAMPLE, UNCOND).prev_sample, plain.step(mixed, t, SAMPLE).prev_sample)
    assert torch.equal(scheduler.step(COND, t, SAMPLE).prev_sample, plain.step(COND, t, SAMPLE).prev_sample)


def test_a_learned_variance_stays_the_conditional_one():
    held = RespacedScheduler(variance_type="learned_range")
    scheduler = NormalizedCFGScheduler(held)
    scheduler.set_timesteps(4)
    t, noise = scheduler.timesteps[1], torch.zeros_like(SAMPLE)
    variance, other = torch.rand_like(COND), torch.rand_like(COND)
    found = scheduler.step(
        torch.cat([COND, variance], 1), t, SAMPLE, torch.cat([UNCOND, other], 1), 4.0, variance_noise=noise
    ).prev_sample
    mixed = torch.cat([normalized_guidance(COND, UNCOND, 4.0), variance], 1)
    assert torch.equal(found, held.step(mixed, t, SAMPLE, variance_noise=noise).prev_sample)


def test_saves_and_loads(tmp_path):
    scheduler = NormalizedCFGScheduler(ldm_scheduler(), guidance_scale=2.0, per_channel=True)
    scheduler.save_pretrained(tmp_path)
    loaded = NormalizedCFGScheduler.from_pretrained(tmp_path)
    assert dict(loaded.config) == dict(scheduler.config) and type(loaded.scheduler) is type(scheduler.scheduler)
    diffusers.EulerDiscreteScheduler(beta_end=0.03).save_pretrained(tmp_path / "euler")
    around = NormalizedCFGScheduler.from_pretrained(tmp_path / "euler")
    assert type(around.scheduler) is diffusers.EulerDiscreteScheduler and around.scheduler.config.beta_end == 0.03
    with pytest.raises(TypeError, match="`guidance_scale` must be a number, received 'high'"):
        NormalizedCFGScheduler(ldm_scheduler(), guidance_scale="high")
    with pytest.raises(ValueError, match="`guidance_scale` is nan: it must be finite"):
        NormalizedCFGScheduler(ldm_scheduler(), guidance_scale=float("nan"))
    with pytest.raises(ValueError, match="`guidance_rescale` is 2"):
        NormalizedCFGScheduler(ldm_scheduler(), guidance_rescale=2)
