"""PITI's encoder: a label map, a sketch or a geometry to the tokens and the vector that a GLIDE U-Net understands.

Wang et al., "Pretraining is All You Need for Image-to-Image Translation", arXiv 2205.12952, section 3.2; original:
PITI-Synthesis/PITI@d9f7481:pretrained_diffusion/text2im_model.py (MIT).

Facts: six convolutions shrink the map sixteen times, a transformer without a mask follows, and a class token, which
stands last, becomes the vector. Everything the decoder knew of text it now hears from here.

Differences: position rows and class token start at a standard deviation of 0.02 (the original leaves their memory as
it finds it); the arguments that the original ignores are left out.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .blocks.outputs import ConditionOutput

_SHRINKS = 16  # four convolutions of stride 2


class PITIEncoder(ModelMixin, ConfigMixin):
    """A condition as large as the image to one token for each 16x16 pixels, and one vector for all.

    The defaults are those of the released models, for colour-coded label maps.

    Args:
        in_channels: channels of the condition: 3 for a label map in colours, 1 for a sketch's distance map, 6 for
            normals and depth.
        sample_size: side of the condition in pixels, a multiple of 16, at least 32.
        hidden_size: width of the tokens, the U-Net's `cross_attention_dim`. It is a multiple of 16: the convolutions
            are 1/16, 1/8, 1/4, 1/2, 1 and 1 times as wide.
        num_layers: number of transformer blocks.
        num_attention_heads: heads of each attention; they divide `hidden_size`.

    Raises:
        ValueError: for sizes that are no multiples, or heads that do not divide the width.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        sample_size: int = 256,
        hidden_size: int = 512,
        num_layers: int = 8,
        num_attention_heads: int = 8,
    ):
        super().__init__()
        if sample_size < 2 * _SHRINKS or sample_size % _SHRINKS:
            raise ValueError(
                f"`sample_size` is {sample_size}: it must be a multiple of {_SHRINKS}, at least {2 * _SHRINKS}."
            )
        if hidden_size < 16 or hidden_size % 16:
            raise ValueError(f"`hidden_size` is {hidden_size}: it must be a multiple of 16.")
        if num_attention_heads < 1 or hidden_size % num_attention_heads:
            raise ValueError(
                f"`num_attention_heads` is {num_attention_heads}: it must divide `hidden_size` {hidden_size}."
            )
        layers: list[nn.Module] = [*_convolution(in_channels, hidden_size // 16, kernel=7, stride=1)]
        for divisor in (8, 4, 2, 1):
            layers += _convolution(hidden_size // divisor // 2, hidden_size // divisor, kernel=3, stride=2)
        self.cnn = nn.Sequential(*layers, nn.Conv2d(hidden_size, hidden_size, 3, padding=1))
        self.num_tokens = (sample_size // _SHRINKS) ** 2
        self.class_token = nn.Embedding(1, hidden_size)
        self.position_embedding = nn.Embedding(self.num_tokens + 1, hidden_size)  # row 0 is the class token's
        nn.init.normal_(self.class_token.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)
        head_width = hidden_size // num_attention_heads
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                hidden_size, num_attention_heads, head_width, activation_fn="gelu", attention_bias=True
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.gradient_checkpointing = False

    def forward(self, condition: Tensor, return_dict: bool = True) -> ConditionOutput | tuple[Tensor, Tensor]:
        """Encodes conditions.

        Args:
            condition: (batch, in_channels, sample_size, sample_size) in [-1, 1]. All ones is the null condition.
            return_dict: True for an output with names, False for a tuple.

        Returns:
            `last_hidden_state` (batch, (sample_size / 16)^2, hidden_size), row by row, and `pooler_output` (batch,
            hidden_size), the class token.

        Raises:
            ValueError: for another shape, or integers.
        """
        channels, side = self.config["in_channels"], self.config["sample_size"]
        if condition.shape[1:] != (channels, side, side) or not condition.is_floating_point():
            raise ValueError(
                f"`condition` is {condition.dtype} of shape {tuple(condition.shape)}: expected floating-point values "
                f"in [-1, 1] of shape (batch, {channels}, {side}, {side}). Resize maps with nearest neighbours."
            )
        tokens = self.cnn(condition).flatten(2).transpose(1, 2)  # (b, n, d)
        rows = self.position_embedding(torch.arange(self.num_tokens + 1, device=condition.device))
        class_token = self.class_token(torch.zeros(1, dtype=torch.long, device=condition.device)) + rows[:1]
        class_tokens = class_token.expand(len(tokens), 1, -1)
        hidden_states = torch.cat([tokens + rows[1:], class_tokens.to(tokens.dtype)], dim=1)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)  # type: ignore[misc]
            else:
                hidden_states = block(hidden_states)
        hidden_states = self.norm(hidden_states)
        tokens, pooled = hidden_states[:, :-1], hidden_states[:, -1]
        if not return_dict:
            return tokens, pooled
        return ConditionOutput(last_hidden_state=tokens, pooler_output=pooled)


def _convolution(in_channels: int, out_channels: int, *, kernel: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2),
        nn.InstanceNorm2d(out_channels, affine=True),
        nn.LeakyReLU(0.2),
    ]
