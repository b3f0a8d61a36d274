"""Sketches, and the distance maps that PITI's encoder takes in their place.

Wang et al., arXiv 2205.12952; PITI-Synthesis/PITI@d9f7481:pretrained_diffusion/image_datasets_sketch.py (MIT), where
OpenCV's `distanceTransform` with `DIST_L1` computes the same numbers.
"""

import numpy as np
import torch
from torch import Tensor

_FARTHEST = 255


def distance_map(lines: Tensor) -> Tensor:
    """How far each pixel lies from the nearest line, in steps along rows and columns.

    Args:
        lines: bool (batch, height, width), True on lines.

    Returns:
        uint8 (batch, height, width): 0 on lines, 255 where the nearest line lies 255 steps away or more. An image
        without lines is 255 everywhere, which is PITI's null condition.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape.
    """
    if lines.dtype != torch.bool:
        raise TypeError(
            f"`lines` is {lines.dtype}: expected bool, for instance `sketch == 255`. Grey pixels are no lines."
        )
    if lines.ndim != 3:
        raise ValueError(f"`lines` has shape {tuple(lines.shape)}: expected (batch, height, width).")
    steps = np.where(lines.cpu().numpy(), 0, _FARTHEST).astype(np.int32)
    for axis in (1, 2):  # the distance is a sum over both axes: one after the other, each in both directions
        place = np.arange(steps.shape[axis], dtype=np.int32).reshape([-1 if axis == a else 1 for a in range(3)])
        before = np.minimum.accumulate(steps - place, axis=axis) + place
        behind = np.flip(np.minimum.accumulate(np.flip(steps + place, axis), axis=axis), axis) - place
        steps = np.minimum(before, behind)
    return torch.from_numpy(steps.clip(0, _FARTHEST).astype(np.uint8)).to(lines.device)
