"""Guidance: pure functions on model outputs. No state, no modules; any sampler may call them.

Classifier-free guidance: Ho and Salimans 2022, arXiv 2207.12598.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Mix: TypeAlias = Callable[[Tensor, Tensor, float | Tensor], Tensor]  # (conditional, unconditional, scale) -> mixed
Inputs: TypeAlias = Sequence[Any]  # tensors of one batch size, lists of such tensors, or None


def both_branches(
    run: Callable[..., Tensor], cond: Inputs, uncond: Inputs | None, guidance_scale: float | Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Runs a network on the conditional and on the unconditional inputs, as often as the scale needs.

    A scale of 1 needs only the conditional branch, a scale of 0 only the other one. Both run in one doubled batch
    where the shapes agree, the unconditional half first, and one after the other where they do not (contexts of
    different lengths).

    Args:
        run: `run(*inputs) -> prediction`, with the samples along the first dimension.
        cond: its inputs under the condition. Each is a tensor (b, ...), a list of such tensors, or None.
        uncond: the same under the null condition; None where there is nothing to be guided away from.
        guidance_scale: one number, or a tensor of scales.

    Returns:
        The conditional and the unconditional prediction; None for the one that did not run.
    """
    if uncond is None or (not isinstance(guidance_scale, Tensor) and guidance_scale == 1):
        return run(*cond), None
    if not isinstance(guidance_scale, Tensor) and guidance_scale == 0:
        return None, run(*uncond)
    if not all(_stackable(no, yes) for no, yes in zip(uncond, cond, strict=True)):
        return run(*cond), run(*uncond)
    halves = run(*(_stack(no, yes) for no, yes in zip(uncond, cond, strict=True))).chunk(2)
    return halves[1], halves[0]


def guide(
    cond: Tensor | None,
    uncond: Tensor | None,
    guidance_scale: float | Tensor,
    *,
    mix: Mix | None = None,
    channels: int | None = None,
) -> Tensor:
    """The guided prediction from what `both_branches` returned; a branch that ran alone is the answer.

    Args:
        cond, uncond: predictions (b, c, ...); not both None.
        guidance_scale: as for `both_branches`.
        mix: the rule, by default `classifier_free_guidance`.
        channels: mixes only the first ones. The others, a learned variance, stay those of the conditional prediction
            (GLIDE, openai/glide-text2im@69b5307).
    """
    if cond is None or uncond is None:
        only = cond if uncond is None else uncond
        assert only is not None, "at least one branch has run"
        return only
    mix = classifier_free_guidance if mix is None else mix
    if channels is None:
        return mix(cond, uncond, guidance_scale)
    return torch.cat([mix(cond[:, :channels], uncond[:, :channels], guidance_scale), cond[:, channels:]], dim=1)


def _stackable(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_stackable, one, other))
    return one is other  # None on both sides


def _stack(one: Any, other: Any) -> Any:
    """Both batches as one, or lists of them."""
    if isinstance(one, Tensor):
        return torch.cat([one, other])
    return None if one is None else list(map(_stack, one, other))


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
