"""A denoising step of Versatile Diffusion: any flow, any mixture of contexts, guided.

Xu et al., arXiv 2211.08332; SHI-Labs/Versatile-Diffusion@cf0f4a2:lib/model_zoo/ddim.py (MIT). The steps themselves are
the scheduler's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from ...guidance import classifier_free_guidance
from ...models.unet_versatile import VersatileUNet
from ...schedulers.gaussian import ldm_scheduler


@dataclass(frozen=True)
class FlowContext:
    """One of the contexts that a sample is made from.

    Attributes:
        type: a context type of the network, such as "text".
        embeds: its tokens (b, l, d).
        negative_embeds: what stands for "no context", (b, l', d); None where there is no guidance.
        ratio: its share among the contexts.
    """

    type: str
    embeds: Tensor
    negative_embeds: Tensor | None = None
    ratio: float = 1.0


def versatile_scheduler() -> DDIMScheduler:
    """The scheduler of the released models; any other of diffusers can be made of its config."""
    return ldm_scheduler(0.00085, 0.012)


def predict_flow_noise(
    unet: VersatileUNet,
    latents: Tensor,
    timestep: Tensor | int,
    contexts: Sequence[FlowContext],
    *,
    data_type: str = "image",
    guidance_scale: float = 1.0,
    layer_choices: Sequence[Any] | None = None,
) -> Tensor:
    """The network's guided prediction, with the same mixture in the guided and in the unguided half.

    Args:
        latents: (b, c, h, w) or (b, d), already scaled as the scheduler wants them.
        timestep: one for all.
        contexts: at least one; all with `negative_embeds` unless `guidance_scale` is 1.
        data_type: what is generated.
        guidance_scale: 1 means no guidance, and half the work.
        layer_choices: for layer mixing, those of all samples or one list a sample, see `VersatileUNet.forward`.

    Returns:
        The noise, in the shape of `latents`.
    """
    options = {
        "data_type": data_type,
        "context_type": [context.type for context in contexts],
        "context_ratios": [context.ratio for context in contexts],
        "layer_choices": layer_choices,
        "return_dict": False,
    }
    positive = [context.embeds for context in contexts]
    negative = [context.negative_embeds for context in contexts if context.negative_embeds is not None]
    if guidance_scale == 1.0:
        return unet(latents, timestep, positive, **options)[0]
    if len(negative) < len(positive):
        raise ValueError(
            f"`guidance_scale` is {guidance_scale}, but {len(positive) - len(negative)} of {len(positive)} contexts "
            "have no `negative_embeds`: pass them, or a scale of 1."
        )
    if all(no.shape == yes.shape for no, yes in zip(negative, positive, strict=True)):
        both = [torch.cat([no, yes]) for no, yes in zip(negative, positive, strict=True)]
        if layer_choices is not None and not isinstance(layer_choices[0], int):  # the same in both halves
            options["layer_choices"] = [*layer_choices, *layer_choices]
        uncond, cond = unet(torch.cat([latents, latents]), timestep, both, **options)[0].chunk(2)
    else:  # contexts of other lengths do not stack
        uncond, cond = (unet(latents, timestep, half, **options)[0] for half in (negative, positive))
    return classifier_free_guidance(cond, uncond, guidance_scale)
