"""The resizings that degradations are made of, on float pictures, without OpenCV; and those of training pairs.

`linear`, `cubic` and `area` are OpenCV's `INTER_LINEAR`, `INTER_CUBIC` and `INTER_AREA` by definition: the first two
interpolate between the nearest 2 and 4 pixels whatever the factor, so they alias when they make a picture smaller;
the cubic one has a = -0.75. `antialiased` is the cubic one of MATLAB's `imresize` and of PIL: a = -0.5, as wide as the
factor demands. Only its border differs from MATLAB's: weights outside of the picture are dropped, not mirrored.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

RESIZE_METHODS = ("linear", "cubic", "area", "antialiased")
# name -> mode of `interpolate`, whether it regards the factor
_INTERPOLATIONS = {
    "area": ("area", True),
    "bicubic_antialias": ("bicubic", True),
    "bilinear_antialias": ("bilinear", True),
    "bilinear": ("bilinear", False),
    "bicubic": ("bicubic", False),
    "nearest": ("nearest", False),
}
_PIL_FILTERS = {"pil_box": Image.Resampling.BOX, "pil_bicubic": Image.Resampling.BICUBIC}
BATCH_RESIZE_METHODS = (*_INTERPOLATIONS, *_PIL_FILTERS)


def resize(image: Tensor, height: int, width: int, method: str) -> Tensor:
    """Resizes a picture, up or down.

    Args:
        image: floating point (c, h, w), in any range; `cubic` and `antialiased` may overshoot it.
        height, width: of the result.
        method: one of `RESIZE_METHODS`.

    Returns:
        (c, height, width).

    Raises:
        ValueError: for another method or shape, or a side below 1.
    """
    if method not in RESIZE_METHODS:
        raise ValueError(f"`method` is {method!r}: it must be one of {', '.join(RESIZE_METHODS)}.")
    if image.ndim != 3 or not image.is_floating_point():
        raise ValueError(
            f"`image` is {image.dtype} of shape {tuple(image.shape)}: expected floating point of shape (c, h, w)."
        )
    if height < 1 or width < 1:
        raise ValueError(f"`height` and `width` are {height} and {width}: both must be at least 1.")
    if method == "area":
        rows, columns = (_overlaps(*sides).to(image) for sides in zip(image.shape[1:], (height, width), strict=True))
        return rows @ image @ columns.T
    mode = "bilinear" if method == "linear" else "bicubic"
    resized = F.interpolate(
        image[None], (height, width), mode=mode, align_corners=False, antialias=method == "antialiased"
    )
    return resized[0]


def resize_batch(images: Tensor, height: int, width: int, method: str = "area") -> Tensor:
    """Resizes images of a cascade: a large one to the stage below it, or a small one to the stage above.

    A super-resolution stage learns from pairs whose small image has to be made as those that the stage below it was
    trained on. "area" is what ADM trains its upsamplers with, and "bilinear" what it enlarges by.

    Args:
        images: Floating point (b, c, h, w). In [-1, 1] for the methods of PIL, which work on 8-bit levels and on the
            CPU: their result is what a file of the small image holds.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        method: One of `BATCH_RESIZE_METHODS`. Bicubic ones may overshoot the range.

    Returns:
        (b, c, height, width), in the dtype of `images` and on their device.

    Raises:
        ValueError: For another method, shape or dtype, or a side below 1.
    """
    if method not in BATCH_RESIZE_METHODS:
        raise ValueError(f"`method` is {method!r}: it must be one of {', '.join(BATCH_RESIZE_METHODS)}.")
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"`images` is {images.dtype} of shape {tuple(images.shape)}: expected floating point of shape (b, c, "
            "h, w)."
        )
    if height < 1 or width < 1:
        raise ValueError(f"`height` and `width` are {height} and {width}: both must be at least 1.")
    if method in _PIL_FILTERS:
        levels = ((images.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().numpy()  # (b, c, h, w)
        resized = [
            [np.array(Image.fromarray(channel).resize((width, height), _PIL_FILTERS[method])) for channel in image]
            for image in levels
        ]
        return torch.from_numpy(np.array(resized)).to(images) / 127.5 - 1
    mode, antialias = _INTERPOLATIONS[method]
    if mode in ("area", "nearest"):
        return F.interpolate(images, (height, width), mode=mode)
    return F.interpolate(images, (height, width), mode=mode, align_corners=False, antialias=antialias)


def _overlaps(old: int, new: int) -> Tensor:
    """How much of each new pixel lies over each old one: float64 (new, old), rows sum to 1."""
    edges = torch.arange(new + 1, dtype=torch.float64) * old / new
    left, right = edges[:-1, None], edges[1:, None]
    start = torch.arange(old, dtype=torch.float64)
    covered = (torch.minimum(right, start + 1) - torch.maximum(left, start)).clamp(min=0)
    return covered / covered.sum(1, keepdim=True)


def round_to_8_bits(images: Tensor) -> Tensor:
    """Images in [-1, 1], any shape, on the grid of 8 bits, the nearest value each."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
