"""The terms of the two-stage bound against torch's own Gaussians, on tiny networks over all timesteps."""

import json
import math
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from pipelines.tiny_cascaded import tiny_base, tiny_upscale
from torch.distributions import Normal, kl_divergence

from diffusers_ext.schedulers.scheduling_respaced import adm_scheduler
from diffusers_ext.schedulers.scheduling_truncated_conditioning import TruncatedConditioningScheduler

T, LEVEL = 6, 2


@pytest.fixture(scope="module")
def script(repo_root) -> SimpleNamespace:
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        return SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / "quality_cascaded_likelihood.py")))
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))


def stages(variance: str):
    scheduler = adm_scheduler("cosine", num_train_timesteps=T, variance_type=variance)
    noise = TruncatedConditioningScheduler(adm_scheduler("cosine", num_train_timesteps=T))
    unet = {"out_channels": 6 if variance == "learned_range" else 3}
    base = tiny_base(unet=unet, scheduler=scheduler)
    options = {"scheduler": scheduler, "conditioning_scheduler": noise, "default_noise_level": LEVEL}
    return base, tiny_upscale(1, unet=unet, **options)


def eight_bits(images):
    return (255 * (images / 2 + 0.5)).round() / 255 * 2 - 1


def direct(stage, clean, generator, first, labels, low=None, level=None):
    """The terms of one stage from the definitions, in bits of an image (n,)."""
    scheduler, total = stage.scheduler, torch.zeros(len(clean), dtype=torch.float64)
    scheduler.set_timesteps(T)
    abar = (1 - scheduler.betas).cumprod(0)
    for t in range(first, T):
        noise = torch.randn(clean.shape, generator=generator)
        noisy = abar[t].sqrt().float() * clean + (1 - abar[t]).sqrt().float() * noise
        output = stage.unet(noisy, t, labels, low, level).sample
        model = scheduler.reverse_step(output, t, noisy)
        p = Normal(model.mean.double(), (model.log_variance.double() / 2).exp())
        if t > 0:
            before, beta = abar[t - 1], scheduler.betas[t]
            mean = before.sqrt() * beta / (1 - abar[t]) * clean.double()
            mean = mean + (1 - beta).sqrt() * (1 - before) / (1 - abar[t]) * noisy.double()
            q = Normal(mean, (beta * (1 - before) / (1 - abar[t])).sqrt())
            term = kl_divergence(q, p)
        else:  # of 8-bit levels, the outermost without end
            upper = torch.where(clean > 0.999, 1.0, p.cdf(clean.double() + 1 / 255))
            lower = torch.where(clean < -0.999, 0.0, p.cdf(clean.double() - 1 / 255))
            term = -(upper - lower).clamp(min=1e-12).log()
        total += term.flatten(1).sum(1) / math.log(2)
    prior = kl_divergence(Normal(abar[-1].sqrt() * clean.double(), (1 - abar[-1]).sqrt()), Normal(0.0, 1.0))
    return prior.flatten(1).sum(1) / math.log(2), total


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
@pytest.mark.parametrize("level", [LEVEL, 0])
@torch.no_grad()
def test_the_terms_are_those_of_the_definition(script, variance, level):
    base, upscaler = stages(variance)
    draw = torch.Generator().manual_seed(0)
    large = eight_bits(torch.rand(1, 3, 16, 16, generator=draw) * 2 - 1)
    small = eight_bits(torch.nn.functional.interpolate(large, (8, 8), mode="area"))
    found = script.two_stage_bound(base, upscaler, large, [1], level, [torch.Generator().manual_seed(5)])

    generator, size, labels = torch.Generator().manual_seed(5), large[0].numel(), torch.tensor([1])
    prior, kept = direct(base, small, generator, level, labels)
    low = upscaler.encode_low_res(small, [1], level=level, generator=generator).low_res
    own_prior, own = direct(upscaler, large, generator, 0, labels, low, torch.tensor([float(level)]))
    assert torch.allclose(found.prior.double(), prior / size, rtol=1e-4, atol=1e-8)
    # the likelihood of levels is ADM's approximation of the normal distribution
    rough = 2e-2 if level == 0 else 1e-4
    assert torch.allclose(found.base.double(), kept / size, rtol=rough)
    assert torch.allclose(found.upscaler.double(), (own_prior + own) / size, rtol=2e-2)
    assert torch.equal(found.total, found.prior + found.base + found.upscaler)


def test_parts_of_the_schedule_stand_for_all_of_it(script):
    generators = [torch.Generator().manual_seed(seed) for seed in range(500)]
    found = script.drawn_timesteps(3, 13, 4, generators)
    assert [count for _, count in found] == [2, 3, 2, 3] and sum(count for _, count in found) == 10
    assert [(int(t.min()), int(t.max())) for t, _ in found] == [(3, 4), (5, 7), (8, 9), (10, 12)]
    assert [t.tolist() for t, _ in script.drawn_timesteps(4, 6, 0, generators[:1])] == [[4], [5]]
    assert script.drawn_timesteps(6, 6, 0, generators) == []
    # a function of the timestep, summed over parts, is its sum over all in the mean
    mean = sum(count * (t.double() ** 2).mean() for t, count in found)
    assert float(mean) == pytest.approx(sum(t**2 for t in range(3, 13)), rel=0.02)


def test_the_command(script, tmp_path, capsys):
    base, upscaler = stages("fixed_small")
    options = {"scheduler": base.scheduler, "conditioning_scheduler": upscaler.conditioning_scheduler}
    names = {"num_class_embeds": 49, "null_class": 48}
    base = tiny_base(unet={"sample_size": 16, "out_channels": 3} | names, scheduler=base.scheduler, class_names=None)
    upscaler = tiny_upscale(
        1,
        unet={"sample_size": 32, "out_channels": 3} | names,
        class_names=None,
        low_res_size=16,
        default_noise_level=LEVEL,
        **options,
    )
    base.save_pretrained(tmp_path / "base")
    upscaler.save_pretrained(tmp_path / "upscaler")
    words = [str(tmp_path / "base"), str(tmp_path / "upscaler"), "--num_cases", "3", "--batch_size", "2"]
    script.main([*words, "--levels", "0", "3", "--json", str(tmp_path / "all.json"), "--num_timesteps", "0"])
    rows = json.loads((tmp_path / "all.json").read_text())
    assert [row["level"] for row in rows] == [0, 3]
    assert all(row["total"] == pytest.approx(row["prior"] + row["base"] + row["upscaler"]) for row in rows)
    assert rows[0]["base"] > rows[1]["base"] > 0  # fewer terms above a higher level
    told = capsys.readouterr().out
    assert "3 held-out images of 32 pixels, all timesteps" in told and told.count("\n| ") == 3
    script.main([*words, "--num_timesteps", "2"])
    assert f"\n| {LEVEL} | " in capsys.readouterr().out


def test_bad_input(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.parse_args([str(tmp_path), str(tmp_path)])
    assert "is no pipeline folder" in capsys.readouterr().err
    base, upscaler = stages("fixed_small")
    base = tiny_base(scheduler=adm_scheduler("cosine", prediction_type="v_prediction"), unet={"out_channels": 3})
    base.save_pretrained(tmp_path / "base")
    upscaler.save_pretrained(tmp_path / "upscaler")
    with pytest.raises(SystemExit, match="`prediction_type` is 'v_prediction'; the bound needs epsilon"):
        script.main([str(tmp_path / "base"), str(tmp_path / "upscaler")])
