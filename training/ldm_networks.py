"""The networks of train_ldm.py: the U-Net, what encodes the condition, and the pipeline around them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from ldm_args import CONTEXT_TASKS, LDMArgs
from ldm_data import LAYOUT_FLAGS, Names, SampleFormat
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from diffusers_ext.models.encoders_ldm import LDMClassEmbedder, LDMLayoutEncoder, LDMSpatialRescaler
from diffusers_ext.models.unet_ldm import LDMUNet
from diffusers_ext.pipelines.ldm.base import LDMBasePipeline
from diffusers_ext.pipelines.ldm.first_stage import FirstStage, first_stage_channels, first_stage_factor
from diffusers_ext.pipelines.ldm.pipeline_ldm_class import LDMClassConditionalPipeline
from diffusers_ext.pipelines.ldm.pipeline_ldm_inpaint import LDMInpaintPipeline
from diffusers_ext.pipelines.ldm.pipeline_ldm_layout import LDMLayoutPipeline
from diffusers_ext.pipelines.ldm.pipeline_ldm_semantic import LDMSemanticPipeline
from diffusers_ext.pipelines.ldm.pipeline_ldm_text import LDMTextPipeline
from diffusers_ext.pipelines.ldm.pipeline_ldm_unconditional import LDMUnconditionalPipeline
from diffusers_ext.pipelines.ldm.pipeline_ldm_upscale import LDMUpscalePipeline
from diffusers_ext.schedulers.gaussian import ldm_scheduler
from diffusers_ext.training_utils.args import TrainArgs
from diffusers_ext.training_utils.record import learn_once
from diffusers_ext.training_utils.tokenizers import train_clip_tokenizer
from diffusers_ext.training_utils.weights import load_whole, load_whole_pipeline

BERT_VOCABULARY = 30522  # of bert-base-uncased
PAPER_CHANNELS = 3  # of the latents of kl-f4 and vq-f4


@dataclass(frozen=True)
class Kind:
    """A task's pipeline.

    Args:
        pipeline: its class.
        conditioner: the component that is trained along with the U-Net.
        stock: the class of diffusers whose repositories the pipeline also loads.
    """

    pipeline: type[LDMBasePipeline]
    conditioner: str | None = None
    stock: str | None = None


KINDS = {
    "unconditional": Kind(LDMUnconditionalPipeline, stock="LDMPipeline"),
    "class": Kind(LDMClassConditionalPipeline, "class_embedder"),
    "text": Kind(LDMTextPipeline, "bert", stock="LDMTextToImagePipeline"),
    "layout": Kind(LDMLayoutPipeline, "layout_encoder"),
    "semantic": Kind(LDMSemanticPipeline, "spatial_rescaler"),
    "super_resolution": Kind(LDMUpscalePipeline, stock="LDMSuperResolutionPipeline"),
    "inpainting": Kind(LDMInpaintPipeline),
}


def build_unet(
    args: LDMArgs, *, latent_channels: int | None = None, sample_size: int | None = None
) -> UNet2DModel | UNet2DConditionModel:
    """A new denoising network.

    Args:
        latent_channels: of the first stage; by default `--latent_channels`, or 3 as in the paper's f4 models.
        sample_size: side of the latents, a note in the config.
    """
    channels = latent_channels or args.latent_channels or PAPER_CHANNELS
    concatenated = {"semantic": args.rescaler_channels, "super_resolution": 3, "inpainting": channels + 1}
    widths = args.block_out_channels
    attends = [level in args.attention_levels for level in range(len(widths))]
    config: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": channels + concatenated.get(args.task, 0),
        "out_channels": channels,
        "block_out_channels": tuple(widths),
        "layers_per_block": args.layers_per_block,
        "dropout": args.dropout,
        "norm_num_groups": args.norm_num_groups,
        "resnet_time_scale_shift": args.resnet_time_scale_shift,
    }
    head_dim = args.attention_head_dim or (None if args.num_attention_heads else 32)
    if args.task in CONTEXT_TASKS:
        return UNet2DConditionModel(
            **config,
            down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
            # a misnomer: this class takes the number of heads
            attention_head_dim=tuple(args.num_attention_heads or max(1, width // head_dim) for width in widths),
            cross_attention_dim=args.cross_attention_dim,
            transformer_layers_per_block=args.transformer_layers_per_block,
        )
    resampling = "Resnet{}sampleBlock2D" if args.resnet_updown else "{}Block2D"
    config |= {
        "down_block_types": tuple("AttnDownBlock2D" if a else resampling.format("Down") for a in attends),
        "up_block_types": tuple("AttnUpBlock2D" if a else resampling.format("Up") for a in attends[::-1]),
        "downsample_type": "resnet" if args.resnet_updown else "conv",
        "upsample_type": "resnet" if args.resnet_updown else "conv",
        "attn_norm_num_groups": args.norm_num_groups,  # else scale_shift drops the middle's normalisation
    }
    if args.num_attention_heads:
        return LDMUNet(num_attention_heads=args.num_attention_heads, **config)
    return UNet2DModel(attention_head_dim=head_dim, **config)


def build_conditioner(
    args: LDMArgs, *, num_labels: int | None = None, vocab_size: int = BERT_VOCABULARY, num_stages: int = 2
) -> nn.Module | None:
    """What encodes the condition, trained along with the U-Net; None where nothing has to.

    Args:
        num_labels: classes (the null class not counted), or labels of maps; `--num_labels` by default.
        vocab_size: of the tokenizer.
        num_stages: how often a label map is halved, until it has the size of the latents.
    """
    count, width = num_labels or args.num_labels, args.cross_attention_dim
    if args.task == "class":
        assert count is not None
        null = count if args.dropout_of_condition else None  # one more row
        return LDMClassEmbedder(count + (null is not None), width, null_class=null)
    if args.task == "text":
        config = LDMBertConfig(
            vocab_size=vocab_size, max_position_embeddings=args.text_max_length, encoder_layers=args.encoder_layers,
            encoder_ffn_dim=4 * width, encoder_attention_heads=args.encoder_attention_heads,
            head_dim=args.encoder_head_dim, d_model=width, dropout=0.0,
        )  # fmt: skip
        bert = LDMBertModel(config)
        # Rows of std 0.02, its own start, are small beside the first attention's output: with them the encoder had not
        # learnt to tell colours apart after 6000 steps of ldm-scenes-64-text, with 1 it has after a few hundred
        nn.init.normal_(bert.model.embed_tokens.weight, std=args.token_init_std)
        nn.init.normal_(bert.model.embed_positions.weight, std=min(args.token_init_std, 0.5))
        return bert
    if args.task == "layout":
        encoder = LDMLayoutEncoder(
            args.layout_vocab_size, 3 * args.max_objects + 2, width, args.encoder_layers,
            args.encoder_attention_heads, args.encoder_head_dim,
        )  # fmt: skip
        with torch.no_grad():  # both tables are drawn with a standard deviation of 1
            encoder.token_embedding.weight.mul_(args.token_init_std)
            encoder.position_embedding.weight.mul_(args.token_init_std)
        return encoder
    if args.task == "semantic":
        assert count is not None
        return LDMSpatialRescaler(count, args.rescaler_channels, num_stages)
    return None


def load_first_stage(args: LDMArgs) -> FirstStage:
    """The first stage that the options name.

    Raises:
        ValueError: none is named, it is of another kind, or its latents have other channels than `--latent_channels`.
    """
    name = args.pretrained_vqvae_name_or_path
    if name is None:
        raise ValueError(
            "--pretrained_vqvae_name_or_path is needed: train a first stage with training/train_autoencoder.py "
            "(--model kl or vq), or name one on the Hub."
        )
    kinds = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}
    found = VQModel.load_config(name, subfolder=args.vqvae_subfolder)["_class_name"]
    if found not in kinds:
        raise ValueError(f"{name!r} holds a {found}: a first stage is one of {', '.join(kinds)}.")
    vqvae = load_whole(kinds[found], name, subfolder=args.vqvae_subfolder)
    channels = first_stage_channels(vqvae)
    if args.latent_channels not in (None, channels):
        raise ValueError(
            f"--latent_channels={args.latent_channels}, but the latents of the first stage {name!r} have {channels}."
        )
    return vqvae


def build_pipeline(
    args: LDMArgs, resolution: int, names: Names | None = None, captions: Sequence[str] = (),
    train: TrainArgs | None = None,
) -> LDMBasePipeline:  # fmt: skip
    """The pipeline that is trained: the pretrained one, or new networks around a first stage.

    Args:
        resolution: side of the pictures.
        names: classes of the task's data.
        captions: from which a tokenizer is learnt, unless one is named.
        train: says whether a run is resumed, whose tokenizer was learnt already.

    Raises:
        ValueError: a part is missing or does not fit; see also `load_first_stage`.
    """
    if args.pretrained_model_name_or_path:
        pipe = load_pipeline(args, names)
    else:
        pipe = new_pipeline(args, resolution, names, captions, train or TrainArgs())
    multiple = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config["block_out_channels"]) - 1)
    if resolution % multiple:
        nearest = max(multiple, round(resolution / multiple) * multiple)
        raise ValueError(
            f"--resolution={resolution} is no multiple of {multiple} (first stage {pipe.vae_scale_factor} x U-Net "
            f"{multiple // pipe.vae_scale_factor}); the nearest is {nearest}."
        )
    return pipe


def new_pipeline(
    args: LDMArgs, resolution: int, names: Names | None, captions: Sequence[str], train: TrainArgs
) -> LDMBasePipeline:
    vqvae, kind = load_first_stage(args), KINDS[args.task]
    factor = first_stage_factor(vqvae)
    side = resolution // factor
    parts: dict[str, Any] = {
        "vqvae": vqvae,
        "unet": build_unet(args, latent_channels=first_stage_channels(vqvae), sample_size=side),
        "scheduler": ldm_scheduler(args.beta_start, args.beta_end, num_train_timesteps=args.num_train_timesteps),
        "latent_scale": 1.0 if args.scale_by_std else args.latent_scale,  # 1 until it is measured
    }
    vocabulary = {}
    if args.task == "text":
        parts["tokenizer"] = load_tokenizer(args, captions, train)
        vocabulary = {"vocab_size": len(parts["tokenizer"])}
    conditioner = build_conditioner(
        args, num_labels=None if names is None else names.count, num_stages=factor.bit_length() - 1, **vocabulary
    )
    if kind.conditioner is not None:
        parts[kind.conditioner] = conditioner
    if args.task in ("class", "layout") and names is not None:
        parts["class_names"] = names.names
    if args.task == "semantic" and names is not None:
        parts |= {"label_names": names.names, "label_palette": names.palette}
    if args.task == "layout":
        parts |= {
            "num_classes": None if names is None else names.count,
            "max_objects": args.max_objects,
            "use_group_flag": args.layout_flags != "none",
            "use_other_flags": args.layout_flags == "all",
        }
    if args.task not in ("unconditional", "class"):
        parts["null_condition"] = args.dropout_of_condition > 0
    if args.task != "unconditional":
        parts["default_guidance_scale"] = args.guidance_scale
    return kind.pipeline(**parts)


def load_pipeline(args: LDMArgs, names: Names | None) -> LDMBasePipeline:
    """The pipeline to fine-tune.

    Raises:
        ValueError: it is that of another task, has other classes than the data, or cannot learn to do without its
            condition.
    """
    place, kind = args.pretrained_model_name_or_path, KINDS[args.task]
    assert place is not None
    found = DiffusionPipeline.load_config(place)["_class_name"]
    wanted = [name for name in (kind.pipeline.__name__, kind.stock) if name]
    if found not in wanted:
        raise ValueError(f"{place!r} holds a {found}, but --task {args.task} trains a {' or '.join(wanted)}.")
    pipe = load_whole_pipeline(kind.pipeline, place)
    count = model_labels(pipe, args.task)
    if names is not None and count is not None and names.count > count:
        raise ValueError(f"{place!r} knows {count} classes, but the data have {names.count}.")
    if args.task == "layout":
        flags = "all" if pipe.config["use_other_flags"] else "group" if pipe.config["use_group_flag"] else "none"
        if LAYOUT_FLAGS[args.layout_flags] != () and args.layout_flags != flags:
            raise ValueError(f"{place!r} was trained with --layout_flags {flags}, got {args.layout_flags}.")
    if args.dropout_of_condition:
        if args.task == "class" and pipe.class_embedder.config["null_class"] is None:
            raise ValueError(
                f"{place!r} has no null class that stands for a dropped condition: pass --cond_dropout_prob 0."
            )
        if "null_condition" in pipe.config:
            pipe.register_to_config(null_condition=True)
    if args.guidance_scale is not None and "default_guidance_scale" in pipe.config:
        pipe.register_to_config(default_guidance_scale=args.guidance_scale)
    return pipe


def model_labels(pipe: LDMBasePipeline, task: str) -> int | None:
    """How many classes, categories or labels a pipeline knows."""
    if task == "class":
        config = pipe.class_embedder.config
        return config["num_class_embeds"] - (config["null_class"] is not None)
    if task == "layout":
        return pipe.config["num_classes"] or len(pipe.class_names or ()) or None
    return pipe.spatial_rescaler.config["in_channels"] if task == "semantic" else None


def load_tokenizer(args: LDMArgs, captions: Sequence[str], train: TrainArgs) -> PreTrainedTokenizerBase:
    """The tokenizer that the options name, or a byte-pair one learnt from the captions."""
    if args.pretrained_tokenizer_name_or_path:
        return AutoTokenizer.from_pretrained(args.pretrained_tokenizer_name_or_path)
    return learn_once(
        train, "tokenizer", lambda: train_clip_tokenizer(captions, args.vocab_size, args.text_max_length)
    )


def sample_format(pipe: LDMBasePipeline, args: LDMArgs) -> SampleFormat:
    """What the pipeline says about how samples are to be read."""
    layout, categories, count = None, None, model_labels(pipe, args.task)
    if args.task == "layout":
        layout = pipe.layout_tokenizer
        names: Iterable[str | int] = pipe.class_names or range(layout.num_classes)
        categories = {name: number for number, name in enumerate(names)}
    return SampleFormat(pipe.vae_scale_factor, count, layout, categories)
