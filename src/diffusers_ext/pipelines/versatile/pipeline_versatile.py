"""Versatile Diffusion: pictures and texts from pictures and texts, with one network.

Xu, Wang, Zhang, Wang, Shi, arXiv 2211.08332; original: SHI-Labs/Versatile-Diffusion@cf0f4a2 (code MIT), with what only
its first release (@99f1831) had. Differences: any flow is an argument of one call; every draw takes a generator, or
one for each result; the number of steps is exact; what is cut off from too long texts is quoted in a warning.

Shapes: b results, c x h x w latents, H x W pixels, l x d context tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.utils.outputs import BaseOutput
from PIL import Image
from torch import Tensor

from ...conditions.focus import select_ranks
from ...schedulers.gaussian import check_gaussian_scheduler, scheduler_attribute, start_level, step_arguments
from ..callbacks import Callback, callback_tensor_names, report_step, start_scale
from ..cards import PROMPT
from ..checks import (
    as_generators,
    check_callback_tensors,
    check_decoded,
    check_eta,
    check_generator,
    check_guidance_scale,
    check_integer,
    check_output_type,
    check_predictions,
    check_side,
    check_steps,
    check_timesteps,
)
from .base import Generators, VersatileBasePipeline
from .checks import (
    MIXINGS,
    NULL_IMAGES,
    check_choice,
    check_context_names,
    check_embeds,
    check_encoders,
    check_exact_start,
    check_fit,
    check_flows,
    check_latents,
    check_max_text_length,
    check_negative_prompt,
    check_options,
    check_parts,
    check_share,
    check_start,
    check_temperature,
)
from .color_matching import adjust_colors
from .conditions import Conditions, read_conditions
from .contexts import stretch_picture
from .denoising import FlowContext, predict_flow_noise
from .optimus_text import sentence_ids, word_piece_window

Embeds = dict[str, tuple[Tensor | None, Tensor | None]]  # context type -> tokens, tokens of "no context"


@dataclass
class VersatilePipelineOutput(BaseOutput):
    """What `VersatilePipeline` makes.

    Args:
        images: a list of PIL pictures, an array or a tensor, see `output_type`; None where texts were asked for.
        texts: strings; with `output_type="latent"` their latents (b, d). Beside edited pictures, their captions.
    """

    images: list[Image.Image] | np.ndarray | Tensor | None = None
    texts: list[str] | Tensor | None = None


class VersatilePipeline(VersatileBasePipeline):
    """Text to image, image variation, image to text, text variation, and any mixture of contexts.

    Its components are those of `VersatileBasePipeline`; a call needs only the ones that its flow uses.
    """

    _pipeline_tag = "text-to-image"
    _card_tags = ("image-to-image", "image-to-text")

    def check_inputs(
        self,
        conditions: Conditions,
        embeds: Embeds,
        *,
        data_type: str = "image",
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        text_ratio: float = 0.5,
        mixing: str = "attention",
        null_image: str = "zeros",
        strength: float = 1.0,
        color_adjust: str | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        temperature: float = 1.0,
        max_text_length: int | None = None,
        output_type: str = "pil",
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> tuple[list[str], int]:
        """Raises `ValueError` or `TypeError` for everything that can be known to be wrong before a model runs.

        Args:
            conditions: Texts and pictures as `read_conditions` sorts them; the others are those of `__call__`.
            embeds: Context tokens in place of them, by type, each with its null branch.

        Returns:
            The types of the contexts that count, and the number of results.
        """
        check_parts(self, "sampling", "unet", "scheduler")
        check_gaussian_scheduler(self.scheduler, type(self).__name__)
        check_steps(self.scheduler, num_inference_steps)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        check_guidance_scale(guidance_scale)
        check_eta(eta)
        check_output_type(output_type)
        check_callback_tensors(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        check_share("text_ratio", text_ratio)
        check_choice("mixing", mixing, MIXINGS)
        check_choice("null_image", null_image, NULL_IMAGES)
        check_temperature(temperature)
        sizes = {}
        for kind, entries in (("text", conditions.texts), ("image", conditions.images)):
            check_embeds(self, kind, *embeds[kind], bool(entries), guided=guidance_scale != 1)
            tokens = embeds[kind][0]
            if entries or tokens is not None:
                sizes[kind] = len(entries) if tokens is None else len(tokens)
        samples = max(sizes.values(), default=0)
        if set(sizes.values()) - {1, samples}:
            raise ValueError(f"The call has {sizes} samples: pass as many texts as pictures, or one for all.")
        says_nothing = bool(conditions.texts) and not any(text.strip() for one in conditions.texts for text in one)
        if len(sizes) == 2 and (text_ratio in (0, 1) or says_nothing):  # the other context does not count
            del sizes["image" if text_ratio == 1 and not says_nothing else "text"]
        check_flows(self, data_type, list(sizes))
        check_fit(self, data_type, list(sizes))
        check_start(conditions, data_type, strength, color_adjust)
        check_encoders(self, [kind for kind in sizes if embeds[kind][0] is None])
        check_negative_prompt(negative_prompt, conditions)
        if data_type == "image":
            check_parts(self, "a picture to be made", "vae")
            for name, side in (("height", height), ("width", width)):
                because = f"autoencoder {self.vae_scale_factor} x network {self.unet.downsample_factor}"
                check_side(name, side, self.size_multiple, self.size_multiple, because=because)
        elif output_type != "latent":
            check_parts(self, "a text to be made", "optimus", "decoder_tokenizer")
            check_max_text_length(self, max_text_length)
        total = samples * num_images_per_prompt
        check_generator(generator, total, self._execution_device)
        if latents is not None:
            check_latents(latents, self._latent_shape(data_type, total, height, width))
        return list(sizes), total

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
        """Makes pictures or texts from texts, pictures, or both.

        Args:
            prompt: A text, one a sample, or several a sample as a list of lists. What does not fit the text encoder is
                cut off, with a warning that quotes it.
            image: A picture (PIL, array or tensor), one a sample, or several a sample as a list of lists.
            data_type: What to make: "image" or "text".
            height: Of pictures that are made, in pixels; so is `width`.
            num_inference_steps: Steps of the scheduler.
            guidance_scale: How closely the conditions are followed; 1 switches guidance off, 0 ignores the conditions.
            negative_prompt: What to move away from, in place of the empty text; one for all samples or one each.
            text_ratio: Share of the texts beside the pictures, from 0 (pictures only) to 1 (texts only). Empty texts
                beside pictures do not count, as in the original.
            prompt_weights: What the tokens of each text of a sample are multiplied by.
            image_weights: What the tokens of each picture of a sample are multiplied by; 0 to 1 in the original.
            image_masks: One a picture, nested alike, of its size: 1 (white) where it is read, 0 where it is not.
            focus: 0 keeps what is on a picture, 0.5 everything, 1 its style; one for all pictures or one each.
            mixing: "attention" sums over the contexts in every layer, "layer" draws one of them for each layer and
                step: with one generator the same for the whole batch, with a list for each result from its own.
            null_image: What the null branch reads in place of a picture: "zeros" (no tokens), "grey" (the first
                release) or "black" (diffusers). By default what the authors do now: zeros for pictures to be made,
                black for texts.
            strength: Below 1, pictures start from the noised `image`, and this share of the steps is run; 0 returns it
                (a fidelity of 1 - strength). As in the original, schedulers that noise by timesteps (DDIM, DDPM, PNDM,
                LCM, TCD, SA-Solver) are started one step above the level of the first step that is run, so a little of
                that noise is left over; those that noise by the index of a step (Euler, Heun, KDPM2, LMS, DPM-Solver,
                DEIS, UniPC) start at that level itself.
            exact_start: Whether every scheduler starts from `image` at the level of the first step that is run.
            color_adjust: Gives pictures the colours of `image`: "simple" (mean and spread), "histogram" (half way to
                its distribution, as in the first release), or None.
            num_images_per_prompt: Results of each sample, be they pictures or texts.
            eta: Noise of DDIM, from 0 to 1; ignored by other schedulers.
            generator: One for the whole batch or a list with one a result.
            latents: Standard normal noise to start from.
            prompt_embeds: Context tokens (b, l, d) in place of `prompt`; so is `negative_prompt_embeds`.
            image_embeds: Context tokens (b, l, d) in place of `image`; so is `negative_image_embeds`.
            temperature: Of the words of texts; 0 takes the most probable ones.
            max_text_length: Of texts, in tokens of their decoder, first and last included; by default 30, or as many
                as it has.
            merge_repeats: Whether texts lose words that they repeat.
            output_type: Of pictures "pil", "np" or "pt"; "latent" leaves out the decoding of either kind.
            return_dict: Whether to return a `VersatilePipelineOutput` instead of a tuple of one.
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` after each step.
            callback_on_step_end_tensor_inputs: Its tensors, by default "latents"; also `prompt_embeds` and
                `image_embeds` with their `negative_` twins, as far as the call has such contexts (of pictures alone,
                `prompt_embeds` are theirs).

        Returns:
            `images` or `texts`, all results of the first sample first.
        """
        check_parts(self, "sampling", "unet", "scheduler")
        callback_names = callback_tensor_names(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        generator = as_generators(generator)
        size: tuple[int, int] = self._resolve_size(height, width, latents)
        scale = self.config["default_guidance_scale"] if guidance_scale is None else guidance_scale
        null_picture = ("black" if data_type == "text" else "zeros") if null_image is None else null_image
        weights = {"prompt_weights": prompt_weights, "image_weights": image_weights}
        conditions = read_conditions(prompt, image, image_masks=image_masks, focus=focus, **weights)
        embeds: Embeds = {
            "text": (prompt_embeds, negative_prompt_embeds),
            "image": (image_embeds, negative_image_embeds),
        }
        kinds, total = self.check_inputs(
            conditions, embeds, data_type=data_type, height=size[0], width=size[1], eta=eta, generator=generator,
            num_inference_steps=num_inference_steps, guidance_scale=scale, text_ratio=text_ratio, mixing=mixing,
            null_image=null_picture, strength=strength, color_adjust=color_adjust, latents=latents,
            num_images_per_prompt=num_images_per_prompt, temperature=temperature, output_type=output_type,
            negative_prompt=negative_prompt, max_text_length=max_text_length,
            callback_on_step_end_tensor_inputs=callback_names,
        )  # fmt: skip
        given = {"text": (prompt, prompt_embeds), "image": (image, image_embeds)}
        check_options(
            data_type, [kind for kind, values in given.items() if any(value is not None for value in values)],
            height=height, width=width, text_ratio=text_ratio, mixing=mixing, null_image=null_image,
            temperature=temperature, max_text_length=max_text_length, merge_repeats=merge_repeats,
        )  # fmt: skip
        check_exact_start(exact_start, strength)
        check_context_names(callback_names, kinds)
        timesteps = self._begin_run(num_inference_steps, scale)

        def encode() -> list[FlowContext]:
            return self._contexts(kinds, conditions, embeds, total, text_ratio, negative_prompt, null_picture)

        contexts = encode()
        latents = self.prepare_latents(data_type, total, *size, generator=generator, latents=latents)
        sources: Any = None
        if strength < 1 or color_adjust is not None:
            sources = self._sources(conditions, total, size)
        if strength < 1:
            latents, timesteps = self._start_from(sources, latents, timesteps, strength, generator, exact_start)
        latents = self._denoise(
            latents, timesteps, contexts, data_type, mixing, eta, generator, callback_on_step_end, callback_names,
            encode,
        )  # fmt: skip
        results: Any = latents
        if output_type != "latent" and data_type == "text":
            options = {"max_text_length": max_text_length, "merge_repeats": merge_repeats}
            results = self.decode_texts(latents, generator=generator, temperature=temperature, **options)
        elif output_type != "latent":
            pixels = sources if strength < 1 and len(timesteps) == 0 else self.decode_latents(latents)
            check_decoded(pixels, "pictures", self)
            if color_adjust is not None and pixels is not sources:
                pixels = adjust_colors(pixels, sources, color_adjust)
            results = self.image_processor.postprocess(pixels, output_type, do_denormalize=[False] * total)
        self.maybe_free_model_hooks()
        named = {"images" if data_type == "image" else "texts": results}
        return VersatilePipelineOutput(**named) if return_dict else (results,)

    @torch.no_grad()
    def edit_image(
        self,
        image: Any,
        prompt: str,
        negative_prompt: str,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        text_ratio: float = 0.67,
        null_image: str | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        temperature: float = 1.0,
        max_text_length: int | None = None,
        output_type: str = "pil",
    ) -> VersatilePipelineOutput:
        """Edits a picture by way of its caption: image to text, text edited as a vector, both to image.

        The direction of `negative_prompt` is taken out of the caption's latents and `prompt` is added; the new caption
        and `prompt` together are the text context, the picture's style (its 10 leading ranks) the other one.

        Args:
            image: One picture.
            prompt: What to add, one text.
            negative_prompt: What to take away, one text.
            height: As in `__call__`; so is `width`.
            num_inference_steps: As in `__call__`, for both halves; so are `guidance_scale`, `null_image` and `eta`.
            text_ratio: Share of the texts; the original gives the picture 0.33.
            num_images_per_prompt: Results; each has a caption of its own.
            generator: One for all results or a list with one each.
            temperature: Of the words of the caption.
            max_text_length: Of the caption, as in `__call__`.
            output_type: As in `__call__`.

        Returns:
            `images`, and as `texts` the captions that they were made from.
        """
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if not isinstance(text, str):
                raise TypeError(f"`{name}` must be one string, received {type(text).__name__}.")
        conditions = read_conditions(prompt, image)
        if len(conditions.images) != 1 or len(conditions.image_weights) != 1:
            raise ValueError(
                f"`image` holds {len(conditions.images)} samples of {len(conditions.image_weights)} pictures: one "
                "picture is edited at a time."
            )
        scale = self.config["default_guidance_scale"] if guidance_scale is None else guidance_scale
        size: tuple[int, int] = self._resolve_size(height, width)
        shared: dict[str, Any] = {  # by both halves
            "num_inference_steps": num_inference_steps, "eta": eta, "guidance_scale": scale,
            "num_images_per_prompt": num_images_per_prompt, "generator": as_generators(generator),
        }  # fmt: skip
        nothing: Embeds = {"text": (None, None), "image": (None, None)}
        null_images = {"text": null_image or "black", "image": null_image or "zeros"}
        for data_type, read in (("text", read_conditions(image=image)), ("image", conditions)):
            self.check_inputs(
                read, nothing, data_type=data_type, text_ratio=text_ratio, null_image=null_images[data_type],
                temperature=temperature, max_text_length=max_text_length, height=size[0], width=size[1],
                output_type="pil" if data_type == "text" else output_type, **shared,
            )  # fmt: skip
        check_parts(self, "editing", "encoder_tokenizer")
        self._begin_run(num_inference_steps, scale)  # refuses a bad schedule before a model runs
        window = word_piece_window(self.encoder_tokenizer, self.optimus)

        found = self(
            image=image, data_type="text", output_type="latent", null_image=null_images["text"], return_dict=False,
            **shared,
        )[0]  # fmt: skip
        ids = sentence_ids(self.encoder_tokenizer, [negative_prompt, prompt], max_word_pieces=window, pipe=self)
        away, towards = self.optimus.encode(ids.to(found.device)).mean.to(found)  # type: ignore[union-attr] # (d,) each
        away = away / away.norm()
        edited = found - (found @ away)[:, None] * away + towards
        captions = self.decode_texts(
            edited, generator=generator, temperature=temperature, max_text_length=max_text_length
        )

        guided: dict[str, Any] = {"do_classifier_free_guidance": self.do_classifier_free_guidance}
        texts, null_texts = self.encode_prompt([[caption, prompt] for caption in captions], **guided)
        look = {"null_image": null_images["image"]}
        tokens, null_tokens = self.encode_image(image, num_images_per_prompt, **look, **guided)
        shared.pop("num_images_per_prompt")  # the contexts hold one sample a result by now
        images = self(
            prompt_embeds=texts, negative_prompt_embeds=null_texts, text_ratio=text_ratio, output_type=output_type,
            image_embeds=select_ranks(tokens[:, 1:], 0, 10),
            negative_image_embeds=None if null_tokens is None else null_tokens[:, 1:],
            height=size[0], width=size[1], return_dict=False, **shared,
        )[0]  # fmt: skip
        return VersatilePipelineOutput(images=images, texts=captions)

    def _contexts(
        self,
        kinds: list[str],
        conditions: Conditions,
        embeds: Embeds,
        total: int,
        text_ratio: float,
        negative_prompt: str | list[str] | None,
        null_image: str,
    ) -> list[FlowContext]:
        """The contexts that count, encoded where they are not given, one for each result."""
        guided: dict[str, Any] = {"do_classifier_free_guidance": self.do_classifier_free_guidance}
        ratios = {"text": text_ratio, "image": 1 - text_ratio} if len(kinds) == 2 else {kinds[0]: 1.0}
        contexts = []
        for kind in kinds:
            pair = embeds[kind]
            if pair[0] is None and kind == "text":
                pair = self.encode_prompt(
                    conditions.texts,
                    negative_prompt=negative_prompt,
                    prompt_weights=conditions.text_weights,
                    **guided,
                )
            elif pair[0] is None:
                pair = self.encode_image(
                    conditions.images,
                    image_masks=conditions.masks,
                    image_weights=conditions.image_weights,
                    focus=conditions.focus,
                    null_image=null_image,
                    **guided,
                )
            tokens, null_tokens = (None if t is None else _repeat(t.to(self._execution_device), total) for t in pair)
            assert tokens is not None
            if self.do_classifier_free_guidance and null_tokens is None:  # turned on by a callback
                name = {"text": "negative_prompt_embeds", "image": "negative_image_embeds"}[kind]
                raise ValueError(
                    f"`guidance_scale` was set to {self.guidance_scale} in the run, but the call has no `{name}` for"
                    " it: pass them beside the embeddings."
                )
            contexts.append(FlowContext(kind, tokens, null_tokens, ratios[kind]))
        return contexts

    def _begin_run(self, num_inference_steps: int, guidance_scale: float) -> Tensor:
        """Lays out the steps and returns the timestep of each."""
        self.scheduler.set_timesteps(int(num_inference_steps), device=self._execution_device)
        check_timesteps(self.scheduler, num_inference_steps)
        self._guidance_scale, self._interrupt = start_scale(guidance_scale), False
        return self.scheduler.timesteps

    def _sources(self, conditions: Conditions, total: int, size: tuple[int, int]) -> Tensor:
        """The one picture of each sample, stretched to the size of the result: (b, 3, H, W) in [0, 1]."""
        pictures = [stretch_picture(sample[0], *size) for sample in conditions.images]
        arrays = np.stack([np.asarray(picture) for picture in pictures])
        pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
        return _repeat(pixels.to(self._execution_device), total)

    def _start_from(
        self,
        sources: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        strength: float,
        generator: Generators,
        exact_start: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The noised latents of pictures (b, 3, H, W) in [0, 1], and the steps that are left."""
        posterior = self.vae.encode(sources.to(self.vae.dtype) * 2 - 1).latent_dist  # type: ignore[union-attr]
        clean = posterior.sample(generator).to(noise) * self.vae.config["scaling_factor"]
        level, timesteps = start_level(timesteps, strength, scheduler_attribute(self.scheduler, "order", 1))
        if level is None:
            return clean, timesteps
        level = timesteps[0] if exact_start else level
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(len(self.scheduler.timesteps) - len(timesteps))
        noise = noise / self.scheduler.init_noise_sigma
        return self.scheduler.add_noise(clean, noise, level.reshape(1)), timesteps

    def _denoise(
        self,
        latents: Tensor,
        timesteps: Tensor,
        contexts: list[FlowContext],
        data_type: str,
        mixing: str,
        eta: float,
        generator: Generators,
        callback: Callback | None,
        callback_names: list[str],
        encode: Callable[[], list[FlowContext]],
    ) -> Tensor:
        arguments = step_arguments(self.scheduler, eta=eta, generator=generator)
        ratios = [context.ratio for context in contexts]
        finite: list[Tensor] = []  # whether each step's prediction is
        self._num_timesteps = len(timesteps)
        bar: Any = self.progress_bar
        with bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                choices = self._layer_choices(ratios, generator) if mixing == "layer" else None
                noise = predict_flow_noise(
                    self.unet,
                    self.scheduler.scale_model_input(latents, t),
                    t,
                    contexts,
                    data_type=data_type,
                    guidance_scale=self.guidance_scale,
                    layer_choices=choices,
                )
                finite.append(torch.isfinite(noise).all())
                latents = self.scheduler.step(noise, t, latents, **arguments, return_dict=False)[0]
                if callback is not None:
                    named = {"latents": latents, **_named_contexts(contexts)}
                    changed = report_step(self, callback, callback_names, i, t, named)
                    latents = changed.get("latents", latents)
                    contexts = _with_changed(contexts, changed)
                    if self.do_classifier_free_guidance and contexts[0].negative_embeds is None:
                        null = [context.negative_embeds for context in encode()]
                        contexts = [replace(c, negative_embeds=n) for c, n in zip(contexts, null, strict=True)]
                progress_bar.update()
        check_predictions(finite, timesteps, self)
        return latents

    def _layer_choices(self, ratios: list[float], generator: Generators) -> list[Any]:
        """One context a layer, for the whole batch; with a list of generators, for each result from its own."""
        if isinstance(generator, list):
            return [self.unet.draw_layer_choices(ratios, generator=one) for one in generator]
        return self.unet.draw_layer_choices(ratios, generator=generator)


def _context_names(contexts: list[FlowContext]) -> dict[str, int]:
    """What callbacks call the contexts, and their places; `prompt_embeds` is there in every call."""
    names = {{"text": "prompt_embeds", "image": "image_embeds"}[c.type]: place for place, c in enumerate(contexts)}
    return {"prompt_embeds": 0, **names}


def _named_contexts(contexts: list[FlowContext]) -> dict[str, Tensor | None]:
    places = _context_names(contexts)
    named: dict[str, Tensor | None] = {name: contexts[place].embeds for name, place in places.items()}
    return named | {f"negative_{name}": contexts[place].negative_embeds for name, place in places.items()}


def _with_changed(contexts: list[FlowContext], changed: dict[str, Tensor]) -> list[FlowContext]:
    contexts = list(contexts)
    for name, place in _context_names(contexts).items():
        embeds = changed.get(name, contexts[place].embeds)
        negative = changed.get(f"negative_{name}", contexts[place].negative_embeds)
        contexts[place] = replace(contexts[place], embeds=embeds, negative_embeds=negative)
    return contexts


def _repeat(values: Tensor, total: int) -> Tensor:
    """One for each of `total` results, those of one sample next to each other."""
    return values.repeat_interleave(total // len(values), dim=0)
