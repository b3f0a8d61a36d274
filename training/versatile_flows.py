"""What a flow of Versatile Diffusion is trained on: latents, contexts, what stands for no context, and the loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Generator, Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from diffusers_ext.losses.diffusion import noise_error
from diffusers_ext.models.autoencoder_optimus import AutoencoderOptimus
from diffusers_ext.models.unet_versatile import VersatileUNet
from diffusers_ext.pipelines.clip_vectors import text_ids
from diffusers_ext.pipelines.versatile.contexts import (
    image_context,
    null_picture,
    prepare_pictures,
    text_context,
)
from diffusers_ext.pipelines.versatile.denoising import FlowContext, predict_flow_noise
from diffusers_ext.pipelines.versatile.optimus_text import sentence_ids, word_piece_window


def parts_of(flow: str) -> tuple[str, str]:
    """The context type and the data type of a flow's name: "text-to-image" makes images of texts."""
    context_type, _, data_type = flow.partition("-to-")
    return context_type, data_type


@dataclass
class FlowEncoders:
    """The frozen networks around the U-Net. They run in float32 whatever the training's precision.

    A batch holds `image` (b, 3, h, w) in [-1, 1], `prompt`, the captions for CLIP, and `sentence`, those that Optimus
    gives back; for the flow from text to text `source` takes the place of `prompt`. In place of `image` it may hold
    what a cache keeps of it: `moments` (b, 2c, h, w) of the posterior and `image_tokens` (b, l, d), the context.
    """

    vae: Any
    optimus: AutoencoderOptimus
    encoder_tokenizer: Any
    text_encoder: CLIPTextModelWithProjection
    tokenizer: Any
    image_encoder: CLIPVisionModelWithProjection
    feature_extractor: Any
    _nothing: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def latents(self, data_type: str, batch: Mapping[str, Any], generators: Sequence[Generator]) -> Tensor:
        """Clean latents: of images a draw from the posterior, scaled; of texts the mean, as it is."""
        with torch.no_grad(), torch.autocast(self.vae.device.type, enabled=False):
            if data_type == "text":
                window = word_piece_window(self.encoder_tokenizer, self.optimus)
                ids = sentence_ids(self.encoder_tokenizer, batch["sentence"], max_word_pieces=window)
                return self.optimus.encode(ids.to(self.optimus.device), return_dict=False)[0]
            moments = batch["moments"] if "moments" in batch else self.moments(batch["image"])
            posterior = DiagonalGaussianDistribution(moments)
            noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=g) for g in generators])
            return self.vae.config.scaling_factor * (posterior.mean + posterior.std * noise.to(posterior.mean))

    def context(self, flow: str, batch: Mapping[str, Any]) -> Tensor:
        """The context tokens (b, l, d) of a flow."""
        context_type, data_type = parts_of(flow)
        with torch.no_grad(), torch.autocast(self.vae.device.type, enabled=False):
            if context_type == "image":
                return batch["image_tokens"] if "image_tokens" in batch else self.image_tokens(batch["image"])
            return self._text_context(batch["source" if data_type == "text" else "prompt"])

    def moments(self, images: Tensor) -> Tensor:
        """Mean and log variance (b, 2c, h, w) of the latents of pictures (b, 3, H, W) in [-1, 1]."""
        return self.vae.encode(images).latent_dist.parameters

    def image_tokens(self, images: Tensor) -> Tensor:
        """Context tokens (b, l, d) of pictures in [-1, 1]."""
        return self._image_context((images + 1) / 2)

    def nothing(self, flow: str) -> Tensor:
        """What stands for no context (1, l, d), as the pipeline has it by default.

        The context of the empty text; of pictures zeros where images are made, and the context of a black picture
        where texts are made.
        """
        context_type, data_type = parts_of(flow)
        if (context_type, data_type) not in self._nothing:
            with torch.no_grad(), torch.autocast(self.vae.device.type, enabled=False):
                if context_type == "text":
                    found = self._text_context([""])
                else:
                    side: Any = self.image_encoder.config.image_size
                    found = self._image_context(null_picture("black", side)[None])
                    found = torch.zeros_like(found) if data_type == "image" else found
            self._nothing[context_type, data_type] = found
        return self._nothing[context_type, data_type]

    def _text_context(self, texts: Sequence[str]) -> Tensor:
        ids, _ = text_ids(self.tokenizer, self.text_encoder, list(texts))
        return text_context(self.text_encoder, ids.to(self.text_encoder.device))

    def _image_context(self, images: Tensor) -> Tensor:
        """Of pictures (b, 3, h, w) in [0, 1], prepared as the pipeline does it: over 8-bit pictures."""
        pixels = prepare_pictures(self.feature_extractor, list(images), images.shape[-1])
        return image_context(self.image_encoder, pixels.to(self.image_encoder.device))


