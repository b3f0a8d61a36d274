"""Low-resolution inputs for training super-resolution: plain bicubic, and blind degradations of random order (BSR).

Rombach et al., arXiv 2112.10752, section 4.4 and appendix D.6.1; degradations of Zhang et al., "Designing a Practical
Degradation Model for Deep Blind Image Super-Resolution", arXiv 2103.14006. Settings: those of
CompVis/latent-diffusion@a506df5:ldm/modules/image_degradation/bsrgan.py and bsrgan_light.py (MIT), written anew.

All random numbers are drawn before the first pixel is touched: a plan says what happens to a picture of any size, and
applying it twice gives the same result.

PITI (arXiv 2205.12952) trains its upsampler on inputs of the light variant with L0 smoothing among the slots, and
without the last JPEG: PITI-Synthesis/PITI@d9f7481:pretrained_diffusion/degradation/bsrgan_light.py (MIT).

Differences: sides must be divisible by the scale, nothing is cut off. Everything is float until a JPEG. PITI's
released code hands its L0 smoothing the wrong range and gets black pictures back (11 of 40): here it is right.
"""

import io
import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from .blur import convolve, gaussian_kernel, stride_kernel
from .l0 import l0_smooth
from .resizing import resize

INTERPOLATIONS = ("linear", "cubic", "area")
NoiseKind: TypeAlias = Literal["per_channel", "gray", "correlated"]


@dataclass(frozen=True)
class Blur:
    """Gaussian: a kernel of `size` x `size`, variances along two axes, the first turned by `angle` (radians)."""

    size: int
    variances: tuple[float, float]
    angle: float = 0.0


@dataclass(frozen=True)
class Shrink:
    """Resizing both sides by 1 / `factor`."""

    factor: float
    method: str


@dataclass(frozen=True)
class Stride:
    """A Gaussian of standard deviation `sigma`, then one pixel of each `step` x `step`: see `stride_kernel`."""

    step: int
    sigma: float


@dataclass(frozen=True)
class Fit:
    """Resizing to 1 / `divisor` of the size before the last `Shrink` or `Stride`."""

    divisor: int
    method: str


@dataclass(frozen=True)
class Noise:
    """Gaussian, with a covariance (3, 3) of the channels; pictures lie in [0, 1]."""

    kind: NoiseKind
    covariance: tuple[tuple[float, ...], ...]
    seed: int


@dataclass(frozen=True)
class Jpeg:
    quality: int


@dataclass(frozen=True)
class Smooth:
    """L0 smoothing: see `l0_smooth`."""

    strength: float


Step: TypeAlias = Blur | Shrink | Stride | Fit | Noise | Jpeg | Smooth


@dataclass(frozen=True)
class BSRPlan:
    """What is done to a picture, in this order; the result is 1 / `scale` of its size."""

    scale: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class _Setting:
    """What differs between the full, the light and PITI's degradation."""

    blurs: int
    anisotropic_sizes: tuple[int, int, int]  # times, from, to: times * randint(from, to) + 3
    isotropic_sizes: tuple[int, int, int]
    blur_strength: float
    shrink_probability: float
    noise_levels: tuple[int, int]
    qualities: tuple[int, int]
    blur_probability: float = 1.0
    jpeg_probability: float = 0.9
    last_jpeg: bool = True


_FULL = _Setting(2, (2, 2, 11), (2, 2, 11), 1.0, 0.75, (2, 25), (30, 95))
_LIGHT = _Setting(1, (1, 2, 11), (1, 2, 4), 0.25, 0.8, (1, 2), (80, 95))
_PITI = replace(_LIGHT, blur_probability=0.8, jpeg_probability=0.5, last_jpeg=False)
_SMOOTHING = (1.2e-3, 4e-3)  # strengths of PITI's L0 smoothing


