"""Guidance: pure functions on model outputs. No state, no modules; any sampler may call them.

Classifier-free guidance: Ho and Salimans 2022, arXiv 2207.12598.
"""

import torch
from torch import Tensor


def classifier_free_guidance(cond: Tensor, uncond: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Mix a conditional and an unconditional prediction: `uncond + guidance_scale * (cond - uncond)`.

    A scale of 1 gives the conditional prediction, 0 the unconditional one, more than 1 extrapolates beyond the
    conditional. This is diffusers' convention of `guidance_scale`, not the `(1 + w)` form of the paper.

    Args:
        cond: prediction under the condition; noise, logits or features, any shape.
        uncond: prediction under the null condition, same shape, dtype and device.
        guidance_scale: one number, or a tensor of one scale per sample (shape `(b,)`) or of any shape that
            broadcasts against `cond`.

    Returns:
        The mixed prediction in the dtype of `cond`.

    Raises:
        ValueError: if the shapes differ, or a vector of scales does not hold one scale per sample.
    """
    if cond.shape != uncond.shape:
        raise ValueError(
            f"`cond` and `uncond` must have the same shape, got {tuple(cond.shape)} and {tuple(uncond.shape)}: run "
            "both branches on the same sample, for instance as one doubled batch split by `chunk(2)`."
        )
    if not isinstance(guidance_scale, Tensor):
        return torch.lerp(uncond, cond, guidance_scale)
    scale = guidance_scale.to(device=cond.device, dtype=cond.dtype)
    if scale.ndim == 1 and cond.ndim > 1:
        if scale.shape[0] not in (1, cond.shape[0]):
            raise ValueError(
                f"`guidance_scale` holds {scale.shape[0]} scales for a batch of {cond.shape[0]}: pass one number, or "
                "one scale per sample."
            )
        scale = scale.reshape(-1, *[1] * (cond.ndim - 1))  # (b, 1, ..., 1)
    return torch.lerp(uncond, cond, scale)
