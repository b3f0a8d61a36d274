"""Original autoencoders of latent diffusion, KL-regularised and vector-quantised, to the stock classes of diffusers.

Rombach et al., arXiv 2112.10752, appendix G; CompVis/latent-diffusion@a506df5:ldm/models/autoencoder.py and
CompVis/taming-transformers@3ba01b2 (code and weights MIT). diffusers' own converter drops the attention inside the
levels, which kl-f16, kl-f32, vq-f8 and vq-f16 have, and knows no codebook.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor

from .keys import Rules, build_empty, load_strict, rename_keys, under, unwrap_state_dict

_TAMING_ATTENTION: Rules = [
    ("norm.*", "group_norm.*"),
    ("q.*", "to_q.*"),
    ("k.*", "to_k.*"),
    ("v.*", "to_v.*"),
    ("proj_out.*", "to_out.0.*"),
]
_TAMING_RESNET: Rules = [
    ("norm1.*", "norm1.*"),
    ("conv1.*", "conv1.*"),
    ("norm2.*", "norm2.*"),
    ("conv2.*", "conv2.*"),
    ("nin_shortcut.*", "conv_shortcut.*"),
]
_TAMING_ENDS: Rules = [
    *under("mid.block_1.", "mid_block.resnets.0.", _TAMING_RESNET),
    *under("mid.attn_1.", "mid_block.attentions.0.", _TAMING_ATTENTION),
    *under("mid.block_2.", "mid_block.resnets.1.", _TAMING_RESNET),
    ("conv_in.*", "conv_in.*"),
    ("norm_out.*", "conv_norm_out.*"),
    ("conv_out.*", "conv_out.*"),
]


def convert_ldm_autoencoder_kl(
    state_dict: Mapping[str, Any],
    *,
    scale_factor: float = 1.0,
    sample_size: int = 256,
    ignore: Iterable[str] = ("loss.*",),
) -> AutoencoderKL:
    """Converts the weights of the original's `AutoencoderKL`; every size is read off the shapes.

    Args:
        state_dict: original weights, of a first-stage file or as `split_ldm_checkpoint` gives them.
        scale_factor: by which latents are multiplied before diffusion: the checkpoint's own if it has one, 0.18215
            for the text model, 1 otherwise.
        sample_size: side of the pictures it was trained on, a note in the config.
        ignore: patterns of keys to leave out; `loss.*` are perceptual network and discriminator, saved along.

    Returns:
        In eval mode, in the dtype of the weights.

    Raises:
        ValueError: listing keys that are unknown, missing, misshaped or not finite; or for sizes that `AutoencoderKL`
            cannot express: `embed_dim` unlike `z_channels`, or `ch_mult` that does not start with 1.
    """
    weights = _weights(state_dict)
    _require(weights, "a KL autoencoder", "encoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight")
    embed_dim, latent_channels = weights["post_quant_conv.weight"].shape[1::-1]
    if embed_dim != latent_channels or weights["quant_conv.weight"].shape[0] != 2 * embed_dim:
        raise ValueError(
            f"The autoencoder has `embed_dim` {embed_dim} and `z_channels` {latent_channels}: AutoencoderKL needs the "
            "same, as in all released models."
        )
    config, rules = _autoencoder_config(weights)
    model = build_empty(
        AutoencoderKL,
        **config,
        latent_channels=latent_channels,
        sample_size=sample_size,
        scaling_factor=scale_factor,
    )
    return load_strict(model, rename_keys(weights, rules, ignore=ignore))


def convert_ldm_vq(
    state_dict: Mapping[str, Any],
    *,
    scale_factor: float = 1.0,
    sample_size: int = 256,
    ignore: Iterable[str] = ("loss.*",),
) -> VQModel:
    """Converts the weights of the original's `VQModel` or `VQModelInterface`; every size is read off the shapes.

    Args, errors: as `convert_ldm_autoencoder_kl`, but `embed_dim` is free. Released VQ latents are not scaled.

    Returns:
        In eval mode, in the dtype of the weights. `encode` gives the latents before quantisation, which diffusion
        works on; `decode` quantises first.
    """
    weights = _weights(state_dict)
    _require(weights, "a VQ autoencoder", "encoder.conv_in.weight", "quantize.embedding.weight")
    config, rules = _autoencoder_config(weights)
    model = build_empty(
        VQModel,
        **config,
        latent_channels=weights["encoder.conv_out.weight"].shape[0],
        num_vq_embeddings=weights["quantize.embedding.weight"].shape[0],
        vq_embed_dim=weights["quantize.embedding.weight"].shape[1],
        sample_size=sample_size,
        scaling_factor=scale_factor,
    )
    rules = [*rules, ("quantize.embedding.weight", "quantize.embedding.weight")]
    return load_strict(model, rename_keys(weights, rules, ignore=ignore))


def _weights(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    weights = unwrap_state_dict(state_dict)
    if any(key.startswith("model_ema.") for key in weights):
        raise ValueError(
            "The file holds every weight twice, also averaged ('model_ema.'): choose with `split_ldm_checkpoint(..., "
            "use_ema=...).first_stage`."
        )
    return weights


def _autoencoder_config(weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], Rules]:
    """What both kinds of autoencoder share: the sizes of encoder and decoder, and the renaming of their keys."""
    num_levels = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.down."))
    widths = [weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(num_levels)]
    if weights["encoder.conv_in.weight"].shape[0] != widths[0]:
        raise ValueError(
            f"The encoder starts with {weights['encoder.conv_in.weight'].shape[0]} channels and its first level has "
            f"{widths[0]}: diffusers needs the same, that is a `ch_mult` that starts with 1."
        )
    has_attention = [f"encoder.down.{level}.attn.0.q.weight" in weights for level in range(num_levels)]
    layer = re.compile(r"encoder\.down\.0\.block\.\d+\.conv1\.weight")
    config = {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "down_block_types": tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in has_attention),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(has_attention)),
        "block_out_channels": tuple(widths),
        "layers_per_block": sum(layer.fullmatch(key) is not None for key in weights),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
    }
    rules: list[tuple[str, str]] = [
        ("quant_conv.*", "quant_conv.*"),
        ("post_quant_conv.*", "post_quant_conv.*"),
        *under("encoder.", "encoder.", _TAMING_ENDS),
        *under("decoder.", "decoder.", _TAMING_ENDS),
        *_taming_levels("encoder.down.{}.", "encoder.down_blocks.{}.", "downsample"),
    ]
    for level in range(num_levels):  # the original counts upward levels from the finest, diffusers from the deepest
        source, target = f"decoder.up.{level}.", f"decoder.up_blocks.{num_levels - 1 - level}."
        rules += _taming_levels(source, target, "upsample")
    return config, rules


def _taming_levels(source: str, target: str, resample: str) -> Rules:
    return [
        *under(source + "block.{}.", target + "resnets.{}.", _TAMING_RESNET),
        *under(source + "attn.{}.", target + "attentions.{}.", _TAMING_ATTENTION),
        (source + f"{resample}.conv.*", target + f"{resample}rs.0.conv.*"),
    ]


def _require(weights: Mapping[str, Tensor], what: str, *keys: str) -> None:
    missing = [key for key in keys if key not in weights]
    if missing:
        raise ValueError(
            f"`state_dict` is not {what}: it lacks {', '.join(missing)}. It starts with {list(weights)[:3]}."
        )
