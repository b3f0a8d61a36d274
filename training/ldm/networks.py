"""The networks of train_ldm.py: U-Net, what encodes the condition, first stage, and the pipeline around them."""

import logging
from collections.abc import Sequence
from typing import Any

from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel, UNet2DModel, VQModel
from torch import nn

from diffusers_ext.data.labels import Classes, warn_of_numbers
from diffusers_ext.models.unet_ldm import LDMUNet
from diffusers_ext.pipelines.ldm.base import LDMBasePipeline
from diffusers_ext.pipelines.ldm.first_stage import FirstStage, first_stage_channels, first_stage_factor
from diffusers_ext.schedulers.gaussian import ldm_scheduler
from diffusers_ext.training.ldm.args import CONTEXT_TASKS, LDMArgs
from diffusers_ext.training.ldm.tasks.base import Task
from diffusers_ext.training.ldm.tasks.table import TASKS
from diffusers_ext.training_utils.args import TrainArgs
from diffusers_ext.training_utils.weights import load_whole, load_whole_pipeline

logger = logging.getLogger(__name__)

BERT_VOCABULARY = 30522  # of bert-base-uncased
PAPER_CHANNELS = 3  # of the latents of kl-f4 and vq-f4


def build_unet(
    args: LDMArgs, *, latent_channels: int | None = None, sample_size: int | None = None
) -> UNet2DModel | UNet2DConditionModel:
    """A new denoising network.

    Args:
        latent_channels: of the first stage; by default `--latent_channels`, or 3 as in the paper's f4 models.
        sample_size: side of the latents, a note in the config.
    """
    channels = latent_channels or args.latent_channels or PAPER_CHANNELS
    widths = args.block_out_channels
    attends = [level in args.attention_levels for level in range(len(widths))]
    config: dict[str, Any] = {
        "sample_size": sample_size,
        "in_channels": channels + TASKS[args.task].concatenated_channels(args, channels),
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
    return TASKS[args.task].new_conditioner(args, num_labels or args.num_labels, vocab_size, num_stages)


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
    task: Task, names: Classes | None = None, captions: Sequence[str] = (), train: TrainArgs | None = None
) -> LDMBasePipeline:
    """The pipeline that is trained: the pretrained one, or new networks around a first stage.

    Args:
        task: with the options.
        names: classes of the task's data.
        captions: from which a tokenizer is learnt, unless one is named.
        train: says whether a run is resumed, whose tokenizer was learnt already.

    Raises:
        ValueError: a part is missing or does not fit; see also `load_first_stage`.
    """
    if task.args.pretrained_model_name_or_path:
        pipe = load_pipeline(task, names)
    else:
        pipe = new_pipeline(task, names, captions, train or TrainArgs())
    resolution = task.data.resolution
    multiple = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config["block_out_channels"]) - 1)
    if resolution % multiple:
        nearest = max(multiple, round(resolution / multiple) * multiple)
        raise ValueError(
            f"--resolution={resolution} is no multiple of {multiple} (first stage {pipe.vae_scale_factor} x U-Net "
            f"{multiple // pipe.vae_scale_factor}); the nearest is {nearest}."
        )
    return pipe


def new_pipeline(task: Task, names: Classes | None, captions: Sequence[str], train: TrainArgs) -> LDMBasePipeline:
    args = task.args
    vqvae = load_first_stage(args)
    factor, channels = first_stage_factor(vqvae), first_stage_channels(vqvae)
    parts: dict[str, Any] = {
        "vqvae": vqvae,
        "unet": build_unet(args, latent_channels=channels, sample_size=task.data.resolution // factor),
        "scheduler": ldm_scheduler(args.beta_start, args.beta_end, num_train_timesteps=args.num_train_timesteps),
        "latent_scale": 1.0 if args.scale_by_std else args.latent_scale,  # 1 until it is measured
    }
    tokenizer, vocabulary = task.new_tokenizer(captions, train), {}
    if tokenizer is not None:
        parts["tokenizer"], vocabulary = tokenizer, {"vocab_size": len(tokenizer)}
    if task.conditioner is not None:
        num_labels = None if names is None else names.count
        parts[task.conditioner] = build_conditioner(
            args, num_labels=num_labels, num_stages=factor.bit_length() - 1, **vocabulary
        )
    return task.pipeline(**parts, **task.new_config(names))


def load_pipeline(task: Task, names: Classes | None) -> LDMBasePipeline:
    """The pipeline to fine-tune.

    Raises:
        ValueError: it is that of another task, has other classes than the data, or cannot learn to do without its
            condition.
    """
    args, place = task.args, task.args.pretrained_model_name_or_path
    assert place is not None
    found = DiffusionPipeline.load_config(place)["_class_name"]
    wanted = [name for name in (task.pipeline.__name__, task.stock) if name]
    if found not in wanted:
        raise ValueError(f"{place!r} holds a {found}, but --task {args.task} trains a {' or '.join(wanted)}.")
    pipe = load_whole_pipeline(task.pipeline, place)
    count = task.known_labels(pipe)
    if names is not None and count is not None and names.count > count:
        raise ValueError(f"{place!r} knows {count} classes, but the data have {names.count}.")
    if names is not None and count is not None and not getattr(pipe, "class_names", None):
        warn_of_numbers(names, count, place)
    task.check_pretrained(pipe)
    if args.dropout_of_condition and "null_condition" in pipe.config:
        pipe.register_to_config(null_condition=True)
    if args.guidance_scale is not None and "default_guidance_scale" in pipe.config:
        pipe.register_to_config(default_guidance_scale=args.guidance_scale)
    return pipe


def set_scale(pipe: LDMBasePipeline, std: float, args: LDMArgs) -> None:
    """Takes over the measured scale if it is asked for; says so if the latents are far from unit variance."""
    if args.scale_by_std:
        pipe.register_to_config(latent_scale=1.0 / std)
    scaled = std * pipe.latent_scale
    logger.info("The latents have a standard deviation of %.3g after scaling by %.6g.", scaled, pipe.latent_scale)
    if not 0.5 <= scaled <= 2.0:
        logger.warning(
            "The scaled latents have a standard deviation of %.3g, but the noise levels are made for about 1: pass "
            "--scale_by_std, or --latent_scale %.4g.",
            scaled,
            1.0 / std,
        )
