"""PITI's checkpoints: an encoder of conditions, and GLIDE's U-Net as the decoder.

Wang et al., arXiv 2205.12952; PITI-Synthesis/PITI@d9f7481:pretrained_diffusion/text2im_model.py (MIT). Two kinds of
files exist: whole models (`encoder.*`, `decoder.*`), and encoders of the first stage alone, without a prefix.
"""

from collections.abc import Mapping
from typing import Any

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from ..models.encoder_piti import PITIEncoder
from .glide import convert_glide_unet, split_transformer, transformer_rules
from .keys import build_empty, count_heads, count_keys, load_strict, rename_keys, require, unwrap_state_dict

_NORMALISED = 5  # convolutions with a normalisation and an activation behind them; the sixth has none


def convert_piti_encoder(state_dict: Mapping[str, Any], *, num_heads: int | None = None) -> PITIEncoder:
    """Converts the encoder, from a whole model or from a file of the first stage; a decoder beside it is left out.

    Args:
        state_dict: original weights.
        num_heads: attention heads of the transformer; each is 64 wide unless given.

    Returns:
        In eval mode, in the dtype of the weights.

    Raises:
        ValueError: listing keys that are unknown, missing, misshaped or not finite; for heads that do not divide the
            width; if the position rows belong to no square.
    """
    weights = unwrap_state_dict(state_dict)
    if any(key.startswith("encoder.") for key in weights):
        weights = type(weights)(
            {key.removeprefix("encoder."): value for key, value in weights.items() if key.startswith("encoder.")}
        )
    require(weights, "a PITI encoder", "cls_token", "positional_embedding", "cnn.conv1.weight", "cnn.conv6.weight")
    _, rows, width = weights["positional_embedding"].shape
    side = round((rows - 1) ** 0.5)
    if side**2 != rows - 1:
        raise ValueError(f"`state_dict` has {rows} position rows: expected one more than a square number.")
    heads = count_heads("num_heads", width, num_heads)
    rules = [
        ("cls_token", "class_token.weight"),
        ("positional_embedding", "position_embedding.weight"),
        ("final_ln.*", "norm.*"),
        *((f"cnn.conv{number + 1}.*", f"cnn.{3 * number}.*") for number in range(_NORMALISED + 1)),
        *((f"cnn.norm{number + 1}.*", f"cnn.{3 * number + 1}.*") for number in range(_NORMALISED)),
        *transformer_rules(),
    ]
    model = build_empty(
        PITIEncoder,
        in_channels=weights["cnn.conv1.weight"].shape[1],
        sample_size=16 * side,
        hidden_size=width,
        num_layers=count_keys(weights, "transformer.resblocks.", ".ln_1.weight"),
        num_attention_heads=heads,
    )
    return load_strict(model, rename_keys(split_transformer(weights, heads), rules))


def convert_piti(
    state_dict: Mapping[str, Any],
    *,
    num_heads: int | None = None,
    num_head_channels: int = 64,
    sample_size: int | None = None,
    dropout: float = 0.1,
) -> tuple[PITIEncoder, UNet2DConditionModel]:
    """Converts a whole model: a base model, or an upsampler.

    Args:
        state_dict: original weights.
        num_heads: see `convert_piti_encoder`.
        num_head_channels, sample_size, dropout: see `convert_glide_unet`.

    Returns:
        The encoder and the decoder, in eval mode, in the dtype of the weights.

    Raises:
        ValueError: as both converters; for an encoder of the first stage, which has no decoder; for keys that belong
            to neither.
    """
    weights = unwrap_state_dict(state_dict)
    if "cls_token" in weights:
        raise ValueError(
            "`state_dict` is an encoder alone (a file of PITI's first stage): convert it with `convert_piti_encoder` "
            "and take the decoder from GLIDE's base model."
        )
    require(weights, "a PITI model", "encoder.cls_token", "decoder.input_blocks.0.0.weight")
    if strangers := [key for key in weights if not key.startswith(("encoder.", "decoder."))]:
        raise ValueError(f"`state_dict` holds keys of neither encoder nor decoder: {', '.join(strangers[:5])}.")
    decoder = {key.removeprefix("decoder."): value for key, value in weights.items() if key.startswith("decoder.")}
    return convert_piti_encoder(weights, num_heads=num_heads), convert_glide_unet(
        decoder, num_head_channels=num_head_channels, sample_size=sample_size, dropout=dropout
    )
