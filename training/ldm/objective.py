"""What train_ldm.py learns: U-Net and conditioner in one module, and the loss of the noise that they find.

Rombach et al., arXiv 2112.10752, eq. 1-3 and section 3.3.
"""

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from diffusers_ext.losses.diffusion import latent_diffusion_loss, vlb_weights
from diffusers_ext.pipelines.ldm.base import LDMBasePipeline
from diffusers_ext.pipelines.ldm.denoising import call_unet
from diffusers_ext.pipelines.ldm.first_stage import FirstStage
from diffusers_ext.training.ldm.tasks.base import Task
from diffusers_ext.training_utils.kernels import plain_attention
from diffusers_ext.training_utils.objective import (
    Objective,
    check_predicts_noise,
    draw_integers,
    draw_posterior,
    keep_condition,
)


class LDMObjective(Objective):
    """The U-Net, and the conditioner before it where the task has one.

    The scale of the latents is a buffer, so that a checkpoint knows the one that was measured.
    """

    latent_scale: Tensor
    alphas_cumprod: Tensor
    vlb_weights: Tensor
    null_condition: Tensor | None

    def __init__(self, pipe: LDMBasePipeline, task: Task):
        super().__init__()
        check_predicts_noise(pipe.scheduler)
        self.pipe, self.task, self.args = pipe, task, task.args
        self.dropout_prob = task.args.dropout_of_condition
        self.unet, self.conditioner = pipe.unet, task.trained_conditioner(pipe)
        null = task.null_condition(pipe) if self.dropout_prob else None
        self.register_buffer("latent_scale", torch.tensor(pipe.latent_scale))
        self.register_buffer("alphas_cumprod", pipe.scheduler.alphas_cumprod.float(), persistent=False)
        self.register_buffer("vlb_weights", vlb_weights(pipe.scheduler.betas), persistent=False)
        self.register_buffer("null_condition", null, persistent=False)

    def losses(self, batch: dict[str, Any], generators: list[Generator], step: int) -> dict[str, Tensor]:
        """Draws per sample, in this order: posterior (AutoencoderKL), dropping (where conditions are dropped),
        timestep, noise.
        """
        latents = batch["moments"] if "moments" in batch else encode_moments(self.pipe.vqvae, batch["image"])
        if latents.shape[1] != self.pipe.unet.config["out_channels"]:
            latents = draw_posterior(latents, generators)
        device = latents.device
        keep = keep_condition(generators, self.dropout_prob).to(device) if self.dropout_prob else None
        timesteps = draw_integers(generators, 0, len(self.vlb_weights)).to(device)
        noise = randn_tensor(latents.shape, generator=generators, device=device)
        found = self.predict(latents, noise, timesteps, self.task.condition(self.pipe, batch), keep)
        losses = latent_diffusion_loss(
            found, noise, timesteps, self.vlb_weights, loss_type=self.args.loss_type, vlb_weight=self.args.vlb_weight
        )
        return {name: losses[name] for name in ("loss", "loss_vlb")}

    def predict(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, condition: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The noise (b, c, h, w) that the network finds.

        Args:
            latents: clean, not scaled, (b, c, h, w).
            noise: (b, c, h, w).
            timesteps: integers (b,).
            condition: as `Task.condition` gives it.
            keep: which samples (b,) keep their condition; all when unset.
        """
        signal = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        # not the scheduler's add_noise: it scales in another order, and a run that is resumed must stay what it was
        noisy = signal.sqrt() * self.latent_scale * latents + (1 - signal).sqrt() * noise
        if condition is None:
            return call_unet(self.unet, timesteps, noisy)
        if keep is not None and self.task.is_context:
            condition = torch.where(keep.view(-1, *[1] * (condition.ndim - 1)), condition, self.null_condition)
        encoded = (
            condition if self.conditioner is None else self.conditioner(condition, **self.task.conditioner_options)
        )
        encoded = encoded if isinstance(encoded, Tensor) else encoded[0]
        if self.task.is_context:
            return call_unet(self.unet, timesteps, noisy, context=encoded.to(noisy))
        if keep is not None:
            encoded = encoded * keep.view(-1, 1, 1, 1).to(encoded)
        return call_unet(self.unet, timesteps, noisy, maps=encoded.to(noisy))

    def checkpoint_gradients(self) -> None:
        """Trades compute for memory, in U-Net and transformer."""
        self.unet.enable_gradient_checkpointing()
        self.task.checkpoint_gradients(self.conditioner)

    def choose_cpu_kernels(self) -> None:
        """The same results from faster kernels of a CPU: plain attention, and a first stage with channels last (2 ms a
        picture, not 3).
        """
        plain_attention(self)
        self.pipe.vqvae.to(memory_format=torch.channels_last)

    def store_scale(self) -> None:
        """Hands a measured scale to the pipeline: after resuming, that of the checkpoint."""
        if self.args.scale_by_std:
            self.pipe.register_to_config(latent_scale=float(self.latent_scale))


@torch.no_grad()
def encode_moments(vqvae: FirstStage, images: Tensor) -> Tensor:
    """What a first stage makes of pictures (b, 3, H, W): latents of a VQModel, else moments (b, 2c, h, w); float32."""
    with torch.autocast(images.device.type, enabled=False):
        encoded = vqvae.encode(images)
    return encoded.latent_dist.parameters if hasattr(encoded, "latent_dist") else encoded.latents
