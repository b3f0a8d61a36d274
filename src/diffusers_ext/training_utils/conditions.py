"""What the recipes of conditional networks share: which samples of a batch are trained without their condition."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def keep_condition(generators: Sequence[Generator], dropout_prob: float) -> Tensor:
    """Which samples (b,) keep their condition: each with probability 1 - `dropout_prob`, one draw a sample."""
    return torch.stack([torch.rand((), generator=g) for g in generators]) >= dropout_prob
