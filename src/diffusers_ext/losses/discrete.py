"""Losses for discrete token prediction: Paella, arXiv 2211.07292.

Original code (MIT): dome272/Paella@b1f88ef (v1, unweighted), @e1ab72b (v3, weighted).

Letters in shape comments: b images, v token classes, (h, w) the token grid.
"""

import torch.nn.functional as F
from torch import Tensor


def token_cross_entropy(
    logits: Tensor, tokens: Tensor, *, label_smoothing: float = 0.1, reduction: str = "mean"
) -> Tensor:
    """Label-smoothed cross-entropy against the clean tokens at *all* positions, replaced or not. Computed in float32.

    Args:
        logits: (b, v, h, w), any real dtype.
        tokens: LongTensor (b, h, w), the clean tokens.
        label_smoothing: in [0, 1]; the original's 0.1.
        reduction: `mean` (over all positions, the v1 loss), `sum`, `none` (a map (b, h, w), to be weighted as in v3),
            or `sample` (one mean per image, (b,)).

    Returns:
        A scalar, (b, h, w) or (b,), float32, in nats.

    Raises:
        ValueError: on shapes that do not fit each other, or an unknown reduction.
    """
    if reduction not in ("mean", "sum", "none", "sample"):
        raise ValueError(f"`reduction` must be one of 'mean', 'sum', 'none', 'sample', got {reduction!r}.")
    if logits.ndim < 2 or tokens.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"`logits` must have shape (b, v, h, w) and `tokens` (b, h, w), got {tuple(logits.shape)} and "
            f"{tuple(tokens.shape)}."
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"`label_smoothing` must lie in [0, 1], got {label_smoothing}.")
    # rows (b*h*w, v): the class axis last is the fast layout of the CPU kernel
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1]).float()
    if reduction in ("mean", "sum"):
        return F.cross_entropy(rows, tokens.flatten(), label_smoothing=label_smoothing, reduction=reduction)
    losses = F.cross_entropy(rows, tokens.flatten(), label_smoothing=label_smoothing, reduction="none")
    losses = losses.view(tokens.shape)
    return losses if reduction == "none" else losses.flatten(1).mean(dim=1)


def loss_weight(mask: Tensor, timesteps: Tensor, min_weight: float = 0.3) -> Tensor:
    """Weight of each position in the v3 loss: `1 - (1 - mask) (1 - t) (1 - min_weight)`.

    1 where a token was replaced, `min_weight + (1 - min_weight) t` elsewhere (dome272/Paella@e1ab72b).

    Args:
        mask: (b, h, w), 1 (or True) = replaced.
        timesteps: (b,), the share of noise t in [0, 1] (1 = all noise). For a v1 model pass its noise ratio.
        min_weight: weight of untouched positions at t = 0, in [0, 1].

    Returns:
        float32 (b, h, w). The v3 loss is `weighted_mean(token_cross_entropy(..., reduction="none"), weight)`.
    """
    if not 0.0 <= min_weight <= 1.0:
        raise ValueError(f"`min_weight` must lie in [0, 1], got {min_weight}.")
    if timesteps.shape != mask.shape[:1]:
        raise ValueError(
            f"`timesteps` must hold one level per image, got shape {tuple(timesteps.shape)} for a mask of shape "
            f"{tuple(mask.shape)}."
        )
    t = timesteps.float().reshape(-1, *[1] * (mask.ndim - 1))  # (b, 1, 1)
    return 1 - (1 - mask.float()) * (1 - t) * (1 - min_weight)


def weighted_mean(losses: Tensor, weight: Tensor) -> Tensor:
    """`mean_b(sum(losses * weight) / sum(weight))`: each image counts once, whatever its weights add up to.

    Args:
        losses: (b, h, w) losses per position.
        weight: (b, h, w) weights >= 0, not all 0 within an image.

    Returns:
        A scalar.
    """
    if losses.shape != weight.shape:
        raise ValueError(f"`losses` and `weight` differ in shape: {tuple(losses.shape)} and {tuple(weight.shape)}.")
    return ((losses * weight).flatten(1).sum(dim=1) / weight.flatten(1).sum(dim=1)).mean()
