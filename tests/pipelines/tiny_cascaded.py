"""Tiny real networks of Cascaded Diffusion, random weights, for the tests of what samples from them."""

from typing import Any

import torch

from diffusers_ext.models.unet_cascaded import CascadedUNet

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
    """A base stage of 8 x 8 pixels, or with `**UPSCALER` one that makes 16 x 16 of them; no weight is zero."""
    unet = CascadedUNet(**{**TINY, **changes}).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return unet
