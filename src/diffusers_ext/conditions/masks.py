"""Masks as users hold them to boolean tensors, and to the coarser grid of a tokenizer; random ones for training."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Generator, Tensor

from .pixels import NEARLY, is_deep, is_transparent, largest_value, read_grey


@dataclass(frozen=True)
class _MaskSetting:
    """Ranges with both ends included; lengths in pixels of a picture whose shorter side is 256."""

    stroke_probability: float  # else boxes
    strokes: tuple[int, int]
    length: tuple[int, int]  # of each of a stroke's one to five straight parts
    width: tuple[int, int]
    boxes: tuple[int, int]
    side: tuple[int, int]
    margin: int


_MASK_SETTINGS = {
    "large": _MaskSetting(1 / 2, (1, 6), (10, 209), (5, 104), (1, 4), (30, 150), 10),
    "medium": _MaskSetting(1 / 1.3, (4, 6), (10, 109), (5, 54), (1, 5), (10, 50), 0),
}
_ANGLES = (0.01, 1.01, 2.01, 3.01)  # radians, from straight down; every other stroke turns the other way


def mask_batch(mask: Any, name: str = "mask_image") -> Tensor:
    """One mask or several of one size as bool `(b, H, W)`, True where it is white (1: repaint, in diffusers).

    Args:
        mask: As `mask_values` takes it, black and white: 0 and 1 (or True), 0 and 255, or 0 and 65535.
        name: What messages call it.

    Raises:
        TypeError: Something else.
        ValueError: An empty list, another shape or mode, different sizes, or values besides the two.
    """
    if isinstance(mask, (list, tuple)):
        return _several([mask_batch(entry, name) for entry in mask], name)
    return _binary(*_single(mask, name), name, _threshold_advice(mask))


def mask_values(mask: Any, name: str = "mask_image") -> Tensor:
    """One mask or several of one size as float32 `(b, H, W)` in [0, 1], 1 where it is white; soft ones too.

    Args:
        mask: A PIL picture of any mode, see `pixels.read_grey`: upright by its EXIF, transparent parts black. An array
            `(H, W)`, `(b, H, W)`, or either with one channel behind; a tensor `(H, W)`, `(b, H, W)` or
            `(b, 1, H, W)`; boolean, floats in [0, 1], or integers up to 1, 255 or 65535, whichever is white. Or a
            list of those.
        name: What messages call it.

    Raises:
        TypeError: Something else.
        ValueError: An empty list, another shape or mode, different sizes, or values outside the range.
    """
    if isinstance(mask, (list, tuple)):
        return _several([mask_values(entry, name) for entry in mask], name)
    return _single(mask, name)[0]


def mask_to_tokens(mask: Tensor, factor: int) -> Tensor:
    """Bool `(b, H, W)` in pixels to `(b, H / factor, W / factor)`: a token is in it if any of its pixels is.

    So all that was asked to be repainted is; of what was to be kept, at most a part of the tokens at the border is
    repainted with it.
    """
    return F.max_pool2d(mask[:, None].float(), factor)[:, 0] > 0


def random_mask(height: int, width: int, generator: Generator, *, size: str = "large") -> Tensor:
    """A hole as LaMa trains with: thick polygonal strokes, or boxes.

    Suvorov et al., "Resolution-robust Large Mask Inpainting with Fourier Convolutions", arXiv 2109.07161, section 2.4.
    Which settings Rombach et al. (arXiv 2112.10752, section 4.5) used of it is not known; these are the numbers of
    advimman/lama@6bb7047 (Apache-2.0), configs/training/data/abl-04-256-mh-dist.yaml (`large`) and
    configs/data_gen/random_medium_256.yaml (`medium`), counted as its code does (one stroke more than they say).

    Args:
        height, width: in pixels, at least 8. The ranges, given for 256 pixels, grow with the shorter side.
        generator: on the CPU; draws everything.
        size: `large`, which LaMa was trained with, or `medium`, one of its test sets.

    Returns:
        float32 (1, height, width): 1 in the hole, 0 where the picture is known; never all of one kind.

    Raises:
        TypeError: if `generator` is none.
        ValueError: for another `size`, or a picture too small.
    """
    if size not in _MASK_SETTINGS:
        raise ValueError(f"`size` is {size!r}: it must be one of {', '.join(_MASK_SETTINGS)}.")
    if min(height, width) < 8:
        raise ValueError(f"`height` and `width` are {height} and {width}: both must be at least 8.")
    if not isinstance(generator, Generator):
        raise TypeError(f"`generator` is {type(generator).__name__}: it must be a torch.Generator on the CPU.")
    setting = _MASK_SETTINGS[size]
    while True:
        picture = Image.new("L", (width, height))
        strokes = torch.rand((), generator=generator).item() < setting.stroke_probability
        (_draw_strokes if strokes else _draw_boxes)(picture, setting, generator)
        mask = torch.from_numpy(np.array(picture)).float()[None]
        if 0 < float(mask.sum()) < mask.numel():  # hardly ever otherwise
            return mask


def _draw_strokes(picture: Image.Image, setting: _MaskSetting, generator: Generator) -> None:
    """Chains of thick lines with round joints."""
    scale = min(picture.size) / 256
    canvas = ImageDraw.Draw(picture)
    for stroke in range(_integer(setting.strokes, generator)):
        x, y = (_integer((0, side - 1), generator) for side in picture.size)
        for _ in range(_integer((1, 5), generator)):
            angle = _ANGLES[_integer((0, 3), generator)] * (-1 if stroke % 2 == 0 else 1)
            length = scale * _integer(setting.length, generator)
            thickness = max(1, round(scale * _integer(setting.width, generator)))
            end = (
                min(max(round(x + length * math.sin(angle)), 0), picture.width),
                min(max(round(y + length * math.cos(angle)), 0), picture.height),
            )
            canvas.line((x, y, *end), fill=1, width=thickness)
            for centre in ((x, y), end):
                canvas.circle(centre, thickness / 2, fill=1)
            x, y = end


def _draw_boxes(picture: Image.Image, setting: _MaskSetting, generator: Generator) -> None:
    """Rectangles, all within a margin."""
    scale = min(picture.size) / 256
    margin = int(scale * setting.margin)
    canvas = ImageDraw.Draw(picture)
    for _ in range(_integer(setting.boxes, generator)):
        sides = [max(1, round(scale * _integer(setting.side, generator))) for _ in range(2)]
        start = [
            _integer((margin, whole - margin - s), generator) for whole, s in zip(picture.size, sides, strict=True)
        ]
        canvas.rectangle((*start, start[0] + sides[0] - 1, start[1] + sides[1] - 1), fill=1)


def _integer(bounds: tuple[int, int], generator: Generator) -> int:
    """One of the integers from the first to the last bound."""
    return int(torch.randint(bounds[0], bounds[1] + 1, (), generator=generator))


def _several(masks: list[Tensor], name: str) -> Tensor:
    if len(masks) == 0:
        raise ValueError(f"`{name}` is an empty list; pass at least one mask.")
    sizes = sorted({(entry.shape[2], entry.shape[1]) for entry in masks})
    if len(sizes) > 1:
        raise ValueError(f"`{name}` holds masks of different sizes: {', '.join(f'{w}x{h}' for w, h in sizes)}.")
    return torch.cat([entry.to(masks[0].device) for entry in masks])


def _single(mask: Any, name: str) -> tuple[Tensor, int]:
    """All that `mask_values` takes but lists, as float32 (b, H, W) in [0, 1], and what stood for white."""
    if isinstance(mask, Image.Image):
        values = torch.from_numpy(read_grey(mask, name))
    elif isinstance(mask, (np.ndarray, Tensor)):
        values = mask.detach() if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask))
        channel = -1 if isinstance(mask, np.ndarray) or values.ndim == 3 else 1
        if values.ndim in (3, 4) and values.shape[channel] == 1:  # no mask is one pixel wide
            values = values.squeeze(channel)
        colours = isinstance(mask, np.ndarray) and mask.ndim == 3 and mask.shape[-1] in (3, 4) and mask.shape[1] > 4
        if values.ndim not in (2, 3) or values.numel() == 0 or colours:
            advice = " Pass one of its channels: `mask[..., 0]`." if colours else ""
            raise ValueError(
                f"`{name}` must have shape (H, W), (b, H, W) or that with one channel, received"
                f" {tuple(mask.shape)}.{advice}"
            )
    else:
        raise TypeError(
            f"`{name}` must be a PIL picture, a numpy array, a torch tensor or a list of them, received"
            f" {type(mask).__name__}."
        )
    return _to_unit_range(values.reshape(-1, *values.shape[-2:]), name)


def _to_unit_range(values: Tensor, name: str) -> tuple[Tensor, int]:
    if values.dtype == torch.bool:
        return values.float(), 1
    exact = values.is_floating_point()
    values = values.cpu().double()
    low, high = float(values.min()), float(values.max())
    white = 1 if exact else largest_value(high)
    if white is None or not (low >= -NEARLY and high <= 1 + NEARLY if exact else low >= 0):  # also refuses NaN
        raise ValueError(
            f"`{name}` holds values from {low:.7g} to {high:.7g}: pass floats from 0 to 1, or integers up to 1, 255 or"
            " 65535, whichever is white."
        )
    return (values / white).clamp(0, 1).float(), white


def _threshold_advice(mask: Any) -> str:
    """The expression that makes two values of it."""
    if not isinstance(mask, Image.Image):
        return "`mask > middle` with the value between the two as `middle`"
    if is_deep(mask):
        return "`np.asarray(mask) > middle` with the value between the two as `middle`"
    if is_transparent(mask):
        return "`mask.getchannel('A').point(lambda value: 255 * (value > 127))` where its alpha is the mask"
    return "`mask.convert('L').point(lambda value: 255 * (value > 127))`"


def _binary(values: Tensor, white: int, name: str, advice: str) -> Tensor:
    on = values >= 1 - NEARLY
    others = ~(on | (values <= NEARLY))
    if bool(others.any()):
        _, y, x = others.nonzero()[0].tolist()
        found = values[others].unique()
        raise ValueError(
            f"`{name}` must be binary, black (0) to keep and white ({white}) to repaint; received {len(found)} other"
            f" value(s), {white * found[0].item():.4g} at x={x}, y={y}. Threshold it, for instance {advice}."
        )
    return on
