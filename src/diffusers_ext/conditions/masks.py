"""Masks as users hold them to boolean tensors, and to the coarser grid of a tokenizer."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def mask_batch(mask: Any, name: str = "mask_image") -> Tensor:
    """One mask or several of one size as bool `(b, H, W)`, True where it is white (1: repaint, in diffusers).

    Args:
        mask: A PIL picture (black and white, in any of the modes 1, L and RGB); an array `(H, W)`, `(b, H, W)` or
            `(b, H, W, 1)`; a tensor `(H, W)`, `(b, H, W)` or `(b, 1, H, W)`; boolean, or 0 and 1, or uint8 0 and 255.
            Or a list of those.
        name: What messages call it.

    Raises:
        TypeError: Something else.
        ValueError: An empty list, another shape or mode, different sizes, or values besides the two.
    """
    if isinstance(mask, (list, tuple)):
        if len(mask) == 0:
            raise ValueError(f"`{name}` is an empty list; pass at least one mask.")
        masks = [mask_batch(entry, name) for entry in mask]
        sizes = sorted({(entry.shape[2], entry.shape[1]) for entry in masks})
        if len(sizes) > 1:
            raise ValueError(f"`{name}` holds masks of different sizes: {', '.join(f'{w}x{h}' for w, h in sizes)}.")
        return torch.cat([entry.to(masks[0].device) for entry in masks])
    if isinstance(mask, Image.Image):
        if mask.mode not in ("1", "L", "RGB"):
            raise ValueError(f"`{name}` is a PIL picture of mode {mask.mode!r}; pass `mask.convert('L')`.")
        values = torch.from_numpy(np.array(mask.convert("L")))
    elif isinstance(mask, (np.ndarray, Tensor)):
        values = torch.as_tensor(mask).detach()
        channel = -1 if isinstance(mask, np.ndarray) else 1
        if values.ndim == 4 and values.shape[channel] == 1:
            values = values.squeeze(channel)
        if values.ndim not in (2, 3) or values.numel() == 0:
            raise ValueError(
                f"`{name}` must have shape (H, W), (b, H, W) or that with one channel, received {tuple(mask.shape)}."
            )
    else:
        raise TypeError(
            f"`{name}` must be a PIL picture, a numpy array, a torch tensor or a list of them, received"
            f" {type(mask).__name__}."
        )
    return _binary(values.reshape(-1, *values.shape[-2:]), name)


def mask_to_tokens(mask: Tensor, factor: int) -> Tensor:
    """Bool `(b, H, W)` in pixels to `(b, H / factor, W / factor)`: a token is in it if any of its pixels is.

    So all that was asked to be repainted is; of what was to be kept, at most a part of the tokens at the border is
    repainted with it.
    """
    return F.max_pool2d(mask[:, None].float(), factor)[:, 0] > 0


def _binary(values: Tensor, name: str) -> Tensor:
    white = 255 if values.dtype == torch.uint8 and int(values.max()) > 1 else 1
    on = values == white
    others = ~(on | (values == 0))  # also NaN
    if bool(others.any()):
        _, y, x = others.nonzero()[0].tolist()
        found = values[others].unique()
        raise ValueError(
            f"`{name}` must be binary, black (0) to keep and white ({white}) to repaint; received {len(found)} other"
            f" value(s), {found[0].item():.4g} at x={x}, y={y}. Threshold it, for instance"
            " `mask.convert('L').point(lambda value: 255 * (value > 127))`."
        )
    return on
