"""The networks of train_piti.py, their noise levels, and the pipeline of the stage around them."""

from collections.abc import Sequence

import numpy as np
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.controlnets.controlnet import zero_module
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from diffusers_ext.conditions.palettes import SCENES_CLASSES, SCENES_PALETTE, read_palette
from diffusers_ext.conditions.piti import CONDITION_CHANNELS
from diffusers_ext.models.encoder_glide_text import GlideTextEncoder
from diffusers_ext.models.encoder_piti import PITIEncoder
from diffusers_ext.pipelines.glide.base import CHANNELS
from diffusers_ext.pipelines.glide.pipeline_glide import GlidePipeline
from diffusers_ext.pipelines.piti.pipeline_piti import PITIPipeline
from diffusers_ext.schedulers.scheduling_respaced import RespacedScheduler, adm_scheduler
from diffusers_ext.training.piti.args import PITIArgs
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.noise_prediction import check_halving
from diffusers_ext.training_utils.tokenizers import learn_once, train_clip_tokenizer
from diffusers_ext.training_utils.weights import load_whole_pipeline

GPT2_VOCABULARY = 50257
Pipeline = GlidePipeline | PITIPipeline


def build_unet(args: PITIArgs, *, sample_size: int = 64, in_channels: int = CHANNELS) -> UNet2DConditionModel:
    """A new U-Net of GLIDE's kind: the condition's tokens stand beside the image's in its self-attention.

    Args:
        sample_size: Side of the images.
        in_channels: 3 for a base stage, 6 for an upsampler.
    """
    attends = [level in args.attention_levels for level in range(len(args.block_out_channels))]
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=2 * CHANNELS if args.loss_type == "hybrid" else CHANNELS,
        block_out_channels=tuple(args.block_out_channels),
        layers_per_block=args.layers_per_block,
        down_block_types=tuple("SimpleCrossAttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=tuple("SimpleCrossAttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in attends[::-1]),
        resnet_time_scale_shift="scale_shift",
        cross_attention_dim=args.cross_attention_dim,
        attention_head_dim=args.num_head_channels,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=args.cross_attention_dim,
        norm_num_groups=args.norm_num_groups,
        dropout=args.dropout,
    )
    for module in unet.modules():  # as in GLIDE every residual branch starts as nothing
        if isinstance(module, ResnetBlock2D):
            zero_module(module.conv2)
        elif isinstance(module, Attention):
            zero_module(module.to_out[0])
    zero_module(unet.conv_out)
    return unet


def build_text_encoder(args: PITIArgs, vocab_size: int = GPT2_VOCABULARY) -> GlideTextEncoder:
    """A new text encoder."""
    encoder = GlideTextEncoder(
        vocab_size=vocab_size,
        max_length=args.text_max_length,
        hidden_size=args.cross_attention_dim,
        num_layers=args.text_layers,
        num_attention_heads=args.text_attention_heads,
    )
    # rows that start small drown in what the first attention adds, and stay there for thousands of steps
    nn.init.normal_(encoder.token_embedding.weight, std=args.token_init_std)
    for places in (encoder.position_embedding, encoder.padding_embedding):
        nn.init.normal_(places.weight, std=min(args.token_init_std, 0.5))
    return encoder


def build_scheduler(args: PITIArgs) -> RespacedScheduler:
    """New noise levels, sampled as GLIDE does."""
    return adm_scheduler(
        args.beta_schedule,
        num_train_timesteps=args.num_train_timesteps,
        variance_type="learned_range" if args.loss_type == "hybrid" else "fixed_small",
    )


def build_encoder(args: PITIArgs, hidden_size: int | None = None, sample_size: int | None = None) -> PITIEncoder:
    """A new encoder of the condition.

    Args:
        hidden_size: What the U-Net attends to; `--cross_attention_dim` by default.
        sample_size: Side of the maps; `--encoder_sample_size` by default.
    """
    encoder = PITIEncoder(
        in_channels=CONDITION_CHANNELS[args.condition],
        sample_size=sample_size or args.encoder_sample_size,
        hidden_size=hidden_size or args.cross_attention_dim,
        num_layers=args.encoder_layers,
        num_attention_heads=args.encoder_attention_heads,
    )
    nn.init.normal_(encoder.class_token.weight, std=args.token_init_std)
    nn.init.normal_(encoder.position_embedding.weight, std=min(args.token_init_std, 0.5))
    return encoder


def build_pipeline(args: PITIArgs, data: DataArgs, captions: Sequence[str], train: TrainArgs) -> Pipeline:
    """The pipeline of the stage: the pretrained one, or a new one around pretrained or new networks. No upsampler.

    Args:
        captions: From which a prior's tokenizer is learnt, unless one is named.
        train: Says whether a run is resumed, whose tokenizer was learnt already.

    Raises:
        ValueError: What is named is of another kind, or does not fit the options.
    """
    found = None if args.pretrained_model_name_or_path is None else load_base(args)
    if args.told == "text":
        pipe = found or new_prior(args, data.resolution, captions, train)
    else:
        pipe = build_piti(args, data, found)
    check_outputs(pipe.unet, args)
    check_halving(data.resolution, downsample_factor(pipe.unet))
    pipe.unet.register_to_config(sample_size=data.resolution)
    pipe.register_to_config(default_guidance_scale=args.scale)
    return pipe