class Flows(nn.Module):
    """The U-Net on several flows in one call, so that the processes exchange gradients once."""

    def __init__(self, unet: VersatileUNet):
        super().__init__()
        self.unet = unet

    def forward(self, inputs: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
        """Predicted noise by flow, from its noised latents, times (b,) and context tokens."""
        predicted = {}
        for flow, (sample, timestep, context) in inputs.items():
            context_type, data_type = parts_of(flow)
            predicted[flow] = self.unet(
                sample, timestep, context, data_type=data_type, context_type=context_type, return_dict=False
            )[0]
        return predicted


def flow_losses(
    model: nn.Module,
    batch: Mapping[str, Any],
    generators: Sequence[Generator],
    encoders: FlowEncoders,
    scheduler: Any,
    *,
    flow_weights: Mapping[str, float],
    cond_dropout_prob: float,
) -> dict[str, Tensor]:
    """The loss of one step: the weighted sum over the flows, each on all samples (Algorithm 1 of the paper).

    Draws per sample, in this order: the posterior of its picture if images are made, then for each flow time, noise,
    and whether the context is dropped.

    Returns:
        `loss`, and the mean squared error of each flow as `loss_text_to_image` and so on.
    """
    data_types = dict.fromkeys(parts_of(flow)[1] for flow in flow_weights)
    latents = {name: encoders.latents(name, batch, generators) for name in sorted(data_types)}
    if "image_tokens" not in batch and sum(parts_of(flow)[0] == "image" for flow in flow_weights) > 1:
        batch = {**batch, "image_tokens": encoders.context("image-to-image", batch)}  # once for all flows
    noises, inputs = {}, {}
    for flow in flow_weights:
        clean = latents[parts_of(flow)[1]]
        last = scheduler.config.num_train_timesteps
        times = torch.stack([torch.randint(last, (), generator=g) for g in generators]).to(clean.device)
        noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in generators]).to(clean.device)
        kept = torch.stack([torch.rand((), generator=g) for g in generators]) >= cond_dropout_prob
        context = encoders.context(flow, batch)
        context = torch.where(kept.to(clean.device)[:, None, None], context, encoders.nothing(flow))
        noises[flow] = noise
        inputs[flow] = (scheduler.add_noise(clean, noise, times), times, context)
    predicted = model(inputs)
    errors = {flow: noise_error(predicted[flow], noises[flow]).mean() for flow in flow_weights}
    total = torch.stack([weight * errors[flow] for flow, weight in flow_weights.items()]).sum()
    return {"loss": total, **{f"loss_{flow.replace('-', '_')}": error for flow, error in errors.items()}}


@torch.no_grad()
def sample_flow(
    unet: VersatileUNet,
    scheduler: Any,
    flow: str,
    context: Tensor,
    nothing: Tensor,
    *,
    shape: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float,
    generators: Sequence[Generator],
) -> Tensor:
    """Clean latents (b, *shape) of a flow from contexts (b, l, d), guided away from `nothing`, its like."""
    context_type, data_type = parts_of(flow)
    contexts = [FlowContext(context_type, context, nothing)]
    latents = torch.stack([torch.randn(tuple(shape), generator=g) for g in generators]).to(context)
    scheduler.set_timesteps(num_inference_steps, device=latents.device)
    for t in scheduler.timesteps:
        noise = predict_flow_noise(unet, latents, t, contexts, data_type=data_type, guidance_scale=guidance_scale)
        latents = scheduler.step(noise, t, latents).prev_sample
    return latents


def learning_rate_groups(
    unet: VersatileUNet, learning_rate: float, scales: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: the layer groups of the network, each with its own multiple of the learning rate.

    What is frozen is left out.

    The paper scales gradients by layer group. AdamW divides gradients by their size, so that this would change next to
    nothing; the released code scales learning rates, and so does this.

    Raises:
        ValueError: for a group that the network does not have, or a negative scale.
    """
    groups = unet.layer_groups()
    unknown = [name for name in scales if name not in groups]
    if unknown or any(scale < 0 for scale in scales.values()):
        raise ValueError(
            f"--lr_scales is {dict(scales)}: the layer groups of this network are {', '.join(groups)}, and a scale is "
            ">= 0."
        )
    trained = {name: [p for p in layers.parameters() if p.requires_grad] for name, layers in groups.items()}
    return [
        {"params": params, "lr": learning_rate * scales.get(name, 1.0)} for name, params in trained.items() if params
    ]
