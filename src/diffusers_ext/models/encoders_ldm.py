"""The small networks that turn a user's wish into the condition of a latent diffusion model.

Rombach, Blattmann, Lorenz, Esser, Ommer, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv
2112.10752, section 3.3 and appendix E.2; original: CompVis/latent-diffusion@a506df5:ldm/modules/encoders/modules.py
and ldm/modules/x_transformer.py (MIT, weights MIT). The text encoder is not here: diffusers has it (`LDMBertModel`).

Differences: the layout encoder leaves out the original's unused output head; label maps may be given as integers; bad
labels and tokens are refused. All three return a plain tensor unless `return_dict` is given: a `SampleOutput` if it is
True, a tuple if it is False.
"""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks.indices import check_indices, indices_beyond
from .blocks.outputs import SampleOutput, as_output

RESCALING_METHODS = ("nearest", "bilinear", "bicubic", "area")


class LDMClassEmbedder(ModelMixin, ConfigMixin):
    """One learned token a class, for cross-attention.

    Args:
        num_class_embeds: rows of the table, a row for "no class" included: 1000 in LDM-8, 1001 in LDM-4 on ImageNet.
        embed_dim: width of the token, the U-Net's `cross_attention_dim`.
        null_class: the row that stands for "no class" in classifier-free guidance, or None without one (LDM-8).

    Raises:
        ValueError: if `null_class` is no row of the table.
    """

    @register_to_config
    def __init__(self, num_class_embeds: int = 1001, embed_dim: int = 512, null_class: int | None = None):
        super().__init__()
        if null_class is not None and not 0 <= null_class < num_class_embeds:
            raise ValueError(
                f"`null_class` is {null_class}, but the table has the rows 0 to {num_class_embeds - 1}: name one of "
                "them, or None for a model without guidance."
            )
        self.embedding = nn.Embedding(num_class_embeds, embed_dim)

    def forward(self, class_labels: Tensor, return_dict: bool | None = None) -> Tensor | SampleOutput | tuple[Tensor]:
        """Class numbers, integers (batch,), to tokens (batch, 1, embed_dim).

        Raises:
            ValueError: for another shape or dtype, or for numbers beyond the table (checked on a CPU only).
        """
        if class_labels.ndim != 1 or class_labels.is_floating_point():
            raise ValueError(
                f"`class_labels` is {class_labels.dtype} of shape {tuple(class_labels.shape)}: expected integers of "
                "shape (batch,)."
            )
        check_indices("class_labels", class_labels, self.embedding.num_embeddings, "the table")
        return as_output(self.embedding(class_labels)[:, None], return_dict)  # (b, 1, d)


