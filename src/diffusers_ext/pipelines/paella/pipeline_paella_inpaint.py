"""In- and outpainting with Paella v1: the kept tokens stand still while the others are drawn, in one pass.

Paper: "Fast Text-Conditional Discrete Denoising on Vector-Quantized Latent Spaces", arXiv 2211.07292 (v1 text).
Original: dome272/Paella@b1f88ef (`sample` with a mask) and its notebook @97d18f9; code and weights MIT.
Differences: the mask is given in pixels; the image's own tokens are the most probable ones by default, the original
draws them; the hole may start from the image's noised tokens (`strength`) instead of from noise alone.

Shapes: b samples, h x w the token grid, H x W pixels.
"""

from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from ...conditions.inpainting import continue_pixels
from ...conditions.masks import mask_batch, mask_to_tokens
from ...models.token_codec import decode_indices
from ..callbacks import Callback
from ..checks import check_integer, check_side
from .base import Generators
from .editing import PaellaEditBasePipeline

Position = str | tuple[int, int]


class PaellaInpaintPipeline(PaellaEditBasePipeline):
    """Repaints a part of an image, or draws what lies around it.

    Takes the components of `PaellaPipeline`: `PaellaInpaintPipeline.from_pipe(pipe)` shares them. The condition may be
    a text, or whatever `prompt_embeds` carries: a region map, or vectors of `encode_image` for a network that was
    fine-tuned on those.

    Kept tokens stand still in all steps. They are encoded as if the nearest kept pixels went on into the hole and
    around the image. Next to the old content or to a border they would describe what is no longer there, which shows
    as a seam. Decoded, they may still differ from the image, since a tokenizer is not lossless and its decoder looks
    beyond a token. `apply_overlay=True` puts the image's own pixels back.

    Example:

        pipe("a blue star", image=picture, mask_image=mask)                      # white in the mask: repainted
        pipe("a blue star", image=picture, height=96, width=128)                 # outpainting, image in the middle
        pipe("a blue star", image=picture, width=128, position=(0, 0))           # outpainting to the right
    """

    _pipeline_tag = "image-to-image"
    _card_tags = ("inpainting",)
    _example = """from diffusers.utils import load_image

picture, mask = load_image("picture.png"), load_image("mask.png").convert("L")  # white: to draw
image = pipe("{prompt}", image=picture, mask_image=mask).images[0]"""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        position: Position = "center",
        strength: float = 1.0,
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
        sample_mode: str = "argmax",
        apply_overlay: bool = False,
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
                its tokens `(b, h, w)` int64 as `output_type="latent"` returns them, which are kept as they are. Its
                sides are multiples of the tokenizer's factor.
            mask_image: A black and white mask of the image's size: white (1) is repainted, black (0) kept. PIL, array
                or tensor. A token is repainted if any of its pixels is. None keeps the whole image (outpainting).
            height: Height of the canvas in pixels, a multiple of the tokenizer's factor times the network's. It is at
                least the image's, and by default the image's. What lies around the image is drawn.
            width: Width of the canvas in pixels, by the same rule.
            position: Where the image lies on a larger canvas: its left upper corner (left, top) in pixels, multiples
                of a token's size, or "center" (on the token to the left and above where it cannot be exact).
            strength: In [0, 1]. 1 draws the hole from noise alone. Less starts from the hole's own tokens, noised to
                step `round((1 - strength) * num_inference_steps)`, so something of them stays. Then the image is
                encoded with its hole as it is. Not for outpainting.
            num_inference_steps: Number of sampling steps, at least 1. The paper uses 8 to 12.
            guidance_scale: The scale s in u + s * (c - u) on the logits, finite and at least 0. 0 ignores the prompt.
                1 is the plain conditional prediction, at half the cost. By default the pipeline's
                `default_guidance_scale`.
            negative_prompt: One text, or one a prompt. Its embedding replaces the zero vector in the null branch.
            num_images_per_prompt: Number of images for each prompt. Those of the first prompt come first.
            generator: One generator for the batch, or a list with one an image. With a list, image k depends on
                generator k alone.
            latents: Random tokens `(b, h, w)` int64 of the canvas, in place of a draw.
            prompt_embeds: Un-normalised CLIP vectors `(n, d)`, or a map `(n, d, h, w)` over the token grid, in place
                of `prompt`.
            negative_prompt_embeds: Vectors or a map for the null branch, in place of `negative_prompt`.
            temperature: Temperature of the token draws: one value, or a pair (first step, last step). By default the
                scheduler's.
            renoise_steps: Number of steps after which tokens are renoised. By default all but the last.
            sample_mode: "argmax" or "sample": how the image becomes tokens. Only a `GumbelVQModel` can sample, which
                is what the original does.
            apply_overlay: True gives the result the kept pixels of `image` instead of decoded ones.
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

        Order of the draws of each generator: the image's tokens if sampled; initial tokens (with a `strength` below
        1: uniforms, then tokens, of `scheduler.add_noise`); then for each step those of `scheduler.step`.
        """
        callback_names = self.callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        scale = self.resolve_scale(guidance_scale)

        # 1. Everything that can be refused is refused here, the schedule included: no model has run yet
        self.check_edit(strength, sample_mode)
        source = self._read_source(_required(image))
        size, (left, top) = self._place(source, height, width, position)
        mask = self._canvas_mask(source, mask_image, size, left, top)
        self._check_mask(mask, self._source_size(source), size, strength)
        _check_overlay(apply_overlay, output_type, source)
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
        self.check_count("mask_image", len(mask), num_prompts)
        timesteps = self.prepare_timesteps(num_inference_steps, temperature, renoise_steps, strength=strength)
        self.start_run(timesteps, scale)

        # 2. Conditions; the canvas in tokens, in which the hole is noise
        cond, null = self.encode_prompt(
            prompt,
            num_images_per_prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        assert null is not None  # only without guidance
        batch_size = cond.shape[0]
        factor = self.vae_scale_factor
        if source.is_floating_point():
            canvas = _paste(source, *size, left, top)
            if strength == 1:  # else the hole starts from what it holds, and so do its neighbours
                canvas = continue_pixels(canvas, mask)
            known = self._source_tokens(canvas, batch_size, sample_mode, generator)
        else:
            known = self._source_tokens(source, batch_size)
            known = _paste(known, size[0] // factor, size[1] // factor, left // factor, top // factor)
        mask = mask.to(known.device).repeat_interleave(batch_size // len(mask), dim=0)
        drawn = mask_to_tokens(mask, factor)  # (b, h, w)
        noised = self._noise_source(known, timesteps, generator, latents)

        # 3. Every step draws all tokens and puts the kept ones back
        tokens = self._sample(
            timesteps,
            torch.where(drawn, noised, known),
            cond,
            null,
            mask=drawn,
            generator=generator,
            callback=callback_on_step_end,
            callback_names=callback_names,
        )
        # again, since an interrupted run ends renoised, and a callback may have written anything
        tokens = torch.where(drawn, tokens, known)

        # 4. Tokens to pixels
        def decode(tokens: Tensor) -> Tensor:
            pixels = decode_indices(self.vqvae, tokens).float()
            if not apply_overlay:
                return pixels
            original = _paste(source, *size, left, top).to(pixels.device)
            original = original.repeat_interleave(batch_size // len(source), dim=0)
            return torch.where(mask[:, None].to(pixels.device), pixels, 2 * original - 1)

        return self.finish(tokens, output_type, return_dict, decode)

    def _place(
        self, source: Tensor, height: Any, width: Any, position: Any
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of the canvas, left and top of the image on it, all in pixels."""
        rows, columns = self._source_size(source)
        factor = self.vae_scale_factor
        for name, side in (("image.height", rows), ("image.width", columns)):
            check_side(name, side, factor, factor, because="a token")
        size = (rows if height is None else height, columns if width is None else width)
        self.check_size(
            *size,
            names=("image.height" if height is None else "height", "image.width" if width is None else "width"),
        )
        for name, side, needed in (("height", size[0], rows), ("width", size[1], columns)):
            if side < needed:
                raise ValueError(
                    f"`{name}`={side} is smaller than the picture, whose {name} is {needed}: the canvas holds the"
                    f" whole picture. Leave `{name}` out, or crop or resize `image` first."
                )
        room = (size[1] - columns, size[0] - rows)  # in the order (left, top)
        if position == "center":
            return size, (room[0] // 2 // factor * factor, room[1] // 2 // factor * factor)
        if not isinstance(position, (list, tuple)) or len(position) != 2:
            raise TypeError(f'`position` must be "center" or (left, top) in pixels, received {position!r}.')
        for name, offset, space in zip(("left", "top"), position, room, strict=True):
            check_integer(f"position ({name})", offset)
            if not 0 <= offset <= space or offset % factor:
                raise ValueError(
                    f"`position` ({name}) must be a multiple of {factor} pixels (a token) from 0 to {space}, so that"
                    f" the picture of {columns}x{rows} lies on the canvas of {size[1]}x{size[0]}; received {offset}."
                )
        return size, (int(position[0]), int(position[1]))

    def _canvas_mask(self, source: Tensor, mask_image: Any, size: tuple[int, int], left: int, top: int) -> Tensor:
        """Bool `(b, H, W)` of the canvas, True where it is drawn."""
        rows, columns = self._source_size(source)
        if mask_image is None:
            mask = torch.zeros(1, rows, columns, dtype=torch.bool)
        else:
            mask = mask_batch(mask_image)
            if tuple(mask.shape[1:]) != (rows, columns):
                raise ValueError(
                    f"`mask_image` is {mask.shape[2]}x{mask.shape[1]} pixels, `image` is {columns}x{rows}: the mask"
                    " covers the picture, not the canvas. Resize it without smoothing:"
                    f" `mask.resize(({columns}, {rows}), Image.Resampling.NEAREST)`."
                )
        return _paste(mask, *size, left, top, outside=True)

    def _check_mask(self, mask: Tensor, source_size: tuple[int, int], size: tuple[int, int], strength: float) -> None:
        drawn = mask.flatten(1)
        if not bool(drawn.any(dim=1).all()):
            raise ValueError(
                "There is nothing to draw: `mask_image` is black (0, keep) everywhere or missing, and the canvas is as"
                " large as the picture. Paint white what is to be repainted, or pass a larger `height` or `width`."
            )
        if not bool((~mask_to_tokens(mask, self.vae_scale_factor)).flatten(1).any(dim=1).all()):
            raise ValueError(
                "There is nothing to keep: `mask_image` touches every token of the picture (white repaints). Use"
                " PaellaPipeline to draw from the prompt alone, PaellaImg2ImgPipeline to keep the structure, or invert"
                " the mask."
            )
        if strength < 1 and source_size != size:
            raise ValueError(
                f"`strength`={strength} starts from the picture's own tokens, and there are none around it: use"
                " strength=1 with a canvas larger than the picture."
            )


def _required(image: Any) -> Any:
    if image is None:
        raise ValueError("`image` is needed: the picture to repaint or to extend.")
    return image


def _check_overlay(apply_overlay: Any, output_type: str, source: Tensor) -> None:
    if not isinstance(apply_overlay, bool):
        raise TypeError(f"`apply_overlay` must be True or False, received {apply_overlay!r}.")
    if apply_overlay and output_type == "latent":
        raise ValueError(
            "`apply_overlay=True` puts pixels back; `output_type='latent'` has none. Leave one of them out."
        )
    if apply_overlay and not source.is_floating_point():
        raise ValueError("`apply_overlay=True` puts the picture's pixels back, but `image` holds tokens: pass pixels.")


def _paste(picture: Tensor, height: int, width: int, left: int, top: int, outside: int = 0) -> Tensor:
    """`(..., H, W)` on a larger canvas filled with `outside`."""
    canvas = picture.new_full((*picture.shape[:-2], height, width), outside)
    canvas[..., top : top + picture.shape[-2], left : left + picture.shape[-1]] = picture
    return canvas
