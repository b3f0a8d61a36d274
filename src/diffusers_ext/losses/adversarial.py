"""Adversarial terms of autoencoder training (VQGAN, arXiv 2012.09841, section 3.1 and eq. 6-7)."""

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


def delayed_factor(step: int, start: int, factor: float = 1.0) -> float:
    """`factor` from step `start` on, 0 before: for both adversarial terms, so the discriminator starts late as well.

    A step is one generator step with its discriminator step; count no optimiser twice.
    """
    return factor if step >= start else 0.0


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Balances the two losses by their gradients at the decoder's last layer (eq. 7), clamped to [0, 1e4]."""
    reconstruction_grad = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)[0]
    adversarial_grad = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)[0]
    return (reconstruction_grad.norm() / (adversarial_grad.norm() + 1e-4)).clamp(0.0, 1e4).detach()
