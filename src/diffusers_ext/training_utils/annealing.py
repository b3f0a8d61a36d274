"""A weight that rises again and again while a network is trained.

Fu, Li, Liu, Gao, Celikyilmaz, Carin, "Cyclical Annealing Schedule", arXiv 1903.10145; with a stretch of zero in front
of each rise as in Optimus, ChunyuanLI/Optimus@f3190fe:code/examples/big_ae/utils.py (MIT).
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CyclicalAnnealing:
    """The weight of a step: in each cycle 0, then a linear rise to `peak`, then `peak`.

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
