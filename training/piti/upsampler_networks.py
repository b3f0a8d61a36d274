"""The networks of train_piti.py's upsamplers: the second stage of a pipeline whose first one stays as it is."""

import copy
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from diffusers_ext.pipelines.glide.base import CHANNELS
from diffusers_ext.pipelines.glide.pipeline_glide import GlidePipeline
from diffusers_ext.pipelines.piti.pipeline_piti import PITIPipeline
from diffusers_ext.training.piti.args import PITIArgs
from diffusers_ext.training.piti.networks import (
    Pipeline,
    build_encoder,
    build_scheduler,
    build_unet,
    check_colors,
    check_outputs,
    downsample_factor,
    load_pipeline,
)
from diffusers_ext.training_utils.args import check_rank
from diffusers_ext.training_utils.noise_prediction import check_halving


def build_upsampler(args: PITIArgs, resolution: int) -> Pipeline:
    """The pipeline that the options name, with the upsampler that is trained.

    Args:
        resolution: Side of the large images.

    Raises:
        ValueError: What is named is of another kind, or does not fit the options.
    """
    place = args.pretrained_model_name_or_path
    assert place is not None
    pipe = load_pipeline(place, (GlidePipeline if args.told == "text" else PITIPipeline,), args.stage)
    if isinstance(pipe, PITIPipeline) and pipe.config["condition_type"] != args.condition:
        kind = pipe.config["condition_type"]
        raise ValueError(f"{place!r} draws from {kind}: pass --condition {kind}.")
    if isinstance(pipe, PITIPipeline):
        check_colors(pipe, args)
    low = pipe.unet.config["sample_size"]
    if resolution <= low or resolution % low:
        raise ValueError(
            f"--resolution={resolution} must be a multiple of the {low} pixels that {place!r} draws, as {2 * low}."
        )
    unet, scheduler, encoder = upsampler_parts(args, pipe, resolution)
    check_outputs(unet, args)
    check_halving(resolution, downsample_factor(unet))
    unet.register_to_config(sample_size=resolution)
    encoder_name = "upscale_text_encoder" if isinstance(pipe, GlidePipeline) else "upscale_encoder"
    pipe.register_modules(upscale_unet=unet, upscale_scheduler=scheduler, **{encoder_name: encoder})
    return pipe


def upsampler_parts(args: PITIArgs, pipe: Pipeline, resolution: int) -> tuple[UNet2DConditionModel, Any, nn.Module]:
    """U-Net, noise levels and encoder that the training starts from.

    A new text encoder starts as a copy of the first stage's; PITI's encoder is always new, unless the pipeline itself
    has an upsampler.
    """
    start, place = pipe, args.pretrained_upsampler_name_or_path
    if place is not None:
        kinds = (GlidePipeline,) if args.told == "text" else (GlidePipeline, PITIPipeline)
        start = load_pipeline(place, kinds, args.stage)
        if not start.upscales:
            raise ValueError(f"{place!r} has no upsampler: without --pretrained_upsampler_name_or_path it is new.")
        if start.upscale_unet.config["in_channels"] != 2 * CHANNELS:
            raise ValueError(f"The upsampler of {place!r} fills parts of images; take one that draws whole ones.")
    if not start.upscales:
        check_rank(args, "pretrained_upsampler_name_or_path")  # the base stage is no network to start from
    if start.upscales:
        unet, scheduler = start.upscale_unet, start.upscale_scheduler
    else:
        unet = build_unet(args, sample_size=resolution, in_channels=2 * CHANNELS)
        scheduler = build_scheduler(args)
    if "sampler" in scheduler.config:  # PITI's are ancestral, GLIDE's DDIM; both take the steps chosen for 1000
        own = {"sampler": "ancestral"} if isinstance(pipe, PITIPipeline) else {}
        steps = "fast27" if scheduler.config["num_train_timesteps"] == 1000 else None
        scheduler = type(scheduler).from_config(dict(scheduler.config) | {"timestep_respacing": steps} | own)
    width = unet.config["cross_attention_dim"]
    if isinstance(pipe, PITIPipeline):
        if start is pipe and pipe.upscales:
            return unet, scheduler, pipe.upscale_encoder
        return unet, scheduler, build_encoder(args, width, pipe.encoder.config["sample_size"])
    if not start.upscales:
        found = pipe.text_encoder.config["hidden_size"]
        if width != found:
            raise ValueError(
                f"--cross_attention_dim={width}, but the text encoder of {args.pretrained_model_name_or_path!r}, of "
                f"which the upsampler gets a copy, has a width of {found}: pass --cross_attention_dim {found}."
            )
        return unet, scheduler, copy.deepcopy(pipe.text_encoder)
    if start.tokenizer.get_vocab() != pipe.tokenizer.get_vocab():
        raise ValueError(
            f"The upsampler of {place!r} was trained with another tokenizer than that of "
            f"{args.pretrained_model_name_or_path!r}: its text encoder would read other words."
        )
    return unet, scheduler, start.upscale_text_encoder
