"""The kinds of original checkpoints: for each its converter, its options, and what is saved beside the model.

The command line makes a sub-parser of each kind. In Python, `KINDS["ldm"].convert(weights, release="celeba256")` does
what `diffusers-ext convert ldm` does before it saves. A converter is imported when it runs, so that the catalogue can
be listed without loading a network.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import adm_releases
from .ldm_releases import RELEASES, TASKS


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint.

    Args:
        help: what it is, in half a line.
        convert: takes the content of the file and the options by name. It returns (subfolder, part) of all that
            belongs into the new folder; the first is the model or pipeline itself, with the subfolder "".
        options: name of each option -> the keywords of `argparse`'s `add_argument`.
        hint: what to tell when nothing but the model is written.
    """

    help: str
    convert: Callable[..., list[tuple[str, Any]]]
    options: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    hint: str | None = None


def paella_unet(weights: Mapping[str, Any], **options: Any) -> list[tuple[str, Any]]:
    from .paella import convert_paella_unet

    return [("", convert_paella_unet(weights, **options))]


def paella_vqgan(weights: Mapping[str, Any], **options: Any) -> list[tuple[str, Any]]:
    from .paella import convert_paella_vqgan_gumbel

    return [("", convert_paella_vqgan_gumbel(weights, **options))]


def paella_vqgan_f4(weights: Mapping[str, Any]) -> list[tuple[str, Any]]:
    from .paella import convert_paella_vqgan

    return [("", convert_paella_vqgan(weights))]


def open_clip(weights: Mapping[str, Any], **options: Any) -> list[tuple[str, Any]]:
    from .open_clip import build_open_clip_processors, convert_open_clip

    model = convert_open_clip(weights, **options)
    return [("", part) for part in (model, *build_open_clip_processors(model))]


def adm(weights: Mapping[str, Any], **options: Any) -> list[tuple[str, Any]]:
    from .cascaded import convert_adm_pipeline

    return [("", convert_adm_pipeline(weights, **options))]


def glide(weights: Mapping[str, Any], **options: Any) -> list[tuple[str, Any]]:
    from .glide import convert_glide_pipeline

    return [("", convert_glide_pipeline(weights, **options))]


def piti(weights: Mapping[str, Any], **options: Any) -> list[tuple[str, Any]]:
    from .piti import convert_piti_pipeline

    return [("", convert_piti_pipeline(weights, **options))]


def ldm(weights: Mapping[str, Any], **options: Any) -> list[tuple[str, Any]]:
    from .ldm_pipeline import convert_ldm_pipeline

    return [("", convert_ldm_pipeline(weights, **options))]


def ldm_first_stage(weights: Mapping[str, Any], **options: Any) -> list[tuple[str, Any]]:
    from .ldm_pipeline import take_ldm_first_stage

    return [("", take_ldm_first_stage(weights, **options))]


def versatile_unet(weights: Mapping[str, Any], **options: Any) -> list[tuple[str, Any]]:
    from .versatile import convert_versatile_unet

    return [("", convert_versatile_unet(weights, **options))]


def versatile_start(weights: Mapping[str, Any], **options: Any) -> list[tuple[str, Any]]:
    from .versatile import convert_stable_diffusion_unet

    return [("", convert_stable_diffusion_unet(weights, **options))]


def optimus(
    weights: Mapping[str, Any],
    *,
    encoder_tokenizer: str | None = None,
    decoder_tokenizer: str | None = None,
    **options: Any,
) -> list[tuple[str, Any]]:
    from .optimus import build_optimus_tokenizers, convert_optimus

    if (encoder_tokenizer is None) != (decoder_tokenizer is None):
        raise ValueError("--encoder_tokenizer and --decoder_tokenizer go together: name both or none.")
    model = convert_optimus(weights, **options)
    if encoder_tokenizer is None or decoder_tokenizer is None:
        return [("", model)]
    encoder, decoder = build_optimus_tokenizers(
        model, encoder_name_or_path=encoder_tokenizer, decoder_name_or_path=decoder_tokenizer
    )
    return [("", model), ("encoder_tokenizer", encoder), ("decoder_tokenizer", decoder)]


_RESOLUTION = {"type": int, "help": "side of the training pictures, if not 256"}
_SCALE_FACTOR = {"type": float, "help": "what latents are multiplied by before diffusion, if the file does not tell"}
_USE_EMA = {
    "action": argparse.BooleanOptionalAction,
    "help": "averaged weights or not, instead of those if there are any",
}
_NUM_HEADS = {"type": int, "help": "heads of every attention, if not 8"}
_TWO_STAGES = {
    "num_heads": {
        "type": int,
        "nargs": "+",
        "metavar": "N",
        "help": "heads of the transformers of base and upsampler, if not their width / 64",
    },
    "num_head_channels": {
        "type": int,
        "nargs": "+",
        "metavar": "N",
        "help": "width of each head in the U-Nets of base and upsampler, if not 64",
    },
    "resolution": {
        "type": int,
        "nargs": "+",
        "metavar": "N",
        "help": "side of the images of base and upsampler, if not 64 256",
    },
}

