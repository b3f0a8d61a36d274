"""What is drawn for each sample of a batch: whether it is trained without its condition, latents of its posterior."""

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from ..losses.kl import sample_posterior


def keep_condition(generators: Sequence[Generator], dropout_prob: float) -> Tensor:
    """Which samples (b,) keep their condition: each with probability 1 - `dropout_prob`, one draw a sample."""
    return torch.stack([torch.rand((), generator=g) for g in generators]) >= dropout_prob


def draw_posterior(moments: Tensor, generators: Sequence[Generator]) -> Tensor:
    """Latents of a Gaussian posterior, float32 (b, d, h, w), (d, h, w) draws a sample.

    Args:
        moments: (b, 2 d, h, w), as an `AutoencoderKL` gives them: mean, then log-variance.
        generators: One a sample.
    """
    count, channels, *sides = moments.shape
    noise = randn_tensor((count, channels // 2, *sides), generator=list(generators), device=moments.device)
    return sample_posterior(moments, noise)
