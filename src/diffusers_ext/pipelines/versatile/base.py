"""What the pipelines of Versatile Diffusion share: components, contexts, latents, the sampling loop, results.

Xu, Wang, Zhang, Wang, Shi, arXiv 2211.08332; original: SHI-Labs/Versatile-Diffusion@cf0f4a2 (code MIT). No pipeline by
itself.

Shapes: b samples, c x h x w latents, H x W pixels, l x d context tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerBase,
)

from ...conditions.focus import rescale_ranks
from ...models.autoencoder_optimus import AutoencoderOptimus
from ...models.unet_versatile import VersatileUNet
from ...schedulers.gaussian import check_gaussian_scheduler, guided_step, set_steps, step_arguments
from ..base import LOOKUP_ARGUMENTS, Config, ConfigOf, HousePipeline
from ..callbacks import Callback, report_step
from ..checks import (
    as_generators,
    as_texts,
    check_choice,
    check_fraction,
    check_guidance_scale,
    check_integer,
    check_output_type,
    check_predictions,
    check_side,
    check_steps,
    check_timesteps,
    sample_sides,
)
from ..listed_options import record_sample_size
from ..tokenization import text_ids
from .conditions import (
    NULL_PICTURES,
    Conditions,
    image_context,
    mask_to_token_weights,
    null_picture,
    prepare_pictures,
    read_conditions,
    text_context,
)
from .denoising import EMBEDS_NAMES, FlowContext, changed_contexts, named_contexts, predict_branches
from .optimus_text import MAX_SENTENCE_LENGTH, read_sentences
from .repeated_words import merge_repeated_words

Generators = torch.Generator | list[torch.Generator] | None
DATA_TYPES = ("image", "text")  # what the pipelines can decode
NULL_IMAGES = ("zeros", *NULL_PICTURES)
# of the pipeline's `from_pretrained`, which the network's takes too
_MODEL_ARGUMENTS = {"device_map", "disable_mmap", "dtype", "low_cpu_mem_usage", "torch_dtype", "use_safetensors"}
_MODEL_ARGUMENTS |= {"variant", *LOOKUP_ARGUMENTS}
_NEEDED_BY = {  # components that only some flows need
    "-to-image": ["vae"],
    "-to-text": ["optimus", "encoder_tokenizer", "decoder_tokenizer"],
    "text-to-": ["text_encoder", "tokenizer"],
    "image-to-": ["image_encoder", "feature_extractor"],
}


@dataclass
class VersatilePipelineOutput(BaseOutput):
    """The results of a call.

    Args:
        images: PIL images, an array or a tensor, see `output_type`; None where texts were asked for.
        texts: Strings, or their latents (b, d) with `output_type="latent"`. Beside edited images, their captions.
    """

    images: list[Image.Image] | np.ndarray | Tensor | None = None
    texts: list[str] | Tensor | None = None


class VersatileBasePipeline(HousePipeline):
    """The components of Versatile Diffusion, and the steps of a call that its pipelines share."""

    _one_checkpoint = True  # each of its subclasses loads what another one saved
    _usual_guidance_scale = 7.5

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae->optimus"
    _optional_components = [name for names in _NEEDED_BY.values() for name in names]
    _callback_tensor_inputs = [
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
        "image_embeds",
        "negative_image_embeds",
    ]

    vae: AutoencoderKL
    unet: VersatileUNet
    scheduler: Any
    optimus: AutoencoderOptimus
    image_encoder: CLIPVisionModelWithProjection
    text_encoder: CLIPTextModelWithProjection

    def __init__(
        self,
        unet: VersatileUNet,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: CLIPTextModelWithProjection | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        optimus: AutoencoderOptimus | None = None,
        encoder_tokenizer: PreTrainedTokenizerBase | None = None,
        decoder_tokenizer: PreTrainedTokenizerBase | None = None,
        default_sample_size: int | tuple[int, int] | dict[str, int] | None = None,
        default_guidance_scale: float = 7.5,
    ):
        """The components. A call needs only those that its flows use.

        Args:
            unet: The multi-flow network.
            scheduler: A scheduler of diffusers with `scale_model_input`, `step` and `add_noise`, see
                `versatile_scheduler`.
            vae: The autoencoder of images; needed where images are made.
            tokenizer: The tokenizer of the text encoder.
            text_encoder: The CLIP text model with projection; needed for texts as context.
            image_encoder: The CLIP vision model with projection; needed for images as context.
            feature_extractor: The image processor of the image encoder.
            optimus: The autoencoder of texts; needed where texts are made.
            encoder_tokenizer: The tokenizer of the encoder in `optimus`; needed only for editing.
            decoder_tokenizer: The tokenizer of the decoder in `optimus`.
            default_sample_size: The side, or (height, width), of the latents of images when a call names no size; by
                default `unet.config.sample_size`, else 64.
            default_guidance_scale: The guidance scale when a call names none.
        """
        super().__init__()
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            vae=vae,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            optimus=optimus,
            encoder_tokenizer=encoder_tokenizer,
            decoder_tokenizer=decoder_tokenizer,
        )
        self.register_to_config(
            default_sample_size=record_sample_size(default_sample_size, unet, 64),
            default_guidance_scale=default_guidance_scale,
        )
        self.vae_scale_factor = 8 if vae is None else 2 ** (len(vae.config["block_out_channels"]) - 1)
        # `decode_latents` gives pixels in [0, 1], so there is nothing to denormalise
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_normalize=False)
        self._guidance_scale = default_guidance_scale

    @classmethod
    def idle_arguments(cls, index: Config, config_of: ConfigOf) -> set[str]:
        """What no flow of the network reads, or makes."""
        flows = config_of("unet").get("flows")
        if not flows:
            return set()  # all of them
        contexts, made = ({flow.split("-to-")[side] for flow in flows} for side in (0, 1))
        idle = {"text": {"prompt", "negative_prompt"}, "image": {"image", "image_masks"}}
        found = set().union(*(names for kind, names in idle.items() if kind not in contexts))
        return found | ({"data_type"} if "text" not in made else set())

    @classmethod
    def from_pretrained(  # type: ignore[override] # a named argument among the parent's keywords
        cls, pretrained_model_name_or_path: Any, flows: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """diffusers' `from_pretrained`, which reads only what `flows` need.

        Args:
            flows: names such as "text-to-image": the other layer groups of the network are not read from its file
                (which a download from the Hub fetches as a whole), and components that these flows do not use are
                neither downloaded nor read. None: everything. `DiffusionPipeline.from_pretrained` does not know it.

        Raises:
            ValueError: for flows that the network does not know or that were not saved; lists those it has. For a
                repository in the format of diffusers' former pipelines, naming the function that reads it.
        """
        lookup = {name: value for name, value in kwargs.items() if name in LOOKUP_ARGUMENTS}
        if "image_unet" in cls.load_config(pretrained_model_name_or_path, **lookup):
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} is a repository of diffusers' former Versatile Diffusion, "
                "with two networks: download it (`hf download ... --local-dir published`), read the folder with "
                "`diffusers_ext.conversion.versatile.load_versatile_repository`, and save the result "
                "(docs/weights_versatile.md)."
            )
        if flows is not None:
            shared = {name: value for name, value in kwargs.items() if name in _MODEL_ARGUMENTS}
            for name in ("dtype", "torch_dtype"):
                if isinstance(dtypes := shared.get(name), dict):  # one each, as diffusers' pipelines take them
                    shared[name] = dtypes.get("unet", dtypes.get("default"))
            if kwargs.get("unet") is None:
                kwargs["unet"] = VersatileUNet.from_pretrained(
                    pretrained_model_name_or_path, flows=flows, subfolder="unet", **shared
                )
            for part, names in _NEEDED_BY.items():
                if not any(part in flow for flow in kwargs["unet"].flows):
                    kwargs |= {name: kwargs.get(name) for name in names}
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def size_multiple(self) -> int:
        """The sides of images that are made are multiples of this many pixels."""
        self.require("the size of pictures", "unet")
        return self.vae_scale_factor * self.unet.downsample_factor

    @property
    def default_side(self) -> int:
        """The side in pixels of a square image where a call names none; of two different sides the longer one."""
        return max(sample_sides("default_sample_size", self.config["default_sample_size"])) * self.vae_scale_factor

    def require(self, what: str, *names: str) -> None:
        """The components are there.

        Args:
            what: What needs them, for the message.
            names: The names of the components.
        """
        missing = [name for name in names if getattr(self, name, None) is None]
        if missing:
            raise ValueError(
                f"The pipeline was loaded without {', '.join(missing)}; {what} needs them. Load it without `flows`,"
                f" or pass `{missing[0]}=...` to `from_pretrained`."
            )

    def check_run(
        self,
        num_inference_steps: int,
        guidance_scale: float,
        guidance_rescale: float,
        num_images_per_prompt: int,
        eta: float,
        output_type: str,
    ) -> None:
        """The arguments that every call has, and the scheduler that they are for."""
        self.require("sampling", "unet", "scheduler")
        check_gaussian_scheduler(self.scheduler, type(self).__name__)
        check_steps(self.scheduler, num_inference_steps)
        check_guidance_scale(guidance_scale)
        self.check_rescale(guidance_rescale)
        check_integer("num_images_per_prompt", num_images_per_prompt, 1)
        check_fraction("eta", eta, "0 is deterministic, 1 is as noisy as DDPM")
        check_output_type(output_type)

    def check_flow(self, data_type: str, context_types: Sequence[str], given: Sequence[str] = ()) -> None:
        """The network has the layers of a flow, and the encoders and decoders fit it.

        Args:
            data_type: What is made, "image" or "text".
            context_types: The types of the contexts that it is made from.
            given: Those of them whose context tokens are given, so that no encoder is needed.
        """
        check_choice("data_type", data_type, DATA_TYPES)
        if not context_types:
            raise ValueError("There is nothing to start from: pass `prompt`, `image`, or embeddings of one of them.")
        missing = [flow for kind in context_types if (flow := f"{kind}-to-{data_type}") not in self.unet.flows]
        if missing:
            raise ValueError(
                f"The call needs the flow {', '.join(missing)}; the loaded network has {', '.join(self.unet.flows)},"
                f" of {', '.join(self.unet.known_flows)}. Load it with `{type(self).__name__}.from_pretrained(...,"
                " flows=[...])` or without `flows`."
            )
        config = self.unet.config
        sizes = [(f"{kind}_encoder", "projection_dim", config["context_types"][kind]) for kind in context_types]
        sizes += [
            ("vae", "latent_channels", config["data_types"][data_type]["channels"])
            if data_type == "image"
            else ("optimus", "latent_dim", config["data_types"][data_type]["channels"])
        ]
        wrong = [
            f"{part}.config.{name} is {found}, the network needs {size}"
            for part, name, size in sizes
            if getattr(self, part) is not None and (found := getattr(getattr(self, part).config, name)) != size
        ]
        if wrong:
            raise ValueError(f"The components do not fit: {'; '.join(wrong)}. Load those that it was trained with.")
        if "text" in context_types and "text" not in given:
            self.require("a text", "tokenizer", "text_encoder")
        if "image" in context_types and "image" not in given:
            self.require("a picture", "image_encoder", "feature_extractor")

    def check_size(self, height: Any, width: Any) -> None:
        """The images that are made have sides that the networks take, and there is what decodes them."""
        self.require("a picture to be made", "vae")
        factor, levels = self.vae_scale_factor, self.unet.downsample_factor
        for name, side in (("height", height), ("width", width)):
            check_side(
                name, side, factor * levels, factor * levels, because=f"autoencoder {factor} x network {levels}"
            )

    def check_text_length(self, max_text_length: Any) -> None:
        """The text decoder is there, and can write so many tokens; None stands for its own choice."""
        self.require("a text to be made", "optimus", "decoder_tokenizer")
        if max_text_length is None:
            return
        check_integer("max_text_length", max_text_length, 2)
        if max_text_length > self.optimus.longest_sentence:
            raise ValueError(
                f"`max_text_length` is {max_text_length}: the text decoder writes from 2 (its first and last token) to"
                f" {self.optimus.longest_sentence} tokens. Pass one of these, or None."
            )

    def check_embeds(self, conditions: Conditions, guidance_scale: float) -> None:
        """Context tokens (b, l, d) that take the place of texts or images have the width of the network."""
        for kind, (embeds, negative) in conditions.embeds.items():
            name, other = EMBEDS_NAMES[kind], {"text": "prompt", "image": "image"}[kind]
            if embeds is None:
                raise ValueError(f"`negative_{name}` is given without `{name}`.")
            if conditions.texts if kind == "text" else conditions.images:
                raise ValueError(f"`{other}` and `{name}` are both given: pass one of them.")
            if guidance_scale != 1 and negative is None:
                raise ValueError(f"`{name}` needs `negative_{name}` for guidance, or `guidance_scale=1`.")
            width = self.unet.config["context_types"][kind]
            for label, value in ((name, embeds), (f"negative_{name}", negative)):
                if value is None:
                    continue
                if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[2] != width or 0 in value.shape:
                    found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise ValueError(f"`{label}` must have shape (b, tokens, {width}), received {found}.")
                if not bool(torch.isfinite(value).all()):
                    raise ValueError(f"`{label}` holds values that are not finite (NaN or infinite): encode it anew.")
            if negative is not None and len(negative) not in (1, len(embeds)):
                raise ValueError(f"`negative_{name}` holds {len(negative)} samples and `{name}` {len(embeds)}.")
        sizes = conditions.samples
        if set(sizes.values()) - {1, max(sizes.values())}:
            raise ValueError(f"The call has {sizes} samples: pass as many texts as pictures, or one for all.")

    def encode_prompt(
        self,
        prompt: Any,
        num_images_per_prompt: int = 1,
        *,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_weights: Sequence[float] | None = None,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encodes texts as context tokens; needs only the tokenizer and the text encoder.

        Args:
            prompt: The text, one a sample, or several a sample (a list of lists), which follow each other as tokens.
            num_images_per_prompt: How often each context is repeated.
            do_classifier_free_guidance: Whether the null branch is wanted as well.
            negative_prompt: The text of the null branch, one for all samples or one each; by default the empty text.
            prompt_weights: The factor of the tokens of each text of a sample.
            device: The device that the text encoder runs on; by default that of the pipeline.

        Returns:
            Both contexts, `(n * num_images_per_prompt, l, d)`; the second is None without guidance.
        """
        conditions = read_conditions("" if prompt is None else prompt, prompt_weights=prompt_weights)
        pair = self._encode_texts(conditions, negative_prompt, do_classifier_free_guidance, device)
        embeds, negative = (None if one is None else one.repeat_interleave(num_images_per_prompt, 0) for one in pair)
        assert embeds is not None
        return embeds, negative

    def encode_image(
        self,
        image: Any,
        num_images_per_prompt: int = 1,
        *,
        do_classifier_free_guidance: bool = True,
        image_masks: Any = None,
        image_weights: Sequence[float] | None = None,
        focus: float | Sequence[float] = 0.5,
        null_image: str = "zeros",
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encodes images as context tokens; needs only the image encoder and the feature extractor.

        Images of any size are stretched to a square of the pipeline's default size first, as in the original.

        Args:
            image: The image, one a sample, or several a sample (a list of lists), which follow each other as tokens.
            num_images_per_prompt: How often each context is repeated.
            do_classifier_free_guidance: Whether the null branch is wanted as well.
            image_masks: The mask of each image, nested as the images are, of the size of its image: 1 (white) where
                the image is read, 0 where it is not.
            image_weights: The factor of the tokens of each image of a sample.
            focus: 0 keeps the objects of an image, 0.5 everything, 1 its style; one for all images or one each.
            null_image: The image of the null branch: "zeros" (no tokens), or a "grey" or "black" one.
            device: The device that the image encoder runs on; by default that of the pipeline.

        Returns:
            Both contexts, `(n * num_images_per_prompt, l, d)`; the second is None without guidance.
        """
        check_choice("null_image", null_image, NULL_IMAGES)
        conditions = read_conditions(image=image, image_masks=image_masks, image_weights=image_weights, focus=focus)
        pair = self._encode_pictures(conditions, null_image, do_classifier_free_guidance, device)
        embeds, negative = (None if one is None else one.repeat_interleave(num_images_per_prompt, 0) for one in pair)
        assert embeds is not None
        return embeds, negative

    def encode_contexts(
        self,
        conditions: Conditions,
        shares: Mapping[str, float],
        total: int,
        *,
        negative_prompt: str | list[str] | None = None,
        null_image: str = "zeros",
        guided: bool = True,
    ) -> list[FlowContext]:
        """Encodes the conditions of a call, unless their tokens are given.

        Args:
            conditions: The conditions of the call.
            shares: The share of each context that counts, by type.
            total: The number of results; those of one sample lie next to each other.
            negative_prompt: As in `encode_prompt`.
            null_image: As in `encode_image`.
            guided: Whether the null branch is encoded as well.
        """
        contexts = []
        for kind, share in shares.items():
            if kind in conditions.embeds:
                pair = conditions.embeds[kind]
            elif kind == "text":
                pair = self._encode_texts(conditions, negative_prompt, guided)
            else:
                pair = self._encode_pictures(conditions, null_image, guided)
            embeds, negative = (
                None if one is None else one.to(self._execution_device).repeat_interleave(total // len(one), dim=0)
                for one in pair
            )
            assert embeds is not None
            contexts.append(FlowContext(kind, embeds, negative, share))
        return contexts

    def prepare_latents(
        self,
        data_type: str,
        batch_size: int,
        height: int | None = None,
        width: int | None = None,
        *,
        generator: Generators = None,
        latents: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The initial latents: standard normal noise (b, c, h, w) or (b, d), times the scheduler's initial sigma.

        Args:
            data_type: What is made, "image" or "text".
            batch_size: The number of samples, b.
            height: Height of the image in pixels.
            width: Width of the image in pixels.
            generator: One generator for the whole batch, or a list with one a sample.
            latents: Standard normal noise in place of a draw.
            device: The device of the latents; by default that of the pipeline.
        """
        device = torch.device(device if device is not None else self._execution_device)
        shape = (batch_size, self.unet.config["data_types"][data_type]["channels"])
        if data_type == "image":
            rows, columns = self.resolve_size(height, width)
            shape = (*shape, rows // self.vae_scale_factor, columns // self.vae_scale_factor)
        if latents is None:
            latents = randn_tensor(shape, generator=as_generators(generator), device=device, dtype=self.unet.dtype)
        elif not isinstance(latents, Tensor) or not latents.is_floating_point():
            kind = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
            raise TypeError(f"`latents` must be a floating-point tensor of standard normal noise, received {kind}.")
        elif tuple(latents.shape) != shape or not bool(torch.isfinite(latents).all()):
            raise ValueError(f"`latents` must be finite and of shape {shape}, received {tuple(latents.shape)}.")
        return latents.to(device=device, dtype=self.unet.dtype) * self.scheduler.init_noise_sigma

    def prepare_timesteps(self, num_inference_steps: int) -> Tensor:
        """Sets the scheduler to so many steps, and returns the timestep of each."""
        set_steps(self.scheduler, int(num_inference_steps), self._execution_device)
        check_timesteps(self.scheduler, num_inference_steps)
        return self.scheduler.timesteps

    def denoise(
        self,
        latents: Tensor,
        timesteps: Tensor,
        contexts: list[FlowContext],
        data_type: str,
        *,
        mixing: str = "attention",
        eta: float = 0.0,
        generator: Generators = None,
        callback: Callback | None = None,
        callback_names: Sequence[str] = (),
        first_step: int = 0,
    ) -> Tensor:
        """The sampling loop: from noise to latents of `data_type`, under any mixture of contexts.

        Args:
            latents: The latents to start from.
            timesteps: The timesteps that are run.
            contexts: The contexts of all results.
            data_type: What is made, "image" or "text".
            mixing: "attention" or "layer".
            eta: Noise of DDIM.
            generator: One generator for the whole batch, or a list with one a result.
            callback: Called after each step.
            callback_names: The tensors that it gets.
            first_step: What the callback is told as the number of the first step.
        """
        step_options = step_arguments(self.scheduler, eta=eta, generator=generator)
        finite: list[Tensor] = []  # whether each step's prediction is
        for i, t in self.steps(timesteps):
            cond, uncond = predict_branches(
                self.unet,
                self.scheduler.scale_model_input(latents, t),
                t,
                contexts,
                data_type=data_type,
                guidance_scale=self._guidance_scale,
                layer_choices=None if mixing == "attention" else self._draw_layer_choices(contexts, generator),
            )
            latents, noise = guided_step(
                self.scheduler, cond, uncond, self._guidance_scale, t, latents, mix=self.guidance_mix, **step_options
            )
            finite.append(torch.isfinite(noise).all())
            if callback is not None:
                tensors = {"latents": latents, **named_contexts(contexts)}
                changed = report_step(self, callback, callback_names, first_step + i, t, tensors)
                latents, contexts = changed.get("latents", latents), changed_contexts(contexts, changed)
                self._check_null_branch(contexts)
        check_predictions(finite, timesteps, self)
        return latents

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decodes latents (b, c, h, w) to images (b, 3, H, W) in [0, 1]."""
        pixels = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config["scaling_factor"], return_dict=False)[0]
        return ((pixels.float() + 1) / 2).clamp(0, 1)

    def decode_texts(
        self,
        latents: Tensor,
        *,
        generator: Generators = None,
        temperature: float = 1.0,
        max_text_length: int | None = None,
        merge_repeats: bool = True,
    ) -> list[str]:
        """Decodes latents (b, d) to texts.

        Args:
            latents: The latents of the texts.
            generator: The generator that draws the words, one for all texts or one each.
            temperature: The spread of the draws; 0 takes the most probable word each time.
            max_text_length: The number of tokens of the decoder, first and last included; by default 30, or as many
                as it has.
            merge_repeats: Whether one of several equal runs of words is left.
        """
        if max_text_length is None:
            max_text_length = min(MAX_SENTENCE_LENGTH, self.optimus.longest_sentence)
        ids = self.optimus.decode(
            latents.to(self.optimus.dtype),
            max_length=max_text_length,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            generator=as_generators(generator),
        )
        texts = read_sentences(self.decoder_tokenizer, ids)
        return [merge_repeated_words(text) for text in texts] if merge_repeats else texts

    def _encode_texts(
        self,
        conditions: Conditions,
        negative_prompt: str | list[str] | None,
        guided: bool,
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The context tokens of the texts of each sample (n, l, d), and those of the null branch."""
        self.require("a text", "tokenizer", "text_encoder")
        device = device if device is not None else self._execution_device
        samples, several = len(conditions.texts), len(conditions.text_weights)
        negatives = [""] if negative_prompt is None else as_texts("negative_prompt", negative_prompt)
        if len(negatives) not in (1, samples):
            raise ValueError(
                f"`negative_prompt` holds {len(negatives)} texts for {samples} samples; pass one for all or one each."
            )
        contexts = []
        for texts in ([text for sample in conditions.texts for text in sample], negatives)[: 1 + guided]:
            ids = text_ids(self.tokenizer, self.text_encoder, texts, pipe=self)
            contexts.append(text_context(self.text_encoder, ids.to(device)))
        weights = torch.tensor(conditions.text_weights * samples, device=device, dtype=contexts[0].dtype)
        embeds = contexts[0] * weights[:, None, None]
        embeds = embeds.reshape(samples, -1, embeds.shape[-1])  # one text after the other
        return embeds, contexts[1].repeat(1, several, 1).expand(samples, -1, -1) if guided else None

    def _encode_pictures(
        self, conditions: Conditions, null_image: str, guided: bool, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The context tokens of the images of each sample (n, l, d), and those of the null branch."""
        self.require("a picture", "image_encoder", "feature_extractor")
        device = device if device is not None else self._execution_device
        samples, several = len(conditions.images), len(conditions.image_weights)
        tokens = self._image_tokens(conditions, device)
        factors = torch.tensor(conditions.image_weights * samples, device=device, dtype=tokens.dtype)
        embeds = (tokens * factors[:, None, None]).reshape(samples, -1, tokens.shape[-1])
        if not guided:
            return embeds, None
        if null_image == "zeros":
            return embeds, torch.zeros_like(embeds)
        side = self.default_side
        picture = prepare_pictures(self.feature_extractor, [null_picture(null_image, side)], side)
        null = image_context(self.image_encoder, picture.to(device, self.image_encoder.dtype))
        return embeds, null.repeat(samples, several, 1)

    def _image_tokens(self, conditions: Conditions, device: torch.device | str) -> Tensor:
        """The tokens of all images (samples * images, l, d), with mask and focus, without weights."""
        pictures = [picture for sample in conditions.images for picture in sample]
        masks = [mask for sample in conditions.masks for mask in sample]
        pixels = prepare_pictures(self.feature_extractor, pictures, self.default_side)
        weights = None
        if any(mask is not None for mask in masks):
            config: Any = self.image_encoder.config
            whole = torch.ones(1, 1, 1, 1)
            weights = torch.cat(
                [
                    mask_to_token_weights(whole if mask is None else mask[None], config.image_size, config.patch_size)
                    for mask in masks
                ]
            ).to(device)
        tokens = image_context(self.image_encoder, pixels.to(device, self.image_encoder.dtype), weights)
        levels = conditions.focus * len(conditions.images)
        local = [rescale_ranks(one[None, 1:], level) for one, level in zip(tokens, levels, strict=True)]
        return torch.cat([tokens[:, :1], torch.cat(local)], dim=1)

    def _draw_layer_choices(self, contexts: Sequence[FlowContext], generator: Generators) -> list[Any]:
        """One context a layer, for the whole batch; with a list of generators, for each result from its own."""
        ratios = [context.ratio for context in contexts]
        if isinstance(generator, list):
            return [self.unet.draw_layer_choices(ratios, generator=one) for one in generator]
        return self.unet.draw_layer_choices(ratios, generator=generator)

    def _check_null_branch(self, contexts: Sequence[FlowContext]) -> None:
        """Guidance that a callback turned on has what it guides away from."""
        for context in contexts:
            if self.do_classifier_free_guidance and context.negative_embeds is None:
                raise ValueError(
                    f"`guidance_scale` was set to {self.guidance_scale} in the run, but the call has no"
                    f" `negative_{EMBEDS_NAMES[context.type]}` for it: pass them beside the embeddings."
                )
