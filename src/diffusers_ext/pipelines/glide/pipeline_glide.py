"""Text to image with GLIDE: 64x64 pixels, then 256x256; inpainting with the checkpoints that were tuned for it.

Nichol et al., "GLIDE: Towards Photorealistic Image Generation and Editing with Text-Guided Diffusion Models", arXiv
2112.10741; original: openai/glide-text2im@69b5307:notebooks/text2im.ipynb and inpaint.ipynb (code and weights MIT).
Differences: any scheduler of diffusers that has such betas; negative prompts; one generator for each image if wanted.
"""

from functools import partial
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...conditions.images import image_batch
from ...conditions.masks import mask_batch
from ...degradations.resizing import round_to_8_bits
from ...models.encoder_glide_text import GlideTextEncoder
from ..callbacks import Callback
from ..checks import as_texts, check_integer, check_mask, check_one_or_each, check_parts
from ..tokenization import tokenize_texts, warn_of_cuts
from .base import CHANNELS, Generators, GlideBasePipeline, Run

_INPAINTS = CHANNELS + 1  # channels that an inpainting U-Net has more: masked image and mask


class GlidePipeline(GlideBasePipeline):
    """Draws images that follow a prompt, or fills a part of an image.

    Example:

        pipe("a corgi in a field", generator=torch.Generator().manual_seed(0)).images[0]

    Args:
        text_encoder: What the base U-Net was trained with.
        tokenizer: Prompts to tokens, GPT-2's for the released models. It is shared by both stages.
        unet: Predicts the noise of the small image, from 3 channels, or 7 for inpainting.
        scheduler: Any scheduler of diffusers that denoises with betas.
        upscale_text_encoder: What the upsampler was trained with. The upsampler may be None, with all of its parts.
        upscale_unet: Predicts the noise of the large image, from 6 channels, or 10 for inpainting.
        upscale_scheduler: Any scheduler of diffusers that denoises with betas.
        lower_case: Whether prompts are written in lower case first, as in the training of the released models.
        default_guidance_scale: Guidance scale when a call names none, in place of the authors' 3.
    """

    _pipeline_tag = "text-to-image"
    _example = 'image = pipe("{prompt}").images[0]'

    model_cpu_offload_seq = "text_encoder->unet->upscale_text_encoder->upscale_unet"
    _optional_components = ["upscale_text_encoder", "upscale_unet", "upscale_scheduler"]
    _usual_guidance_scale = 3.0
    to_8_bits = staticmethod(round_to_8_bits)

    text_encoder: GlideTextEncoder
    tokenizer: Any
    upscale_text_encoder: GlideTextEncoder | None

    def __init__(
        self,
        text_encoder: GlideTextEncoder,
        tokenizer: PreTrainedTokenizerBase,
        unet: UNet2DConditionModel,
        scheduler: Any,
        upscale_text_encoder: GlideTextEncoder | None = None,
        upscale_unet: UNet2DConditionModel | None = None,
        upscale_scheduler: Any = None,
        lower_case: bool = True,
        default_guidance_scale: float | None = None,
    ):
        super().__init__(unet, scheduler, upscale_unet, upscale_scheduler)
        self.register_modules(
            text_encoder=text_encoder, tokenizer=tokenizer, upscale_text_encoder=upscale_text_encoder
        )
        self.register_to_config(lower_case=lower_case, default_guidance_scale=default_guidance_scale)

    @property
    def inpaints(self) -> bool:
        """Whether the U-Nets are those that fill parts of images."""
        check_parts(self, "a run", "unet")
        return self.unet.config["in_channels"] == CHANNELS + _INPAINTS

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        image: Any = None,
        mask_image: Any = None,
        num_inference_steps: int | str | None = None,
        upscale_num_inference_steps: int | str | None = None,
        guidance_scale: float | None = None,
        eta: float = 0.0,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        upscale_latents: Tensor | None = None,
        upscale_temperature: float = 0.997,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draws images that follow prompts.

        Args:
            prompt: One prompt or several. What does not fit the text encoder is cut off, with a warning that quotes
                it. The empty text draws anything.
            image: Inpainting checkpoints only: the image to fill, one or as many as prompts. It is resized.
            mask_image: Inpainting checkpoints only: white is filled, black stays.
            num_inference_steps: Number of steps of the small image, at least 1. `RespacedScheduler` also takes a
                respacing such as "100" or "10,10,3,2,2". The default is the checkpoint's, else 100.
            upscale_num_inference_steps: The same for the large image; the default is the checkpoint's, else 27.
            guidance_scale: s in u + s * (c - u) for the small image, finite and at least 0. 1 is the plain
                conditional prediction at half the cost. The default is the checkpoint's scale, else the authors' 3.
                The upsampler is not guided.
            eta: Noise of DDIM's steps in [0, 1]; 0 adds none. Schedulers without it ignore it.
            negative_prompt: What the images are guided away from, one text for all prompts or one for each. The
                default is the empty text.
            num_images_per_prompt: Number of images for each prompt. The images of the first prompt come first.
            generator: One generator for the batch, or a list with one for each image. With a list, image k depends on
                generator k alone.
            latents: Standard normal noise (b, 3, h, w) of the small image in place of a draw.
            upscale_latents: Standard normal noise (b, 3, H, W) of the large image in place of a draw.
            upscale_temperature: What the large image's noise is multiplied by.
            output_type: "pil"; "np" (b, H, W, 3) or "pt" (b, 3, H, W), both in [0, 1]; or "latent" for what the last
                stage denoised, not clamped.
            return_dict: Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: `callback(pipe, step, timestep, tensors) -> dict`, called after each step of both
                stages; `pipe.stage` tells which. Tensors that it returns replace those of the loop.
                `pipe._interrupt = True` ends the run with what the stage has.
            callback_on_step_end_tensor_inputs: Names of the tensors that the callback gets, by default `["latents"]`.
                `prompt_embeds` and `negative_prompt_embeds` are the tokens (b, l + 1, d) of both branches, the vector
                of the whole text last. `pred_original_sample` is the clean image that the step's prediction amounts
                to, for reading only.

        Returns:
            `ImagePipelineOutput` with the `images`, or a tuple that holds them.

        Raises:
            TypeError, ValueError: For arguments of another kind or range, before any network runs.

        Order of the draws of each generator: noise of the small image, of its steps, of the large image, of its steps.
        """
        # 1. Everything that can be refused is refused here
        self.check_components()
        texts = as_texts("prompt", prompt)
        negative = as_texts("negative_prompt", "" if negative_prompt is None else negative_prompt)
        check_one_or_each("negative_prompt", len(negative), len(texts), "prompts")
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        run = Run(
            guidance_scale=self.resolve_scale(guidance_scale),
            eta=eta,
            generator=generator,
            latents=latents,
            upscale_latents=upscale_latents,
            upscale_temperature=upscale_temperature,
            callback=callback_on_step_end,
            callback_tensors=callback_on_step_end_tensor_inputs,
            num_inference_steps=num_inference_steps,
            upscale_num_inference_steps=upscale_num_inference_steps,
        )
        images, keep = self._read_images(image, mask_image, len(texts))
        batch_size = len(texts) * num_images_per_prompt
        self.check_run(run, batch_size, output_type)

        # 2. One stage after the other
        null_texts = negative * (len(texts) if len(negative) == 1 else 1)
        drawn: Tensor | None = None
        for name, *_ in self.stage_parts():
            encoder = self.text_encoder if name == "base" else self.upscale_text_encoder
            encode = partial(self.encode_prompt, num_images_per_prompt=num_images_per_prompt, text_encoder=encoder)
            stage = self.prepare_stage(name, run, encode(texts), partial(encode, null_texts), drawn, images, keep)
            drawn = self.run_stage(stage, run)
            if self.interrupt:
                break
        assert drawn is not None
        return self.finish_images(drawn, output_type, return_dict)

    def encode_prompt(
        self, prompt: str | list[str], num_images_per_prompt: int = 1, *, text_encoder: GlideTextEncoder | None = None
    ) -> Tensor:
        """Texts to tokens and the vector behind them, (n * num_images_per_prompt, l + 1, d).

        Args:
            text_encoder: one of the pipeline's two, by default the base stage's.
        """
        check_parts(self, "a prompt", "text_encoder", "tokenizer")
        text_encoder = self.text_encoder if text_encoder is None else text_encoder
        texts = as_texts("prompt", prompt)
        texts = [text.lower() for text in texts] if self.config["lower_case"] else texts
        window = text_encoder.config["max_length"]
        tokens, cut = tokenize_texts(self.tokenizer, texts, window)
        if text_encoder is self.text_encoder:  # the second stage reads the same texts
            warn_of_cuts(self, cut, window)
        mask = tokens != self.tokenizer.pad_token_id
        device = self._execution_device
        states, vector = text_encoder(tokens.to(device), mask.to(device), return_dict=False)
        return torch.cat([states, vector[:, None]], dim=1).repeat_interleave(num_images_per_prompt, dim=0)

    def check_components(self) -> None:
        """All components fit: the U-Nets take what the text encoders give."""
        check_parts(self, "a prompt", "text_encoder", "tokenizer", "unet", "scheduler")
        self.check_stages()
        if self.upscales:
            check_parts(self, "the upsampler", "upscale_text_encoder")
        if self.tokenizer.pad_token_id is None:
            raise ValueError(
                f"The tokenizer ({type(self.tokenizer).__name__}) has no padding token: set `tokenizer.pad_token` to"
                " the one of the training; the released models pad with GPT-2's end token."
            )
        encoders = {"base": self.text_encoder, "upscale": self.upscale_text_encoder}
        for name, unet, _ in self.stage_parts():
            prefix, encoder = ("" if name == "base" else "upscale_"), encoders[name]
            width, wanted = encoder.config["hidden_size"], unet.config["cross_attention_dim"]
            if width != wanted:
                raise ValueError(
                    f"`{prefix}unet` attends to tokens of width {wanted}, `{prefix}text_encoder` gives {width}: load"
                    " the pair that was trained together."
                )
            usual = CHANNELS if name == "base" else 2 * CHANNELS
            wanted = usual + _INPAINTS if self.inpaints else usual
            if unet.config["in_channels"] != wanted:
                raise ValueError(
                    f"`{prefix}unet` takes {unet.config['in_channels']} channels, expected {wanted}"
                    f"{' beside a base U-Net for inpainting' if self.inpaints else ''}: base models have {CHANNELS}"
                    f" and upsamplers {2 * CHANNELS}, those for inpainting {_INPAINTS} more."
                )
            if len(self.tokenizer) > encoder.config["vocab_size"]:
                raise ValueError(
                    f"The tokenizer has {len(self.tokenizer)} tokens, `{prefix}text_encoder` knows"
                    f" {encoder.config['vocab_size']}. Use the tokenizer that it was trained with."
                )

    def _read_images(self, image: Any, mask_image: Any, num_prompts: int) -> tuple[Tensor | None, Tensor | None]:
        """Images (n, 3, H, W) in [-1, 1] and what of them stays (n, 1, H, W), or None and None without inpainting."""
        if not self.inpaints:
            if image is not None or mask_image is not None:
                raise ValueError(
                    "`image` or `mask_image` is given, but this checkpoint draws whole images: its U-Net takes"
                    f" {self.unet.config['in_channels']} channels. Load one for inpainting (base_inpaint.pt)."
                )
            return None, None
        if image is None or mask_image is None:
            missing = "image" if image is None else "mask_image"
            raise ValueError(
                f"`{missing}` is None, but this checkpoint fills parts of images: pass `image` and `mask_image`."
            )
        images, mask = image_batch(image) * 2 - 1, mask_batch(mask_image)
        check_one_or_each("image", len(images), num_prompts, "prompts")
        check_one_or_each("mask_image", len(mask), len(images), "images")
        check_mask(mask, images)
        return images, (~mask[:, None]).float()
