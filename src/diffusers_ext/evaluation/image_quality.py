"""Picture-to-picture figures and the grid in which results are looked at."""

import numpy as np
from PIL import Image
from torch import Tensor


def psnr(image: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images (b, 3, h, w) in [-1, 1]: the mean over the samples' own values.

    Equal pictures have 126 dB (a mean squared error of 1e-12 is the least that is told apart).

    Raises:
        ValueError: the two differ in shape.
    """
    if image.shape != target.shape:
        raise ValueError(f"`image` and `target` differ in shape: {tuple(image.shape)} and {tuple(target.shape)}.")
    error = (image.float() - target.float()).square().flatten(1).mean(1)  # peak-to-peak range 2
    return float((10 * (4.0 / error.clamp_min(1e-12)).log10()).mean())


def picture_grid(images: Tensor, columns: int, padding: int = 2) -> Image.Image:
    """Tiles images (b, 3, h, w) in [-1, 1] row by row on a white sheet."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + padding) + padding, columns * (width + padding) + padding, 3), 255, np.uint8)
    for i, picture in enumerate(pixels):
        top, left = (i // columns) * (height + padding) + padding, (i % columns) * (width + padding) + padding
        sheet[top : top + height, left : left + width] = picture
    return Image.fromarray(sheet)


def gradient_length(images: Tensor) -> float:
    """How sharp images (b, 3, h, w) are: the mean length of their brightness's gradient between neighbours."""
    grey = images.float().mean(dim=1)
    across, down = grey[:, :-1, 1:] - grey[:, :-1, :-1], grey[:, 1:, :-1] - grey[:, :-1, :-1]
    return float((across.square() + down.square()).sqrt().mean())


def laplacian_variance(images: Tensor) -> float:
    """How sharp images (b, 3, h, w) are: the variance of their brightness's Laplacian, as a mean over the images.

    It weighs single strong edges more than `gradient_length`.
    """
    grey = images.float().mean(dim=1)
    inner = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return float((around - 4 * inner).flatten(1).var(dim=1).mean())
