"""Degradations: the plan's numbers lie where section 3.4 of the recipe says, and applying it is a function of it."""

import io
import math
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from diffusers_ext.data.scenes import render, sample_scene
from diffusers_ext.degradations import bsr
from diffusers_ext.degradations.blur import STRIDE_KERNEL_SIZE, convolve, gaussian_kernel, stride_kernel
from diffusers_ext.degradations.bsr import apply_bsr_plan, degrade_bicubic, degrade_bsr, draw_bsr_plan
from diffusers_ext.evaluation.image_quality import psnr

PICTURE = torch.from_numpy(render(sample_scene(0, 5), 64)).permute(2, 0, 1).float() / 127.5 - 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def plans(scale: int = 4, light: bool = False, count: int = 2000) -> list[bsr.BSRPlan]:
    one = generator(scale + light)
    return [draw_bsr_plan(scale, one, light=light) for _ in range(count)]


def of(kind: type, drawn: list[bsr.BSRPlan]) -> list:
    return [step for plan in drawn for step in plan.steps if isinstance(step, kind)]


def halved(plan: bsr.BSRPlan) -> bool:
    return plan.scale == 4 and next(step for step in plan.steps if isinstance(step, bsr.Fit)).divisor == 2


# The plan


@pytest.mark.parametrize("light", [False, True])
def test_slots_and_their_order(light):
    drawn = plans(light=light)
    orders = set()
    for plan in drawn:
        steps = plan.steps[1:] if halved(plan) else plan.steps
        kinds = Counter(type(step).__name__ for step in steps)
        assert kinds["Blur"] == (1 if light else 2) and kinds["Noise"] == kinds["Fit"] == 1
        assert kinds["Shrink"] + kinds["Stride"] == 1 and kinds["Jpeg"] in (1, 2)
        names = ["Down" if type(s).__name__ in ("Shrink", "Stride") else type(s).__name__ for s in steps]
        assert names.index("Down") < names.index("Fit") and names[-1] == "Jpeg"
        orders.add(tuple(names))
    kinds_of_order = 2 * 3 * 4 * 5 // 2 if light else 360 // 2  # all of the slots that do something, Down before Fit
    assert len(orders) > 0.75 * kinds_of_order
    shuffled = sum(sum(isinstance(step, bsr.Jpeg) for step in plan.steps) == 2 for plan in drawn)
    assert shuffled / len(drawn) == pytest.approx(0.9, abs=0.05)
    strides = len(of(bsr.Stride, drawn)) / len(drawn)
    assert strides == pytest.approx(0.2 if light else 0.25, abs=0.06)


@pytest.mark.parametrize("light", [False, True])
def test_blurs(light):
    for chosen, factor in ((False, 4), (True, 2)):
        blurs = of(bsr.Blur, [plan for plan in plans(light=light) if halved(plan) == chosen])
        strength = 0.25 if light else 1.0
        isotropic = [blur for blur in blurs if blur.variances[0] == blur.variances[1]]
        others = [blur for blur in blurs if blur.variances[0] != blur.variances[1]]
        assert len(isotropic) / len(blurs) == pytest.approx(0.5, abs=0.07)
        sizes = set(range(5, 15)) if light else set(range(7, 26, 2))
        assert {blur.size for blur in others} == sizes
        assert {blur.size for blur in isotropic} == ({5, 6, 7} if light else sizes)
        largest = (4 + factor) * strength
        eigenvalues = [value for blur in others for value in blur.variances]
        assert 0 <= min(eigenvalues) < 0.05 * largest and 0.95 * largest < max(eigenvalues) <= largest
        angles = [blur.angle for blur in others]
        assert 0 <= min(angles) < 0.1 and math.pi - 0.1 < max(angles) <= math.pi
        widest = (2 + 0.2 * factor) * strength
        sigmas = [math.sqrt(blur.variances[0]) for blur in isotropic]
        assert 0 <= min(sigmas) < 0.05 * widest and 0.95 * widest < max(sigmas) <= widest


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize(("scale", "chosen", "factor"), [(4, False, 4), (4, True, 2), (2, False, 2), (3, False, 3)])
def test_downsampling(scale, chosen, factor, light):
    drawn = plans(scale, light)
    assert sum(map(halved, drawn)) / len(drawn) == pytest.approx(0.25 if scale == 4 else 0, abs=0.05)
    drawn = [plan for plan in drawn if halved(plan) == chosen]
    halves = [plan.steps[0] for plan in drawn] if chosen else []
    assert all(half.factor == 2.0 for half in halves)
    if halves:
        methods = Counter(half.method for half in halves)
        assert methods["antialiased"] / len(halves) == pytest.approx(0.5, abs=0.12)
        assert methods.keys() == {"linear", "cubic", "area", "antialiased"}
    shrinks = [step for step in of(bsr.Shrink, drawn) if not any(step is half for half in halves)]
    factors = [step.factor for step in shrinks]
    assert 1 <= min(factors) < 1 + 0.1 * factor and 1.9 * factor < max(factors) <= 2 * factor
    assert {step.method for step in shrinks} == {"linear", "cubic", "area"}
    strides = of(bsr.Stride, drawn)
    assert {stride.step for stride in strides} == {factor}
    assert all(0.1 <= stride.sigma <= 0.6 * factor for stride in strides)
    fits = of(bsr.Fit, drawn)
    assert {fit.divisor for fit in fits} == {factor} and {f.method for f in fits} == {"linear", "cubic", "area"}


