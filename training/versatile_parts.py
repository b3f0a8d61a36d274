"""The frozen networks around Versatile Diffusion: loaded, or new and untrained to try the recipe out."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from diffusers_ext.conversion.optimus import SPECIAL_TOKENS
from diffusers_ext.models.autoencoder_optimus import AutoencoderOptimus
from diffusers_ext.pipelines.versatile.optimus_text import vocabulary_options
from diffusers_ext.training_utils.tokenizers import BERT_TOKENS, SMALLEST_VOCABULARY, train_bpe
from diffusers_ext.training_utils.weights import load_whole

if TYPE_CHECKING:
    from train_versatile import VersatileArgs

logger = logging.getLogger(__name__)

# The frozen components of the pipeline.
PARTS = {
    "vae": AutoencoderKL,
    "optimus": AutoencoderOptimus,
    "encoder_tokenizer": AutoTokenizer,
    "decoder_tokenizer": AutoTokenizer,
    "text_encoder": CLIPTextModelWithProjection,
    "tokenizer": AutoTokenizer,
    "image_encoder": CLIPVisionModelWithProjection,
    "feature_extractor": CLIPImageProcessor,
}
TOKENIZERS = ("encoder_tokenizer", "decoder_tokenizer")


def load_parts(args: "VersatileArgs") -> dict[str, Any]:
    """The frozen networks, tokenizers and the picture preparation, by the names of `PARTS`.

    Raises:
        ValueError: an option that names one is missing.
    """
    stage = args.pretrained_model_name_or_path
    places: dict[str, tuple[Any, str | None]] = {name: (stage, name) for name in PARTS}
    new = untrained_parts(args)
    for option, names in (
        ("vae", {"vae": None}),
        ("optimus", {"optimus": None} | {name: name for name in TOKENIZERS}),
        ("clip", dict.fromkeys(("text_encoder", "tokenizer", "image_encoder", "feature_extractor"))),
    ):  # fmt: skip
        source = getattr(args, f"pretrained_{option}_name_or_path")
        if source is None and stage is None and option not in new:
            recipe = {"vae": "train_autoencoder.py --model kl"}.get(option, f"train_{option}.py")
            raise ValueError(
                f"--pretrained_{option}_name_or_path is needed: train one with training/{recipe}, or go on from an "
                "earlier stage with --pretrained_model_name_or_path."
            )
        if source is not None:
            is_pipeline = option == "clip" and (Path(source) / "model_index.json").is_file()
            places |= {name: (source, name if is_pipeline else folder) for name, folder in names.items()}
    built: dict[str, Any] = {"vae": build_vae() if "vae" in new else None}
    if "optimus" in new:
        built |= build_optimus()
    if new:
        logger.warning("%s: built anew and never trained, good for trying the recipe out only", " and ".join(new))
    return {
        name: built[name] if built.get(name) is not None
        else load_whole(PARTS[name], source, **({} if folder is None else {"subfolder": folder}))
        for name, (source, folder) in places.items()
    }  # fmt: skip


def untrained_parts(args: "VersatileArgs") -> list[str]:
    """Those of `--untrained_parts` that are built because no option brings trained ones."""
    if args.pretrained_model_name_or_path:
        return []
    return [name for name in args.untrained_parts if getattr(args, f"pretrained_{name}_name_or_path") is None]


def build_vae() -> AutoencoderKL:
    """A tiny image autoencoder of factor 2 with random weights, the same every time: a run can be resumed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKL(
            block_out_channels=(8, 16),  # type: ignore[arg-type] # diffusers' hint is a tuple of one
            down_block_types=("DownEncoderBlock2D",) * 2,  # type: ignore[arg-type]
            up_block_types=("UpDecoderBlock2D",) * 2,  # type: ignore[arg-type]
            norm_num_groups=4,
            scaling_factor=1.0,
        )


def build_optimus() -> dict[str, Any]:
    """A tiny text autoencoder with random weights, and tokenizers that read and write single bytes."""
    tokenizers = [train_bpe([], SMALLEST_VOCABULARY, special) for special in (BERT_TOKENS, SPECIAL_TOKENS)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoencoderOptimus(
            latent_dim=16,
            encoder_hidden_size=16,
            encoder_intermediate_size=64,
            encoder_num_layers=1,
            encoder_num_attention_heads=2,
            encoder_max_length=79,
            decoder_hidden_size=16,
            decoder_num_layers=1,
            decoder_num_attention_heads=2,
            decoder_max_length=31,
            initializer_range=0.25,
            **vocabulary_options(*tokenizers),
        )
    return {"optimus": model, **dict(zip(TOKENIZERS, tokenizers, strict=True))}
