"""Pictures to codebook indices and back: the tokenizers of Paella.

`GumbelVQModel` is the f8 Gumbel-VQGAN of Paella v1: ruDALL-E's, ai-forever/ru-dalle@0255cec (Apache-2.0, weights
Apache-2.0), after taming-transformers (Esser, Rombach, Ommer, arXiv 2012.09841). Encoder and decoder are those of
diffusers' `VQModel`; one 1x1 convolution to logits over the codebook chooses the code.

`PaellaVQModel` is Paella's own f4 tokenizer (the paper's second text): dome272/Paella@e1ab72b:src/vqgan.py (MIT,
weights MIT). Each of its codes sees little more than its own pixels, and no statistic of the whole picture: equal
patches get equal codes, which makes tokens easy to predict.

The functions serve both and a stock `VQModel` of any downsampling factor alike. Difference from the original: indices
of a `GumbelVQModel` are the most probable ones by default; Paella's own helper always draws them (`sample=True`).

Letters in shape comments: b images, (h, w) the token grid, d latent channels, k codes, n = b*h*w rows.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput, VQModel
from diffusers.models.modeling_utils import ModelMixin
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .blocks.wrappers import unwrap, with_forward_hooks

_ROWS_PER_CHUNK = 4096  # bounds the scores to rows x codes floats: 134 MB for 8192 codes


class _CodeLogits(nn.Conv2d):
    """The 1x1 convolution to logits over the codebook."""

    def forward(self, input: Tensor, choose: Callable[..., Tensor] | None = None) -> Tensor:
        """Logits (b, k, h, w) of latents (b, d, h, w); or what `choose(latents, self)` makes of both.

        The weights are read in here, where whatever was offloaded or cast for storage has come back.
        """
        return super().forward(input) if choose is None else choose(input, self)


class GumbelVQModel(VQModel):
    """A `VQModel` whose codes are chosen by a learned projection instead of by distance.

    The arguments are those of `diffusers.VQModel`. The released f8 tokenizer has `block_out_channels=(128, 128, 256,
    512)`, attention on the last level (`AttnDownEncoderBlock2D`, `AttnUpDecoderBlock2D`), `layers_per_block=2`,
    `latent_channels=256`, `num_vq_embeddings=8192`. As in `VQModel`, `force_upcast` is recorded and changes nothing:
    the network computes in its own dtype.
    """

    _supports_group_offloading = True  # unlike the parent, which reads its codebook behind the back of the module

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 0.18215,
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
    ):
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            sample_size=sample_size,
            num_vq_embeddings=num_vq_embeddings,
            norm_num_groups=norm_num_groups,
            vq_embed_dim=vq_embed_dim,
            scaling_factor=scaling_factor,
            norm_type=norm_type,
            mid_block_add_attention=mid_block_add_attention,
            lookup_from_codebook=lookup_from_codebook,
            force_upcast=force_upcast,
        )
        self.quantize_proj = _CodeLogits(self.quantize.vq_embed_dim, num_vq_embeddings, 1)

    def encode_indices(
        self,
        image: Tensor,
        *,
        sample: bool = False,
        gumbel_noise: Tensor | None = None,
        generator: Generator | Sequence[Generator] | None = None,
    ) -> Tensor:
        """The module's `encode_indices` as a method."""
        return encode_indices(self, image, sample=sample, gumbel_noise=gumbel_noise, generator=generator)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """The module's `decode_indices` as a method."""
        return decode_indices(self, indices)

    encode = with_forward_hooks(VQModel.encode)

    @with_forward_hooks
    def decode(
        self,
        h: Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, ...] | None = None,
    ) -> DecoderOutput | Tensor:
        """Decodes latents (batch, d, h, w) to pictures as `VQModel.decode`, but with the projection's codes."""
        if force_not_quantize:
            return super().decode(h, force_not_quantize=True, return_dict=return_dict, shape=shape)
        sample = decode_indices(self, _chosen_codes(self, h, most_probable_codes))
        commit_loss = sample.new_zeros(h.shape[0])  # nothing to commit to
        if not return_dict:
            return sample, commit_loss  # type: ignore[return-value] # as the parent, whose annotation is wrong
        return DecoderOutput(sample=sample, commit_loss=commit_loss)  # type: ignore[arg-type]


