"""From a PIL picture to the tensor that a network is trained on."""

import numpy as np
import torch
from PIL import Image


def prepare_image(
    image: Image.Image,
    resolution: int,
    *,
    generator: torch.Generator | None = None,
    center_crop: bool = False,
    random_flip: bool = False,
) -> torch.Tensor:
    """Resizes the shorter side to `resolution`, crops a square and scales it to [-1, 1].

    Args:
        image: RGB picture of any size.
        resolution: Side of the result in pixels.
        generator: Draws the place of the crop and the flip (two draws for the place, one for the flip).
        center_crop: Crop the centre instead of a random place.
        random_flip: Mirror left to right with probability 1/2.

    Returns:
        float32 (3, resolution, resolution).
    """
    width, height = image.size
    scale = resolution / min(width, height)
    size = max(resolution, round(width * scale)), max(resolution, round(height * scale))
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    left, top, flip = _place(size, resolution, generator, center_crop)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)[top : top + resolution, left : left + resolution]
    if random_flip and flip:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(pixels.transpose(2, 0, 1) / 127.5 - 1.0).contiguous()


def choose_text(captions: str | list[str], generator: torch.Generator | None = None) -> str:
    """One of a sample's captions (one draw).

    Raises:
        ValueError: the list is empty.
    """
    options = [captions] if isinstance(captions, str) else captions
    if len(options) == 0:
        raise ValueError("A sample has an empty list of captions: give it a caption, or remove it.")
    return options[int(torch.randint(len(options), (), generator=generator))]


def prepare_map(
    image: Image.Image,
    resolution: int,
    *,
    generator: torch.Generator | None = None,
    center_crop: bool = False,
    random_flip: bool = False,
) -> torch.Tensor:
    """As `prepare_image`, with the same draws, for a picture of integer labels: nearest neighbour, no scaling.

    Returns:
        int64 (resolution, resolution).

    Raises:
        ValueError: the picture has several channels (colours instead of labels).
    """
    width, height = image.size
    scale = resolution / min(width, height)
    size = max(resolution, round(width * scale)), max(resolution, round(height * scale))
    image = image.resize(size, Image.Resampling.NEAREST)
    left, top, flip = _place(size, resolution, generator, center_crop)
    labels = np.asarray(image)[top : top + resolution, left : left + resolution]
    if labels.ndim != 2:
        raise ValueError(
            f"A label map has the mode {image.mode!r}, but must have one channel whose pixels are class numbers "
            "(mode L, P or I)."
        )
    if random_flip and flip:
        labels = labels[:, ::-1]
    return torch.from_numpy(labels.astype(np.int64))


def _place(
    size: tuple[int, int], resolution: int, generator: torch.Generator | None, center_crop: bool
) -> tuple[int, int, bool]:
    """Left and top edge of the crop, and whether to flip: three draws."""
    left, top = size[0] - resolution, size[1] - resolution
    places = torch.rand(3, generator=generator).tolist()
    if center_crop:
        return left // 2, top // 2, places[2] < 0.5
    return int(places[0] * (left + 1)), int(places[1] * (top + 1)), places[2] < 0.5
