"""A stand-in for the published repository of Versatile Diffusion in diffusers' format: any width, random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import UNetFlatConditionModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
)

from diffusers_ext.conversion.keys import build_empty, load_strict
from diffusers_ext.conversion.versatile import read_versatile_unet
from diffusers_ext.models.unet_versatile import VersatileUNet
from diffusers_ext.pipelines.versatile.denoising import versatile_scheduler
from diffusers_ext.pipelines.versatile.pipeline_versatile import VersatilePipeline

TEXT_WINDOW, VOCABULARY = 77, 49408  # CLIP's


def write_repository(
    folder: str, width: int, resolution: int, clip_layers: int, prompt: str
) -> PreTrainedTokenizerFast:
    """Writes it, proportioned like the released one, and returns its tokenizer.

    Args:
        width: of the U-Nets' first level; 320 in the released one, and all other widths follow.
        resolution: of the pictures in pixels.
        clip_layers: of the picture encoder; 24 there, and half as many of the text encoder.
        prompt: its words are the tokenizer's vocabulary.
    """
    torch.manual_seed(0)
    context = 12 * width // 5 // 16 * 16  # 768 of 320
    parts: dict[str, Any] = {
        **build_unets(width, context, resolution // 8),
        "vae": build_vae(max(32, 128 * width // 320)),
        **build_clip(context, clip_layers),
        "image_feature_extractor": CLIPImageProcessor(),
        "scheduler": versatile_scheduler(),
        "tokenizer": build_tokenizer(prompt),
    }
    index: dict[str, Any] = {"_class_name": "VersatileDiffusionPipeline"}
    for name, part in parts.items():
        part.save_pretrained(f"{folder}/{name}")
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    index["text_unet"] = ["diffusers", "ModelMixin"]  # passed in by hand: of the class itself no index can be written
    (Path(folder) / "model_index.json").write_text(json.dumps(index))
    return parts["tokenizer"]


def build_unets(width: int, context: int, sample_size: int) -> dict[str, Any]:
    """Both U-Nets of diffusers; the time embedding of the second is a copy of the first one's."""
    sizes: dict[str, Any] = {
        "block_out_channels": (width, 2 * width, 4 * width, 4 * width),
        "norm_num_groups": groups_of(width),
        "attention_head_dim": 8,
        "cross_attention_dim": context,
        "layers_per_block": 2,
    }
    image_unet = UNet2DConditionModel(
        sample_size=sample_size,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        **sizes,
    )
    text_unet = UNetFlatConditionModel(sample_size=sample_size, in_channels=context, out_channels=context, **sizes)
    text_unet.time_embedding.load_state_dict(image_unet.time_embedding.state_dict())
    return {"image_unet": image_unet, "text_unet": text_unet}


def groups_of(width: int) -> int:
    """Of the normalisations: 32 as released, or as many channels a group as there."""
    return 32 if width % 32 == 0 else max(1, width // 10)


def build_vae(width: int) -> AutoencoderKL:
    """kl-f8."""
    return AutoencoderKL(
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )


def build_clip(context: int, layers: int) -> dict[str, Any]:
    """Both towers, in ViT-L/14's proportions: 77 and 257 tokens."""
    text = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=context, intermediate_size=4 * context, projection_dim=context,
        num_hidden_layers=max(1, layers // 2), num_attention_heads=max(1, context // 64), bos_token_id=0,
        eos_token_id=1, pad_token_id=1, max_position_embeddings=TEXT_WINDOW,
    )  # fmt: skip
    wide = 4 * context // 3 // 16 * 16  # 1024 of 768
    vision = CLIPVisionConfig(
        hidden_size=wide, intermediate_size=4 * wide, projection_dim=context, num_hidden_layers=layers,
        num_attention_heads=max(1, wide // 64), image_size=224, patch_size=14,
    )  # fmt: skip
    return {
        "text_encoder": CLIPTextModelWithProjection(text).eval(),
        "image_encoder": CLIPVisionModelWithProjection(vision).eval(),
    }


def convert_repository(folder: str, width: int, tokenizer: PreTrainedTokenizerFast) -> VersatilePipeline:
    """Ours, by the shipped converter; other groups than the released 32 are no part of a checkpoint."""
    weights = {}
    for name in ("image_unet", "text_unet"):
        for key, value in load_file(f"{folder}/{name}/diffusion_pytorch_model.safetensors").items():
            weights[f"{name}.{key}"] = value
    config, renamed = read_versatile_unet(weights)
    return VersatilePipeline(
        unet=load_strict(build_empty(VersatileUNet, norm_num_groups=groups_of(width), **config), renamed),
        scheduler=versatile_scheduler(),
        vae=AutoencoderKL.from_pretrained(folder, subfolder="vae"),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder"),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(folder, subfolder="image_encoder"),
        feature_extractor=CLIPImageProcessor.from_pretrained(folder, subfolder="image_feature_extractor"),
        tokenizer=tokenizer,
    )


def build_tokenizer(prompt: str) -> PreTrainedTokenizerFast:
    """One token a word of the prompt."""
    words = ["<s>", "</s>", "<unk>", *sorted(set(prompt.split()))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=TEXT_WINDOW, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip
