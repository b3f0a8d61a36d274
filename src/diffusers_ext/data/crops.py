"""What is drawn of a row: a square of its picture, of everything that must be cut alike, and one of its captions.

First stages, CLIP, Paella and Versatile Diffusion are trained on squares of a resized picture (`draw_square`); latent
diffusion and cascades on squares of random side and place that are resized (`draw_crop`). The latter are the crops of
the latent-diffusion trainings (Rombach et al., arXiv 2112.10752, appendix D and E; CompVis/latent-diffusion@a506df5:
ldm/data/imagenet.py and CompVis/taming-transformers@3ba01b2:taming/data/image_transforms.py, MIT). Difference: cutting
and resizing are one operation.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Resampling = Literal["bicubic", "area", "nearest"]


@dataclass(frozen=True)
class Crop:
    """A square of a picture, perhaps mirrored left to right.

    Args:
        size: (width, height) of the picture in pixels.
        left, top, side: of the square, in pixels.
        flip: mirror what was cut.
        resized: (width, height) to which the picture is resized before the square is cut out of it.
    """

    size: tuple[int, int]
    left: int
    top: int
    side: int
    flip: bool = False
    resized: tuple[int, int] | None = None

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x, y, width, height) relative to the picture, before mirroring."""
        width, height = self.resized or self.size
        return self.left / width, self.top / height, self.side / width, self.side / height

    def image(self, image: Image.Image, resolution: int, resampling: Resampling = "bicubic") -> Tensor:
        """The square of an RGB picture, float32 (3, resolution, resolution) in [-1, 1].

        A picture of another size than `size` is cut at the same place relative to its sides.
        """
        pixels = self._cut(image.convert("RGB"), resolution, resampling).astype(np.float32)
        return torch.from_numpy(pixels.transpose(2, 0, 1) / 127.5 - 1.0).contiguous()

    def labels(self, label_map: Image.Image, resolution: int) -> Tensor:
        """The square of a picture of class numbers, int64 (resolution, resolution), nearest neighbour.

        Raises:
            ValueError: the map has several channels, or (unless both are resized first) another size than the picture.
        """
        if len(label_map.getbands()) != 1:
            raise ValueError(
                f"A label map has the mode {label_map.mode!r}, but must have one channel whose pixels are class "
                "numbers (mode L, P or I)."
            )
        if self.resized is None and label_map.size != self.size:
            raise ValueError(
                f"The label map has {label_map.width}x{label_map.height} pixels, its picture "
                f"{self.size[0]}x{self.size[1]}: both must be of one size."
            )
        return torch.from_numpy(self._cut(label_map, resolution, "nearest").astype(np.int64))

    def values(self, values: np.ndarray, name: str) -> np.ndarray:
        """The square of an array (h, w) or (h, w, c) of the picture's size, as it is: of `draw_crop` and `draw_patch`.

        Args:
            name: What messages call the array.

        Raises:
            ValueError: the array has another size than the picture.
        """
        assert self.resized is None
        width, height = self.size
        if values.shape[:2] != (height, width):
            raise ValueError(
                f"The {name} has {values.shape[1]}x{values.shape[0]} pixels, its picture {width}x{height}: both must "
                "be of one size."
            )
        square = values[self.top : self.top + self.side, self.left : self.left + self.side]
        return np.ascontiguousarray(square[:, ::-1] if self.flip else square)

    def _cut(self, image: Image.Image, resolution: int, resampling: Resampling) -> np.ndarray:
        width, height = self.resized or self.size
        enlarges = self.side * image.width < resolution * width
        method = {
            "bicubic": Image.Resampling.BICUBIC,
            "nearest": Image.Resampling.NEAREST,
            # of an enlarged picture area interpolation is linear
            "area": Image.Resampling.BILINEAR if enlarges else Image.Resampling.BOX,
        }[resampling]
        gap = None if resampling == "nearest" else 3.0
        if self.resized is not None:
            image = image.resize(self.resized, method, reducing_gap=gap)
        # rounded, so that whole pixels stay whole and nothing is resampled
        left, right = (round(x * image.width / width, 6) for x in (self.left, self.left + self.side))
        top, bottom = (round(y * image.height / height, 6) for y in (self.top, self.top + self.side))
        square, box = (resolution, resolution), (left, top, right, bottom)
        pixels = np.asarray(image.resize(square, method, box=box, reducing_gap=gap))
        return pixels[:, ::-1] if self.flip else pixels