class _MixingBlock(nn.Module):
    """Depthwise and channel-wise mixing, each of a modulated layer norm, each scaled by a learned number."""

    def __init__(self, channels: int):
        super().__init__()
        # index 0 stands where the original pads; its padding is the convolution's here
        convolution = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, padding_mode="replicate")
        self.depthwise = nn.Sequential(nn.Identity(), convolution)
        self.channelwise = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.gammas = nn.Parameter(torch.zeros(6))  # both branches are closed at first

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) to the same shape."""
        gammas = self.gammas
        x = x + self.depthwise(self._normed(x, gammas[0], gammas[1]).permute(0, 3, 1, 2)) * gammas[2]
        mixed = self.channelwise(self._normed(x, gammas[3], gammas[4]))
        return x + mixed.permute(0, 3, 1, 2) * gammas[5]

    @staticmethod
    def _normed(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """(b, c, h, w) to (b, h, w, c)."""
        return F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), eps=1e-6) * (1 + scale) + shift


class _Codebook(nn.Module):
    """Holds the codes under the name that diffusers' checkpoints of this network use."""

    def __init__(self, num_vq_embeddings: int, latent_channels: int):
        super().__init__()
        self.embedding = nn.Embedding(num_vq_embeddings, latent_channels)
        nn.init.uniform_(self.embedding.weight, -1 / num_vq_embeddings, 1 / num_vq_embeddings)


