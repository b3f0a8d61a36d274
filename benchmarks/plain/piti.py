"""PITI's sampler in its plain form: what the released code does in a step, as the fact sheet writes it down.

PITI-Synthesis/PITI@d9f7481:pretrained_diffusion/glide_util.py and text2im_model.py (MIT). The encoder is a part of the
network that the sampler calls, so it runs in every step, on the conditions and on as many null conditions. Guidance is
one doubled batch, whose second half of the image is overwritten with the first; the step itself is made for both
halves. Tables are float64 and cast where they are used.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHANNELS = 3


def cosine_betas(count: int = 1000) -> np.ndarray:
    def level(place: float) -> float:
        return math.cos((place + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - level((i + 1) / count) / level(i / count), 0.999) for i in range(count)])


class Respaced:
    """The tables of evenly spaced steps out of 1000."""

    def __init__(self, steps: int):
        levels = np.cumprod(1 - cosine_betas())
        self.timesteps = [round(999 / max(steps - 1, 1) * i) for i in range(steps)]
        kept = levels[self.timesteps]
        before = np.append(1.0, kept[:-1])
        betas = 1 - kept / before
        variance = betas * (1 - before) / (1 - kept)
        self.log_betas = np.log(betas)
        self.log_variance = np.log(np.append(variance[1], variance[1:]) if steps > 1 else betas)
        self.clean = np.sqrt(1 / kept), np.sqrt(1 / kept - 1)  # from x_t, from the noise
        self.mean = betas * np.sqrt(before) / (1 - kept), (1 - before) * np.sqrt(1 - betas) / (1 - kept)


def extract(table: np.ndarray, index: int, like: Tensor) -> Tensor:
    """A number of a table for each sample, (b, 1, 1, 1)."""
    steps = torch.full((len(like),), index, device=like.device)
    return torch.from_numpy(table).to(like.device)[steps].float()[:, None, None, None].expand_as(like)


def p_sample(tables: Respaced, index: int, x: Tensor, output: Tensor, noise: Tensor) -> Tensor:
    """One ancestral step with a learned variance, for the whole doubled batch."""
    eps, values = output.split(CHANNELS, dim=1)
    share = (values + 1) / 2
    log_variance = share * extract(tables.log_betas, index, x) + (1 - share) * extract(tables.log_variance, index, x)
    clean = extract(tables.clean[0], index, x) * x - extract(tables.clean[1], index, x) * eps
    clean = clean.clamp(-1, 1)
    mean = extract(tables.mean[0], index, x) * clean + extract(tables.mean[1], index, x) * x
    return mean + (index > 0) * torch.exp(0.5 * log_variance) * noise


@torch.no_grad()
def sample(
    unet: Any,
    encoder: Any,
    condition: Tensor,
    start: Tensor,
    *,
    steps: int,
    scale: float,
    draw: Callable[[], Tensor],
) -> Tensor:
    """Images (b, 3, h, w), not clamped.

    Args:
        unet, encoder: A stock `UNet2DConditionModel` and a `PITIEncoder`.
        condition: (b, c, H, W) in [-1, 1].
        start: Standard normal noise (b, 3, h, w).
        steps: Number of steps, evenly spaced.
        scale: s in u + s (c - u).
        draw: Noise (b, 3, h, w) of a step; both halves get it (the second half's matters nowhere).
    """
    tables = Respaced(steps)
    both = torch.cat([condition, torch.ones_like(condition)])
    x = torch.cat([start, start])
    for index in reversed(range(steps)):
        half = x[: len(x) // 2]
        combined = torch.cat([half, half])
        timestep = torch.full((len(x),), float(tables.timesteps[index]), device=x.device)
        tokens, vector = encoder(both, return_dict=False)
        output = unet(combined, timestep, encoder_hidden_states=tokens, class_labels=vector, return_dict=False)[0]
        eps, rest = output[:, :CHANNELS], output[:, CHANNELS:]
        cond, uncond = eps.chunk(2)
        guided = uncond + scale * (cond - uncond)
        noise = draw()
        x = p_sample(
            tables, index, x, torch.cat([torch.cat([guided, guided]), rest], dim=1), torch.cat([noise, noise])
        )
    return x[: len(x) // 2]
