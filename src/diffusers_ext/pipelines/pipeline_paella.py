"""Text to image with Paella v1: discrete tokens, a convolutional token predictor, a dozen parallel sampling steps.

Paper: "Fast Text-Conditional Discrete Denoising on Vector-Quantized Latent Spaces", arXiv 2211.07292 (v1 text).
Original: dome272/Paella@b1f88ef and its sampling notebook @97d18f9; code and weights MIT.
Differences: both guidance branches run in one doubled batch; every draw takes a generator, or one for each sample.

Shapes: b samples, h x w the token grid, H x W pixels, d the width of the condition, v the number of codes.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import logging
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerBase,
)

from ..guidance import classifier_free_guidance
from ..models.unet_paella import PaellaUNet
from ..models.vq_paella import GumbelVQModel, decode_indices, downsample_factor
from ..schedulers.scheduling_discrete_renoising import DiscreteRenoisingScheduler
from .checks import (
    as_texts,
    check_callback_tensors,
    check_generator,
    check_guidance_scale,
    check_integer,
    check_output_type,
    check_side,
)

logger = logging.get_logger(__name__)

LEGACY_EOS = 2  # a CLIP config with this end-of-text id pools at the highest id instead of at the end-of-text token
Callback = Callable[[Any, int, Tensor, dict], dict | None] | PipelineCallback | MultiPipelineCallbacks
_KEEP_DTYPE = object()  # what `from_pipe` hands to `to` in place of diffusers' silent float32


class PaellaPipeline(DiffusionPipeline):
    """Draws images that follow a text.

    The text condition is the projected, **un-normalised** vector of a CLIP text model; the null condition of
    classifier-free guidance is the zero vector, as in training, unless a negative prompt takes its place.

    Which tokens are drawn (typical filtering and its mass, Gumbel or multinomial draws, what is renoised and where) is
    the scheduler's configuration and travels with the checkpoint. To change it:
    `pipe.scheduler = DiscreteRenoisingScheduler.from_config(pipe.scheduler.config, typical_mass=0.5)`.

    Args:
        vqvae: Image tokenizer; a stock `VQModel` of any downsampling factor or a `GumbelVQModel`.
        tokenizer: A transformers tokenizer that ends each text with the text encoder's end-of-text token.
        text_encoder: CLIP text model whose projection has the width `unet.config.condition_dim`. It and the tokenizer
            are None where the condition is no text (a class or a label map): then `prompt_embeds` carries it.
        unet: Token predictor.
        scheduler: Draws the tokens of each step and renoises them.
        image_encoder: CLIP image tower of the same embedding space, kept for pipelines that start from an image; this
            one leaves it alone.
        feature_extractor: Its image processor.
        default_sample_size: Side of the token grid when a call names no size.
        default_guidance_scale: Guidance scale when a call names none; 5 in the paper, small models prefer less.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vqvae"
    _optional_components = ["tokenizer", "text_encoder", "image_encoder", "feature_extractor"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "pred_original_sample"]

    vqvae: VQModel
    tokenizer: PreTrainedTokenizerBase
    text_encoder: CLIPTextModelWithProjection
    unet: PaellaUNet
    scheduler: DiscreteRenoisingScheduler

    def __init__(
        self,
        vqvae: VQModel | GumbelVQModel,
        tokenizer: PreTrainedTokenizerBase | None,
        text_encoder: CLIPTextModelWithProjection | None,
        unet: PaellaUNet,
        scheduler: DiscreteRenoisingScheduler,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        default_sample_size: int = 32,
        default_guidance_scale: float = 5.0,
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
        self.register_to_config(default_sample_size=default_sample_size, default_guidance_scale=default_guidance_scale)
        self.vae_scale_factor = downsample_factor(vqvae) if vqvae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale = default_guidance_scale
        self._num_timesteps = 0
        self._interrupt = False

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> DiffusionPipeline:
        """diffusers' `from_pipe`, except that shared components keep their dtypes unless `dtype` is given."""
        names_dtype = kwargs.get("dtype") is not None or kwargs.get("torch_dtype") is not None
        if not names_dtype and kwargs.get("custom_pipeline") is None:
            kwargs["dtype"] = _KEEP_DTYPE
        return super().from_pipe(pipeline, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> "PaellaPipeline":
        """As in diffusers: moves and casts all components."""
        if kwargs.get("dtype") is _KEEP_DTYPE:
            return self
        return super().to(*args, **kwargs)

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
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> None:
        """Raises `ValueError` or `TypeError` for everything that can be known to be wrong before a model runs.

        The arguments are those of `__call__`, with the size resolved.
        """
        self._check_components()
        check_integer("num_inference_steps", num_inference_steps, 1)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        check_guidance_scale(guidance_scale)
        check_output_type(output_type)
        check_callback_tensors(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        grid = self._check_size(height, width)
        num_prompts = self._check_conditions(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, grid)
        batch_size = num_prompts * num_images_per_prompt
        check_generator(generator, batch_size, self._execution_device)
        if latents is not None:
            self._check_latents(latents, (batch_size, *grid))

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

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
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

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 12,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        temperature: float | tuple[float, float] | None = None,
        renoise_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Samples images.

        Args:
            prompt: One text or several; the empty text is allowed. What does not fit the text encoder is cut off, with
                a warning that quotes it.
            height: Pixels, a multiple of the tokenizer's factor times the network's; `width` alike, and the two may
                differ. By default those of `latents`, else `default_sample_size` tokens.
            num_inference_steps: Sampling steps, at least 1; the paper uses 8 to 12.
            guidance_scale: s in u + s * (c - u) on the logits, finite and >= 0: 0 ignores the prompt, 1 is the plain
                conditional prediction at half the cost. By default the pipeline's `default_guidance_scale`.
            negative_prompt: Text whose embedding replaces the zero vector in the null branch.
            num_images_per_prompt: Images for each prompt; those of the first prompt come first.
            generator: One for the batch, or a list with one an image: then image k depends on generator k alone.
            latents: Initial tokens `(b, h, w)` int64 in `[0, num_vec_classes)`, in place of a uniform draw.
            prompt_embeds: Un-normalised CLIP vectors `(n, d)`, or a map `(n, d, h, w)` over the token grid, in place
                of `prompt`.
            negative_prompt_embeds: The same for the null branch.
            temperature: Of the token draws, one value or (first step, last step); by default the scheduler's.
            renoise_steps: After how many of the steps tokens are renoised; by default all but the last.
            output_type: "pil"; "np" `(b, H, W, 3)` or "pt" `(b, 3, H, W)`, both in [0, 1]; "latent": the tokens
                `(b, h, w)`, not decoded.
            return_dict: False for a plain tuple.
            callback_on_step_end: `callback(pipe, step, timestep, tensors) -> dict`, called after each step; tensors
                that it returns replace those of the loop. `pipe._interrupt = True` skips the remaining steps.
            callback_on_step_end_tensor_inputs: Which tensors it gets, by default `["latents"]`; `pred_original_sample`
                holds the step's tokens before renoising, the better preview.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple that holds them.

        Order of the draws of each generator: initial tokens; then for each step those of `scheduler.step`.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        elif callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = ["latents"]
        scale = self.config["default_guidance_scale"] if guidance_scale is None else guidance_scale
        size = self._resolve_size(height, width, latents)

        # 1. Everything that can be refused is refused here, the schedule included: no model has run yet
        self.check_inputs(
            prompt,
            *size,
            num_inference_steps=num_inference_steps,
            guidance_scale=scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device
        if isinstance(temperature, (int, float)):
            temperature = (float(temperature), float(temperature))
        self.scheduler.set_timesteps(
            int(num_inference_steps), device=device, temperature=temperature, renoise_steps=renoise_steps
        )
        timesteps = self.scheduler.timesteps
        self._guidance_scale = float(scale)
        self._num_timesteps = len(timesteps)
        self._interrupt = False

        # 2. Conditions and initial tokens
        cond, null = self.encode_prompt(
            prompt,
            num_images_per_prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            device=device,
        )
        assert null is not None  # only without guidance
        cond, null = cond.to(self.unet.dtype), null.to(self.unet.dtype)
        tokens = self.prepare_latents(cond.shape[0], *size, generator=generator, latents=latents, device=device)
        initial_tokens = tokens

        # 3. Predict all tokens, draw, renoise some of them towards the initial ones
        with self.progress_bar(total=len(timesteps)) as progress_bar:  # pyright: ignore[reportCallIssue]
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                logits = self._predict(tokens, t, cond, null)
                tokens, drawn = self.scheduler.step(
                    logits.float(), t, tokens, initial_noise=initial_tokens, generator=generator, return_dict=False
                )
                if callback_on_step_end is not None:
                    named = {
                        "latents": tokens,
                        "prompt_embeds": cond,
                        "negative_prompt_embeds": null,
                        "pred_original_sample": drawn,
                    }
                    wanted = {name: named[name] for name in callback_on_step_end_tensor_inputs}
                    returned = callback_on_step_end(self, i, t, wanted) or {}
                    tokens = returned.get("latents", tokens)
                    cond = returned.get("prompt_embeds", cond)
                    null = returned.get("negative_prompt_embeds", null)
                progress_bar.update()

        # 4. Tokens to pixels
        images: Any = tokens
        if output_type != "latent":
            images = self.image_processor.postprocess(decode_indices(self.vqvae, tokens), output_type=output_type)
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
        window = self._text_window()
        inputs = self.tokenizer(
            texts, padding="max_length", max_length=window, truncation=True, return_tensors="pt", verbose=False
        )
        input_ids = inputs.input_ids
        self._warn_of_cut_texts(texts, window)
        vocab_size, eos = self.text_encoder.config.vocab_size, self.text_encoder.config.eos_token_id
        if int(input_ids.max()) >= vocab_size:
            raise ValueError(
                f"The tokenizer gives token {int(input_ids.max())}, the text encoder knows 0 to {vocab_size - 1}. Use"
                " the tokenizer that the text encoder was trained with."
            )
        has_eos = (input_ids == eos).any(dim=1)
        if eos != LEGACY_EOS and not bool(has_eos.all()):
            # transformers would pool at position 0: the same vector for every text, silently
            raise ValueError(
                f"The tokenizer ends no text with token {eos}, at which the text encoder pools"
                f" (text_encoder.config.eos_token_id); tokenizer.eos_token_id is {self.tokenizer.eos_token_id}."
                " Use the tokenizer that the text encoder was trained with."
            )
        return self.text_encoder(input_ids.to(device)).text_embeds

    def _text_window(self) -> int:
        # a tokenizer saved without model_max_length reports 1e30
        return min(int(self.tokenizer.model_max_length), self.text_encoder.config.max_position_embeddings)

    def _warn_of_cut_texts(self, texts: list[str], window: int) -> None:
        room = window - self.tokenizer.num_special_tokens_to_add()
        for text in texts:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            if len(ids) > room:
                logger.warning(
                    f"The text encoder reads {window} tokens; this part of the prompt was cut off:"
                    f" {self.tokenizer.decode(ids[room:])!r}"
                )

    def _resolve_size(self, height: Any, width: Any, latents: Any) -> tuple[Any, Any]:
        """Fills in the sizes that the caller left out; checks nothing."""
        rows = columns = self.config["default_sample_size"]
        if isinstance(latents, Tensor) and latents.ndim == 3:
            rows, columns = latents.shape[1:]
        return (
            rows * self.vae_scale_factor if height is None else height,
            columns * self.vae_scale_factor if width is None else width,
        )

    def _check_components(self) -> None:
        missing = [name for name in ("vqvae", "unet", "scheduler") if getattr(self, name) is None]
        if missing:
            raise ValueError(f"The pipeline was built without {', '.join(missing)}; sampling needs them.")
        codes = {
            "unet.config.num_vq_embeddings": self.unet.config["num_vq_embeddings"],
            "vqvae.config.num_vq_embeddings": self.vqvae.config["num_vq_embeddings"],
            "scheduler.config.num_vec_classes": self.scheduler.config["num_vec_classes"],
        }
        if len(set(codes.values())) > 1:
            listed = ", ".join(f"{name}={value}" for name, value in codes.items())
            raise ValueError(f"The components disagree on the number of token codes: {listed}.")

    def _check_size(self, height: int, width: int) -> tuple[int, int]:
        """The token grid (h, w) of a valid size in pixels."""
        multiple = self.vae_scale_factor * self.unet.downsample_factor
        # the smallest grid that the network takes, rounded up to what its levels divide
        smallest = math.ceil(self.unet.min_size / self.unet.downsample_factor) * multiple
        because = f"tokenizer {self.vae_scale_factor} x network {self.unet.downsample_factor}"
        check_side("height", height, multiple, smallest, because=because)
        check_side("width", width, multiple, smallest, because=because)
        return height // self.vae_scale_factor, width // self.vae_scale_factor

    def _check_conditions(
        self, prompt: Any, negative_prompt: Any, prompt_embeds: Any, negative_prompt_embeds: Any, grid: tuple[int, int]
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
        if (prompt is not None or negative_prompt is not None) and None in (self.tokenizer, self.text_encoder):
            raise ValueError(
                "The pipeline was built without tokenizer or text_encoder; pass `prompt_embeds` (and"
                " `negative_prompt_embeds`) in place of texts."
            )
        if self.text_encoder is not None and (prompt is not None or negative_prompt is not None):
            width = self.text_encoder.config.projection_dim
            if width != self.unet.config["condition_dim"]:
                raise ValueError(
                    f"The components do not fit together: text_encoder.config.projection_dim={width} differs from"
                    f" unet.config.condition_dim={self.unet.config['condition_dim']}."
                )
        return num_prompts

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

    def _check_latents(self, latents: Any, shape: tuple[int, int, int]) -> None:
        if not isinstance(latents, Tensor) or latents.dtype != torch.long:
            kind = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
            raise TypeError(f"`latents` must be an int64 tensor of token indices, received {kind}.")
        if tuple(latents.shape) != shape:
            raise ValueError(
                f"`latents` must have shape {shape} (images, height and width in tokens), received"
                f" {tuple(latents.shape)}."
            )
        num_codes = self.scheduler.config["num_vec_classes"]
        low, high = int(latents.min()), int(latents.max())
        if low < 0 or high >= num_codes:
            raise ValueError(f"`latents` must hold token indices 0 to {num_codes - 1}, received {low} to {high}.")


def _runs_plain_forward(unet: torch.nn.Module) -> bool:
    """Whether nothing compiles, wraps or watches `forward`, so that its two halves may be called one by one."""
    return (
        isinstance(unet, PaellaUNet)
        and "forward" not in vars(unet)  # offloading hooks put theirs there
        and unet._compiled_call_impl is None
        and not unet._forward_hooks
        and not unet._forward_pre_hooks
    )
