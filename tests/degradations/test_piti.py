"""PITI's degradation: light BSR without the last JPEG, with L0 smoothing in the slot of the camera model."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from diffusers_ext.data.scenes import render, sample_scene
from diffusers_ext.degradations import bsr
from diffusers_ext.degradations.bsr import apply_bsr_plan, degrade_bicubic, degrade_piti, draw_piti_plan
from diffusers_ext.degradations.l0 import l0_smooth
from diffusers_ext.evaluation.image_quality import psnr

PICTURE = torch.from_numpy(render(sample_scene(0, 5), 64)).permute(2, 0, 1).float() / 127.5 - 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plans(count: int = 1500, scale: int = 4, l0_prob: float = 0.2) -> list[bsr.BSRPlan]:
    one = generator()
    return [draw_piti_plan(scale, one, l0_prob=l0_prob) for _ in range(count)]


def kinds(plan: bsr.BSRPlan) -> list[str]:
    return ["Down" if type(step).__name__ in ("Shrink", "Stride") else type(step).__name__ for step in plan.steps]


def test_slots_probabilities_and_their_order():
    drawn = plans()
    counts = [Counter(kinds(plan)) for plan in drawn]
    assert all(c["Noise"] == c["Fit"] == 1 >= max(c["Blur"], c["Jpeg"], c["Smooth"]) for c in counts)
    for kind, share in (("Blur", 0.8), ("Jpeg", 0.5), ("Smooth", 0.2)):
        assert sum(c[kind] for c in counts) / len(drawn) == pytest.approx(share, abs=0.04)
    assert sum(c["Down"] == 2 for c in counts) / len(drawn) == pytest.approx(0.25, abs=0.04)  # halved before
    first, last = Counter(kinds(plan)[-1] for plan in drawn), Counter(kinds(plan)[0] for plan in drawn)
    assert {"Fit", "Noise", "Blur", "Jpeg", "Smooth"} <= set(first) and set(last) <= set(first) | {"Down"}
    strengths = [step.strength for plan in drawn for step in plan.steps if isinstance(step, bsr.Smooth)]
    assert 1.2e-3 <= min(strengths) < 1.3e-3 and 3.8e-3 < max(strengths) <= 4e-3
    assert {step.quality for plan in drawn for step in plan.steps if isinstance(step, bsr.Jpeg)} == set(range(80, 96))


def test_smoothing_comes_before_and_after_the_downsampling():
    """Both orders are drawn, and give different pictures."""
    smoothed = [plan for plan in plans() if "Smooth" in kinds(plan)]
    before = [plan for plan in smoothed if kinds(plan).index("Smooth") < kinds(plan).index("Fit")]
    assert 0.2 < len(before) / len(smoothed) < 0.8
    down = (bsr.Shrink(4.0, "area"), bsr.Fit(4, "area"))
    large = apply_bsr_plan(PICTURE, bsr.BSRPlan(4, (bsr.Smooth(4e-3), *down)))
    small = apply_bsr_plan(PICTURE, bsr.BSRPlan(4, (*down, bsr.Smooth(4e-3))))
    assert (large - small).abs().max() > 0.02
    plain = apply_bsr_plan(PICTURE, bsr.BSRPlan(4, down))
    expected = l0_smooth(plain, 4e-3).clamp(-1, 1)
    torch.testing.assert_close(small, expected, atol=1.5 / 127.5, rtol=0)  # of 8-bit levels, twice
    assert large.diff().abs().mean() < plain.diff().abs().mean() > small.diff().abs().mean()


def test_without_smoothing_all_else_is_drawn_as_with_it():
    for with_l0, without in zip(plans(200), plans(200, l0_prob=0.0), strict=True):
        rest = tuple(step for step in with_l0.steps if not isinstance(step, bsr.Smooth))
        assert without == replace(with_l0, steps=rest)
    assert all("Smooth" in kinds(plan) for plan in plans(20, l0_prob=1.0))


@pytest.mark.parametrize(("scale", "size"), [(4, (64, 64)), (4, (16, 40)), (2, (64, 64)), (2, (10, 6)), (4, (4, 4))])
def test_sizes_ranges_and_determinism(scale, size):
    image = torch.nn.functional.interpolate(PICTURE[None], size)[0]
    before = image.clone()
    for seed in range(8):
        low = degrade_piti(image, scale, generator(seed), l0_prob=0.5)
        assert low.shape == (3, size[0] // scale, size[1] // scale) and low.dtype == torch.float32
        assert low.min() >= -1 and low.max() <= 1
        torch.testing.assert_close((low + 1) * 127.5, ((low + 1) * 127.5).round(), atol=1e-3, rtol=0)
        assert torch.equal(low, degrade_piti(image, scale, generator(seed), l0_prob=0.5))
        assert torch.equal(low, apply_bsr_plan(image, draw_piti_plan(scale, generator(seed), l0_prob=0.5)))
    assert torch.equal(image, before)


@pytest.mark.parametrize("scale", [2, 4])
def test_no_picture_turns_black(scale):
    """The released code's smoothing gave black pictures in 11 of 40 cases."""
    pictures = [torch.from_numpy(render(sample_scene(i, 5), 64)).permute(2, 0, 1) / 127.5 - 1 for i in range(40)]
    for seed, picture in enumerate(pictures):
        low = degrade_piti(picture, scale, generator(seed), l0_prob=0.8)
        bicubic = degrade_bicubic(picture, scale)
        assert (low.mean((1, 2)) - bicubic.mean((1, 2))).abs().max() < 0.12
        assert psnr(low[None], bicubic[None]) > 14


def test_rejects():
    with pytest.raises(ValueError, match=r"`l0_prob` is 1\.5: it must lie between 0 and 1"):
        degrade_piti(PICTURE, 4, generator(), l0_prob=1.5)
    with pytest.raises(ValueError, match=r"`image` is 64x63 pixels .*: crop it to 64x60"):
        degrade_piti(PICTURE[:, :63], 4, generator())
    with pytest.raises(TypeError, match=r"`generator` is int: it must be a torch\.Generator"):
        degrade_piti(PICTURE, 4, 0)
