"""Stopping at a level of noise, over all samplers of diffusers, and noising to one, against the closed form."""

import warnings

import diffusers
import numpy as np
import pytest
import torch
from noise_levels import scaled_linear_betas
from schedulers.test_gaussian import NAMES

from diffusers_ext import TruncatedConditioningScheduler
from diffusers_ext.schedulers.gaussian import check_gaussian_scheduler, signal_and_noise, step_arguments
from diffusers_ext.schedulers.scheduling_truncated_conditioning import ANYWHERE, ON_THE_GRID

STD = 0.3  # of the data: Gaussian, so that the exact prediction is known


def ddpm(**changes):
    return diffusers.DDPMScheduler(
        **{"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False} | changes
    )


def of_kind(name, **changes):
    cls = getattr(diffusers, name)
    return cls.from_config({**ddpm().config, "_class_name": "DDPMScheduler"}, **changes)


def run(scheduler, seed=0, pixels=200):
    """Samples of a network that predicts the noise exactly."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(1, 1, pixels, pixels, generator=generator) * float(scheduler.init_noise_sigma)
    arguments = step_arguments(scheduler, eta=0.0, generator=generator)
    for t in scheduler.timesteps:
        signal, noise = signal_and_noise(scheduler, t)
        scaled = scheduler.scale_model_input(sample, t)
        prediction = noise / (signal**2 * STD**2 + noise**2) * scaled
        sample = scheduler.step(prediction, t, sample, **arguments, return_dict=False)[0]
    return sample


def wanted_std(scheduler, level):
    signal, noise = signal_and_noise(scheduler, torch.tensor(level - 1.0))
    return (signal**2 * STD**2 + noise**2) ** 0.5


@pytest.mark.parametrize("name", NAMES)
def test_samplers_stop_with_the_noise_of_the_level_or_are_refused(name):
    """The measured table of the module: all of ON_THE_GRID, and no other that could sample at all."""
    try:
        inner = of_kind(name)
        check_gaussian_scheduler(inner, "APipeline")
        inner.set_timesteps(25)
    except (TypeError, ValueError, ImportError):
        assert name not in ON_THE_GRID
        return
    scheduler = TruncatedConditioningScheduler(inner)
    if name not in ON_THE_GRID:
        with pytest.raises(ValueError, match=f"{name} cannot stop at a level of noise.*DPMSolverMultistepScheduler"):
            scheduler.set_timesteps(25, stop_level=400)
        scheduler.set_timesteps(25)  # sampling to the end is none of the adapter's business
        return
    scheduler.set_timesteps(25)
    levels = scheduler.valid_stop_levels()
    assert len(levels) >= 12 and levels[-1] == 0
    for level in (levels[len(levels) // 3], levels[len(levels) * 2 // 3]):
        scheduler.set_timesteps(25, stop_level=level)
        found, wanted = float(scheduler.to_vp(run(scheduler)).std()), wanted_std(scheduler, level)
        assert found == pytest.approx(wanted, rel=0.03), (level, found, wanted)


@pytest.mark.parametrize("name", sorted(ANYWHERE - {"RespacedScheduler"}))
def test_samplers_that_run_any_list_stop_at_any_level(name):
    scheduler = TruncatedConditioningScheduler(of_kind(name))
    for level in (251, 502, 777):
        scheduler.set_timesteps(20, stop_level=level)
        assert scheduler.stop_level == level and float(scheduler.timesteps[-1]) >= level
        assert float(scheduler.to_vp(run(scheduler)).std()) == pytest.approx(wanted_std(scheduler, level), rel=0.03)
    with pytest.raises(
        ValueError, match=r"`stop_level` is 1000, 40.5, where .*, 0, and at any whole level up to 9\d\d"
    ):
        scheduler.set_timesteps(20, stop_level=[1000, 251, 40.5])


@pytest.mark.parametrize("name", sorted(ON_THE_GRID - ANYWHERE))
def test_stops_off_the_grid_are_refused_with_the_valid_ones(name):
    scheduler = TruncatedConditioningScheduler(of_kind(name))
    scheduler.set_timesteps(10)
    valid = scheduler.valid_stop_levels()
    with pytest.raises(ValueError, match=rf"`stop_level` is 502.5, where {name} does not stop .*{valid[1]}.*, 0\."):
        scheduler.set_timesteps(10, stop_level=502.5)
    for level in (1000, valid[0] + 1):  # nothing would be run
        with pytest.raises(ValueError, match=rf"`stop_level` is {level}, where"):
            scheduler.set_timesteps(10, stop_level=level)


def test_spacings_that_the_sampler_does_not_keep_to_are_refused():
    """DDIM steps down by T // n: with "linspace" these are not the timesteps of its list."""
    scheduler = TruncatedConditioningScheduler(of_kind("DDIMScheduler", timestep_spacing="linspace"))
    scheduler.set_timesteps(20)
    level = float(scheduler.timesteps[10]) + 1
    with pytest.raises(ValueError, match="DDIMScheduler does not stop with these steps"):
        scheduler.set_timesteps(20, stop_level=level)
    scheduler = TruncatedConditioningScheduler(of_kind("DPMSolverMultistepScheduler", use_karras_sigmas=True))
    with pytest.raises(ValueError, match="does not stop with these steps.*karras"):
        scheduler.set_timesteps(20, stop_level=502)


def test_a_stop_on_the_grid_is_the_whole_run_cut_off():
    for name in ("DDPMScheduler", "DDIMScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"):
        whole = of_kind(name)
        whole.set_timesteps(10)
        kept, level = whole.timesteps[:6].clone(), float(whole.timesteps[6]) + 1
        scheduler = TruncatedConditioningScheduler(of_kind(name))
        scheduler.set_timesteps(10, stop_level=[level, 0])
        finished = run(scheduler)
        seen = scheduler.captured[level]
        assert torch.equal(finished, run(whole)) and torch.equal(finished, scheduler.captured[0])
        scheduler.set_timesteps(10, stop_level=level)
        assert torch.equal(scheduler.timesteps, kept) and torch.equal(run(scheduler), seen)
        assert scheduler.captured == {}  # one level is the result itself


def test_several_levels_are_captured_in_one_pass():
    scheduler = TruncatedConditioningScheduler(ddpm())
    scheduler.set_timesteps(25, stop_level=[101, 801, 402])
    result = run(scheduler)
    assert sorted(scheduler.captured) == [101, 402, 801] and scheduler.stop_level == 101
    assert torch.equal(scheduler.captured[101], result)
    for level, sample in scheduler.captured.items():
        assert float(sample.std()) == pytest.approx(wanted_std(scheduler, level), rel=0.03)
    euler = TruncatedConditioningScheduler(of_kind("EulerDiscreteScheduler"))
    euler.set_timesteps(25, stop_level=[402, 0])
    finished = run(euler)
    assert float(euler.captured[402].std()) == pytest.approx(wanted_std(euler, 402), rel=0.03)  # as to_vp gives it
    assert torch.equal(euler.captured[0], finished)


def test_config_says_where_to_stop_and_the_call_overrides_it():
    scheduler = TruncatedConditioningScheduler(ddpm(), stop_level=251)
    scheduler.set_timesteps(10)
    assert scheduler.stop_level == 251 and int(scheduler.timesteps[-1]) >= 251
    scheduler.set_timesteps(10, stop_level=0)
    assert scheduler.stop_level == 0 and len(scheduler.timesteps) == 10
    scheduler.set_timesteps(timesteps=[900, 600, 300, 0], stop_level=301)
    assert scheduler.timesteps.tolist() == [900, 600]
    scheduler.timesteps = torch.tensor([5, 3])
    assert scheduler.timesteps.tolist() == [5, 3]


def closed_form(clean, noise, level):
    abar = np.cumprod(1 - scaled_linear_betas(0.0015, 0.0195).numpy())
    ratio = np.interp(level, np.arange(1001), np.concatenate([[0.0], np.sqrt((1 - abar) / abar)]))
    return torch.from_numpy(clean.numpy() / np.sqrt(1 + ratio**2) + noise.numpy() * ratio / np.sqrt(1 + ratio**2))


@pytest.mark.parametrize("level", [0, 0.25, 1, 251, 500.75, 1000])
def test_corruption_is_the_closed_form(level):
    scheduler, generator = TruncatedConditioningScheduler(ddpm()), torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 2, 3, 4, 4, generator=generator).unbind()
    found = scheduler.corrupt(clean, level, noise=noise)
    torch.testing.assert_close(found.double(), closed_form(clean, noise, level).double(), atol=2e-6, rtol=0)
    if level == int(level) and level > 0:  # and what diffusers does
        timestep = torch.tensor([int(level) - 1])
        torch.testing.assert_close(found, scheduler.add_noise(clean, noise, timestep), atol=2e-6, rtol=0)
    abar = float(scheduler.alphas_cumprod_at(level))
    assert float(found.sub(clean * abar**0.5).std() / max((1 - abar) ** 0.5, 1e-9)) == pytest.approx(
        float(noise.std()) if level else 0.0, abs=2e-3
    )


