"""Checks that concern `VersatilePipeline`; each raises before any model runs, and its message names the way out."""

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from ...models.unet_versatile import flow_name
from ..checks import check_integer
from .conditions import Conditions
from .contexts import NULL_PICTURES

DATA_TYPES = ("image", "text")  # what the pipeline can decode
COLOR_ADJUSTMENTS = ("simple", "histogram")
MIXINGS = ("attention", "layer")
NULL_IMAGES = ("zeros", *NULL_PICTURES)


def check_choice(name: str, value: Any, allowed: tuple[str, ...], *, or_none: bool = False) -> None:
    if (or_none and value is None) or value in allowed:
        return
    listed = ", ".join(map(repr, allowed)) + (" or None" if or_none else "")
    raise ValueError(f"`{name}` is {value!r}; allowed are {listed}.")


def check_share(name: str, value: Any) -> None:
    """A number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, received {value!r}.")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"`{name}` is {value}: it lies between 0 and 1.")


_ONLY_FOR: dict[str, tuple[Any, str | None, tuple[str, ...]]] = {
    # option -> its default, what it needs to be made (None: either), which contexts it needs
    "height": (None, "image", ()),
    "width": (None, "image", ()),
    "text_ratio": (0.5, None, ("text", "image")),
    "mixing": ("attention", None, ("text", "image")),
    "null_image": (None, None, ("image",)),
    "temperature": (1.0, "text", ()),
    "max_text_length": (None, "text", ()),
    "merge_repeats": (True, "text", ()),
}


def check_options(data_type: Any, context_types: list[str], **options: Any) -> None:
    """No option is given that the flow of a call has no use for."""
    for name, value in options.items():
        default, makes, needs = _ONLY_FOR[name]
        fits = makes in (None, data_type) and set(needs) <= set(context_types)
        if fits or value is None or (type(value) in (bool, int, float, str) and value == default):
            continue
        reads = {"text": "`prompt`", "image": "`image`"}
        wanted = [f"makes {makes}s"] if makes is not None else []
        wanted += [f"has {' and '.join(reads[kind] for kind in needs)}"] if needs else []
        raise ValueError(
            f"`{name}` is {value!r}, but has an effect only in a call that {' and '.join(wanted)}; this one makes"
            f" {data_type}s from {' and '.join(reads[kind] for kind in context_types) or 'nothing'}. Leave it out."
        )


def check_exact_start(exact_start: Any, strength: float) -> None:
    if not isinstance(exact_start, bool):
        raise TypeError(f"`exact_start` must be True or False, received {exact_start!r}.")
    if exact_start and strength == 1:
        raise ValueError("`exact_start` is True, but `strength` is 1: without a picture to start from it has no use.")


def check_context_names(names: list[str], context_types: list[str]) -> None:
    """A callback asks for no context that the call does not have; `prompt_embeds` is there always."""
    missing = [name for name in names if name.endswith("image_embeds") and "image" not in context_types]
    if missing:
        raise ValueError(
            f"`callback_on_step_end` needs {missing}, but the call has no picture as context: leave them out, or pass"
            " `image`."
        )


def check_flows(pipe: Any, data_type: str, context_types: list[str]) -> None:
    """The network has the layers of the flows that a call needs."""
    check_choice("data_type", data_type, DATA_TYPES)
    if not context_types:
        raise ValueError("There is nothing to start from: pass `prompt`, `image`, or embeddings of one of them.")
    missing = [flow for kind in context_types if (flow := flow_name(kind, data_type)) not in pipe.unet.flows]
    if missing:
        raise ValueError(
            f"The call needs the flow {', '.join(missing)}; the loaded network has {', '.join(pipe.unet.flows)}, of"
            f" {', '.join(pipe.unet.known_flows)}. Load it with `VersatilePipeline.from_pretrained(..., flows=[...])`"
            " or without `flows`."
        )


def check_fit(pipe: Any, data_type: str, context_types: list[str]) -> None:
    """Encoders and decoders have the widths that the network was built for."""
    config = pipe.unet.config
    found = {}
    for kind in context_types:
        name = f"{kind}_encoder"
        if getattr(pipe, name) is not None:
            width = getattr(pipe, name).config.projection_dim
            found[f"{name}.config.projection_dim"] = (width, config["context_types"][kind])
    decoder, size = {"image": ("vae", "latent_channels"), "text": ("optimus", "latent_dim")}[data_type]
    if getattr(pipe, decoder) is not None:
        width = getattr(pipe, decoder).config[size]
        found[f"{decoder}.config.{size}"] = (width, config["data_types"][data_type]["channels"])
    wrong = [f"{name} is {have}, the network needs {need}" for name, (have, need) in found.items() if have != need]
    if wrong:
        raise ValueError(f"The components do not fit: {'; '.join(wrong)}. Load those that it was trained with.")


def check_parts(pipe: Any, what: str, *names: str) -> None:
    """The components that a call needs are there."""
    missing = [name for name in names if getattr(pipe, name, None) is None]
    if missing:
        raise ValueError(
            f"The pipeline was loaded without {', '.join(missing)}; {what} needs them. Load it without `flows`, or "
            f"pass `{missing[0]}=...` to `from_pretrained`."
        )


def check_encoders(pipe: Any, context_types: list[str]) -> None:
    """The components that make context tokens of texts or pictures are there."""
    if "text" in context_types:
        check_parts(pipe, "a text", "tokenizer", "text_encoder")
    if "image" in context_types:
        check_parts(pipe, "a picture", "image_encoder", "feature_extractor")


def check_negative_prompt(negative_prompt: Any, conditions: Conditions) -> None:
    """It takes the place of the empty text beside texts, and of nothing else."""
    if negative_prompt is not None and not conditions.texts:
        raise ValueError(
            f"`negative_prompt` is {negative_prompt!r}, but the call has no `prompt` that it could stand against: "
            "pass one, or `negative_prompt_embeds` beside `prompt_embeds`."
        )


def check_max_text_length(pipe: Any, max_text_length: Any) -> None:
    """Tokens that the text decoder can write; None stands for its own choice."""
    if max_text_length is None:
        return
    check_integer("max_text_length", max_text_length, 2)
    if max_text_length > pipe.optimus.longest_sentence:
        raise ValueError(
            f"`max_text_length` is {max_text_length}: the text decoder writes from 2 (its first and last token) to "
            f"{pipe.optimus.longest_sentence} tokens. Pass one of these, or None."
        )


def check_embeds(pipe: Any, kind: str, embeds: Any, negative: Any, has_other: bool, *, guided: bool) -> None:
    """Context tokens (b, l, d) in place of texts or pictures, and those of "no context".

    Args:
        has_other: whether the texts or pictures themselves were given.
    """
    other, name = {"text": ("prompt", "prompt_embeds"), "image": ("image", "image_embeds")}[kind]
    if embeds is not None and has_other:
        raise ValueError(f"`{other}` and `{name}` are both given: pass one of them.")
    if negative is not None and embeds is None:
        raise ValueError(f"`negative_{name}` is given without `{name}`.")
    if embeds is None:
        return
    if guided and negative is None:
        raise ValueError(f"`{name}` needs `negative_{name}` for guidance, or `guidance_scale=1`.")
    width = pipe.unet.config["context_types"][kind]
    for label, value in ((name, embeds), (f"negative_{name}", negative)):
        fits = isinstance(value, Tensor) and value.ndim == 3 and value.shape[2] == width and 0 not in value.shape
        if value is not None and not fits:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"`{label}` must have shape (b, tokens, {width}), received {found}.")
        if value is not None and not bool(torch.isfinite(value).all()):
            raise ValueError(f"`{label}` holds values that are not finite (NaN or infinite): encode it anew.")
    if negative is not None and len(negative) not in (1, len(embeds)):
        raise ValueError(f"`negative_{name}` holds {len(negative)} samples and `{name}` {len(embeds)}.")


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    """Standard normal noise of the wanted shape."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise TypeError(f"`latents` must be a floating-point tensor of standard normal noise, received {kind}.")
    if tuple(latents.shape) != shape or not bool(torch.isfinite(latents).all()):
        raise ValueError(f"`latents` must be finite and of shape {shape}, received {tuple(latents.shape)}.")


def check_start(conditions: Conditions, data_type: str, strength: float, color_adjust: str | None) -> None:
    """A start from a picture, or its colours, need exactly one picture a sample."""
    check_share("strength", strength)
    check_choice("color_adjust", color_adjust, COLOR_ADJUSTMENTS, or_none=True)
    for name, value, neutral in (("strength", strength, 1.0), ("color_adjust", color_adjust, None)):
        if value == neutral:
            continue
        if data_type != "image" or len(conditions.image_weights) != 1:
            raise ValueError(
                f"`{name}` is {value!r}: it works for pictures made from exactly one picture a sample; this call makes"
                f" {data_type}s from {len(conditions.image_weights)}."
            )


def check_temperature(temperature: Any) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, numbers.Real):
        raise TypeError(f"`temperature` must be a number, received {temperature!r}.")
    if not 0 <= float(temperature) < math.inf:
        raise ValueError(f"`temperature` is {temperature}: 0 takes the most probable words, 1 draws them.")