def new_prior(args: PITIArgs, resolution: int, captions: Sequence[str], train: TrainArgs) -> GlidePipeline:
    tokenizer = build_tokenizer(args, captions, train)
    unet = build_unet(args, sample_size=resolution)
    encoder = build_text_encoder(args, vocab_size=len(tokenizer))
    return GlidePipeline(encoder, tokenizer, unet, build_scheduler(args))


def build_piti(args: PITIArgs, data: DataArgs, found: Pipeline | None) -> PITIPipeline:
    """PITI around what was found: all of a PITI stage, the U-Net of a prior, or nothing.

    Raises:
        ValueError: The stage was trained on another condition, or on other colours of the labels.
    """
    if isinstance(found, PITIPipeline):
        place, kind = args.pretrained_model_name_or_path, found.config["condition_type"]
        if kind != args.condition:
            raise ValueError(f"{place!r} draws from {kind}: pass --condition {kind}, or start from a GLIDE prior.")
        check_colors(found, args)
        return found
    if found is None:
        unet, scheduler = build_unet(args, sample_size=data.resolution), build_scheduler(args)
    else:
        unet, scheduler = found.unet, found.scheduler
    names, asked = None, None if args.palette is None else read_palette(args.palette)
    if args.condition == "label_map" and asked is None and data.dataset_name == "scenes":
        asked, names = SCENES_PALETTE, list(SCENES_CLASSES)
    return PITIPipeline(
        encoder=build_encoder(args, unet.config["cross_attention_dim"]),
        unet=unet,
        scheduler=scheduler,
        condition_type=args.condition,
        label_palette=None if asked is None else asked.tolist(),
        label_names=names,
    )


def check_colors(found: PITIPipeline, args: PITIArgs) -> None:
    """Refuses a palette that is not the pipeline's, which its networks have learnt.

    Raises:
        ValueError: Names the option.
    """
    if args.palette is not None and not np.array_equal(read_palette(args.palette), found.label_palette):
        place = args.pretrained_model_name_or_path
        raise ValueError(f"--palette={args.palette}: {place!r} knows its labels by other colours; leave it out.")


def build_tokenizer(args: PITIArgs, captions: Sequence[str], train: TrainArgs) -> PreTrainedTokenizerBase:
    """The one that the options name, padded with its end token as in GLIDE, or a byte-pair one of the captions."""
    if args.pretrained_tokenizer_name_or_path is None:
        return learn_once(
            train, "tokenizer", lambda: train_clip_tokenizer(captions, args.vocab_size, args.text_max_length)
        )
    tokenizer = AutoTokenizer.from_pretrained(args.pretrained_tokenizer_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(args: PITIArgs) -> Pipeline:
    """The base stage of the pipeline that the options name, without its upsampler.

    Raises:
        ValueError: It is a pipeline of another kind, or one that fills parts of images.
    """
    assert args.pretrained_model_name_or_path is not None
    kinds = (GlidePipeline,) if args.told == "text" else (GlidePipeline, PITIPipeline)
    pipe = load_pipeline(args.pretrained_model_name_or_path, kinds, args.stage)
    parts = [name for name in pipe.components if name.startswith("upscale_")]
    pipe.register_modules(**dict.fromkeys(parts))
    return pipe


def load_pipeline(place: str, kinds: tuple[type[Pipeline], ...], stage: str) -> Pipeline:
    """A pipeline, whole.

    Raises:
        ValueError: It is none of these kinds, or one that fills parts of images.
    """
    found, named = DiffusionPipeline.load_config(place)["_class_name"], {kind.__name__: kind for kind in kinds}
    if found not in named:
        raise ValueError(f"{place!r} holds a {found}, but --stage {stage} starts from a {' or '.join(named)}.")
    pipe = load_whole_pipeline(named[found], place)
    if pipe.unet.config["in_channels"] != CHANNELS:
        raise ValueError(
            f"{place!r} fills parts of images; --stage {stage} starts from a base stage that draws whole ones."
        )
    return pipe


def check_outputs(unet: UNet2DConditionModel, args: PITIArgs) -> None:
    """Refuses a network whose outputs are not those of the loss.

    Raises:
        ValueError: Names the option to change.
    """
    learned = unet.config["out_channels"] == 2 * CHANNELS
    if learned != (args.loss_type == "hybrid"):
        raise ValueError(
            f"The network of {args.pretrained_model_name_or_path!r} has {unet.config['out_channels']} outputs, so its "
            f"variance is {'learned' if learned else 'fixed'}: pass --loss_type {'hybrid' if learned else 'mse'}."
        )


def downsample_factor(unet: UNet2DConditionModel) -> int:
    """How many times smaller the coarsest level is than the image."""
    return 2 ** (len(unet.config["block_out_channels"]) - 1)
