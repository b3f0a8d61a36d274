"""Guiding latent diffusion without re-training, by the gradient of any function of the picture that is on its way.

Rombach et al., arXiv 2112.10752, appendix C, after arXiv 2105.05233, section 4.2: with log p(y | z) = -loss the
predicted noise becomes eps + sqrt(1 - abar) * d loss / d z. The loss is computed on the decoded prediction of the
clean picture, and the gradient goes back through the first stage's decoder and the U-Net. (The paper's equation has
the opposite sign, which would lead away from y.)
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...conditions.images import image_batch
from ...schedulers.gaussian import join_prediction, signal_and_noise, split_prediction

GuidanceFn = Callable[[Tensor], Tensor]


def low_resolution_guidance(image: Any) -> GuidanceFn:
    """The paper's example: half the squared distance from a small picture, as a loss (b,) of pictures (b, 3, H, W).

    Args:
        image: the small picture, one for all samples or one a sample (see `conditions.images.image_batch`). Samples
            are shrunk to its size, bicubic with anti-aliasing.
    """
    target = 2 * image_batch(image) - 1  # (1 or b, 3, h, w)

    def loss(pictures: Tensor) -> Tensor:
        small = F.interpolate(pictures.float(), size=target.shape[-2:], mode="bicubic", antialias=True)
        return (small - target.to(small)).square().sum(dim=(1, 2, 3)) / 2

    return loss


def guide_prediction(
    predict: Callable[..., Tensor],
    decode: Callable[[Tensor], Tensor],
    guidance_fn: GuidanceFn,
    scale: float,
    scheduler: Any,
    timestep: Tensor,
    scaled: Tensor,
    *condition: Any,
) -> Tensor:
    """A network's prediction, led towards pictures for which `guidance_fn` is small.

    The backward pass also stores what gradients of the weights would need, unless the networks were frozen by
    `requires_grad_(False)`.

    Args:
        predict: `predict(timestep, scaled, *condition)` -> the network's prediction (b, c, h, w).
        decode: clean latents -> pictures (b, 3, H, W) in [-1, 1].
        guidance_fn: of those, differentiable: a loss (b,), or their sum.
        scale: of the gradient.
        scheduler: tells the levels of signal and noise, and what the network predicts.
        timestep: of the step.
        scaled: latents as the network takes them.
        condition: further inputs of the network.

    Returns:
        (b, c, h, w), of the kind that the network predicts.

    Raises:
        ValueError: if `guidance_fn` returns another shape, or nothing to differentiate.
    """
    with torch.enable_grad():
        scaled = scaled.detach().requires_grad_()
        prediction = predict(timestep, scaled, *condition)
        pictures = decode(split_prediction(scheduler, prediction, scaled, timestep)[0])
        loss = guidance_fn(pictures)
        _check_loss(loss, len(scaled))
        gradient = _gradient(loss.sum(), scaled) if loss.requires_grad else None
    if gradient is None:
        raise ValueError(
            "The loss that `guidance_fn` returned does not depend on the pictures, or was computed without gradients"
            " (`torch.no_grad`, `.detach()`, numpy): compute it from its argument with differentiable torch functions."
        )
    prediction, scaled = prediction.detach(), scaled.detach()
    signal, noise_level = signal_and_noise(scheduler, timestep)
    noise = split_prediction(scheduler, prediction, scaled, timestep)[1] + scale * noise_level * gradient
    clean = (scaled.float() - noise_level * noise) / signal
    return join_prediction(scheduler, clean, noise, timestep).to(prediction.dtype)


def check_guidance_fn(guidance_fn: Any, guidance_fn_scale: Any) -> None:
    """A function, a finite factor, and gradients that can be computed; before a run."""
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


def _gradient(loss: Tensor, latents: Tensor) -> Tensor | None:
    """d loss / d latents in float32, None if there is none.

    In float16 small gradients vanish within the network and large ones overflow: the loss is multiplied by as much as
    the gradient bears.
    """
    for factor in (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0) if latents.dtype == torch.float16 else (1.0,):
        scaled = loss if factor == 1 else loss.float() * factor
        gradient = torch.autograd.grad(scaled, latents, allow_unused=True, retain_graph=factor > 1)[0]
        if gradient is None or factor == 1 or bool(gradient.isfinite().all()):
            break
    return None if gradient is None else gradient.float() / factor


def _check_loss(loss: Any, batch_size: int) -> None:
    if not isinstance(loss, Tensor) or tuple(loss.shape) not in ((), (batch_size,)):
        received = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"`guidance_fn` must return a loss for each of the {batch_size} pictures, shape ({batch_size},), or their"
            f" sum; received {received}."
        )
