"""Noise levels in float64, which diffusers keeps in float32: for the tests that compare to the last digit."""

import torch
from torch import Tensor


def scaled_linear_betas(beta_start: float, beta_end: float, num_train_timesteps: int = 1000) -> Tensor:
    """Squares of evenly spaced numbers, float64 (T,): diffusers' `scaled_linear`, the original's "linear"."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64).square()
