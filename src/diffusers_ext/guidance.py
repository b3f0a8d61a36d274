"""Guidance: pure functions on model outputs, which any sampler may call, and a guider of diffusers for one of them.

Classifier-free guidance: Ho and Salimans 2022, arXiv 2207.12598. Normalised guidance: Wang et al. 2022 (PITI), arXiv
2205.12952, section 3.3.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

Mix: TypeAlias = Callable[[Tensor, Tensor, float | Tensor], Tensor]  # (conditional, unconditional, scale) -> mixed
Inputs: TypeAlias = Sequence[Any]  # tensors of one batch size, lists of such tensors, or None


def both_branches(
    run: Callable[..., Tensor], cond: Inputs, uncond: Inputs | None, guidance_scale: float | Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Runs a network on the conditional and on the unconditional inputs, as often as the scale needs.

    A scale of 1 needs only the conditional branch, a scale of 0 only the other one. Both run in one doubled batch
    where the shapes agree, the unconditional half first, and one after the other where they do not (contexts of
    different lengths).

    Args:
        run: `run(*inputs) -> prediction`, with the samples along the first dimension.
        cond: its inputs under the condition. Each is a tensor (b, ...), a list of such tensors, or None.
        uncond: the same under the null condition; None where there is nothing to be guided away from.
        guidance_scale: one number, or a tensor of scales.

    Returns:
        The conditional and the unconditional prediction; None for the one that did not run.
    """
    if uncond is None or (not isinstance(guidance_scale, Tensor) and guidance_scale == 1):
        return run(*cond), None
    if not isinstance(guidance_scale, Tensor) and guidance_scale == 0:
        return None, run(*uncond)
    doubled = _stacked(uncond, cond)
    if doubled is None:
        return run(*cond), run(*uncond)
    halves = run(*doubled).chunk(2)
    return halves[1], halves[0]


def _stacked(first: Inputs, second: Inputs) -> list[Any] | None:
    """Both batches as one, input by input. None where their shapes do not agree."""
    if len(first) != len(second):
        return None
    stacked: list[Any] = []
    for one, other in zip(first, second, strict=True):
        if one is None and other is None:
            stacked.append(None)
            continue
        both = None
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            both = torch.cat([one, other]) if one.shape == other.shape else None
        elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
            both = _stacked(one, other)
        if both is None:
            return None
        stacked.append(both)
    return stacked


def guide(
    cond: Tensor | None,
    uncond: Tensor | None,
    guidance_scale: float | Tensor,
    *,
    mix: Mix | None = None,
    channels: int | None = None,
) -> Tensor:
    """The guided prediction from what `both_branches` returned; a branch that ran alone is the answer.

    Args:
        cond, uncond: predictions (b, c, ...); not both None.
        guidance_scale: as for `both_branches`.
        mix: the rule, by default `classifier_free_guidance`.
        channels: mixes only the first ones. The others, a learned variance, stay those of the conditional prediction
            (GLIDE, openai/glide-text2im@69b5307).
    """
    if cond is None or uncond is None:
        only = cond if uncond is None else uncond
        assert only is not None, "at least one branch has run"
        return only
    mix = classifier_free_guidance if mix is None else mix
    if channels is None:
        return mix(cond, uncond, guidance_scale)
    return torch.cat([mix(cond[:, :channels], uncond[:, :channels], guidance_scale), cond[:, channels:]], dim=1)


