"""The conditions of a call of Versatile Diffusion (texts, pictures, masks, weights), read and turned into contexts.

`"a cat"` is one sample, `["a cat", "a dog"]` are two samples, `[["a cat", "an oil painting"]]` is one sample of two
texts. Pictures, masks, weights and focus are nested in the same way.

A context holds all tokens of CLIP, projected and normalised: Xu et al., arXiv 2211.08332, section 3.3;
SHI-Labs/Versatile-Diffusion@cf0f4a2:lib/model_zoo/clip.py (MIT). One norm for all tokens of a sample, that of the
token which CLIP pools: only that one becomes a unit vector.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from ...conditions.images import image_list
from ...conditions.masks import mask_values
from ...models.blocks.wrappers import with_forward_hooks
from ..clip_vectors import pil_picture

# A picture of one grey value that stands for "no picture": mid-grey in the first release, black for texts since.
NULL_PICTURES = {"grey": 127, "black": 0}


@dataclass(frozen=True)
class Conditions:
    """The conditions of a call, read once; `read_conditions` makes them.

    Attributes:
        texts: The texts of each sample; empty without texts.
        images: The pictures of each sample, float (3, H, W) in [0, 1], of any sizes; empty without pictures.
        masks: The mask of each picture, float (1, H, W), 1 = read, 0 = leave out; None where a picture is read whole.
        text_weights: The weight of each text of a sample, the same for all samples.
        image_weights: The weight of each picture of a sample.
        focus: The focus of each picture of a sample.
        embeds: Context tokens that were given in place of texts or pictures, and those of "no context" beside them, by
            context type.
    """

    texts: list[list[str]]
    images: list[list[Tensor]]
    masks: list[list[Tensor | None]]
    text_weights: list[float]
    image_weights: list[float]
    focus: list[float]
    embeds: dict[str, tuple[Tensor | None, Tensor | None]]

    @property
    def samples(self) -> dict[str, int]:
        """The number of samples by context type, of the types that were given."""
        sizes = {kind: len(entries) for kind, entries in (("text", self.texts), ("image", self.images)) if entries}
        return sizes | {kind: len(tokens) for kind, (tokens, _) in self.embeds.items() if tokens is not None}

    def shares(self, text_ratio: float) -> dict[str, float]:
        """The share of each context that counts, by type. Empty texts beside pictures do not count."""
        kinds = [kind for kind in ("text", "image") if kind in self.samples]
        if len(kinds) < 2:
            return dict.fromkeys(kinds, 1.0)
        if self.texts and not any(text.strip() for sample in self.texts for text in sample):
            return {"image": 1.0}
        shares = {"text": text_ratio, "image": 1 - text_ratio}
        return {kind: share for kind, share in shares.items() if share > 0}


def read_conditions(
    prompt: Any = None,
    image: Any = None,
    *,
    image_masks: Any = None,
    prompt_weights: Any = None,
    image_weights: Any = None,
    focus: Any = 0.5,
    prompt_embeds: Any = None,
    negative_prompt_embeds: Any = None,
    image_embeds: Any = None,
    negative_image_embeds: Any = None,
) -> Conditions:
    """Sorts the arguments of a call, see `VersatilePipeline.__call__`. One entry serves for all samples.

    Raises:
        TypeError, ValueError: naming the argument, what was received and what is allowed.
    """
    given = {"text": (prompt_embeds, negative_prompt_embeds), "image": (image_embeds, negative_image_embeds)}
    embeds = {kind: pair for kind, pair in given.items() if any(tokens is not None for tokens in pair)}
    texts, images = [], []
    if prompt is not None:
        texts = _nested("prompt", prompt, lambda entry: isinstance(entry, str), "a string", "text")
    if image is not None:
        images = _nested("image", image, _is_picture, "a picture", "picture")
    pictures = [[image_list(entry)[0] for entry in sample] for sample in images]
    if texts and pictures and 1 not in (len(texts), len(pictures)) and len(texts) != len(pictures):
        raise ValueError(
            f"`prompt` holds {len(texts)} samples and `image` {len(pictures)}: pass as many of one as of the other, or"
            " one for all. Several texts or pictures of one sample go into a list of their own: [[first, second]]."
        )
    count = max(len(texts), len(pictures))
    masks: list[list[Tensor | None]] = [[None] * len(sample) for sample in pictures]
    if image_masks is not None:
        masks = _masks(image_masks, pictures)
    return Conditions(
        texts=texts * count if len(texts) == 1 else texts,
        images=pictures * count if len(pictures) == 1 else pictures,
        masks=masks * count if len(masks) == 1 else masks,
        text_weights=_weights("prompt_weights", prompt_weights, texts, "text"),
        image_weights=_weights("image_weights", image_weights, pictures, "picture"),
        focus=_focus(focus, pictures),
        embeds=embeds,
    )


def _nested(name: str, value: Any, is_one: Callable[[Any], bool], what: str, noun: str) -> list[list[Any]]:
    """One entry, a list, or a list of lists as the last of these."""
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


def _is_picture(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, (np.ndarray, Tensor)) and value.ndim == 3)


def _is_mask_or_none(value: Any) -> bool:
    return value is None or isinstance(value, (Image.Image, np.ndarray, Tensor))


def _masks(masks: Any, images: list[list[Tensor]]) -> list[list[Tensor | None]]:
    if not images:
        raise ValueError("`image_masks` is given without `image`: a mask says which part of a picture is read.")
    samples = _nested("image_masks", masks, _is_mask_or_none, "a mask (or None)", "mask (or None)")
    if len(samples) != len(images) or any(len(a) != len(b) for a, b in zip(samples, images, strict=True)):
        raise ValueError(
            f"`image_masks` holds {[len(sample) for sample in samples]} masks a sample and `image`"
            f" {[len(sample) for sample in images]} pictures: pass one mask a picture, None to read it whole."
        )
    return [
        [None if mask is None else _mask(mask, picture) for mask, picture in zip(*pair, strict=True)]
        for pair in zip(samples, images, strict=True)
    ]


def _mask(mask: Any, picture: Tensor) -> Tensor:
    """A mask (1, H, W) in [0, 1] of the picture's size."""
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


