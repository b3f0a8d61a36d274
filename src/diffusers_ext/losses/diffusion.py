"""Losses of Gaussian diffusion: of the predicted noise, and of a learned variance.

Noise: Rombach et al., arXiv 2112.10752, eq. 1-3 (after DDPM, arXiv 2006.11239, eq. 12 and 14); original:
CompVis/latent-diffusion@a506df5:ldm/models/diffusion/ddpm.py (MIT).
Variance: Nichol and Dhariwal, arXiv 2102.09672, eq. 15 and 16, which ADM, GLIDE, PITI and Cascaded Diffusion train
with; original: openai/guided-diffusion@22e0df8:guided_diffusion/gaussian_diffusion.py (MIT). Timesteps count from 0:
the paper's first step is number 0 here.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

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


def v_weights(alphas_cumprod: Tensor, highest: float) -> Tensor:
    """How often an error of the noise counts so that it becomes that of v, 1 / abar_t, float32 (T,).

    Salimans and Ho, arXiv 2202.00512, section 4 ("SNR + 1"). It grows without bound towards pure noise.

    Args:
        alphas_cumprod: abar, (T,).
        highest: No sample counts more than that; 1 is the plain error.
    """
    return (1 / alphas_cumprod).clamp(max=highest).float()


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


VARIATIONAL_KINDS = ("mse", "rescaled_mse", "kl", "rescaled_kl")
_HALF_BIN = 1 / 255  # half the distance of two 8-bit levels in [-1, 1]


class ReverseStep(NamedTuple):
    """What a network's output says about one step: N(mean, exp(log_variance)), and the clean image behind it."""

    mean: Tensor
    log_variance: Tensor
    pred_original_sample: Tensor