def test_corruption_takes_a_level_and_a_generator_a_sample():
    scheduler = TruncatedConditioningScheduler(ddpm())
    clean = torch.randn(3, 3, 4, 4)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = scheduler.corrupt(clean, torch.tensor([0, 12.5, 1000]), generator=tuple(seeds))
    for index, level in enumerate((0, 12.5, 1000)):
        alone = scheduler.corrupt(clean[index : index + 1], level, generator=[torch.Generator().manual_seed(index)])
        torch.testing.assert_close(together[index : index + 1], alone)
    assert scheduler.corrupt(clean, 0) is clean
    half = scheduler.corrupt(clean.half(), 500, noise=torch.zeros(3, 3, 4, 4))
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), clean * float(scheduler.alphas_cumprod_at(500)) ** 0.5, atol=2e-3, rtol=0)


def test_no_signal_at_all_is_pure_noise():
    scheduler = TruncatedConditioningScheduler(ddpm(rescale_betas_zero_snr=True))
    noise = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(scheduler.corrupt(torch.ones(1, 3, 4, 4), 1000, noise=noise), noise)


@pytest.mark.parametrize(
    ("level", "error", "message"),
    [
        (-1, ValueError, r"is -1: it must lie between 0 \(clean\) and 1000"),
        (1001, ValueError, "is 1001: it must lie"),
        (float("nan"), ValueError, "is nan: it must lie"),
        ("251", TypeError, "must be a number of steps of noise, received '251'"),
        (True, TypeError, "must be a number of steps of noise, received True"),
        ([], ValueError, "`stop_level` is an empty list"),
    ],
)
def test_bad_levels_are_refused(level, error, message):
    scheduler = TruncatedConditioningScheduler(ddpm())
    with pytest.raises(error, match=message):
        scheduler.set_timesteps(10, stop_level=level)
    if level != []:
        with pytest.raises(error, match=message):
            scheduler.corrupt(torch.zeros(1, 3, 4, 4), level)
        with pytest.raises(error, match=message):
            TruncatedConditioningScheduler(ddpm(), stop_level=level)


def test_bad_tensors_of_levels_and_noise_are_refused():
    scheduler, clean = TruncatedConditioningScheduler(ddpm()), torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"`level` has shape \(3,\): pass one number, or one a sample \(2,\)"):
        scheduler.corrupt(clean, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"`level` is \[1.0, 2000.0\]: levels lie between"):
        scheduler.corrupt(clean, torch.tensor([1, 2000]))
    with pytest.raises(ValueError, match=r"`noise` has shape \(1, 3, 4, 4\); that of `sample` is \(2, 3, 4, 4\)"):
        scheduler.corrupt(clean, 5, noise=clean[:1])


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TruncatedConditioningScheduler(ddpm()).set_timesteps(10, stop_level=251)


def test_noise_needs_levels():
    flow = TruncatedConditioningScheduler(diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no `alphas_cumprod`"):
        flow.corrupt(torch.zeros(1, 3, 4, 4), 3)
