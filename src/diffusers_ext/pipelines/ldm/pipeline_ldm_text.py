"""Text to image with latent diffusion.

Rombach et al., arXiv 2112.10752, section 4.3.1; original: CompVis/latent-diffusion@a506df5:scripts/txt2img.py (code
and weights MIT). Differences: see `base.py`; negative prompts and embeddings may be given.
"""

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..callbacks import Callback, callback_tensor_names
from ..checks import as_texts, check_integer, check_parts
from ..clip_vectors import text_window
from ..tokenization import tokenize_texts, warn_of_cuts
from .base import Generators, LDMBasePipeline
from .checks import check_components
from .denoising import LDMCondition


class LDMTextPipeline(LDMBasePipeline):
    """Draws pictures that follow a text.

    Example:

        pipe(["a red circle", "a blue star"], negative_prompt="green", guidance_scale=5.0)

    Args:
        vqvae, unet, scheduler, latent_scale, default_sample_size, default_guidance_scale: see `LDMBasePipeline`.
        bert: text encoder, trained jointly with the U-Net; it attends to padding.
        tokenizer: texts to tokens; those of the released model are BERT's. Padded and cut to what `bert` reads. Both
            may be None: then `prompt_embeds` stand for the texts.
        null_condition: whether the network also learnt the empty text, which guidance needs.
    """

    _pipeline_tag = "text-to-image"
    _example = 'image = pipe("{prompt}").images[0]'

    model_cpu_offload_seq = "bert->unet->vqvae"
    _optional_components = ["bert", "tokenizer"]
    _usual_guidance_scale = 5.0

    bert: Any
    tokenizer: Any

    def __init__(
        self,
        vqvae: AutoencoderKL | VQModel,
        bert: LDMBertModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        unet: UNet2DConditionModel,
        scheduler: Any,
        null_condition: bool = True,
        latent_scale: float | None = None,
        default_sample_size: int | tuple[int, int] | dict[str, int] | None = None,
        default_guidance_scale: float | None = None,
    ):
        super().__init__(
            {"vqvae": vqvae, "bert": bert, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler},
            {
                "null_condition": null_condition,
                "latent_scale": latent_scale,
                "default_sample_size": default_sample_size,
                "default_guidance_scale": default_guidance_scale,
            },
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        eta: float = 0.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        tile_size: int | tuple[int, int] | None = None,
        tile_stride: int | tuple[int, int] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Samples pictures.

        Args:
            prompt: one text or several. What does not fit the text encoder is cut off, with a warning that quotes it.
            negative_prompt: what the pictures are guided away from, one text for all prompts or one a prompt; by
                default the empty text.
            prompt_embeds: vectors (n, l, d) of `encode_prompt` in place of `prompt`.
            negative_prompt_embeds: the same for the null branch, (1 or n, l, d).
            callback_on_step_end_tensor_inputs: also `prompt_embeds` and `negative_prompt_embeds`.

        The other arguments and the result are those of `LDMClassConditionalPipeline.__call__`.
        """
        callback_names = callback_tensor_names(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        scale = self._resolve_scale(guidance_scale)

        # 1. Everything that can be refused is refused here, the schedule included: no model has run yet
        check_components(self, context_width=self._width())
        has_negative = negative_prompt is not None or negative_prompt_embeds is not None
        can_guide = self.has_null_condition or has_negative
        null_prompt = "" if scale != 1.0 and not has_negative else negative_prompt
        num_prompts = self._check_prompts(prompt, null_prompt, prompt_embeds, negative_prompt_embeds)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        batch_size = num_prompts * num_images_per_prompt
        size = self._resolve_size(height, width, latents)
        tiles = self.check_inputs(
            batch_size,
            *size,
            can_guide=can_guide,
            num_inference_steps=num_inference_steps,
            guidance_scale=scale,
            eta=eta,
            generator=generator,
            latents=latents,
            tile_size=tile_size,
            tile_stride=tile_stride,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_names,
        )
        timesteps = self._begin_run(num_inference_steps, scale)

        # 2. Condition and initial noise
        def encode() -> LDMCondition:
            both = self.encode_prompt(
                prompt,
                num_images_per_prompt,
                do_classifier_free_guidance=self.do_classifier_free_guidance,
                negative_prompt=negative_prompt,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                device=timesteps.device,
            )
            return LDMCondition(*both)

        noise = self.prepare_latents(batch_size, *size, generator=generator, latents=latents, device=timesteps.device)

        # 3. Denoise
        sampled = self._sample(
            timesteps,
            noise,
            encode(),
            eta=eta,
            generator=generator,
            tiles=tiles,
            callback=callback_on_step_end,
            callback_names=callback_names,
            encode=encode,
            can_guide=can_guide,
        )

        # 4. Latents to pixels
        return self._end_run(sampled, output_type, return_dict, tiles=tiles)

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
        """Turns texts into sequences of vectors; needs only the tokenizer and the text encoder.

        Returns:
            Both conditions, (n * num_images_per_prompt, l, d) each, all pictures of the first prompt first; the second
            is None without guidance.
        """
        device = device if device is not None else self._execution_device
        if prompt_embeds is None:
            prompt_embeds = self._encode_texts(as_texts("prompt", prompt), device)
        prompt_embeds = prompt_embeds.to(device)
        null = negative_prompt_embeds
        if not do_classifier_free_guidance:
            null = None
        elif null is None:
            null = self._encode_texts(
                as_texts("negative_prompt", "" if negative_prompt is None else negative_prompt), device
            )
        if null is not None:
            null = null.to(prompt_embeds).expand_as(prompt_embeds).repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0), null

    @property
    def text_window(self) -> int:
        """How many tokens the text encoder reads, the first and the last included."""
        check_parts(self, "a text", "tokenizer", "bert")
        return text_window(self.tokenizer, self.bert)

    def _encode_texts(self, texts: list[str], device: torch.device | str) -> Tensor:
        """(n, l, d); padding is attended to, as in the training."""
        tokens, cut = tokenize_texts(self.tokenizer, texts, self.text_window)
        warn_of_cuts(self, cut, self.text_window)
        vocab_size = self.bert.config.vocab_size
        if int(tokens.max()) >= vocab_size:
            raise ValueError(
                f"The tokenizer gives token {int(tokens.max())}, the text encoder knows 0 to {vocab_size - 1}. Use the"
                " tokenizer that the text encoder was trained with."
            )
        return self.bert(tokens.to(device))[0]

    def _check_prompts(self, prompt: Any, negative_prompt: Any, prompt_embeds: Any, negative_embeds: Any) -> int:
        """The number of prompts, if both branches are well formed."""
        if (prompt is None) == (prompt_embeds is None):
            received = "neither" if prompt is None else "both"
            raise ValueError(f"Pass exactly one of `prompt` and `prompt_embeds`; received {received}.")
        if negative_prompt is not None and negative_embeds is not None:
            raise ValueError("Pass at most one of `negative_prompt` and `negative_prompt_embeds`; received both.")
        if None in (self.bert, self.tokenizer) and (prompt_embeds is None or negative_prompt is not None):
            raise ValueError(
                "The pipeline was built without bert or tokenizer: pass `prompt_embeds` in place of texts, and for"
                " guidance `negative_prompt_embeds`, also for the empty text."
            )
        if prompt_embeds is None:
            num_prompts, length = len(as_texts("prompt", prompt)), self.text_window
        else:
            self._check_embeds("prompt_embeds", prompt_embeds)
            num_prompts, length = prompt_embeds.shape[:2]
        if negative_prompt is not None:
            num_negative, negative_length = len(as_texts("negative_prompt", negative_prompt)), self.text_window
        elif negative_embeds is not None:
            self._check_embeds("negative_prompt_embeds", negative_embeds)
            num_negative, negative_length = negative_embeds.shape[:2]
        else:
            return num_prompts
        if num_negative not in (1, num_prompts):
            raise ValueError(
                f"There are {num_negative} negative prompts for {num_prompts} prompts; pass one for all of them or one"
                " a prompt."
            )
        if negative_length != length:
            raise ValueError(
                f"Negative prompts are {negative_length} vectors long, prompts {length}: both run in one batch, so"
                " encode both with `encode_prompt`."
            )
        return num_prompts

    def _check_embeds(self, name: str, embeds: Any) -> None:
        if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
            kind = embeds.dtype if isinstance(embeds, Tensor) else type(embeds).__name__
            raise TypeError(f"`{name}` must be a floating-point tensor, received {kind}.")
        width = self._width()
        if embeds.ndim != 3 or embeds.shape[0] == 0 or embeds.shape[2] != width:
            raise ValueError(f"`{name}` must have shape (n, l, {width}) with n >= 1, received {tuple(embeds.shape)}.")

    def _width(self) -> int:
        return self.unet.config["cross_attention_dim"] if self.bert is None else self.bert.config.d_model
