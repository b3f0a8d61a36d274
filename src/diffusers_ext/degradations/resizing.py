"""The resizings that degradations are made of, on float pictures, without OpenCV.

`linear`, `cubic` and `area` are OpenCV's `INTER_LINEAR`, `INTER_CUBIC` and `INTER_AREA` by definition: the first two
interpolate between the nearest 2 and 4 pixels whatever the factor, so they alias when they make a picture smaller;
the cubic one has a = -0.75. `antialiased` is the cubic one of MATLAB's `imresize` and of PIL: a = -0.5, as wide as the
factor demands. Only its border differs from MATLAB's: weights outside of the picture are dropped, not mirrored.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

RESIZE_METHODS = ("linear", "cubic", "area", "antialiased")


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


def _overlaps(old: int, new: int) -> Tensor:
    """How much of each new pixel lies over each old one: float64 (new, old), rows sum to 1."""
    edges = torch.arange(new + 1, dtype=torch.float64) * old / new
    left, right = edges[:-1, None], edges[1:, None]
    start = torch.arange(old, dtype=torch.float64)
    covered = (torch.minimum(right, start + 1) - torch.maximum(left, start)).clamp(min=0)
    return covered / covered.sum(1, keepdim=True)
