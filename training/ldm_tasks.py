"""What train_ldm.py trains: U-Net and conditioner in one module, the conditions that it is given, and its loss.

Rombach et al., arXiv 2112.10752, section 3.3. Conditions are dropped per sample: a class becomes the null class, a
text the empty one, a layout a sequence of "none", and concatenated maps become zeros (the authors' released training
code drops none, though they released models with guidance).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from diffusers.utils.torch_utils import randn_tensor
from ldm_args import CONTEXT_TASKS, LDMArgs
from ldm_latents import draw_latents, encode_moments
from ldm_networks import KINDS
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusers_ext.losses.diffusion import latent_diffusion_loss, vlb_weights
from diffusers_ext.models.encoders_ldm import LDMLayoutEncoder
from diffusers_ext.pipelines.ldm.base import LDMBasePipeline
from diffusers_ext.pipelines.ldm.denoising import predict_noise
from diffusers_ext.pipelines.ldm.first_stage import FirstStage, encode_masked_image
from diffusers_ext.pipelines.tokenization import tokenize_texts
from diffusers_ext.training_utils.conditions import keep_condition
from diffusers_ext.training_utils.kernels import plain_attention


class Denoiser(nn.Module):
    """What is trained: the U-Net, and the conditioner before it where the task has one.

    The scale of the latents is a buffer, so that a checkpoint knows the one that was measured.
    """

    latent_scale: Tensor
    alphas_cumprod: Tensor
    null_condition: Tensor | None

    def __init__(self, pipe: LDMBasePipeline, task: str, *, drops: bool):
        super().__init__()
        self.unet = pipe.unet
        name = KINDS[task].conditioner
        self.conditioner = None if name is None else getattr(pipe, name)
        if task == "text":
            self.conditioner.to_logits.requires_grad_(False)  # an output head that nothing uses
        self.is_context = task in CONTEXT_TASKS
        self.register_buffer("latent_scale", torch.tensor(pipe.latent_scale))
        self.register_buffer("alphas_cumprod", pipe.scheduler.alphas_cumprod.float(), persistent=False)
        self.register_buffer("null_condition", null_condition(pipe, task) if drops else None, persistent=False)

    def checkpoint_gradients(self) -> None:
        """Trades compute for memory, in U-Net and transformer."""
        self.unet.enable_gradient_checkpointing()
        if isinstance(self.conditioner, LDMLayoutEncoder):
            self.conditioner.enable_gradient_checkpointing()
        elif isinstance(self.conditioner, LDMBertModel):  # transformers does not know that this class supports it
            self.conditioner.model.gradient_checkpointing = True
            self.conditioner.model._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def forward(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, condition: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The noise (b, c, h, w) that the network finds.

        Args:
            latents: clean, not scaled, (b, c, h, w).
            noise: (b, c, h, w).
            timesteps: integers (b,).
            condition: as `raw_condition` gives it.
            keep: which samples (b,) keep their condition; all when unset.
        """
        signal = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * self.latent_scale * latents + (1 - signal).sqrt() * noise
        if condition is None:
            return predict_noise(self.unet, noisy, timesteps)
        if keep is not None and self.is_context:
            condition = torch.where(keep.view(-1, *[1] * (condition.ndim - 1)), condition, self.null_condition)
        encoded = condition if self.conditioner is None else self.conditioner(condition)
        encoded = encoded if isinstance(encoded, Tensor) else encoded[0]
        if self.is_context:
            return predict_noise(self.unet, noisy, timesteps, context=encoded)
        if keep is not None:
            encoded = encoded * keep.view(-1, 1, 1, 1).to(encoded)
        return predict_noise(self.unet, noisy, timesteps, concat=[encoded])


def text_ids(pipe: LDMBasePipeline, texts: Sequence[str]) -> Tensor:
    """Texts as tokens (b, l), padded and cut as the pipeline does it: the encoder attends to padding."""
    return tokenize_texts(pipe.tokenizer, texts, pipe.text_window)[0]


def null_condition(pipe: LDMBasePipeline, task: str) -> Tensor | None:
    """What a dropped condition becomes before the conditioner: a class (), or tokens (l,); None for maps."""
    if task == "class":
        return torch.tensor(pipe.class_embedder.config["null_class"])
    if task == "text":
        return text_ids(pipe, [""])[0]
    if task == "layout":
        return torch.full((pipe.layout_tokenizer.length,), pipe.layout_tokenizer.none_token)
    return None


def choose_cpu_kernels(denoiser: Denoiser, vqvae: FirstStage) -> None:
    """The same results from faster kernels of a CPU: plain attention, and a first stage with channels last (2 ms a
    picture, not 3).
    """
    plain_attention(denoiser)
    vqvae.to(memory_format=torch.channels_last)


@torch.no_grad()
def raw_condition(pipe: LDMBasePipeline, task: str, batch: dict[str, Any]) -> Tensor | None:
    """What the conditioner of a task is given (or the U-Net, where there is none) for a collated batch.

    class: numbers (b,); text, layout: tokens (b, l); semantic: labels (b, H, W); super_resolution: small pictures
    (b, 3, h, w); inpainting: the encoded picture with a hole, and the mask, (b, c + 1, h, w).
    """
    if task == "text":
        return text_ids(pipe, batch["text"]).to(pipe.bert.device)
    if task == "inpainting":
        with torch.autocast(batch["image"].device.type, enabled=False):
            return encode_masked_image(pipe.vqvae, batch["image"], batch["mask"].float())
    names = {"class": "label", "layout": "tokens", "semantic": "map", "super_resolution": "low"}
    return batch[names[task]] if task in names else None


class LDMLoss:
    """The loss of a batch: `(model, batch, generators) -> {"loss": ..., ...}`.

    Draws per sample, in this order: posterior (AutoencoderKL), dropping (where there is a condition), timestep, noise.
    """

    def __init__(self, pipe: LDMBasePipeline, args: LDMArgs):
        if pipe.scheduler.config.get("prediction_type", "epsilon") != "epsilon":
            raise ValueError(
                f"The pipeline's network predicts {pipe.scheduler.config['prediction_type']!r}; this recipe trains "
                "networks that predict the noise ('epsilon')."
            )
        self.pipe, self.args = pipe, args
        self.weights = vlb_weights(pipe.scheduler.betas)

    def __call__(self, model: nn.Module, batch: dict[str, Any], generators: list[Generator]) -> dict[str, Tensor]:
        moments = batch["moments"] if "moments" in batch else encode_moments(self.pipe.vqvae, batch["image"])
        device, keep = moments.device, None
        latents = draw_latents(moments, self.pipe.unet.config["out_channels"], generators)
        if self.args.dropout_of_condition:
            keep = keep_condition(generators, self.args.dropout_of_condition).to(device)
        steps = [torch.randint(len(self.weights), (), generator=g) for g in generators]
        noise = randn_tensor(latents.shape, generator=generators, device=device)
        timesteps = torch.stack(steps).to(device)
        condition = raw_condition(self.pipe, self.args.task, batch)
        prediction = model(latents, noise, timesteps, condition, keep)
        losses = latent_diffusion_loss(
            prediction, noise, timesteps, self.weights, loss_type=self.args.loss_type, vlb_weight=self.args.vlb_weight
        )
        return {name: losses[name] for name in ("loss", "loss_vlb")}
