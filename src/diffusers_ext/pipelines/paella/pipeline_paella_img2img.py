"""Structural editing with Paella v1: a picture's tokens are noised part of the way and drawn anew under a prompt.

Paper: "Fast Text-Conditional Discrete Denoising on Vector-Quantized Latent Spaces", arXiv 2211.07292 (v1 text).
Original: the notebook dome272/Paella@97d18f9 (24 steps from the 8th, renoised to the previous tokens, guidance 6);
code and weights MIT. Difference: the picture's own tokens are the most probable ones by default, the original draws
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
from ..callbacks import Callback, callback_tensor_names
from .base import Generators
from .editing import PaellaEditBasePipeline


class PaellaImg2ImgPipeline(PaellaEditBasePipeline):
    """Redraws a picture under a prompt and keeps its structure.

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
            image: The picture, or one a prompt: PIL, array or tensor in [0, 1] (see `conditions.images.image_batch`),
                or its tokens `(b, h, w)` int64 as `output_type="latent"` returns them.
            strength: In [0, 1], how much of the run is done: it starts at step
                `round((1 - strength) * num_inference_steps)`, with the picture noised to that step's level. 0 returns
                the picture as the tokenizer sees it, 1 draws from noise alone.
            num_inference_steps: Of the whole run, T; the notebook has 24 and starts at the 8th.
            latents: Random tokens `(b, h, w)` int64 that noise the picture, in place of a draw.
            height: Pixels to resize the picture to, multiples of the tokenizer's factor times the network's; `width`
                alike. By default the picture's own, which then must be such a multiple.
            renoise_steps: Counted from the start of the whole run; by default all steps but the last.
            renoise_mode: What renoised positions receive: "prev" (the tokens that the step started from, the
                notebook's), "start" or "rand"; see `DiscreteRenoisingScheduler`.
            sample_mode: "argmax" or "sample": how the picture becomes tokens. Only a `GumbelVQModel` can sample, which
                is what the original does.

        The other arguments and the result are those of `PaellaPipeline.__call__`.

        Order of the draws of each generator: the picture's tokens if sampled; uniforms, then tokens, of
        `scheduler.add_noise` (with strength 1: initial tokens only); then for each step those of `scheduler.step`.
        """
        callback_names = callback_tensor_names(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
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
        timesteps = self._begin_run(
            num_inference_steps, scale, temperature, renoise_steps, strength=strength, renoise_mode=renoise_mode
        )

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
        """The picture in the wanted size, and that size in pixels."""
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
