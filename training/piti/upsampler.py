"""Upsamplers of train_piti.py: large images of small ones, given a text (GLIDE) or what PITI draws from.

Wang et al., arXiv 2205.12952, section 3.4: the noise's error and the variational bound, as in every stage; and on the
clean image that a prediction amounts to a perceptual and an adversarial term. Original:
PITI-Synthesis/PITI@d9f7481:pretrained_diffusion/gaussian_diffusion.py, `training_losses`, and adv.py (MIT).

| | released code | paper |
|---|---|---|
| adversarial term | WGAN-GP | log GAN, whose discriminator marks what is generated |
| perceptual term | VGG-19, conv2_2 | several levels of VGG-19, not said which |
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from diffusers_ext.evaluation.image_quality import picture_grid, psnr
from diffusers_ext.losses.adversarial import (
    generator_loss,
    marking_discriminator_loss,
    marking_generator_loss,
    wasserstein_discriminator_loss,
)
from diffusers_ext.losses.perceptual import VGGDistance, perceptual_distance
from diffusers_ext.models.discriminator import PatchDiscriminator
from diffusers_ext.pipelines.glide.base import CHANNELS, upsample
from diffusers_ext.training.piti.args import PITIArgs
from diffusers_ext.training.piti.objective import DiffusionObjective, Prediction
from diffusers_ext.training.piti.validation import PITIValidation
from diffusers_ext.training_utils.adversarial import AdversarialObjective, Opponent
from diffusers_ext.training_utils.weights import load_whole, refuse_not_finite

# the discriminator's loss, the generator's, the weight of the gradient penalty
ADVERSARIAL_LOSSES = {
    "wgan_gp": (wasserstein_discriminator_loss, generator_loss, 10.0),
    "log": (marking_discriminator_loss, marking_generator_loss, 0.0),
}


class UpsamplerObjective(DiffusionObjective, AdversarialObjective):
    """The loss of an upsampler; a subclass knows what it is told besides the small image.

    Args:
        pipe: The pipeline, whose second stage is trained.
        args: The options.
        perceptual: A frozen network that compares images; none when unset.
    """

    def __init__(self, pipe: Any, args: PITIArgs, perceptual: nn.Module | None = None):
        super().__init__(pipe, args, pipe.upscale_scheduler)
        self.unet = pipe.upscale_unet
        self.frozen = {"perceptual": perceptual}  # in a dictionary it is no part of a checkpoint

    @property
    def denoiser(self) -> Any:
        return self.unet

    def maps(self, batch: dict[str, Any]) -> Tensor:
        """The small images, at the size of the large ones."""
        return upsample(batch["low"], tuple(batch["image"].shape[-2:]))

    def losses(self, batch: dict[str, Any], generators: list[Generator], step: int) -> dict[str, Tensor]:
        """As in the other stages, with the perceptual term from `--start_step` on; and what the discriminator sees."""
        found, perceptual = self.predict(batch, generators), self.frozen["perceptual"]
        parts, clean = self.terms(found), self.clean(found)
        if perceptual is not None and step >= self.args.start_step:
            parts[perceptual.name] = perceptual(clean, found.images)
            parts["loss"] = parts["loss"] + self.args.perceptual_weight * parts[perceptual.name]
        return self.mean(found, parts) | {"fake": clean, "real": found.images}

    def clean(self, found: Prediction) -> Tensor:
        """The clean images that the predicted noise amounts to, (b, 3, h, w), clamped to [-1, 1]."""
        abar = self.scheduler.alphas_cumprod.to(found.noisy.device)[found.timesteps].view(-1, 1, 1, 1)
        signal, level = abar.sqrt().float(), (1 - abar).sqrt().float()
        noise = found.output[:, :CHANNELS].float()
        return ((found.noisy - level * noise) / signal).clamp(-1, 1)


class TextUpsamplerObjective(UpsamplerObjective):
    """U-Net and text encoder of GLIDE's second stage."""

    def __init__(self, pipe: Any, args: PITIArgs, perceptual: nn.Module | None = None):
        super().__init__(pipe, args, perceptual)
        self.text_encoder = pipe.upscale_text_encoder

    def embeds(self, batch: dict[str, Any], keep: Tensor | None) -> Tensor:
        tokens = batch["tokens"]
        states, vector = self.text_encoder(tokens, tokens != self.pipe.tokenizer.pad_token_id, return_dict=False)
        return torch.cat([states, vector[:, None]], dim=1)


