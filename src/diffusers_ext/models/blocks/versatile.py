"""The layers of Versatile Diffusion's U-Net and the walk that orders them, for the network and for its converter.

Paper: arXiv 2211.08332; original: SHI-Labs/Versatile-Diffusion@cf0f4a2:lib/model_zoo/openaimodel.py (MIT). Residual
blocks and transformers of maps are diffusers' own; what is here is the walk and the layers without space.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn


class WalkStep(NamedTuple):
    """One step of the walk: "in", "res", "down", "up", "out" (data layers), "context", "save" or "load"."""

    op: str
    in_channels: int = 0
    out_channels: int = 0


def versatile_walk(
    block_out_channels: Sequence[int], layers_per_block: Sequence[int], attention_levels: Sequence[bool]
) -> list[WalkStep]:
    """The order in which data and context layers follow each other, the same for all types.

    Args:
        block_out_channels: width of each level, finest first.
        layers_per_block: residual blocks of each level on the way down; the way up has one more.
        attention_levels: which levels have a context layer after each residual block; the middle has one.
    """
    width = block_out_channels[0]
    steps, skips = [WalkStep("in", 0, width), WalkStep("save")], [width]
    for level, out in enumerate(block_out_channels):
        for _ in range(layers_per_block[level]):
            steps.append(WalkStep("res", width, out))
            steps += [WalkStep("context", out, out)] if attention_levels[level] else []
            steps.append(WalkStep("save"))
            skips.append(width := out)
        if level < len(block_out_channels) - 1:
            steps += [WalkStep("down", width, width), WalkStep("save")]
            skips.append(width)
    steps += [WalkStep("res", width, width), WalkStep("context", width, width), WalkStep("res", width, width)]
    for level in reversed(range(len(block_out_channels))):
        out = block_out_channels[level]
        for _ in range(layers_per_block[level] + 1):
            steps += [WalkStep("load"), WalkStep("res", width + skips.pop(), out)]
            steps += [WalkStep("context", out, out)] if attention_levels[level] else []
            width = out
        if level > 0:
            steps.append(WalkStep("up", width, width))
    return [*steps, WalkStep("out", width, 0)]


class FCLinear(nn.Module):
    """A linear layer over all axes but the first: (b, ...) -> (b, *out_shape)."""

    def __init__(self, in_features: int, out_shape: tuple[int, ...]):
        super().__init__()
        self.out_shape = out_shape
        self.linear = nn.Linear(in_features, math.prod(out_shape))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear(hidden_states.flatten(1)).view(-1, *self.out_shape)


class FCResBlock(nn.Module):
    """A residual block without space: a vector of c channels at s positions is normalised and mixed as a whole.

    Args:
        in_channels: c of the input.
        out_channels: c' of the output.
        positions: s.
        temb_channels: width of the time embedding.
        groups: of the normalisation over c * s features.
        dropout: before the second linear layer.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        positions: int,
        temb_channels: int,
        groups: int = 32,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.out_shape = (out_channels, positions, 1)
        in_features, out_features = in_channels * positions, out_channels * positions
        self.norm1 = nn.GroupNorm(groups, in_features, eps=1e-5)
        self.linear1 = nn.Linear(in_features, out_features)
        self.time_emb_proj = nn.Linear(temb_channels, out_features)
        self.norm2 = nn.GroupNorm(groups, out_features, eps=1e-5)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(out_features, out_features)
        self.linear_shortcut = nn.Linear(in_features, out_features) if in_features != out_features else None

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """(b, c, s, 1) or (b, c * s), time embedding (b, d) -> (b, c', s, 1)."""
        residual = hidden_states.flatten(1)  # feature c * s + position
        hidden_states = self.linear1(F.silu(self.norm1(residual)))
        hidden_states = hidden_states + self.time_emb_proj(F.silu(temb))
        hidden_states = self.linear2(self.dropout(F.silu(self.norm2(hidden_states))))
        if self.linear_shortcut is not None:
            residual = self.linear_shortcut(residual)
        return (residual + hidden_states).view(-1, *self.out_shape)


class VersatileHead(nn.Module):
    """Normalisation, SiLU and the projection to the latents of a data type."""

    def __init__(self, channels: int, groups: int, proj: nn.Module):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-5)
        self.proj = proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.proj(F.silu(self.norm(hidden_states)))


def build_data_layer(
    step: WalkStep, sizes: Mapping[str, Any], *, temb_channels: int, groups: int, dropout: float
) -> nn.Module:
    """The layer of a data type for one step of the walk; `sizes` as `VersatileUNet` describes its `data_types`."""
    channels, before, after = sizes["channels"], step.in_channels, step.out_channels
    if sizes["kind"] == "vector":
        s = sizes["positions"]
        if step.op == "res":
            return FCResBlock(before, after, positions=s, temb_channels=temb_channels, groups=groups, dropout=dropout)
        if step.op == "out":
            return VersatileHead(before, groups, FCLinear(before * s, (channels,)))
        # there is nothing to resample: "down" and "up" are square
        return FCLinear(channels if step.op == "in" else before * s, (after, s, 1))
    if step.op == "in":
        return nn.Conv2d(channels, after, 3, padding=1)
    if step.op == "res":
        return ResnetBlock2D(
            in_channels=before,
            out_channels=after,
            temb_channels=temb_channels,
            groups=groups,
            dropout=dropout,
            eps=1e-5,
        )
    if step.op == "down":
        return Downsample2D(before, use_conv=True, name="op")  # its default name would register the weight twice
    if step.op == "up":
        return Upsample2D(before, use_conv=True)
    return VersatileHead(before, groups, nn.Conv2d(before, channels, 3, padding=1))


def build_context_layer(step: WalkStep, width: int, *, num_heads: int, groups: int, dropout: float) -> nn.Module:
    """The transformer of a context type for one step of the walk: self-attention, attention to tokens of `width`."""
    return Transformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=step.in_channels // num_heads,
        in_channels=step.in_channels,
        cross_attention_dim=width,
        norm_num_groups=groups,
        dropout=dropout,
    )


@torch.no_grad()
def zero_last_layers(layers: nn.ModuleList) -> nn.ModuleList:
    """Starts every block as the identity and the prediction at 0, as the original does."""
    for layer in layers:
        if isinstance(layer, ResnetBlock2D):
            last: nn.Module = layer.conv2
        elif isinstance(layer, FCResBlock):
            last = layer.linear2
        elif isinstance(layer, Transformer2DModel):
            last = layer.proj_out
        elif isinstance(layer, VersatileHead):
            last = layer.proj
        else:
            continue
        for parameter in last.parameters():
            parameter.zero_()
    return layers
