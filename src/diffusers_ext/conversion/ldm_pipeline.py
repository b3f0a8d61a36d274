"""A latent-diffusion checkpoint with all its parts as a pipeline.

Rombach et al., arXiv 2112.10752; CompVis/latent-diffusion@a506df5 (code and weights MIT). `convert_ldm_pipeline` takes
a checkpoint apart, converts the parts (`ldm.py`, `ldm_unet.py`, `ldm_autoencoder.py`, `ldm_encoders.py`) and makes the
pipeline of their task. What the weights do not tell is in `ldm_releases.py`.
"""

from collections.abc import Mapping
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..pipelines.ldm.base import LDMBasePipeline
from ..pipelines.ldm.first_stage import first_stage_factor
from ..pipelines.ldm.pipeline_ldm_class import LDMClassConditionalPipeline
from ..pipelines.ldm.pipeline_ldm_inpaint import LDMInpaintPipeline
from ..pipelines.ldm.pipeline_ldm_layout import LDMLayoutPipeline
from ..pipelines.ldm.pipeline_ldm_semantic import LDMSemanticPipeline
from ..pipelines.ldm.pipeline_ldm_text import LDMTextPipeline
from ..pipelines.ldm.pipeline_ldm_unconditional import LDMUnconditionalPipeline
from ..pipelines.ldm.pipeline_ldm_upscale import LDMUpscalePipeline
from .ldm import convert_ldm_schedule, split_ldm_checkpoint
from .ldm_autoencoder import convert_ldm_first_stage
from .ldm_encoders import convert_ldm_conditioner
from .ldm_releases import LDMSettings, ldm_settings
from .ldm_unet import convert_ldm_unet

BERT_TOKENIZER = "bert-base-uncased"  # of all text models

# task -> its pipeline, and the name there of what encodes the condition
LDM_TASKS: dict[str, tuple[type[LDMBasePipeline], str | None]] = {
    "unconditional": (LDMUnconditionalPipeline, None),
    "class": (LDMClassConditionalPipeline, "class_embedder"),
    "text": (LDMTextPipeline, "bert"),
    "layout": (LDMLayoutPipeline, "layout_encoder"),
    "semantic": (LDMSemanticPipeline, "spatial_rescaler"),
    "super_resolution": (LDMUpscalePipeline, None),
    "inpainting": (LDMInpaintPipeline, None),
}


