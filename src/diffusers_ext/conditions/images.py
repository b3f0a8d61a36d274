"""Pictures as users hold them (PIL, numpy, torch; one or several) to float tensors."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .pixels import NEARLY, read_rgb


def image_list(image: Any, name: str = "image") -> list[Tensor]:
    """One picture or several, each as float32 `(3, H, W)` in [0, 1]; their sizes may differ.

    Args:
        image: A PIL picture of any mode, see `pixels.read_rgb`: upright by its EXIF, transparent parts white, 16 bits
            scaled. An array `(H, W, 3)` or `(b, H, W, 3)`; a tensor `(3, H, W)` or `(b, 3, H, W)`; with one channel
            in place of three it is grey. Arrays and tensors hold uint8 or floats in [0, 1]. Or a list of those.
        name: What messages call it.

    Raises:
        TypeError: Something else.
        ValueError: An empty list, another shape or mode, or values outside the range.
    """
    if isinstance(image, (list, tuple)):
        if len(image) == 0:
            raise ValueError(f"`{name}` is an empty list; pass at least one picture.")
        return [picture for entry in image for picture in image_list(entry, name)]
    if isinstance(image, Image.Image):
        pixels = torch.from_numpy(np.array(read_rgb(image, name))).permute(2, 0, 1)
    elif isinstance(image, np.ndarray):
        if image.ndim not in (3, 4) or image.shape[-1] not in (1, 3):
            raise ValueError(
                f"`{name}` must have shape (H, W, 3) or (b, H, W, 3) as an array, received"
                f" {image.shape}.{_shape_advice(image.ndim, image.shape[-1] == 4)}"
            )
        pixels = torch.from_numpy(np.array(image)).movedim(-1, -3)
    elif isinstance(image, Tensor):
        if image.ndim not in (3, 4) or image.shape[-3] not in (1, 3):
            raise ValueError(
                f"`{name}` must have shape (3, H, W) or (b, 3, H, W) as a tensor, received {tuple(image.shape)}."
            )
        pixels = image.detach()
    else:
        raise TypeError(
            f"`{name}` must be a PIL picture, a numpy array, a torch tensor or a list of them, received"
            f" {type(image).__name__}."
        )
    if pixels.numel() == 0:
        raise ValueError(f"`{name}` is empty: its shape is {tuple(pixels.shape)}.")
    pixels = _to_unit_range(pixels, name)
    return list(pixels.expand(*pixels.shape[:-3], 3, -1, -1).reshape(-1, 3, *pixels.shape[-2:]))


def image_batch(image: Any, name: str = "image") -> Tensor:
    """As `image_list`, but all of one size: float32 `(b, 3, H, W)` in [0, 1]."""
    images = image_list(image, name)
    sizes = sorted({(picture.shape[2], picture.shape[1]) for picture in images})
    if len(sizes) > 1:
        raise ValueError(
            f"`{name}` holds pictures of different sizes: {', '.join(f'{w}x{h}' for w, h in sizes)}; resize them to"
            " one size, or call once a size."
        )
    return torch.stack([picture.to(images[0].device) for picture in images])


def resize_images(images: Tensor, height: int, width: int) -> Tensor:
    """`(b, 3, H, W)` in [0, 1] to another size, bicubic with a low-pass filter where it shrinks; stays in [0, 1]."""
    if tuple(images.shape[2:]) == (height, width):
        return images
    return F.interpolate(images, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1)


def _shape_advice(ndim: int, transparent: bool) -> str:
    if transparent:
        return " Pass `PIL.Image.fromarray(image)` for each picture: its transparent parts are read as white."
    return " A grey picture needs a channel: `image[..., None]`." if ndim == 2 else ""


def _to_unit_range(pixels: Tensor, name: str) -> Tensor:
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if not pixels.is_floating_point():
        raise TypeError(
            f"`{name}` must hold uint8 or floating-point values, received {pixels.dtype}: divide by the value of"
            " white, for instance `image / 65535` for 16 bits."
        )
    pixels = pixels.float()
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -NEARLY and high <= 1 + NEARLY):  # also refuses NaN
        raise ValueError(
            f"`{name}` must hold floats in [0, 1], received {low:.7g} to {high:.7g}; for values in [-1, 1] pass"
            " `(image + 1) / 2`, for 0 to 255 pass uint8."
        )
    return pixels.clamp(0, 1)