def _weights(name: str, value: Any, entries: Sequence[Sequence[Any]], noun: str) -> list[float]:
    """The weight of each entry of a sample; by default all of them count once."""
    count = len(entries[0]) if entries else 0
    if value is None:
        return [1.0] * count
    if count == 0:
        raise ValueError(f"`{name}` is given, but there is no {noun} to weigh.")
    weights = _numbers(name, value, count, noun)
    if sum(weights) == 0:
        raise ValueError(f"`{name}` sums to 0: at least one {noun} must count.")
    return weights


def _focus(value: Any, pictures: Sequence[Sequence[Any]]) -> list[float]:
    """The focus of each picture of a sample; 0.5 everywhere says nothing, and so needs no picture."""
    if value is None or (isinstance(value, float) and value == 0.5):
        return [0.5] * (len(pictures[0]) if pictures else 1)
    levels = _numbers("focus", value, len(pictures[0]) if pictures else None, "picture", 1.0)
    if not pictures and any(level != 0.5 for level in levels):
        raise ValueError("`focus` is given, but there is no picture in `image` that it could change.")
    return levels


def _numbers(name: str, value: Any, count: int | None, noun: str, largest: float = math.inf) -> list[float]:
    """Finite numbers from 0 on, `count` of them unless that is None; a single one serves for all."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * (1 if count is None else count)
    for number in values:
        if isinstance(number, bool) or not isinstance(number, numbers.Real):
            raise TypeError(f"`{name}` must hold numbers, received {number!r}.")
        if not 0 <= float(number) <= largest or not math.isfinite(number):
            above = "" if largest == math.inf else f" and at most {largest:g}"
            raise ValueError(f"`{name}` must be finite, at least 0{above}, received {number}.")
    if count is not None and len(values) != count:
        raise ValueError(f"`{name}` holds {len(values)} numbers for {count} {noun}s a sample: pass one for each.")
    return [float(number) for number in values]


def text_context(text_encoder: CLIPTextModelWithProjection, input_ids: Tensor) -> Tensor:
    """Tokens of texts (n, l), padding included, to a context (n, l, d); padding is attended to, as in the original."""
    out = text_encoder(input_ids)
    tokens = _project_texts(text_encoder, out.last_hidden_state)
    return tokens / out.text_embeds.norm(dim=-1)[:, None, None]


def image_context(
    image_encoder: CLIPVisionModelWithProjection, pixel_values: Tensor, token_weights: Tensor | None = None
) -> Tensor:
    """Prepared pictures (n, 3, h, w) to a context (n, 1 + patches, d), the token of the whole picture first.

    Args:
        token_weights: as `mask_to_token_weights` gives them; what they leave out is neither read nor passed on.
    """
    if token_weights is None:
        hidden_states = image_encoder(pixel_values).last_hidden_state
    else:
        hidden_states = _masked_hidden_states(image_encoder, pixel_values, token_weights)
    tokens = _project_pictures(image_encoder, hidden_states)
    tokens = tokens / tokens[:, :1].norm(dim=-1, keepdim=True)
    return tokens if token_weights is None else tokens * token_weights.to(tokens)


@with_forward_hooks
def _project_texts(text_encoder: Any, hidden_states: Tensor) -> Tensor:
    return text_encoder.text_projection(hidden_states)


@with_forward_hooks
def _project_pictures(image_encoder: Any, hidden_states: Tensor) -> Tensor:
    return image_encoder.visual_projection(image_encoder.vision_model.post_layernorm(hidden_states))


@with_forward_hooks  # it stands for the encoder's forward, so what was offloaded comes back for it
def _masked_hidden_states(image_encoder: Any, pixel_values: Tensor, token_weights: Tensor) -> Tensor:
    """The last hidden states of pictures whose embedded tokens are weighted, before the first layer reads them.

    Written out, since a hook on the encoder would also mask what another thread reads with it.
    """
    tower = image_encoder.vision_model
    embedded = tower.embeddings(pixel_values)
    return tower.encoder(inputs_embeds=tower.pre_layrnorm(embedded * token_weights.to(embedded))).last_hidden_state


def mask_to_token_weights(mask: Tensor, image_size: int, patch_size: int) -> Tensor:
    """Masks (n, 1, h, w) of any size, 1 = keep, 0 = leave out, to weights of the tokens (n, 1 + patches, 1).

    Each patch gets the mean of its part of the mask, the token of the whole picture that of the whole mask.
    """
    mask = F.interpolate(mask.float().clamp(0, 1), size=(image_size, image_size), mode="bilinear")
    patches = F.avg_pool2d(mask, patch_size).flatten(2).transpose(1, 2)  # (n, patches, 1)
    return torch.cat([mask.mean(dim=(2, 3))[:, None], patches], dim=1)


def prepare_pictures(feature_extractor: Any, images: list[Tensor], side: int) -> Tensor:
    """Pictures (3, H, W) in [0, 1] as the image encoder wants them, (n, 3, h, w).

    As in the original, each is stretched to a square first (of 512 pixels there), then to that of the encoder: two
    bicubic resizings of 8-bit pictures, and nothing for the feature extractor to crop.
    """
    pictures = [stretch_picture(image, side, side) for image in images]
    return feature_extractor(images=pictures, return_tensors="pt").pixel_values


def stretch_picture(image: Tensor, height: int, width: int) -> Image.Image:
    """(3, H, W) in [0, 1] as an 8-bit picture of another size; its aspect is not kept."""
    picture = pil_picture(image)
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.BICUBIC)


def null_picture(kind: str, side: int) -> Tensor:
    """(3, side, side) of one grey value, see `NULL_PICTURES`."""
    return torch.full((3, side, side), NULL_PICTURES[kind] / 255)
