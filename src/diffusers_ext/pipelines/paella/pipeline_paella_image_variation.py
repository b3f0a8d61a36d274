"""Image variations with Paella v1: an image's CLIP vector takes the place of the text's.

Paper: "Fast Text-Conditional Discrete Denoising on Vector-Quantized Latent Spaces", arXiv 2211.07292 (v1 text).
Original: the notebook dome272/Paella@97d18f9, with weights fine-tuned on image vectors (`f8_img_40000.pt`); code and
weights MIT. The vectors are the projected ones, not normalised.
"""

from functools import partial
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ...conditions.images import image_list
from ...models.token_codec import decode_indices
from ..callbacks import Callback
from .base import Generators, PaellaBasePipeline


class PaellaImageVariationPipeline(PaellaBasePipeline):
    """Draws other images of what an image shows.

    Takes the components of `PaellaPipeline`, image encoder and feature extractor included; tokenizer and text encoder
    may be None. The network should be one that was fine-tuned on image vectors (`train_paella.py --condition image`).

    Example:

        pipe(picture, num_images_per_prompt=4)
    """

    _pipeline_tag = "image-to-image"
    _card_tags = ("image-variation",)
    _example = """from diffusers.utils import load_image

image = pipe(load_image("picture.png")).images[0]"""

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 12,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
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
            image: One image or several, of any sizes: PIL, array or tensor in [0, 1], or a list of them (see
                `conditions.images.image_list`).
            height: Height of the result in pixels, a multiple of the tokenizer's factor times the network's. By
                default that of `latents`, else that of the pipeline's `default_sample_size`.
            width: Width of the result in pixels, a multiple of the same number. It may differ from the height. By
                default that of `latents`, else that of the pipeline's `default_sample_size`.
            num_inference_steps: Number of sampling steps, at least 1. The paper uses 8 to 12.
            guidance_scale: The scale s in u + s * (c - u) on the logits, finite and at least 0. 0 ignores the image. 1
                is the plain conditional prediction, at half the cost. By default the pipeline's
                `default_guidance_scale`.
            negative_prompt: One text, or one an image. Its embedding replaces the zero vector in the null branch.
            num_images_per_prompt: Number of results for each image. Those of the first image come first.
            generator: One generator for the batch, or a list with one an image. With a list, image k depends on
                generator k alone.
            latents: Initial tokens `(b, h, w)` int64 in `[0, num_vec_classes)`, in place of a uniform draw.
            prompt_embeds: Vectors `(n, d)` of `encode_image`, or a map `(n, d, h, w)` over the token grid, in place of
                `image`.
            negative_prompt_embeds: Vectors or a map for the null branch, in place of `negative_prompt`.
            temperature: Temperature of the token draws: one value, or a pair (first step, last step). By default the
                scheduler's.
            renoise_steps: Number of steps after which tokens are renoised. By default all but the last.
            output_type: "pil"; "np" `(b, H, W, 3)` or "pt" `(b, 3, H, W)`, both in [0, 1]; or "latent" for the tokens
                `(b, h, w)`, which are not decoded then.
            return_dict: False returns a plain tuple.
            callback_on_step_end: `callback(pipe, step, timestep, tensors) -> dict`, called after each step. Tensors
                that it returns replace those of the loop. It may set `pipe._interrupt = True`, which skips the
                remaining steps, and `pipe._guidance_scale`, where 1 (or 0, as diffusers' callbacks do) turns guidance
                off.
            callback_on_step_end_tensor_inputs: Names of the tensors that it gets, by default `["latents"]`.
                `pred_original_sample` holds the step's tokens before renoising, which make the better preview.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple that holds them.

        Order of the draws of each generator: initial tokens; then for each step those of `scheduler.step`.
        """
        callback_names = self.callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        scale = self.resolve_scale(guidance_scale)
        size = self.resolve_size(height, width, latents)

        # 1. Everything that can be refused is refused here, the schedule included: no model has run yet
        self.check_components()
        if (image is None) == (prompt_embeds is None):
            raise ValueError(
                f"Pass exactly one of `image` and `prompt_embeds`; received {'neither' if image is None else 'both'}."
            )
        checked = prompt_embeds
        if image is not None:
            self.check_encoder("image_encoder")
            image = image_list(image)
            checked = torch.empty(
                len(image), self.unet.config["condition_dim"], device="meta"
            )  # of the vectors' shape
        self.check_inputs(
            None,
            *size,
            num_inference_steps=num_inference_steps,
            guidance_scale=scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=checked,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
        )
        timesteps = self.prepare_timesteps(num_inference_steps, temperature, renoise_steps)
        self.start_run(timesteps, scale)

        # 2. Conditions and initial tokens
        cond, null = self.encode_prompt(
            None,
            num_images_per_prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=self.encode_image(image) if prompt_embeds is None else prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        assert null is not None  # only without guidance
        tokens = self.prepare_latents(cond.shape[0], *size, generator=generator, latents=latents)

        # 3. Predict all tokens, draw, renoise some of them towards the initial ones
        tokens = self._sample(
            timesteps,
            tokens,
            cond,
            null,
            generator=generator,
            callback=callback_on_step_end,
            callback_names=callback_names,
        )

        # 4. Tokens to pixels
        return self.finish(tokens, output_type, return_dict, partial(decode_indices, self.vqvae))
