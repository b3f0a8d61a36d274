"""The network that is trained, and the frozen ones around it: loaded, or new and untrained to try the recipe out."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from diffusers_ext.conversion.open_clip import load_open_clip
from diffusers_ext.conversion.optimus import SPECIAL_TOKENS
from diffusers_ext.models.autoencoder_optimus import AutoencoderOptimus
from diffusers_ext.models.unet_versatile import VersatileUNet
from diffusers_ext.pipelines.versatile.optimus_text import vocabulary_options
from diffusers_ext.training.versatile.args import VersatileArgs, parts_of
from diffusers_ext.training_utils.clip import load_clip
from diffusers_ext.training_utils.lora import add_lora
from diffusers_ext.training_utils.tokenizers import BERT_TOKENS, SMALLEST_VOCABULARY, train_bpe
from diffusers_ext.training_utils.weights import load_whole

logger = logging.getLogger(__name__)

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")  # what LoRA changes of a context layer

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


def load_parts(args: VersatileArgs) -> dict[str, Any]:
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
        ("clip", {}),
    ):  # fmt: skip
        source = getattr(args, f"pretrained_{option}_name_or_path")
        if source is None and stage is None and option not in new:
            recipe = {"vae": "train_autoencoder.py --model kl"}.get(option, f"train_{option}.py")
            raise ValueError(
                f"--pretrained_{option}_name_or_path is needed: train one with training/{recipe}, or go on from an "
                "earlier stage with --pretrained_model_name_or_path."
            )
        if source is not None:
            places |= {name: (source, folder) for name, folder in names.items()}
    built: dict[str, Any] = {"vae": build_vae() if "vae" in new else None}
    if args.pretrained_clip_name_or_path is not None:
        built |= load_clip(args.pretrained_clip_name_or_path, load_open_clip)
    if "optimus" in new:
        built |= build_optimus()
    if new:
        logger.warning("%s: built anew and never trained, good for trying the recipe out only", " and ".join(new))
    return {
        name: built[name] if built.get(name) is not None
        else load_whole(PARTS[name], source, **({} if folder is None else {"subfolder": folder}))
        for name, (source, folder) in places.items()
    }  # fmt: skip


def untrained_parts(args: VersatileArgs) -> list[str]:
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


def build_unet(
    args: VersatileArgs, *, image_channels: int = 4, text_channels: int = 768, context_dim: int = 768
) -> VersatileUNet:
    """A new network of the flows that are trained; the defaults are the paper's autoencoders and CLIP."""
    attends = [level in args.attention_levels for level in range(len(args.block_out_channels))]
    return VersatileUNet(
        data_types={
            "image": {"kind": "map", "channels": image_channels},
            "text": {"kind": "vector", "channels": text_channels, "positions": args.text_positions},
        },
        context_types={"image": context_dim, "text": context_dim},
        block_out_channels=tuple(args.block_out_channels),
        layers_per_block=args.layers_per_block,
        attention_levels=tuple(attends) if args.attention_levels else None,
        num_attention_heads=args.num_attention_heads,
        norm_num_groups=args.norm_num_groups,
        dropout=args.dropout,
        flows=args.flows,
    )


def load_unet(args: VersatileArgs, parts: Mapping[str, Any]) -> VersatileUNet:
    """The network with the layers of all flows that are trained; what it has already goes on from where it was.

    Raises:
        ValueError: its latents or contexts are not those of the frozen networks, or it lacks flows that LoRA alone
            could not train.
    """
    sizes = {
        "image_channels": parts["vae"].config.latent_channels,
        "text_channels": parts["optimus"].config.latent_dim,
        "context_dim": parts["text_encoder"].config.projection_dim,
    }
    if args.pretrained_model_name_or_path:
        unet = load_whole(VersatileUNet, args.pretrained_model_name_or_path, subfolder="unet")
    elif args.pretrained_unet_name_or_path:
        unet = load_whole(VersatileUNet, args.pretrained_unet_name_or_path)
    else:
        return build_unet(args, **sizes)
    config = unet.config
    found = {
        "image_channels": config["data_types"]["image"]["channels"],
        "text_channels": config["data_types"]["text"]["channels"],
        "context_dim": config["context_types"]["text"],
    }
    if found != sizes:
        raise ValueError(f"The network was made for {found}, but the autoencoders and CLIP give {sizes}.")
    missing = [flow for flow in args.flows if flow not in unet.flows]
    if missing and args.rank:
        raise ValueError(
            f"--flows is {' '.join(args.flows)}, but the network has no layers for {', '.join(missing)}, and --rank "
            f"{args.rank} trains none: its flows are {', '.join(unet.flows)}. Train the others without --rank first."
        )
    if missing:
        unet.add_flows(missing, contexts_like=args.contexts_like)
    return unet


def vae_factor(parts: Mapping[str, Any]) -> int:
    """Pixels a side that one latent stands for."""
    return 2 ** (len(parts["vae"].config.block_out_channels) - 1)


def check_resolution(resolution: int, flows: Sequence[str], unet: VersatileUNet, parts: Mapping[str, Any]) -> None:
    """Pictures that are made must have latents that the network can halve at each of its levels.

    Raises:
        ValueError: they do not; names the sizes next to it that do.
    """
    multiple = vae_factor(parts) * unet.downsample_factor
    if resolution % multiple == 0 or all(parts_of(flow)[1] != "image" for flow in flows):
        return
    below = resolution // multiple * multiple
    nearest = " or ".join(str(size) for size in (below, below + multiple) if size)
    raise ValueError(
        f"--resolution is {resolution}; flows that make images need a multiple of {multiple} ({vae_factor(parts)} of "
        f"the autoencoder times {unet.downsample_factor} of the U-Net): pass {nearest}."
    )


def freeze_unused(unet: VersatileUNet, flows: Sequence[str]) -> None:
    """Layer groups that no trained flow uses keep their weights."""
    used = {"global"}
    for flow in flows:
        context_type, data_type = parts_of(flow)
        used |= {f"data.{data_type}", f"context.{context_type}"}
    for name, layers in unet.layer_groups().items():
        layers.requires_grad_(name in used)


def add_context_lora(unet: VersatileUNet, flows: Sequence[str], rank: int) -> None:
    """Freezes the network and puts matrices of this rank beside the attention projections of the flows' contexts."""
    contexts = tuple({f"context_layers.{parts_of(flow)[0]}." for flow in flows})
    names = [name for name, _ in unet.named_modules() if name.startswith(contexts) and name.endswith(ATTENTION)]
    add_lora(unet, rank, names)


def learning_rate_groups(
    unet: VersatileUNet, learning_rate: float, scales: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: the layer groups of the network, each with its own multiple of the learning rate.

    What is frozen is left out.

    The paper scales gradients by layer group. AdamW divides gradients by their size, so that this would change next to
    nothing; the released code scales learning rates, and so does this.

    Raises:
        ValueError: for a group that the network does not have, or a negative scale.
    """
    groups = unet.layer_groups()
    unknown = [name for name in scales if name not in groups]
    if unknown or any(scale < 0 for scale in scales.values()):
        raise ValueError(
            f"--lr_scales is {dict(scales)}: the layer groups of this network are {', '.join(groups)}, and a scale is "
            ">= 0."
        )
    trained = {name: [p for p in layers.parameters() if p.requires_grad] for name, layers in groups.items()}
    return [
        {"params": params, "lr": learning_rate * scales.get(name, 1.0)} for name, params in trained.items() if params
    ]
