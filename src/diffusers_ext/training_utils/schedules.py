"""Learning-rate multipliers and weight averaging in the form of latent diffusion.

Rombach et al., arXiv 2112.10752; original: CompVis/latent-diffusion@a506df5:ldm/{lr_scheduler,modules/ema}.py (MIT).
The multipliers are callables for `torch.optim.lr_scheduler.LambdaLR`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.training_utils import EMAModel


@dataclass(frozen=True)
class WarmupDecay:
    """A linear rise from `start` to `peak`, then a way down to `end`: the multiplier of a step.

    Args:
        warmup_steps: length of the rise.
        start, peak, end: the multipliers.
        length: steps of rise and descent together; afterwards the multiplier stays at `end`.
        shape: `cosine`: half a wave from the rise's end to `length`. `linear`: along the line from `peak` at step 0
            to `end` at `length`, so it falls a little at the rise's end.

    Raises:
        ValueError: for a length that the rise does not leave room in, or an unknown shape.
    """

    warmup_steps: int
    start: float
    peak: float
    end: float
    length: float
    shape: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self):
        if not 0 <= self.warmup_steps < self.length:
            raise ValueError(
                f"`warmup_steps` is {self.warmup_steps} and `length` {self.length}: the rise must be shorter."
            )
        if self.shape not in ("cosine", "linear"):
            raise ValueError(f"`shape` is {self.shape!r}: it must be 'cosine' or 'linear'.")

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.start + (self.peak - self.start) / self.warmup_steps * step
        if self.shape == "linear":
            left = 1 - min(step / self.length, 1.0)
        else:
            done = min((step - self.warmup_steps) / (self.length - self.warmup_steps), 1.0)
            left = 0.5 * (1 + math.cos(math.pi * done))
        return self.end + (self.peak - self.end) * left


@dataclass(frozen=True)
class Cycles:
    """Several schedules one after the other, each counting from its own start; the last one's end holds."""

    schedules: Sequence[WarmupDecay]

    def __call__(self, step: int) -> float:
        *earlier, last = self.schedules
        for schedule in earlier:
            if step <= schedule.length:  # the last step of a cycle belongs to it
                return schedule(step)
            step -= int(schedule.length)
        return last(step)


def ldm_ema(parameters: Iterable[torch.nn.Parameter], decay: float = 0.9999) -> EMAModel:
    """diffusers' average with the original's decay: min(decay, (1 + n) / (10 + n)) at update n = 1, 2, ...

    Without the shift diffusers takes over the first update whole. Covers what it is given: the original averages the
    U-Net only, never a conditioner that is trained along.
    """
    return EMAModel(parameters, decay=decay, update_after_step=-1)