class VariationalLoss(nn.Module):
    """Losses of a network that predicts the noise and, in as many channels again, where its variance lies.

    The second half v of the output lies between the two natural variances of a step: log sigma^2 = f log beta_t +
    (1 - f) log beta~_t with f = (v + 1) / 2.

    Args:
        betas: Of the training schedule, (T,), T > 1; in float64, as the first ones lose digits in float32.
        kind: "mse": mean squared error of the noise, and the bound with the noise's half detached, so that it teaches
            the variance alone. "rescaled_mse": the same with the bound times T / 1000 (the hybrid loss: 0.001 of the
            whole bound). "kl": the bound alone. "rescaled_kl": T times the bound.

    Tables are computed in float64, and kept as float32 buffers that no checkpoint holds.

    Raises:
        ValueError: For another `kind`, or fewer than two betas.
    """

    def __init__(
        self, betas: Tensor, kind: Literal["mse", "rescaled_mse", "kl", "rescaled_kl"] = "rescaled_mse"
    ) -> None:
        super().__init__()
        if kind not in VARIATIONAL_KINDS:
            raise ValueError(f"`kind` is {kind!r}: it must be one of {', '.join(VARIATIONAL_KINDS)}.")
        if betas.ndim != 1 or len(betas) < 2:
            raise ValueError(f"`betas` has shape {tuple(betas.shape)}: pass those of at least two steps, (T,).")
        self.kind, self.num_timesteps = kind, len(betas)
        betas = betas.cpu().double()
        abar = (1 - betas).cumprod(0)
        previous = torch.cat([abar.new_ones(1), abar[:-1]])
        variance = posterior_variance(betas)
        tables = {
            "clean_from_sample": abar.rsqrt(),
            "clean_from_noise": (1 / abar - 1).sqrt(),
            "mean_from_clean": betas * previous.sqrt() / (1 - abar),
            "mean_from_sample": (1 - previous) * (1 - betas).sqrt() / (1 - abar),
            "log_betas": betas.log(),
            # beta~_0 is 0: it takes the value of the second step
            "log_posterior_variance": torch.cat([variance[1:2], variance[1:]]).log(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)
        self.final_signal, self.final_variance = float(abar[-1].sqrt()), float(1 - abar[-1])

    def forward(
        self, model_output: Tensor, noise: Tensor, clean: Tensor, noisy: Tensor, timesteps: Tensor
    ) -> dict[str, Tensor]:
        """The loss of each sample.

        Args:
            model_output: (b, 2 c, h, w).
            noise, clean, noisy: (b, c, h, w): eps, x_0 in [-1, 1], and x_t that was made of the two.
            timesteps: integers (b,).

        Returns:
            "loss" (b,), and what it is the sum of, as far as the kind has it: "mse" and "vb", (b,) each.
        """
        bound = self.bound_term(model_output, clean, noisy, timesteps, detach_noise=self.kind.endswith("mse"))
        if self.kind == "kl":
            return {"loss": bound, "vb": bound}
        if self.kind == "rescaled_kl":
            return {"loss": self.num_timesteps * bound, "vb": bound}
        error = noise_error(model_output.chunk(2, dim=1)[0], noise)
        bound = bound * (self.num_timesteps / 1000 if self.kind == "rescaled_mse" else 1)
        return {"loss": error + bound, "mse": error, "vb": bound}

    def bound_term(
        self,
        model_output: Tensor,
        clean: Tensor,
        noisy: Tensor,
        timesteps: Tensor,
        *,
        clip_sample: bool = False,
        detach_noise: bool = False,
    ) -> Tensor:
        """A term of the variational bound in bits a dimension, (b,).

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at timestep 0 the negative log likelihood of 8-bit levels.

        Args:
            model_output, clean, noisy, timesteps: As in `forward`.
            clip_sample: Whether the predicted clean image is clamped to [-1, 1], as in sampling.
            detach_noise: Whether no gradient reaches the half that predicts the noise.
        """
        if detach_noise:
            noise_half, variance_half = model_output.chunk(2, dim=1)
            model_output = torch.cat([noise_half.detach(), variance_half], dim=1)
        model = self.predict(model_output, noisy, timesteps, clip_sample=clip_sample)
        mean, log_variance = self.posterior(clean, noisy, timesteps)
        divergence = gaussian_divergence(mean, log_variance, model.mean, model.log_variance)
        likelihood = discretized_log_likelihood(clean.float(), model.mean, model.log_variance / 2)
        first = (timesteps == 0).view(-1, *[1] * (clean.ndim - 1))
        return torch.where(first, -likelihood, divergence).flatten(1).mean(1) / math.log(2)

    def prior(self, clean: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, I)) in bits a dimension, (b,): the one term that nothing is learned from."""
        mean = self.final_signal * clean.float()
        log_variance = torch.full_like(mean, math.log(self.final_variance))
        zero = torch.zeros_like(mean)
        return gaussian_divergence(mean, log_variance, zero, zero).flatten(1).mean(1) / math.log(2)

    def predict(
        self, model_output: Tensor, noisy: Tensor, timesteps: Tensor, *, clip_sample: bool = False
    ) -> ReverseStep:
        """p(x_{t-1} | x_t), float32.

        Raises:
            ValueError: If the output does not have twice the channels of the image.
        """
        if model_output.shape[1] != 2 * noisy.shape[1]:
            raise ValueError(
                f"`model_output` has {model_output.shape[1]} channels and `noisy` {noisy.shape[1]}: a learned "
                f"variance needs {2 * noisy.shape[1]}. Train the noise alone with `noise_error`."
            )
        noise, variance = model_output.float().chunk(2, dim=1)
        noisy = noisy.float()
        clean = self._at("clean_from_sample", timesteps, noisy) * noisy
        clean = clean - self._at("clean_from_noise", timesteps, noisy) * noise
        clean = clean.clamp(-1, 1) if clip_sample else clean
        fraction = (variance + 1) / 2
        log_variance = fraction * self._at("log_betas", timesteps, noisy)
        log_variance = log_variance + (1 - fraction) * self._at("log_posterior_variance", timesteps, noisy)
        return ReverseStep(self._posterior_mean(clean, noisy, timesteps), log_variance, clean)

    def posterior(self, clean: Tensor, noisy: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(x_{t-1} | x_t, x_0), float32 in the shape of the images."""
        mean = self._posterior_mean(clean.float(), noisy.float(), timesteps)
        return mean, self._at("log_posterior_variance", timesteps, mean).expand_as(mean)

    def _posterior_mean(self, clean: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        from_clean = self._at("mean_from_clean", timesteps, noisy) * clean
        return from_clean + self._at("mean_from_sample", timesteps, noisy) * noisy

    def _at(self, table: str, timesteps: Tensor, like: Tensor) -> Tensor:
        """Entries of a table, (b, 1, ...) with the dimensions of `like`."""
        return self.get_buffer(table)[timesteps].view(-1, *[1] * (like.ndim - 1))


def gaussian_divergence(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(other mean, other variance)) of each number, in nats."""
    ratio = log_variance - other_log_variance
    distance = (mean - other_mean).square() * (-other_log_variance).exp()
    return 0.5 * (ratio.exp() - ratio - 1 + distance)


def discretized_log_likelihood(pixels: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log of the probability that N(mean, std^2) gives to the 8-bit level of each pixel, in nats.

    Args:
        pixels: In [-1, 1], on the grid of 8-bit levels. The outermost levels reach to infinity.
        mean, log_std: In the shape of `pixels`.
    """
    centred, precision = pixels - mean, (-log_std).exp()
    upper = _normal_cdf(precision * (centred + _HALF_BIN))
    lower = _normal_cdf(precision * (centred - _HALF_BIN))
    inner = torch.where(pixels > 0.999, 1 - lower, upper - lower)
    return torch.where(pixels < -0.999, upper, inner).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The original's approximation of the standard normal's distribution function."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))
