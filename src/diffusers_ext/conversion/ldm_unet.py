"""The original's U-Nets to diffusers' classes, and to `LDMUNet` where these are not enough.

Rombach et al., arXiv 2112.10752, table 15; CompVis/latent-diffusion@a506df5
:ldm/modules/diffusionmodules/openaimodel.py and ldm/modules/attention.py (code and weights MIT).
"""

import re
from collections.abc import Mapping
from typing import Any

from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from ..models.unet_ldm import LDMUNet
from .keys import Rules, build_empty, load_strict, rename_keys, require, under, unwrap_state_dict

_ADM_RESNET: Rules = [
    ("in_layers.0.*", "norm1.*"),
    ("in_layers.2.*", "conv1.*"),
    ("emb_layers.1.*", "time_emb_proj.*"),
    ("out_layers.0.*", "norm2.*"),
    ("out_layers.3.*", "conv2.*"),
    ("skip_connection.*", "conv_shortcut.*"),
]
_QKV_ATTENTION: Rules = [
    ("norm.*", "group_norm.*"),
    ("q.*", "to_q.*"),
    ("k.*", "to_k.*"),
    ("v.*", "to_v.*"),
    ("proj_out.*", "to_out.0.*"),
]
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
    require(weights, "a latent-diffusion U-Net", "input_blocks.0.0.weight", "middle_block.1.norm.weight")
    if (num_heads is None) == (num_head_channels is None):
        raise ValueError(
            f"`num_heads` is {num_heads} and `num_head_channels` {num_head_channels}: pass the one that the "
            "original's config sets; the shapes do not tell."
        )
    layers, num_levels = _unet_depth(weights)
    first = [f"input_blocks.{1 + level * (layers + 1)}." for level in range(num_levels)]  # first layer of each level
    widths = [weights[prefix + "0.out_layers.3.weight"].shape[0] for prefix in first]
    has_attention = [prefix + "1.norm.weight" in weights for prefix in first]
    is_transformer = "middle_block.1.proj_in.weight" in weights
    residual_resampling = any(".in_layers." in key for key in weights if re.match(r"output_blocks\.\d+\.[12]\.", key))
    if widths[0] != weights["input_blocks.0.0.weight"].shape[0]:
        raise ValueError(
            f"The U-Net starts with {weights['input_blocks.0.0.weight'].shape[0]} channels and its first level has "
            f"{widths[0]}: diffusers needs the same, that is a `channel_mult` that starts with 1."
        )
    if is_transformer and residual_resampling:
        raise ValueError(
            "The U-Net has both cross-attention and residual resampling (`resblock_updown`): no class of diffusers "
            "has both, and no released model."
        )
    heads = {width: _heads(width, num_heads, num_head_channels) for width in widths}
    film = weights[first[0] + "0.emb_layers.1.weight"].shape[0] == 2 * widths[0]
    config: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": weights["input_blocks.0.0.weight"].shape[1],
        "out_channels": weights["out.2.weight"].shape[0],
        "block_out_channels": tuple(widths),
        "layers_per_block": layers,
        "dropout": dropout,
        "resnet_time_scale_shift": "scale_shift" if film else "default",
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
        resampling = "Resnet{}sampleBlock2D" if residual_resampling else "{}Block2D"
        down, up = ((f"Attn{side}Block2D", resampling.format(side)) for side in ("Down", "Up"))
        config |= {
            "down_block_types": tuple(down[0] if a else down[1] for a in has_attention),
            "up_block_types": tuple(up[0] if a else up[1] for a in reversed(has_attention)),
            "downsample_type": "resnet" if residual_resampling else "conv",
            "upsample_type": "resnet" if residual_resampling else "conv",
            "attn_norm_num_groups": 32,  # else diffusers leaves out the mid block's normalisation with scale_shift
        }
        attended = [width for width, a in zip(widths, has_attention, strict=True) if a] + widths[-1:]
        head_dims = {width // heads[width] for width in attended}
        if len(head_dims) == 1:
            model = build_empty(UNet2DModel, attention_head_dim=head_dims.pop(), **config)
        else:
            model = build_empty(LDMUNet, num_attention_heads=num_heads, **config)
        weights = _split_qkv(weights, heads)
    rules = _unet_rules(weights, layers, num_levels, _SPATIAL_TRANSFORMER if is_transformer else _QKV_ATTENTION)
    return load_strict(model, rename_keys(weights, rules))


def _unet_depth(weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """(layers per level, levels), told by where upsampling ends the first level on the way up."""
    total = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("output_blocks."))
    resampling = re.compile(r"output_blocks\.(\d+)\.[12]\.(?:conv\.weight|in_layers\.2\.weight)")
    ends = [int(match[1]) for key in weights if (match := resampling.fullmatch(key))]
    per_level = 1 + min(ends) if ends else total
    return per_level - 1, total // per_level


def _unet_rules(weights: Mapping[str, Tensor], layers: int, num_levels: int, attention: Rules) -> Rules:
    rules: list[tuple[str, str]] = [
        ("time_embed.0.*", "time_embedding.linear_1.*"),
        ("time_embed.2.*", "time_embedding.linear_2.*"),
        ("label_emb.*", "class_embedding.*"),
        ("input_blocks.0.0.*", "conv_in.*"),
        *under("middle_block.0.", "mid_block.resnets.0.", _ADM_RESNET),
        *under("middle_block.1.", "mid_block.attentions.0.", attention),
        *under("middle_block.2.", "mid_block.resnets.1.", _ADM_RESNET),
        ("out.0.*", "conv_norm_out.*"),
        ("out.2.*", "conv_out.*"),
    ]
    for level in range(num_levels):
        target = f"down_blocks.{level}."
        for layer in range(layers):
            source = f"input_blocks.{1 + level * (layers + 1) + layer}."
            rules += under(source + "0.", f"{target}resnets.{layer}.", _ADM_RESNET)
            rules += under(source + "1.", f"{target}attentions.{layer}.", attention)
        source = f"input_blocks.{(level + 1) * (layers + 1)}.0."
        rules += [(source + "op.*", target + "downsamplers.0.conv.*")]
        rules += under(source, target + "downsamplers.0.", _ADM_RESNET)

        target = f"up_blocks.{level}."
        for layer in range(layers + 1):
            source = f"output_blocks.{level * (layers + 1) + layer}."
            rules += under(source + "0.", f"{target}resnets.{layer}.", _ADM_RESNET)
            upsampling = 1  # the element after the attention, if there is one
            if source + "1.norm.weight" in weights:
                rules += under(source + "1.", f"{target}attentions.{layer}.", attention)
                upsampling = 2
            if layer == layers:
                rules += [(f"{source}{upsampling}.conv.*", target + "upsamplers.0.conv.*")]
                rules += under(f"{source}{upsampling}.", target + "upsamplers.0.", _ADM_RESNET)
    return rules


def _split_qkv(weights: Mapping[str, Tensor], heads: Mapping[int, int]) -> dict[str, Tensor]:
    """One convolution to queries, keys and values, interleaved head by head, as three."""
    split: dict[str, Tensor] = {}
    for key, value in weights.items():
        stem, found, kind = key.rpartition("qkv.")
        if not found:
            split[key] = value
            continue
        width = value.shape[0] // 3
        grouped = value.reshape(heads.get(width, 1), 3, -1, *value.shape[1:])  # (heads, 3, d, ...)
        for index, name in enumerate("qkv"):
            split[f"{stem}{name}.{kind}"] = grouped[:, index].reshape(width, *value.shape[1:])
    return split


def _heads(width: int, num_heads: int | None, num_head_channels: int | None) -> int:
    divisor = num_heads or num_head_channels or 0
    if divisor < 1 or width % divisor:
        name = "num_heads" if num_heads is not None else "num_head_channels"
        raise ValueError(f"`{name}` is {divisor}, but a level has {width} channels, which it does not divide.")
    return num_heads if num_heads is not None else width // divisor
