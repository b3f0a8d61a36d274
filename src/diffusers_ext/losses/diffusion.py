"""Noise prediction losses of Gaussian diffusion.

Rombach et al., arXiv 2112.10752, eq. 1-3 (after DDPM, arXiv 2006.11239, eq. 12 and 14); original:
CompVis/latent-diffusion@a506df5:ldm/models/diffusion/ddpm.py (MIT).
"""

import torch
from torch import Tensor

LOSS_TYPES = ("l1", "l2")


def posterior_variance(betas: Tensor) -> Tensor:
    """beta~_t = beta_t (1 - abar_{t-1}) / (1 - abar_t), float64 (T,): the variance of q(x_{t-1} | x_t, x_0)."""
    betas = betas.cpu().double()
    alphas_cumprod = (1 - betas).cumprod(0)
    previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    return betas * (1 - previous) / (1 - alphas_cumprod)


def vlb_weights(betas: Tensor) -> Tensor:
    """Weight of the squared noise error in the variational bound, float32 (T,).

    beta_t^2 / (2 beta~_t alpha_t (1 - abar_t)). It is infinite at t = 0, which takes the weight of t = 1.

    Args:
        betas: (T,), T > 1; in float64, as the first weights lose digits in float32.
    """
    betas = betas.cpu().double()
    alphas_cumprod = (1 - betas).cumprod(0)
    weights = betas.square() / (2 * posterior_variance(betas) * (1 - betas) * (1 - alphas_cumprod))
    weights[0] = weights[1]
    return weights.float()


def noise_error(prediction: Tensor, noise: Tensor, loss_type: str = "l2") -> Tensor:
    """Mean |eps - eps'| (`l1`) or (eps - eps')^2 (`l2`) over all but the batch axis, (b,), in float32.

    Raises:
        ValueError: for another `loss_type`.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"`loss_type` is {loss_type!r}: it must be one of {', '.join(LOSS_TYPES)}.")
    difference = prediction.float() - noise.float()
    return (difference.abs() if loss_type == "l1" else difference.square()).flatten(1).mean(1)


def latent_diffusion_loss(
    prediction: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    weights: Tensor,
    *,
    loss_type: str = "l2",
    vlb_weight: float = 0.0,
    logvar: Tensor | None = None,
) -> dict[str, Tensor]:
    """The training objective of the original.

    mean(L_t / exp(s_t) + s_t) + vlb_weight * mean(w_t L_t), with L_t the error of a sample.

    Args:
        prediction, noise: (b, c, h, w).
        timesteps: integers (b,).
        weights: of the bound, (T,), from `vlb_weights`.
        loss_type: `l1` or `l2`.
        vlb_weight: of the bound in the loss; 0 in all released configurations.
        logvar: s, (T,), learned or fixed; None is 0.

    Returns:
        Scalars `loss`, `loss_simple` (mean L_t) and `loss_vlb` (mean w_t L_t, logged).
    """
    error = noise_error(prediction, noise, loss_type)
    bound = (weights.to(error.device)[timesteps] * error).mean()
    scaled = error
    if logvar is not None:
        s = logvar.to(error.device)[timesteps]
        scaled = error / s.exp() + s
    return {
        "loss": scaled.mean() + vlb_weight * bound,
        "loss_simple": error.mean().detach(),
        "loss_vlb": bound.detach(),
    }
