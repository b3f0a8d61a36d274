"""The token predictor of Paella v1: a convolutional U-Net from noised tokens to logits over the codebook.

Paper: Rampas, Pernias, Zhong, Aubreville, "Fast Text-Conditional Discrete Denoising on Vector-Quantized Latent
Spaces", arXiv 2211.07292 (its November 2022 text). Original code (MIT, weights MIT): dome272/Paella@b1f88ef.

Differences from the original: activations stay in the (b, h, w, c) layout, in which embedding, normalisation, linear
layers and logits need no copies; a global condition is projected once per image instead of once per position (equal in
exact arithmetic); the kernel size is a config field; the time embedding is computed in float32 and then cast.

Letters in shape comments: b images, (h, w) the token grid of a level, c channels, d condition plus time, v codebook.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.outputs import BaseOutput
from torch import Tensor, nn


@dataclass
class PaellaUNetOutput(BaseOutput):
    """What the token predictor returns.

    Args:
        sample: logits over the codebook, float (batch, num_vq_embeddings, height, width). In memory the codebook
            dimension is the innermost one, so `permute(0, 2, 3, 1)` gives contiguous rows.
    """

    sample: Tensor


def paella_time_embedding(timestep: Tensor, embed_dim: int, *, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of the noise level cos(pi r / 2).

    The phases reach 10000, where half precision cannot tell neighbours apart: everything is float32.

    Args:
        timestep: r in [0, 1], 0 = all noise, (batch,).
        embed_dim: length of the embedding; an odd one ends in a zero.
        max_period: ratio of the highest to the lowest frequency, and the factor of the noise level.

    Returns:
        float32 (batch, embed_dim): sines, then cosines.
    """
    half = embed_dim // 2
    noise_level = torch.cos(timestep.float() * (math.pi / 2)) * max_period
    # f_k = max_period^(-k / (half - 1))
    index = torch.arange(half, device=timestep.device, dtype=torch.float32)
    frequencies = torch.exp(index * -(math.log(max_period) / (half - 1)))
    phase = noise_level[:, None] * frequencies  # (b, half)
    return F.pad(torch.cat([phase.sin(), phase.cos()], dim=1), (0, embed_dim % 2))


class PaellaModulatedLayerNorm(nn.Module):
    """LayerNorm over channels whose output is modulated by one projection of the condition.

    With the projection w and two learned scalars, out = gain * w * LN(x) + shift * w: the same w scales and shifts.
    """

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.gain = nn.Parameter(torch.randn(1))
        self.shift = nn.Parameter(torch.randn(1))

    def forward(self, hidden_states: Tensor, modulation: Tensor) -> Tensor:
        # The scalars fold into the affine part of the norm, which leaves one product per element:
        # gain * w * (n * weight + bias) + shift * w = w * (n * (gain * weight) + (gain * bias + shift))
        weight, bias = self.gain * self.weight, self.gain * self.bias + self.shift
        return modulation * F.layer_norm(hidden_states, self.weight.shape, weight, bias, self.eps)


