"""Several conditions in one picture, and the way from one condition to another: pure functions on vectors and maps.

Paella's notebook (dome272/Paella@97d18f9) conditions each place of the token grid on its own vector, hard-edged or on
a linear or spherical ramp, and draws frames on the way between two texts. Differences: any number of regions and
prompts, regions as boxes or masks in pixels, and a region's edge inside a token mixes by area.

Letters in shape comments: n prompts, d condition, H x W pixels, h x w tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import mask_batch

STRIPS = ("columns", "rows")
RAMPS = ("column_ramp", "row_ramp")
INTERPOLATIONS = ("lerp", "slerp")
_PARALLEL = 1e-6  # sine of an angle below which the two ways are the same in float32


def mix_vectors(start: Tensor, end: Tensor, weight: Tensor, interpolation: str = "lerp") -> Tensor:
    """Vectors on the way from `start` (weight 0) to `end` (weight 1); both ends exactly.

    `lerp`: start + w (end - start). `slerp`: sin((1 - w) a) / sin a * start + sin(w a) / sin a * end, with a the angle
    between the two; the vectors keep their own magnitudes (between equally long ones the length is constant). Where
    the angle is 0 or 180 degrees, or a vector is zero, no arc is defined: there slerp is lerp.

    Args:
        start, end: `(..., d)`.
        weight: `(...)` in [0, 1].
        interpolation: `lerp` or `slerp`.

    Returns:
        `(..., d)` in the dtype of `start`; the maths is float32.
    """
    check_interpolation(interpolation)
    a, b, w = start.float(), end.float(), weight.to(start.device, torch.float32)[..., None]
    mixed = torch.lerp(a, b, w)
    if interpolation == "slerp":
        u, v = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        # half the angle has the tangent |u - v| / |u + v|: exact near 0 and 180 degrees, an arc cosine is not
        angle = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))
        sine = angle.sin()
        arc = ((1 - w) * angle).sin() / sine * a + (w * angle).sin() / sine * b
        straight = (sine < _PARALLEL) | (a.norm(dim=-1, keepdim=True) == 0) | (b.norm(dim=-1, keepdim=True) == 0)
        mixed = torch.where(straight, mixed, arc)
    return mixed.to(start.dtype)


def interpolate_vectors(vectors: Tensor, num: int, interpolation: str = "lerp") -> Tensor:
    """`num` vectors `(num, d)`, evenly spaced from the first through all to the last of `(n, d)`, n >= 2."""
    _check_enough("num", num, len(vectors))
    position = torch.linspace(0, len(vectors) - 1, num, dtype=torch.float64)  # in units of prompts
    first = position.floor().long().clamp(max=len(vectors) - 2)
    return mix_vectors(vectors[first], vectors[first + 1], (position - first).float(), interpolation)


def ramp_map(vectors: Tensor, height: int, width: int, ramp: str, interpolation: str = "lerp") -> Tensor:
    """A condition map `(d, h, w)` that goes from the first of `(n, d)` at one border to the last at the opposite one.

    Args:
        vectors: `(n, d)`, n >= 2.
        height, width: Of the token grid.
        ramp: `column_ramp` from left to right, or `row_ramp` from top to bottom.
        interpolation: See `mix_vectors`.
    """
    along_columns = ramp == "column_ramp"
    line = interpolate_vectors(vectors, width if along_columns else height, interpolation).T  # (d, w) or (d, h)
    line = line[:, None, :] if along_columns else line[:, :, None]
    return line.expand(-1, height, width)


def region_map(vectors: Tensor, weights: Tensor) -> Tensor:
    """A condition map `(d, h, w)`: at each place the vectors `(n, d)` mixed by its weights `(n, h, w)`."""
    return torch.einsum("nd,nhw->dhw", vectors.float(), weights.to(vectors.device)).to(vectors.dtype)


def strip_weights(num: int, height: int, width: int, strips: str) -> Tensor:
    """One-hot weights `(n, h, w)` of equal strips: `columns` from left to right, `rows` from top to bottom."""
    side = width if strips == "columns" else height
    _check_enough("regions", side, num)
    owner = torch.arange(side) * num // side  # (side,)
    line = F.one_hot(owner, num).T.float()  # (n, side)
    return (line[:, None, :] if strips == "columns" else line[:, :, None]).expand(-1, height, width)


def region_weights(regions: Any, num: int, height: int, width: int, factor: int) -> Tensor:
    """What share each of `num` prompts has at each token, from regions given in pixels: float32 `(n, h, w)`.

    A token that lies in several regions mixes them by area. Sizes: `height` x `width` pixels, `factor` a token.

    Args:
        regions: `columns` or `rows` (equal strips); or one entry a prompt: a box `(left, top, right, bottom)` in
            pixels as in PIL, a mask as `mask_batch` takes it, or None (once) for all that the others leave; or a
            floating-point tensor of weights that sum to 1, `(n, H, W)` or `(n, h, w)`, for soft borders.

    Raises:
        ValueError, TypeError: They do not fit the prompts or the size, leave a place without a prompt, or give one to
            two prompts.
    """
    h, w = height // factor, width // factor
    if isinstance(regions, str):
        if regions not in STRIPS:
            raise ValueError(
                f"`regions` must be one of {', '.join(STRIPS + RAMPS)}, or one box or mask a prompt; received"
                f" {regions!r}."
            )
        return strip_weights(num, h, w, regions)
    if isinstance(regions, np.ndarray):
        regions = torch.as_tensor(regions)
    if not isinstance(regions, (list, tuple, Tensor)):
        raise TypeError(
            "`regions` must be a string, a list with one box or mask a prompt, or a tensor of weights, received"
            f" {type(regions).__name__}."
        )
    if len(regions) != num:
        raise ValueError(f"`regions` holds {len(regions)} regions for {num} prompts; pass one a prompt.")
    if isinstance(regions, Tensor) and regions.is_floating_point():
        weights = _check_weights(regions, height, width, h, w)
    else:
        weights = _disjoint(regions, height, width).float()
    return weights if tuple(weights.shape[1:]) == (h, w) else F.avg_pool2d(weights[None], factor)[0]


def check_interpolation(interpolation: Any) -> None:
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"`interpolation` must be one of {', '.join(INTERPOLATIONS)}; received {interpolation!r}.")


def _check_enough(name: str, places: int, num: int) -> None:
    if num < 2:
        raise ValueError(f"At least two prompts are needed to go from one to another, received {num}.")
    if places < num:
        raise ValueError(f"`{name}`: {places} places do not hold {num} prompts; pass fewer prompts or a larger size.")


def _check_weights(weights: Tensor, height: int, width: int, h: int, w: int) -> Tensor:
    if weights.ndim != 3 or tuple(weights.shape[1:]) not in ((height, width), (h, w)):
        raise ValueError(
            f"`regions` as weights must have shape (n, {height}, {width}) in pixels or (n, {h}, {w}) in tokens,"
            f" received {tuple(weights.shape)}."
        )
    weights = weights.float()
    low, total = float(weights.min()), weights.sum(dim=0)
    off = (total - 1).abs().max()
    if not (low >= 0 and off <= 1e-3):  # also refuses NaN
        raise ValueError(
            f"`regions` as weights must be at least 0 and sum to 1 over the prompts at each place; the least is"
            f" {low:.4g}, the sums go from {float(total.min()):.4g} to {float(total.max()):.4g}. Divide by the sum."
        )
    return weights


def _disjoint(regions: Sequence[Any] | Tensor, height: int, width: int) -> Tensor:
    """Bool `(n, H, W)`: each pixel in exactly one region."""
    rest = [k for k, region in enumerate(regions) if region is None]
    if len(rest) > 1:
        raise ValueError(f"`regions` holds None {len(rest)} times; only one prompt can take what the others leave.")
    masks = torch.stack([_region_mask(f"regions[{k}]", regions[k], height, width) for k in range(len(regions))])
    owners = masks.sum(dim=0)  # (H, W)
    if bool((owners > 1).any()):
        y, x = (owners > 1).nonzero()[0].tolist()
        k, other = masks[:, y, x].nonzero().flatten().tolist()[:2]
        raise ValueError(
            f"`regions` overlap in {int((owners > 1).sum())} pixels; at x={x}, y={y} both prompt {k} and prompt"
            f" {other} are asked for. Make them disjoint, or pass a tensor of weights that sum to 1 to mix them."
        )
    if rest:
        masks[rest[0]] = owners == 0
    elif bool((owners == 0).any()):
        y, x = (owners == 0).nonzero()[0].tolist()
        raise ValueError(
            f"`regions` leave {int((owners == 0).sum())} of {owners.numel()} pixels without a prompt, the first at"
            f" x={x}, y={y}. Enlarge a region, or pass None for one prompt: it takes what the others leave."
        )
    empty = [k for k in range(len(masks)) if not bool(masks[k].any())]
    if empty:
        raise ValueError(f"`regions[{empty[0]}]` covers no pixel, so its prompt would be ignored; drop both.")
    return masks


def _region_mask(name: str, region: Any, height: int, width: int) -> Tensor:
    """Bool `(H, W)`; empty for None."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    if region is None:
        return mask
    if isinstance(region, (list, tuple)) and all(isinstance(side, int) for side in region):
        if len(region) != 4:
            raise ValueError(f"`{name}` must be a box (left, top, right, bottom) in pixels, received {region}.")
        left, top, right, bottom = region
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(
                f"`{name}` must be a box (left, top, right, bottom) within {width}x{height} pixels, left < right and"
                f" top < bottom; received {tuple(region)}."
            )
        mask[top:bottom, left:right] = True
        return mask
    given = mask_batch(region, name)
    if tuple(given.shape) != (1, height, width):
        raise ValueError(
            f"`{name}` must be one mask of {width}x{height} pixels, received {given.shape[0]} of"
            f" {given.shape[2]}x{given.shape[1]}."
        )
    return given[0].cpu()