def degrade_bicubic(image: Tensor, scale: int) -> Tensor:
    """The paper's evaluation input: PIL's bicubic resizing, antialiased, of 8-bit pixels.

    Args:
        image: (3, h, w) in [-1, 1], sides divisible by `scale`.
        scale: integer factor, 2 or more.

    Returns:
        float32 (3, h / scale, w / scale) in [-1, 1], on the 8-bit grid as a picture from a file.

    Raises:
        ValueError: for another shape, dtype or range, or a scale that does not fit.
    """
    _check(image, scale)
    size = (image.shape[2] // scale, image.shape[1] // scale)
    return _from_pil(_to_pil((image.detach().float().cpu() + 1) / 2).resize(size, Image.Resampling.BICUBIC)) * 2 - 1


def degrade_bsr(image: Tensor, scale: int, generator: Generator, *, light: bool = False) -> Tensor:
    """Blur, downsampling, noise and JPEG of random strength in random order.

    Args:
        image: (3, h, w) in [-1, 1], sides divisible by `scale`.
        scale: integer factor, 2 or more; the paper's is 4.
        generator: on the CPU; draws the plan, from which all else follows.
        light: the milder variant, which the released model was trained with.

    Returns:
        float32 (3, h / scale, w / scale) in [-1, 1], on the 8-bit grid.

    Raises:
        TypeError: if `generator` is none.
        ValueError: for another shape, dtype or range, or a scale that does not fit.
    """
    _check(image, scale)
    return apply_bsr_plan(image, draw_bsr_plan(scale, generator, light=light))


def degrade_piti(image: Tensor, scale: int, generator: Generator, *, l0_prob: float = 0.2) -> Tensor:
    """PITI's input of an upsampler: mild blur, downsampling, noise, JPEG and L0 smoothing in random order.

    Args:
        image: (3, h, w) in [-1, 1], sides divisible by `scale`.
        scale: integer factor, 2 or more; PITI's is 4.
        generator: on the CPU; draws the plan, from which all else follows.
        l0_prob: how often the picture is smoothed; 0 leaves the light BSR, and every other draw as it is.

    Returns:
        float32 (3, h / scale, w / scale) in [-1, 1], on the 8-bit grid.

    Raises:
        TypeError: if `generator` is none.
        ValueError: for another shape, dtype or range, a scale that does not fit, or no probability.
    """
    _check(image, scale)
    return apply_bsr_plan(image, draw_piti_plan(scale, generator, l0_prob=l0_prob))


def draw_bsr_plan(scale: int, generator: Generator, *, light: bool = False) -> BSRPlan:
    """Draws what `apply_bsr_plan` will do.

    Seven slots in random order: blur, blur (full only), downsampling, resizing to the final size (always after the
    downsampling), noise, JPEG (with probability 0.9), and a camera model that nobody has; then always a JPEG. At scale
    4 the picture is halved first with probability 1/4, and everything after it is that of scale 2.
    """
    return _draw_plan(scale, generator, _LIGHT if light else _FULL)


def draw_piti_plan(scale: int, generator: Generator, *, l0_prob: float = 0.2) -> BSRPlan:
    """Draws what `apply_bsr_plan` will do for `degrade_piti`.

    The slots are those of the light `draw_bsr_plan`, with L0 smoothing in the place of the camera model: before the
    downsampling it smooths the large picture, after it the small one. The blur has probability 0.8, JPEG 0.5, and none
    comes last.
    """
    if not 0 <= l0_prob <= 1:
        raise ValueError(f"`l0_prob` is {l0_prob}: it must lie between 0 and 1.")
    return _draw_plan(scale, generator, _PITI, l0_prob)


def _draw_plan(scale: int, generator: Generator, setting: _Setting, l0_prob: float | None = None) -> BSRPlan:
    """Without `l0_prob` its slot draws nothing."""
    _check_scale(scale)
    if not isinstance(generator, Generator):
        raise TypeError(f"`generator` is {type(generator).__name__}: it must be a torch.Generator on the CPU.")
    draw = _Draw(generator)
    steps: list[Step] = []
    factor = scale
    if scale == 4 and draw.uniform() < 0.25:
        method = draw.choice(INTERPOLATIONS) if draw.uniform() < 0.5 else "antialiased"
        steps.append(Shrink(2.0, method))
        factor = 2

    order = torch.randperm(7, generator=generator).tolist()
    down, fit = sorted((order.index(2), order.index(3)))
    order[down], order[fit] = 2, 3
    for slot in order:
        if slot < setting.blurs:
            if setting.blur_probability == 1 or draw.uniform() < setting.blur_probability:
                steps.append(_draw_blur(draw, factor, setting))
        elif slot == 2:
            if draw.uniform() < setting.shrink_probability:
                steps.append(Shrink(draw.uniform(1, 2 * factor), draw.choice(INTERPOLATIONS)))
            else:
                steps.append(Stride(factor, draw.uniform(0.1, 0.6 * factor)))
        elif slot == 3:
            steps.append(Fit(factor, draw.choice(INTERPOLATIONS)))
        elif slot == 4:
            steps.append(_draw_noise(draw, setting))
        elif slot == 5 and draw.uniform() < setting.jpeg_probability:
            steps.append(Jpeg(draw.integer(*setting.qualities)))
        elif slot == 6 and l0_prob is not None:
            chance, strength = draw.uniform(), draw.uniform(*_SMOOTHING)
            if chance < l0_prob:
                steps.append(Smooth(strength))
    if setting.last_jpeg:
        steps.append(Jpeg(draw.integer(*setting.qualities)))
    return BSRPlan(scale, tuple(steps))


def apply_bsr_plan(image: Tensor, plan: BSRPlan) -> Tensor:
    """Does what a plan says to a picture (3, h, w) in [-1, 1]; arguments, result and errors as `degrade_bsr`."""
    _check(image, plan.scale)
    pixels = (image.detach().float().cpu() + 1) / 2
    before = pixels.shape[1:]  # the size that `Fit` divides
    for step in plan.steps:
        if isinstance(step, (Shrink, Stride)):
            before = pixels.shape[1:]
        if isinstance(step, Blur):
            pixels = convolve(pixels, gaussian_kernel(step.size, step.variances, step.angle))
        elif isinstance(step, Shrink):
            height, width = (max(1, int(side / step.factor)) for side in before)
            pixels = resize(pixels, height, width, step.method).clamp(0, 1)
        elif isinstance(step, Stride):
            pixels = convolve(pixels, stride_kernel(step.step, step.sigma))[:, :: step.step, :: step.step].clamp(0, 1)
        elif isinstance(step, Fit):
            pixels = resize(pixels, before[0] // step.divisor, before[1] // step.divisor, step.method).clamp(0, 1)
        elif isinstance(step, Noise):
            pixels = (pixels + _noise(step, pixels.shape)).clamp(0, 1)
        elif isinstance(step, Smooth):
            pixels = ((l0_smooth(pixels * 2 - 1, step.strength) + 1) / 2).clamp(0, 1)
        else:
            pixels = _jpeg(pixels, step.quality)
    if not isinstance(plan.steps[-1], Jpeg):  # which leaves 8 bits
        pixels = (pixels * 255).round().clamp(0, 255) / 255
    return pixels * 2 - 1


class _Draw:
    """Numbers from a torch generator, in Python's types; integers are drawn from both ends included."""

    def __init__(self, generator: Generator):
        self.generator = generator

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * torch.rand((), generator=self.generator, dtype=torch.float64).item()

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def choice(self, options: tuple[str, ...]) -> str:
        return options[self.integer(0, len(options) - 1)]


def _draw_blur(draw: _Draw, factor: int, setting: _Setting) -> Blur:
    """Half of them are longer in one direction; there the eigenvalues are drawn, else the standard deviation."""
    if draw.uniform() < 0.5:
        times, low, high = setting.anisotropic_sizes
        largest = (4 + factor) * setting.blur_strength
        variances = (draw.uniform(0, largest), draw.uniform(0, largest))
        return Blur(times * draw.integer(low, high) + 3, variances, draw.uniform(0, math.pi))
    times, low, high = setting.isotropic_sizes
    sigma = draw.uniform(0, (2 + 0.2 * factor) * setting.blur_strength)
    return Blur(times * draw.integer(low, high) + 3, (sigma**2, sigma**2))


def _draw_noise(draw: _Draw, setting: _Setting) -> Noise:
    level = draw.integer(*setting.noise_levels) / 255
    kind, seed = draw.uniform(), draw.integer(0, 2**62)
    if kind > 0.6:
        return Noise("per_channel", _rows(level**2 * np.eye(3)), seed)
    if kind < 0.4:
        return Noise("gray", _rows(level**2 * np.ones((3, 3))), seed)
    # random eigenvalues along random axes; the strength is the largest level, not the drawn one
    numbers = torch.rand(4, 3, generator=draw.generator, dtype=torch.float64).numpy()
    axes = np.linalg.qr(numbers[1:])[0]
    covariance = np.abs(axes.T @ np.diag(numbers[0]) @ axes) * (setting.noise_levels[1] / 255) ** 2
    return Noise("correlated", _rows(covariance), seed)


def _rows(matrix: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())


def _noise(step: Noise, shape: torch.Size) -> Tensor:
    """Noise (3, h, w). Absolute values may have cost the matrix its definiteness: eigenvalues are made positive."""
    values, vectors = np.linalg.eigh(np.array(step.covariance))
    mixing = torch.from_numpy(vectors * np.sqrt(np.abs(values))).float()  # (3, 3)
    white = torch.randn(shape, generator=torch.Generator().manual_seed(step.seed))
    return torch.einsum("ij,jhw->ihw", mixing, white)


def _jpeg(pixels: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    _to_pil(pixels).save(file, "JPEG", quality=quality)
    return _from_pil(Image.open(file))


def _to_pil(pixels: Tensor) -> Image.Image:
    """(3, h, w) in [0, 1] to 8 bits."""
    return Image.fromarray((pixels * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def _from_pil(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _check_scale(scale: int) -> None:
    if isinstance(scale, bool) or not isinstance(scale, int) or scale < 2:
        raise ValueError(f"`scale` is {scale!r}: it must be an integer of at least 2.")


def _check(image: Tensor, scale: int) -> None:
    _check_scale(scale)
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        found = f"{image.dtype} of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"`image` is {found}: expected a floating-point tensor (3, h, w) in [-1, 1].")
    height, width = image.shape[1:]
    if not height or not width or height % scale or width % scale:
        raise ValueError(
            f"`image` is {width}x{height} pixels (width x height), which `scale` {scale} does not divide: crop it to "
            f"{width // scale * scale}x{height // scale * scale}."
        )
    low, high = float(image.min()), float(image.max())
    if not (-1.001 <= low and high <= 1.001):  # also NaN
        raise ValueError(f"`image` goes from {low:.4g} to {high:.4g}: expected values in [-1, 1].")
