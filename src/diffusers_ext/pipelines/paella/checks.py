"""Checks that concern the components of the Paella pipelines; as in `checks.py`, each raises before any model runs."""

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from ...conditions.named_boxes import find_class
from ...models.token_codec import bare_tokenizer
from ...models.vq_gumbel import GumbelVQModel
from ..checks import as_texts, check_side

SAMPLE_MODES = ("argmax", "sample")


def check_components(pipe: Any) -> None:
    """Network, tokenizer and scheduler are there and agree on the codebook."""
    missing = [name for name in ("vqvae", "unet", "scheduler") if getattr(pipe, name) is None]
    if missing:
        raise ValueError(f"The pipeline was built without {', '.join(missing)}; sampling needs them.")
    check_token_scheduler(pipe.scheduler, type(pipe).__name__)
    codes = {
        "unet.config.num_vq_embeddings": pipe.unet.config["num_vq_embeddings"],
        "vqvae.config.num_vq_embeddings": pipe.vqvae.config["num_vq_embeddings"],
        "scheduler.config.num_vec_classes": pipe.scheduler.config["num_vec_classes"],
    }
    if len(set(codes.values())) > 1:
        listed = ", ".join(f"{name}={value}" for name, value in codes.items())
        raise ValueError(f"The components disagree on the number of token codes: {listed}.")


def check_token_scheduler(scheduler: Any, pipeline_name: str) -> None:
    """A scheduler that draws tokens from logits and renoises them."""
    if not hasattr(scheduler, "noise_ratio") or "num_vec_classes" not in scheduler.config:
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__}; {pipeline_name} draws tokens and needs a"
            " DiscreteRenoisingScheduler. Its ways of drawing and its schedule are that class's options, and travel"
            " with the checkpoint: `DiscreteRenoisingScheduler.from_pretrained(<checkpoint>, subfolder='scheduler')`."
        )


def check_size(pipe: Any, height: Any, width: Any, names: tuple[str, str] = ("height", "width")) -> tuple[int, int]:
    """The token grid (h, w) of a valid size in pixels."""
    multiple = pipe.vae_scale_factor * pipe.unet.downsample_factor
    # the smallest grid that the network takes, rounded up to what its levels divide
    smallest = math.ceil(pipe.unet.min_size / pipe.unet.downsample_factor) * multiple
    because = f"tokenizer {pipe.vae_scale_factor} x network {pipe.unet.downsample_factor}"
    check_side(names[0], height, multiple, smallest, because=because)
    check_side(names[1], width, multiple, smallest, because=because)
    return height // pipe.vae_scale_factor, width // pipe.vae_scale_factor


def check_conditions(
    pipe: Any,
    prompt: Any,
    negative_prompt: Any,
    prompt_embeds: Any,
    negative_prompt_embeds: Any,
    grid: tuple[int, int],
) -> int:
    """The number of prompts, if both branches are well formed."""
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError(
            f"Pass exactly one of `prompt` and `prompt_embeds`; received {'neither' if prompt is None else 'both'}."
        )
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("Pass at most one of `negative_prompt` and `negative_prompt_embeds`; received both.")
    if prompt is not None:
        num_prompts = len(as_texts("prompt", prompt))
    else:
        _check_embeds(pipe, "prompt_embeds", prompt_embeds, grid)
        num_prompts = prompt_embeds.shape[0]
    if negative_prompt is not None:
        num_negative = len(as_texts("negative_prompt", negative_prompt))
        if num_negative != num_prompts and not isinstance(negative_prompt, str):
            raise ValueError(
                f"`negative_prompt` holds {num_negative} texts for {num_prompts} prompts; pass one text for all of"
                " them or one a prompt."
            )
    if negative_prompt_embeds is not None:
        _check_embeds(pipe, "negative_prompt_embeds", negative_prompt_embeds, grid)
        if negative_prompt_embeds.shape[0] not in (1, num_prompts):
            raise ValueError(
                f"`negative_prompt_embeds` holds {negative_prompt_embeds.shape[0]} conditions for {num_prompts}"
                " prompts; pass one for all of them or one a prompt."
            )
        if negative_prompt_embeds.ndim == 4 and (prompt_embeds is None or prompt_embeds.ndim == 2):
            raise ValueError(
                "`negative_prompt_embeds` is a map over the grid, so `prompt_embeds` must be one as well."
            )
    if prompt is not None or negative_prompt is not None:
        check_text_components(pipe)
    return num_prompts


def check_text_components(pipe: Any) -> None:
    if None in (pipe.tokenizer, pipe.text_encoder):
        instead = " or `class_labels`" if pipe.class_names is not None else ""
        raise ValueError(
            f"The pipeline was built without tokenizer or text_encoder; pass `prompt_embeds`{instead} (and"
            " `negative_prompt_embeds`) in place of texts."
        )
    _check_projection(pipe, "text_encoder")


