"""ADM's sampler; the recorded traces of the original are in tests/parity (cdm)."""

import json
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import load_file

from diffusers_ext import RespacedScheduler
from diffusers_ext.schedulers.scheduling_respaced import adm_scheduler, respaced_timesteps

SAMPLE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
FAST27 = [
    0, 22, 44, 66, 88, 111, 133, 155, 177, 199, 200, 222, 244, 266, 288, 311, 333, 355, 377, 399, 400, 500, 599, 600,
    799, 800, 997,
]  # fmt: skip # piti.md, section 2


def test_respacing_of_the_fact_sheets():
    assert respaced_timesteps(1000, "fast27") == FAST27[::-1]
    assert respaced_timesteps(1000, "10,10,3,2,2")[1:] == FAST27[-2::-1]
    assert respaced_timesteps(1000, [10, 10, 3, 2, 2])[0] == 999
    assert len(respaced_timesteps(1000, "27")) == 27 and respaced_timesteps(1000, "27") != FAST27[::-1]
    assert respaced_timesteps(1000, "ddim25") == list(range(0, 1000, 40))[::-1]
    assert respaced_timesteps(10, "4,1") == [5, 4, 3, 1, 0]  # 0, 4/3, 8/3, 4; one step of a part is its first
    assert respaced_timesteps(11, "1,0") == [0] and respaced_timesteps(11, "0,1") == [6]  # the first part is longer
    assert respaced_timesteps(1000, np.int64(5)) == respaced_timesteps(1000, 5)


@pytest.mark.parametrize("total", [1000, 4000])
@pytest.mark.parametrize("count", [1, 2, 6, 10, 25, 27, 50, 100, 250, 500])
def test_one_part_is_linspace_of_diffusers(total, count):
    stock = DDPMScheduler(num_train_timesteps=total, timestep_spacing="linspace")
    stock.set_timesteps(count)
    assert count == 1 or respaced_timesteps(total, count) == stock.timesteps.tolist()


def test_a_schedule_is_evened_out_to_its_subset():
    """beta' = 1 - abar_k / abar_{k-1} of the subset: its products are abar again."""
    scheduler = adm_scheduler("linear", num_train_timesteps=400)
    scheduler.set_timesteps(timesteps=[399, 250, 249, 7])
    expected = scheduler.alphas_cumprod[torch.tensor([7, 249, 250, 399])]
    torch.testing.assert_close((1 - scheduler.respaced_betas).flip(0).cumprod(0), expected)
    assert scheduler.alphas_cumprod.dtype == scheduler.betas.dtype == torch.float64


def run(scheduler, predict, **arguments):
    generator = torch.Generator().manual_seed(1)
    sample = SAMPLE
    for t in scheduler.timesteps:
        sample = scheduler.step(predict(sample, t), t, sample, generator=generator, **arguments).prev_sample
    return sample


