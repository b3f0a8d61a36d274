"""From a PIL picture to the tensor that a network is trained on: it is resized, then a square is cut.

For first stages, CLIP, Paella and Versatile Diffusion. What must be cut like the picture, and squares of random size,
are in `crops.py`, where a square is cut first: for latent diffusion and cascades.
"""

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
    pixels = _cut_square(
        image.convert("RGB"), resolution, Image.Resampling.BICUBIC, generator, center_crop, random_flip
    )
    return torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1.0).contiguous()


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
    if len(image.getbands()) != 1:
        raise ValueError(
            f"A label map has the mode {image.mode!r}, but must have one channel whose pixels are class numbers "
            "(mode L, P or I)."
        )
    labels = _cut_square(image, resolution, Image.Resampling.NEAREST, generator, center_crop, random_flip)
    return torch.from_numpy(labels.astype(np.int64))


def _cut_square(
    image: Image.Image,
    resolution: int,
    resample: Image.Resampling,
    generator: torch.Generator | None,
    center_crop: bool,
    random_flip: bool,
) -> np.ndarray:
    """The pixels of the resized, cropped and perhaps mirrored picture; three draws, whatever the options."""
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    if image.size != (width, height):
        gap = None if resample == Image.Resampling.NEAREST else 3.0
        image = image.resize((width, height), resample, reducing_gap=gap)
    across, down, mirror = torch.rand(3, generator=generator).tolist()
    if center_crop:
        left, top = (width - resolution) // 2, (height - resolution) // 2
    else:
        left, top = int(across * (width - resolution + 1)), int(down * (height - resolution + 1))
    pixels = np.asarray(image)[top : top + resolution, left : left + resolution]
    return pixels[:, ::-1] if random_flip and mirror < 0.5 else pixels