@pytest.mark.parametrize(("light", "levels"), [(False, range(2, 26)), (True, range(1, 3))])
def test_noise(light, levels):
    noises = of(bsr.Noise, plans(light=light))
    shares = Counter(noise.kind for noise in noises)
    for kind, share in (("per_channel", 0.4), ("gray", 0.4), ("correlated", 0.2)):
        assert shares[kind] / len(noises) == pytest.approx(share, abs=0.05)
    found = set()
    for noise in noises:
        covariance = np.array(noise.covariance)
        np.testing.assert_allclose(covariance, covariance.T, atol=1e-12)
        if noise.kind == "correlated":
            assert covariance.min() >= 0 and covariance.max() <= (max(levels) / 255) ** 2 + 1e-12
            continue
        variance = covariance[0, 0]
        np.testing.assert_allclose(covariance, variance * (np.eye(3) if noise.kind == "per_channel" else 1))
        found.add(round(math.sqrt(variance) * 255, 6))
    assert found == set(map(float, levels))
    assert len({noise.seed for noise in noises}) == len(noises)


@pytest.mark.parametrize(("light", "low", "high"), [(False, 30, 95), (True, 80, 95)])
def test_jpeg_qualities(light, low, high):
    assert {step.quality for step in of(bsr.Jpeg, plans(light=light))} == set(range(low, high + 1))


# Its parts


