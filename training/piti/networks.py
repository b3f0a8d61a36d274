"""The networks of train_piti.py, their noise levels, and the pipeline of the stage around them."""

from collections.abc import Sequence

from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from diffusers_ext.models.encoder_glide_text import GlideTextEncoder
from diffusers_ext.pipelines.glide.base import CHANNELS
from diffusers_ext.pipelines.glide.pipeline_glide import GlidePipeline
from diffusers_ext.schedulers.scheduling_respaced import RespacedScheduler, adm_scheduler
from diffusers_ext.training.piti.args import PITIArgs
from diffusers_ext.training_utils.args import TrainArgs
from diffusers_ext.training_utils.tokenizers import learn_once, train_clip_tokenizer
from diffusers_ext.training_utils.weights import load_whole_pipeline

GPT2_VOCABULARY = 50257


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
            zero(module.conv2)
        elif isinstance(module, Attention):
            zero(module.to_out[0])
    zero(unet.conv_out)
    return unet


def zero(layer: nn.Module) -> None:
    """Sets a layer's weights to 0."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


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


def build_prior(args: PITIArgs, resolution: int, captions: Sequence[str], train: TrainArgs) -> GlidePipeline:
    """The prior that is trained: the pretrained one, or a new one. It has no upsampler.

    Args:
        resolution: Side of the images.
        captions: From which a tokenizer is learnt, unless one is named.
        train: Says whether a run is resumed, whose tokenizer was learnt already.

    Raises:
        ValueError: What is named is of another kind, or does not fit the options.
    """
    place = args.pretrained_model_name_or_path
    if place is None:
        tokenizer = build_tokenizer(args, captions, train)
        unet = build_unet(args, sample_size=resolution)
        encoder = build_text_encoder(args, vocab_size=len(tokenizer))
        pipe = GlidePipeline(encoder, tokenizer, unet, build_scheduler(args))
    else:
        pipe = load_prior(place)
        if pipe.inpaints:
            raise ValueError(f"{place!r} fills parts of images; --stage prior trains a base that draws whole ones.")
        pipe.unet.register_to_config(sample_size=resolution)
    fit_unet(pipe, args)
    check_resolution(pipe.unet, resolution)
    pipe.register_to_config(default_guidance_scale=args.guidance_scale)
    return pipe


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


def load_prior(place: str) -> GlidePipeline:
    """The base stage of a GLIDE pipeline, without its upsampler.

    Raises:
        ValueError: It is a pipeline of another kind.
    """
    found = DiffusionPipeline.load_config(place)["_class_name"]
    if found != GlidePipeline.__name__:
        raise ValueError(f"{place!r} holds a {found}, but a prior is a GlidePipeline.")
    pipe = load_whole_pipeline(GlidePipeline, place)
    pipe.register_modules(upscale_text_encoder=None, upscale_unet=None, upscale_scheduler=None)
    return pipe


def fit_unet(pipe: GlidePipeline, args: PITIArgs) -> None:
    """Refuses a network whose outputs are not those of the loss.

    Raises:
        ValueError: Names the option to change.
    """
    learned = pipe.unet.config["out_channels"] == 2 * CHANNELS
    if learned != (args.loss_type == "hybrid"):
        raise ValueError(
            f"The network of {args.pretrained_model_name_or_path!r} has {pipe.unet.config['out_channels']} outputs, "
            f"so its variance is {'learned' if learned else 'fixed'}: pass --loss_type "
            f"{'hybrid' if learned else 'mse'}."
        )


def check_resolution(unet: UNet2DConditionModel, resolution: int) -> None:
    """Refuses a size that the network cannot halve as often as it has to."""
    multiple = 2 ** (len(unet.config["block_out_channels"]) - 1)
    if resolution % multiple:
        nearest = max(multiple, round(resolution / multiple) * multiple)
        raise ValueError(
            f"--resolution={resolution} is no multiple of {multiple}, as the U-Net halves it "
            f"{multiple.bit_length() - 1} times; the nearest is {nearest}."
        )
