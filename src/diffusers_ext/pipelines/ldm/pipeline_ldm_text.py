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

from ..callbacks import Callback
from ..checks import as_texts, check_integer, check_parts
from ..listed_options import record_sample_size
from ..tokenization import text_ids, text_window
from .base import Generators, LDMBasePipeline
from .denoising import LDMCondition
from .tiling import Tiles


class LDMTextPipeline(LDMBasePipeline):
    """Draws images that follow a prompt.

    Example:

        pipe(["a red circle", "a blue star"], negative_prompt="green", guidance_scale=5.0)

    Args:
        vqvae: The first stage, an `AutoencoderKL` or a `VQModel`. Its config holds the scale of the latents.
        bert: Text encoder, trained jointly with the U-Net. It attends to padding. It may be None together with the
            tokenizer; then calls take `prompt_embeds`.
        tokenizer: Prompts to tokens, padded and cut to what `bert` reads. The tokenizer of the released model is
            BERT's.
        unet: Predicts the noise under cross-attention to the prompt.
        scheduler: Any scheduler of diffusers that denoises with betas.
        null_condition: Whether the network also learnt the empty prompt, which guidance needs.
        latent_scale: By what latents are multiplied before diffusion, in place of `vqvae.config.scaling_factor`.
        default_sample_size: Side or (height, width) of the latents when a call names no size, in place of
            `unet.config.sample_size`.
        default_guidance_scale: Guidance scale when a call names none, in place of the one that the authors used.
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
        super().__init__(vqvae, unet, scheduler, latent_scale)
        self.register_modules(bert=bert, tokenizer=tokenizer)
        self.register_to_config(
            null_condition=null_condition,
            default_sample_size=record_sample_size(default_sample_size, None, None),
            default_guidance_scale=default_guidance_scale,
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
        guidance_rescale: float = 0.0,
    ) -> ImagePipelineOutput | tuple:
        """Draws images that follow prompts.

        Args:
            prompt: One prompt or several. What does not fit the text encoder is cut off, with a warning that quotes
                it.
            height: Height of the image in pixels, a multiple of the first stage's factor. The default is that of
                `latents`, else the height that the network was trained on. Larger images work, in one piece or in
                tiles.
            width: Width of the image in pixels, a multiple of the first stage's factor. The default is that of
                `latents`, else the width that the network was trained on.
            num_inference_steps: Number of sampling steps, at least 1. The authors use 20 to 250 with DDIM.
            guidance_scale: s in u + s * (c - u), finite and at least 0. 1 is the plain conditional prediction at half
                the cost, a larger scale follows the condition more closely, and 0 ignores it. The default is the
                checkpoint's scale, else the authors'. A scale other than 1 needs a network that was also trained
                without its condition.
            eta: Noise of DDIM's steps in [0, 1]; 0 adds none. Schedulers without it ignore it.
            negative_prompt: What the images are guided away from, one text for all prompts or one for each. The
                default is the empty text.
            num_images_per_prompt: Number of images for each prompt. The images of the first prompt come first.
            generator: One generator for the batch, or a list with one for each image. With a list, image k depends on
                generator k alone.
            latents: Standard normal noise (b, c, h, w) in place of a draw. The scheduler scales it.
            prompt_embeds: Vectors (n, l, d) of `encode_prompt` in place of `prompt`.
            negative_prompt_embeds: Vectors (1 or n, l, d) in place of `negative_prompt`.
            tile_size: Side or (height, width) in pixels of the tiles in which the network and the first stage see the
                image. Tiles are blended by the distance from their borders. They are for images that are larger than
                those of the training, or than the memory holds. None means one piece.
            tile_stride: Pixels from tile to tile, one number or (down, across). The default is half a tile.
            output_type: "pil"; "np" (b, H, W, 3) or "pt" (b, 3, H, W), both in [0, 1]; or "latent" for the latents as
                the network sees them, scaled and not decoded.
            return_dict: Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: `callback(pipe, step, timestep, tensors) -> dict`, called after each step. Tensors
                that it returns replace those of the loop. `pipe._interrupt = True` skips the remaining steps.
                `pipe._guidance_scale` may be set; 1 turns guidance off, and so does 0, which diffusers' callbacks set.
            callback_on_step_end_tensor_inputs: Names of the tensors that the callback gets, by default `["latents"]`.
                `prompt_embeds` and `negative_prompt_embeds` are the context of the condition and of the null branch.
                `pred_original_sample` holds the clean latents that the step's prediction amounts to, for reading only.
            guidance_rescale: Share in [0, 1] of normalised guidance (PITI, arXiv 2205.12952): 1 gives the guided
                prediction the mean and the standard deviation of the conditional one, sample by sample, against the
                oversaturation of large scales; 0 is plain guidance. The argument of diffusers (arXiv 2305.08891)
                corrects the standard deviation alone.

        Returns:
            `ImagePipelineOutput` with the `images`, or a tuple that holds them.

        Order of the draws of each generator: the initial noise, then those of `scheduler.step` in each step.
        """
        self.check_components()
        scale = self.resolve_scale(guidance_scale)
        has_negative = negative_prompt is not None or negative_prompt_embeds is not None
        null_prompt = "" if scale != 1.0 and not has_negative else negative_prompt
        num_prompts = self._check_prompts(prompt, null_prompt, prompt_embeds, negative_prompt_embeds)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)

        def encode(device: torch.device, tiles: Tiles | None) -> LDMCondition:
            context, null_context = self.encode_prompt(
                prompt,
                num_images_per_prompt,
                do_classifier_free_guidance=self.do_classifier_free_guidance,
                negative_prompt=negative_prompt,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                device=device,
            )
            return LDMCondition(context, null_context)

        return self.run(
            num_prompts * num_images_per_prompt,
            self.resolve_size(height, width, latents),
            encode,
            num_inference_steps=num_inference_steps,
            guidance_scale=scale,
            eta=eta,
            generator=generator,
            latents=latents,
            tile_size=tile_size,
            tile_stride=tile_stride,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            guidance_rescale=guidance_rescale,
            can_guide=self.has_null_condition or has_negative,
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
        """Turns texts into sequences of vectors. It needs only the tokenizer and the text encoder.

        Returns:
            Both conditions, (n * num_images_per_prompt, l, d) each, those of the first prompt come first. The
            second is None without guidance.
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
    def context_width(self) -> int:
        if self.bert is None:
            check_parts(self, "a text", "unet")
        return self.unet.config["cross_attention_dim"] if self.bert is None else self.bert.config.d_model

    @property
    def text_window(self) -> int:
        """How many tokens the text encoder reads, the first and the last included."""
        check_parts(self, "a text", "tokenizer", "bert")
        return text_window(self.tokenizer, self.bert)

    def _encode_texts(self, texts: list[str], device: torch.device | str) -> Tensor:
        """(n, l, d); padding is attended to, as in the training."""
        check_parts(self, "a text", "tokenizer", "bert")
        ids = text_ids(self.tokenizer, self.bert, texts, pipe=self).to(device)
        return self.bert(ids, return_dict=False)[0]  # given: its default is read by a name that is deprecated

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
        width = self.context_width
        if embeds.ndim != 3 or embeds.shape[0] == 0 or embeds.shape[2] != width:
            raise ValueError(f"`{name}` must have shape (n, l, {width}) with n >= 1, received {tuple(embeds.shape)}.")
