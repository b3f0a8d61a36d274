"""Losses and book-keeping of vector-quantised bottlenecks.

Papers: VQ-VAE, arXiv 1711.00937 (eq. 3); Gumbel-softmax relaxation as in DALL-E, arXiv 2102.12092 (section 2.1).
"""

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor
from torch.nn import functional as F


def vector_quantize(
    latents: Tensor, codebook: Tensor, indices: Tensor, *, beta: float = 0.25
) -> tuple[Tensor, Tensor]:
    """Replaces latents by their codes with the straight-through gradient.

    Args:
        latents: (b, d, h, w), the encoder's output.
        codebook: (k, d).
        indices: (b, h, w), the row of the codebook for each position.
        beta: Weight of the commitment term. (diffusers' `VectorQuantizer` puts it on the codebook term instead.)

    Returns:
        The codes (b, d, h, w), whose gradient goes to `latents`, and the loss |sg(z) - e|^2 + beta |z - sg(e)|^2, a
        scalar.
    """
    codes = F.embedding(indices, codebook).permute(0, 3, 1, 2)  # (b, d, h, w)
    loss = F.mse_loss(codes, latents.detach()) + beta * F.mse_loss(latents, codes.detach())
    return latents + (codes - latents).detach(), loss


def gumbel_quantize(
    logits: Tensor, codebook: Tensor, uniforms: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Draws a code per position, hard in value and soft in gradient (straight-through Gumbel-softmax).

    Args:
        logits: (b, k, h, w).
        codebook: (k, d).
        uniforms: (b, k, h, w) in [0, 1): the draws.
        temperature: Of the relaxation, > 0.

    Returns:
        The codes (b, d, h, w) and the mean divergence of softmax(logits) from the uniform distribution, in nats a
        position.
    """
    tiny = torch.finfo(torch.float32).tiny
    gumbel = -torch.log((-torch.log(uniforms.float().clamp_min(tiny))).clamp_min(tiny))
    soft = torch.softmax((logits.float() + gumbel) / temperature, dim=1)
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
    weights = hard - soft.detach() + soft
    with torch.autocast(weights.device.type, enabled=False):  # a code is taken as it is, not rounded
        codes = torch.einsum("bkhw,kd->bdhw", weights, codebook.float())
    log_p = torch.log_softmax(logits.float(), dim=1)
    divergence = (log_p.exp() * (log_p + np.log(logits.shape[1]))).sum(1).mean()
    return codes, divergence


def kmeans_codebook(latents: Tensor, num_codes: int, seed: int) -> Tensor:
    """Cluster centres (k-means++ start, 10 Lloyd iterations) of latents (n, d), as a first codebook (k, d).

    Raises:
        ValueError: there are fewer latents than codes.
    """
    if latents.shape[0] < num_codes:
        raise ValueError(
            f"A codebook of {num_codes} codes cannot start from {latents.shape[0]} latents: use more pictures "
            "(--kmeans_samples) or fewer codes."
        )
    rng = np.random.default_rng(seed)
    centres, _ = kmeans2(latents.cpu().double().numpy(), num_codes, iter=10, minit="++", missing="warn", rng=rng)
    return torch.from_numpy(centres).to(latents)


def codebook_perplexity(usage: Tensor) -> Tensor:
    """exp(entropy) of the code counts (k,): from 1 (one code used) to k (all used alike)."""
    p = usage.float() / usage.sum().clamp_min(1)
    return torch.exp(-(p * torch.log(p.clamp_min(1e-12))).sum())
