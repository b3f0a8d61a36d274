"""Tiny real stages of a cascade, random weights from a seed: 8 x 8, then 16 x 16, then 32 x 32 pixels."""

from typing import Any

import torch
from diffusers import DDPMScheduler
from pipelines.tiny_ldm import tiny_picture
from pipelines.tiny_paella import quiet

import diffusers_ext
from diffusers_ext.models.unet_cascaded import CascadedUNet
from diffusers_ext.schedulers.scheduling_truncated_conditioning import TruncatedConditioningScheduler

CLASSES = ["circle", "square", "star"]
SIZES = (8, 16, 32)
TINY = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "attention_levels": (False, True),
    "num_heads": 2,
    "norm_num_groups": 8,
}
UPSCALER = {"sample_size": 16, "low_res_channels": 3, "aug_cond_type": "timestep"}


def tiny_cascaded_unet(**changes: Any) -> CascadedUNet:
    """A network alone: for 8 x 8 pixels, or with `**UPSCALER` to make 16 x 16 of them; no weight is zero."""
    unet = CascadedUNet(**{**TINY, **changes}).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return unet


def tiny_scheduler(**changes: Any) -> TruncatedConditioningScheduler:
    options = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "steps_offset": 1}
    return TruncatedConditioningScheduler(DDPMScheduler(**options | changes))


def tiny_unet(stage: int, *, seed: int = 0, classes: bool = True, **changes: Any) -> CascadedUNet:
    """Random in all layers, those included that begin at zero, so that every input counts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 10 * stage)
        unet = CascadedUNet(
            **TINY
            | {
                "sample_size": SIZES[stage],
                "out_channels": 6,
                "num_class_embeds": len(CLASSES) + 1 if classes else None,
                "null_class": len(CLASSES) if classes else None,
                "low_res_channels": 3 if stage else 0,
                "aug_cond_type": "timestep" if stage else None,
            }
            | changes
        )
        for name, parameter in unet.named_parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
            if name.startswith(("class_embedding", "aug_embedding")):
                torch.nn.init.normal_(parameter, std=0.5)  # else classes and levels hardly differ
    return unet.eval()


def tiny_base(*, classes: bool = True, unet: dict[str, Any] | None = None, **changes: Any) -> Any:
    components = {"unet": tiny_unet(0, classes=classes, **unet or {}), "scheduler": tiny_scheduler()}
    names = {"class_names": CLASSES} if classes else {}
    return quiet(diffusers_ext.CascadedBasePipeline(**components | names | changes))


def tiny_upscale(stage: int = 1, *, classes: bool = True, unet: dict[str, Any] | None = None, **changes: Any) -> Any:
    components = {
        "unet": tiny_unet(stage, classes=classes, **unet or {}),
        "scheduler": tiny_scheduler(),
        "conditioning_scheduler": tiny_scheduler(),
        "low_res_size": SIZES[stage - 1],
        "augmentation": "truncated",
        "default_noise_level": 201,
    }
    names = {"class_names": CLASSES} if classes else {}
    return quiet(diffusers_ext.CascadedUpscalePipeline(**components | names | changes))


def small_picture(side: int = 8, seed: int = 1) -> Any:
    return tiny_picture(seed, side, side)


def tiny_cascade(stages: int = 3, *, classes: bool = True) -> Any:
    uppers = {f"upscale_{stage}": tiny_upscale(stage, classes=classes) for stage in range(1, stages)}
    return quiet(diffusers_ext.CascadedDiffusionPipeline(base=tiny_base(classes=classes), **uppers))
