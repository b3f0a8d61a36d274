"""U-Nets of the ADM kind: the names of their blocks, their sizes, and their attention with one projection for all.

Dhariwal and Nichol, arXiv 2105.05233; openai/guided-diffusion@22e0df8:guided_diffusion/unet.py (code MIT). Latent
diffusion, Versatile Diffusion, GLIDE with PITI, and Cascaded Diffusion are built on this network and keep its names.
Facts: three numbered lists (`input_blocks`, `middle_block`, `output_blocks`) whose entries hold a residual block, an
attention behind it on some levels, and a resampling at the end of a level. diffusers names the same blocks by level.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from .keys import Rules, Weights, require, under

ADM_RESNET: Rules = [
    ("in_layers.0.*", "norm1.*"),
    ("in_layers.2.*", "conv1.*"),
    ("emb_layers.1.*", "time_emb_proj.*"),
    ("out_layers.0.*", "norm2.*"),
    ("out_layers.3.*", "conv2.*"),
    ("skip_connection.*", "conv_shortcut.*"),
]
ADM_TIME: Rules = [("time_embed.0.*", "time_embedding.linear_1.*"), ("time_embed.2.*", "time_embedding.linear_2.*")]


class ADMBlock(NamedTuple):
    """A block of the network: what it does, and the prefixes of its keys in ADM and in diffusers."""

    op: Literal["in", "res", "attention", "down", "up", "out"]
    adm: str
    diffusers: str


def adm_blocks(layers: Sequence[int], attention_levels: Sequence[bool]) -> Iterator[ADMBlock]:
    """All blocks in the order of running.

    Args:
        layers: residual blocks of each level on the way down, finest level first. The way up has one more.
        attention_levels: whether each level has an attention after each residual block. The middle always has one.
    """
    number, last = 0, len(layers) - 1
    yield ADMBlock("in", "input_blocks.0.0.", "conv_in.")
    for level, count in enumerate(layers):
        for layer in range(count):
            number += 1
            yield ADMBlock("res", f"input_blocks.{number}.0.", f"down_blocks.{level}.resnets.{layer}.")
            if attention_levels[level]:
                yield ADMBlock("attention", f"input_blocks.{number}.1.", f"down_blocks.{level}.attentions.{layer}.")
        if level < last:
            number += 1
            yield ADMBlock("down", f"input_blocks.{number}.0.", f"down_blocks.{level}.downsamplers.0.")
    yield ADMBlock("res", "middle_block.0.", "mid_block.resnets.0.")
    yield ADMBlock("attention", "middle_block.1.", "mid_block.attentions.0.")
    yield ADMBlock("res", "middle_block.2.", "mid_block.resnets.1.")
    number = -1
    for up, level in enumerate(range(last, -1, -1)):  # diffusers counts the way up from the deepest level, too
        for layer in range(layers[level] + 1):
            number += 1
            yield ADMBlock("res", f"output_blocks.{number}.0.", f"up_blocks.{up}.resnets.{layer}.")
            if attention_levels[level]:
                yield ADMBlock("attention", f"output_blocks.{number}.1.", f"up_blocks.{up}.attentions.{layer}.")
        if level > 0:
            place = 2 if attention_levels[level] else 1  # behind the attention, if there is one
            yield ADMBlock("up", f"output_blocks.{number}.{place}.", f"up_blocks.{up}.upsamplers.0.")
    yield ADMBlock("out", "out.", "")


def adm_level_starts(layers: Sequence[int]) -> list[int]:
    """Number of the input block with which each level starts. Number 0 is the first convolution of the network."""
    return [1 + sum(layers[:level]) + level for level in range(len(layers))]


def adm_layers(keys: Collection[str]) -> list[int]:
    """Residual blocks of each level on the way down, finest level first.

    On the way up, the last entry of each level but the finest ends with an upsampling: a convolution, a residual block
    or (for vectors) a linear layer. So the numbers of these entries tell where the levels end.
    """
    upsampling = re.compile(r"output_blocks\.(\d+)\.[12]\.(?:conv\.|in_layers\.2\.)?weight")
    last = max((int(key.split(".")[1]) for key in keys if key.startswith("output_blocks.")), default=0)
    ends = sorted({int(match[1]) for key in keys if (match := upsampling.fullmatch(key))} | {last})
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [end - start for start, end in zip(starts, ends, strict=True)][::-1]


class ADMSizes(NamedTuple):
    """What the weights tell of a network.

    Args:
        layers: residual blocks of each level on the way down, finest level first.
        widths: of each level.
        has_attention: whether each level has an attention after each residual block.
        scale_shift: whether the time scales and shifts (`use_scale_shift_norm`) or is added.
        residual_resampling: whether levels end with a residual block (`resblock_updown`) or a convolution.
    """

    layers: list[int]
    widths: list[int]
    has_attention: list[bool]
    scale_shift: bool
    residual_resampling: bool


def adm_sizes(weights: Weights, what: str) -> ADMSizes:
    """Reads the sizes of a network off its weights; `what` names it in errors, with its article.

    Raises:
        ValueError: if the weights are none of such a network, or lack one that tells a size.
    """
    require(weights, what, "input_blocks.0.0.weight", "middle_block.1.norm.weight")
    layers = adm_layers(weights)
    first = [f"input_blocks.{number}." for number in adm_level_starts(layers)]  # of each level
    widths = [weights[prefix + "0.out_layers.3.weight"].shape[0] for prefix in first]
    return ADMSizes(
        layers=layers,
        widths=widths,
        has_attention=[prefix + "1.norm.weight" in weights for prefix in first],
        scale_shift=weights[first[0] + "0.emb_layers.1.weight"].shape[0] == 2 * widths[0],
        residual_resampling=any(re.match(r"output_blocks\.\d+\.[12]\.in_layers\.", key) for key in weights),
    )


def adm_rules(layers: Sequence[int], attention_levels: Sequence[bool], attention: Rules) -> Rules:
    """The names of a whole network in diffusers.

    Args:
        layers, attention_levels: see `adm_blocks`.
        attention: the rules within an attention, which differ from family to family.
    """
    inside = {
        "in": [("*", "*")],
        "res": ADM_RESNET,
        "attention": attention,
        "down": [("op.*", "conv.*"), *ADM_RESNET],  # a strided convolution, or a residual block (`resblock_updown`)
        "up": [("conv.*", "conv.*"), *ADM_RESNET],
        "out": [("0.*", "conv_norm_out.*"), ("2.*", "conv_out.*")],
    }
    rules = [*ADM_TIME, ("label_emb.*", "class_embedding.*")]
    for block in adm_blocks(layers, attention_levels):
        rules += under(block.adm, block.diffusers, inside[block.op])
    return rules


def split_heads(
    fused: Tensor, heads: int, parts: int = 3, order: Literal["interleaved", "blocked"] = "interleaved"
) -> list[Tensor]:
    """Takes one projection apart into those of queries, keys and values.

    Args:
        fused: weight or bias of the projection, (parts * width, ...).
        heads: number of attention heads.
        parts: 3 for ADM's `qkv`, 2 for GLIDE's `encoder_kv`.
        order: of the rows. "interleaved" has all parts of the first head, then of the second (ADM's
            `QKVAttentionLegacy`, latent diffusion, GLIDE); "blocked" has all heads of the first part, then of the
            second (ADM's `QKVAttention`, that is `use_new_attention_order`).

    Returns:
        One tensor of shape (width, ...) for each part, whose rows are ordered by heads.

    Raises:
        ValueError: if heads and parts do not divide the rows.
    """
    rows = fused.shape[0]
    if rows % (heads * parts):
        raise ValueError(f"A projection of {rows} rows does not hold {parts} parts of {heads} heads each.")
    if order == "blocked":
        return list(fused.chunk(parts))
    by_head = fused.unflatten(0, (heads, parts, -1))  # (heads, parts, head width, ...)
    return [part.flatten(0, 1) for part in by_head.unbind(1)]


def split_qkv(
    weights: Mapping[str, Tensor],
    heads: Mapping[int, int],
    order: Literal["interleaved", "blocked"] = "interleaved",
) -> dict[str, Tensor]:
    """The weights with each `qkv` in three: `q`, `k` and `v`.

    Args:
        heads: number of heads of an attention by its width.
        order: see `split_heads`.
    """
    split: dict[str, Tensor] = {}
    for key, value in weights.items():
        stem, found, kind = key.rpartition("qkv.")
        if found:
            parts = split_heads(value, heads.get(value.shape[0] // 3, 1), order=order)
            split |= {f"{stem}{name}.{kind}": part for name, part in zip("qkv", parts, strict=True)}
        else:
            split[key] = value
    return split
