"""What the Paella v1 pipelines share: components, conditions, the sampling loop. No pipeline by itself.

Paper: "Fast Text-Conditional Discrete Denoising on Vector-Quantized Latent Spaces", arXiv 2211.07292 (v1 text).
Original: dome272/Paella@b1f88ef and its sampling notebook @97d18f9; code and weights MIT.
Differences: both guidance branches run in one doubled batch; every draw takes a generator, or one for each sample.

Shapes: b samples, h x w the token grid, H x W pixels, d the width of the condition, v the number of codes.
"""

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerBase,
)

from ...conditions.images import image_batch, image_list
from ...guidance import classifier_free_guidance
from ...models.token_codec import Tokenizer, decode_indices, downsample_factor, encode_indices
from ...models.unet_paella import PaellaUNet
from ...models.vq_gumbel import GumbelVQModel
from ...models.vq_paella import PaellaVQModel
from ...schedulers.scheduling_discrete_renoising import DiscreteRenoisingScheduler
from ..base import HousePipeline
from ..callbacks import Callback, report_step, start_scale
from ..checks import (
    as_texts,
    check_callback_tensors,
    check_decoded,
    check_generator,
    check_guidance_scale,
    check_integer,
    check_output_type,
)
from ..clip_vectors import image_vectors, text_ids
from ..listed_options import read_option, record_option, record_sample_size, sample_sides
from ..tokenization import warn_of_cuts
from .checks import (
    check_components,
    check_conditions,
    check_image_components,
    check_labels,
    check_latents,
    check_size,
    check_text_components,
)

Generators = torch.Generator | list[torch.Generator] | None


