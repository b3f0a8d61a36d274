"""Gaussian blur kernels, and their convolution with a picture."""

import numpy as np
import torch
from scipy import ndimage, signal
from torch import Tensor

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
