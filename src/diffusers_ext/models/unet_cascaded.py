"""The U-Net of Cascaded Diffusion: ADM's network, with low-resolution input and a level of its augmentation.

Ho, Saharia, Chan, Fleet, Norouzi, Salimans, "Cascaded Diffusion Models for High Fidelity Image Generation", arXiv
2106.15282. Its authors released neither code nor weights. The network is that of Dhariwal and Nichol, arXiv 2105.05233
(openai/guided-diffusion@22e0df8:guided_diffusion/unet.py, MIT), whose weights convert
(`diffusers_ext.conversion.cascaded`); the blocks are diffusers' own, under the names of `UNet2DModel`.

What `UNet2DModel` cannot express: a constant number of heads over levels of several widths (the 64 -> 256 upsampler),
a class label together with an augmentation level, the low-resolution image as an argument, and a time embedding that
is not four times as wide as the first level (the 512 network).

Differences from ADM: attention is computed by torch's fused kernel, scaled once instead of twice by d^(-1/4). In half
precision all weights are half; ADM keeps all but the convolutions in float32.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block, get_up_block
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks.indices import check_indices

AUG_COND_TYPES = ("timestep", "log_snr", "alpha_cumprod")
UPSAMPLINGS = ("bilinear", "bicubic")
CLEAN_LOG_SNR = 20.0  # log(abar / (1 - abar)) of a clean image, which is infinite by definition


class CascadedUNet(ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):
    """Predicts the noise of an image, at one stage of a cascade.

    Without `low_res_channels` it is a base stage. With them it is a super-resolution stage: the low-resolution image
    is brought to the size of the sample and concatenated behind its channels. With `aug_cond_type` it is also told how
    much noise that image carries. The embedding of that level ends with a layer of zeros, so that weights of a network
    without it compute the same with it.

    Args:
        sample_size: Side of the images, a note in the config.
        in_channels: Channels of `sample`, without those of the low-resolution image.
        out_channels: Channels of the prediction: those of the noise, and as many again for a learned variance.
        block_out_channels: Width of each level, finest first.
        layers_per_block: Residual blocks of each level on the way down. The way up has one more.
        attention_levels: Whether each level has an attention after each residual block. The middle always has one.
        num_heads: Heads of every attention, or None.
        num_head_channels: Width of every head, or None. Without either of the two there is one head.
        dropout: Of the residual blocks.
        resnet_time_scale_shift: How the embedding enters a residual block: "scale_shift" (ADM) or "default" (a sum).
        resample: Between levels a residual block ("resnet", ADM's `resblock_updown`) or a convolution ("conv").
        num_class_embeds: Rows of the class table, a row for "no class" included. None: there are no labels.
        null_class: The row that stands for "no class" in classifier-free guidance, if one was trained.
        low_res_channels: Channels of the low-resolution image. 0: a base stage.
        low_res_upsampling: How that image is brought to the size of the sample: "bilinear" or "bicubic".
        aug_cond_type: In what the level of its noise is given: "timestep" (steps of noise, 0 is clean), "log_snr"
            (20 and more is clean) or "alpha_cumprod" (1 is clean). None: the network is not told.
        norm_num_groups: Groups of all normalisations.
        time_channels: Width of the sinusoids. Their embedding is four times as wide. None: as the first level.

    Raises:
        ValueError: For sizes that do not fit together, or an unknown word.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock2D"]
    _repeated_blocks = [
        "Attention"
    ]  # residual blocks are nearly all of different shapes: no one's program fits another
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "aug_embedding"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (192, 384, 576, 768),
        layers_per_block: int = 3,
        attention_levels: tuple[bool, ...] = (False, True, True, True),
        num_heads: int | None = None,
        num_head_channels: int | None = None,
        dropout: float = 0.0,
        resnet_time_scale_shift: Literal["scale_shift", "default"] = "scale_shift",
        resample: Literal["resnet", "conv"] = "resnet",
        num_class_embeds: int | None = None,
        null_class: int | None = None,
        low_res_channels: int = 0,
        low_res_upsampling: Literal["bilinear", "bicubic"] = "bilinear",
        aug_cond_type: Literal["timestep", "log_snr", "alpha_cumprod"] | None = None,
        norm_num_groups: int = 32,
        time_channels: int | None = None,
    ):
        super().__init__()
        _check_words(resnet_time_scale_shift, resample, low_res_upsampling, aug_cond_type)
        _check_sizes(block_out_channels, layers_per_block, attention_levels, norm_num_groups)
        _check_classes(num_class_embeds, null_class)
        if low_res_channels < 0 or (aug_cond_type is not None and low_res_channels == 0):
            raise ValueError(
                f"`low_res_channels` is {low_res_channels} and `aug_cond_type` {aug_cond_type!r}: a level belongs to "
                "a low-resolution image, whose channels are 1 or more; a base stage has 0 and no level."
            )
        head_widths = _head_widths(block_out_channels, attention_levels, num_heads, num_head_channels)
        levels = len(block_out_channels)
        self.downsample_factor = 2 ** (levels - 1)
        time_channels = time_channels or block_out_channels[0]
        shared = {
            "temb_channels": 4 * time_channels,
            "resnet_eps": 1e-5,
            "resnet_act_fn": "silu",
            "resnet_groups": norm_num_groups,
            "resnet_time_scale_shift": resnet_time_scale_shift,
            "dropout": dropout,
        }

        self.conv_in = nn.Conv2d(in_channels + low_res_channels, block_out_channels[0], kernel_size=3, padding=1)
        self.time_proj = Timesteps(time_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(time_channels, 4 * time_channels)
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, 4 * time_channels)
        self.aug_embedding = None if aug_cond_type is None else TimestepEmbedding(time_channels, 4 * time_channels)

        names = ("{}Block2D", "Attn{}Block2D") if resample == "conv" else ("Resnet{}sampleBlock2D", "Attn{}Block2D")
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(block_out_channels):
            down = get_down_block(
                names[attention_levels[level]].format("Down"),
                num_layers=layers_per_block,
                in_channels=block_out_channels[max(level - 1, 0)],
                out_channels=width,
                add_downsample=level < levels - 1,
                attention_head_dim=head_widths[level],
                downsample_padding=1,
                downsample_type=resample,
                **shared,
            )
            self.down_blocks.append(down)
        self.mid_block = UNetMidBlock2D(
            in_channels=block_out_channels[-1],
            attention_head_dim=head_widths[-1],
            attn_groups=norm_num_groups,  # else it would have no normalisation with scale_shift
            **shared,
        )
        for level in reversed(range(levels)):
            up = get_up_block(
                names[attention_levels[level]].format("Up"),
                num_layers=layers_per_block + 1,
                in_channels=block_out_channels[max(level - 1, 0)],
                out_channels=block_out_channels[level],
                prev_output_channel=block_out_channels[min(level + 1, levels - 1)],
                add_upsample=level > 0,
                attention_head_dim=head_widths[level],
                upsample_type=resample,
                **shared,
            )
            self.up_blocks.append(up)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, block_out_channels[0], eps=1e-5)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(block_out_channels[0], out_channels, kernel_size=3, padding=1)
        self._zero_last_layers()

    def add_augmentation_level(self, aug_cond_type: Literal["timestep", "log_snr", "alpha_cumprod"]) -> None:
        """Gives a super-resolution network without level embedding one, to train it further with augmentation.

        It computes the same as before, at any level, until its new layers are trained.

        Raises:
            ValueError: For a base stage, a network that has a level already, or an unknown word.
        """
        config = self.config
        _check_words(
            config["resnet_time_scale_shift"], config["resample"], config["low_res_upsampling"], aug_cond_type
        )
        if config["low_res_channels"] == 0 or config["aug_cond_type"] is not None or aug_cond_type is None:
            raise ValueError(
                f"`aug_cond_type` is {aug_cond_type!r}, `low_res_channels` {config['low_res_channels']} and the "
                f"network's own `aug_cond_type` {config['aug_cond_type']!r}: a level is added to a super-resolution "
                f"network that has none; it is one of {', '.join(AUG_COND_TYPES)}."
            )
        channels = config["time_channels"] or config["block_out_channels"][0]
        embedding = TimestepEmbedding(channels, 4 * channels)
        _zero(embedding.linear_2)
        self.aug_embedding = embedding.to(device=self.device, dtype=self.dtype).train(self.training)
        self.register_to_config(aug_cond_type=aug_cond_type)

    def level_of_steps(self, steps: Tensor | float | int, alphas_cumprod: Tensor) -> Tensor:
        """What `forward` takes as `augmentation_level` for an image with s steps of noise, in the network's own unit.

        Args:
            steps: s, from 0 (clean) to T; s = 1 is the noise of index 0 of the schedule. Between whole numbers the
                ratio of noise and signal is interpolated.
            alphas_cumprod: abar of the schedule that the image was noised with, (T,).

        Returns:
            float32, in the shape of `steps` and on its device.

        Raises:
            ValueError: If the network takes no level, or `steps` leaves the schedule (checked on a CPU only).
        """
        kind = self.config["aug_cond_type"]
        if kind is None:
            raise ValueError(
                "This network takes no augmentation level: its `aug_cond_type` is None. Pass a low-resolution image "
                "as the network was trained with, and no level."
            )
        steps = torch.as_tensor(steps, dtype=torch.float32)
        last = len(alphas_cumprod)
        if steps.device.type == "cpu" and bool(((steps < 0) | (steps > last) | steps.isnan()).any()):
            raise ValueError(f"`steps` is {steps.tolist()}: it must lie between 0 (clean) and {last}.")
        if kind == "timestep":
            return steps
        abar = alphas_cumprod.cpu().double()
        ratios = torch.cat([abar.new_zeros(1), ((1 - abar) / abar).sqrt()]).float().to(steps.device)  # (T + 1,)
        low = steps.long().clamp(max=last - 1)
        ratio = torch.lerp(ratios[low], ratios[low + 1], steps - low)
        if kind == "alpha_cumprod":
            return 1 / (1 + ratio.square())
        return (-2 * ratio.log()).clamp(-CLEAN_LOG_SNR, CLEAN_LOG_SNR)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        low_res: Tensor | None = None,
        augmentation_level: Tensor | float | int | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predicts the noise in `sample`.

        Args:
            sample: Noisy images (b, c, h, w), sides multiples of `downsample_factor`.
            timestep: Of the noise, a number, (), (1,) or (b,), whole or not.
            class_labels: Integers (b,), for networks with `num_class_embeds`.
            low_res: Low-resolution images (b, c, h', w') of any smaller size, for networks with `low_res_channels`.
            augmentation_level: How much noise `low_res` carries, in the unit of `aug_cond_type` (see
                `level_of_steps`), in the shapes of `timestep`. None is clean.
            return_dict: Whether to return a `UNet2DOutput` instead of a tuple.

        Returns:
            (b, out_channels, h, w): the noise, then the values between the two variances if they were learned.

        Raises:
            ValueError: For arguments that the network does not take or has to have, and shapes that do not fit.
        """
        self._check_inputs(sample, class_labels, low_res, augmentation_level)
        emb = self._embed_number("timestep", timestep, sample, self.time_embedding)
        if self.class_embedding is not None and class_labels is not None:
            emb = emb + self.class_embedding(class_labels).to(emb.dtype)
        if self.aug_embedding is not None:
            emb = emb + self._embed_number(
                "augmentation_level", self._level_on_scale(augmentation_level), sample, self.aug_embedding
            )
        if low_res is not None:
            low_res = low_res.to(sample.dtype)
            if low_res.shape[2:] != sample.shape[2:]:
                mode = self.config["low_res_upsampling"]
                low_res = F.interpolate(low_res, sample.shape[2:], mode=mode, align_corners=False)
            sample = torch.cat([sample, low_res], dim=1)

        hidden_states = self.conv_in(sample)
        skips: tuple[Tensor, ...] = (hidden_states,)
        for block in self.down_blocks:
            hidden_states, outputs = block(hidden_states, temb=emb)
            skips += outputs
        hidden_states = self.mid_block(hidden_states, emb)
        for block in self.up_blocks:
            count = len(block.resnets)  # type: ignore[arg-type]
            hidden_states = block(hidden_states, skips[-count:], emb)
            skips = skips[:-count]
        hidden_states = self.conv_out(self.conv_act(self.conv_norm_out(hidden_states)))
        return UNet2DOutput(sample=hidden_states) if return_dict else (hidden_states,)

    def _level_on_scale(self, level: Tensor | float | int | None) -> Tensor | float | int:
        """The level on the scale of timesteps, where 0 is clean: what the sinusoids can tell apart."""
        kind = self.config["aug_cond_type"]
        if level is None:
            return 0
        if kind == "timestep":
            return level
        level = torch.as_tensor(level, dtype=torch.float32)
        if kind == "alpha_cumprod":
            return 1000 * (1 - level).clamp(min=0).sqrt()  # by the standard deviation of the noise
        return 500 * (1 - level.clamp(-CLEAN_LOG_SNR, CLEAN_LOG_SNR) / CLEAN_LOG_SNR)

    def _embed_number(
        self, name: str, number: Tensor | float | int, sample: Tensor, embedding: TimestepEmbedding | None
    ) -> Tensor:
        """(b, 4 * time_channels) of a number a sample. The sinusoids are float32: half cannot tell phases apart."""
        assert embedding is not None
        batch = sample.shape[0]
        if not isinstance(number, Tensor):
            number = torch.tensor([number], dtype=torch.float32, device=sample.device)
        if number.ndim > 1 or number.numel() not in (1, batch):
            raise ValueError(
                f"`{name}` has shape {tuple(number.shape)}: pass a number or shape (), (1,) or ({batch},) for {batch} "
                "samples."
            )
        number = number.to(sample.device).reshape(-1).expand(batch)
        return embedding(self.time_proj(number).to(sample.dtype))

    def _check_inputs(
        self,
        sample: Tensor,
        class_labels: Tensor | None,
        low_res: Tensor | None,
        augmentation_level: Tensor | float | int | None,
    ) -> None:
        config, factor = self.config, self.downsample_factor
        channels, low_channels = config["in_channels"], config["low_res_channels"]
        if (
            sample.ndim != 4
            or sample.shape[1] != channels
            or any(side % factor or side == 0 for side in sample.shape[2:])
        ):
            raise ValueError(
                f"`sample` has shape {tuple(sample.shape)}: the network takes (b, {channels}, h, w) with h and w "
                f"multiples of {factor}."
            )
        batch = sample.shape[0]
        if (low_res is None) != (low_channels == 0):
            raise ValueError(
                f"`low_res` is missing: a super-resolution stage takes images (b, {low_channels}, h, w)."
                if low_res is None
                else f"`low_res` has shape {tuple(low_res.shape)}, but this is a base stage (`low_res_channels` is 0)."
            )
        if low_res is not None and (low_res.ndim != 4 or low_res.shape[:2] != (batch, low_channels)):
            raise ValueError(
                f"`low_res` has shape {tuple(low_res.shape)}: for {batch} samples it is ({batch}, {low_channels}, h, "
                "w)."
            )
        if augmentation_level is not None and config["aug_cond_type"] is None:
            raise ValueError(
                f"`augmentation_level` is {augmentation_level}, but the network was trained without (`aug_cond_type` "
                "is None): leave it out."
            )
        self._check_labels(class_labels, batch)

    def _check_labels(self, class_labels: Tensor | None, batch: int) -> None:
        rows = self.config["num_class_embeds"]
        if (class_labels is None) != (rows is None):
            raise ValueError(
                f"`class_labels` is missing: pass integers from 0 to {rows - 1}, one a sample."
                if class_labels is None
                else "`class_labels` is given, but the network has no classes (`num_class_embeds` is None)."
            )
        if class_labels is None:
            return
        if tuple(class_labels.shape) != (batch,) or class_labels.is_floating_point():
            raise ValueError(
                f"`class_labels` is {class_labels.dtype} of shape {tuple(class_labels.shape)}: expected integers of "
                f"shape ({batch},) for {batch} samples."
            )
        check_indices("class_labels", class_labels, rows, "the classes")

    def _zero_last_layers(self) -> None:
        """Starts every block as the identity, the prediction at 0, and all levels alike, as the original does."""
        last: list[nn.Module] = [self.conv_out]
        last += [module.conv2 for module in self.modules() if isinstance(module, ResnetBlock2D)]
        last += [module.to_out[0] for module in self.modules() if isinstance(module, Attention)]  # type: ignore[index]
        last += [] if self.aug_embedding is None else [self.aug_embedding.linear_2]
        for module in last:
            _zero(module)


@torch.no_grad()
def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.zero_()


def _check_words(time_scale_shift: str, resample: str, upsampling: str, aug_cond_type: str | None) -> None:
    for name, value, allowed in [
        ("resnet_time_scale_shift", time_scale_shift, ("scale_shift", "default")),
        ("resample", resample, ("resnet", "conv")),
        ("low_res_upsampling", upsampling, UPSAMPLINGS),
        ("aug_cond_type", aug_cond_type, (None, *AUG_COND_TYPES)),
    ]:
        if value not in allowed:
            raise ValueError(f"`{name}` is {value!r}: it must be one of {', '.join(map(str, allowed))}.")


def _check_sizes(widths: Sequence[int], layers: int, attention_levels: Sequence[bool], groups: int) -> None:
    if not widths or len(widths) != len(attention_levels) or layers < 1:
        raise ValueError(
            f"`block_out_channels` is {tuple(widths)}, `attention_levels` {tuple(attention_levels)} and "
            f"`layers_per_block` {layers}: give each level one entry in the first two, and at least one layer."
        )
    wrong = [width for width in widths if groups < 1 or width < 1 or width % groups]
    if wrong:
        raise ValueError(
            f"`block_out_channels` is {tuple(widths)}: {wrong} are no multiples of `norm_num_groups` ({groups})."
        )


def _check_classes(rows: int | None, null_class: int | None) -> None:
    if rows is not None and rows < 1:
        raise ValueError(f"`num_class_embeds` is {rows}: it is 1 or more, or None without classes.")
    if null_class is not None and not 0 <= null_class < (rows or 0):
        raise ValueError(
            f"`null_class` is {null_class}, but `num_class_embeds` is {rows}: name one of its rows, or None for a "
            "network without guidance."
        )


def _head_widths(
    widths: Sequence[int], attention_levels: Sequence[bool], num_heads: int | None, num_head_channels: int | None
) -> list[int]:
    """Width of a head of each level. A level without attention has none, whatever is said here."""
    if num_heads is not None and num_head_channels is not None:
        raise ValueError(
            f"`num_heads` is {num_heads} and `num_head_channels` {num_head_channels}: pass one of the two."
        )
    attended = [width for width, attends in zip(widths, attention_levels, strict=True) if attends] + [widths[-1]]
    name, divisor = ("num_heads", num_heads) if num_head_channels is None else ("num_head_channels", num_head_channels)
    divisor = 1 if divisor is None else divisor
    if divisor < 1 or any(width % divisor for width in attended):
        raise ValueError(
            f"`{name}` is {divisor}, but levels with attention are {', '.join(map(str, attended))} wide: choose a "
            "divisor of all of them."
        )
    if num_head_channels is None:
        return [max(width // divisor, 1) for width in widths]
    return [divisor] * len(widths)