def check_image_components(pipe: Any) -> None:
    missing = [name for name in ("image_encoder", "feature_extractor") if getattr(pipe, name) is None]
    if missing:
        raise ValueError(
            f"The pipeline was built without {' and '.join(missing)}, which turn `image` into a condition: pass them"
            " to `from_pretrained` or `from_pipe` (the CLIP image tower whose vectors the network was trained with),"
            " or pass `prompt_embeds`."
        )
    _check_projection(pipe, "image_encoder")


def check_labels(pipe: Any, class_labels: Any) -> list[int]:
    """The numbers of classes that are given by number or name, of a network that was trained on classes."""
    if pipe.unet is None:
        raise ValueError("The pipeline was built without unet, which knows how many classes there are: pass it.")
    if pipe.class_names is None and (pipe.text_encoder is not None or pipe.image_encoder is not None):
        raise ValueError(
            "`class_labels` is for networks that were trained on classes (`train_paella.py --condition class`); this"
            " one was trained on the vectors of its CLIP: pass `prompt`, or what `encode_image` gives as"
            " `prompt_embeds`."
        )
    labels = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
    labels = list(labels) if isinstance(labels, (list, tuple)) else [labels]
    if not labels:
        raise ValueError("`class_labels` is empty; pass at least one class.")
    num_classes = pipe.unet.config["condition_dim"]
    return [find_class(label, num_classes, pipe.class_names, "class_labels") for label in labels]


def check_latents(pipe: Any, latents: Any, shape: tuple[int, int, int], name: str = "latents") -> None:
    """Tokens of the codebook, of the wanted shape."""
    if not isinstance(latents, Tensor) or latents.dtype != torch.long:
        kind = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise TypeError(f"`{name}` must be an int64 tensor of token indices, received {kind}.")
    if tuple(latents.shape) != shape:
        raise ValueError(
            f"`{name}` must have shape {shape} (images, height and width in tokens), received {tuple(latents.shape)}."
        )
    num_codes = pipe.scheduler.config["num_vec_classes"]
    low, high = int(latents.min()), int(latents.max())
    if low < 0 or high >= num_codes:
        raise ValueError(f"`{name}` must hold token indices 0 to {num_codes - 1}, received {low} to {high}.")


def check_strength(strength: Any) -> None:
    if isinstance(strength, bool) or not isinstance(strength, numbers.Real):
        raise TypeError(f"`strength` must be a number, received {strength!r}.")
    if not 0 <= float(strength) <= 1:
        raise ValueError(
            f"`strength` must lie in [0, 1], received {strength}: 0 returns the picture, 1 draws from noise alone."
        )


def check_sample_mode(pipe: Any, sample_mode: Any) -> None:
    if sample_mode not in SAMPLE_MODES:
        raise ValueError(f"`sample_mode` must be one of {', '.join(SAMPLE_MODES)}; received {sample_mode!r}.")
    vqvae = bare_tokenizer(pipe.vqvae)
    if sample_mode == "sample" and not isinstance(vqvae, GumbelVQModel):
        raise ValueError(
            f"`sample_mode='sample'` needs a GumbelVQModel: a {type(vqvae).__name__} takes the nearest code and"
            " has no probabilities. Use 'argmax'."
        )


def check_count(name: str, count: int, num_prompts: int) -> None:
    """One for all prompts, or one a prompt."""
    if count not in (1, num_prompts):
        raise ValueError(
            f"`{name}` holds {count} pictures for {num_prompts} prompts; pass one for all of them or one a prompt."
        )


def _check_embeds(pipe: Any, name: str, embeds: Any, grid: tuple[int, int]) -> None:
    width = pipe.unet.config["condition_dim"]
    if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
        kind = embeds.dtype if isinstance(embeds, Tensor) else type(embeds).__name__
        raise TypeError(f"`{name}` must be a floating-point tensor, received {kind}.")
    shape = tuple(embeds.shape)
    if len(shape) not in (2, 4) or shape[0] == 0 or shape[1] != width or (len(shape) == 4 and shape[2:] != grid):
        raise ValueError(
            f"`{name}` must have shape (n, {width}) or (n, {width}, {grid[0]}, {grid[1]}) with n >= 1, received"
            f" {shape}."
        )


def _check_projection(pipe: Any, name: str) -> None:
    width = getattr(pipe, name).config.projection_dim
    if pipe.unet is None:  # encoding needs none
        return
    if width != pipe.unet.config["condition_dim"]:
        raise ValueError(
            f"The components do not fit together: {name}.config.projection_dim={width} differs from"
            f" unet.config.condition_dim={pipe.unet.config['condition_dim']}."
        )
