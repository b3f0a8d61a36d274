"""The original's U-Nets to diffusers' classes, and to `LDMUNet` where these are not enough.

Rombach et al., arXiv 2112.10752, table 15; CompVis/latent-diffusion@a506df5
:ldm/modules/diffusionmodules/openaimodel.py and ldm/modules/attention.py (code and weights MIT).
"""

from collections.abc import Mapping
from typing import Any

from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from ..models.unet_ldm import LDMUNet
from .adm import adm_rules, adm_sizes, split_qkv
from .keys import ATTENTION, Rules, build_empty, count_heads, load_strict, rename_keys, unwrap_state_dict

_SPATIAL_TRANSFORMER: Rules = [
    (name, name) for name in ("norm.*", "proj_in.*", "transformer_blocks.{}.*", "proj_out.*")
]


def convert_ldm_unet(
    state_dict: Mapping[str, Any],
    *,
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    sample_size: int | None = None,
    dropout: float = 0.0,
) -> UNet2DModel | UNet2DConditionModel:
    """Converts the weights of the original's `UNetModel`; every size is read off the shapes, except for the heads.

    Args:
        state_dict: original weights, as `split_ldm_checkpoint` gives them.
        num_heads, num_head_channels: exactly one of the two, from the original's config: a constant number of heads,
            or a constant width of each.
        sample_size: side of the latents (the original's `image_size`), a note in the config.
        dropout: of the residual blocks, for further training.

    Returns:
        In eval mode, in the dtype of the weights: a `UNet2DConditionModel` if there is cross-attention (class, text,
        layout), else a `UNet2DModel` (unconditional, concatenated conditions), or a `LDMUNet` where self-attention
        has a constant number of heads on levels of several widths.

    Raises:
        ValueError: listing keys that are unknown, missing, misshaped or not finite; for heads that do not fit; for
            residual resampling together with cross-attention, which diffusers cannot express.
    """
    weights = unwrap_state_dict(state_dict)
    sizes = adm_sizes(weights, "a latent-diffusion U-Net")
    if (num_heads is None) == (num_head_channels is None):
        raise ValueError(
            f"`num_heads` is {num_heads} and `num_head_channels` {num_head_channels}: pass the one that the "
            "original's config sets; the shapes do not tell."
        )
    layers, widths, has_attention = sizes.layers, sizes.widths, sizes.has_attention
    is_transformer = "middle_block.1.proj_in.weight" in weights
    if widths[0] != weights["input_blocks.0.0.weight"].shape[0]:
        raise ValueError(
            f"The U-Net starts with {weights['input_blocks.0.0.weight'].shape[0]} channels and its first level has "
            f"{widths[0]}: diffusers needs the same, that is a `channel_mult` that starts with 1."
        )
    if is_transformer and sizes.residual_resampling:
        raise ValueError(
            "The U-Net has both cross-attention and residual resampling (`resblock_updown`): no class of diffusers "
            "has both, and no released model."
        )
    if num_heads is None:
        heads = {width: width // count_heads("num_head_channels", width, num_head_channels) for width in widths}
    else:
        heads = {width: count_heads("num_heads", width, num_heads) for width in widths}
    config: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": weights["input_blocks.0.0.weight"].shape[1],
        "out_channels": weights["out.2.weight"].shape[0],
        "block_out_channels": tuple(widths),
        "layers_per_block": layers[0],
        "dropout": dropout,
        "resnet_time_scale_shift": "scale_shift" if sizes.scale_shift else "default",
        "num_class_embeds": weights["label_emb.weight"].shape[0] if "label_emb.weight" in weights else None,
    }

    if is_transformer:
        depth = 1 + max(
            int(key.split(".")[3]) for key in weights if key.startswith("middle_block.1.transformer_blocks.")
        )
        context = weights["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
        config |= {
            "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in has_attention),
            "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(has_attention)),
            "attention_head_dim": tuple(heads[width] for width in widths),  # a misnomer: it is the number of heads
            "cross_attention_dim": context,
            "transformer_layers_per_block": depth,
        }
        model = build_empty(UNet2DConditionModel, **config)
    else:
        resampling = "Resnet{}sampleBlock2D" if sizes.residual_resampling else "{}Block2D"
        down, up = ((f"Attn{side}Block2D", resampling.format(side)) for side in ("Down", "Up"))
        config |= {
            "down_block_types": tuple(down[0] if a else down[1] for a in has_attention),
            "up_block_types": tuple(up[0] if a else up[1] for a in reversed(has_attention)),
            "downsample_type": "resnet" if sizes.residual_resampling else "conv",
            "upsample_type": "resnet" if sizes.residual_resampling else "conv",
            "attn_norm_num_groups": 32,  # else diffusers leaves out the mid block's normalisation with scale_shift
        }
        attended = [width for width, a in zip(widths, has_attention, strict=True) if a] + widths[-1:]
        head_dims = {width // heads[width] for width in attended}
        if len(head_dims) == 1:
            model = build_empty(UNet2DModel, attention_head_dim=head_dims.pop(), **config)
        else:
            model = build_empty(LDMUNet, num_attention_heads=num_heads, **config)
        weights = split_qkv(weights, heads)
    rules = adm_rules(layers, has_attention, _SPATIAL_TRANSFORMER if is_transformer else ATTENTION)
    return load_strict(model, rename_keys(weights, rules))