@pytest.mark.parametrize("size", [5, 6, 14, 25])
def test_kernels_have_the_moments_of_their_gaussian(size):
    for variances, angle in (((0.5, 0.5), 0.0), ((0.9, 0.3), 0.4), ((0.0, 0.0), 1.0), ((1e-300, 0.8), math.pi / 2)):
        kernel = gaussian_kernel(size, variances, angle)
        assert kernel.shape == (size, size) and kernel.min() >= 0 and kernel.sum() == pytest.approx(1)
        np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-12)
    offsets = np.arange(size) - (size - 1) / 2
    y, x = np.meshgrid(offsets, offsets, indexing="ij")
    kernel = gaussian_kernel(size, (0.9, 0.3), 0.4)
    turn = np.array([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]])
    moments = [[(kernel * a * b).sum() for a in (x, y)] for b in (x, y)]
    if size >= 14:  # in smaller ones the tails are missing
        np.testing.assert_allclose(moments, turn @ np.diag([0.9, 0.3]) @ turn.T, atol=2e-2)
    if size % 2:
        assert gaussian_kernel(size, (0.0, 0.0))[size // 2, size // 2] == 1


@pytest.mark.parametrize("size", [1, 5, 6, 13, 14, 25])
def test_convolution_is_scipys_with_a_mirrored_border(size):
    kernel = np.random.default_rng(0).random((size, size))
    for shape in ((3, 20, 30), (1, 3, 9), (2, 1, 1)):
        pixels = torch.rand(shape)
        expected = ndimage.convolve(pixels.numpy().astype(np.float64), kernel[None], mode="mirror")
        np.testing.assert_allclose(convolve(pixels, kernel).numpy(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("step", [2, 3, 4])
def test_stride_keeps_the_picture_in_place(step):
    """A ramp stays the ramp of the block's centres, wherever the border is far."""
    kernel = stride_kernel(step, 0.3 * step)
    assert kernel.shape == (STRIDE_KERNEL_SIZE,) * 2 and kernel.sum() == pytest.approx(1)
    ramp = torch.arange(96.0).expand(1, 96, 96)
    small = convolve(ramp, kernel)[:, ::step, ::step]
    centres = torch.arange(0, 96, step) + (step - 1) / 2
    inside = slice(16 // step, -16 // step)
    torch.testing.assert_close(small[0, 40 // step, inside], centres[inside], atol=1e-3, rtol=0)


def test_noise_has_the_drawn_covariance():
    covariance = ((4e-4, 1e-4, 0.0), (1e-4, 9e-4, 2e-4), (0.0, 2e-4, 1e-4))
    noise = bsr._noise(bsr.Noise("correlated", covariance, 3), torch.Size((3, 200, 200)))
    np.testing.assert_allclose(np.cov(noise.flatten(1).numpy()), covariance, atol=2e-5)
    gray = bsr._noise(bsr.Noise("gray", ((1e-2,) * 3,) * 3, 3), torch.Size((3, 50, 50)))
    torch.testing.assert_close(gray[0], gray[1], atol=1e-5, rtol=0)
    assert gray[0].std().item() == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("quality", [30, 80, 95])
def test_jpeg_is_written_in_the_planned_quality(quality):
    picture = 0.9173 * PICTURE  # no mean lies halfway between two of 256 levels
    plan = bsr.BSRPlan(2, (bsr.Shrink(2.0, "area"), bsr.Fit(2, "area"), bsr.Jpeg(quality)))
    file = io.BytesIO()
    small = picture.reshape(3, 32, 2, 32, 2).mean((2, 4))
    Image.fromarray(((small + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(apply_bsr_plan(picture, plan), expected, atol=1e-5, rtol=0)
    better = bsr.BSRPlan(2, (*plan.steps[:2], bsr.Jpeg(100)))
    assert psnr(apply_bsr_plan(picture, better)[None], small[None]) > psnr(expected[None], small[None])


# The whole


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize(("scale", "size"), [(4, (64, 64)), (4, (16, 40)), (4, (4, 4)), (2, (10, 6)), (3, (33, 9))])
def test_sizes_ranges_and_determinism(scale, size, light):
    image = torch.nn.functional.interpolate(PICTURE[None], size)[0]
    for seed in range(12):
        low = degrade_bsr(image, scale, generator(seed), light=light)
        assert low.shape == (3, size[0] // scale, size[1] // scale) and low.dtype == torch.float32
        assert low.min() >= -1 and low.max() <= 1
        torch.testing.assert_close((low + 1) * 127.5, ((low + 1) * 127.5).round(), atol=1e-3, rtol=0)
        assert torch.equal(low, degrade_bsr(image, scale, generator(seed), light=light))
        plan = draw_bsr_plan(scale, generator(seed), light=light)
        assert torch.equal(low, apply_bsr_plan(image, plan)) and torch.equal(low, apply_bsr_plan(image, plan))


def test_samples_of_one_batch_differ_and_the_input_stays():
    before = PICTURE.clone()
    results = [degrade_bsr(PICTURE, 4, generator(seed)) for seed in range(10)]
    assert torch.equal(PICTURE, before)
    assert min(float((a - b).abs().max()) for i, a in enumerate(results) for b in results[:i]) > 0.01
    half = degrade_bsr(PICTURE.half(), 4, generator())
    assert half.dtype == torch.float32 and psnr(half[None], results[0][None]) > 30


def test_light_is_milder_and_both_show_the_picture():
    pictures = [torch.from_numpy(render(sample_scene(i, 5), 64)).permute(2, 0, 1) / 127.5 - 1 for i in range(12)]
    figures = {}
    for light in (False, True):
        results = torch.stack([degrade_bsr(p, 4, generator(i), light=light) for i, p in enumerate(pictures)])
        figures[light] = psnr(results, torch.stack([degrade_bicubic(picture, 4) for picture in pictures]))
    assert 12 < figures[False] < figures[True] - 2, figures


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_bicubic_is_pils(scale):
    picture = Image.fromarray(((PICTURE + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    expected = np.array(picture.resize((64 // scale, 64 // scale), Image.Resampling.BICUBIC))
    low = degrade_bicubic(PICTURE, scale)
    np.testing.assert_array_equal(((low + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), expected)
    assert degrade_bicubic(PICTURE[:, :32].bfloat16(), scale).shape == (3, 32 // scale, 64 // scale)
    torch.testing.assert_close(degrade_bicubic(torch.full((3, 16, 16), 0.2), scale), torch.full((3,) + (16 // scale,) * 2, 0.2), atol=4e-3, rtol=0)  # fmt: skip # noqa: E501


def test_plan_does_what_it_says_step_by_step():
    """Each step of a plan against the same by other means."""
    flat = torch.zeros(3, 32, 32)
    plan = bsr.BSRPlan(4, (bsr.Noise("per_channel", tuple(map(tuple, 0.01 * np.eye(3))), 5), bsr.Stride(4, 0.5), bsr.Fit(4, "linear"), bsr.Jpeg(95)))  # fmt: skip # noqa: E501
    first = bsr.BSRPlan(4, (*plan.steps[1:], plan.steps[0]))
    assert apply_bsr_plan(flat, plan).std() < apply_bsr_plan(flat, first).std()  # blurred after, not before
    assert apply_bsr_plan(PICTURE, plan).shape == (3, 16, 16)
    blurred = bsr.BSRPlan(4, (bsr.Blur(25, (9.0, 9.0)), *plan.steps[1:]))
    sharp = bsr.BSRPlan(4, plan.steps[1:])
    gradients = [apply_bsr_plan(PICTURE, p).diff(dim=2).abs().mean() for p in (blurred, sharp)]
    assert gradients[0] < 0.9 * gradients[1]


@pytest.mark.parametrize("degrade", [degrade_bicubic, lambda image, scale: degrade_bsr(image, scale, generator())])
@pytest.mark.parametrize(
    ("image", "scale", "message"),
    [
        (PICTURE[None], 4, r"`image` is torch\.float32 of shape \(1, 3, 64, 64\): expected a floating-point tensor"),
        (PICTURE[:1], 4, r"of shape \(1, 64, 64\)"),
        (PICTURE.int(), 4, r"`image` is torch\.int32"),
        (np.zeros((3, 8, 8)), 4, r"`image` is ndarray"),
        (PICTURE * 127.5, 4, r"`image` goes from -.* to .*: expected values in \[-1, 1\]"),
        (PICTURE * torch.nan, 4, r"`image` goes from nan to nan"),
        (PICTURE[:, :63], 4, r"`image` is 64x63 pixels \(width x height\), which `scale` 4 .*: crop it to 64x60"),
        (PICTURE[:, :0], 4, r"`image` is 64x0 pixels"),
        (PICTURE, 1, r"`scale` is 1: it must be an integer of at least 2"),
        (PICTURE, 4.0, r"`scale` is 4\.0: it must be an integer"),
        (PICTURE, True, r"`scale` is True: it must be an integer"),
    ],
)
def test_rejects(degrade, image, scale, message):
    with pytest.raises(ValueError, match=message):
        degrade(image, scale)


def test_rejects_a_seed_for_a_generator():
    with pytest.raises(TypeError, match=r"`generator` is int: it must be a torch\.Generator on the CPU"):
        degrade_bsr(PICTURE, 4, 0)
