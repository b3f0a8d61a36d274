"""PITI's checkpoints: an encoder of conditions, and GLIDE's U-Net as the decoder.

Wang et al., arXiv 2205.12952; PITI-Synthesis/PITI@d9f7481:pretrained_diffusion/text2im_model.py (MIT). Two kinds of
files exist: whole models (`encoder.*`, `decoder.*`), and encoders of the first stage alone, without a prefix.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from ..models.encoder_piti import PITIEncoder
from ..pipelines.piti.pipeline_piti import CONDITION_CHANNELS, PITIPipeline
from ..schedulers.scheduling_normalized_cfg import NormalizedCFGScheduler
from .glide import (
    BASE_CHANNELS,
    UPSAMPLER_CHANNELS,
    base_scheduler,
    check_stage,
    convert_glide_unet,
    glide_kind,
    is_text_key,
    one_of_each,
    read_weights,
    split_transformer,
    transformer_rules,
    upsampler_scheduler,
)
from .keys import build_empty, count_heads, count_keys, load_strict, rename_keys, require, unwrap_state_dict

_NORMALISED = 5  # convolutions with a normalisation and an activation behind them; the sixth has none

GUIDANCES = ("normalized", "plain")
_AUTHORS_SCALE = 1.3
_STEM = "decoder.input_blocks.0.0.weight"


def convert_piti_pipeline(
    state_dict: Mapping[str, Any],
    *,
    upsampler: str | Path | Mapping[str, Any] | None = None,
    decoder: str | Path | Mapping[str, Any] | None = None,
    condition_type: Literal["label_map", "sketch", "geometry"] | None = None,
    guidance: Literal["normalized", "plain"] = "normalized",
    num_heads: Sequence[int] | None = None,
    num_head_channels: Sequence[int] | None = None,
    resolution: Sequence[int] | None = None,
) -> PITIPipeline:
    """A base model, and an upsampler if there is one, with the released samplers.

    Args:
        state_dict: original weights of a whole base model (`base_mask.pt`, `base_edge.pt`), or of an encoder of the
            first stage.
        upsampler: those of `upsample_mask.pt` or `upsample_edge.pt`, or the file.
        decoder: beside an encoder of the first stage: the weights of OpenAI's `base.pt`, or the file.
        condition_type: what the encoder was trained on; unless given, its input channels tell.
        guidance: "normalized" is the paper's, "plain" that of the released code.
        num_heads: attention heads of the encoders; each is 64 wide unless given. One number for both stages, or one
            of each; the next two likewise.
        num_head_channels: width of each head of the U-Nets, if not 64.
        resolution: side of the images, if not 64 and 256.

    Raises:
        ValueError: for a file of another kind or stage; listing keys that are unknown, missing, misshaped or not
            finite; for stages that do not belong together.
    """
    if guidance not in GUIDANCES:
        raise ValueError(f"`guidance` is {guidance!r}: it must be one of {', '.join(GUIDANCES)}.")
    weights = unwrap_state_dict(state_dict)
    kind = glide_kind(weights)
    if kind == "GLIDE":
        raise ValueError(
            "The checkpoint is GLIDE's, not PITI's: it holds token_embedding.weight. OpenAI's base.pt is not"
            " base.pt of the Hub repository tfwang/PITI, which is a whole PITI model: convert GLIDE's with"
            " `diffusers-ext convert glide`, or pass it as `decoder` beside an encoder of PITI's first stage."
        )
    heads = one_of_each("num_heads", num_heads)
    widths = one_of_each("num_head_channels", num_head_channels, 64)
    sides = one_of_each("resolution", resolution)
    if kind == "PITI encoder":
        weights = _with_decoder(weights, decoder)
    elif decoder is not None:
        raise ValueError(
            "`decoder` is given, but the checkpoint has a decoder of its own: leave it out. Only an encoder of the"
            " first stage, a file without `decoder.` keys, needs one."
        )
    encoder, unet = _convert_stage(weights, "The checkpoint", BASE_CHANNELS, heads[0], widths[0], sides[0])
    scheduler: Any = base_scheduler("250")
    if guidance == "normalized":
        scheduler = NormalizedCFGScheduler(scheduler, guidance_scale=_AUTHORS_SCALE)
    parts: dict[str, Any] = {"encoder": encoder, "unet": unet, "scheduler": scheduler}
    if upsampler is not None:
        large = unwrap_state_dict(read_weights(upsampler))
        encoder_up, unet_up = _convert_stage(large, "`upsampler`", UPSAMPLER_CHANNELS, heads[1], widths[1], sides[1])
        parts |= {
            "upscale_encoder": encoder_up,
            "upscale_unet": unet_up,
            "upscale_scheduler": upsampler_scheduler("ancestral"),
        }
    pipe = PITIPipeline(**parts, condition_type=_condition_type(encoder, condition_type))
    pipe.check_components()
    return pipe


def _convert_stage(
    weights: Mapping[str, Any],
    name: str,
    channels: Sequence[int],
    heads: int | None,
    head_width: int | None,
    side: int | None,
) -> tuple[PITIEncoder, UNet2DConditionModel]:
    require(weights, "a PITI model", "encoder.cls_token", _STEM)
    check_stage(weights, name, _STEM, channels)
    return convert_piti(weights, num_heads=heads, num_head_channels=head_width or 64, sample_size=side)


def _with_decoder(encoder: Mapping[str, Any], decoder: Any) -> dict[str, Any]:
    """A whole model of an encoder and GLIDE's U-Net, which the first stage trained against."""
    if decoder is None:
        raise ValueError(
            "The checkpoint is an encoder alone (a file of PITI's first stage): pass OpenAI's base.pt of GLIDE as"
            " `decoder`, which it was trained with."
        )
    weights = unwrap_state_dict(read_weights(decoder))
    if glide_kind(weights) != "GLIDE":
        raise ValueError(
            f"`decoder` is not GLIDE's base model: it starts with {list(weights)[:3]}. Pass OpenAI's base.pt; base.pt"
            " of the Hub repository tfwang/PITI is a whole PITI model, which needs no decoder."
        )
    unet = {f"decoder.{key}": value for key, value in weights.items() if not is_text_key(key)}
    return {**{f"encoder.{key}": value for key, value in encoder.items()}, **unet}


def _condition_type(encoder: PITIEncoder, condition_type: str | None) -> str:
    """What the encoder takes, which its channels tell."""
    channels = encoder.config["in_channels"]
    found = next((name for name, count in CONDITION_CHANNELS.items() if count == channels), None)
    if found is None or condition_type not in (None, found):
        known = ", ".join(f"{name} {count}" for name, count in CONDITION_CHANNELS.items())
        raise ValueError(
            f"`condition_type` is {condition_type!r}, and the encoder takes {channels} channels: expected {known}."
        )
    return found


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
