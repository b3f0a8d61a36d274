"""What PITI's encoder takes in place of label maps, sketches, normals and depth: images (n, c, side, side) in [-1, 1].

Wang et al., arXiv 2205.12952, section 3.2; PITI-Synthesis/PITI@d9f7481:pretrained_diffusion/image_datasets_*.py (MIT).
Sampling and training make them with these functions alone.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .geometry import geometry_condition
from .images import image_batch
from .palettes import colorize_labels
from .sketches import distance_map

CONDITION_CHANNELS = {"label_map": 3, "sketch": 1, "geometry": 6}  # by the type of the condition


def label_condition(labels: Tensor, palette: np.ndarray, side: int) -> Tensor:
    """Label maps in the palette's colours, (n, 3, side, side).

    Args:
        labels: integers (n, h, w).
        palette: uint8 (labels, 3).
    """
    colors = np.stack([colorize_labels(one, palette) for one in labels.cpu().numpy()])
    pixels = torch.from_numpy(colors).permute(0, 3, 1, 2).float()
    return (resize_nearest(pixels, side) / 255 - 0.5) / 0.5


def sketch_condition(lines: Tensor, side: int) -> Tensor:
    """How far the pixels of sketches lie from their lines, (n, 1, side, side).

    Args:
        lines: bool (n, h, w), True on lines. Without any, the result is the null condition.
    """
    lines = resize_nearest(lines[:, None].float(), side)[:, 0] > 0
    return (distance_map(lines)[:, None].float() / 255 - 0.5) / 0.5


def normals_and_depth_condition(normals: Tensor, depth: Tensor, side: int) -> Tensor:
    """Normals and depth in colours, (n, 6, side, side); see `geometry_condition`."""
    return resize_nearest(geometry_condition(normals, depth), side)


def resize_nearest(values: Tensor, side: int) -> Tensor:
    """(n, c, h, w) to (n, c, side, side), nearest neighbour."""
    return F.interpolate(values, size=(side, side), mode="nearest")


def read_normals(normals: Any) -> Tensor:
    """Unit normals as users have them as (n, 3, h, w); pictures hold them as colours."""
    if isinstance(normals, (list, tuple)) and normals:
        return _joined("normals", [read_normals(one) for one in normals])
    if isinstance(normals, (np.ndarray, Tensor)) and torch.as_tensor(normals).is_floating_point():
        values = torch.as_tensor(normals)
        if isinstance(normals, np.ndarray) and values.ndim in (3, 4) and values.shape[-1] == 3 != values.shape[-3]:
            values = values.movedim(-1, -3)  # (h, w, 3), as arrays of pictures are
        return values[None] if values.ndim == 3 else values
    return image_batch(normals, "normals") * 2 - 1


def read_depth(depth: Any) -> Tensor:
    """Metres as users have them as (n, h, w)."""
    if isinstance(depth, (list, tuple)) and depth:
        return _joined("depth", [read_depth(one) for one in depth])
    if not isinstance(depth, (np.ndarray, Tensor)):
        raise TypeError(
            f"`depth` is {type(depth).__name__}: expected a float array or tensor (H, W) or (n, H, W) of metres, or"
            " a list of them. A picture does not say what its grey values mean."
        )
    values = torch.as_tensor(depth)
    if isinstance(depth, np.ndarray) and values.ndim in (3, 4) and values.shape[-1] == 1:
        values = values.squeeze(-1)  # one channel behind
    return values[None] if values.ndim == 2 else values


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    """Maps of one size as a batch."""
    shapes = [tuple(part.shape[1:]) for part in parts]
    if len(set(shapes)) > 1:
        raise ValueError(f"`{name}` holds maps of different shapes: {', '.join(map(str, dict.fromkeys(shapes)))}.")
    return torch.cat([part.to(parts[0].device) for part in parts])
