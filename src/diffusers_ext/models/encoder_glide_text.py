"""GLIDE's text tower: token ids to the tokens and the vector that its U-Nets are conditioned on.

Nichol et al., "GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion Models", arXiv
2112.10741; original: openai/glide-text2im@69b5307:glide_text2im/text2im_model.py and xf.py (code and weights MIT).

Facts: a pre-norm transformer without any mask, neither causal nor for padding. A padding position holds a learned row
of its own instead of token and position. The vector is the last position, which usually is a padding one.

Difference: the projection of the vector belongs to the U-Net (`class_embedding` of `UNet2DConditionModel`).
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .blocks.outputs import ConditionOutput


class GlideTextEncoder(ModelMixin, ConfigMixin):
    """Token ids to one vector a position, and the last of them as the vector of the whole text.

    The defaults are those of the released models. Their tokens are GPT-2's; the text is in lower case, at most
    `max_length` tokens long, without begin and end, and filled up with token 50256.

    Args:
        vocab_size: number of tokens.
        max_length: length of every sequence, padding included.
        hidden_size: width of the tokens, the U-Net's `cross_attention_dim`.
        num_layers: number of transformer blocks.
        num_attention_heads: heads of each attention; they divide `hidden_size`.

    Raises:
        ValueError: if the heads do not divide the width.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 50257,
        max_length: int = 128,
        hidden_size: int = 512,
        num_layers: int = 16,
        num_attention_heads: int = 8,
    ):
        super().__init__()
        if num_attention_heads < 1 or hidden_size % num_attention_heads:
            raise ValueError(
                f"`num_attention_heads` is {num_attention_heads}: it must divide `hidden_size` {hidden_size}."
            )
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.position_embedding = nn.Embedding(max_length, hidden_size)
        self.padding_embedding = nn.Embedding(max_length, hidden_size)
        head_width = hidden_size // num_attention_heads
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                hidden_size, num_attention_heads, head_width, activation_fn="gelu", attention_bias=True
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.gradient_checkpointing = False

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, return_dict: bool = True
    ) -> ConditionOutput | tuple[Tensor, Tensor]:
        """Encodes texts.

        Args:
            input_ids: token ids, integers (batch, max_length).
            attention_mask: 1 or True for real tokens, 0 or False for padding, (batch, max_length). Without one, every
                token is real.
            return_dict: True for an output with names, False for a tuple.

        Returns:
            `last_hidden_state` (batch, max_length, hidden_size) and `pooler_output` (batch, hidden_size), its last
            position.

        Raises:
            ValueError: for another shape or dtype of the ids, or another shape of the mask.
        """
        length = self.position_embedding.num_embeddings
        if input_ids.ndim != 2 or input_ids.shape[1] != length or input_ids.is_floating_point():
            raise ValueError(
                f"`input_ids` is {input_ids.dtype} of shape {tuple(input_ids.shape)}: expected integers of shape "
                f"(batch, {length}). Pad or cut the texts to {length} tokens."
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}: it must have that of `input_ids`, "
                f"{tuple(input_ids.shape)}."
            )
        positions = torch.arange(length, device=input_ids.device)
        hidden_states = self.token_embedding(input_ids) + self.position_embedding(positions)
        if attention_mask is not None:
            hidden_states = torch.where(
                attention_mask.bool()[..., None], hidden_states, self.padding_embedding(positions)
            )
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)  # type: ignore[misc]
            else:
                hidden_states = block(hidden_states)
        hidden_states = self.norm(hidden_states)  # (b, l, d)
        pooled = hidden_states[:, -1]
        if not return_dict:
            return hidden_states, pooled
        return ConditionOutput(last_hidden_state=hidden_states, pooler_output=pooled)
