"""L0 smoothing: flat areas with sharp edges, like the over-smoothed images of a small diffusion model.

Xu, Lu, Xu, Jia, "Image Smoothing via L0 Gradient Minimization", ACM TOG 30(6), 2011, algorithm 1. PITI (arXiv
2205.12952) degrades the low-resolution input of its upsampler by it: PITI-Synthesis/PITI@d9f7481
:pretrained_diffusion/degradation/l0smooth.py (MIT).

Difference: the released degradation hands the original function an image in [0, 1] where it expects one in [0, 255],
and gets black images back. Here the range is what it should be.
"""

import numpy as np
import torch
from torch import Tensor

_LARGEST_BETA = 1e5


def l0_smooth(image: Tensor, strength: float, kappa: float = 2.0) -> Tensor:
    """Smooths images by counting, not measuring, the steps between neighbouring pixels.

    Alternates between gradients, which become zero where their squares (summed over channels) stay below
    `strength / beta`, and an image with these gradients, found by a Fourier transform; beta grows by `kappa` from
    `2 * strength` to 1e5. Borders wrap around.

    Args:
        image: floating point (channels, height, width) in [-1, 1].
        strength: the paper's lambda for images in [0, 1], above 0. PITI draws it between 0.0012 and 0.004.
        kappa: factor of beta, above 1.

    Returns:
        float32 of the same shape. It may leave [-1, 1] by a little.

    Raises:
        ValueError: for another shape or dtype, or a number out of range.
    """
    if image.ndim != 3 or not image.is_floating_point():
        raise ValueError(
            f"`image` is {image.dtype} of shape {tuple(image.shape)}: expected floating point of shape (channels, "
            "height, width), in [-1, 1]."
        )
    if not strength > 0 or not kappa > 1:
        raise ValueError(f"`strength` is {strength} and `kappa` {kappa}: they must lie above 0 and above 1.")
    pixels = ((image.detach().float().cpu() + 1) * (127.5 / 256)).numpy()  # the original divides 0 ... 255 by 256
    smooth = _smooth(pixels, strength, kappa)
    return torch.from_numpy(smooth) * (256 / 127.5) - 1


def _smooth(pixels: np.ndarray, strength: float, kappa: float) -> np.ndarray:
    """(c, h, w) in [0, 1), float32, to the same."""
    height, width = pixels.shape[1:]
    # squared responses of the difference filters [1, -1] along both axes
    across, down = (np.abs(1 - np.exp(-2j * np.pi * np.fft.fftfreq(size))) ** 2 for size in (width, height))
    response = (down[:, None] + across[None]).astype(np.float32)
    transform = np.fft.fft2(pixels).astype(np.complex64)
    smooth, beta = pixels, 2 * strength
    while beta < _LARGEST_BETA:
        across_step = np.roll(smooth, -1, axis=2) - smooth
        down_step = np.roll(smooth, -1, axis=1) - smooth
        small = (across_step**2 + down_step**2).sum(0) < strength / beta  # one decision for all channels
        across_step[:, small] = 0
        down_step[:, small] = 0
        divergence = np.roll(across_step, 1, axis=2) - across_step + np.roll(down_step, 1, axis=1) - down_step
        numerator = transform + np.float32(beta) * np.fft.fft2(divergence)
        smooth = np.fft.ifft2(numerator / (1 + np.float32(beta) * response)).real.astype(np.float32)
        beta *= kappa
    return smooth
