"""Structural editing with Paella v1: an image's tokens are noised part of the way and drawn anew under a prompt.

Paper: "Fast Text-Conditional Discrete Denoising on Vector-Quantized Latent Spaces", arXiv 2211.07292 (v1 text).
Original: the notebook dome272/Paella@97d18f9 (24 steps from the 8th, renoised to the previous tokens, guidance 6);
code and weights MIT. Difference: the image's own tokens are the most probable ones by default, the original draws
them.

Shapes: b samples, h x w the token grid.
"""

from functools import partial
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ...conditions.images import resize_images
from ...models.token_codec import decode_indices
from ..callbacks import Callback
from .base import Generators
from .editing import PaellaEditBasePipeline


class PaellaImg2ImgPipeline(PaellaEditBasePipeline):
    """Redraws an image under a prompt and keeps its structure.

    Takes the components of `PaellaPipeline`: `PaellaImg2ImgPipeline.from_pipe(pipe)` shares them.

    Example:

        pipe("a blue star", image=picture, strength=2 / 3, guidance_scale=6)
    """

    _pipeline_tag = "image-to-image"
    _example = """from diffusers.utils import load_image

image = pipe("{prompt}", image=load_image("picture.png"), strength=0.5).images[0]"""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        strength: float = 2 / 3,
        num_inference_steps: int = 24,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        temperature: float | tuple[float, float] | None = None,
        renoise_steps: int | None = None,
        renoise_mode: str = "prev",
        sample_mode: str = "argmax",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Samples images.

        Args:
            prompt: One text or several. The empty text is allowed. What does not fit the text encoder is cut off, with
                a warning that quotes it.
            image: The image, or one a prompt: PIL, array or tensor in [0, 1] (see `conditions.images.image_batch`), or
                its tokens `(b, h, w)` int64 as `output_type="latent"` returns them.
            strength: How much of the run is done, in [0, 1]. It starts at step `round((1 - strength) *
                num_inference_steps)`, with the image noised to that step's level. 0 returns the image as the tokenizer
                sees it. 1 draws from noise alone.
            num_inference_steps: Number of steps of the whole run. The notebook has 24 and starts at the 8th.
            guidance_scale: The scale s in u + s * (c - u) on the logits, finite and at least 0. 0 ignores the prompt.
                1 is the plain conditional prediction, at half the cost. By default the pipeline's
                `default_guidance_scale`.
            negative_prompt: One text, or one a prompt. Its embedding replaces the zero vector in the null branch.
            num_images_per_prompt: Number of images for each prompt. Those of the first prompt come first.
            generator: One generator for the batch, or a list with one an image. With a list, image k depends on
                generator k alone.
            latents: Random tokens `(b, h, w)` int64 that noise the image, in place of a draw.
            prompt_embeds: Un-normalised CLIP vectors `(n, d)`, or a map `(n, d, h, w)` over the token grid, in place
                of `prompt`.
            negative_prompt_embeds: Vectors or a map for the null branch, in place of `negative_prompt`.
            height: Height in pixels to which the image is resized, a multiple of the tokenizer's factor times the
                network's. By default the image's own, which then must be such a multiple.
            width: Width in pixels to which the image is resized, by the same rule.
            temperature: Temperature of the token draws: one value, or a pair (first step, last step). By default the
                scheduler's.
            renoise_steps: Number of steps after which tokens are renoised, counted from the start of the whole run. By
                default all steps but the last.
            renoise_mode: What renoised positions receive: "prev" (the tokens that the step started from, as in the
                notebook), "start" or "rand". See `DiscreteRenoisingScheduler`.
            sample_mode: "argmax" or "sample": how the image becomes tokens. Only a `GumbelVQModel` can sample, which
                is what the original does.
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

        Order of the draws of each generator: the image's tokens if sampled; uniforms, then tokens, of
        `scheduler.add_noise` (with strength 1: initial tokens only); then for each step those of `scheduler.step`.
        """
        callback_names = self.callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        scale = self.resolve_scale(guidance_scale)

        # 1. Everything that can be refused is refused here, the schedule included: no model has run yet
        self.check_edit(strength, sample_mode)
        if image is None:
            raise ValueError("`image` is needed: the picture to redraw.")
        source, size = self._resize_source(self._read_source(image), height, width)
        num_prompts = self.check_inputs(
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
        )
        self.check_count("image", len(source), num_prompts)
        timesteps = self.prepare_timesteps(
            num_inference_steps, temperature, renoise_steps, strength=strength, renoise_mode=renoise_mode
        )
        self.start_run(timesteps, scale)

        # 2. Conditions; the picture's tokens, noised
        cond, null = self.encode_prompt(
            prompt,
            num_images_per_prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        assert null is not None  # only without guidance
        tokens = self._source_tokens(source, cond.shape[0], sample_mode, generator)
        tokens = self._noise_source(tokens, timesteps, generator, latents)

        # 3. The remaining steps
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

    def _resize_source(self, source: Tensor, height: Any, width: Any) -> tuple[Tensor, tuple[int, int]]:
        """The image in the wanted size, and that size in pixels."""
        rows, columns = self._source_size(source)
        size = (rows if height is None else height, columns if width is None else width)
        self.check_size(
            *size,
            names=(
                "image.height" if height is None else "height",
                "image.width" if width is None else "width",
            ),
        )
        if source.is_floating_point():
            return resize_images(source, *size), size
        if size != (rows, columns):
            raise ValueError(
                f"`image` holds tokens of a picture of {columns}x{rows} pixels, which cannot be resized to"
                f" {size[1]}x{size[0]}: pass pixels, or leave `height` and `width` out."
            )
        return source, size
