"""PIL pictures of any mode to pixels, the one way for sampling and training: the same file gives the same pixels.

Upright as the camera wrote it down (EXIF). `convert` alone would drop transparency and clip what has more than 8 bits.
"""

import numpy as np
from PIL import Image, ImageOps

_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
_PLAIN_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")  # those that `convert` turns into RGB and L
NEARLY = 1e-3  # values may leave [0, 1] by so much: rounding, and less than half a step of 8 bits


def read_rgb(picture: Image.Image, name: str = "image") -> Image.Image:
    """The picture upright, of mode RGB; transparent parts are white, and more than 8 bits are scaled to 8.

    Args:
        name: What messages call it.

    Raises:
        ValueError: A mode without a meaning as colours, or values whose range is not known.
    """
    picture = ImageOps.exif_transpose(picture)  # a copy
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if is_deep(picture):
        return Image.fromarray(_deep_to_8_bits(picture, name)).convert("RGB")
    if is_transparent(picture):
        layers = _with_alpha(picture)
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return _plain(picture, name).convert("RGB")


def read_grey(picture: Image.Image, name: str = "mask_image") -> np.ndarray:
    """The picture upright as brightness, (H, W): integers from 0 to 1, 255 or 65535, or floats as they are.

    Transparent parts are black: a brush that paints white on nothing gives white where it painted.

    Args:
        name: What messages call it.
    """
    picture = ImageOps.exif_transpose(picture)
    if is_deep(picture):
        return np.array(picture)
    if is_transparent(picture):
        layers = _with_alpha(picture)
        return np.array(Image.alpha_composite(Image.new("RGBA", layers.size, "black"), layers).convert("L"))
    return np.array(_plain(picture, name).convert("L"))


def is_transparent(picture: Image.Image) -> bool:
    return picture.mode in _ALPHA_MODES or "transparency" in picture.info


def is_deep(picture: Image.Image) -> bool:
    """Whether it holds one number a pixel of more than 8 bits: the modes I, F and I;16 with their byte orders."""
    return picture.mode.startswith("I") or picture.mode == "F"


def largest_value(highest: float) -> int | None:
    """What stands for white where integers go up to `highest`: 1, or all that 8 or 16 bits hold; None above."""
    return next((largest for largest in (1, 255, 65535) if highest <= largest), None)


def _with_alpha(picture: Image.Image) -> Image.Image:
    if picture.mode == "La":  # colours that are multiplied by their alpha already
        picture = picture.convert("LA")
    return picture.convert("RGBA")


def _plain(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode not in _PLAIN_MODES:
        raise ValueError(
            f"`{name}` is a PIL picture of mode {picture.mode!r}, which has no conversion to RGB: save it as PNG or"
            f" JPEG in another program, or pass an RGB picture. Modes that are read: {', '.join(_PLAIN_MODES)},"
            f" {', '.join(_ALPHA_MODES)}, I;16, I and F."
        )
    return picture


def _deep_to_8_bits(picture: Image.Image, name: str) -> np.ndarray:
    """uint8 (H, W) of one number a pixel: 16 bits, integers of 8 or 16 bits in 32, or floats in [0, 1]."""
    values = np.asarray(picture)
    low, high = float(values.min()), float(values.max())  # NaN stays NaN
    if picture.mode == "F":
        if not (low >= -NEARLY and high <= 1 + NEARLY):
            raise ValueError(
                f"`{name}` is a picture of floats (mode 'F') from {low:.7g} to {high:.7g}; floats are read in [0, 1]."
                " Scale them, for instance `Image.fromarray((np.asarray(image) / highest).astype('float32'))` with"
                " the value of white as `highest`."
            )
        return (values.clip(0, 1) * 255).round().astype(np.uint8)
    if not (low >= 0 and high <= 65535):
        raise ValueError(
            f"`{name}` is a picture of integers (mode {picture.mode!r}) from {low:.0f} to {high:.0f}; 0 to 255 and 0"
            " to 65535 are read. Scale them, for instance"
            " `Image.fromarray((np.asarray(image) / highest).astype('float32'))` with the value of white as `highest`."
        )
    if picture.mode == "I" and high <= 255:  # 8 bits that were stored in 32
        return values.astype(np.uint8)
    return (values // 256).astype(np.uint8)