class LDMLayoutEncoder(ModelMixin, ConfigMixin):
    """Layout tokens to a sequence of context vectors: a pre-norm transformer, trained jointly with the U-Net.

    Token embedding + learned positions -> `num_layers` x {norm, self-attention, +; norm, MLP with exact GELU, +} ->
    norm. Nothing is masked: the tokens of unused objects are attended to. The defaults are those of the released
    layout model; its tokens come from `diffusers_ext.conditions.layout.LayoutTokenizer`.

    Args:
        vocab_size: number of tokens; classes, coordinates and "none" (the last one) share it.
        max_length: longest sequence, 3 tokens for each of 30 objects and 2 for the crop.
        hidden_size: width of the tokens, the U-Net's `cross_attention_dim`.
        num_layers, num_attention_heads, attention_head_dim: the attention is `heads * head_dim` wide, whatever
            `hidden_size` is.
        dropout: after attention and MLP.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 8192,
        max_length: int = 92,
        hidden_size: int = 512,
        num_layers: int = 16,
        num_attention_heads: int = 8,
        attention_head_dim: int = 64,
        dropout: float = 0.0,
    ):
        super().__init__()
        # both start with a variance of 1, not the original's 0.02^2: small rows drown in the first attention's output
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.position_embedding = nn.Embedding(max_length, hidden_size)
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                hidden_size,
                num_attention_heads,
                attention_head_dim,
                dropout=dropout,
                activation_fn="gelu",
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.gradient_checkpointing = False

    @property
    def null_token(self) -> int:
        """The token "none": of unused objects, and of the whole sequence where no layout is given."""
        return self.token_embedding.num_embeddings - 1

    def forward(self, input_ids: Tensor, return_dict: bool | None = None) -> Tensor | SampleOutput | tuple[Tensor]:
        """Tokens, integers (batch, length <= max_length), to context vectors (batch, length, hidden_size).

        Raises:
            ValueError: for another shape or dtype, a longer sequence, or unknown tokens (checked on a CPU only).
        """
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"`input_ids` is {input_ids.dtype} of shape {tuple(input_ids.shape)}: expected integers of shape "
                "(batch, length)."
            )
        longest = self.position_embedding.num_embeddings
        if input_ids.shape[1] > longest:
            raise ValueError(
                f"`input_ids` holds {input_ids.shape[1]} tokens a layout, this encoder takes at most {longest}: build "
                "them with fewer objects."
            )
        check_indices("input_ids", input_ids, self.token_embedding.num_embeddings, "the vocabulary")
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden_states = self.token_embedding(input_ids) + self.position_embedding(positions)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)  # type: ignore[misc]
            else:
                hidden_states = block(hidden_states)
        return as_output(self.norm(hidden_states), return_dict)  # (b, l, d)


class LDMSpatialRescaler(ModelMixin, ConfigMixin):
    """A label map at image size to channels at latent size, to be concatenated with the noisy latent.

    The map is one-hot; it is resized `num_stages` times by `multiplier` (no anti-aliasing, as in the original) and
    mapped to `out_channels` by a 1x1 convolution that is trained jointly with the U-Net.

    Args:
        in_channels: number of labels: 182 of COCO-Stuff in the released model.
        out_channels: channels that the U-Net gets besides the latent; None leaves the convolution out.
        num_stages: how often to resize; 2 with a first stage of factor 4.
        multiplier: factor of each stage.
        method: mode of `torch.nn.functional.interpolate`.
        bias: of the convolution.

    Raises:
        ValueError: for a negative number of stages, or an unknown method.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 182,
        out_channels: int | None = 3,
        num_stages: int = 2,
        multiplier: float = 0.5,
        method: str = "bilinear",
        bias: bool = False,
    ):
        super().__init__()
        if num_stages < 0:
            raise ValueError(f"`num_stages` is {num_stages}: it must be at least 0.")
        if method not in RESCALING_METHODS:
            raise ValueError(f"`method` is {method!r}: it must be one of {', '.join(RESCALING_METHODS)}.")
        self.channel_mapper = None if out_channels is None else nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, label_map: Tensor, return_dict: bool | None = None) -> Tensor | SampleOutput | tuple[Tensor]:
        """Label maps to conditions (batch, out_channels, height / f, width / f).

        The convolution comes first: both maps are linear, the order changes nothing but rounding, and the resizing
        has `out_channels` to work on in place of a channel for each label.

        Args:
            label_map: integers (batch, height, width) from 0 to in_channels - 1, or one-hot (or soft) maps (batch,
                in_channels, height, width), floating point.

        Raises:
            ValueError: for another shape or dtype, or an unknown label (checked on a CPU only).
        """
        num_labels, mapper = self.config["in_channels"], self.channel_mapper
        if label_map.ndim == 3 and not label_map.is_floating_point():
            if beyond := indices_beyond(label_map, num_labels):
                raise ValueError(
                    f"`label_map` holds labels from {beyond[0]} to {beyond[1]}, this model knows 0 to "
                    f"{num_labels - 1}: map others onto these, for instance with a palette."
                )
            dtype = torch.get_default_dtype() if mapper is None else self.dtype  # a child's may be that of storage
            every_label = torch.eye(num_labels, device=label_map.device, dtype=dtype)
            if mapper is not None:  # what the convolution makes of each label: (1, c, c, 1) -> (1, out, c, 1)
                every_label = mapper(every_label[None, :, :, None])[0, :, :, 0].T
            maps = F.embedding(label_map.long(), every_label).permute(0, 3, 1, 2)  # (b, out, h, w)
        elif label_map.ndim == 4 and label_map.shape[1] == num_labels and label_map.is_floating_point():
            maps = label_map if mapper is None else mapper(label_map)
        else:
            raise ValueError(
                f"`label_map` is {label_map.dtype} of shape {tuple(label_map.shape)}: expected integers (batch, "
                f"height, width), or floating-point maps (batch, {num_labels}, height, width)."
            )
        for _ in range(self.config["num_stages"]):
            maps = F.interpolate(maps, scale_factor=self.config["multiplier"], mode=self.config["method"])
        return as_output(maps, return_dict)
