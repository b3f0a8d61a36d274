"""GLIDE's checkpoints: the text tower, and the U-Net that stock diffusers has.

Nichol et al., arXiv 2112.10741; openai/glide-text2im@69b5307 (code and weights MIT). The four released files (`base`,
`upsample`, `base_inpaint`, `upsample_inpaint`) differ in sizes, which are read off the shapes. PITI's decoder is the
same U-Net (arXiv 2205.12952), so its converter shares `convert_glide_unet`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..models.encoder_glide_text import GlideTextEncoder
from ..pipelines.glide.pipeline_glide import GlidePipeline
from ..schedulers.scheduling_respaced import RespacedScheduler, adm_scheduler
from .adm import adm_rules, adm_sizes, split_heads
from .keys import (
    Rules,
    build_empty,
    count_heads,
    count_keys,
    load_original,
    load_strict,
    rename_keys,
    require,
    unwrap_state_dict,
)

GPT2_TOKENIZER = "gpt2"  # of all released models
BASE_CHANNELS, UPSAMPLER_CHANNELS = (3, 7), (6, 10)  # into the first convolution; the second for inpainting

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


def is_text_key(key: str) -> bool:
    """Whether a weight belongs to the text tower."""
    return key.startswith(tuple(name.rstrip("*") for name in TEXT_KEYS))


def glide_kind(weights: Mapping[str, Any]) -> Literal["GLIDE", "PITI", "PITI encoder"] | None:
    """Whose file it is by its names: GLIDE's, a whole PITI model's, or that of an encoder of PITI's first stage."""
    if "encoder.cls_token" in weights:
        return "PITI"
    if "cls_token" in weights:
        return "PITI encoder"
    return "GLIDE" if "token_embedding.weight" in weights else None


def convert_glide_pipeline(
    state_dict: Mapping[str, Any],
    *,
    upsampler: str | Path | Mapping[str, Any] | None = None,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    num_heads: Sequence[int] | None = None,
    num_head_channels: Sequence[int] | None = None,
    resolution: Sequence[int] | None = None,
) -> GlidePipeline:
    """A base model, and an upsampler if there is one, with the released samplers and the tokenizer of GPT-2.

    Args:
        state_dict: original weights of `base.pt` or `base_inpaint.pt`.
        upsampler: those of `upsample.pt`, or `upsample_inpaint.pt` beside an inpainting base, or the file.
        tokenizer: GPT-2's, or its folder or name on the Hub.
        num_heads: attention heads of the text tower; each is 64 wide unless given. One number for both stages, or one
            of each; the next two likewise.
        num_head_channels: width of each head of the U-Nets, if not 64.
        resolution: side of the images, if not 64 and 256.

    Raises:
        ValueError: for a file of another kind or stage; listing keys that are unknown, missing, misshaped or not
            finite; for stages that do not belong together.
    """
    base = unwrap_state_dict(state_dict)
    _check_glide(base, "The checkpoint", BASE_CHANNELS)
    large = None if upsampler is None else unwrap_state_dict(read_weights(upsampler))
    if large is not None:
        _check_glide(large, "`upsampler`", UPSAMPLER_CHANNELS)
    heads = one_of_each("num_heads", num_heads)
    widths = [width or 64 for width in one_of_each("num_head_channels", num_head_channels, 64)]
    sides = one_of_each("resolution", resolution)
    parts: dict[str, Any] = {
        "text_encoder": convert_glide_text_encoder(base, num_heads=heads[0]),
        "unet": convert_glide_unet(base, num_head_channels=widths[0], sample_size=sides[0]),
        "scheduler": base_scheduler("100"),
        "tokenizer": load_gpt2_tokenizer(tokenizer),
    }
    if large is not None:
        parts |= {
            "upscale_text_encoder": convert_glide_text_encoder(large, num_heads=heads[1]),
            "upscale_unet": convert_glide_unet(large, num_head_channels=widths[1], sample_size=sides[1]),
            "upscale_scheduler": upsampler_scheduler("ddim"),
        }
    pipe = GlidePipeline(**parts)
    pipe.check_components()
    return pipe


def base_scheduler(steps: str) -> RespacedScheduler:
    """The sampler of a base model of GLIDE or PITI: cosine, learned variance, ancestral."""
    return adm_scheduler("cosine", timestep_respacing=steps, variance_type="learned_range")


def upsampler_scheduler(sampler: Literal["ancestral", "ddim"]) -> RespacedScheduler:
    """The sampler of an upsampler of GLIDE ("ddim") or PITI ("ancestral"): linear, 27 steps."""
    return adm_scheduler("linear", timestep_respacing="fast27", variance_type="learned_range", sampler=sampler)


def read_weights(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """Weights as they are, or out of a file."""
    return source if isinstance(source, Mapping) else load_original(source)


def one_of_each(name: str, values: Sequence[int] | None, default: int | None = None) -> list[int | None]:
    """What the base and the upsampler take: one number for both, one of each, or the default.

    Raises:
        ValueError: for more numbers.
    """
    given = [default] if values is None else list(values)
    if len(given) not in (1, 2):
        raise ValueError(f"`{name}` is {given}: pass one number for both stages, or one of each, the base's first.")
    return [given[0], given[-1]]


def check_stage(weights: Mapping[str, Tensor], name: str, stem: str, channels: Sequence[int]) -> None:
    """Refuses an upsampler in place of a base model, and the reverse.

    Args:
        name: what the user passed.
        stem: key of the first convolution.
        channels: those that it may take.
    """
    given = weights[stem].shape[1]
    if given not in channels:
        wanted = "a base model" if channels == BASE_CHANNELS else "an upsampler"
        raise ValueError(
            f"{name} takes {given} channels, but {wanted} takes {' or '.join(map(str, channels))}: pass the base model"
            " as the checkpoint and the upsampler as `upsampler`."
        )


def _check_glide(weights: Mapping[str, Tensor], name: str, channels: Sequence[int]) -> None:
    stage = glide_kind(weights)
    if stage in ("PITI", "PITI encoder"):
        raise ValueError(
            f"{name} is PITI's, not GLIDE's: it holds {'encoder.' if stage == 'PITI' else ''}cls_token. base.pt of the"
            " Hub repository tfwang/PITI is a whole PITI model, not OpenAI's base.pt: convert it with"
            " `diffusers-ext convert piti`, or download OpenAI's."
        )
    require(weights, "a GLIDE model", "token_embedding.weight", "input_blocks.0.0.weight")
    check_stage(weights, name, "input_blocks.0.0.weight", channels)


def load_gpt2_tokenizer(tokenizer: str | PreTrainedTokenizerBase | None = None) -> PreTrainedTokenizerBase:
    """GPT-2's tokenizer, padding with its end token as GLIDE does unless it has a padding token.

    Args:
        tokenizer: the tokenizer itself, or a folder or a name on the Hub.

    Raises:
        ValueError: if it is not there.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    place = tokenizer or GPT2_TOKENIZER
    try:
        found = AutoTokenizer.from_pretrained(place)
    except OSError as error:
        raise ValueError(
            f"`tokenizer` is {place!r}: there is no such folder, and the Hub has it not or is out of reach. Pass a "
            f"folder with the files of {GPT2_TOKENIZER}."
        ) from error
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


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
    own = {key: value for key, value in weights.items() if is_text_key(key)}
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
    own = {key: value for key, value in weights.items() if not is_text_key(key)}
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
