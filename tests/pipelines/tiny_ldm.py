"""Tiny real components of latent diffusion, random weights from a seed, for the tests of everything that samples.

The first stage has factor 4, its latents 3 channels; U-Nets have two levels: sides are multiples of 8 pixels, and 16 x
16 pixels are 4 x 4 latents.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from PIL import Image
from pipelines.tiny_paella import quiet, tiny_tokenizer

import diffusers_ext
from diffusers_ext.models.encoders_ldm import LDMClassEmbedder, LDMLayoutEncoder, LDMSpatialRescaler
from diffusers_ext.models.unet_ldm import LDMUNet
from diffusers_ext.schedulers.gaussian import ldm_scheduler

CONTEXT_DIM = 16
CLASSES = ["circle", "square", "star"]
LABELS = ["ground", "circle", "square", "star"]
PALETTE = [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]]
TASKS = ("unconditional", "class", "text", "layout", "semantic", "upscale", "inpaint")


def tiny_first_stage(kind: str = "kl", **changes: Any) -> AutoencoderKL | VQModel:
    common = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 3,
        "sample_size": 16,
    }
    if kind == "kl":
        return AutoencoderKL(**common | {"scaling_factor": 0.5} | changes).eval()
    vqvae = VQModel(**common | {"num_vq_embeddings": 32, "scaling_factor": 1.0} | changes)
    torch.nn.init.normal_(vqvae.quantize.embedding.weight)  # stock codes are tiny: all latents would decode alike
    return vqvae.eval()


def tiny_unet(in_channels: int = 3, *, context: bool = False, heads: int | None = None) -> Any:
    """Random, but with a prediction near the noise's size, so that samples stay of the order of 1."""
    common = {
        "sample_size": 4,
        "in_channels": in_channels,
        "out_channels": 3,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    if context:
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=CONTEXT_DIM,
            attention_head_dim=2,
            **common,
        )
    else:
        cls, attention = (
            (UNet2DModel, {"attention_head_dim": 8}) if heads is None else (LDMUNet, {"num_attention_heads": heads})
        )
        unet = cls(
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            **attention,
            **common,
        )
    return unet.eval()


def tiny_bert(tokenizer: Any) -> LDMBertModel:
    config = LDMBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        encoder_layers=1,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=CONTEXT_DIM,
        dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    bert = LDMBertModel(config).eval()
    torch.nn.init.normal_(bert.model.embed_tokens.weight)  # else texts hardly differ
    return bert


def tiny_ldm_components(task: str, seed: int = 0, first_stage: str = "kl") -> dict[str, Any]:
    """Everything that the task's pipeline takes; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        concat = {"semantic": 3, "upscale": 3, "inpaint": 4}.get(task, 0)
        components = {
            "vqvae": tiny_first_stage(first_stage),
            "unet": tiny_unet(3 + concat, context=task in ("class", "text", "layout")),
            "scheduler": ldm_scheduler(),
        }
        if task == "class":
            embedder = LDMClassEmbedder(len(CLASSES) + 1, CONTEXT_DIM, null_class=len(CLASSES))
            components |= {"class_embedder": embedder.eval(), "class_names": CLASSES}
        elif task == "text":
            tokenizer = tiny_tokenizer()
            components |= {"tokenizer": tokenizer, "bert": tiny_bert(tokenizer)}
        elif task == "layout":
            encoder = LDMLayoutEncoder(
                vocab_size=128,
                max_length=14,
                hidden_size=CONTEXT_DIM,
                num_layers=1,
                num_attention_heads=2,
                attention_head_dim=8,
            )
            torch.nn.init.normal_(encoder.token_embedding.weight)
            components |= {
                "layout_encoder": encoder.eval(),
                "class_names": CLASSES,
                "max_objects": 4,
                "null_condition": True,
            }
        elif task == "semantic":
            components |= {
                "spatial_rescaler": LDMSpatialRescaler(len(LABELS), 3).eval(),
                "label_names": LABELS,
                "label_palette": PALETTE,
                "null_condition": True,
            }
        elif task in ("upscale", "inpaint"):
            components |= {"null_condition": True}
        return components


def pipeline_class(task: str) -> type:
    name = {"class": "ClassConditional"}.get(task, task.capitalize())
    return getattr(diffusers_ext, f"LDM{name}Pipeline")


def tiny_ldm(task: str, seed: int = 0, first_stage: str = "kl", **changes: Any) -> Any:
    """The task's pipeline, without progress bars."""
    return quiet(pipeline_class(task)(**tiny_ldm_components(task, seed, first_stage) | changes))


def tiny_picture(seed: int = 0, height: int = 16, width: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def tiny_mask(height: int = 16, width: int = 16) -> Image.Image:
    """White (to draw) in the right half."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[:, width // 2 :] = 255
    return Image.fromarray(mask)


def tiny_labels(seed: int = 0, height: int = 16, width: int = 16) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(0, len(LABELS), (height // 4, width // 4))
    return blocks.repeat(4, axis=0).repeat(4, axis=1)


def tiny_inputs(task: str, height: int = 16, width: int = 16) -> dict[str, Any]:
    """What a call of the task's pipeline needs for one picture of that size."""
    size = {"height": height, "width": width}
    return {
        "unconditional": lambda: size,
        "class": lambda: {"class_labels": "star", **size},
        "text": lambda: {"prompt": "a red circle", **size},
        "layout": lambda: {"boxes": [(0.1, 0.2, 0.5, 0.9), (0.6, 0.0, 1.0, 0.4)], "names": ["circle", "star"], **size},
        "semantic": lambda: {"label_map": tiny_labels(0, height, width)},
        "upscale": lambda: {"image": tiny_picture(0, height // 4, width // 4)},
        "inpaint": lambda: {"image": tiny_picture(0, height, width), "mask_image": tiny_mask(height, width)},
    }[task]()


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def count_runs(pipe: Any) -> list[str]:
    """A list that grows by a name whenever a component computes."""
    runs: list[str] = []
    watched: dict[str, Any] = {"unet": pipe.unet, "encoder": pipe.vqvae.encoder, "decoder": pipe.vqvae.decoder}
    for name in ("bert", "class_embedder", "layout_encoder", "spatial_rescaler"):
        if hasattr(pipe, name):
            watched[name] = getattr(pipe, name)
    for name, module in watched.items():
        module.register_forward_pre_hook(_recorder(runs, name))
    return runs


def _recorder(runs: list[str], name: str) -> Callable[..., None]:
    def record(*_: Any) -> None:
        runs.append(name)

    return record
