"""What the flows of Versatile Diffusion learn: latents, contexts, what stands for no context, and the loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from diffusers_ext.losses.diffusion import noise_error
from diffusers_ext.models.autoencoder_optimus import AutoencoderOptimus
from diffusers_ext.models.unet_versatile import VersatileUNet
from diffusers_ext.pipelines.tokenization import text_ids
from diffusers_ext.pipelines.versatile.conditions import (
    image_context,
    null_picture,
    prepare_pictures,
    text_context,
)
from diffusers_ext.training.versatile.args import parts_of
from diffusers_ext.training_utils.objective import Objective, draw_integers, draw_posterior, keep_condition


@dataclass
class FlowEncoders:
    """The frozen networks around the U-Net. They run in float32 whatever the training's precision.

    A batch holds of these what its flows read (`FlowRows` in data.py makes it):

    | name | what |
    |---|---|
    | `image` | pictures (b, 3, h, w) in [-1, 1], or in their place `moments` (b, 2c, h, w) of the posterior |
    | `clip_pixels` | pictures as the image encoder takes them, or in their place `image_tokens` (b, l, d) |
    | `prompt_ids` | captions as CLIP's tokens (b, l), the context of text-to-image |
    | `source_ids` | the same of text-to-text |
    | `sentence_ids` | the sentences that Optimus gives back, as the tokens (b, l) of its encoder |
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
                return self.optimus.encode(batch["sentence_ids"].to(self.optimus.device), return_dict=False)[0]
            moments = batch["moments"] if "moments" in batch else self.moments(batch["image"])
            return self.vae.config.scaling_factor * draw_posterior(moments, generators)

    def context(self, flow: str, batch: Mapping[str, Any]) -> Tensor:
        """The context tokens (b, l, d) of a flow."""
        context_type, data_type = parts_of(flow)
        with torch.no_grad(), torch.autocast(self.vae.device.type, enabled=False):
            if context_type == "image":
                return batch["image_tokens"] if "image_tokens" in batch else self.image_tokens(batch["clip_pixels"])
            return self._text_context(batch["source_ids" if data_type == "text" else "prompt_ids"])

    def moments(self, images: Tensor) -> Tensor:
        """Mean and log variance (b, 2c, h, w) of the latents of pictures (b, 3, H, W) in [-1, 1]."""
        return self.vae.encode(images).latent_dist.parameters

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Context tokens (b, l, d) of pictures as the image encoder takes them."""
        return image_context(self.image_encoder, pixels.to(self.image_encoder.device))

    def nothing(self, flow: str) -> Tensor:
        """What stands for no context (1, l, d), as the pipeline has it by default.

        The context of the empty text; of pictures zeros where images are made, and the context of a black picture
        where texts are made.
        """
        context_type, data_type = parts_of(flow)
        if (context_type, data_type) not in self._nothing:
            with torch.no_grad(), torch.autocast(self.vae.device.type, enabled=False):
                if context_type == "text":
                    found = self._text_context(text_ids(self.tokenizer, self.text_encoder, [""]))
                else:
                    side: Any = self.image_encoder.config.image_size
                    found = self.image_tokens(
                        prepare_pictures(self.feature_extractor, [null_picture("black", side)], side)
                    )
                    found = torch.zeros_like(found) if data_type == "image" else found
            self._nothing[context_type, data_type] = found
        return self._nothing[context_type, data_type]

    def _text_context(self, ids: Tensor) -> Tensor:
        return text_context(self.text_encoder, ids.to(self.text_encoder.device))


class FlowObjective(Objective):
    """The weighted sum over the flows, each on all samples (Algorithm 1 of the paper).

    All flows run in one call, so that the processes exchange gradients once. Only the U-Net is registered.
    """

    def __init__(
        self,
        unet: VersatileUNet,
        encoders: FlowEncoders,
        scheduler: Any,
        *,
        flow_weights: Mapping[str, float],
        cond_dropout_prob: float,
    ):
        super().__init__()
        self.unet, self.encoders, self.scheduler = unet, encoders, scheduler
        self.flow_weights, self.cond_dropout_prob = dict(flow_weights), cond_dropout_prob

    def losses(self, batch: Mapping[str, Any], generators: list[Generator], step: int) -> dict[str, Tensor]:
        """`loss`, and the mean squared error of each flow as `loss_text_to_image` and so on.

        Draws per sample, in this order: the posterior of its picture if images are made, then for each flow time,
        noise, and whether the context is dropped.
        """
        data_types = sorted({parts_of(flow)[1] for flow in self.flow_weights})
        latents = {name: self.encoders.latents(name, batch, generators) for name in data_types}
        if "clip_pixels" in batch:  # once for all flows
            batch = {**batch, "image_tokens": self.encoders.context("image-to-image", batch)}
        errors = {}
        for flow in self.flow_weights:
            error = self.flow_error(flow, latents[parts_of(flow)[1]], batch, generators)
            errors[f"loss_{flow.replace('-', '_')}"] = error
        terms = zip(self.flow_weights.values(), errors.values(), strict=True)
        return {"loss": torch.stack([weight * error for weight, error in terms]).sum(), **errors}

    def flow_error(
        self, flow: str, clean: Tensor, batch: Mapping[str, Any], generators: Sequence[Generator]
    ) -> Tensor:
        """The mean squared error of the noise that the U-Net finds in latents (b, ...) of a flow."""
        context_type, data_type = parts_of(flow)
        times = draw_integers(generators, 0, self.scheduler.config.num_train_timesteps).to(clean.device)
        noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in generators]).to(clean.device)
        kept = keep_condition(generators, self.cond_dropout_prob).to(clean.device)
        context = self.encoders.context(flow, batch)
        context = torch.where(kept[:, None, None], context, self.encoders.nothing(flow))
        noised = self.scheduler.add_noise(clean, noise, times)
        predicted = self.unet(
            noised, times, context, data_type=data_type, context_type=context_type, return_dict=False
        )[0]
        return noise_error(predicted, noise).mean()
