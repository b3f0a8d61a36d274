"""What follows the number of the step: multipliers of the learning rate, a weight of a loss, the decay of an average.

The multipliers and the average are those of latent diffusion (Rombach et al., arXiv 2112.10752; CompVis/
latent-diffusion@a506df5:ldm/{lr_scheduler,modules/ema}.py, MIT), callables for `torch.optim.lr_scheduler.LambdaLR`.
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


@dataclass(frozen=True)
class CyclicalAnnealing:
    """A weight that rises again and again: in each cycle 0, then a linear rise to `peak`, then `peak`.

    Fu, Li, Liu, Gao, Celikyilmaz, Carin, "Cyclical Annealing Schedule", arXiv 1903.10145; with a stretch of zero in
    front of each rise as in Optimus, ChunyuanLI/Optimus@f3190fe:code/examples/big_ae/utils.py (MIT).

    Args:
        num_steps: length of all cycles together; `peak` holds afterwards.
        peak: the weight at the end of a rise.
        num_cycles: how often.
        zero_fraction, rise_fraction: shares of a cycle at 0 and on the rise.

    Raises:
        ValueError: for a number of steps or cycles below 1, a negative peak, or shares that are no parts of a whole.
    """

    num_steps: int
    peak: float = 1.0
    num_cycles: int = 10
    zero_fraction: float = 0.5
    rise_fraction: float = 0.25

    def __post_init__(self):
        if self.num_cycles < 1 or self.num_steps < self.num_cycles:
            raise ValueError(
                f"`num_cycles` is {self.num_cycles} and `num_steps` {self.num_steps}: at least one cycle, and one "
                "step in each, are needed."
            )
        if self.peak < 0:
            raise ValueError(f"`peak` is {self.peak}: it must be >= 0.")
        if min(self.zero_fraction, self.rise_fraction) < 0 or self.zero_fraction + self.rise_fraction > 1:
            raise ValueError(
                f"`zero_fraction` is {self.zero_fraction} and `rise_fraction` {self.rise_fraction}: both must be >= "
                "0, and at most 1 together."
            )

    def __call__(self, step: int) -> float:
        if step >= self.num_steps:
            return self.peak
        length = self.num_steps / self.num_cycles
        cycle = max(c for c in range(self.num_cycles) if int(c * length) <= step)
        position = step - int(cycle * length)
        if position < length * self.zero_fraction:
            return 0.0
        if self.rise_fraction == 0:
            return self.peak
        risen = position - math.ceil(length * self.zero_fraction)  # steps since the rise began, at 0
        return self.peak * min(risen / (length * self.rise_fraction), 1.0)


def ldm_ema(parameters: Iterable[torch.nn.Parameter], decay: float = 0.9999) -> EMAModel:
    """diffusers' average with the original's decay: min(decay, (1 + n) / (10 + n)) at update n = 1, 2, ...

    Without the shift diffusers takes over the first update whole. Covers what it is given: the original averages the
    U-Net only, never a conditioner that is trained along.
    """
    return EMAModel(parameters, decay=decay, update_after_step=-1)
