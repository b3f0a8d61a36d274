"""Cascaded Diffusion in its plain form: what one writes down first from the paper (arXiv 2106.15282, section 3).

Two stages with ADM's ancestral steps of a learned-range variance (openai/guided-diffusion@22e0df8), one equation a
line. Networks are called as `network(x, t, labels, low_res, level)` and give (b, 2 c, h, w).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Network = Callable[..., Tensor]


class Process:
    """A diffusion over some of its timesteps: tables in float64, one entry a step that is kept, coarse to fine.

    Args:
        betas: Of the training schedule, float64 (T,).
        timesteps: Those that are sampled, falling.
    """

    def __init__(self, betas: Tensor, timesteps: Sequence[int]):
        abar = (1 - betas).cumprod(0)[list(timesteps)]
        before = torch.cat([abar[1:], torch.ones(1, dtype=torch.float64)])
        self.timesteps = list(timesteps)
        self.betas = 1 - abar / before
        self.abar, self.before = abar, before
        variance = self.betas * (1 - before) / (1 - abar)
        self.log_small = torch.cat([variance[:-1], variance[-2:-1]]).log()
        self.log_large = self.betas.log()

    def step(self, network: Network, x: Tensor, place: int, noise: Tensor, *condition: Tensor | None) -> Tensor:
        """One ancestral step: x_{t-1} ~ p(x_{t-1} | x_t, condition)."""
        t = torch.full((len(x),), self.timesteps[place], device=x.device)
        abar, before, beta = (float(table[place]) for table in (self.abar, self.before, self.betas))
        output = network(x, t, *condition).float()
        eps, v = output.chunk(2, dim=1)
        clean = (x.float() / abar**0.5 - (1 / abar - 1) ** 0.5 * eps).clamp(-1, 1)
        mean = before**0.5 * beta / (1 - abar) * clean + (1 - beta) ** 0.5 * (1 - before) / (1 - abar) * x.float()
        fraction = (v + 1) / 2
        log_variance = fraction * float(self.log_large[place]) + (1 - fraction) * float(self.log_small[place])
        is_noisy = place < len(self.timesteps) - 1
        return (mean + is_noisy * (log_variance / 2).exp() * noise.float()).to(x.dtype)


def noise_to_level(betas: Tensor, clean: Tensor, level: int, noise: Tensor) -> Tensor:
    """z_s ~ q(z_s | z_0), s counted from 1; s = 0 is clean."""
    if level == 0:
        return clean
    abar = float((1 - betas).cumprod(0)[level - 1])
    return abar**0.5 * clean + (1 - abar) ** 0.5 * noise


@torch.no_grad()
def sample_stage(
    network: Network, process: Process, x: Tensor, generator: torch.Generator, *condition: Tensor | None, stop: int = 0
) -> Tensor:
    """Runs a stage from noise x down to the level `stop`, which is one of its timesteps + 1, or 0."""
    for place, timestep in enumerate(process.timesteps):
        if timestep < stop:
            break
        noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x)
        x = process.step(network, x, place, noise, *condition)
    return x


@torch.no_grad()
def sample(
    networks: Sequence[Network],
    processes: Sequence[Process],
    betas: Tensor,
    sides: Sequence[int],
    labels: Tensor,
    levels: Sequence[int],
    generator: torch.Generator,
) -> Tensor:
    """Images (b, 3, h, w) of a cascade in the non-truncated form.

    Args:
        networks: Of the stages, coarse to fine; the first one gets (x, t, labels), the others small image and level.
        processes: Of the stages.
        betas: Of the noise that the small images get.
        sides: Of the stages' images.
        labels: Classes (b,).
        levels: s of each stage but the first.
        generator: Of all draws.
    """
    z: Tensor | None = None
    for index, (network, process, side) in enumerate(zip(networks, processes, sides, strict=True)):
        x = torch.randn((len(labels), 3, side, side), generator=generator, device=generator.device).to(labels.device)
        condition: tuple[Tensor | None, ...] = (labels,)
        if z is not None:
            level, z = levels[index - 1], z.clamp(-1, 1)
            if level:
                noise = torch.randn(z.shape, generator=generator, device=generator.device).to(z)
                z = noise_to_level(betas, z, level, noise)
            condition = (labels, z, torch.full((len(labels),), float(level), device=z.device))
        z = sample_stage(network, process, x, generator, *condition)
    assert z is not None
    return z
