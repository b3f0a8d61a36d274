"""Text to image with Paella v1: discrete tokens, a convolutional token predictor, a dozen parallel sampling steps.

Paper: "Fast Text-Conditional Discrete Denoising on Vector-Quantized Latent Spaces", arXiv 2211.07292 (v1 text).
Original: dome272/Paella@b1f88ef and its sampling notebook @97d18f9; code and weights MIT. Differences: see
`base.py`, which holds the loop, and `conditions/regions.py`.

Shapes: b samples, n prompts, h x w the token grid, H x W pixels, d the width of the condition.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ...conditions.regions import (
    RAMPS,
    check_interpolation,
    interpolate_vectors,
    ramp_map,
    region_map,
    region_weights,
)
from ...models.token_codec import decode_indices
from ..callbacks import Callback
from ..checks import check_integer
from .base import Generators, PaellaBasePipeline


class PaellaPipeline(PaellaBasePipeline):
    """Draws images that follow a text, several texts in one image, or the way from one text to another.

    The text condition is the projected, **un-normalised** vector of a CLIP text model; the null condition of
    classifier-free guidance is the zero vector, as in training, unless a negative prompt takes its place.

    Which tokens are drawn (typical filtering and its mass, Gumbel or multinomial draws, what is renoised and where) is
    the scheduler's configuration and travels with the checkpoint. To change it:
    `pipe.scheduler = DiscreteRenoisingScheduler.from_config(pipe.scheduler.config, typical_mass=0.5)`.

    The components are described at `__init__`; the image encoder is used by `encode_image` only.

    Example:

        pipe(["a red circle", "a blue star"])                      # two images
        pipe(["a red circle", "a blue star"], regions="columns")   # one image, left and right
        pipe(class_labels=["three", 7])                            # networks that were trained on classes
        pipe.interpolate(["a red circle", "a blue star"], num_frames=8, interpolation="slerp")
    """

    _pipeline_tag = "text-to-image"
    _example = 'image = pipe("{prompt}").images[0]'

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
        regions: Any = None,
        class_labels: Any = None,
    ) -> ImagePipelineOutput | tuple:
        """Samples images.

        Args:
            prompt: One text or several. The empty text is allowed. What does not fit the text encoder is cut off, with
                a warning that quotes it.
            height: Height of the image in pixels, a multiple of the tokenizer's factor times the network's. By default
                that of `latents`, else that of the pipeline's `default_sample_size`.
            width: Width of the image in pixels, a multiple of the same number. It may differ from the height. By
                default that of `latents`, else that of the pipeline's `default_sample_size`.
            num_inference_steps: Number of sampling steps, at least 1. The paper uses 8 to 12.
            guidance_scale: The scale s in u + s * (c - u) on the logits, finite and at least 0. 0 ignores the prompt.
                1 is the plain conditional prediction, at half the cost. By default the pipeline's
                `default_guidance_scale`.
            negative_prompt: One text, or one a prompt. Its embedding replaces the zero vector in the null branch.
            num_images_per_prompt: Number of images for each prompt. Those of the first prompt come first.
            generator: One generator for the batch, or a list with one an image. With a list, image k depends on
                generator k alone.
            latents: Initial tokens `(b, h, w)` int64 in `[0, num_vec_classes)`, in place of a uniform draw.
            prompt_embeds: Un-normalised CLIP vectors `(n, d)`, or a map `(n, d, h, w)` over the token grid, in place
                of `prompt`.
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
            regions: Lets all prompts share one image, each in its own region: "columns" or "rows" (equal strips in the
                order of the prompts), "column_ramp" or "row_ramp" (each place between two prompts), or a list with one
                entry a prompt. An entry is a box `(left, top, right, bottom)` in pixels, a mask of the image's size,
                or None for the rest. See `encode_regions`.
            class_labels: One class or several, by number or name, in place of `prompt`, for networks that were trained
                on classes (`train_paella.py --condition class`). See `encode_labels`.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple that holds them.

        Order of the draws of each generator: initial tokens; then for each step those of `scheduler.step`.
        """
        callback_names = self.callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        scale = self.resolve_scale(guidance_scale)
        size = self.resolve_size(height, width, latents)

        # 1. Everything that can be refused is refused here, the schedule included: no model has run yet
        if class_labels is not None:
            if prompt is not None or prompt_embeds is not None:
                raise ValueError("Pass one of `prompt`, `prompt_embeds` and `class_labels`; received more.")
            self.check_components()
            prompt_embeds = self.encode_labels(class_labels)
        blank_map = None
        if regions is not None:
            blank_map = self._check_regions(prompt, prompt_embeds, regions, *size)
        self.check_inputs(
            prompt if blank_map is None else None,
            *size,
            num_inference_steps=num_inference_steps,
            guidance_scale=scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds if blank_map is None else blank_map,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
        )
        timesteps = self.prepare_timesteps(num_inference_steps, temperature, renoise_steps)
        self.start_run(timesteps, scale)

        # 2. Conditions and initial tokens
        if regions is not None:
            prompt, prompt_embeds = None, self.encode_regions(prompt, regions, *size, prompt_embeds=prompt_embeds)
        cond, null = self.encode_prompt(
            prompt,
            num_images_per_prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        assert null is not None  # made at every scale: a callback may turn guidance on
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

    def encode_regions(
        self,
        prompt: str | list[str] | None,
        regions: Any,
        height: int | None = None,
        width: int | None = None,
        *,
        interpolation: str = "lerp",
        prompt_embeds: Tensor | None = None,
    ) -> Tensor:
        """Several prompts as one condition map `(1, d, h, w)` over the token grid.

        `pipe(prompt, regions=regions)` uses it. Pass it as `prompt_embeds` to any Paella pipeline, several
        concatenated for a batch of such images. The null branch of a map is zeros, as in the notebook.

        Args:
            prompt: One text a region.
            regions: "columns" or "rows" are equal strips. "column_ramp" or "row_ramp" go from the first prompt at the
                left (top) border through all to the last one at the other. Or one entry a prompt: a box `(left, top,
                right, bottom)` in pixels as in PIL; a black and white mask of the image's size, white inside; None
                (once) for all that the others leave. Together the entries cover the image and do not overlap. A token
                on an edge mixes by area. Or a float tensor `(n, H, W)` or `(n, h, w)` of weights that sum to 1.
            height: Height of the image in pixels, by default as in `__call__`.
            width: Width of the image in pixels, by default as in `__call__`.
            interpolation: "lerp" or "slerp", for the ramps.
            prompt_embeds: Vectors `(n, d)` in place of the texts, for instance those of `encode_image`.
        """
        rows, columns = self.resolve_size(height, width)
        self._check_regions(prompt, prompt_embeds, regions, rows, columns, interpolation)
        vectors = self.encode_prompt(prompt, do_classifier_free_guidance=False, prompt_embeds=prompt_embeds)[0]
        factor = self.vae_scale_factor
        if isinstance(regions, str) and regions in RAMPS:
            return ramp_map(vectors, rows // factor, columns // factor, regions, interpolation)[None]
        return region_map(vectors, region_weights(regions, len(vectors), rows, columns, factor))[None]

    @torch.no_grad()
    def interpolate(
        self,
        prompt: list[str] | None = None,
        num_frames: int = 10,
        interpolation: str = "lerp",
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 12,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        temperature: float | tuple[float, float] | None = None,
        renoise_steps: int | None = None,
        batch_size: int = 8,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Images on the way from the first prompt through all to the last, drawn with the same noise.

        Frame k sees every random number that a plain call with this generator would: the first and the last frame are
        `pipe(prompt[0], generator=...)` and `pipe(prompt[-1], generator=...)`, and the generator is left as by one
        such call.

        Args:
            prompt: Two texts or more.
            num_frames: Number of images, at least that of the prompts, evenly spaced. The first and the last belong to
                the first and the last prompt.
            interpolation: How the text vectors are mixed: "lerp", or "slerp" along the arc with magnitudes kept.
            height: Height of the images in pixels, as in `__call__`.
            width: Width of the images in pixels, as in `__call__`.
            num_inference_steps: Number of sampling steps.
            guidance_scale: Guidance scale, by default the pipeline's `default_guidance_scale`.
            negative_prompt: One text for all frames.
            generator: One generator for all frames. By default one seeded from torch's global generator.
            latents: Initial tokens `(1, h, w)` of all frames.
            prompt_embeds: Vectors `(n, d)` in place of the texts.
            temperature: Temperature of the token draws, as in `__call__`.
            renoise_steps: Number of steps after which tokens are renoised.
            batch_size: Number of frames drawn together. It changes memory and time only.
            output_type: "pil", "np", "pt" or "latent", as in `__call__`.
            return_dict: False returns a plain tuple.

        Returns:
            `ImagePipelineOutput` with `images`, one a frame, or a tuple that holds them.
        """
        scale = self.resolve_scale(guidance_scale)
        size = self.resolve_size(height, width, latents)
        self._check_frames(prompt, prompt_embeds, num_frames, interpolation, generator, negative_prompt, batch_size)
        self.check_inputs(
            None,
            *size,
            num_inference_steps=num_inference_steps,
            guidance_scale=scale,
            negative_prompt=negative_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds=torch.empty(1, self.unet.config["condition_dim"], device="meta"),  # of the frames' shape
            output_type=output_type,
        )
        self.prepare_timesteps(num_inference_steps, temperature, renoise_steps)  # refuses a bad schedule

        vectors = self.encode_prompt(prompt, do_classifier_free_guidance=False, prompt_embeds=prompt_embeds)[0]
        frames = interpolate_vectors(vectors, num_frames, interpolation)
        generators = _copies(generator, num_frames)
        parts = []
        for start in range(0, num_frames, batch_size):
            chunk = frames[start : start + batch_size]
            part = self(
                height=size[0],
                width=size[1],
                num_inference_steps=num_inference_steps,
                guidance_scale=scale,
                negative_prompt=negative_prompt,
                generator=generators[start : start + batch_size],
                latents=None if latents is None else latents.expand(len(chunk), -1, -1),
                prompt_embeds=chunk,
                temperature=temperature,
                renoise_steps=renoise_steps,
                output_type=output_type,
                return_dict=False,
            )
            parts.append(part[0])
        images: Any = [image for part in parts for image in part]
        if output_type != "pil":
            images = np.stack(images) if output_type == "np" else torch.stack(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_regions(
        self, prompt: Any, prompt_embeds: Any, regions: Any, height: Any, width: Any, interpolation: str = "lerp"
    ) -> Tensor:
        """An empty tensor of the shape that `encode_regions` returns, if it can."""
        self.check_components()
        check_interpolation(interpolation)
        grid = self.check_size(height, width)
        num_prompts = self.check_conditions(prompt, None, prompt_embeds, None, grid)
        if prompt_embeds is not None and prompt_embeds.ndim != 2:
            raise ValueError(
                "`prompt_embeds` is a map over the grid already; with `regions` it must have shape (n, d)."
            )
        if isinstance(regions, str) and regions in RAMPS:
            side = grid[1] if regions == "column_ramp" else grid[0]
            if not 2 <= num_prompts <= side:
                raise ValueError(
                    f"`regions={regions!r}` goes through 2 to {side} prompts in this size, received {num_prompts}."
                )
        else:
            region_weights(regions, num_prompts, height, width, self.vae_scale_factor)
            if interpolation != "lerp":
                raise ValueError(
                    f"`interpolation={interpolation!r}` belongs to the ramps {', '.join(RAMPS)}: other regions mix"
                    " their vectors linearly."
                )
        return torch.empty(1, self.unet.config["condition_dim"], *grid, device="meta")

    def _check_frames(
        self,
        prompt: Any,
        prompt_embeds: Any,
        num_frames: Any,
        interpolation: Any,
        generator: Any,
        negative_prompt: Any,
        batch_size: Any,
    ) -> None:
        self.check_components()
        check_interpolation(interpolation)
        check_integer("batch_size", batch_size, 1)
        if isinstance(prompt_embeds, Tensor) and prompt_embeds.ndim != 2:
            raise ValueError(
                f"`prompt_embeds` must have shape (n, d), one vector a prompt, received {tuple(prompt_embeds.shape)}."
            )
        num_prompts = self.check_conditions(prompt, None, prompt_embeds, None, (0, 0))
        if num_prompts < 2:
            raise ValueError(f"An interpolation needs at least 2 prompts, received {num_prompts}.")
        check_integer("num_frames", num_frames, num_prompts)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                "`generator` must be one torch.Generator, since all frames share their noise; received"
                f" {type(generator).__name__}."
            )
        if negative_prompt is not None and not isinstance(negative_prompt, str):
            raise TypeError(f"`negative_prompt` must be one text for all frames, received {negative_prompt!r}.")


def _copies(generator: torch.Generator | None, num: int) -> list[torch.Generator]:
    """The generator itself and copies of it, which draw the same numbers."""
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    copies = [torch.Generator(generator.device) for _ in range(num - 1)]
    for copy in copies:
        copy.set_state(generator.get_state())
    return [generator, *copies]