KINDS = {
    "paella-unet": Kind(
        "the token predictor of Paella v1",
        paella_unet,
        {"time_embed_dim": {"type": int, "help": "the original's c_r, if it is not 64"}},
    ),
    "paella-vqgan": Kind(
        "the f8 Gumbel-VQGAN that Paella v1 works on",
        paella_vqgan,
        {"ignore": {"nargs": "+", "metavar": "KEYS", "help": "patterns of keys to leave out instead of 'loss.*'"}},
    ),
    "paella-vqgan-f4": Kind("the f4 tokenizer by Paella's authors", paella_vqgan_f4),
    "open-clip": Kind(
        "a CLIP of open_clip with a ViT, with tokenizer and picture preparation",
        open_clip,
        {
            "vision_heads": {"type": int, "help": "attention heads, if not told by the width"},
            "text_heads": {"type": int, "help": "attention heads, if not the width / 64"},
            "quick_gelu": {
                "action": "store_true",
                "default": None,
                "help": "for OpenAI's weights and open_clip's ...-quickgelu",
            },
        },
    ),
    "adm": Kind(
        "a U-Net or upsampler of ADM, which becomes a stage of a cascade",
        adm,
        {
            "release": {
                "choices": adm_releases.RELEASES,
                "metavar": "NAME",
                "help": f"a released file: {', '.join(adm_releases.RELEASES)}",
            },
            "resolution": {"type": int, "help": "side of the images in pixels, of a model that is not released"},
            "small_resolution": {"type": int, "help": "side of an upsampler's input; without it the model is none"},
            "num_heads": {"type": int, "help": "number of attention heads in the model's flags; or ..."},
            "num_head_channels": {"type": int, "help": "... the width of each head, whichever the flags set"},
            "attention_order": {
                "choices": adm_releases.ATTENTION_ORDERS,
                "help": "new for models with use_new_attention_order, otherwise legacy",
            },
            "beta_schedule": {"choices": adm_releases.BETA_SCHEDULES, "help": "of the training, if not linear"},
            "num_train_timesteps": {"type": int, "help": "of the training, if not 1000"},
            "timestep_respacing": {"help": "steps to sample with, if not 250"},
        },
    ),
    "glide": Kind(
        "a base model of GLIDE with or without its upsampler, also for inpainting, which become a pipeline",
        glide,
        {
            "upsampler": {"metavar": "FILE", "help": "upsample.pt, or upsample_inpaint.pt beside base_inpaint.pt"},
            "tokenizer": {"help": "folder or name of GPT-2's tokenizer, if not gpt2"},
            **_TWO_STAGES,
        },
    ),
    "piti": Kind(
        "a base model of PITI with or without its upsampler, or a first-stage encoder, which become a pipeline",
        piti,
        {
            "upsampler": {"metavar": "FILE", "help": "upsample_mask.pt or upsample_edge.pt"},
            "decoder": {"metavar": "FILE", "help": "OpenAI's base.pt of GLIDE, beside an encoder alone"},
            "condition_type": {
                "choices": ("label_map", "sketch", "geometry"),
                "help": "what the model draws from; its channels tell, this checks it",
            },
            "guidance": {
                "choices": ("normalized", "plain"),
                "help": "the paper's, the default, or that of the released code",
            },
            **_TWO_STAGES,
        },
    ),
    "ldm": Kind(
        "a whole latent-diffusion model, which becomes a pipeline",
        ldm,
        {
            "release": {"choices": RELEASES, "metavar": "NAME", "help": f"a released model: {', '.join(RELEASES)}"},
            "task": {"choices": TASKS, "help": "what a model that is not released was trained for"},
            "num_heads": {"type": int, "help": "number of attention heads in the U-Net's config; or ..."},
            "num_head_channels": {"type": int, "help": "... the width of each head, whichever the config sets"},
            "resolution": _RESOLUTION,
            "scale_factor": _SCALE_FACTOR,
            "null_class": {"type": int, "help": "class models: the class that stands for none, if there is one"},
            "num_classes": {"type": int, "help": "layout models: number of categories"},
            "tokenizer": {"help": "text models: folder or name of the tokenizer, if not bert-base-uncased"},
            "use_ema": _USE_EMA,
        },
    ),
    "ldm-first-stage": Kind(
        "an autoencoder of latent diffusion, alone or out of a whole model",
        ldm_first_stage,
        {"resolution": _RESOLUTION, "scale_factor": _SCALE_FACTOR, "use_ema": _USE_EMA},
    ),
    "versatile-unet": Kind(
        "the U-Net of Versatile Diffusion",
        versatile_unet,
        {
            "num_heads": _NUM_HEADS,
            "attention_levels": {
                "nargs": "+",
                "type": int,
                "choices": (0, 1),
                "help": "for each level, finest first, whether it has context layers, if not 1 1 ... 0",
            },
        },
    ),
    "versatile-start": Kind(
        "Stable Diffusion 1.x as the start of a Versatile Diffusion",
        versatile_start,
        {
            "num_heads": _NUM_HEADS,
            "context_type": {"choices": ("image", "text"), "help": "what its attention will read, if not image"},
        },
    ),
    "optimus": Kind(
        "the text autoencoder of Versatile Diffusion, or Optimus itself",
        optimus,
        {
            "encoder_heads": {"type": int, "help": "attention heads of BERT, if not its width / 64"},
            "decoder_heads": {"type": int, "help": "attention heads of GPT-2, if not its width / 64"},
            "encoder_tokenizer": {"help": "folder or name of BERT's tokenizer, to be written too"},
            "decoder_tokenizer": {"help": "folder or name of GPT-2's tokenizer, to be written too"},
        },
        hint="No tokenizers are written: trainings ask for both, --encoder_tokenizer and --decoder_tokenizer.",
    ),
}
