"""What a user hands to Versatile Diffusion (texts, pictures, masks, weights) in one shape: a list a sample.

`"a cat"` is one sample, `["a cat", "a dog"]` are two, `[["a cat", "an oil painting"]]` is one of two texts; pictures,
masks, weights and focus likewise.
"""

import math
import numbers
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ...conditions.images import image_list
from ...conditions.masks import mask_values


@dataclass
class Conditions:
    """The conditions of a call; each field but the weights holds one list a sample, all of one length.

    Attributes:
        texts: the texts of each sample; empty without texts.
        images: the pictures of each sample, float (3, H, W) in [0, 1], of any sizes.
        masks: float (1, H, W), 1 = read, 0 = leave out; None where a picture is read whole.
        text_weights: of each text of a sample, the same for all samples.
        image_weights: of each picture of a sample.
        focus: of each picture of a sample.
    """

    texts: list[list[str]] = field(default_factory=list)
    images: list[list[Tensor]] = field(default_factory=list)
    masks: list[list[Tensor | None]] = field(default_factory=list)
    text_weights: list[float] = field(default_factory=list)
    image_weights: list[float] = field(default_factory=list)
    focus: list[float] = field(default_factory=list)


def read_conditions(
    prompt: Any = None,
    image: Any = None,
    *,
    image_masks: Any = None,
    prompt_weights: Any = None,
    image_weights: Any = None,
    focus: Any = 0.5,
) -> Conditions:
    """Sorts the arguments of `VersatilePipeline.__call__`; what is one serves for all samples.

    Raises:
        TypeError, ValueError: naming the argument, what was received and what is allowed.
    """
    texts = [] if prompt is None else _nested("prompt", prompt, _is_text, "a string", "text")
    images = [] if image is None else _nested("image", image, _is_picture, "a picture", "picture")
    pictures = [[_one_picture(entry) for entry in sample] for sample in images]
    if texts and pictures and 1 not in (len(texts), len(pictures)) and len(texts) != len(pictures):
        raise ValueError(
            f"`prompt` holds {len(texts)} samples and `image` {len(pictures)}: pass as many of one as of the other, or"
            " one for all. Several texts or pictures of one sample go into a list of their own: [[first, second]]."
        )
    count = max(len(texts), len(pictures))
    per_text, per_image = (len(entries[0]) if entries else 0 for entries in (texts, pictures))
    return Conditions(
        texts=texts * count if len(texts) == 1 else texts,
        images=pictures * count if len(pictures) == 1 else pictures,
        masks=_read_masks(image_masks, pictures, count),
        text_weights=_numbers("prompt_weights", prompt_weights, per_text, "text", 1.0),
        image_weights=_numbers("image_weights", image_weights, per_image, "picture", 1.0),
        focus=_numbers("focus", focus, per_image, "picture", 0.5, largest=1.0),
    )


def _nested(name: str, value: Any, is_one: Any, what: str, noun: str) -> list[list[Any]]:
    """One, a list, or a list of lists as the last of these."""
    if is_one(value):
        return [[value]]
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 4:  # a batch of pictures
        return [[entry] for entry in value]
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"`{name}` must be {what}, a list, or a list of lists, received {type(value).__name__}.")
    samples = [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in value]
    if not samples or not all(samples):
        raise ValueError(f"`{name}` holds an empty list; pass at least one {noun} a sample.")
    for entry in (entry for sample in samples for entry in sample):
        if not is_one(entry):
            raise TypeError(f"`{name}` must hold {what} each, received {type(entry).__name__}.")
    lengths = sorted({len(sample) for sample in samples})
    if len(lengths) > 1:
        raise ValueError(
            f"`{name}` holds samples of {' and '.join(map(str, lengths))} entries: all samples of a call need as many."
        )
    return samples


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_picture(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim == 3)


def _one_picture(value: Any) -> Tensor:
    return image_list(value)[0]


def _read_masks(masks: Any, images: list[list[Tensor]], count: int) -> list[list[Tensor | None]]:
    if masks is None:
        return [[None] * len(sample) for sample in (images * count if len(images) == 1 else images)]
    if not images:
        raise ValueError("`image_masks` is given without `image`: a mask says which part of a picture is read.")
    is_one = lambda mask: mask is None or _is_mask(mask)  # noqa: E731 # as short as its name
    samples = _nested("image_masks", masks, is_one, "a mask (or None)", "mask (or None)")
    if len(samples) != len(images) or any(len(a) != len(b) for a, b in zip(samples, images, strict=True)):
        raise ValueError(
            f"`image_masks` holds {[len(sample) for sample in samples]} masks a sample and `image`"
            f" {[len(sample) for sample in images]} pictures: pass one mask a picture, None to read it whole."
        )
    read = [
        [_one_mask(mask, picture) for mask, picture in zip(*pair, strict=True)]
        for pair in zip(samples, images, strict=True)
    ]
    return read * count if len(read) == 1 else read


def _is_mask(value: Any) -> bool:
    return isinstance(value, (Image.Image, np.ndarray, Tensor))


def _one_mask(mask: Any, picture: Tensor) -> Tensor | None:
    """(1, H, W) in [0, 1], of the picture's size."""
    if mask is None:
        return None
    values = mask_values(mask, "image_masks")
    if tuple(values.shape) != (1, *picture.shape[1:]):
        found = tuple(values.shape[1:] if len(values) == 1 else values.shape)
        raise ValueError(
            f"`image_masks` holds a mask of shape {found} for a picture of {tuple(picture.shape[1:])}"
            " (rows, columns): a mask has one channel and the size of its picture."
        )
    if not bool(values.any()):
        raise ValueError("`image_masks` holds a mask that is 0 everywhere: nothing of the picture would be read.")
    return values


def _numbers(
    name: str, value: Any, count: int, what: str, default: float, *, largest: float = math.inf
) -> list[float]:
    """One number for each of `count`, at least 0, not all of them 0 where they are weights."""
    values: list[Any] = [default] * count
    if value is not None:
        values = list(value) if isinstance(value, (list, tuple)) else [value] * max(count, 1)
    for number in values:
        if isinstance(number, bool) or not isinstance(number, numbers.Real):
            raise TypeError(f"`{name}` must hold numbers, received {number!r}.")
        if not 0 <= float(number) <= largest or not math.isfinite(number):
            above = "" if largest == math.inf else f" and at most {largest:g}"
            raise ValueError(f"`{name}` must be finite, at least 0{above}, received {number}.")
    if value is not None and count == 0 and name.endswith("weights"):
        raise ValueError(f"`{name}` is given, but there is no {what} to weigh.")
    if count == 0 and name == "focus" and any(number != default for number in values):
        raise ValueError("`focus` is given, but there is no picture in `image` that it could change.")
    if count and len(values) != count:
        raise ValueError(f"`{name}` holds {len(values)} numbers for {count} {what}s a sample: pass one for each.")
    if count and name.endswith("weights") and sum(values) == 0:
        raise ValueError(f"`{name}` sums to 0: at least one {what} must count.")
    return [float(number) for number in values] if count else []