class PaellaBasePipeline(HousePipeline):
    """Components, conditions and loop of the Paella pipelines: a checkpoint loads into each, `from_pipe` shares it.

    Args:
        vqvae: Image tokenizer; a `PaellaVQModel`, a `GumbelVQModel`, or a stock `VQModel` of any downsampling factor.
        tokenizer: A transformers tokenizer that ends each text with the text encoder's end-of-text token.
        text_encoder: CLIP text model whose projection has the width `unet.config.condition_dim`. It and the tokenizer
            are None where the condition is no text (a class or a label map): then `prompt_embeds` carries it.
        unet: Token predictor.
        scheduler: Draws the tokens of each step and renoises them.
        image_encoder: CLIP image tower of the same embedding space, for conditions that are pictures.
        feature_extractor: Its image processor.
        default_sample_size: Side or (height, width) of the token grid when a call names no size; by default
            `unet.config.sample_size`, else 32.
        default_guidance_scale: Guidance scale when a call names none; 5 in the paper, small models prefer less.
        id2label: Names of the classes 0, 1, ... of a network whose condition is a class, as a list or by number, which
            is how the config holds them.
    """

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
        self._guidance_scale = default_guidance_scale
        self._num_timesteps = 0
        self._interrupt = False

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes 0, 1, ..., see `id2label`."""
        return read_option(self.config.get("id2label"))

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        # u + s * (c - u): the null branch cancels exactly at s = 1 and only there
        return self._guidance_scale != 1.0

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

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
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> int:
        """Raises `ValueError` or `TypeError` for everything that can be known to be wrong before a model runs.

        The arguments are those of `__call__`, with the size resolved.

        Returns:
            The number of prompts.
        """
        check_components(self)
        check_integer("num_inference_steps", num_inference_steps, 1)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        check_guidance_scale(guidance_scale)
        check_output_type(output_type)
        check_callback_tensors(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        grid = check_size(self, height, width)
        num_prompts = check_conditions(self, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, grid)
        batch_size = num_prompts * num_images_per_prompt
        check_generator(generator, batch_size, self._execution_device)
        if latents is not None:
            check_latents(self, latents, (batch_size, *grid))
        return num_prompts

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
            check_text_components(self)
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
        """Pictures as condition vectors `(n, d)`, un-normalised, to pass as `prompt_embeds` to any Paella pipeline.

        Needs only the image encoder and the feature extractor, which resizes as it is configured (Paella: to 224 x
        224, without a crop). Networks fine-tuned on image vectors follow them best.

        Args:
            image: What `conditions.images.image_list` takes; sizes may differ.
            device: Where the image encoder runs; by default where the pipeline runs.
        """
        check_image_components(self)
        device = device if device is not None else self._execution_device
        return image_vectors(self.feature_extractor, self.image_encoder, image_list(image), device)

    def encode_labels(self, class_labels: Any, device: torch.device | str | None = None) -> Tensor:
        """Classes as one-hot vectors `(n, d)`, to pass as `prompt_embeds` to any Paella pipeline.

        For networks that were trained on classes (`train_paella.py --condition class`).

        Args:
            class_labels: One class or several, by number or, if the checkpoint has names (`class_names`), by name.
            device: Where the vectors are made; by default where the pipeline runs.
        """
        labels = check_labels(self, class_labels)
        vectors = torch.zeros(len(labels), self.unet.config["condition_dim"], dtype=self.unet.dtype)
        vectors[range(len(labels)), labels] = 1
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
            height: Pixels; so is `width`.
            generator: One for the whole batch or a list with one a sample; draws are made on the generator's device.
            latents: Tokens to start from in place of a draw.
        """
        device = device if device is not None else self._execution_device
        if latents is not None:
            return latents.to(device)
        h, w = height // self.vae_scale_factor, width // self.vae_scale_factor
        num_codes = self.scheduler.config["num_vec_classes"]
        if isinstance(generator, (list, tuple)):
            draws = [torch.randint(num_codes, (1, h, w), generator=g, device=g.device).to(device) for g in generator]
            return torch.cat(draws)
        draw_on = generator.device if generator is not None else device
        return torch.randint(num_codes, (batch_size, h, w), generator=generator, device=draw_on).to(device)

    def _resolve_scale(self, guidance_scale: Any) -> Any:
        return self.config["default_guidance_scale"] if guidance_scale is None else guidance_scale

    def _resolve_size(self, height: Any, width: Any, latents: Any = None) -> tuple[Any, Any]:
        """Fills in the sizes that the caller left out; checks nothing."""
        rows, columns = sample_sides("default_sample_size", self.config["default_sample_size"])
        if isinstance(latents, Tensor) and latents.ndim == 3:
            rows, columns = latents.shape[1:]
        return (
            rows * self.vae_scale_factor if height is None else height,
            columns * self.vae_scale_factor if width is None else width,
        )

    def _begin_run(
        self,
        num_inference_steps: int,
        guidance_scale: float,
        temperature: float | tuple[float, float] | None,
        renoise_steps: int | None,
        *,
        strength: float = 1.0,
        renoise_mode: str | None = None,
    ) -> Tensor:
        """Lays out the schedule and returns the time of each step; with a small `strength` there may be none."""
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
        timesteps = self.scheduler.timesteps[: steps - start_index]
        self._guidance_scale = start_scale(guidance_scale)
        self._num_timesteps = len(timesteps)
        self._interrupt = False
        return timesteps

    def _read_source(self, image: Any) -> Tensor:
        """The picture to edit: tokens (b, h, w) as `output_type="latent"` gives them, else float (b, 3, H, W)."""
        if isinstance(image, Tensor) and image.dtype == torch.long:
            if image.ndim != 3 or image.numel() == 0:
                raise ValueError(
                    f"`image` holds int64 tokens, so it must have shape (b, h, w), received {tuple(image.shape)}."
                )
            check_latents(self, image, (image.shape[0], image.shape[1], image.shape[2]), name="image")
            return image
        return image_batch(image)

    def _source_size(self, source: Tensor) -> tuple[int, int]:
        """Height and width in pixels."""
        factor = 1 if source.is_floating_point() else self.vae_scale_factor
        return source.shape[-2] * factor, source.shape[-1] * factor

    def _source_tokens(
        self, source: Tensor, batch_size: int, sample_mode: str = "argmax", generator: Generators = None
    ) -> Tensor:
        """The tokens `(b, h, w)` of the picture to edit, one for each sample."""
        source = source.to(self._execution_device)
        repeats = batch_size // source.shape[0]  # all samples of the first picture come first
        if not source.is_floating_point():
            return source.repeat_interleave(repeats, dim=0)
        source = 2 * source - 1
        if sample_mode == "sample":  # each sample draws its own tokens
            source = source.repeat_interleave(repeats, dim=0)
            return encode_indices(self.vqvae, source, sample=True, generator=generator)
        return encode_indices(self.vqvae, source).repeat_interleave(repeats, dim=0)

    def _noise_source(self, tokens: Tensor, timesteps: Tensor, generator: Generators, noise: Tensor | None) -> Tensor:
        """The tokens of a picture, noised to the level of the first step; at all noise just random tokens."""
        if len(timesteps) == 0:
            return tokens
        if len(timesteps) == self.scheduler.num_inference_steps:
            height, width = (side * self.vae_scale_factor for side in tokens.shape[1:])
            return self.prepare_latents(tokens.shape[0], height, width, generator=generator, latents=noise)
        noised = self.scheduler.add_noise(tokens, noise=noise, timesteps=timesteps[0], generator=generator)
        assert isinstance(noised, Tensor)  # a tuple only with `return_mask`
        return noised

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
        """Predict all tokens, draw, renoise some of them; from `tokens`, which `mask` (1 = draw) keeps where it is 0.

        Args:
            timesteps: One for each step.
            tokens: `(b, h, w)`, noised to the level of the first step.
            cond, null: `(b, d)` or `(b, d, h, w)` each.
            mask: Bool `(b, h, w)`.
        """
        cond, null = cond.to(self.unet.dtype), null.to(self.unet.dtype)
        initial_tokens = tokens
        unchecked: list[tuple[int, Tensor]] = []  # whether logits could be sampled, read once after the loop
        with self.progress_bar(total=len(timesteps)) as progress_bar:  # pyright: ignore[reportAttributeAccessIssue]
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                logits = self._predict(tokens, t, cond, null)
                tokens, drawn = self.scheduler.step(
                    logits.float(),
                    t,
                    tokens,
                    initial_noise=initial_tokens,
                    mask=mask,
                    generator=generator,
                    step_index=i,
                    unchecked=unchecked,
                    return_dict=False,
                )
                if callback is not None:
                    named = {
                        "latents": tokens,
                        "prompt_embeds": cond,
                        "negative_prompt_embeds": null,
                        "pred_original_sample": drawn,
                    }
                    changed = report_step(self, callback, callback_names, i, t, named)
                    tokens = changed.get("latents", tokens)
                    cond = changed.get("prompt_embeds", cond)
                    null = changed.get("negative_prompt_embeds", null)
                progress_bar.update()
        self.scheduler.check_sampled(unchecked)
        return tokens

    def _end_run(
        self, tokens: Tensor, output_type: str, return_dict: bool, *, overlay: tuple[Tensor, Tensor] | None = None
    ) -> ImagePipelineOutput | tuple:
        """Tokens to what the caller asked for.

        Args:
            overlay: Bool `(b, H, W)` where drawn pixels show, and the pixels elsewhere, `(b, 3, H, W)` in [0, 1].
        """
        images: Any = tokens
        if output_type != "latent":
            pixels = decode_indices(self.vqvae, tokens).float()
            check_decoded(pixels, "pictures", self)
            if overlay is not None:
                mask, original = (tensor.to(pixels.device) for tensor in overlay)
                pixels = torch.where(mask[:, None], pixels, 2 * original - 1)
            images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, tokens: Tensor, t: Tensor, cond: Tensor, null: Tensor) -> Tensor:
        """Guided logits `(b, v, h, w)`; both branches in one doubled forward, one branch where the other cancels."""
        scale = self.guidance_scale
        if scale in (0.0, 1.0):
            return self.unet(tokens, t, cond if scale else null, return_dict=False)[0]
        tokens, conditions = torch.cat([tokens, tokens]), torch.cat([null, cond])
        if not _runs_plain_forward(self.unet):
            logits_null, logits_cond = self.unet(tokens, t, conditions, return_dict=False)[0].float().chunk(2)
            return classifier_free_guidance(logits_cond, logits_null, scale)
        # the head is affine and the weights of the mix sum to 1: mixed features give the mixed logits, from one head
        features = self.unet.forward_features(tokens, t, conditions)
        features_null, features_cond = features.float().chunk(2)
        return self.unet.head(classifier_free_guidance(features_cond, features_null, scale).to(features.dtype))

    def _encode_texts(self, texts: list[str], device: torch.device | str) -> Tensor:
        """`(n, d)` projected, un-normalised text vectors."""
        ids, cut = text_ids(self.tokenizer, self.text_encoder, texts)
        warn_of_cuts(self, cut, ids.shape[1])
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
