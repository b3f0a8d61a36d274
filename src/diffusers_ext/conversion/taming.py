"""Encoder and decoder of taming-transformers, on which the tokenizers and autoencoders of several families build.

CompVis/taming-transformers@3ba01b2:taming/modules/diffusionmodules/model.py (MIT).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .keys import ATTENTION, Rules, count_keys, under

_RESNET: Rules = [
    ("norm1.*", "norm1.*"),
    ("conv1.*", "conv1.*"),
    ("norm2.*", "norm2.*"),
    ("conv2.*", "conv2.*"),
    ("nin_shortcut.*", "conv_shortcut.*"),
]


def taming_autoencoder(weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Sizes and key names of a taming-transformers encoder and decoder, as diffusers' `VQModel` has them.

    Args:
        weights: original ones, flat; all sizes are read off their shapes.

    Returns:
        What the config of a `VQModel` or `AutoencoderKL` says about both, and the rules for their keys; those of the
        bottleneck between the two 1x1 convolutions are the caller's.

    Raises:
        ValueError: for a first level that is wider than the first convolution, which diffusers cannot express.
    """
    num_levels = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.down."))
    widths = [weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(num_levels)]
    if weights["encoder.conv_in.weight"].shape[0] != widths[0]:
        raise ValueError(
            f"The encoder starts with {weights['encoder.conv_in.weight'].shape[0]} channels and its first level has "
            f"{widths[0]}: diffusers needs the same, that is a `ch_mult` that starts with 1."
        )
    has_attention = [f"encoder.down.{level}.attn.0.q.weight" in weights for level in range(num_levels)]
    config = {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "down_block_types": tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in has_attention),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(has_attention)),
        "block_out_channels": tuple(widths),
        "layers_per_block": count_keys(weights, "encoder.down.0.block.", ".conv1.weight"),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
    }
    rules = [("quant_conv.*", "quant_conv.*"), ("post_quant_conv.*", "post_quant_conv.*")]
    for half in ("encoder.", "decoder."):
        rules += [(half + f"{name}.*", half + f"{name}.*") for name in ("conv_in", "conv_out")]
        rules += [(half + "norm_out.*", half + "conv_norm_out.*")]
        rules += under(half + "mid.block_1.", half + "mid_block.resnets.0.", _RESNET)
        rules += under(half + "mid.attn_1.", half + "mid_block.attentions.0.", ATTENTION)
        rules += under(half + "mid.block_2.", half + "mid_block.resnets.1.", _RESNET)
    rules += _level_rules("encoder.down.{}.", "encoder.down_blocks.{}.", "downsample")
    for level in range(num_levels):  # the original counts upward levels from the finest, diffusers from the deepest
        source, target = f"decoder.up.{level}.", f"decoder.up_blocks.{num_levels - 1 - level}."
        rules += _level_rules(source, target, "upsample")
    return config, rules


def _level_rules(source: str, target: str, resample: str) -> Rules:
    """One level (or all, with an index in both prefixes): residual blocks, attention and resampling."""
    return [
        *under(source + "block.{}.", target + "resnets.{}.", _RESNET),
        *under(source + "attn.{}.", target + "attentions.{}.", ATTENTION),
        (source + f"{resample}.conv.*", target + f"{resample}rs.0.conv.*"),
    ]