def draw_square(
    size: tuple[int, int],
    resolution: int,
    generator: torch.Generator | None = None,
    *,
    center_crop: bool = False,
    random_flip: bool = False,
) -> Crop:
    """A square of `resolution` pixels of the picture whose shorter side is resized to as many.

    Args:
        size: (width, height) of the picture.
        resolution: side of the square.
        generator: three draws, whatever the options: place (two), mirroring.
        center_crop: take the centre instead of a random place.
        random_flip: mirror with probability 1/2.
    """
    scale = resolution / min(size)
    width, height = resized = (max(resolution, round(size[0] * scale)), max(resolution, round(size[1] * scale)))
    across, down, mirror = torch.rand(3, generator=generator).tolist()
    if center_crop:
        left, top = (width - resolution) // 2, (height - resolution) // 2
    else:
        left, top = int(across * (width - resolution + 1)), int(down * (height - resolution + 1))
    return Crop(size, left, top, resolution, random_flip and mirror < 0.5, resized)


def draw_crop(
    size: tuple[int, int],
    resolution: int,
    generator: torch.Generator | None = None,
    *,
    scale: tuple[float, float] = (1.0, 1.0),
    center_crop: bool = False,
    random_flip: bool = False,
) -> Crop:
    """A square of random side and place.

    Args:
        size: (width, height) of the picture.
        resolution: to which the square will be resized; the smallest side where `scale` starts at 0.
        generator: four draws, whatever the options: side, place (two), mirroring.
        scale: range of the side relative to the picture's shorter one. (1, 1) takes the largest square, (0.5, 1) is
            the original's for super-resolution, and (0, 1) is taming's `random-2d`: from `resolution` pixels on.
        center_crop: take the centre instead of a random place.
        random_flip: mirror with probability 1/2.
    """
    grows, across, down, mirror = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    width, height = size
    shorter = min(size)
    if scale[0] == 0:
        smallest, largest = min(resolution, shorter), max(1, int(scale[1] * shorter))
        side = min(smallest, largest) + int(grows * (largest - min(smallest, largest) + 1))
    else:
        side = max(1, int(shorter * (scale[0] + grows * (scale[1] - scale[0]))))
    if center_crop:
        left, top = (width - side) // 2, (height - side) // 2
    else:
        left, top = int(across * (width - side + 1)), int(down * (height - side + 1))
    return Crop(size, left, top, side, random_flip and mirror < 0.5)


def draw_patch(
    size: tuple[int, int],
    side: int,
    generator: torch.Generator | None = None,
    *,
    multiple: int = 1,
    center_crop: bool = False,
    random_flip: bool = False,
) -> Crop:
    """A square of `side` pixels, so that nothing is resized: for pictures given in two resolutions.

    Args:
        size: (width, height) of the larger picture.
        side: of the square.
        generator, center_crop, random_flip: as `draw_crop`, with its four draws.
        multiple: of which left and top are multiples: the factor between the two resolutions.

    Raises:
        ValueError: the picture is smaller than the square.
    """
    if min(size) < side:
        raise ValueError(f"The picture has {size[0]}x{size[1]} pixels, a crop without resizing needs {side} a side.")
    _, across, down, mirror = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    if center_crop:
        across = down = 0.5 * (1 - 1e-9)  # the middle of the places that there are
    left, top = (
        multiple * int(draw * ((length - side) // multiple + 1))
        for draw, length in ((across, size[0]), (down, size[1]))
    )
    return Crop(size, left, top, side, random_flip and mirror < 0.5)


def prepare_image(
    image: Image.Image,
    resolution: int,
    *,
    generator: torch.Generator | None = None,
    center_crop: bool = False,
    random_flip: bool = False,
) -> Tensor:
    """The square of `draw_square`, float32 (3, resolution, resolution) in [-1, 1]."""
    crop = draw_square(image.size, resolution, generator, center_crop=center_crop, random_flip=random_flip)
    return crop.image(image, resolution)


def choose_text(captions: str | list[str], generator: torch.Generator | None = None) -> str:
    """One of a sample's captions (one draw).

    Raises:
        ValueError: the list is empty.
    """
    options = [captions] if isinstance(captions, str) else captions
    if len(options) == 0:
        raise ValueError("A sample has an empty list of captions: give it a caption, or remove it.")
    return options[int(torch.randint(len(options), (), generator=generator))]
