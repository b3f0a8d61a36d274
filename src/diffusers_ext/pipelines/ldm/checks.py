"""Checks that concern the components of the latent-diffusion pipelines; each raises before any model runs."""

import math
import numbers
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from ...models.blocks.wrappers import unwrap
from ...schedulers.gaussian import check_gaussian_scheduler
from ..checks import check_integer, check_side
from .first_stage import first_stage_channels


def check_components(pipe: Any, *, concat_channels: int | None = 0, context_width: int | None = None) -> None:
    """All components are there, and the U-Net takes what first stage and conditioner give it.

    Args:
        concat_channels: how many channels lie behind the latents; None: as many as the U-Net's, whatever they are.
        context_width: of the conditioner's sequences, None without cross-attention.
    """
    optional = pipe._optional_components
    missing = [name for name, part in pipe.components.items() if part is None and name not in optional]
    if missing:
        raise ValueError(f"The pipeline was built without {', '.join(missing)}; sampling needs them.")
    check_gaussian_scheduler(pipe.scheduler, type(pipe).__name__)
    unet = unwrap(pipe.unet)
    takes_context = isinstance(unet, UNet2DConditionModel)
    if takes_context != (context_width is not None):
        wanted = "a UNet2DModel" if context_width is None else "a UNet2DConditionModel, for its cross-attention"
        raise ValueError(
            f"`unet` is a {type(unet).__name__}, {type(pipe).__name__} needs {wanted}: the checkpoint is that of"
            " another task, load it with that task's pipeline."
        )
    channels, config = first_stage_channels(pipe.vqvae), pipe.unet.config
    if config["out_channels"] != channels:
        raise ValueError(
            f"The first stage does not match the U-Net: latents of `vqvae` have {channels} channels, `unet` predicts"
            f" {config['out_channels']}. Load the first stage that the U-Net was trained with."
        )
    if concat_channels is not None and config["in_channels"] != channels + concat_channels:
        raise ValueError(
            f"`unet` takes {config['in_channels']} channels, {type(pipe).__name__} gives it"
            f" {channels + concat_channels}: {channels} of the latents and {concat_channels} of the condition. The"
            " checkpoint is that of another task, or its first stage was exchanged."
        )
    if context_width is not None and config["cross_attention_dim"] != context_width:
        raise ValueError(
            f"`unet` attends to vectors of width {config['cross_attention_dim']}, the condition has {context_width}:"
            " load the conditioner that it was trained with."
        )
    scale = pipe.latent_scale
    if not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"The scale of the latents must be positive, but is {scale}: see `latent_scale`.")


def check_no_guidance(guidance_scale: float, because: str) -> None:
    """A scale of 1, with a network that cannot be guided."""
    if guidance_scale != 1.0:
        raise ValueError(f"`guidance_scale` is {guidance_scale}, but {because}.")


def check_size(pipe: Any, height: Any, width: Any, names: tuple[str, str] = ("height", "width")) -> tuple[int, int]:
    """Height and width of the latents of a valid size in pixels."""
    for name, side in zip(names, (height, width), strict=True):
        check_side(name, side, pipe.size_multiple, pipe.size_multiple, because=_multiple_text(pipe))
    return height // pipe.vae_scale_factor, width // pipe.vae_scale_factor


