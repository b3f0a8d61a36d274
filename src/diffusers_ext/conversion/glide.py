"""GLIDE's checkpoints: the text tower, and the U-Net that stock diffusers has.

Nichol et al., arXiv 2112.10741; openai/glide-text2im@69b5307 (code and weights MIT). The four released files (`base`,
`upsample`, `base_inpaint`, `upsample_inpaint`) differ in sizes, which are read off the shapes. PITI's decoder is the
same U-Net (arXiv 2205.12952), so its converter shares `convert_glide_unet`.
"""

from collections.abc import Mapping
from typing import Any

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from ..models.encoder_glide_text import GlideTextEncoder
from .adm import adm_rules, adm_sizes, split_heads
from .keys import Rules, build_empty, count_heads, count_keys, load_strict, rename_keys, require, unwrap_state_dict

TEXT_KEYS = ("transformer.*", "token_embedding.*", "positional_embedding", "padding_embedding", "final_ln.*")

# Self-attention whose keys and values have the condition's in front of them (`AttnAddedKVProcessor`).
_ADDED_KV_ATTENTION: Rules = [
    ("norm.*", "group_norm.*"),
    *((name, name) for name in ("to_q.*", "to_k.*", "to_v.*", "add_k_proj.*", "add_v_proj.*")),
    ("proj_out.*", "to_out.0.*"),
]


def transformer_rules(target: str = "") -> Rules:
    """Names within `transformer`, whose `c_qkv` is split already, to those of a list of `BasicTransformerBlock`."""
    block = "transformer.resblocks.{}."
    inside = [
        ("ln_1.*", "norm1.*"),
        *((f"attn.{name}.*", f"attn1.{name}.*") for name in ("to_q", "to_k", "to_v")),
        ("attn.c_proj.*", "attn1.to_out.0.*"),
        ("ln_2.*", "norm3.*"),
        ("mlp.c_fc.*", "ff.net.0.proj.*"),
        ("mlp.c_proj.*", "ff.net.2.*"),
    ]
    return [(block + left, target + "blocks.{}." + right) for left, right in inside]


def split_transformer(weights: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """The weights with each `c_qkv` in three."""
    split: dict[str, Tensor] = {}
    for key, value in weights.items():
        stem, found, kind = key.rpartition("attn.c_qkv.")
        if found:
            parts = split_heads(value, heads)
            names = ("to_q", "to_k", "to_v")
            split |= {f"{stem}attn.{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
        else:
            split[key] = value
    return split


def convert_glide_text_encoder(state_dict: Mapping[str, Any], *, num_heads: int | None = None) -> GlideTextEncoder:
    """Converts the text tower of a GLIDE checkpoint; the U-Net beside it is left out.

    Args:
        state_dict: original weights of a whole model.
        num_heads: attention heads of the transformer; each is 64 wide unless given.

    Returns:
        In eval mode, in the dtype of the weights.

    Raises:
        ValueError: listing keys that are missing, misshaped or not finite; for heads that do not divide the width.
    """
    weights = unwrap_state_dict(state_dict)
    require(weights, "a GLIDE model", "token_embedding.weight", "padding_embedding", "final_ln.weight")
    vocab_size, width = weights["token_embedding.weight"].shape
    heads = count_heads("num_heads", width, num_heads)
    own = {
        key: value
        for key, value in weights.items()
        if key.startswith(("transformer.", "token_embedding.", "final_ln."))
        or key in ("positional_embedding", "padding_embedding")
    }
    rules = [
        ("token_embedding.*", "token_embedding.*"),
        ("positional_embedding", "position_embedding.weight"),
        ("padding_embedding", "padding_embedding.weight"),
        ("final_ln.*", "norm.*"),
        *transformer_rules(),
    ]
    model = build_empty(
        GlideTextEncoder,
        vocab_size=vocab_size,
        max_length=weights["positional_embedding"].shape[0],
        hidden_size=width,
        num_layers=count_keys(weights, "transformer.resblocks.", ".ln_1.weight"),
        num_attention_heads=heads,
    )
    return load_strict(model, rename_keys(split_transformer(own, heads), rules))


def convert_glide_unet(
    state_dict: Mapping[str, Any],
    *,
    num_head_channels: int = 64,
    sample_size: int | None = None,
    dropout: float = 0.1,
) -> UNet2DConditionModel:
    """Converts the U-Net of a GLIDE checkpoint; the text tower beside it is left out.

    Args:
        state_dict: original weights, of a whole model or of the U-Net alone.
        num_head_channels: width of each attention head.
        sample_size: side of the images. Unless given, 64 for a base model and 256 for an upsampler.
        dropout: of the residual blocks, for further training.

    Returns:
        In eval mode, in the dtype of the weights. `in_channels` is 3 (base), 6 (upsampler: noisy image, then upsampled
        low resolution), 7 or 10 (inpainting: noisy image, masked image, mask, then low resolution).

    Raises:
        ValueError: listing keys that are unknown, missing, misshaped or not finite; for heads that do not fit.
    """
    weights = unwrap_state_dict(state_dict)
    layers, widths, has_attention, scale_shift, _ = adm_sizes(weights, "a GLIDE U-Net")
    require(weights, "a GLIDE U-Net", "transformer_proj.weight", "middle_block.1.encoder_kv.weight")
    in_channels = weights["input_blocks.0.0.weight"].shape[1]
    if sample_size is None:
        sample_size = 64 if in_channels in (3, 7) else 256
    for width in (*(w for w, a in zip(widths, has_attention, strict=True) if a), widths[-1]):
        count_heads("num_head_channels", width, num_head_channels)
    model = build_empty(
        UNet2DConditionModel,
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=weights["out.2.weight"].shape[0],
        block_out_channels=tuple(widths),
        layers_per_block=layers[0],
        down_block_types=tuple(
            "SimpleCrossAttnDownBlock2D" if attends else "ResnetDownsampleBlock2D" for attends in has_attention
        ),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=tuple(
            "SimpleCrossAttnUpBlock2D" if attends else "ResnetUpsampleBlock2D" for attends in reversed(has_attention)
        ),
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
        cross_attention_dim=weights["middle_block.1.encoder_kv.weight"].shape[1],
        attention_head_dim=num_head_channels,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=weights["transformer_proj.weight"].shape[1],
        dropout=dropout,
    )
    own = {key: value for key, value in weights.items() if not key.startswith(tuple(k.rstrip("*") for k in TEXT_KEYS))}
    rules = [("transformer_proj.*", "class_embedding.*"), *adm_rules(layers, has_attention, _ADDED_KV_ATTENTION)]
    return load_strict(model, rename_keys(_split_attention(own, num_head_channels), rules))


def _split_attention(weights: Mapping[str, Tensor], head_width: int) -> dict[str, Tensor]:
    """The weights with each `qkv` in three and each `encoder_kv` in two, by heads."""
    fused = {"qkv": ("to_q", "to_k", "to_v"), "encoder_kv": ("add_k_proj", "add_v_proj")}
    split: dict[str, Tensor] = {}
    for key, value in weights.items():
        stem, _, kind = key.rpartition(".")
        stem, _, name = stem.rpartition(".")
        if names := fused.get(name):
            heads = value.shape[0] // len(names) // head_width
            parts = split_heads(value, heads, parts=len(names))
            split |= {f"{stem}.{part_name}.{kind}": part for part_name, part in zip(names, parts, strict=True)}
        else:
            split[key] = value
    return split
