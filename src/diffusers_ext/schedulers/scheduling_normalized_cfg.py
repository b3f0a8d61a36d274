"""Normalised classifier-free guidance around any scheduler.

Wang et al., "Pretraining is All You Need for Image-to-Image Translation" (PITI), arXiv 2205.12952, section 3.3; the
released code has plain guidance only. The rule is `guidance.normalized_guidance`.
"""

import math
import numbers
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..guidance import guide, normalized_guidance
from .adapter import SchedulerAdapter, handed_on


class NormalizedCFGScheduler(SchedulerAdapter):
    """Guides, and gives the guided prediction the mean and the standard deviation of the conditional one.

    A pipeline of this library hands both predictions to its `step`. To one that guides by itself and hands over one
    prediction, it is the scheduler that it holds.

    Example:

        pipe.scheduler = NormalizedCFGScheduler(pipe.scheduler)

    Args:
        scheduler: The sampler, see `SchedulerAdapter`.
        guidance_scale: When a step names none: 1 is no guidance, the paper's w is `guidance_scale - 1`.
        guidance_rescale: From 0 (plain guidance) to 1 (normalised).
        per_channel: Takes the statistics of each channel of a sample, not of the whole sample.

    Raises:
        TypeError, ValueError: For a `guidance_scale` that is no finite number, and a `guidance_rescale` outside of 0
            to 1.
    """

    def __init__(
        self,
        scheduler: Any = None,
        guidance_scale: float = 1.5,
        guidance_rescale: float = 1.0,
        per_channel: bool = False,
    ):
        for name, value in (("guidance_scale", guidance_scale), ("guidance_rescale", guidance_rescale)):
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"`{name}` must be a number, received {value!r}.")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` is {guidance_scale}: it must be finite.")
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(
                f"`guidance_rescale` is {guidance_rescale}: it must lie between 0 (plain) and 1 (normalised)."
            )
        super().__init__(
            scheduler, guidance_scale=guidance_scale, guidance_rescale=guidance_rescale, per_channel=per_channel
        )

    def mix(self, cond: Tensor, uncond: Tensor, guidance_scale: float | Tensor) -> Tensor:
        """The guided prediction (b, c, ...) of two; a rule for `guidance.guide`."""
        own = self._internal_dict
        return normalized_guidance(
            cond,
            uncond,
            guidance_scale,
            guidance_rescale=own["guidance_rescale"],
            per_channel=own["per_channel"],
        )

    @handed_on
    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        model_output_uncond: Tensor | None = None,
        guidance_scale: float | Tensor | None = None,
        **inner: Any,
    ) -> SchedulerOutput | tuple:
        """A step of the held scheduler, guided if both predictions are given.

        Args:
            model_output: The conditional prediction (b, c, ...), or (b, 2 c, ...) with a learned variance, which stays
                the conditional one.
            timestep: One of `timesteps`.
            sample: Noisy (b, c, ...).
            model_output_uncond: The unconditional prediction, in the shape of `model_output`; None for a plain step.
            guidance_scale: One number or one a sample; by default the configured one.
            inner: Further arguments of the held scheduler's step.
        """
        if model_output_uncond is not None:
            scale = self._internal_dict["guidance_scale"] if guidance_scale is None else guidance_scale
            model_output = guide(model_output, model_output_uncond, scale, mix=self.mix, channels=sample.shape[1])
        return self.scheduler.step(model_output, timestep, sample, **inner)
