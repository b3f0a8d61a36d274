"""Semantic label maps as users hold them (PIL, numpy, torch; one or several) to integer tensors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from .palettes import labels_from_colors

_LISTED = 12  # unknown labels that a message names


def label_batch(
    label_map: Any,
    num_labels: int,
    *,
    palette: Sequence[Sequence[int]] | None = None,
    name: str = "label_map",
) -> Tensor:
    """One map or several of one size as int64 (b, H, W), labels from 0 to `num_labels` - 1.

    Args:
        label_map: A PIL picture of mode L, P or I, whose values are labels; an integer array or tensor (H, W) or
            (b, H, W). A PIL picture of mode RGB, drawn in the palette's colours, or such pictures as uint8
            (H, W, 3) or (b, H, W, 3). Or a list of those.
        num_labels: How many labels there are.
        palette: (r, g, b) of each label.
        name: What messages call it.

    Raises:
        TypeError: Something else.
        ValueError: An empty list, another shape or mode, different sizes, unknown labels or colours.
    """
    if isinstance(label_map, (list, tuple)):
        if len(label_map) == 0:
            raise ValueError(f"`{name}` is an empty list; pass at least one map.")
        maps = [label_batch(entry, num_labels, palette=palette, name=name) for entry in label_map]
        sizes = sorted({(entry.shape[2], entry.shape[1]) for entry in maps})
        if len(sizes) > 1:
            raise ValueError(f"`{name}` holds maps of different sizes: {', '.join(f'{w}x{h}' for w, h in sizes)}.")
        return torch.cat([entry.to(maps[0].device) for entry in maps])
    if isinstance(label_map, Image.Image):
        values = torch.from_numpy(_read_picture(label_map, palette, name))
    elif isinstance(label_map, (np.ndarray, Tensor)):
        values = torch.as_tensor(label_map)
        if values.ndim in (3, 4) and values.shape[-1] == 1:  # one channel behind
            values = values.squeeze(-1)
        elif values.ndim in (3, 4) and values.shape[-1] == 3 and values.dtype == torch.uint8:  # what RGB pictures hold
            pictures = values.reshape(-1, *values.shape[-3:]).cpu().numpy()
            values = torch.from_numpy(np.stack([_read_colors(picture, palette, name) for picture in pictures]))
    else:
        raise TypeError(
            f"`{name}` must be a PIL picture, an integer array or tensor, or a list of them, received"
            f" {type(label_map).__name__}."
        )
    if values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        raise TypeError(f"`{name}` must hold integers, one label a pixel, received {values.dtype}.")
    if values.ndim not in (2, 3) or values.numel() == 0:
        raise ValueError(f"`{name}` must have shape (H, W) or (b, H, W), received {tuple(values.shape)}.")
    values = values.long().reshape(-1, *values.shape[-2:])
    _check_labels(values, num_labels, name)
    return values


def resize_labels(labels: Tensor, height: int, width: int) -> Tensor:
    """Label maps (b, H, W) at another size, nearest neighbour."""
    if tuple(labels.shape[1:]) == (height, width):
        return labels
    # which place each new one takes its label from: in float64, so on the CPU, since not all devices know it
    places = torch.arange(labels[0].numel(), dtype=torch.float64).view(1, 1, *labels.shape[1:])
    nearest = F.interpolate(places, size=(height, width), mode="nearest-exact")[0, 0].long()
    return labels.flatten(1)[:, nearest.to(labels.device)]


def _read_picture(picture: Image.Image, palette: Sequence[Sequence[int]] | None, name: str) -> np.ndarray:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in ("L", "P") or picture.mode.startswith("I"):
        return np.array(picture)
    if picture.mode != "RGB":
        raise ValueError(
            f"`{name}` is a PIL picture of mode {picture.mode!r}; the modes L, P and I hold labels, RGB colours of the"
            " palette."
        )
    return _read_colors(picture, palette, name)


def _read_colors(picture: Image.Image | np.ndarray, palette: Sequence[Sequence[int]] | None, name: str) -> np.ndarray:
    if palette is None:
        raise ValueError(
            f"`{name}` is a coloured picture, but the pipeline has no `label_palette`: pass integers, or a PIL picture"
            " of mode L or P that holds them."
        )
    return labels_from_colors(picture, np.asarray(palette), name=name)


def _check_labels(values: Tensor, num_labels: int, name: str) -> None:
    unknown = (values < 0) | (values >= num_labels)
    if bool(unknown.any()):
        _, y, x = unknown.nonzero()[0].tolist()
        found = values[unknown].unique().tolist()
        listed = ", ".join(map(str, found[:_LISTED])) + (" ..." if len(found) > _LISTED else "")
        raise ValueError(
            f"`{name}` holds {len(found)} unknown label(s), {int(values[unknown][0])} at x={x}, y={y}: this model"
            f" knows the labels 0 to {num_labels - 1}, but not {listed}. Map others onto these; what is unlabelled"
            " (often 255) needs a label as well."
        )
