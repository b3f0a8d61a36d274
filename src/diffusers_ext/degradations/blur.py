"""Gaussian blur: kernels and their convolution with a picture, and the blur of 3 x 3 pixels on batches."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage, signal
from torch import Generator, Tensor
from torch.nn import functional as F

STRIDE_KERNEL_SIZE = 25


def gaussian_kernel(size: int, variances: tuple[float, float], angle: float = 0.0) -> np.ndarray:
    """A Gaussian on `size` x `size` pixels around their common centre, float64, sum 1.

    Args:
        variances: along the axis at `angle` (radians, from x to y) and across it. At 0 it is one pixel; or the
            nearest ones, if `size` is even.
    """
    offsets = np.arange(size) - (size - 1) / 2
    y, x = np.meshgrid(offsets, offsets, indexing="ij")
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    exponent = sum(d**2 / (2 * max(v, 1e-8)) for d, v in zip((along, across), variances, strict=True))
    weights = np.exp(np.min(exponent) - exponent)
    return weights / weights.sum()


def stride_kernel(step: int, sigma: float) -> np.ndarray:
    """A Gaussian moved by half of `step` - 1 pixels, so that every `step`-th pixel is the mean of its block."""
    kernel = gaussian_kernel(STRIDE_KERNEL_SIZE, (sigma**2, sigma**2))
    moved = ndimage.shift(kernel, -(step - 1) / 2, order=1, mode="nearest")
    return moved / moved.sum()


def convolve(pixels: Tensor, kernel: np.ndarray) -> Tensor:
    """A convolution whose border is mirrored without repeating the outermost pixels.

    Args:
        pixels: float32 (c, h, w), of any size.
        kernel: (k, k); an even one has its centre at k / 2, as in scipy.

    Returns:
        float32 (c, h, w).
    """
    size = kernel.shape[0]
    padding = ((0, 0), *(((size - 1) // 2, size // 2),) * 2)
    padded = np.pad(pixels.numpy(), padding, mode="reflect")
    blurred = signal.fftconvolve(padded, kernel[None], mode="valid", axes=(1, 2))
    return torch.from_numpy(blurred.astype(np.float32))


def gaussian_blur_3x3(images: Tensor, sigma: Tensor | float) -> Tensor:
    """A Gaussian on 3 x 3 pixels, whose border is mirrored without repeating the outermost pixels.

    It is torchvision's `gaussian_blur(images, 3, sigma)`, with a standard deviation for each sample.

    Args:
        images: Floating point (b, c, h, w), sides of at least 2.
        sigma: Standard deviation in pixels, above 0: one for all, or (b,).

    Returns:
        In the shape and dtype of `images`, on their device.

    Raises:
        ValueError: For another shape or dtype, or a `sigma` that does not fit.
    """
    if images.ndim != 4 or not images.is_floating_point() or min(images.shape[2:]) < 2:
        raise ValueError(
            f"`images` is {images.dtype} of shape {tuple(images.shape)}: expected floating point (b, c, h, w), sides "
            "of at least 2."
        )
    sigma = torch.as_tensor(sigma, dtype=torch.float32)
    if (
        sigma.ndim > 1
        or sigma.numel() not in (1, len(images))
        or (sigma.device.type == "cpu" and not (sigma > 0).all())
    ):
        raise ValueError(
            f"`sigma` is {sigma.tolist()}: pass one number above 0, or one for each of {len(images)} images."
        )
    outer = torch.exp(-0.5 / sigma.to(images.device).square())  # of a neighbour, where the pixel itself has 1
    centre = 1 / (1 + 2 * outer)
    weights = torch.stack([outer * centre, centre]).to(images.dtype).view(2, -1, 1, 1, 1)
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    rows = weights[0] * (padded[..., :-2, :] + padded[..., 2:, :]) + weights[1] * padded[..., 1:-1, :]
    return weights[0] * (rows[..., :-2] + rows[..., 2:]) + weights[1] * rows[..., 1:-1]


def blur_augmentation(
    images: Tensor,
    *,
    probability: float = 0.5,
    sigma_range: tuple[float, float] = (0.4, 0.6),
    generator: Generator | Sequence[Generator] | None = None,
) -> Tensor:
    """Cascaded Diffusion's augmentation of low-resolution images (arXiv 2106.15282, section 4.2), for training only.

    Each image is blurred by `gaussian_blur_3x3` with this probability, by a standard deviation drawn evenly from the
    range; otherwise it stays as it is. Two draws a sample, whatever they amount to: whether, and how much.

    Args:
        images: (b, c, h, w), before they are upsampled.
        probability: From 0 to 1.
        sigma_range: Least and greatest standard deviation in pixels, above 0. The paper found its range by search and
            names no default; these numbers are ours.
        generator: Of the draws, which are made on its device: one, or one a sample.

    Raises:
        ValueError: For images, a probability, a range or a number of generators that do not fit.
    """
    low, high = sigma_range
    if not (0 < low <= high < float("inf")):
        raise ValueError(f"`sigma_range` is {tuple(sigma_range)}: it must rise, from a number above 0.")
    if not 0 <= probability <= 1:
        raise ValueError(f"`probability` is {probability}: it must lie between 0 and 1.")
    batch = len(images)
    if generator is None or isinstance(generator, Generator):
        device = images.device if generator is None else generator.device
        draws = torch.rand(batch, 2, generator=generator, device=device)
    elif len(generator) == batch:
        draws = torch.stack([torch.rand(2, generator=one, device=one.device) for one in generator])
    else:
        raise ValueError(
            f"`generator` holds {len(generator)} generators: pass one, or one for each of {batch} images."
        )
    draws = draws.to(images.device)
    blurred = gaussian_blur_3x3(images, low + (high - low) * draws[:, 1])
    return torch.where((draws[:, 0] < probability).view(-1, 1, 1, 1), blurred, images)