def convert_ldm_pipeline(
    state_dict: Mapping[str, Any],
    task: str | None = None,
    *,
    release: str | None = None,
    tokenizer: str | None = None,
    use_ema: bool | None = None,
    **settings: Any,
) -> LDMBasePipeline:
    """Converts a latent-diffusion checkpoint with all its parts to the pipeline of its task.

    Args:
        state_dict: original weights, flat or under `"state_dict"`.
        task, release, settings: see `ldm_settings`. A measured scale in the file counts more than the release's.
        tokenizer: of a text model, a folder or a name on the Hub.
        use_ema: see `split_ldm_checkpoint`.

    Raises:
        ValueError: for settings or a checkpoint that do not fit, listing the keys.
    """
    model = ldm_settings(task, release, **settings)
    if tokenizer is not None and model.task != "text":
        raise ValueError(f"`tokenizer` is {tokenizer!r}, but only models for 'text' have one, not {model.task!r}.")
    words = load_bert_tokenizer(tokenizer) if model.task == "text" else None  # first, as it may be missing
    parts = split_ldm_checkpoint(state_dict, use_ema=use_ema)
    given = (settings.get("scale_factor"), parts.scale_factor, model.scale_factor, 1.0)
    vqvae = convert_ldm_first_stage(
        parts.first_stage,
        scale_factor=next(scale for scale in given if scale is not None),
        sample_size=model.resolution,
    )
    side = latent_side(model, vqvae)
    return assemble_ldm_pipeline(
        model,
        vqvae=vqvae,
        unet=convert_ldm_unet(
            parts.unet, num_heads=model.num_heads, num_head_channels=model.num_head_channels, sample_size=side
        ),
        scheduler=convert_ldm_schedule(parts.betas, model.betas),
        conditioner=convert_ldm_conditioner(
            parts.cond_stage,
            model.task,
            null_class=model.null_class,
            num_stages=(model.resolution // side).bit_length() - 1,
            first_stage=parts.first_stage,
        ),
        tokenizer=words,
    )


def take_ldm_first_stage(
    state_dict: Mapping[str, Any],
    *,
    resolution: int = 256,
    scale_factor: float | None = None,
    use_ema: bool | None = None,
) -> AutoencoderKL | VQModel:
    """Converts the first stage of a latent-diffusion checkpoint, or one alone.

    Args:
        state_dict: original weights, flat or under `"state_dict"`.
        resolution: side of the training pictures in pixels, a note in the config.
        scale_factor: by which latents are multiplied before diffusion; the measured one of the file when None, or 1.
        use_ema: see `split_ldm_checkpoint`.

    Raises:
        ValueError: listing keys that are unknown, missing, misshaped or not finite.
    """
    parts = split_ldm_checkpoint(state_dict, use_ema=use_ema)
    measured = 1.0 if parts.scale_factor is None else parts.scale_factor
    scale = measured if scale_factor is None else scale_factor
    return convert_ldm_first_stage(parts.first_stage, scale_factor=scale, sample_size=resolution)


def latent_side(settings: LDMSettings, vqvae: Any) -> int:
    """Side of the training pictures' latents.

    Raises:
        ValueError: if the pictures' is no multiple of the first stage's factor.
    """
    factor = first_stage_factor(vqvae)
    if settings.resolution % factor:
        raise ValueError(
            f"`resolution` is {settings.resolution}: it must be a multiple of {factor}, the first stage's factor."
        )
    return settings.resolution // factor


def assemble_ldm_pipeline(
    settings: LDMSettings, *, conditioner: Any = None, tokenizer: PreTrainedTokenizerBase | None = None, **parts: Any
) -> LDMBasePipeline:
    """The pipeline of converted parts.

    Args:
        settings: of the model.
        conditioner: what encodes the condition, for class, text, layout and semantic models.
        tokenizer: of a text model.
        parts: `vqvae`, `unet` and `scheduler`.

    Raises:
        ValueError: for a layout model without `num_classes`, or a tokenizer with more tokens than the text encoder.
    """
    pipeline, name = LDM_TASKS[settings.task]
    if name is not None:
        parts[name] = conditioner
    options = dict(settings.options)
    if settings.task == "text":
        own, wanted = len(tokenizer or ()), conditioner.config.vocab_size
        if not 0 < own <= wanted:
            raise ValueError(
                f"`tokenizer` knows {own} tokens, the text encoder {wanted}: pass the one that it was trained with; "
                f"that of the released models is {BERT_TOKENIZER}."
            )
        parts["tokenizer"] = tokenizer
    if settings.task == "layout":
        if settings.num_classes is None:
            raise ValueError("`num_classes` is None: a layout model needs the number of its categories.")
        length = conditioner.config["max_length"]  # three tokens an object, two of the crop
        formats = {"max_objects": length // 3, "encode_crop": length % 3 == 2, "num_classes": settings.num_classes}
        options = {**formats, **options}
    return pipeline(**parts, **options)


def load_bert_tokenizer(tokenizer: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a text model, from a folder or the Hub; that of the released models by default.

    Raises:
        ValueError: if it is not there.
    """
    place = tokenizer or BERT_TOKENIZER
    try:
        return AutoTokenizer.from_pretrained(place)
    except OSError as error:
        raise ValueError(
            f"`tokenizer` is {place!r}: there is no such folder, and the Hub has it not or is out of reach. Pass a "
            f"folder with the files of {BERT_TOKENIZER}."
        ) from error
