"""Which noise levels a step trains: all alike, or the more often the larger their losses were.

Importance sampling of Nichol and Dhariwal, arXiv 2102.09672, section 3.3; original:
openai/guided-diffusion@22e0df8:guided_diffusion/resample.py (MIT).
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Generator, Tensor, nn

from .objective import draw_integers

HISTORY = 10  # losses that are remembered of each level
UNIFORM_PROB = 0.001  # share of the draws that no loss influences


class UniformTimesteps(nn.Module):
    """Every noise level with the same probability.

    Args:
        num_timesteps: T.
    """

    def __init__(self, num_timesteps: int):
        super().__init__()
        self.num_timesteps = num_timesteps

    def draw(self, generators: Sequence[Generator], device: torch.device) -> tuple[Tensor, Tensor]:
        """Levels (b,), one draw a sample, and the weights (b,) of their losses."""
        timesteps = draw_integers(generators, 0, self.num_timesteps).to(device)
        return timesteps, torch.ones(len(timesteps), device=device)

    def refresh(self) -> None:
        """Takes what was observed into account, for the draws of a step."""

    def observe(self, timesteps: Tensor, losses: Tensor, weight: float, accelerator: Accelerator) -> None:
        """Takes note of the losses (b,) of a micro-batch; see `Objective.observe`."""


class LossSecondMomentTimesteps(UniformTimesteps):
    """Each noise level with a probability in proportion to the root mean square of its last losses.

    Until each level has been drawn often enough, all are alike. Losses are divided by the probability, so that their
    mean stays what it is. What is remembered lies in buffers, so that a checkpoint holds it. The probabilities change
    between steps alone: neither accumulation nor the number of processes changes a draw.
    """

    losses: Tensor
    counts: Tensor
    probabilities: Tensor

    def __init__(self, num_timesteps: int):
        super().__init__(num_timesteps)
        self.register_buffer("losses", torch.zeros(num_timesteps, HISTORY))  # a ring a level
        self.register_buffer("counts", torch.zeros(num_timesteps, dtype=torch.long))
        uniform = torch.full((num_timesteps,), 1 / num_timesteps)
        self.register_buffer("probabilities", uniform, persistent=False)

    def draw(self, generators: Sequence[Generator], device: torch.device) -> tuple[Tensor, Tensor]:
        if not self.training:  # a validation is comparable from step to step
            return super().draw(generators, device)
        places = torch.stack([torch.rand((), generator=g) for g in generators]).to(device)
        ends = self.probabilities.cumsum(0)
        timesteps = torch.searchsorted(ends / ends[-1], places, right=True).clamp(max=self.num_timesteps - 1)
        return timesteps, 1 / (self.num_timesteps * self.probabilities[timesteps])

    def refresh(self) -> None:
        moments = self.losses.square().mean(dim=1).sqrt()
        mixed = (1 - UNIFORM_PROB) * moments / moments.sum() + UNIFORM_PROB / self.num_timesteps
        is_known = (self.counts >= HISTORY).all()
        self.probabilities.copy_(torch.where(is_known, mixed, 1 / self.num_timesteps))

    def observe(self, timesteps: Tensor, losses: Tensor, weight: float, accelerator: Accelerator) -> None:
        if weight == 0:  # a process without samples of its own took another's
            timesteps = torch.full_like(timesteps, -1)
        losses = losses.detach().float()
        if accelerator.num_processes > 1:  # a cut last batch has fewer samples on some
            everyone: Any = accelerator.gather  # typed for collections too
            timesteps = everyone(accelerator.pad_across_processes(timesteps, pad_index=-1))
            losses = everyone(accelerator.pad_across_processes(losses))
        self.remember(timesteps, losses)

    def remember(self, timesteps: Tensor, losses: Tensor) -> None:
        """Puts losses (b,) in the place of the oldest of their levels (b,); those of a level -1 are left out."""
        # sorted, so that the order of processes is of no account, and without a loop that would wait for a device
        order = torch.argsort(losses)
        order = order[torch.argsort(timesteps[order], stable=True)]
        timesteps, losses = timesteps[order], losses[order]
        same = timesteps[:, None] == timesteps[None]
        rank, number = same.tril(-1).sum(dim=1), same.sum(dim=1)  # among the samples of a level
        is_kept = (timesteps >= 0) & (rank >= number - HISTORY)
        level = timesteps.clamp(min=0)
        place = (self.counts[level] + rank) % HISTORY
        flat = torch.where(is_kept, level * HISTORY + place, self.losses.numel())  # one place more takes the others
        table = torch.cat([self.losses.flatten(), self.losses.new_zeros(1)])
        table[flat] = losses
        self.losses.copy_(table[:-1].view_as(self.losses))
        self.counts.scatter_add_(0, level, (timesteps >= 0).long())


TIMESTEP_SAMPLERS: dict[Literal["uniform", "loss_second_moment"], type[UniformTimesteps]] = {
    "uniform": UniformTimesteps,
    "loss_second_moment": LossSecondMomentTimesteps,
}
