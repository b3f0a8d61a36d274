"""Versatile Diffusion: images and texts from images and texts, with one network.

Xu, Wang, Zhang, Wang, Shi, arXiv 2211.08332; original: SHI-Labs/Versatile-Diffusion@cf0f4a2 (code MIT), with what only
its first release (@99f1831) had. Differences: any flow is an argument of one call; every draw takes a generator, or
one for each result; the number of steps is exact; what is cut off from too long texts is quoted in a warning.

Shapes: b results, c x h x w latents, H x W pixels, l x d context tokens.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...schedulers.gaussian import scheduler_attribute, start_level
from ..callbacks import Callback
from ..cards import PROMPT
from ..checks import (
    as_generators,
    check_choice,
    check_decoded,
    check_fraction,
    check_generator,
    check_temperature,
)
from .base import NULL_IMAGES, Generators, VersatileBasePipeline, VersatilePipelineOutput
from .color_matching import adjust_colors
from .conditions import Conditions, read_conditions, stretch_picture

COLOR_ADJUSTMENTS = ("simple", "histogram")
MIXINGS = ("attention", "layer")
_ONLY_FOR: dict[str, tuple[Any, str | None, set[str]]] = {
    # option -> its default, what it needs to be made (None: either), which contexts it needs
    "height": (None, "image", set()),
    "width": (None, "image", set()),
    "text_ratio": (0.5, None, {"text", "image"}),
    "mixing": ("attention", None, {"text", "image"}),
    "null_image": (None, None, {"image"}),
    "temperature": (1.0, "text", set()),
    "max_text_length": (None, "text", set()),
    "merge_repeats": (True, "text", set()),
}


class VersatilePipeline(VersatileBasePipeline):
    """Text to image, image variation, image to text, text variation, and any mixture of contexts.

    Its components are described at `__init__`; a call needs only the ones that its flow uses.

    Example:

        pipe("a red circle").images[0]                                      # text to image
        pipe(image=picture).images[0]                                       # image variation
        pipe(image=picture, data_type="text").texts[0]                      # image to text
        pipe("a red circle", data_type="text").texts[0]                     # text variation
        pipe("a red circle", image=picture, text_ratio=0.5).images[0]       # text and image at once
    """

    _pipeline_tag = "text-to-image"
    _card_tags = ("image-to-image", "image-to-text")

    @classmethod
    def example_lines(cls, config: Mapping[str, Any], prompt: str | None = None) -> str:
        def lacks(name: str) -> bool:
            return name in config and config[name][0] is None

        inputs = 'image=load_image("picture.png")' if lacks("text_encoder") else f"{prompt or PROMPT!r}"
        result = 'text = pipe({}, data_type="text").texts[0]' if lacks("vae") else "image = pipe({}).images[0]"
        imports = "from diffusers.utils import load_image\n\n" if lacks("text_encoder") else ""
        return imports + result.format(inputs)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        image: Any = None,
        *,
        data_type: str = "image",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        negative_prompt: str | list[str] | None = None,
        text_ratio: float = 0.5,
        prompt_weights: Sequence[float] | None = None,
        image_weights: Sequence[float] | None = None,
        image_masks: Any = None,
        focus: float | Sequence[float] = 0.5,
        mixing: str = "attention",
        null_image: str | None = None,
        strength: float = 1.0,
        exact_start: bool = False,
        color_adjust: str | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        image_embeds: Tensor | None = None,
        negative_image_embeds: Tensor | None = None,
        temperature: float = 1.0,
        max_text_length: int | None = None,
        merge_repeats: bool = True,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> VersatilePipelineOutput | tuple:
        """Makes images or texts from texts, images, or both.

        Args:
            prompt: The text, one a sample, or several a sample as a list of lists. The end of a text that does not fit
                the text encoder is cut off, with a warning that quotes it.
            image: The image (PIL, array or tensor), one a sample, or several a sample as a list of lists.
            data_type: What is made, "image" or "text".
            height: Height of the image in pixels.
            width: Width of the image in pixels.
            num_inference_steps: The number of steps of the scheduler.
            guidance_scale: How closely the conditions are followed; 1 switches guidance off, 0 ignores the conditions.
            guidance_rescale: The share in [0, 1] of normalised guidance (PITI, arXiv 2205.12952): 1 gives the guided
                prediction the mean and the standard deviation of the conditional one, sample by sample, against the
                oversaturation of large scales; 0 is plain guidance. The argument of diffusers (arXiv 2305.08891)
                corrects the standard deviation alone.
            negative_prompt: The text to move away from, in place of the empty text; one for all samples or one each.
            text_ratio: The share of the texts beside the images, from 0 (images only) to 1 (texts only). Empty texts
                beside images do not count, as in the original.
            prompt_weights: The factor of the tokens of each text of a sample.
            image_weights: The factor of the tokens of each image of a sample; 0 to 1 in the original.
            image_masks: The mask of each image, nested as the images are, of the size of its image: 1 (white) where
                the image is read, 0 where it is not.
            focus: 0 keeps the objects of an image, 0.5 everything, 1 its style; one for all images or one each.
            mixing: "attention" sums over the contexts in every layer. "layer" draws one of them for each layer and
                step: with one generator the same for the whole batch, with a list for each result from its own.
            null_image: The image that the null branch reads: "zeros" (no tokens), "grey" (the first release) or
                "black" (diffusers). The default is that of the authors: zeros where images are made, black where
                texts are made.
            strength: The share of the steps that is run. Below 1, images start from the noised `image`; 0 returns it
                (a fidelity of 1 - strength). As in the original, schedulers that noise by timesteps (DDIM, DDPM, PNDM,
                LCM, TCD, SA-Solver) start one step above the level of the first step that is run, so a little of that
                noise is left over. Schedulers that noise by the index of a step (Euler, Heun, KDPM2, LMS, DPM-Solver,
                DEIS, UniPC) start at that level itself.
            exact_start: Whether every scheduler starts from `image` at the level of the first step that is run.
            color_adjust: Gives images the colours of `image`: "simple" (mean and spread), "histogram" (half way to
                its distribution, as in the first release), or None.
            num_images_per_prompt: The number of results of each sample, images or texts.
            eta: Noise of DDIM, from 0 to 1; ignored by other schedulers.
            generator: One generator for the whole batch, or a list with one a result.
            latents: Standard normal noise to start from.
            prompt_embeds: Context tokens (b, l, d) in place of `prompt`.
            negative_prompt_embeds: Context tokens (b, l, d) of the null branch beside `prompt_embeds`.
            image_embeds: Context tokens (b, l, d) in place of `image`.
            negative_image_embeds: Context tokens (b, l, d) of the null branch beside `image_embeds`.
            temperature: The temperature at which words are drawn; 0 takes the most probable ones.
            max_text_length: The length of texts in tokens of their decoder, first and last included; by default 30, or
                as many as it has.
            merge_repeats: Whether texts lose words that they repeat.
            output_type: "pil", "np" or "pt" for images; "latent" leaves out the decoding of images and texts.
            return_dict: Whether to return a `VersatilePipelineOutput` instead of a tuple of one.
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` after each step.
            callback_on_step_end_tensor_inputs: The names of its tensors, by default "latents". The others are
                `prompt_embeds` and `image_embeds`, each also with `negative_` before it, if the call has such
                contexts; where it has images alone, `prompt_embeds` are theirs.

        Returns:
            `images` or `texts`, all results of the first sample first.
        """
        # 1. Everything that can be refused before a model runs
        callback_names = self.callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        generator = as_generators(generator)
        scale = self.resolve_scale(guidance_scale)
        size: tuple[int, int] = self.resolve_size(height, width, latents)
        self.check_run(num_inference_steps, scale, guidance_rescale, num_images_per_prompt, eta, output_type)
        conditions = read_conditions(
            prompt,
            image,
            image_masks=image_masks,
            prompt_weights=prompt_weights,
            image_weights=image_weights,
            focus=focus,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            image_embeds=image_embeds,
            negative_image_embeds=negative_image_embeds,
        )
        options = {
            "height": height,
            "width": width,
            "text_ratio": text_ratio,
            "mixing": mixing,
            "null_image": null_image,
            "temperature": temperature,
            "max_text_length": max_text_length,
            "merge_repeats": merge_repeats,
        }
        null_image = ("black" if data_type == "text" else "zeros") if null_image is None else null_image
        check_fraction("text_ratio", text_ratio, "0 reads the images only, 1 the texts only")
        check_choice("mixing", mixing, MIXINGS)
        check_choice("null_image", null_image, NULL_IMAGES)
        check_temperature(temperature)
        if conditions.embeds:
            self.check_embeds(conditions, scale)
        shares = conditions.shares(text_ratio)
        self.check_flow(data_type, list(shares), given=list(conditions.embeds))
        _check_start(conditions, data_type, strength, exact_start, color_adjust)
        if negative_prompt is not None and not conditions.texts:
            raise ValueError(
                f"`negative_prompt` is {negative_prompt!r}, but the call has no `prompt` that it could stand against: "
                "pass one, or `negative_prompt_embeds` beside `prompt_embeds`."
            )
        if data_type == "image":
            self.check_size(*size)
        elif output_type != "latent":
            self.check_text_length(max_text_length)
        _check_options(data_type, list(conditions.samples), options)
        absent = [name for name in callback_names if name.endswith("image_embeds") and "image" not in shares]
        if absent:
            raise ValueError(
                f"`callback_on_step_end` needs {absent}, but the call has no picture as context: leave them out, or"
                " pass `image`."
            )
        total = max(conditions.samples.values()) * num_images_per_prompt
        check_generator(generator, total, self._execution_device)

        timesteps, level = self.prepare_timesteps(num_inference_steps), None
        if strength < 1:
            level, timesteps = start_level(timesteps, strength, scheduler_attribute(self.scheduler, "order", 1))
        self.start_run(timesteps, scale, guidance_rescale)

        # 2. Initial noise, contexts, and the images to start from
        latents = self.prepare_latents(data_type, total, *size, generator=generator, latents=latents)
        contexts = self.encode_contexts(
            conditions,
            shares,
            total,
            negative_prompt=negative_prompt,
            null_image=null_image,
            guided=scale != 1 or callback_on_step_end is not None,  # it may turn guidance on
        )
        sources = None
        if strength < 1 or color_adjust is not None:
            sources = self._sources(conditions, total, size)
        if sources is not None and strength < 1:
            level = timesteps[0] if exact_start and level is not None else level
            latents = self._noised_sources(sources, latents, timesteps, level, generator)

        # 3. Denoise
        latents = self.denoise(
            latents,
            timesteps,
            contexts,
            data_type,
            mixing=mixing,
            eta=eta,
            generator=generator,
            callback=callback_on_step_end,
            callback_names=callback_names,
        )

        # 4. Latents to texts or images
        if data_type == "text":
            texts: Any = latents
            if output_type != "latent":
                words = {"max_text_length": max_text_length, "merge_repeats": merge_repeats}
                texts = self.decode_texts(latents, generator=generator, temperature=temperature, **words)
            self.maybe_free_model_hooks()
            return VersatilePipelineOutput(texts=texts) if return_dict else (texts,)
        decode = self.decode_latents
        if sources is not None:
            kept = len(timesteps) == 0
            decode = partial(self._decode_beside, sources=sources, kept=kept, color_adjust=color_adjust)
        images = self.finish(latents, output_type, False, decode)[0]
        return VersatilePipelineOutput(images=images) if return_dict else (images,)

    def edit_image(self, image: Any, prompt: str, negative_prompt: str, **options: Any) -> VersatilePipelineOutput:
        """Edits an image by way of its caption: `VersatileEditPipeline` with the components of this pipeline.

        Args:
            image: One image.
            prompt: The text to add.
            negative_prompt: The text to take away.
            options: The other arguments of `VersatileEditPipeline.__call__`.

        Returns:
            `images`, and as `texts` the captions that they were made from.
        """
        from .pipeline_versatile_edit import VersatileEditPipeline

        pipe: Any = VersatileEditPipeline.from_pipe(self)
        pipe.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        result = pipe(image, prompt, negative_prompt, **options)
        self.maybe_free_model_hooks()
        return result

    def _sources(self, conditions: Conditions, total: int, size: tuple[int, int]) -> Tensor:
        """The one image of each sample, stretched to the size of the result: (b, 3, H, W) in [0, 1]."""
        pictures = [stretch_picture(sample[0], *size) for sample in conditions.images]
        arrays = np.stack([np.asarray(picture) for picture in pictures])
        pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
        return pixels.to(self._execution_device).repeat_interleave(total // len(pixels), dim=0)

    def _noised_sources(
        self, sources: Tensor, noise: Tensor, timesteps: Tensor, level: Tensor | None, generator: Generators
    ) -> Tensor:
        """The latents of images (b, 3, H, W) in [0, 1], noised to the timestep `level`; None adds no noise."""
        posterior = self.vae.encode(sources.to(self.vae.dtype) * 2 - 1).latent_dist  # type: ignore[union-attr]
        clean = posterior.sample(generator).to(noise) * self.vae.config["scaling_factor"]
        if level is None:
            return clean
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(len(self.scheduler.timesteps) - len(timesteps))
        return self.scheduler.add_noise(clean, noise / self.scheduler.init_noise_sigma, level.reshape(1))

    def _decode_beside(self, latents: Tensor, *, sources: Tensor, kept: bool, color_adjust: str | None) -> Tensor:
        """Images (b, 3, H, W) in [0, 1]: the sources where no step has run, else with their colours if wanted."""
        if kept:
            return sources
        pixels = self.decode_latents(latents)
        check_decoded(pixels, "pictures", self)
        return pixels if color_adjust is None else adjust_colors(pixels, sources, color_adjust)


def _check_start(
    conditions: Conditions, data_type: str, strength: Any, exact_start: Any, color_adjust: str | None
) -> None:
    """A start from an image, or its colours, need exactly one image a sample."""
    check_fraction("strength", strength, "0 returns the image, 1 starts from noise alone")
    check_choice("color_adjust", color_adjust, COLOR_ADJUSTMENTS, or_none=True)
    for name, value, neutral in (("strength", strength, 1.0), ("color_adjust", color_adjust, None)):
        if value != neutral and (data_type != "image" or len(conditions.image_weights) != 1):
            raise ValueError(
                f"`{name}` is {value!r}: it works for pictures made from exactly one picture a sample; this call makes"
                f" {data_type}s from {len(conditions.image_weights)}."
            )
    if not isinstance(exact_start, bool):
        raise TypeError(f"`exact_start` must be True or False, received {exact_start!r}.")
    if exact_start and strength == 1:
        raise ValueError("`exact_start` is True, but `strength` is 1: without a picture to start from it has no use.")


def _check_options(data_type: str, context_types: Sequence[str], options: Mapping[str, Any]) -> None:
    """No option is given that the flow of a call has no use for."""
    for name, value in options.items():
        default, makes, needs = _ONLY_FOR[name]
        fits = makes in (None, data_type) and needs <= set(context_types)
        if fits or value is None or (type(value) in (bool, int, float, str) and value == default):
            continue
        reads = {"text": "`prompt`", "image": "`image`"}
        wanted = [f"makes {makes}s"] if makes is not None else []
        wanted += [f"has {' and '.join(reads[kind] for kind in ('text', 'image') if kind in needs)}"] if needs else []
        raise ValueError(
            f"`{name}` is {value!r}, but has an effect only in a call that {' and '.join(wanted)}; this one makes"
            f" {data_type}s from {' and '.join(reads[kind] for kind in context_types)}. Leave it out."
        )
