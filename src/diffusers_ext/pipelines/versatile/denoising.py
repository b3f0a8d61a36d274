"""A denoising step of Versatile Diffusion: any flow, any mixture of contexts, guided.

Xu et al., arXiv 2211.08332; SHI-Labs/Versatile-Diffusion@cf0f4a2:lib/model_zoo/ddim.py (MIT). The steps themselves are
the scheduler's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from ...guidance import both_branches, guide
from ...models.unet_versatile import VersatileUNet
from ...schedulers.gaussian import ldm_scheduler

EMBEDS_NAMES = {"text": "prompt_embeds", "image": "image_embeds"}  # what users call the tokens of a context


@dataclass(frozen=True)
class FlowContext:
    """One of the contexts that a sample is made from.

    Attributes:
        type: A context type of the network, such as "text".
        embeds: Its tokens (b, l, d).
        negative_embeds: The tokens that stand for "no context", (b, l', d); None where there is no guidance.
        ratio: Its share among the contexts.
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
) -> Tensor:
    """The network's guided prediction of the noise in `latents`; the arguments are those of `predict_branches`."""
    branches = predict_branches(unet, latents, timestep, contexts, data_type=data_type, guidance_scale=guidance_scale)
    return guide(*branches, guidance_scale)


def predict_branches(
    unet: VersatileUNet,
    latents: Tensor,
    timestep: Tensor | int,
    contexts: Sequence[FlowContext],
    *,
    data_type: str = "image",
    guidance_scale: float = 1.0,
    layer_choices: Sequence[Any] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """The network's predictions under the contexts and under "no context", with the same mixture in both.

    Args:
        latents: Noisy latents (b, c, h, w) or (b, d), already scaled as the scheduler wants them.
        timestep: The timestep of all samples.
        contexts: At least one; all with `negative_embeds` unless `guidance_scale` is 1.
        data_type: The type that is generated, "image" or "text".
        guidance_scale: The scale of the guidance; 1 means no guidance, and half the work.
        layer_choices: For layer mixing, the choices of all samples or one list a sample, see `VersatileUNet.forward`.

    Returns:
        The noise under the contexts and under "no context", in the shape of `latents`; None for one that the scale
        does not need.
    """
    positive = [context.embeds for context in contexts]
    negative = [context.negative_embeds for context in contexts if context.negative_embeds is not None]
    if guidance_scale != 1 and len(negative) < len(positive):
        raise ValueError(
            f"`guidance_scale` is {guidance_scale}, but {len(positive) - len(negative)} of {len(positive)} contexts "
            "have no `negative_embeds`: pass them, or a scale of 1."
        )
    options: dict[str, Any] = {
        "data_type": data_type,
        "context_type": [context.type for context in contexts],
        "context_ratios": [context.ratio for context in contexts],
        "return_dict": False,
    }
    choices: Any = layer_choices
    one_a_sample = choices is not None and not isinstance(choices[0], int)
    return both_branches(
        # a doubled batch makes the choices of its samples twice
        lambda sample, tokens: unet(
            sample,
            timestep,
            tokens,
            layer_choices=list(choices or ()) * (len(sample) // len(latents)) if one_a_sample else choices,
            **options,
        )[0],
        (latents, positive),
        (latents, negative),
        guidance_scale,
    )


def named_contexts(contexts: Sequence[FlowContext]) -> dict[str, Tensor | None]:
    """The tokens under the names that callbacks know; `prompt_embeds` are those of the first context in every call."""
    named: dict[str, Tensor | None] = {}
    for place, context in enumerate(contexts):
        for name in _names_of(place, context):
            named |= {name: context.embeds, f"negative_{name}": context.negative_embeds}
    return named


def changed_contexts(contexts: Sequence[FlowContext], changed: Mapping[str, Tensor]) -> list[FlowContext]:
    """The contexts with the tokens that a callback put in place of those of `named_contexts`."""
    result = list(contexts)
    for place, context in enumerate(contexts):
        for name in _names_of(place, context):
            context = replace(
                context,
                embeds=changed.get(name, context.embeds),
                negative_embeds=changed.get(f"negative_{name}", context.negative_embeds),
            )
        result[place] = context
    return result


def _names_of(place: int, context: FlowContext) -> list[str]:
    own = EMBEDS_NAMES[context.type]
    return [own] if place > 0 or own == "prompt_embeds" else ["prompt_embeds", own]
