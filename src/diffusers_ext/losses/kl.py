"""Likelihood, prior and latent scale of KL-regularised autoencoders.

Latent Diffusion, arXiv 2112.10752, sections 3.1 and D.1 and appendix G. The reductions are those of the code:
CompVis/latent-diffusion@a506df5:ldm/modules/losses/contperceptual.py (KL: a sum over the elements) and
vqperceptual.py (VQ: a mean).
"""

from typing import Literal

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)  # of the posterior, as in the original and in diffusers


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and clamped log-variance, (b, d, h, w) each, of posterior moments (b, 2 d, h, w), in float32."""
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def kl_divergence(moments: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)) = 1/2 sum(mu^2 + sigma^2 - 1 - log sigma^2) of each sample, in nats.

    Args:
        moments: (b, 2 d, h, w), mean and log-variance one after the other: the `parameters` of diffusers'
            `DiagonalGaussianDistribution`.

    Returns:
        float32 (b,): a sum over channels and positions. The paper's loss has its mean over the batch.
    """
    mean, logvar = split_moments(moments)
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)


def sample_posterior(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents mu + sigma * noise, float32 (b, d, h, w), of moments (b, 2 d, h, w) and Gaussian noise (b, d, h, w)."""
    mean, logvar = split_moments(moments)
    return mean + torch.exp(0.5 * logvar) * noise


def reconstruction_nll(
    error: Tensor,
    num_elements: int,
    *,
    logvar: Tensor | float = 0.0,
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """The reconstruction term: a Laplace-like negative log-likelihood with one scale for all elements.

    With r = |x - x'| + w * perceptual(x, x') per element (the perceptual distance of a sample counts at each of its
    elements) and n elements a sample, `sum` is 1/b sum(r e^-s + s) = n (mean(r) e^-s + s), the KL models' form, and
    `mean` is mean(r) e^-s + s, the VQ models' with s = 0.

    Args:
        error: mean(r) over samples and elements, a scalar. The mean of r is the sum of the terms' own means.
        num_elements: n = channels * height * width of a picture.
        logvar: s, a scalar. The original keeps it at 0: its parameter is in no optimiser.
        reduction: `sum` or `mean`.

    Returns:
        A scalar.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"`reduction` must be 'sum' or 'mean', got {reduction!r}.")
    if isinstance(logvar, Tensor) or logvar != 0.0:
        logvar = torch.as_tensor(logvar, dtype=error.dtype, device=error.device)
        error = error * torch.exp(-logvar) + logvar
    return num_elements * error if reduction == "sum" else error


def latent_scale(latents: Tensor) -> float:
    """1 / std of latents (b, d, h, w) over all their elements: times this number they have unit variance.

    One number (the code; the paper writes "component-wise") with the unbiased estimate of the standard deviation, of
    posterior samples: CompVis/latent-diffusion@a506df5:ldm/models/diffusion/ddpm.py, `scale_by_std`.

    Raises:
        ValueError: the latents are all alike or not finite.
    """
    std = float(latents.cpu().double().std()) if latents.numel() > 1 else 0.0
    if not 0.0 < std < float("inf"):
        raise ValueError(
            f"The standard deviation of the latents is {std}: they have no scale. Look at the reconstructions; with "
            "--scale_samples 0 --resume_from_checkpoint latest, scaling_factor stays what it is."
        )
    return 1.0 / std
