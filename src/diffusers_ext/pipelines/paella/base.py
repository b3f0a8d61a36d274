"""What the Paella v1 pipelines share: components, conditions, the sampling loop. No pipeline by itself.

Paper: "Fast Text-Conditional Discrete Denoising on Vector-Quantized Latent Spaces", arXiv 2211.07292 (v1 text).
Original: dome272/Paella@b1f88ef and its sampling notebook @97d18f9; code and weights MIT.
Differences: both guidance branches run in one doubled batch; every draw takes a generator, or one for each sample.

Shapes: b samples, n prompts, h x w the token grid, H x W pixels, d the width of the condition, v the number of codes.
"""

import math
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vq_model import VQModel
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerBase,
)

from ...conditions.images import image_list
from ...conditions.named_boxes import find_class
from ...guidance import both_branches, guide
from ...models.token_codec import Tokenizer, downsample_factor
from ...models.unet_paella import PaellaUNet
from ...models.vq_gumbel import GumbelVQModel
from ...models.vq_paella import PaellaVQModel
from ...schedulers.scheduling_discrete_renoising import DiscreteRenoisingScheduler
from ..base import Config, ConfigOf, HousePipeline
from ..callbacks import Callback, report_step
from ..checks import (
    as_texts,
    check_generator,
    check_guidance_scale,
    check_integer,
    check_output_type,
    check_side,
)
from ..clip_vectors import image_vectors
from ..listed_options import read_option, record_option, record_sample_size
from ..tokenization import text_ids

Generators = torch.Generator | list[torch.Generator] | None


