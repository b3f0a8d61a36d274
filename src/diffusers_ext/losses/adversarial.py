"""Adversarial terms of training: of autoencoders (VQGAN, arXiv 2012.09841, section 3.1 and eq. 6-7) and of PITI's
upsampler (arXiv 2205.12952, section 3.2)."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def hinge_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """(E[relu(1 - D(x))] + E[relu(1 + D(x'))]) / 2, a scalar."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """(E[softplus(-D(x))] + E[softplus(D(x'))]) / 2, a scalar: the cross-entropy of the original GAN.

    Source: CompVis/taming-transformers@3ba01b2:taming/modules/losses/vqperceptual.py, `disc_loss: vanilla`.
    """
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def generator_loss(logits_fake: Tensor) -> Tensor:
    """-E[D(x')], a scalar."""
    return -logits_fake.mean()


def wasserstein_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """E[D(x')] - E[D(x)], a scalar; `gradient_penalty` belongs to it. Its generator's loss is `generator_loss`.

    WGAN-GP (arXiv 1704.00028); PITI-Synthesis/PITI@d9f7481:pretrained_diffusion/gaussian_diffusion.py.
    """
    return logits_fake.mean() - logits_real.mean()


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, epsilon: Tensor, weight: float = 10.0
) -> Tensor:
    """weight E[(|grad D(x~)| - 1)^2] at x~ between fakes and real images, a scalar (WGAN-GP, eq. 3).

    Args:
        discriminator: images (b, c, h, w) -> scores.
        real, fake: images (b, c, h, w).
        epsilon: how real each mixture is, (b, 1, 1, 1), uniform from 0 to 1.
    """
    between = torch.lerp(fake.detach(), real.detach(), epsilon).requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(between).sum(), between, create_graph=True)
    return weight * (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def marking_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """-E[log D(x')] - E[log(1 - D(x))], a scalar, for a discriminator that marks what is generated.

    D is the sigmoid of the logits: 1 says "generated". That is PITI's form (arXiv 2205.12952, section 3.2), the other
    way round than in `vanilla_discriminator_loss`.
    """
    return F.softplus(-logits_fake).mean() + F.softplus(logits_real).mean()


def marking_generator_loss(logits_fake: Tensor) -> Tensor:
    """E[log D(x')], a scalar: the generator lowers it, so that a discriminator that marks what is generated fails."""
    return F.logsigmoid(logits_fake).mean()


def delayed_factor(step: int, start: int, factor: float = 1.0) -> float:
    """`factor` from step `start` on, 0 before: for both adversarial terms, so the discriminator starts late as well.

    A step is one generator step with its discriminator step; count no optimiser twice.
    """
    return factor if step >= start else 0.0


def adaptive_weight(
    reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, scale: Tensor | float = 1.0
) -> Tensor:
    """Balances the two losses by their gradients at the decoder's last layer (eq. 7), clamped to [0, 1e4].

    Args:
        scale: Of fp16's losses: on their way back gradients are so much larger, and do not vanish.
    """
    reconstruction_grad = torch.autograd.grad(reconstruction_loss * scale, last_layer, retain_graph=True)[0] / scale
    adversarial_grad = torch.autograd.grad(adversarial_loss * scale, last_layer, retain_graph=True)[0] / scale
    return (reconstruction_grad.norm() / (adversarial_grad.norm() + 1e-4)).clamp(0.0, 1e4).detach()