def imperfect(sample, t):
    return 0.8 * sample.roll(1, -1)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ancestral_steps_are_those_of_diffusers(schedule):
    ours = adm_scheduler(schedule)
    stock = DDPMScheduler.from_config(ours.config)
    ours.set_timesteps(20)
    stock.set_timesteps(timesteps=ours.timesteps.tolist())
    for t in ours.timesteps[:-1]:  # stock draws nothing for the last one
        noise = {"generator": torch.Generator().manual_seed(int(t))}
        expected = stock.step(imperfect(SAMPLE, t), t, SAMPLE, **noise).prev_sample
        noise = {"generator": torch.Generator().manual_seed(int(t))}
        actual = ours.step(imperfect(SAMPLE, t), t, SAMPLE, **noise).prev_sample
        torch.testing.assert_close(actual, expected, atol=2e-3, rtol=1e-3)  # float32 tables


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_steps_are_those_of_diffusers_on_its_grid(eta):
    ours = adm_scheduler("linear", sampler="ddim")
    stock = DDIMScheduler.from_config(ours.config, timestep_spacing="leading", steps_offset=0, clip_sample=True)
    ours.set_timesteps("ddim20")
    stock.set_timesteps(20)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    expected = run(stock, imperfect, eta=eta, use_clipped_model_output=True)
    torch.testing.assert_close(run(ours, imperfect, eta=eta), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
@pytest.mark.parametrize("respacing", [None, "7", "fast27", "5,2,1", "ddim10"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_exact_prediction_leads_to_the_image_on_any_list(sampler, respacing, prediction_type):
    scheduler = adm_scheduler(
        "cosine",
        sampler=sampler,
        timestep_respacing=respacing,
        prediction_type=prediction_type,
        variance_type="fixed_large",
    )
    scheduler.set_timesteps(None if respacing else 30)
    clean = SAMPLE.clamp(-1, 1)

    def predict(sample, t):
        signal, noise = scheduler.alphas_cumprod[t].sqrt().float(), (1 - scheduler.alphas_cumprod[t]).sqrt().float()
        epsilon = (sample - signal * clean) / noise
        return {"epsilon": epsilon, "sample": clean, "v_prediction": signal * epsilon - noise * clean}[prediction_type]

    torch.testing.assert_close(run(scheduler, predict), clean, atol=1e-3, rtol=0)


def test_steps_stop_at_the_level_of_their_successor():
    """DDIM with the exact noise keeps it: after each step the sample is q(x_s | x_0, noise), whatever the gaps."""
    scheduler = adm_scheduler("linear", sampler="ddim", clip_sample=False)
    scheduler.set_timesteps(timesteps=torch.tensor([950, 600, 599, 20]))
    clean, noise = SAMPLE.clamp(-1, 1), SAMPLE.flip(0)
    sample = scheduler.add_noise(clean, noise, torch.tensor([950, 950]))
    for t, after in zip(scheduler.timesteps, [600, 599, 20], strict=False):
        sample = scheduler.step(noise, t, sample).prev_sample
        torch.testing.assert_close(
            sample, scheduler.add_noise(clean, noise, torch.tensor(after)), atol=1e-4, rtol=1e-4
        )


def test_learned_variance():
    scheduler = adm_scheduler("linear", variance_type="learned_range")
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[3]
    small, large = (
        RespacedScheduler.from_config(scheduler.config, variance_type=kind) for kind in ("fixed_small", "fixed_large")
    )
    for fixed, v in ((small, -1.0), (large, 1.0)):
        fixed.set_timesteps(10)
        output = torch.cat([imperfect(SAMPLE, t), torch.full_like(SAMPLE, v)], dim=1)
        learned, expected = scheduler.reverse_step(output, t, SAMPLE), fixed.reverse_step(output[:, :3], t, SAMPLE)
        for ours, theirs in zip(learned, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    direct = RespacedScheduler.from_config(scheduler.config, variance_type="learned")
    direct.set_timesteps(10)
    assert torch.equal(direct.reverse_step(output, t, SAMPLE).log_variance, output[:, 3:])
    ddim = RespacedScheduler.from_config(scheduler.config, sampler="ddim")
    ddim.set_timesteps(10)
    a = ddim.step(output, t, SAMPLE).prev_sample
    assert torch.equal(a, ddim.step(torch.cat([output[:, :3], output[:, 3:] + 1], 1), t, SAMPLE).prev_sample)


def test_noise_is_drawn_from_generators_or_given():
    scheduler = adm_scheduler("linear")
    scheduler.set_timesteps(5)
    t, output = scheduler.timesteps[1], imperfect(SAMPLE, 0)
    drawn = scheduler.step(output, t, SAMPLE, generator=torch.Generator().manual_seed(4)).prev_sample
    noise = torch.randn(SAMPLE.shape, generator=torch.Generator().manual_seed(4))
    assert torch.equal(scheduler.step(output, t, SAMPLE, variance_noise=noise).prev_sample, drawn)
    each = [torch.Generator().manual_seed(seed) for seed in (4, 5)]
    per_sample = scheduler.step(output, t, SAMPLE, generator=each).prev_sample
    noise = torch.cat(
        [torch.randn((1, *SAMPLE.shape[1:]), generator=torch.Generator().manual_seed(s)) for s in (4, 5)]
    )
    assert torch.equal(scheduler.step(output, t, SAMPLE, variance_noise=noise).prev_sample, per_sample)
    last = scheduler.timesteps[-1]
    reverse = scheduler.reverse_step(output, last, SAMPLE)
    assert torch.equal(scheduler.step(output, last, SAMPLE, variance_noise=noise).prev_sample, reverse.mean)


def test_float64_tables_keep_digits_that_float32_loses():
    """The true noise at t = 0 of the cosine schedule with T = 4000, where 1 - abar is 4e-6."""
    scheduler = adm_scheduler("cosine", num_train_timesteps=4000, clip_sample=False)
    scheduler.set_timesteps(timesteps=[1, 0])
    clean, noise = SAMPLE.double(), SAMPLE.flip(0).double()
    abar = scheduler.alphas_cumprod[1]
    noisy = (abar.sqrt() * clean + (1 - abar).sqrt() * noise).float()
    found = scheduler.reverse_step(noise.float(), 1, noisy).pred_original_sample
    torch.testing.assert_close(found, SAMPLE, atol=1e-6, rtol=0)


def test_half_precision_and_forms_of_timestep():
    scheduler = adm_scheduler("cosine", sampler="ddim")
    scheduler.set_timesteps("5")
    t = scheduler.timesteps[2]
    expected = scheduler.step(imperfect(SAMPLE, t), t, SAMPLE)
    for form in (int(t), float(t), t[None]):
        assert torch.equal(scheduler.step(imperfect(SAMPLE, t), form, SAMPLE).prev_sample, expected.prev_sample)
    half = SAMPLE.bfloat16()
    previous, clean = scheduler.step(imperfect(half, t), t, half, return_dict=False)
    assert previous.dtype == clean.dtype == torch.bfloat16
    torch.testing.assert_close(previous.float(), expected.prev_sample, atol=0.05, rtol=0.05)
    assert scheduler.add_noise(half, half, torch.tensor([3, 5])).dtype == torch.bfloat16
    assert (
        scheduler.scale_model_input(SAMPLE, t) is SAMPLE and scheduler.init_noise_sigma == 1 and len(scheduler) == 1000
    )


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_a_step_asks_no_device_for_a_value(sampler):
    """On the meta device every such question is an error."""
    scheduler = adm_scheduler("cosine", sampler=sampler, variance_type="learned_range")
    scheduler.set_timesteps(5, device="meta")
    sample = SAMPLE.to("meta")
    for t in scheduler.timesteps:
        sample = scheduler.step(torch.cat([sample, sample], 1), t, sample, eta=0.5).prev_sample
    assert sample.is_meta and sample.shape == SAMPLE.shape


def test_saving_and_compatibles(tmp_path):
    scheduler = adm_scheduler(
        "linear", num_train_timesteps=4000, timestep_respacing="fast27", variance_type="learned_range", sampler="ddim"
    )
    scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["beta_start"] == 0.1 / 4000
    loaded = RespacedScheduler.from_pretrained(tmp_path)
    loaded.set_timesteps()
    assert loaded.timesteps.tolist() == respaced_timesteps(4000, "fast27")
    assert loaded.config.sampler == "ddim" and loaded.config.variance_type == "learned_range"
    names = {cls.__name__ for cls in scheduler.compatibles}
    assert {"DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "RespacedScheduler"} <= names
    for name in ("DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"):
        stock = getattr(diffusers, name).from_config(scheduler.config)
        torch.testing.assert_close(stock.alphas_cumprod.double(), scheduler.alphas_cumprod, atol=1e-5, rtol=1e-4)
        back = RespacedScheduler.from_config(stock.config)
        torch.testing.assert_close(back.alphas_cumprod, scheduler.alphas_cumprod)
    trained = RespacedScheduler(trained_betas=scheduler.betas.numpy())  # T is their number
    torch.testing.assert_close(trained.alphas_cumprod, scheduler.alphas_cumprod)
    trained.save_pretrained(tmp_path)
    loaded = RespacedScheduler.from_pretrained(tmp_path)
    assert loaded.config.num_train_timesteps == 4000 and loaded.betas.tolist() == trained.betas.tolist()


SCHEDULER = adm_scheduler("linear")
SCHEDULER.set_timesteps(timesteps=[900, 10])
REFUSED = {
    r"`beta_schedule` is 'sine': it must be one of": lambda: RespacedScheduler(beta_schedule="sine"),
    r"`beta_schedule` is 'sine': ADM has linear and cosine": lambda: adm_scheduler("sine"),
    r"`sampler` is 'euler'": lambda: RespacedScheduler(sampler="euler"),
    r"`variance_type` is 'small'": lambda: RespacedScheduler(variance_type="small"),
    r"`prediction_type` is 'flow'": lambda: RespacedScheduler(prediction_type="flow"),
    r"`clip_sample_range` is 0": lambda: RespacedScheduler(clip_sample_range=0),
    r"`num_train_timesteps` is 0": lambda: RespacedScheduler(num_train_timesteps=0),
    r"betas go from 0.0001 to 1.5": lambda: RespacedScheduler(beta_end=1.5),
    r"`timestep_respacing` is 'quick': expected counts": lambda: RespacedScheduler(timestep_respacing="quick"),
    r"`timestep_respacing` is 'ddim3,4'": lambda: respaced_timesteps(1000, "ddim3,4"),
    r"'ddim300': no whole stride .* near it are .*250": lambda: respaced_timesteps(1000, "ddim300"),
    r"'600,10': part 1 has 500 of 1000 steps, of which 600": lambda: respaced_timesteps(1000, "600,10"),
    r"'0,0': it keeps no step": lambda: respaced_timesteps(1000, "0,0"),
    r"`timestep_respacing` is '1001'": lambda: adm_scheduler().set_timesteps(1001),
    r"`num_inference_steps` is 3 and `timesteps` is given": lambda: adm_scheduler().set_timesteps(3, timesteps=[1]),
    r"whole numbers from 999 to 0, falling": lambda: adm_scheduler().set_timesteps(timesteps=[3, 3]),
    r"\[1000.0, 3.0\]": lambda: adm_scheduler().set_timesteps(timesteps=[1000, 3]),
    r"\[2.5\]": lambda: adm_scheduler().set_timesteps(timesteps=[2.5]),
    r"`timestep` is 899, which is not one of the 2 steps .*900, 10": lambda: SCHEDULER.step(SAMPLE, 899, SAMPLE),
    r"`eta` is 1.5": lambda: SCHEDULER.step(SAMPLE, 900, SAMPLE, eta=1.5),
    r"`variance_noise` has shape": lambda: SCHEDULER.step(SAMPLE, 900, SAMPLE, variance_noise=SAMPLE[:1]),
    r"`model_output` has shape \(2, 6, 4, 4\).*'fixed_small' it has 3": lambda: SCHEDULER.step(
        torch.cat([SAMPLE, SAMPLE], 1), 900, SAMPLE
    ),
}


def test_half_a_step_is_refused():
    with pytest.raises(TypeError, match="`num_inference_steps` must be an integer or a respacing, received 2.5"):
        adm_scheduler().set_timesteps(2.5)


@pytest.mark.parametrize("message", REFUSED)
def test_refuses(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


TRACES = sorted((Path(__file__).parents[1] / "parity" / "cases" / "piti").glob("trace_*"))


@pytest.mark.parametrize("folder", TRACES, ids=[folder.name for folder in TRACES])
def test_steps_recorded_from_glide_and_piti(folder):
    facts, recorded = json.loads((folder / "case.json").read_text()), load_file(folder / "io.safetensors")
    scheduler = adm_scheduler(
        "linear" if facts["noise_schedule"] == "linear" else "cosine",
        timestep_respacing=facts["timestep_respacing"],
        variance_type="learned_range",
    )
    scheduler.set_timesteps()
    assert scheduler.timesteps.flip(0).tolist() == recorded["timestep_map"].tolist()
    torch.testing.assert_close(scheduler.respaced_betas.flip(0), recorded["betas"], rtol=1e-12, atol=1e-15)
    for k, t in enumerate(scheduler.timesteps if "model_out" in recorded else []):
        output, before = recorded["model_out"][k], recorded["x_t"][k]
        found = scheduler.step(output, t, before, variance_noise=recorded["noise"][k])
        torch.testing.assert_close(found.prev_sample, recorded["x_prev"][k], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found.pred_original_sample, recorded["pred_xstart"][k], atol=1e-6, rtol=1e-6)


def test_the_page_of_the_family_runs():
    """The lines of docs/cascaded_diffusion.md about the network and the sampler."""
    page = (Path(__file__).parents[2] / "docs" / "cascaded_diffusion.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    names: dict = {}
    for block in blocks:
        if "from_pretrained" in block or "CascadedDiffusionPipeline" in block:
            continue  # tests/test_readme.py runs all blocks
        exec(compile(block, "cascaded_diffusion.md", "exec"), names)
    assert names["output"].shape == (2, 6, 32, 32) and names["scheduler"].timesteps.tolist() == [900, 600, 599, 20]
