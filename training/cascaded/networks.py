"""The network of train_cascaded.py, its noise levels, and the pipeline of the stage around them."""

from diffusers import DiffusionPipeline

from diffusers_ext.data.labels import Classes, warn_of_numbers
from diffusers_ext.models.unet_cascaded import CascadedUNet
from diffusers_ext.pipelines.cascaded.pipeline_cascaded_base import CascadedBasePipeline
from diffusers_ext.pipelines.cascaded.pipeline_cascaded_upscale import CascadedUpscalePipeline
from diffusers_ext.schedulers.scheduling_respaced import RespacedScheduler, adm_scheduler
from diffusers_ext.schedulers.scheduling_truncated_conditioning import TruncatedConditioningScheduler
from diffusers_ext.training.cascaded.args import CascadedArgs
from diffusers_ext.training_utils.noise_prediction import check_halving
from diffusers_ext.training_utils.weights import load_whole, load_whole_pipeline

IMAGE_CHANNELS = 3
StagePipeline = CascadedBasePipeline | CascadedUpscalePipeline


def build_unet(args: CascadedArgs, *, sample_size: int | None = None, num_labels: int | None = None) -> CascadedUNet:
    """A new network.

    Args:
        sample_size: Side of the images, a note in the config.
        num_labels: Classes, the null class not counted; `--num_labels` by default.
    """
    rows = null = None
    if args.condition == "class":
        rows = num_labels or args.num_labels
        if rows is not None and args.dropout_of_condition:
            null, rows = rows, rows + 1  # one more row
    levels = range(len(args.block_out_channels))
    return CascadedUNet(
        sample_size=sample_size,
        in_channels=IMAGE_CHANNELS,
        out_channels=2 * IMAGE_CHANNELS if args.loss_type == "hybrid" else IMAGE_CHANNELS,
        block_out_channels=tuple(args.block_out_channels),
        layers_per_block=args.layers_per_block,
        attention_levels=tuple(level in args.attention_levels for level in levels),
        num_heads=args.num_heads,
        num_head_channels=args.head_channels,
        dropout=args.dropout,
        resnet_time_scale_shift=args.resnet_time_scale_shift,
        resample=args.resample,
        num_class_embeds=rows,
        null_class=null,
        low_res_channels=IMAGE_CHANNELS if args.upscales else 0,
        low_res_upsampling=args.upsampling,
        aug_cond_type=args.aug_cond_type if args.tells_level else None,
        norm_num_groups=args.norm_num_groups,
    )


def build_scheduler(args: CascadedArgs) -> RespacedScheduler | TruncatedConditioningScheduler:
    """New noise levels of the stage's own images, sampled as ADM does; a base with `--min_timestep` stops there."""
    scheduler = adm_scheduler(
        args.beta_schedule,
        num_train_timesteps=args.num_train_timesteps,
        variance_type="learned_range" if args.loss_type == "hybrid" else "fixed_small",
    )
    if not args.min_timestep:
        return scheduler
    return TruncatedConditioningScheduler(scheduler, stop_level=args.min_timestep)


def build_conditioning_scheduler(args: CascadedArgs) -> TruncatedConditioningScheduler:
    """The noise levels of the small images: those of the stage before."""
    schedule = args.conditioning_schedule or args.beta_schedule
    return TruncatedConditioningScheduler(adm_scheduler(schedule, num_train_timesteps=args.num_conditioning_timesteps))