def classifier_free_guidance(cond: Tensor, uncond: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Mix a conditional and an unconditional prediction: `uncond + guidance_scale * (cond - uncond)`.

    A scale of 1 gives the conditional prediction, 0 the unconditional one, more than 1 extrapolates beyond the
    conditional. This is diffusers' convention of `guidance_scale`, not the `(1 + w)` form of the paper.

    Args:
        cond: prediction under the condition; noise, logits or features, any shape.
        uncond: prediction under the null condition, same shape, dtype and device.
        guidance_scale: one number, or a tensor of one scale per sample (shape `(b,)`) or of any shape that
            broadcasts against `cond`.

    Returns:
        The mixed prediction in the dtype of `cond`.

    Raises:
        ValueError: if the shapes differ, or a vector of scales does not hold one scale per sample.
    """
    if cond.shape != uncond.shape:
        raise ValueError(
            f"`cond` and `uncond` must have the same shape, got {tuple(cond.shape)} and {tuple(uncond.shape)}: run "
            "both branches on the same sample, for instance as one doubled batch split by `chunk(2)`."
        )
    if not isinstance(guidance_scale, Tensor):
        return torch.lerp(uncond, cond, guidance_scale)
    scale = guidance_scale.to(device=cond.device, dtype=cond.dtype)
    if scale.ndim == 1 and cond.ndim > 1:
        if scale.shape[0] not in (1, cond.shape[0]):
            raise ValueError(
                f"`guidance_scale` holds {scale.shape[0]} scales for a batch of {cond.shape[0]}: pass one number, or "
                "one scale per sample."
            )
        scale = scale.reshape(-1, *[1] * (cond.ndim - 1))  # (b, 1, ..., 1)
    return torch.lerp(uncond, cond, scale)


def normalized_guidance(
    cond: Tensor,
    uncond: Tensor,
    guidance_scale: float | Tensor,
    *,
    guidance_rescale: float = 1.0,
    per_channel: bool = False,
    statistics: Literal["measured", "formula"] = "measured",
) -> Tensor:
    """Classifier-free guidance whose result has the mean and the standard deviation of the conditional prediction.

    A large scale widens the noise prediction, so that samples oversaturate. PITI (arXiv 2205.12952, section 3.3) takes
    the shift back: `std / std' * (guided - mean') + mean`. The paper's w is our `guidance_scale - 1`. The released
    code of PITI has plain guidance only. diffusers' functions of the same name, in its adaptive projected and
    tangential guidance, do something else.

    Args:
        cond, uncond: predictions of the noise (b, c, ...), without the channels of a learned variance.
        guidance_scale: as for `classifier_free_guidance`.
        guidance_rescale: from 0 (plain guidance) to 1 (normalised); in between, a blend of both.
        per_channel: takes the statistics of each channel of a sample, not of the whole sample.
        statistics: where the guided prediction's standard deviation comes from: "measured" on it, or the "formula" of
            the paper, sqrt(s^2 std_c^2 + (s - 1)^2 std_u^2), which holds for independent branches only and makes
            predictions too narrow where they agree.

    Returns:
        The mixed prediction in the dtype of `cond`.

    Raises:
        ValueError: as `classifier_free_guidance`; for a `guidance_rescale` outside of 0 to 1, or unknown `statistics`.
    """
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(
            f"`guidance_rescale` is {guidance_rescale}: it must lie between 0 (plain) and 1 (normalised)."
        )
    if statistics not in ("measured", "formula"):
        raise ValueError(f"`statistics` is {statistics!r}: it must be 'measured' or 'formula'.")
    guided = classifier_free_guidance(cond, uncond, guidance_scale)
    if guidance_rescale == 0:
        return guided
    axes = tuple(range(2 if per_channel else 1, cond.ndim))
    wide = guided.float()
    std, mean = torch.std_mean(cond.float(), dim=axes, keepdim=True)
    guided_std, guided_mean = torch.std_mean(wide, dim=axes, keepdim=True)
    if statistics == "formula":
        scale = torch.as_tensor(guidance_scale, dtype=wide.dtype, device=wide.device)
        scale = scale.reshape(-1, *[1] * (cond.ndim - 1)) if scale.ndim == 1 else scale
        uncond_std = torch.std(uncond.float(), dim=axes, keepdim=True)
        guided_std = (scale.square() * std.square() + (scale - 1).square() * uncond_std.square()).sqrt()
    # a constant prediction has nothing to rescale
    ratio = torch.where(guided_std > 0, std / guided_std.clamp_min(torch.finfo(wide.dtype).tiny), 1.0)
    normalized = (ratio * (wide - guided_mean) + mean).to(cond.dtype)
    return normalized if guidance_rescale == 1 else torch.lerp(guided, normalized, guidance_rescale)


class NormalizedClassifierFreeGuidance(ClassifierFreeGuidance):
    """`normalized_guidance` as a guider of diffusers, for every pipeline that takes guiders.

    The pipeline has to hand over the prediction without the channels of a learned variance.

    Args:
        guidance_scale: 1 is no guidance; the paper's w is `guidance_scale - 1`.
        guidance_rescale: from 0 (plain guidance) to 1 (normalised).
        use_original_formulation: reads `guidance_scale` as w, as in diffusers' own guider.
        start, stop: fractions of the steps, 0 to 1, between which guidance is on.
        enabled: False for the conditional prediction alone.
        per_channel: see `normalized_guidance`.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 1.5,
        guidance_rescale: float = 1.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        per_channel: bool = False,
    ):
        super().__init__(guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled)
        self.per_channel = per_channel

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """Mixes the two predictions; without the second one, the first is the answer."""
        pred = pred_cond
        if pred_uncond is not None and self.num_conditions == 2:
            pred = normalized_guidance(
                pred_cond,
                pred_uncond,
                self.guidance_scale + 1 if self.use_original_formulation else self.guidance_scale,
                guidance_rescale=self.guidance_rescale,
                per_channel=self.per_channel,
            )
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)
