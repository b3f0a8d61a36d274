"""Editing with Versatile Diffusion: an image by way of its caption, image to text to image.

Xu, Wang, Zhang, Wang, Shi, arXiv 2211.08332, "image to text to image"; original: SHI-Labs/Versatile-Diffusion@99f1831
(code MIT). Differences: every draw takes a generator, or one for each result.

Shapes: b results, d numbers of a text's latents, l x d context tokens.
"""

from dataclasses import replace
from typing import Any

import torch

from ...conditions.focus import select_ranks
from ..callbacks import Callback
from ..checks import as_generators, check_choice, check_fraction, check_generator, check_temperature
from .base import NULL_IMAGES, Generators, VersatileBasePipeline, VersatilePipelineOutput
from .conditions import read_conditions
from .denoising import FlowContext
from .optimus_text import sentence_ids, word_piece_window


class VersatileEditPipeline(VersatileBasePipeline):
    """Edits an image: it makes a caption of it, edits the caption as a vector, and makes an image of both.

    Its components are described at `__init__`, and it needs all of them. It loads what `VersatilePipeline` saved, and
    the other way round. The network needs the flows "image-to-text", "text-to-image" and "image-to-image".

    Example:

        edited = pipe(picture, prompt="a red circle", negative_prompt="a blue star")
        edited.images[0], edited.texts[0]                                   # the image, and its new caption
    """

    _pipeline_tag = "image-to-image"
    _card_tags = ("image-editing",)
    _example = (
        "from diffusers.utils import load_image\n\n"
        'edited = pipe(load_image("picture.png"), prompt="{prompt}", negative_prompt="a blue star")\n'
        "image, caption = edited.images[0], edited.texts[0]"
    )

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        prompt: str,
        negative_prompt: str,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        text_ratio: float = 0.67,
        null_image: str | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        temperature: float = 1.0,
        max_text_length: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> VersatilePipelineOutput | tuple:
        """Edits an image by way of its caption.

        The direction of `negative_prompt` is taken out of the caption's latents, and the latents of `prompt` are
        added. The new caption and `prompt` together are the text context of the result. The style of the image (its
        10 leading ranks) is the other context.

        Args:
            image: One image (PIL, array or tensor).
            prompt: The text to add.
            negative_prompt: The text to take away.
            height: Height of the image in pixels.
            width: Width of the image in pixels.
            num_inference_steps: The number of steps of each half: image to text, and text and image to image.
            guidance_scale: How closely both halves follow their contexts; 1 switches guidance off.
            guidance_rescale: The share in [0, 1] of normalised guidance (PITI, arXiv 2205.12952): 1 gives the guided
                prediction the mean and the standard deviation of the conditional one, sample by sample, against the
                oversaturation of large scales; 0 is plain guidance. The argument of diffusers (arXiv 2305.08891)
                corrects the standard deviation alone.
            text_ratio: The share of the texts in the second half; the original gives the image 0.33.
            null_image: The image that the null branch reads: "zeros" (no tokens), "grey" or "black". By default black
                in the first half and zeros in the second one, as the authors do.
            num_images_per_prompt: The number of results; each has a caption of its own.
            eta: Noise of DDIM, from 0 to 1; ignored by other schedulers.
            generator: One generator for all results, or a list with one each.
            temperature: The temperature at which the words of the caption are drawn; 0 takes the most probable ones.
            max_text_length: The length of the caption in tokens of its decoder, first and last included; by default
                30, or as many as it has.
            output_type: "pil", "np" or "pt"; "latent" leaves out the decoding of the images.
            return_dict: Whether to return a `VersatilePipelineOutput` instead of a tuple of images and captions.
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` after each step of both halves;
                `step` goes on in the second half.
            callback_on_step_end_tensor_inputs: The names of its tensors, by default "latents". The others are
                `prompt_embeds` and `image_embeds`, each also with `negative_` before it. In the first half
                `prompt_embeds` are those of the image.

        Returns:
            `images`, and as `texts` the captions that they were made from.
        """
        callback_names = self.callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs)
        generator = as_generators(generator)
        scale = self.resolve_scale(guidance_scale)
        height, width = self.resolve_size(height, width)
        self.check_run(num_inference_steps, scale, guidance_rescale, num_images_per_prompt, eta, output_type)
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if not isinstance(text, str):
                raise TypeError(f"`{name}` must be one string, received {type(text).__name__}.")
        conditions = read_conditions(image=image)
        if len(conditions.images) != 1 or len(conditions.image_weights) != 1:
            raise ValueError(
                f"`image` holds {len(conditions.images)} samples of {len(conditions.image_weights)} pictures: one "
                "picture is edited at a time."
            )
        check_fraction("text_ratio", text_ratio, "0 reads the images only, 1 the texts only")
        check_choice("null_image", null_image, NULL_IMAGES, or_none=True)
        check_temperature(temperature)
        shares = {"text": text_ratio, "image": 1 - text_ratio}
        self.check_flow("text", ["image"])
        self.check_flow("image", [kind for kind, share in shares.items() if share > 0])
        self.require("a text", "tokenizer", "text_encoder")
        self.check_size(height, width)
        self.check_text_length(max_text_length)
        self.require("editing", "encoder_tokenizer")
        check_generator(generator, num_images_per_prompt, self._execution_device)

        timesteps = self.prepare_timesteps(num_inference_steps)
        self.start_run(torch.cat([timesteps, timesteps]), scale, guidance_rescale)
        run = {
            "eta": eta,
            "generator": generator,
            "callback": callback_on_step_end,
            "callback_names": callback_names,
        }
        contexts = self.encode_contexts(
            conditions,
            {"image": 1.0},
            num_images_per_prompt,
            null_image=null_image or "black",
            guided=self.do_classifier_free_guidance or callback_on_step_end is not None,
        )
        latents = self.prepare_latents("text", num_images_per_prompt, generator=generator)
        found = self.denoise(latents, timesteps, contexts, "text", **run)
        self.maybe_free_model_hooks()

        window = word_piece_window(self.encoder_tokenizer, self.optimus)
        texts = [negative_prompt, prompt]
        ids = sentence_ids(self.encoder_tokenizer, texts, max_word_pieces=window, pipe=self)
        away, towards = self.optimus.encode(ids.to(found.device)).mean.to(found)  # (d,) each
        away = away / away.norm()
        edited = found - (found @ away)[:, None] * away + towards
        captions = self.decode_texts(
            edited, generator=generator, temperature=temperature, max_text_length=max_text_length
        )

        guided = self.do_classifier_free_guidance or callback_on_step_end is not None
        texts = [[caption, prompt] for caption in captions]
        conditions = replace(conditions, texts=texts, text_weights=[1.0, 1.0])
        words, look = self.encode_contexts(
            conditions, shares, num_images_per_prompt, null_image=null_image or "zeros", guided=guided
        )
        null = look.negative_embeds
        style = FlowContext(
            "image", select_ranks(look.embeds[:, 1:], 0, 10), None if null is None else null[:, 1:], look.ratio
        )
        contexts = [context for context in (words, style) if context.ratio > 0]
        timesteps = self.prepare_timesteps(num_inference_steps)
        latents = self.prepare_latents("image", num_images_per_prompt, height, width, generator=generator)
        first_step = len(timesteps)
        latents = self.denoise(latents, timesteps, contexts, "image", first_step=first_step, **run)
        images = self.finish(latents, output_type, False, self.decode_latents)[0]
        return VersatilePipelineOutput(images=images, texts=captions) if return_dict else (images, captions)
