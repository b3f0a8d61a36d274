"""What every tokenizer asks of its codebook: rows of latents, nearest codes, codes by index, fitting images.

Letters in shape comments: b images, (h, w) the token grid, d latent channels, k codes, n = b*h*w rows.
"""

import torch
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor, nn

_ROWS_PER_CHUNK = 4096  # bounds the scores to rows x codes floats: 134 MB for 8192 codes


def latent_rows(latents: Tensor) -> tuple[Tensor, ...]:
    """Latents (b, d, h, w) as chunks of rows (n, d), float32."""
    return latents.float().permute(0, 2, 3, 1).flatten(0, 2).split(_ROWS_PER_CHUNK)


def all_codes(embedding: nn.Embedding, device: torch.device | str) -> Tensor:
    """All codes (k, d), as their module gives them on the device where it computes."""
    return embedding(torch.arange(embedding.num_embeddings, device=device))


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
        chunks = [torch.addmm(offsets, rows, codebook.T, alpha=-2).argmin(dim=1) for rows in latent_rows(latents)]
    return torch.cat(chunks).view(latents.shape[0], *latents.shape[2:])


def codes_of(embedding: nn.Embedding, indices: Tensor) -> Tensor:
    """Codes (b, d, h, w) of indices (b, h, w).

    Raises:
        ValueError: for another shape, or for indices beyond the codebook (checked on a CPU only).
    """
    if indices.ndim != 3:
        raise ValueError(f"`indices` has shape {tuple(indices.shape)}, the tokenizer takes (batch, h, w).")
    try:
        return embedding(indices).permute(0, 3, 1, 2)
    except IndexError as error:
        raise ValueError(
            f"`indices` go from {indices.min().item()} to {indices.max().item()}, the codebook has "
            f"0..{embedding.num_embeddings - 1}: they come from another tokenizer."
        ) from error


def decode_vq_indices(vqvae: VQModel, indices: Tensor) -> Tensor:
    """Images (b, c, H, W) of indices (b, h, w), by a `VQModel` or a model derived from it."""
    codes = codes_of(vqvae.quantize.embedding, indices)
    if not vqvae.config["lookup_from_codebook"]:
        return vqvae.decode(codes, force_not_quantize=True, return_dict=False)[0]
    # such a model looks unquantized input up by itself
    shape = (indices.shape[0], *codes.shape[2:], codes.shape[1])
    return vqvae.decode(indices, force_not_quantize=True, return_dict=False, shape=shape)[0]


def check_image(image: Tensor, in_channels: int, factor: int) -> None:
    """An image that the tokenizer can encode.

    Args:
        image: (b, channels, H, W).
        in_channels: Channels that the tokenizer takes.
        factor: Pixels a side that one token stands for.

    Raises:
        ValueError: for another number of dimensions or channels, or a side that is no multiple of `factor`.
    """
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
