"""Label palettes: integer class maps as pictures that people can look at and draw, and back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# the built-in `scenes`: ground, then one class a shape (the object's own colour is not part of the map)
SCENES_CLASSES = ("ground", "circle", "square", "triangle", "star", "ring", "cross")
SCENES_PALETTE = np.array(
    [(32, 32, 32), (230, 25, 75), (60, 180, 75), (0, 130, 200), (255, 225, 25), (240, 50, 230), (70, 240, 240)],
    dtype=np.uint8,
)


def bit_palette(classes: int) -> np.ndarray:
    """Colours that differ in high bits, uint8 (classes, 3): PITI's coding of COCO-Stuff with 182 classes.

    The bits of `label + 1`, lowest first, go to red, green and blue in turn, into their highest free bit
    (PITI-Synthesis/PITI@d9f7481:pretrained_diffusion/image_datasets_mask.py).

    Raises:
        ValueError: fewer than 1 or more than 255 classes, which the coding cannot tell apart.
    """
    if not 1 <= classes <= 255:
        raise ValueError(f"`classes` is {classes}: the coding has colours for 1 to 255 classes.")
    codes, colors = np.arange(1, classes + 1), np.zeros((classes, 3), dtype=np.uint8)
    for bit in range(8):
        colors[:, bit % 3] |= ((codes >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colors


COCO182_PALETTE = bit_palette(182)

_BLACK = np.zeros((1, 3), dtype=np.uint8)
# what has no label is black: behind COCO-Stuff's classes as in PITI, before ADE20K's, whose numbers start at 1. ADE20K
# is coded as COCO-Stuff is: mmsegmentation's colours for it give road and skyscraper the same (140, 140, 140).
NAMED_PALETTES = {
    "coco182": np.concatenate([COCO182_PALETTE, _BLACK]),
    "ade150": np.concatenate([_BLACK, bit_palette(150)]),
}


def read_palette(name: str) -> np.ndarray:
    """Colours of the labels 0, 1, ..., uint8 (labels, 3).

    Args:
        name: a name of `NAMED_PALETTES`, or a JSON file with a list of [red, green, blue].

    Raises:
        ValueError: for another name, a file that holds no such list, or two labels of one colour.
    """
    if name in NAMED_PALETTES:
        return NAMED_PALETTES[name]
    if not Path(name).is_file():
        raise ValueError(f"The palette {name!r} is no file and none of {', '.join(NAMED_PALETTES)}.")
    try:
        colors = json.loads(Path(name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The palette {name!r} is no JSON list of [red, green, blue]: {error}.") from error
    return check_palette(colors, f"The palette {name!r}")


def check_palette(colors: Any, name: str = "The palette") -> np.ndarray:
    """Colours of labels as uint8 (labels, 3).

    Args:
        colors: a list or an array of (red, green, blue).
        name: what messages call it.

    Raises:
        ValueError: for something else, and for two labels of one colour, which a map in colours cannot tell apart:
            names both and their colour.
    """
    try:
        values: Any = np.asarray(colors)
    except ValueError:  # rows of different lengths
        values = np.asarray(None)
    are_colors = values.ndim == 2 and values.shape[1] == 3 and len(values) > 0 and values.dtype.kind in "iu"
    if not are_colors or values.min() < 0 or values.max() > 255:
        raise ValueError(f"{name} must be a list of [red, green, blue], whole numbers from 0 to 255.")
    seen: dict[tuple[int, ...], int] = {}
    for label, row in enumerate(values):
        color = tuple(map(int, row))
        if (other := seen.setdefault(color, label)) != label:
            raise ValueError(f"{name} has the colour {color} for labels {other} and {label}: change one of them.")
    return values.astype(np.uint8)


def colorize_labels(labels: np.ndarray | Image.Image, palette: np.ndarray = SCENES_PALETTE) -> np.ndarray:
    """Class ids (h, w) as a picture: uint8 (h, w, 3).

    Args:
        labels: Integers from 0 to len(palette) - 1, or a PIL picture of mode L or P that holds them.
        palette: uint8 (classes, 3).
    """
    ids = np.asarray(labels)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"`labels` must be integers of shape (h, w), but is {ids.dtype} {ids.shape}.")
    if ids.size and not 0 <= ids.min() <= ids.max() < len(palette):
        raise ValueError(
            f"`labels` must lie between 0 and {len(palette) - 1} for this palette, but lie between {ids.min()} and "
            f"{ids.max()}."
        )
    return palette[ids]


def labels_from_colors(
    picture: np.ndarray | Image.Image,
    palette: np.ndarray = SCENES_PALETTE,
    *,
    tolerance: int = 24,
    name: str = "picture",
) -> np.ndarray:
    """Class ids of a picture drawn in the palette's colours: uint8 (h, w).

    Args:
        picture: uint8 (h, w, 3), or a PIL picture.
        palette: uint8 (classes, 3), at most 256 classes.
        tolerance: Largest difference in a channel from the nearest palette colour (lossy files shift colours).
        name: What messages call the picture.

    Raises:
        ValueError: A pixel is farther from every colour of the palette, or the palette has one colour twice.
    """
    pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"`{name}` must be uint8 of shape (h, w, 3), but is {pixels.dtype} {pixels.shape}.")
    if not 1 <= len(palette) <= 256:
        raise ValueError(f"`palette` must have 1 to 256 colours, but has {len(palette)}.")
    palette = check_palette(palette)
    colors, where = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)  # few colours, many pixels
    distance = np.abs(colors[:, None].astype(np.int16) - palette[None].astype(np.int16)).max(axis=-1)  # (n, classes)
    nearest = distance.argmin(axis=1)
    far = distance.min(axis=1) > tolerance
    if far.any():
        row, column = divmod(int(np.flatnonzero(far[where.ravel()])[0]), pixels.shape[1])
        rgb = tuple(int(value) for value in pixels[row, column])
        raise ValueError(
            f"`{name}` has the colour {rgb} in row {row}, column {column}, which is no colour of the palette: "
            f"draw with its {len(palette)} colours, without anti-aliasing."
        )
    return nearest[where.ravel()].reshape(pixels.shape[:2]).astype(np.uint8)