class PaellaResBlock(nn.Module):
    """Depthwise convolution, modulated norm and a two-layer perceptron, around a scaled residual."""

    def __init__(
        self, channels: int, *, cond_dim: int, kernel_size: int, layer_scale_init: float, skip_channels: int = 0
    ):
        super().__init__()
        self.depthwise = nn.Conv2d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, padding_mode="reflect"
        )
        self.cond_mapper = nn.Linear(cond_dim, channels)
        self.norm = PaellaModulatedLayerNorm(channels)
        self.channelwise = nn.Sequential(
            nn.Linear(channels + skip_channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.layer_scale = nn.Parameter(torch.full((channels,), layer_scale_init))

    def forward(self, hidden_states: Tensor, cond: Tensor, skip: Tensor | None = None) -> Tensor:
        """(b, h, w, c), condition (b, h, w, d) or (b, 1, 1, d), optional skip (b, h, w, c') -> (b, h, w, c)."""
        residual = hidden_states
        # The permuted view is an ordinary channels-last picture for the convolution.
        hidden_states = self.depthwise(hidden_states.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        hidden_states = self.norm(hidden_states, self.cond_mapper(cond))
        if skip is not None:
            hidden_states = torch.cat([hidden_states, skip], dim=-1)
        return torch.addcmul(residual, self.layer_scale, self.channelwise(hidden_states))


class PaellaDownLevel(nn.Module):
    """One resolution of the way down: an optional strided convolution, then blocks."""

    _gradient_checkpointing_func: Callable[..., Tensor]  # set by `enable_gradient_checkpointing`

    def __init__(self, blocks: list[PaellaResBlock], downsample: nn.Conv2d | None):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.gradient_checkpointing = False

    def forward(self, hidden_states: Tensor, cond: Tensor) -> Tensor:
        if self.downsample is not None:
            hidden_states = self.downsample(hidden_states.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, cond)
            else:
                hidden_states = block(hidden_states, cond)
        return hidden_states


class PaellaUpLevel(nn.Module):
    """One resolution of the way up: blocks, the first of which takes the skip, then an optional upsampling."""

    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, blocks: list[PaellaResBlock], upsample: nn.ConvTranspose2d | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.upsample = upsample
        self.gradient_checkpointing = False

    def forward(self, hidden_states: Tensor, cond: Tensor, skip: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, cond, skip)
            else:
                hidden_states = block(hidden_states, cond, skip)
            skip = None  # only the first block takes it
        if self.upsample is not None:
            hidden_states = self.upsample(hidden_states.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return hidden_states


class PaellaUNet(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts clean tokens from noised tokens, the noise level and a condition (Paella v1, arXiv 2211.07292).

    Args:
        num_vq_embeddings: size of the codebook, for the token embedding and the logits.
        block_out_channels: width of each level, finest first.
        down_layers_per_block: blocks of each level on the way down, finest first.
        up_layers_per_block: blocks of each level on the way up, deepest first.
        condition_dim: width of the condition, e.g. of a CLIP embedding.
        time_embed_dim: width of the sinusoidal time embedding, at least 4.
        kernel_size: side of the depthwise convolutions, odd.
        layer_scale_init: initial value of the residual branches' per-channel scale.
        sample_size: side or (height, width) of the token grid it was trained on, which pipelines sample by default.

    Raises:
        ValueError: for levels of unequal count or without layers, an even kernel or a time embedding below 4.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["PaellaResBlock"]
    _repeated_blocks = ["PaellaResBlock"]
    _skip_layerwise_casting_patterns = ["norm", "proj_out"]

    @register_to_config
    def __init__(
        self,
        num_vq_embeddings: int = 8192,
        block_out_channels: tuple[int, ...] = (320, 640, 1280),
        down_layers_per_block: tuple[int, ...] = (4, 8, 16),
        up_layers_per_block: tuple[int, ...] = (16, 8, 4),
        condition_dim: int = 1024,
        time_embed_dim: int = 64,
        kernel_size: int = 3,
        layer_scale_init: float = 1e-6,
        sample_size: int | tuple[int, int] | None = None,
    ):
        super().__init__()
        _check_config(block_out_channels, down_layers_per_block, up_layers_per_block, time_embed_dim, kernel_size)
        num_levels = len(block_out_channels)
        self.downsample_factor = 2 ** (num_levels - 1)
        # Reflection needs more positions than it adds on either side, also on the deepest level.
        self.min_size = (kernel_size // 2 + 1) * self.downsample_factor
        self.condition_dim = condition_dim
        self.time_embed_dim = time_embed_dim

        cond_dim = condition_dim + time_embed_dim
        block = partial(PaellaResBlock, cond_dim=cond_dim, kernel_size=kernel_size, layer_scale_init=layer_scale_init)
        self.token_embedding = nn.Embedding(num_vq_embeddings, block_out_channels[0])
        self.down_levels = nn.ModuleList()
        for level, channels in enumerate(block_out_channels):
            downsample = None
            if level > 0:
                downsample = nn.Conv2d(block_out_channels[level - 1], channels, kernel_size=4, stride=2, padding=1)
            blocks = [block(channels) for _ in range(down_layers_per_block[level])]
            self.down_levels.append(PaellaDownLevel(blocks, downsample))
        self.up_levels = nn.ModuleList()
        for level, num_layers in zip(reversed(range(num_levels)), up_layers_per_block, strict=True):
            channels, upsample = block_out_channels[level], None
            if level > 0:
                upsample = nn.ConvTranspose2d(channels, block_out_channels[level - 1], 4, stride=2, padding=1)
            skip_channels = channels if level < num_levels - 1 else 0  # the deepest level goes on from its own output
            blocks = [block(channels, skip_channels=skip_channels if k == 0 else 0) for k in range(num_layers)]
            self.up_levels.append(PaellaUpLevel(blocks, upsample))
        self.proj_out = nn.Linear(block_out_channels[0], num_vq_embeddings)
        self._scale_residual_branches()

    @torch.no_grad()
    def _scale_residual_branches(self) -> None:
        """Shrinks each branch's last weight by sqrt(1 / number of blocks on its way), as the original does."""
        for levels in (self.down_levels, self.up_levels):
            blocks = [module for module in levels.modules() if isinstance(module, PaellaResBlock)]
            for block in blocks:
                block.get_parameter("channelwise.2.weight").mul_(math.sqrt(1 / len(blocks)))

    def forward(
        self, sample: Tensor, timestep: Tensor | float, condition_embeds: Tensor, return_dict: bool = True
    ) -> PaellaUNetOutput | tuple[Tensor]:
        """Predicts logits of the clean tokens.

        Args:
            sample: noised tokens, integer (batch, height, width), values 0..num_vq_embeddings-1. Both sides are
                multiples of `downsample_factor` and at least `min_size`.
            timestep: r in [0, 1], 0 = all noise, 1 = clean; a number, or float (), (1,) or (batch,). Keep it float32
                in half precision as well.
            condition_embeds: (batch, condition_dim) for the whole picture or (batch, condition_dim, height, width)
                for each position. Zeros are the null condition.
            return_dict: whether to return a `PaellaUNetOutput` instead of a tuple.

        Returns:
            logits, (batch, num_vq_embeddings, height, width).

        Raises:
            TypeError: for tokens that are no integers.
            ValueError: for a shape, size, token or time that the network does not take.
        """
        logits = self.head(self.forward_features(sample, timestep, condition_embeds))
        if not return_dict:
            return (logits,)
        return PaellaUNetOutput(sample=logits)

    def forward_features(self, sample: Tensor, timestep: Tensor | float, condition_embeds: Tensor) -> Tensor:
        """Everything before the head: arguments as in `forward`, features (batch, height, width, channels).

        The head is affine, so that an affine mix of features (guidance) and of logits are the same.
        """
        timestep = self._check_inputs(sample, timestep, condition_embeds)
        hidden_states = self._embed_tokens(sample)  # (b, h, w, c)
        conds = self._condition_pyramid(timestep, condition_embeds, hidden_states)
        skips: list[Tensor | None] = []
        for level, cond in zip(self.down_levels, conds, strict=True):
            hidden_states = level(hidden_states, cond)
            skips.append(hidden_states)
        skips[-1] = None
        for level in self.up_levels:
            hidden_states = level(hidden_states, conds.pop(), skips.pop())
        return hidden_states

    def head(self, features: Tensor) -> Tensor:
        """Features (batch, height, width, channels) to logits (batch, num_vq_embeddings, height, width)."""
        return self.proj_out(features).permute(0, 3, 1, 2)

    def _embed_tokens(self, sample: Tensor) -> Tensor:
        try:
            return self.token_embedding(sample)
        except IndexError as error:  # raised on the CPU; an accelerator would have to wait for the answer
            raise ValueError(
                f"`sample` holds tokens from {sample.min().item()} to {sample.max().item()}, the codebook has "
                f"0..{self.token_embedding.num_embeddings - 1}: build the network with the tokenizer's "
                "`num_vq_embeddings`."
            ) from error

    def _condition_pyramid(self, timestep: Tensor, condition_embeds: Tensor, hidden_states: Tensor) -> list[Tensor]:
        """Condition and time for each level, finest first: (b, 1, 1, d), or (b, h, w, d) for a condition map."""
        time_embeds = paella_time_embedding(timestep, self.time_embed_dim)[:, None, None].to(hidden_states.dtype)
        condition_embeds = condition_embeds.to(hidden_states.dtype)
        if condition_embeds.ndim == 2:
            cond = torch.cat([condition_embeds[:, None, None], time_embeds], dim=-1)
            return [cond] * len(self.down_levels)
        conds = []
        for level in range(len(self.down_levels)):
            height, width = hidden_states.shape[1] >> level, hidden_states.shape[2] >> level
            cond = condition_embeds
            if level > 0:  # always from the full map, as in the original
                cond = F.interpolate(cond, size=(height, width), mode="bilinear", align_corners=False)
            cond = cond.permute(0, 2, 3, 1)
            conds.append(torch.cat([cond, time_embeds.expand(-1, height, width, -1)], dim=-1))
        return conds

    def _check_inputs(self, sample: Tensor, timestep: Tensor | float, condition_embeds: Tensor) -> Tensor:
        """Raises what `forward` documents and returns the times as (batch,), without waiting for the device."""
        if sample.is_floating_point() or sample.is_complex() or sample.dtype == torch.bool:
            raise TypeError(f"`sample` holds {sample.dtype}, the network takes token indices: int64 or int32.")
        if sample.ndim != 3:
            raise ValueError(f"`sample` has shape {tuple(sample.shape)}, the network takes (batch, height, width).")
        batch, height, width = sample.shape
        for side in (height, width):
            if side < self.min_size or side % self.downsample_factor:
                raise ValueError(
                    f"`sample` is a grid of {height}x{width} tokens. Sides are multiples of {self.downsample_factor} "
                    f"and at least {self.min_size}; the nearest valid grid is "
                    f"{self._nearest_side(height)}x{self._nearest_side(width)}."
                )
        expected = (batch, self.condition_dim)
        if condition_embeds.ndim == 4:
            expected = (batch, self.condition_dim, height, width)
        if condition_embeds.shape != expected:
            raise ValueError(
                f"`condition_embeds` has shape {tuple(condition_embeds.shape)}. For tokens of shape "
                f"{tuple(sample.shape)} it is {(batch, self.condition_dim)}, or "
                f"{(batch, self.condition_dim, height, width)} with one condition for each position; zeros are the "
                "null condition."
            )
        if not isinstance(timestep, Tensor):
            if not 0.0 <= timestep <= 1.0:
                raise ValueError(f"`timestep` is {timestep}, the network takes r in [0, 1], where 0 is all noise.")
            timestep = torch.full((batch,), timestep, dtype=torch.float32, device=sample.device)
        elif timestep.ndim > 1 or timestep.numel() not in (1, batch):
            raise ValueError(
                f"`timestep` has shape {tuple(timestep.shape)}, the network takes a number or shape (), (1,) or "
                f"({batch},) for {batch} token grids."
            )
        return timestep.to(sample.device).expand(batch)

    def _nearest_side(self, side: int) -> int:
        return max(self.min_size, round(side / self.downsample_factor) * self.downsample_factor)


def _check_config(
    block_out_channels: tuple[int, ...],
    down_layers_per_block: tuple[int, ...],
    up_layers_per_block: tuple[int, ...],
    time_embed_dim: int,
    kernel_size: int,
) -> None:
    lengths = (len(block_out_channels), len(down_layers_per_block), len(up_layers_per_block))
    if min(lengths) < 1 or min(lengths) != max(lengths):
        raise ValueError(
            f"`block_out_channels`, `down_layers_per_block` and `up_layers_per_block` have {lengths} entries: give "
            "each level one entry in all three."
        )
    if min(*down_layers_per_block, *up_layers_per_block) < 1:
        raise ValueError(
            f"`down_layers_per_block` is {tuple(down_layers_per_block)} and `up_layers_per_block` is "
            f"{tuple(up_layers_per_block)}: every level needs at least one layer each way."
        )
    if time_embed_dim < 4:
        raise ValueError(f"`time_embed_dim` is {time_embed_dim}: the embedding needs at least 4 channels.")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"`kernel_size` is {kernel_size}: depthwise kernels are odd (1, 3, 5, ...).")
