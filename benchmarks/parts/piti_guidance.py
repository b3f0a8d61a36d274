"""What benchmarks/claims_piti.py guidance measures: how guidance widens the predicted noise, step by step."""

from typing import Any

import torch
from torch import Tensor

from diffusers_ext import NormalizedCFGScheduler
from diffusers_ext.guidance import classifier_free_guidance


class RecordedGuidance(NormalizedCFGScheduler):
    """Guides by a share of the normalised rule, and notes for each step what plain guidance does to the noise.

    Args:
        scheduler: The sampler.
        guidance_rescale: 0 is plain guidance, 1 is normalised guidance.
    """

    def __init__(self, scheduler: Any = None, guidance_rescale: float = 1.0):
        super().__init__(scheduler, guidance_rescale=guidance_rescale)
        self.notes: dict[int, list[dict[str, Tensor]]] = {}  # timestep -> a note a batch

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        model_output_uncond: Tensor | None = None,
        guidance_scale: float | Tensor | None = None,
        **inner: Any,
    ) -> Any:
        note = {"sample_mean": moments(sample)[0], "sample_std": moments(sample)[1]}
        scale = 1.0 if guidance_scale is None else float(guidance_scale)
        if model_output_uncond is not None:
            channels = sample.shape[1]
            note |= shift_of(model_output[:, :channels], model_output_uncond[:, :channels], scale)
        self.notes.setdefault(int(timestep), []).append(note)
        return super().step(model_output, timestep, sample, model_output_uncond, guidance_scale, **inner)

    def trajectory(self) -> list[dict[str, float]]:
        """The notes as means over all samples, in the order of the steps."""
        steps = []
        for timestep, notes in self.notes.items():
            means = {name: float(torch.cat([note[name] for note in notes]).mean()) for name in notes[0]}
            steps.append({"timestep": timestep, **means})
        return steps


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each sample (b, ...), two vectors (b,)."""
    flat = values.float().flatten(1)
    return flat.mean(1), flat.std(1)


def shift_of(cond: Tensor, uncond: Tensor, scale: float) -> dict[str, Tensor]:
    """What plain guidance does to the noise, beside what the paper predicts; vectors (b,).

    - "std_ratio": the guided noise's standard deviation over that of the conditional noise
    - "std_ratio_predicted": the same by sqrt((1 + w)^2 std_c^2 + w^2 std_u^2), w = scale - 1, for independent branches
    - "mean_shift": the guided noise's mean less the conditional one's; by (1 + w) mean_c - w mean_u it is exact
    """
    (mean, std), (null_mean, null_std) = moments(cond), moments(uncond)
    _, guided_std = moments(classifier_free_guidance(cond, uncond, scale))
    predicted = (scale**2 * std.square() + (scale - 1) ** 2 * null_std.square()).sqrt()
    return {
        "std_ratio": guided_std / std,
        "std_ratio_predicted": predicted / std,
        "mean_shift": (scale - 1) * (mean - null_mean),
    }


def saturated(pictures: Tensor) -> float:
    """Share of the colour values of pictures in [0, 1] that lie on either end of the 8-bit scale."""
    levels = (pictures.clamp(0, 1) * 255).round()
    return float(((levels == 0) | (levels == 255)).float().mean())
