"""Images to codebook indices and back, for every tokenizer: `VQModel`, `GumbelVQModel` and `PaellaVQModel`.

Images are in [-1, 1] here, whatever the tokenizer takes. Its class decides how codes are chosen: the nearest one by
distance, or the most probable one of a `GumbelVQModel`.

Letters in shape comments: b images, (h, w) the token grid, d latent channels, k codes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Generator, Tensor, nn

from .blocks.codebook import all_codes, check_image, codes_of, decode_vq_indices, nearest_codes
from .blocks.wrappers import unwrap, with_forward_hooks
from .vq_gumbel import GumbelVQModel
from .vq_paella import PaellaVQModel

Tokenizer = VQModel | PaellaVQModel  # a GumbelVQModel is a VQModel


def bare_tokenizer(vqvae: Any) -> Tokenizer:
    """The tokenizer without what torch wraps around it: its class decides how codes are chosen.

    Raises:
        TypeError: for anything but a `VQModel`, a `GumbelVQModel` or a `PaellaVQModel`.
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
    return all_codes(codebook(vqvae), device)


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
    """Images (b, c, height, width) in [-1, 1] to latents (b, d, h, w) before the codes."""
    vqvae = bare_tokenizer(vqvae)
    if isinstance(vqvae, PaellaVQModel):
        image = image / 2 + 0.5
    return vqvae.encode(image, return_dict=False)[0]


def decode_latents(vqvae: Tokenizer, latents: Tensor) -> Tensor:
    """Latents (b, d, h, w), codes or not, to images (b, c, height, width), nominally in [-1, 1]."""
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
    """Images to codebook indices.

    Args:
        vqvae: A `VQModel` or `PaellaVQModel` (nearest code) or a `GumbelVQModel` (most probable code).
        image: (b, channels, height, width) in [-1, 1]. Sides are multiples of the downsampling factor.
        sample: Draw each index from softmax(logits) instead of taking the most probable one. Only `GumbelVQModel`
            has logits. The original Paella trains and edits with drawn indices.
        gumbel_noise: The draws of `sample`, (b, k, h, w), for replay.
        generator: Source of the draws, one image after the other; or a list with one for each image.

    Returns:
        int64 (b, h, w).

    Raises:
        ValueError: for an image of unfit shape, for `sample` without a `GumbelVQModel`, or a list of unfit length.
    """
    vqvae = bare_tokenizer(vqvae)
    if isinstance(vqvae, GumbelVQModel):
        return vqvae.encode_indices(image, sample=sample, gumbel_noise=gumbel_noise, generator=generator)
    check_image(image, vqvae.config["in_channels"], downsample_factor(vqvae))
    if sample or gumbel_noise is not None:
        raise ValueError(
            f"`sample=True` needs a GumbelVQModel: a {type(vqvae).__name__} takes the nearest code and has no logits."
        )
    return _nearest_indices(vqvae, encode_latents(vqvae, image.to(vqvae.dtype)))


def decode_indices(vqvae: Tokenizer, indices: Tensor) -> Tensor:
    """Codebook indices to images. The grid need not be square.

    Args:
        vqvae: A `VQModel`, a `GumbelVQModel` or a `PaellaVQModel`.
        indices: int64 (b, h, w), values 0..num_vq_embeddings-1.

    Returns:
        (b, channels, height, width), nominally in [-1, 1]. The decoder may overshoot; nothing is clamped.

    Raises:
        ValueError: for a shape other than (b, h, w), or for indices beyond the codebook (checked on a CPU only).
    """
    return _decode(bare_tokenizer(vqvae), indices)


@with_forward_hooks
def _nearest_indices(vqvae: Tokenizer, latents: Tensor) -> Tensor:
    return nearest_codes(latents, codebook_table(vqvae, latents.device))


@with_forward_hooks  # brings an offloaded tokenizer back before its codebook is asked
def _decode(vqvae: Tokenizer, indices: Tensor) -> Tensor:
    if isinstance(vqvae, PaellaVQModel):
        return decode_latents(vqvae, codes_of(vqvae.vquantizer.embedding, indices))
    return decode_vq_indices(vqvae, indices)