class PaellaBasePipeline(HousePipeline):
    """Components, conditions and loop of the Paella pipelines: a checkpoint loads into each, `from_pipe` shares it."""

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vqvae"
    _one_checkpoint = True  # of all its subclasses: each loads what another one saved
    _optional_components = ["tokenizer", "text_encoder", "image_encoder", "feature_extractor"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "pred_original_sample"]

    vqvae: Tokenizer
    tokenizer: PreTrainedTokenizerBase
    text_encoder: CLIPTextModelWithProjection
    unet: PaellaUNet
    scheduler: DiscreteRenoisingScheduler

    def __init__(
        self,
        vqvae: VQModel | GumbelVQModel | PaellaVQModel,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: CLIPTextModelWithProjection | None,
        unet: PaellaUNet,
        scheduler: DiscreteRenoisingScheduler,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        default_sample_size: int | tuple[int, int] | dict[str, int] | None = None,
        default_guidance_scale: float = 5.0,
        id2label: dict[int, str] | list[str] | None = None,
    ):
        """The components.

        Args:
            vqvae: Image tokenizer; a `PaellaVQModel`, a `GumbelVQModel`, or a stock `VQModel` of any factor.
            tokenizer: A transformers tokenizer that ends each text with the text encoder's end-of-text token.
            text_encoder: CLIP text model whose projection has the width `unet.config.condition_dim`. It and the
                tokenizer are None where the condition is no text (a class or a label map): `prompt_embeds` carries it.
            unet: Token predictor.
            scheduler: Draws the tokens of each step and renoises them.
            image_encoder: CLIP image tower of the same embedding space, for conditions that are images.
            feature_extractor: Its image processor.
            default_sample_size: Side or (height, width) of the token grid when a call names no size; by default
                `unet.config.sample_size`, else 32.
            default_guidance_scale: Guidance scale when a call names none; 5 in the paper, small models prefer less.
            id2label: Names of the classes 0, 1, ... of a network whose condition is a class, as a list or by number,
                which is how the config holds them.
        """
        super().__init__()
        self.register_modules(
            vqvae=vqvae,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(
            default_sample_size=record_sample_size(default_sample_size, unet, 32),
            default_guidance_scale=default_guidance_scale,
            id2label=record_option("id2label", id2label),
        )
        self.vae_scale_factor = downsample_factor(vqvae) if vqvae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes 0, 1, ..., see `id2label`."""
        return read_option(self.config.get("id2label"))

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        height: int,
        width: int,
        *,
        num_inference_steps: int = 12,
        guidance_scale: float = 5.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
    ) -> int:
        """Raises `ValueError` or `TypeError` for everything that can be known to be wrong before a model runs.

        The arguments are those of a call. The size and the scale are resolved.

        Returns:
            The number of prompts.
        """
        self.check_components()
        check_integer("num_inference_steps", num_inference_steps, 1)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        check_guidance_scale(guidance_scale)
        check_output_type(output_type)
        grid = self.check_size(height, width)
        num_prompts = self.check_conditions(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, grid)
        batch_size = num_prompts * num_images_per_prompt
        check_generator(generator, batch_size, self._execution_device)
        if latents is not None:
            self.check_latents(latents, (batch_size, *grid))
        return num_prompts

    def check_components(self) -> None:
        """Network, tokenizer and scheduler are there and agree on the codebook."""
        missing = [name for name in ("vqvae", "unet", "scheduler") if getattr(self, name) is None]
        if missing:
            raise ValueError(f"The pipeline was built without {', '.join(missing)}; sampling needs them.")
        if not hasattr(self.scheduler, "noise_ratio") or "num_vec_classes" not in self.scheduler.config:
            raise ValueError(
                f"`scheduler` is a {type(self.scheduler).__name__}; {type(self).__name__} draws tokens and needs a"
                " DiscreteRenoisingScheduler. Its ways of drawing and its schedule are that class's options, and"
                " travel with the checkpoint:"
                " `DiscreteRenoisingScheduler.from_pretrained(<checkpoint>, subfolder='scheduler')`."
            )
        codes = {
            "unet.config.num_vq_embeddings": self.unet.config["num_vq_embeddings"],
            "vqvae.config.num_vq_embeddings": self.vqvae.config["num_vq_embeddings"],
            "scheduler.config.num_vec_classes": self.scheduler.config["num_vec_classes"],
        }
        if len(set(codes.values())) > 1:
            listed = ", ".join(f"{name}={value}" for name, value in codes.items())
            raise ValueError(f"The components disagree on the number of token codes: {listed}.")

    def check_size(self, height: Any, width: Any, names: tuple[str, str] = ("height", "width")) -> tuple[int, int]:
        """The token grid (h, w) of a valid size in pixels."""
        factor, levels = self.vae_scale_factor, self.unet.downsample_factor
        # the smallest grid that the network takes, rounded up to what its levels divide
        smallest = math.ceil(self.unet.min_size / levels) * levels * factor
        for name, side in zip(names, (height, width), strict=True):
            check_side(name, side, levels * factor, smallest, because=f"tokenizer {factor} x network {levels}")
        return height // factor, width // factor

    def check_conditions(
        self,
        prompt: Any,
        negative_prompt: Any,
        prompt_embeds: Any,
        negative_prompt_embeds: Any,
        grid: tuple[int, int],
    ) -> int:
        """The number of prompts, if both branches are well formed."""
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError(
                "Pass exactly one of `prompt` and `prompt_embeds`; received"
                f" {'neither' if prompt is None else 'both'}."
            )
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("Pass at most one of `negative_prompt` and `negative_prompt_embeds`; received both.")
        if prompt is not None:
            num_prompts = len(as_texts("prompt", prompt))
        else:
            self._check_embeds("prompt_embeds", prompt_embeds, grid)
            num_prompts = prompt_embeds.shape[0]
        if negative_prompt is not None:
            num_negative = len(as_texts("negative_prompt", negative_prompt))
            if num_negative != num_prompts and not isinstance(negative_prompt, str):
                raise ValueError(
                    f"`negative_prompt` holds {num_negative} texts for {num_prompts} prompts; pass one text for all of"
                    " them or one a prompt."
                )
        if negative_prompt_embeds is not None:
            self._check_embeds("negative_prompt_embeds", negative_prompt_embeds, grid)
            if negative_prompt_embeds.shape[0] not in (1, num_prompts):
                raise ValueError(
                    f"`negative_prompt_embeds` holds {negative_prompt_embeds.shape[0]} conditions for {num_prompts}"
                    " prompts; pass one for all of them or one a prompt."
                )
            if negative_prompt_embeds.ndim == 4 and (prompt_embeds is None or prompt_embeds.ndim == 2):
                raise ValueError(
                    "`negative_prompt_embeds` is a map over the grid, so `prompt_embeds` must be one as well."
                )
        if prompt is not None or negative_prompt is not None:
            self.check_encoder("text_encoder")
        return num_prompts

    def check_encoder(self, name: str) -> None:
        """The encoder `text_encoder` or `image_encoder` and what prepares its input are there and fit the network."""
        if name == "text_encoder" and None in (self.tokenizer, self.text_encoder):
            instead = " or `class_labels`" if self.class_names is not None else ""
            raise ValueError(
                f"The pipeline was built without tokenizer or text_encoder; pass `prompt_embeds`{instead} (and"
                " `negative_prompt_embeds`) in place of texts."
            )
        missing = [part for part in ("image_encoder", "feature_extractor") if getattr(self, part) is None]
        if name == "image_encoder" and missing:
            raise ValueError(
                f"The pipeline was built without {' and '.join(missing)}, which turn `image` into a condition: pass"
                " them to `from_pretrained` or `from_pipe` (the CLIP image tower whose vectors the network was trained"
                " with), or pass `prompt_embeds`."
            )
        width = getattr(self, name).config.projection_dim
        if self.unet is not None and width != self.unet.config["condition_dim"]:  # encoding needs no network
            raise ValueError(
                f"The components do not fit together: {name}.config.projection_dim={width} differs from"
                f" unet.config.condition_dim={self.unet.config['condition_dim']}."
            )

    def check_latents(self, latents: Any, shape: tuple[int, int, int], name: str = "latents") -> None:
        """Tokens of the codebook, of the wanted shape."""
        if not isinstance(latents, Tensor) or latents.dtype != torch.long:
            kind = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
            raise TypeError(f"`{name}` must be an int64 tensor of token indices, received {kind}.")
        if tuple(latents.shape) != shape:
            raise ValueError(
                f"`{name}` must have shape {shape} (images, height and width in tokens), received"
                f" {tuple(latents.shape)}."
            )
        num_codes = self.scheduler.config["num_vec_classes"]
        low, high = int(latents.min()), int(latents.max())
        if low < 0 or high >= num_codes:
            raise ValueError(f"`{name}` must hold token indices 0 to {num_codes - 1}, received {low} to {high}.")

    def _check_embeds(self, name: str, embeds: Any, grid: tuple[int, int]) -> None:
        width = self.unet.config["condition_dim"]
        if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
            kind = embeds.dtype if isinstance(embeds, Tensor) else type(embeds).__name__
            raise TypeError(f"`{name}` must be a floating-point tensor, received {kind}.")
        shape = tuple(embeds.shape)
        if len(shape) not in (2, 4) or shape[0] == 0 or shape[1] != width or (len(shape) == 4 and shape[2:] != grid):
            raise ValueError(
                f"`{name}` must have shape (n, {width}) or (n, {width}, {grid[0]}, {grid[1]}) with n >= 1, received"
                f" {shape}."
            )

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        *,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Turns texts into condition vectors; needs only the tokenizer and the text encoder.

        Args:
            prompt: One text or several. The empty text is a text like any other, not the null condition.
            num_images_per_prompt: How often each vector is repeated; all images of the first prompt come first.
            do_classifier_free_guidance: Whether a null branch is wanted as well.
            negative_prompt: One text for all prompts, or one a prompt. None: the null branch is the zero vector.
            prompt_embeds: `(n, d)`, or `(n, d, h, w)` for a condition that varies over the token grid; in place of
                `prompt`.
            negative_prompt_embeds: The same for the null branch, in place of `negative_prompt`.
            device: Where the text encoder runs; by default where the pipeline runs.

        Returns:
            Both conditions, each `(n * num_images_per_prompt, d)` (or spatial); the second is None without guidance.
        """
        if prompt_embeds is None or (do_classifier_free_guidance and negative_prompt is not None):
            self.check_encoder("text_encoder")
        device = device if device is not None else self._execution_device
        if prompt_embeds is None:
            prompt_embeds = self._encode_texts(as_texts("prompt", prompt), device)
        prompt_embeds = prompt_embeds.to(device)
        if not do_classifier_free_guidance:
            negative_prompt_embeds = None
        elif negative_prompt_embeds is None and negative_prompt is None:
            negative_prompt_embeds = torch.zeros_like(prompt_embeds)
        else:
            if negative_prompt_embeds is None:
                negative_prompt_embeds = self._encode_texts(as_texts("negative_prompt", negative_prompt), device)
            negative_prompt_embeds = negative_prompt_embeds.to(device=device, dtype=prompt_embeds.dtype)
            if negative_prompt_embeds.ndim < prompt_embeds.ndim:  # one vector for all places of a spatial condition
                negative_prompt_embeds = negative_prompt_embeds[:, :, None, None]  # (n, d, 1, 1)
            negative_prompt_embeds = negative_prompt_embeds.expand_as(prompt_embeds)
        if num_images_per_prompt > 1:
            prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
            if negative_prompt_embeds is not None:
                negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, negative_prompt_embeds

    def encode_image(self, image: Any, device: torch.device | str | None = None) -> Tensor:
        """Images as condition vectors `(n, d)`, un-normalised, to pass as `prompt_embeds` to any Paella pipeline.

        Needs only the image encoder and the feature extractor, which resizes as it is configured (Paella: to 224 x
        224, without a crop). Networks fine-tuned on image vectors follow them best.

        Args:
            image: What `conditions.images.image_list` takes; sizes may differ.
            device: Where the image encoder runs; by default where the pipeline runs.
        """
        self.check_encoder("image_encoder")
        device = device if device is not None else self._execution_device
        return image_vectors(self.feature_extractor, self.image_encoder, image_list(image), device)

    @classmethod
    def idle_arguments(cls, index: Config, config_of: ConfigOf) -> set[str]:
        """Classes where a CLIP is the condition, and texts where there is none."""
        has_towers = [index.get(name, [None])[-1] is not None for name in ("text_encoder", "image_encoder")]
        idle = {"prompt", "negative_prompt"} if not has_towers[0] else set()
        return idle | ({"class_labels"} if any(has_towers) and index.get("id2label") is None else set())

    def encode_labels(self, class_labels: Any, device: torch.device | str | None = None) -> Tensor:
        """Classes as one-hot vectors `(n, d)`, to pass as `prompt_embeds` to any Paella pipeline.

        For networks that were trained on classes (`train_paella.py --condition class`).

        Args:
            class_labels: One class or several, by number or, if the checkpoint has names (`class_names`), by name.
            device: Where the vectors are made; by default where the pipeline runs.
        """
        if self.unet is None:
            raise ValueError("The pipeline was built without unet, which knows how many classes there are: pass it.")
        if self.class_names is None and (self.text_encoder is not None or self.image_encoder is not None):
            raise ValueError(
                "`class_labels` is for networks that were trained on classes (`train_paella.py --condition class`);"
                " this one was trained on the vectors of its CLIP: pass `prompt`, or what `encode_image` gives as"
                " `prompt_embeds`."
            )
        labels = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
        labels = list(labels) if isinstance(labels, (list, tuple)) else [labels]
        if not labels:
            raise ValueError("`class_labels` is empty; pass at least one class.")
        num_classes = self.unet.config["condition_dim"]
        numbers = [find_class(label, num_classes, self.class_names, "class_labels") for label in labels]
        vectors = torch.zeros(len(numbers), num_classes, dtype=self.unet.dtype)
        vectors[range(len(numbers)), numbers] = 1
        return vectors.to(device if device is not None else self._execution_device)

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        *,
        generator: Generators = None,
        latents: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The initial tokens `(b, h, w)` int64: uniform draws, the first ones that each generator makes.

        Args:
            batch_size: b.
            height: Height of the image in pixels.
            width: Width of the image in pixels.
            generator: One for the whole batch, or a list with one a sample. Draws are made on the generator's device.
            latents: Tokens to start from in place of a draw.
            device: Where the tokens lie; by default where the pipeline runs.
        """
        device = device if device is not None else self._execution_device
        if latents is not None:
            return latents.to(device)
        grid = height // self.vae_scale_factor, width // self.vae_scale_factor
        return self.scheduler.random_tokens((batch_size, *grid), device, generator=generator)

    def prepare_timesteps(
        self,
        num_inference_steps: int,
        temperature: float | tuple[float, float] | None,
        renoise_steps: int | None,
        *,
        strength: float = 1.0,
        renoise_mode: str | None = None,
    ) -> Tensor:
        """Sets the scheduler to so many steps and returns the time of each. A small `strength` may leave none."""
        if isinstance(temperature, (int, float)):
            temperature = (float(temperature), float(temperature))
        steps = int(num_inference_steps)
        start_index = round((1 - strength) * steps)
        self.scheduler.set_timesteps(
            steps,
            device=self._execution_device,
            temperature=temperature,
            start_index=min(start_index, steps - 1),
            renoise_steps=renoise_steps,
            renoise_mode=renoise_mode,
        )
        return self.scheduler.timesteps[: steps - start_index]

    def _sample(
        self,
        timesteps: Tensor,
        tokens: Tensor,
        cond: Tensor,
        null: Tensor,
        *,
        mask: Tensor | None = None,
        generator: Generators = None,
        callback: Callback | None = None,
        callback_names: list[str],
    ) -> Tensor:
        """The sampling loop: predict all tokens, draw them, renoise some of them towards the initial ones.

        Args:
            timesteps: One for each step.
            tokens: `(b, h, w)`, noised to the level of the first step.
            cond: The condition, `(b, d)` or `(b, d, h, w)`.
            null: The null condition, of the same shape.
            mask: Bool `(b, h, w)`. Where it is False, the token stays what it is in `tokens`.
        """
        cond, null = cond.to(self.unet.dtype), null.to(self.unet.dtype)
        step_options = {"initial_noise": tokens, "mask": mask, "generator": generator, "return_dict": False}
        unchecked: list[tuple[int, Tensor]] = []  # whether logits could be sampled, read once after the loop
        for i, t in self.steps(timesteps):
            logits = self._predict(tokens, t, cond, null).float()
            tokens, clean = self.scheduler.step(logits, t, tokens, step_index=i, unchecked=unchecked, **step_options)
            if callback is not None:
                tensors = {"latents": tokens, "prompt_embeds": cond, "negative_prompt_embeds": null}
                tensors["pred_original_sample"] = clean
                tensors |= report_step(self, callback, callback_names, i, t, tensors)
                tokens, cond, null = tensors["latents"], tensors["prompt_embeds"], tensors["negative_prompt_embeds"]
        self.scheduler.check_sampled(unchecked)
        return tokens

    def _predict(self, tokens: Tensor, t: Tensor, cond: Tensor, null: Tensor) -> Tensor:
        """Guided logits `(b, v, h, w)`, mixed in float32."""
        unet, scale = self.unet, self._guidance_scale
        inputs = (tokens, cond), (tokens, null)
        if not _runs_plain_forward(unet):
            logits = both_branches(lambda x, c: unet(x, t, c, return_dict=False)[0].float(), *inputs, scale)
            return guide(*logits, scale)
        # the head is affine and the weights of the mix sum to 1: mixed features give the mixed logits, from one head
        features = both_branches(lambda x, c: unet.forward_features(x, t, c).float(), *inputs, scale)
        return unet.head(guide(*features, scale).to(unet.dtype))

    def _encode_texts(self, texts: list[str], device: torch.device | str) -> Tensor:
        """`(n, d)` projected, un-normalised text vectors."""
        ids = text_ids(self.tokenizer, self.text_encoder, texts, pipe=self)
        return self.text_encoder(ids.to(device)).text_embeds


def _runs_plain_forward(unet: torch.nn.Module) -> bool:
    """Whether nothing compiles, wraps or watches `forward`, so that its two halves may be called one by one."""
    return (
        isinstance(unet, PaellaUNet)
        and "forward" not in vars(unet)  # offloading hooks put theirs there
        and unet._compiled_call_impl is None
        and not unet._forward_hooks
        and not unet._forward_pre_hooks
    )
