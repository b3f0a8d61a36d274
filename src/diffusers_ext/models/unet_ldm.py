"""The one U-Net of latent diffusion that diffusers cannot configure: self-attention with a constant number of heads.

`UNet2DModel` fixes the width of a head for all levels. The released models for LSUN-Churches and for inpainting
("big") fix the number of heads instead, so that heads are wider on wider levels (Rombach et al., arXiv 2112.10752,
table 15; original: CompVis/latent-diffusion@a506df5:ldm/modules/diffusionmodules/openaimodel.py, MIT). Everything
else, and every other released model, is the stock class.
"""

from diffusers.configuration_utils import register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d import UNet2DModel


class LDMUNet(UNet2DModel, PeftAdapterMixin, AttentionMixin):
    """A `UNet2DModel` whose attention layers all have the same number of heads.

    Unlike its parent it takes adapters (`add_adapter`, `load_lora_adapter`) and attention processors
    (`set_attn_processor`).

    Args:
        num_attention_heads: heads of every attention layer; None leaves the parent's `attention_head_dim` in force.

    The other arguments are those of `diffusers.UNet2DModel`.

    Raises:
        ValueError: if a level with attention is not divisible into that many heads.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        num_attention_heads: int | None = None,
    ):
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            center_input_sample=center_input_sample,
            time_embedding_type=time_embedding_type,
            time_embedding_dim=time_embedding_dim,
            freq_shift=freq_shift,
            flip_sin_to_cos=flip_sin_to_cos,
            down_block_types=down_block_types,
            mid_block_type=mid_block_type,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            mid_block_scale_factor=mid_block_scale_factor,
            downsample_padding=downsample_padding,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            dropout=dropout,
            act_fn=act_fn,
            # one head as wide as the level: the projections are then whole, whatever the number of heads
            attention_head_dim=attention_head_dim if num_attention_heads is None else None,
            norm_num_groups=norm_num_groups,
            attn_norm_num_groups=attn_norm_num_groups,
            norm_eps=norm_eps,
            resnet_time_scale_shift=resnet_time_scale_shift,
            add_attention=add_attention,
            class_embed_type=class_embed_type,
            num_class_embeds=num_class_embeds,
            num_train_timesteps=num_train_timesteps,
        )
        if num_attention_heads is None:
            return
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                if num_attention_heads < 1 or module.inner_dim % num_attention_heads:
                    raise ValueError(
                        f"`num_attention_heads` is {num_attention_heads}, but {name} has {module.inner_dim} channels: "
                        "choose a divisor of all widths of `block_out_channels` with attention."
                    )
                module.heads = module.sliceable_head_dim = num_attention_heads
                module.scale = (module.inner_dim // num_attention_heads) ** -0.5
