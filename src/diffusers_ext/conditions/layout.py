"""Layouts (named boxes) to the token sequences of layout-to-image latent diffusion, and back.

Rombach et al., arXiv 2112.10752, section 4.3.1; format: CompVis/taming-transformers@3ba01b2
:taming/data/conditional_builder/ (MIT). The data set class that the released model was trained with was never
published; length (92), vocabulary (8192) and treatment of the crop fit this builder.

A sequence is (class, top left, bottom right) for each of `max_objects` objects, then (top left, bottom right) of the
crop. Classes and places share one vocabulary, its last token is "none". Differences: boxes and classes are checked,
and a box that touches the picture's border by rounding is cut at it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

Box = tuple[float, float, float, float]

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_ROUNDING = 1e-4  # by which a box may leave the picture


@dataclass(frozen=True)
class LayoutObject:
    """An object of a layout.

    Args:
        category: class number, from 0.
        box: (x, y, width, height) relative to the picture, x and y of the top left corner, all in [0, 1].
        is_group_of, is_occluded, is_depiction, is_inside: flags of Open Images; of COCO only the first (iscrowd).
    """

    category: int
    box: Box
    is_group_of: bool = False
    is_occluded: bool = False
    is_depiction: bool = False
    is_inside: bool = False


@dataclass(frozen=True)
class LayoutTokenizer:
    """Builds token sequences of a fixed length. The defaults are those of the model for COCO.

    Args:
        num_classes: number of categories.
        max_objects: objects in a sequence; further ones are dropped, missing ones filled with "none".
        vocab_size: number of tokens. Places lie on a square grid with floor(sqrt(vocab_size)) points a side.
        encode_crop: describe boxes relative to the whole picture and append the crop; else relative to the crop.
        use_group_flag, use_other_flags: whether the class token also says the flags of an object.
        center_points: (class, centre) pairs instead of boxes; not used by latent diffusion.

    Raises:
        ValueError: if the classes with all their flags do not fit the vocabulary.
    """

    num_classes: int = 182
    max_objects: int = 30
    vocab_size: int = 8192
    encode_crop: bool = True
    use_group_flag: bool = True
    use_other_flags: bool = False
    center_points: bool = False

    def __post_init__(self):
        variants = 16 if self.use_other_flags else 1 + self.use_group_flag
        if self.num_classes * variants > self.none_token:
            raise ValueError(
                f"`num_classes` is {self.num_classes}, with flags {self.num_classes * variants} class tokens: "
                f"`vocab_size` is {self.vocab_size} and holds {self.none_token} beside the token for none."
            )

    @property
    def none_token(self) -> int:
        """Stands for an unused object."""
        return self.vocab_size - 1

    @property
    def side(self) -> int:
        """Grid points along an axis."""
        return math.isqrt(self.vocab_size)

    @property
    def tokens_per_object(self) -> int:
        return 2 if self.center_points else 3

    @property
    def length(self) -> int:
        """Tokens in a sequence: 92 by default."""
        return self.max_objects * self.tokens_per_object + 2 * self.encode_crop

    def encode(
        self,
        objects: Sequence[LayoutObject],
        *,
        crop: Box | None = None,
        flip: bool = False,
        shuffle: Random | None = None,
    ) -> Tensor:
        """A layout as tokens, int64 (length,).

        Args:
            objects: the first `max_objects` are taken, then those that do not meet the crop dropped.
            crop: (x, y, width, height) of the part that the picture shows, relative to the whole.
            flip: the picture is mirrored left to right after cropping.
            shuffle: source of a random order, as in training; None keeps the order.

        Raises:
            ValueError: for a class number or a box out of range.
        """
        for number, item in enumerate(objects):
            _check_box(f"objects[{number}].box", item.box)
            if not 0 <= item.category < self.num_classes:
                raise ValueError(
                    f"`objects[{number}].category` is {item.category}: this tokenizer knows the classes 0 to "
                    f"{self.num_classes - 1}."
                )
        if crop is not None:
            _check_box("crop", crop)
            if crop[2] <= 0 or crop[3] <= 0:
                raise ValueError(f"`crop` is {tuple(crop)}: it is empty.")
        seen = WHOLE if crop is None else crop
        kept = list(objects[: self.max_objects])
        if shuffle is not None:
            shuffle.shuffle(kept)
        tokens: list[int] = []
        for item in kept:
            if _common_area(item.box, seen) > 0:
                box = _place(item.box, WHOLE if self.encode_crop else seen, flip)
                tokens += [self._class_token(item), *self._places(box)]
        tokens += [self.none_token] * (self.max_objects * self.tokens_per_object - len(tokens))
        if self.encode_crop:
            tokens += self._corners(_place(seen, WHOLE, flip))
        return torch.tensor(tokens, dtype=torch.int64)

    def decode(self, tokens: Tensor | Sequence[int]) -> tuple[list[tuple[int, tuple[float, ...]]], Box | None]:
        """What a sequence says, to the grid's precision: (class token, box or centre) of each object, and the crop.

        The class number is the class token modulo `num_classes`.

        Raises:
            ValueError: for a sequence of another length.
        """
        values = [int(token) for token in tokens]
        if len(values) != self.length:
            raise ValueError(f"`tokens` holds {len(values)} tokens, a sequence of this tokenizer {self.length}.")
        crop = self._box(*values[-2:]) if self.encode_crop else None
        step, found = self.tokens_per_object, []
        for start in range(0, self.max_objects * step, step):
            label, *places = values[start : start + step]
            if label == self.none_token:
                continue
            found.append((label, self._point(places[0]) if self.center_points else self._box(*places)))
        return found, crop

    def _class_token(self, item: LayoutObject) -> int:
        flags = int(self.use_group_flag and item.is_group_of)
        if self.use_other_flags:
            flags += 2 * item.is_occluded + 4 * item.is_depiction + 8 * item.is_inside
        return item.category + self.num_classes * flags

    def _places(self, box: Box) -> list[int]:
        x, y, width, height = box
        return [self._token(x + width / 2, y + height / 2)] if self.center_points else self._corners(box)

    def _corners(self, box: Box) -> list[int]:
        x, y, width, height = box
        return [self._token(x, y), self._token(x + width, y + height)]

    def _token(self, x: float, y: float) -> int:
        column, row = (round(min(max(value, 0.0), 1.0) * (self.side - 1)) for value in (x, y))
        return row * self.side + column

    def _point(self, token: int) -> tuple[float, float]:
        row, column = divmod(token, self.side)
        return column / (self.side - 1), row / (self.side - 1)

    def _box(self, top_left: int, bottom_right: int) -> Box:
        (x0, y0), (x1, y1) = self._point(top_left), self._point(bottom_right)
        return x0, y0, x1 - x0, y1 - y0


def _place(box: Box, frame: Box, flip: bool) -> Box:
    """A box relative to a frame and cut at it, mirrored if asked for."""
    x, y = (min(max((box[i] - frame[i]) / frame[i + 2], 0.0), 1.0) for i in (0, 1))
    width, height = (min(box[i + 2] / frame[i + 2], 1 - start) for i, start in ((0, x), (1, y)))
    return (1 - (x + width) if flip else x), y, width, height


def _common_area(a: Box, b: Box) -> float:
    sides = [min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    return max(sides[0], 0.0) * max(sides[1], 0.0)


def _check_box(name: str, box: Box) -> None:
    inside = (
        len(box) == 4
        and all(-_ROUNDING <= value <= 1 + _ROUNDING for value in box)
        and all(box[i] + box[i + 2] <= 1 + _ROUNDING for i in (0, 1))
    )
    if not inside:
        raise ValueError(
            f"`{name}` is {tuple(box)}: expected (x, y, width, height) within the picture, relative to its sides, "
            "x + width and y + height at most 1."
        )