def build_pipeline(args: CascadedArgs, resolution: int, classes: Classes | None) -> StagePipeline:
    """The stage that is trained: the pretrained one, or a new one, perhaps around a pretrained network.

    Args:
        resolution: Side of the stage's images.
        classes: Of the data.

    Raises:
        ValueError: A pretrained part is of another kind, or does not fit the options or the data.
    """
    if args.pretrained_model_name_or_path:
        pipe = load_pipeline(args)
    else:
        pipe = new_pipeline(args, resolution, classes)
    fit_unet(pipe.unet, args, classes)
    check_halving(resolution, pipe.unet.downsample_factor)
    levels = pipe.scheduler.config["num_train_timesteps"]
    if args.min_timestep >= levels:
        raise ValueError(f"--min_timestep={args.min_timestep}: the scheduler has the levels 0 to {levels - 1}.")
    place = args.pretrained_model_name_or_path or args.pretrained_unet_name_or_path
    if classes is not None and place is not None and (pipe.class_names is None or args.pretrained_unet_name_or_path):
        warn_of_numbers(classes, pipe.num_classes or 0, place)
    pipe.unet.register_to_config(sample_size=resolution)
    pipe.register_to_config(default_guidance_scale=args.guidance_scale)
    if not args.upscales:
        pipe.register_to_config(min_timestep=args.min_timestep)
        if pipe.scheduler.config.get("stop_level", args.min_timestep) != args.min_timestep:  # of an earlier training
            pipe.scheduler = TruncatedConditioningScheduler(pipe.scheduler.scheduler, stop_level=args.min_timestep)
        return pipe
    if args.noises_low and pipe.conditioning_scheduler is None:
        pipe.register_modules(conditioning_scheduler=build_conditioning_scheduler(args))
    pipe.register_to_config(
        low_res_size=args.low_side(resolution),
        augmentation=args.augmentation,
        truncation_level=args.truncation_level,
        default_noise_level=args.noise_level,
    )
    return pipe


def new_pipeline(args: CascadedArgs, resolution: int, classes: Classes | None) -> StagePipeline:
    if args.pretrained_unet_name_or_path:
        unet = load_whole(CascadedUNet, args.pretrained_unet_name_or_path, subfolder=args.unet_subfolder)
    else:
        unet = build_unet(args, sample_size=resolution, num_labels=None if classes is None else classes.count)
    class_names = None if classes is None else classes.names
    return stage_class(args)(unet, build_scheduler(args), class_names=class_names)


def load_pipeline(args: CascadedArgs) -> StagePipeline:
    """The stage to fine-tune.

    Raises:
        ValueError: It is one of the other kind.
    """
    place, kind = args.pretrained_model_name_or_path, stage_class(args)
    found = DiffusionPipeline.load_config(place)["_class_name"]
    if found != kind.__name__:
        raise ValueError(f"{place!r} holds a {found}, but --stage {args.stage} trains a {kind.__name__}.")
    return load_whole_pipeline(kind, place)


def stage_class(args: CascadedArgs) -> type[StagePipeline]:
    return CascadedUpscalePipeline if args.upscales else CascadedBasePipeline


def fit_unet(unet: CascadedUNet, args: CascadedArgs, classes: Classes | None) -> None:
    """Gives a network the embedding of the level that it lacks, and refuses one that cannot learn what is asked for.

    Raises:
        ValueError: Names the option to change.
    """
    place = args.pretrained_model_name_or_path or args.pretrained_unet_name_or_path
    config, name = unet.config, f"The network of {place!r}"
    if bool(config["low_res_channels"]) != args.upscales:
        kind = "super_resolution" if config["low_res_channels"] else "base"
        raise ValueError(f"{name} is one of --stage {kind}, got --stage {args.stage}.")
    learned = config["out_channels"] == 2 * config["in_channels"]
    if learned != (args.loss_type == "hybrid"):
        raise ValueError(
            f"{name} has {config['out_channels']} outputs, so its variance is {'learned' if learned else 'fixed'}: "
            f"pass --loss_type {'hybrid' if learned else 'mse'}."
        )
    rows, null = config["num_class_embeds"], config["null_class"]
    if (rows is None) != (classes is None):
        raise ValueError(
            f"{name} has {'no' if rows is None else rows} classes: pass --condition "
            f"{'unconditional' if rows is None else 'class'}."
        )
    if classes is not None and rows is not None:
        count = rows - (null is not None)
        if classes.count > count:
            raise ValueError(f"{name} knows {count} classes, but the data have {classes.count}.")
        if args.dropout_of_condition and null is None:
            raise ValueError(f"{name} has no null class that stands for a dropped one: pass --cond_dropout_prob 0.")
    if args.tells_level and config["aug_cond_type"] is None:
        unet.add_augmentation_level(args.aug_cond_type)
    elif config["aug_cond_type"] is not None and not args.tells_level:
        raise ValueError(
            f"{name} is told the level of the small picture's noise: pass --augmentation truncated, without "
            "--truncation_level."
        )