class MapUpsamplerObjective(UpsamplerObjective):
    """U-Net and encoder of PITI's second stage. No condition is dropped."""

    def __init__(self, pipe: Any, args: PITIArgs, perceptual: nn.Module | None = None):
        super().__init__(pipe, args, perceptual)
        self.encoder = pipe.upscale_encoder

    def embeds(self, batch: dict[str, Any], keep: Tensor | None) -> Tensor:
        tokens, vector = self.encoder(batch["condition"], return_dict=False)
        return torch.cat([tokens, vector[:, None]], dim=1)


class UpscaleValidation(PITIValidation):
    """Held-out pictures, enlarged from their small images."""

    def pictures(self) -> tuple[Image.Image, dict[str, float]]:
        """A sheet of the small images, of the large ones drawn of them, and of the true ones."""
        (batch, _), *_ = self.batches(min(self.args.num_validation_images, len(self.rows)))
        images, low = batch["image"], batch["low"]
        drawn = self.pipe.run_upsampler(
            low,
            self.objective.embeds(batch, None),
            num_inference_steps=self.args.num_inference_steps,
            generator=[torch.Generator().manual_seed(i) for i in range(len(images))],
        ).clamp(-1, 1)
        small = F.interpolate(low, tuple(images.shape[-2:]))  # nearest: pixels stay pixels
        sheet = picture_grid(torch.cat([small, drawn, images]), columns=len(images))
        return sheet, {"validation_psnr": psnr(drawn, images)}


def build_perceptual(args: PITIArgs, device: torch.device) -> nn.Module | None:
    """The frozen network of the perceptual term, if one is asked for.

    Raises:
        ValueError: It is not there, or no such network.
    """
    model = args.perceptual_model
    if not args.perceptual_weight:
        return None
    if model == "vgg19" or Path(model).is_file():
        levels = VGGDistance.RELEASED if args.perceptual_levels == "conv2_2" else VGGDistance.MULTI_LEVEL
        try:
            perceptual: Any = VGGDistance(levels, weights=None if model == "vgg19" else model)
        except (OSError, EOFError, RuntimeError, ValueError, UnpicklingError) as error:
            raise ValueError(f"--perceptual_model={model}: {error}") from error
    else:
        perceptual = perceptual_distance(model, load=load_whole)
    if perceptual is None:
        return None
    refuse_not_finite(perceptual, model)
    return perceptual.to(device)


def build_opponent(args: PITIArgs, resolution: int) -> Opponent | None:
    """PITI's discriminator, if one is asked for. As in its code it is trained first in each step.

    Raises:
        ValueError: The images are too small for its layers.
    """
    if not args.weight_of_adversarial:
        return None
    discriminator = PatchDiscriminator(
        base_channels=args.disc_channels, num_layers=args.disc_layers, norm_type="instance"
    )
    # instance normalisation needs two values, and the last two convolutions take one position each
    if resolution < discriminator.min_size:
        raise ValueError(
            f"--resolution={resolution} is too small for --disc_layers={args.disc_layers}, which needs "
            f"{discriminator.min_size} pixels a side."
        )
    loss, own_loss, penalty = ADVERSARIAL_LOSSES[args.adversarial_loss]
    return Opponent(
        discriminator,
        start=args.start_step,
        loss=loss,
        weight=args.weight_of_adversarial,
        learning_rate=args.disc_learning_rate,
        generator_loss=own_loss,
        penalty=penalty,
        goes_first=True,
    )