class PaellaVQModel(ModelMixin, ConfigMixin):
    """Paella's f4 tokenizer: a few convolutional blocks around a codebook, batch norm before it.

    Pictures are in **[0, 1]** here, as in the original; `encode_indices` and `decode_indices` take and give [-1, 1]
    for every tokenizer. Config and weights are those of the class of this name inside diffusers (which it only keeps
    for its deprecated Wuerstchen pipelines).

    Args:
        in_channels, out_channels: of the pictures.
        up_down_scale_factor: pixels a side that are folded into channels before the first block.
        levels: widths `embed_dim / 2^(levels-1) ... embed_dim`, with a factor of 2 between them.
        bottleneck_blocks: blocks of the decoder's deepest level.
        embed_dim: width of the deepest level.
        latent_channels: width of a code.
        num_vq_embeddings: codes.
        scale_factor: by which the original divides latents for other networks; tokens do not depend on it.

    Raises:
        ValueError: if `embed_dim` cannot be halved for every level.
    """

    _skip_layerwise_casting_patterns = ["vquantizer"]  # as `VQModel`: rounded codes are other codes

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        up_down_scale_factor: int = 2,
        levels: int = 2,
        bottleneck_blocks: int = 12,
        embed_dim: int = 384,
        latent_channels: int = 4,
        num_vq_embeddings: int = 8192,
        scale_factor: float = 0.3764,
    ):
        super().__init__()
        if embed_dim % 2 ** (levels - 1):
            raise ValueError(
                f"`embed_dim` is {embed_dim}: with {levels} levels it must be a multiple of {2 ** (levels - 1)}."
            )
        widths = [embed_dim // 2 ** (levels - 1 - level) for level in range(levels)]
        folded = up_down_scale_factor**2
        self.in_block = nn.Sequential(
            nn.PixelUnshuffle(up_down_scale_factor), nn.Conv2d(in_channels * folded, widths[0], 1)
        )
        down: list[nn.Module] = []
        for level, width in enumerate(widths):
            if level > 0:
                down.append(nn.Conv2d(widths[level - 1], width, 4, stride=2, padding=1))
            down.append(_MixingBlock(width))
        down.append(
            nn.Sequential(nn.Conv2d(embed_dim, latent_channels, 1, bias=False), nn.BatchNorm2d(latent_channels))
        )
        self.down_blocks = nn.Sequential(*down)
        self.vquantizer = _Codebook(num_vq_embeddings, latent_channels)
        up: list[nn.Module] = [nn.Sequential(nn.Conv2d(latent_channels, embed_dim, 1))]
        for level in reversed(range(levels)):
            up += [_MixingBlock(widths[level]) for _ in range(bottleneck_blocks if level == levels - 1 else 1)]
            if level > 0:
                up.append(nn.ConvTranspose2d(widths[level], widths[level - 1], 4, stride=2, padding=1))
        self.up_blocks = nn.Sequential(*up)
        self.out_block = nn.Sequential(
            nn.Conv2d(widths[0], out_channels * folded, 1), nn.PixelShuffle(up_down_scale_factor)
        )

    @with_forward_hooks
    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """Pictures (b, 3, 4h, 4w) in [0, 1] to latents (b, d, h, w) before the codes, unscaled."""
        latents = self.down_blocks(self.in_block(x))
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    @with_forward_hooks
    def decode(
        self, h: Tensor, force_not_quantize: bool = True, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Codes or latents (b, d, h, w), unscaled, to pictures (b, 3, 4h, 4w), nominally in [0, 1]."""
        if not force_not_quantize:
            h = codebook(self)(nearest_codes(h, codebook_table(self, h.device))).permute(0, 3, 1, 2)
        sample = self.out_block(self.up_blocks(h))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Pictures (b, 3, 4h, 4w) in [0, 1], through the codes and back."""
        latents = self.encode(sample, return_dict=False)[0]
        return self.decode(latents, force_not_quantize=False, return_dict=return_dict)


Tokenizer = VQModel | PaellaVQModel  # a GumbelVQModel is a VQModel


def bare_tokenizer(vqvae: Any) -> Tokenizer:
    """The tokenizer without what torch wraps around it: its class decides how codes are chosen.

    Raises:
        TypeError: for anything else than a `VQModel`, a `GumbelVQModel` or a `PaellaVQModel`.
    """
    bare = unwrap(vqvae)
    if not isinstance(bare, (VQModel, PaellaVQModel)):
        raise TypeError(
            f"`vqvae` is a {type(bare).__name__}: a tokenizer is a VQModel, a GumbelVQModel or a PaellaVQModel. If it "
            "wraps one, pass that."
        )
    return bare


def codebook(vqvae: Tokenizer) -> nn.Embedding:
    """The codes as a module: called with indices it gives codes, wherever its weights are kept."""
    vqvae = bare_tokenizer(vqvae)
    return (vqvae.vquantizer if isinstance(vqvae, PaellaVQModel) else vqvae.quantize).embedding


def codebook_table(vqvae: Tokenizer, device: torch.device | str) -> Tensor:
    """All codes (k, d), as their module gives them on the device where it computes."""
    embedding = codebook(vqvae)
    return embedding(torch.arange(embedding.num_embeddings, device=device))


@with_forward_hooks
def _nearest_codes(vqvae: Tokenizer, latents: Tensor) -> Tensor:
    """Indices (b, h, w) of the codes that are nearest to latents (b, d, h, w)."""
    return nearest_codes(latents, codebook_table(vqvae, latents.device))


@with_forward_hooks
def _chosen_codes(vqvae: GumbelVQModel, latents: Tensor, choose: Callable[..., Tensor]) -> Tensor:
    """What `choose` makes of latents (b, d, h, w) and the projection to logits: indices (b, h, w)."""
    return vqvae.quantize_proj(latents, choose)


def codebook_weight(vqvae: Tokenizer) -> Tensor:
    """The parameter that holds the codes (k, d), to train or to fill it; `codebook_table` reads offloaded ones too."""
    return codebook(vqvae).weight


def downsample_factor(vqvae: Tokenizer) -> int:
    """How many pixels a side one token stands for, or one latent of another autoencoder (train_autoencoder.py)."""
    vqvae = unwrap(vqvae)
    if isinstance(vqvae, PaellaVQModel):
        return vqvae.config["up_down_scale_factor"] * 2 ** (vqvae.config["levels"] - 1)
    return 2 ** (len(vqvae.config["block_out_channels"]) - 1)


def encode_latents(vqvae: Tokenizer, image: Tensor) -> Tensor:
    """Pictures (b, c, height, width) in [-1, 1] to latents (b, d, h, w) before the codes."""
    vqvae = bare_tokenizer(vqvae)
    if isinstance(vqvae, PaellaVQModel):
        image = image / 2 + 0.5
    return vqvae.encode(image, return_dict=False)[0]


def decode_latents(vqvae: Tokenizer, latents: Tensor) -> Tensor:
    """Latents (b, d, h, w), codes or not, to pictures (b, c, height, width), nominally in [-1, 1]."""
    vqvae = bare_tokenizer(vqvae)
    image = vqvae.decode(latents, force_not_quantize=True, return_dict=False)[0]
    return image * 2 - 1 if isinstance(vqvae, PaellaVQModel) else image


@torch.no_grad()
def encode_indices(
    vqvae: Tokenizer,
    image: Tensor,
    *,
    sample: bool = False,
    gumbel_noise: Tensor | None = None,
    generator: Generator | Sequence[Generator] | None = None,
) -> Tensor:
    """Pictures to codebook indices.

    Args:
        vqvae: a `VQModel` or `PaellaVQModel` (nearest code) or a `GumbelVQModel` (most probable code).
        image: (batch, channels, height, width) in [-1, 1]; sides are multiples of the downsampling factor.
        sample: draw each index from softmax(logits) instead of taking the most probable one. Only `GumbelVQModel`
            has logits. The original Paella trains and edits with drawn indices.
        gumbel_noise: the draws of `sample`, (batch, k, h, w), for replay.
        generator: source of the draws, one image after the other; or a list with one for each image.

    Returns:
        int64 (batch, h, w).

    Raises:
        ValueError: for a picture of unfit shape, for `sample` without a `GumbelVQModel`, or a list of unfit length.
    """
    vqvae = bare_tokenizer(vqvae)
    factor = downsample_factor(vqvae)
    in_channels = vqvae.config["in_channels"]
    if image.ndim != 4 or image.shape[1] != in_channels:
        raise ValueError(
            f"`image` has shape {tuple(image.shape)}, the tokenizer takes (batch, {in_channels}, height, width)."
        )
    height, width = image.shape[2:]
    if height % factor or width % factor:
        nearest = [max(factor, round(side / factor) * factor) for side in (height, width)]
        raise ValueError(
            f"`image` is {height}x{width} pixels, the tokenizer takes multiples of {factor}; the nearest valid size "
            f"is {nearest[0]}x{nearest[1]}."
        )
    sample = sample or gumbel_noise is not None
    if sample and not isinstance(vqvae, GumbelVQModel):
        raise ValueError(
            f"`sample=True` needs a GumbelVQModel: a {type(vqvae).__name__} takes the nearest code and has no logits."
        )
    latents = encode_latents(vqvae, image.to(vqvae.dtype))  # (b, d, h, w)
    if not isinstance(vqvae, GumbelVQModel):
        return _nearest_codes(vqvae, latents)
    if not sample:
        return _chosen_codes(vqvae, latents, most_probable_codes)
    return _chosen_codes(vqvae, latents, partial(_draw_codes, gumbel_noise=gumbel_noise, generator=generator))


def decode_indices(vqvae: Tokenizer, indices: Tensor) -> Tensor:
    """Codebook indices to pictures; the grid need not be square.

    Args:
        vqvae: a `VQModel`, a `GumbelVQModel` or a `PaellaVQModel`.
        indices: int64 (batch, h, w), values 0..num_vq_embeddings-1.

    Returns:
        (batch, channels, height, width), nominally in [-1, 1]; the decoder may overshoot, nothing is clamped.

    Raises:
        ValueError: for a shape other than (batch, h, w), or for indices beyond the codebook (checked on a CPU only).
    """
    if indices.ndim != 3:
        raise ValueError(f"`indices` has shape {tuple(indices.shape)}, the tokenizer takes (batch, h, w).")
    return _decode_indices(bare_tokenizer(vqvae), indices)


@with_forward_hooks  # brings an offloaded tokenizer back before its codebook is asked
def _decode_indices(vqvae: Tokenizer, indices: Tensor) -> Tensor:
    try:
        codes = codebook(vqvae)(indices).permute(0, 3, 1, 2)  # (b, d, h, w)
    except IndexError as error:
        raise ValueError(
            f"`indices` go from {indices.min().item()} to {indices.max().item()}, the codebook has "
            f"0..{vqvae.config['num_vq_embeddings'] - 1}: they come from another tokenizer."
        ) from error
    if (
        not isinstance(vqvae, PaellaVQModel) and vqvae.config["lookup_from_codebook"]
    ):  # such a model looks unquantized input up by itself
        shape = (indices.shape[0], *codes.shape[2:], codes.shape[1])
        return vqvae.decode(indices, force_not_quantize=True, return_dict=False, shape=shape)[0]
    return decode_latents(vqvae, codes)


@torch.no_grad()
def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest row of the codebook by squared L2, in float32.

    |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 changes no order: one matrix product a chunk of rows, instead of the
    (n, k, d) differences.

    Args:
        latents: (batch, d, h, w).
        codebook: (k, d).

    Returns:
        int64 (batch, h, w).
    """
    codebook = codebook.float()
    offsets = codebook.square().sum(dim=1)  # (k,)
    with torch.autocast(latents.device.type, enabled=False):
        chunks = [torch.addmm(offsets, rows, codebook.T, alpha=-2).argmin(dim=1) for rows in _rows(latents)]
    return torch.cat(chunks).view(latents.shape[0], *latents.shape[2:])


@torch.no_grad()
def most_probable_codes(latents: Tensor, proj: nn.Conv2d) -> Tensor:
    """Index of the greatest logit of the 1x1 convolution `proj` for each of (batch, d, h, w), in float32."""
    weight, bias = _affine(proj)
    with torch.autocast(latents.device.type, enabled=False):
        chunks = [torch.addmm(bias, rows, weight.T).argmax(dim=1) for rows in _rows(latents)]
    return torch.cat(chunks).view(latents.shape[0], *latents.shape[2:])


@torch.no_grad()
def _draw_codes(
    latents: Tensor,
    proj: nn.Conv2d,
    gumbel_noise: Tensor | None = None,
    generator: Generator | Sequence[Generator] | None = None,
) -> Tensor:
    """argmax(logits + Gumbel noise) is distributed as softmax(logits); image by image, so memory stays bounded."""
    batch, _, height, width = latents.shape
    shape = (proj.out_channels, height, width)
    if gumbel_noise is not None and gumbel_noise.shape != (batch, *shape):
        raise ValueError(f"`gumbel_noise` has shape {tuple(gumbel_noise.shape)}, expected {(batch, *shape)}.")
    generators = [generator] * batch if generator is None or isinstance(generator, Generator) else list(generator)
    if len(generators) != batch:
        raise ValueError(f"`generator` is a list of {len(generators)} for {batch} images: give one for each image.")
    weight, bias = _affine(proj)
    indices = []
    for image, image_generator in enumerate(generators):
        if gumbel_noise is None:
            device = latents.device if image_generator is None else image_generator.device
            exponentials = torch.empty(shape, device=device).exponential_(generator=image_generator)
            noise = -exponentials.to(latents.device).log()
        else:
            noise = gumbel_noise[image].to(latents.device)
        with torch.autocast(latents.device.type, enabled=False):
            rows = latents[image].float().flatten(1).T  # (h*w, d)
            logits = torch.addmm(bias, rows, weight.T)  # (h*w, k)
        indices.append((logits + noise.flatten(1).T).argmax(dim=1))
    return torch.stack(indices).view(batch, height, width)


def _rows(latents: Tensor) -> tuple[Tensor, ...]:
    """(b, d, h, w) to chunks of rows (n, d), float32."""
    return latents.float().permute(0, 2, 3, 1).flatten(0, 2).split(_ROWS_PER_CHUNK)


def _affine(proj: nn.Conv2d) -> tuple[Tensor, Tensor]:
    if proj.bias is None:
        raise ValueError("`proj` has no bias: expected the 1x1 convolution of a GumbelVQModel.")
    return proj.weight.float().flatten(1), proj.bias.float()
