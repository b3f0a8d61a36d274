"""Paella's own f4 tokenizer (the paper's second text, arXiv 2211.07292): dome272/Paella@e1ab72b:src/vqgan.py.

Code and weights MIT. Each of its codes sees little more than its own pixels, and no statistic of the whole image:
equal patches get equal codes, which makes tokens easy to predict.

Letters in shape comments: b images, (h, w) the token grid, d latent channels.
"""

from importlib import import_module
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks.codebook import all_codes, nearest_codes
from .blocks.wrappers import with_forward_hooks

_MOVED = {  # names that stood here before each tokenizer had its own file, and that checkpoints and users may name
    "GumbelVQModel": "vq_gumbel",
    "most_probable_codes": "vq_gumbel",
    "Tokenizer": "token_codec",
    "bare_tokenizer": "token_codec",
    "codebook": "token_codec",
    "codebook_table": "token_codec",
    "codebook_weight": "token_codec",
    "decode_indices": "token_codec",
    "decode_latents": "token_codec",
    "downsample_factor": "token_codec",
    "encode_indices": "token_codec",
    "encode_latents": "token_codec",
}


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

    Images are in **[0, 1]** here, as in the original. The functions of `token_codec` take and give [-1, 1] for every
    tokenizer. Config and weights are those of the class of this name inside diffusers, which diffusers keeps only for
    its deprecated Wuerstchen pipelines.

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
            codes = self.vquantizer.embedding
            h = codes(nearest_codes(h, all_codes(codes, h.device))).permute(0, 3, 1, 2)
        sample = self.out_block(self.up_blocks(h))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Pictures (b, 3, 4h, 4w) in [0, 1], through the codes and back."""
        latents = self.encode(sample, return_dict=False)[0]
        return self.decode(latents, force_not_quantize=False, return_dict=return_dict)


def __getattr__(name: str) -> Any:
    if name in _MOVED:  # found on demand: both modules import this one, or what does
        return getattr(import_module(f".{_MOVED[name]}", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
