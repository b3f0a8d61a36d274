"""What `VersatilePipeline` is made of: components, contexts, latents and results. No pipeline by itself.

Xu, Wang, Zhang, Wang, Shi, arXiv 2211.08332; original: SHI-Labs/Versatile-Diffusion@cf0f4a2 (code MIT). The modes of
sampling are in `pipeline_versatile.py`.

Shapes: b samples, c x h x w latents, H x W pixels, l x d context tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
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
from ..base import LOOKUP_ARGUMENTS, HousePipeline
from ..checks import as_generators, as_texts
from ..clip_vectors import text_ids
from ..listed_options import record_sample_size, sample_sides
from ..tokenization import warn_of_cuts
from .checks import NULL_IMAGES, check_choice, check_parts
from .conditions import Conditions, read_conditions
from .contexts import (
    image_context,
    mask_to_token_weights,
    null_picture,
    prepare_pictures,
    text_context,
)
from .optimus_text import MAX_SENTENCE_LENGTH, read_sentences
from .repeated_words import merge_repeated_words

Generators = torch.Generator | list[torch.Generator] | None
_MODEL_ARGUMENTS = (  # of the pipeline's `from_pretrained`, which the network's takes too
    "cache_dir", "device_map", "disable_mmap", "dtype", "force_download", "local_files_only", "low_cpu_mem_usage",
    "proxies", "revision", "token", "torch_dtype", "use_safetensors", "variant",
)  # fmt: skip
_NEEDED_BY = {  # components that only some flows need
    "-to-image": ["vae"],
    "-to-text": ["optimus", "encoder_tokenizer", "decoder_tokenizer"],
    "text-to-": ["text_encoder", "tokenizer"],
    "image-to-": ["image_encoder", "feature_extractor"],
}


class VersatileBasePipeline(HousePipeline):
    """Components of Versatile Diffusion, and what they do for a call.

    Args:
        unet: The multi-flow network.
        scheduler: Any of diffusers that knows `scale_model_input`, `step` and `add_noise`, see `versatile_scheduler`.
        vae: Pictures to latents and back; needed where pictures are made.
        tokenizer: Of the text encoder.
        text_encoder: CLIP text model with projection; needed for texts as context.
        image_encoder: CLIP picture model with projection; needed for pictures as context.
        feature_extractor: Its image processor.
        optimus: Texts to latents and back; needed where texts are made.
        encoder_tokenizer: Of its encoder, needed only for `edit_image`.
        decoder_tokenizer: Of its decoder.
        default_sample_size: Side or (height, width) of the latents of pictures when a call names no size; by default
            `unet.config.sample_size`, else 64.
        default_guidance_scale: Guidance scale when a call names none.
    """

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
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._guidance_scale = default_guidance_scale
        self._num_timesteps = 0
        self._interrupt = False

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
        """Sides of pictures that are made are multiples of this many pixels."""
        check_parts(self, "the size of pictures", "unet")
        return self.vae_scale_factor * self.unet.downsample_factor

    @property
    def default_side(self) -> int:
        """Pixels of a square picture's side where a call names none; of a pair the longer one."""
        return max(sample_sides("default_sample_size", self.config["default_sample_size"])) * self.vae_scale_factor

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        # u + s * (c - u): the null branch cancels exactly at s = 1 and only there
        return self._guidance_scale != 1.0

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

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
        """Texts as context tokens; needs only the tokenizer and the text encoder.

        Args:
            prompt: A text, one a sample, or several a sample (a list of lists), which follow each other as tokens.
            num_images_per_prompt: How often each context is repeated.
            do_classifier_free_guidance: Whether a null branch is wanted as well.
            negative_prompt: What the null branch reads, one for all samples or one each; by default the empty text.
            prompt_weights: What the tokens of each text of a sample are multiplied by.
            device: Where the text encoder runs; by default where the pipeline runs.

        Returns:
            Both contexts, `(n * num_images_per_prompt, l, d)`; the second is None without guidance.
        """
        check_parts(self, "a text", "tokenizer", "text_encoder")
        conditions = read_conditions("" if prompt is None else prompt, prompt_weights=prompt_weights)
        device = device if device is not None else self._execution_device
        samples = len(conditions.texts)
        texts = [text for sample in conditions.texts for text in sample]
        negatives = as_texts("negative_prompt", "" if negative_prompt is None else negative_prompt)
        if len(negatives) not in (1, samples):
            raise ValueError(
                f"`negative_prompt` holds {len(negatives)} texts for {samples} samples; pass one for all or one each."
            )
        tokens = self._text_tokens(texts, device)
        weights = torch.tensor(conditions.text_weights * samples, device=device, dtype=tokens.dtype)
        embeds = (tokens * weights[:, None, None]).reshape(samples, -1, tokens.shape[-1])  # one text after the other
        negative = None
        if do_classifier_free_guidance:
            negative = self._text_tokens(negatives, device).repeat(1, len(conditions.text_weights), 1)
            negative = negative.expand(samples, -1, -1).repeat_interleave(num_images_per_prompt, dim=0)
        return embeds.repeat_interleave(num_images_per_prompt, dim=0), negative

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
        """Pictures as context tokens; needs only the image encoder and the feature extractor.

        Whatever their size, they are stretched to a square of the pipeline's default size first, as in the original.

        Args:
            image: A picture, one a sample, or several a sample (a list of lists), which follow each other as tokens.
            num_images_per_prompt: How often each context is repeated.
            do_classifier_free_guidance: Whether a null branch is wanted as well.
            image_masks: One a picture, nested alike, of its size: 1 (white) where it is read, 0 where it is not.
            image_weights: What the tokens of each picture of a sample are multiplied by.
            focus: 0 keeps what is on the picture, 0.5 everything, 1 its style; one for all pictures or one each.
            null_image: What the null branch reads: "zeros" (no tokens), or a "grey" or "black" picture.
            device: Where the image encoder runs; by default where the pipeline runs.

        Returns:
            Both contexts, `(n * num_images_per_prompt, l, d)`; the second is None without guidance.
        """
        check_parts(self, "a picture", "image_encoder", "feature_extractor")
        check_choice("null_image", null_image, NULL_IMAGES)
        conditions = read_conditions(image=image, image_masks=image_masks, image_weights=image_weights, focus=focus)
        device = device if device is not None else self._execution_device
        tokens = self._image_tokens(conditions, device)
        count, samples = len(conditions.image_weights), len(conditions.images)
        factors = torch.tensor(conditions.image_weights * samples, device=device, dtype=tokens.dtype)
        embeds = (tokens * factors[:, None, None]).reshape(samples, -1, tokens.shape[-1])
        negative = None
        if do_classifier_free_guidance:
            negative = torch.zeros_like(embeds)
            if null_image != "zeros":
                side = self.default_side
                picture = prepare_pictures(self.feature_extractor, [null_picture(null_image, side)], side)
                null = image_context(self.image_encoder, picture.to(device, self.image_encoder.dtype))
                negative = null.repeat(samples, count, 1)
            negative = negative.repeat_interleave(num_images_per_prompt, dim=0)
        return embeds.repeat_interleave(num_images_per_prompt, dim=0), negative

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
        """The initial latents: standard normal noise (b, c, h, w) or (b, d), times what the scheduler starts with.

        Args:
            data_type: "image" or "text".
            batch_size: b.
            height: Pixels, of pictures; so is `width`.
            generator: One for the whole batch or a list with one a sample.
            latents: Standard normal noise in place of a draw.
        """
        device = torch.device(device if device is not None else self._execution_device)
        if latents is None:
            shape = self._latent_shape(data_type, batch_size, *self._resolve_size(height, width))
            latents = randn_tensor(shape, generator=as_generators(generator), device=device, dtype=self.unet.dtype)
        return latents.to(device=device, dtype=self.unet.dtype) * self.scheduler.init_noise_sigma

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (b, c, h, w) to pictures (b, 3, H, W) in [0, 1]."""
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
        """Latents (b, d) to texts.

        Args:
            generator: Draws the words; one for all texts or one each.
            temperature: Spread of the draws; 0 takes the most probable word each time.
            max_text_length: In tokens of the decoder, first and last included; by default 30, or as many as it has.
            merge_repeats: Leave one of several equal runs of words.
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

    def _text_tokens(self, texts: list[str], device: torch.device | str) -> Tensor:
        ids, cut = text_ids(self.tokenizer, self.text_encoder, texts)
        warn_of_cuts(self, cut, ids.shape[1])
        return text_context(self.text_encoder, ids.to(device))

    def _image_tokens(self, conditions: Conditions, device: torch.device | str) -> Tensor:
        """(samples * pictures, l, d), with mask and focus, without weights."""
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

    def _latent_shape(self, data_type: str, batch: int, height: int, width: int) -> tuple[int, ...]:
        channels = self.unet.config["data_types"][data_type]["channels"]
        if data_type == "text":
            return (batch, channels)
        return (batch, channels, height // self.vae_scale_factor, width // self.vae_scale_factor)

    def _resolve_size(self, height: Any, width: Any, latents: Any = None) -> tuple[Any, Any]:
        """Fills in the sizes that the caller left out; checks nothing."""
        rows, columns = sample_sides("default_sample_size", self.config["default_sample_size"])
        if isinstance(latents, Tensor) and latents.ndim == 4:
            rows, columns = latents.shape[2:]
        return (
            rows * self.vae_scale_factor if height is None else height,
            columns * self.vae_scale_factor if width is None else width,
        )