def check_tiles(pipe: Any, size: tuple[int, int], tile_size: Any, tile_stride: Any) -> tuple[tuple, tuple] | None:
    """(height, width) of the tiles and steps (down, across), in pixels; None without tiles.

    By default a step is half a tile, rounded down to whole latents.
    """
    if tile_size is None:
        if tile_stride is not None:
            raise ValueError(f"`tile_stride` is {tile_stride}, but there is no `tile_size`: pass both, or neither.")
        return None
    tile, factor = _pair("tile_size", tile_size), pipe.vae_scale_factor
    for length, side in zip(tile, size, strict=True):
        if length < side:  # a longer one is cut to the picture
            check_side("tile_size", length, pipe.size_multiple, pipe.size_multiple, because=_multiple_text(pipe))
    tile = (min(tile[0], size[0]), min(tile[1], size[1]))
    if tile_stride is None:
        return tile, tuple(max(length // factor // 2, 1) * factor for length in tile)
    stride = _pair("tile_stride", tile_stride)
    for step, length, side in zip(stride, tile, size, strict=True):
        check_side("tile_stride", step, factor, factor, because="whole latents")
        if step > length and length < side:
            raise ValueError(
                f"`tile_stride` is {step} with tiles of {length} pixels: tiles must overlap or touch, so it is at most"
                " `tile_size`; half of it is usual."
            )
    return tile, (min(stride[0], tile[0]), min(stride[1], tile[1]))


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    """Floating point, of the wanted shape, finite."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise TypeError(f"`latents` must be a floating-point tensor of standard normal noise, received {kind}.")
    if tuple(latents.shape) != shape:
        raise ValueError(
            f"`latents` must have shape {shape} (images, channels, height and width of the latents), received"
            f" {tuple(latents.shape)}."
        )
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("`latents` holds values that are not finite.")


def check_guidance_fn(guidance_fn: Any, guidance_fn_scale: Any) -> None:
    if guidance_fn is None:
        return
    if not callable(guidance_fn):
        raise TypeError(f"`guidance_fn` must be a function of pictures, received {type(guidance_fn).__name__}.")
    if isinstance(guidance_fn_scale, bool) or not isinstance(guidance_fn_scale, numbers.Real):
        raise TypeError(f"`guidance_fn_scale` must be a number, received {guidance_fn_scale!r}.")
    if not math.isfinite(guidance_fn_scale):
        raise ValueError(f"`guidance_fn_scale` must be finite, received {guidance_fn_scale}.")
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "`guidance_fn` needs gradients, which `torch.inference_mode()` rules out, also for `torch.enable_grad()`:"
            " call the pipeline outside of it. The pipeline itself computes without gradients where it needs none."
        )


def check_count(name: str, count: int, num: int, what: str) -> None:
    """One for all, or one each."""
    if count not in (1, num):
        raise ValueError(f"`{name}` holds {count} for {num} {what}; pass one for all of them or one each.")


def check_mask(mask: Tensor, picture: Tensor) -> None:
    """Of the picture's size, and not black everywhere.

    Args:
        mask: bool (b, H, W).
        picture: (n, 3, H, W).
    """
    rows, columns = picture.shape[-2:]
    if tuple(mask.shape[1:]) != (rows, columns):
        raise ValueError(
            f"`mask_image` is {mask.shape[2]}x{mask.shape[1]} pixels, `image` is {columns}x{rows}. Resize it without"
            f" smoothing: `mask.resize(({columns}, {rows}), Image.Resampling.NEAREST)`."
        )
    if not bool(mask.flatten(1).any(dim=1).all()):
        raise ValueError(
            "There is nothing to draw: `mask_image` is black (0, keep) everywhere. Paint white what is to be filled."
        )


def check_rescaler(pipe: Any) -> None:
    """The rescaler shrinks by the first stage's factor."""
    config = pipe.spatial_rescaler.config
    factor = config["multiplier"] ** -config["num_stages"]
    if factor != pipe.vae_scale_factor:
        raise ValueError(
            f"`spatial_rescaler` shrinks maps by {factor:g}, `vqvae` pictures by {pipe.vae_scale_factor}: they must"
            " meet at one size. Load the pair that the U-Net was trained with."
        )


def _multiple_text(pipe: Any) -> str:
    factor = pipe.vae_scale_factor
    return f"first stage {factor} x network {pipe.size_multiple // factor}"


def _pair(name: str, value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(values) != 2:
        raise ValueError(f"`{name}` must be one number of pixels or (height, width), received {value!r}.")
    for number in values:
        check_integer(name, number, 1)
    return values
