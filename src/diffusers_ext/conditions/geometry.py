"""Normals and depth to the six channels that PITI's encoder takes.

Wang et al., arXiv 2205.12952; PITI-Synthesis/PITI@d9f7481:preprocess and image_datasets_depth.py (MIT): the normals as
colours, then the logarithm of the depth in matplotlib's `jet` colours. The values are those of the DIODE data set:
unit normals, and depths in metres.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

NEAREST, FARTHEST = 0.5, 300.0  # metres that the colours can tell apart
# matplotlib's `jet`: (position, value) of each channel
_JET = (
    ((0.0, 0.35, 0.66, 0.89, 1.0), (0.0, 0.0, 1.0, 1.0, 0.5)),
    ((0.0, 0.125, 0.375, 0.64, 0.91, 1.0), (0.0, 0.0, 1.0, 1.0, 0.0, 0.0)),
    ((0.0, 0.11, 0.34, 0.65, 1.0), (0.5, 1.0, 1.0, 0.0, 0.0)),
)


def geometry_condition(normals: Tensor, depth: Tensor) -> Tensor:
    """Normals and depth of the same pixels as six channels, floating point (b, 6, h, w) in [-1, 1].

    Args:
        normals: unit normals (b, 3, h, w) in [-1, 1]; (0, 0, 0) where there is none.
        depth: metres (b, h, w), at least 0; 0 where it is unknown.

    Raises:
        TypeError: for other dtypes.
        ValueError: for other shapes, values that are not finite, or out of range.
    """
    for name, values in (("normals", normals), ("depth", depth)):
        if values.numel() == 0:
            raise ValueError(f"`{name}` is empty: its shape is {tuple(values.shape)}.")
        if not values.is_floating_point():
            raise TypeError(f"`{name}` is {values.dtype}: expected floating point.")
        bad = ~torch.isfinite(values)
        if bad.any():
            raise ValueError(
                f"`{name}` holds {int(bad.sum())} values that are not finite (NaN or infinite): set pixels without a"
                " measurement to 0."
            )
    if normals.ndim != 4 or normals.shape[1] != 3 or depth.shape != (len(normals), *normals.shape[2:]):
        raise ValueError(
            f"`normals` has shape {tuple(normals.shape)} and `depth` {tuple(depth.shape)}: expected (b, 3, h, w) and"
            " (b, h, w)."
        )
    if normals.abs().max() > 1.001:
        raise ValueError(f"`normals` goes to {normals.abs().max():.4g}: expected unit vectors, values in [-1, 1].")
    if depth.min() < 0:
        raise ValueError(f"`depth` goes down to {depth.min():.4g}: expected metres, at least 0.")
    return torch.cat([_normal_colors(normals.float()), torch.stack([_depth_colors(one) for one in depth])], dim=1)


def read_geometry_file(path: Path, option: str) -> Any:
    """Normals (3, h, w) or depth (h, w), floating point, of a .npy file; for normals also the image of another file.

    DIODE and `diffusers-ext prepare diode` write such files: unit normals (h, w, 3), metres (h, w) or (h, w, 1).

    Args:
        option: "--normals" or "--depth", for messages.

    Raises:
        ValueError: The file cannot be read, has another shape or integers, or is a picture of depth.
    """
    if path.suffix.lower() != ".npy":
        if option == "--depth":
            raise ValueError(
                f"{option}: {str(path)!r} is no .npy file of metres (h, w), 0 where unknown. A picture does not say"
                " what its grey values mean: turn them into metres, and save them with `numpy.save`."
            )
        try:
            return Image.open(path)
        except UnidentifiedImageError as error:
            raise ValueError(f"{option}: {str(path)!r} is neither a .npy file nor an image.") from error
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{option}: {str(path)!r} is no .npy file of numbers: {error}") from error
    if option == "--depth":
        values = values[:, :, 0] if values.shape[2:] == (1,) else values
        fits, wanted = values.ndim == 2, "(h, w) or (h, w, 1)"
    else:
        values = np.moveaxis(values, 2, 0) if values.shape[2:] == (3,) else values
        fits, wanted = values.ndim == 3 and values.shape[0] == 3, "(h, w, 3) or (3, h, w)"
    if not fits or not np.issubdtype(values.dtype, np.floating):
        raise ValueError(
            f"{option}: {str(path)!r} holds {values.dtype} of shape {values.shape}; wanted are floats of {wanted}."
        )
    return np.ascontiguousarray(values, dtype=np.float32)


def _normal_colors(normals: Tensor) -> Tensor:
    lowest = normals.amin(dim=(1, 2, 3), keepdim=True)
    missing = (normals == 0).all(dim=1, keepdim=True)
    return ((torch.where(missing, lowest, normals) - lowest) / 2).clamp(0, 1) * 2 - 1


def _depth_colors(depth: Tensor) -> Tensor:
    """(h, w) metres to (3, h, w) in [-1, 1]; unknown pixels are black."""
    metres = depth.cpu().numpy().astype(np.float64)
    known = metres > 0
    colors = np.zeros((3, *metres.shape))
    if known.any():
        far = min(FARTHEST, float(np.percentile(metres[known], 99)))
        metres = np.clip(metres, NEAREST, max(far, NEAREST))
        place = np.log(metres) / np.log(metres[known].max() + 1.01)
        colors = np.stack([np.interp(place.clip(0, 1), *channel) for channel in _JET]) * known
    return torch.from_numpy(colors).float().to(depth.device) * 2 - 1
