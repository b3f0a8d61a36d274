"""Trains (or fine-tunes) one stage of Cascaded Diffusion: images of a class or of nothing, or large of small ones.

    accelerate launch training/train_cascaded.py training/presets/cascaded-scenes-16.yaml
    accelerate launch training/train_cascaded.py training/presets/cascaded-scenes-16-32.yaml

Paper: Ho, Saharia, Chan, Fleet, Norouzi, Salimans, arXiv 2106.15282, whose authors released no code; network, loss of
a learned variance and small images are those of openai/guided-diffusion@22e0df8. Every stage is trained alone, on
pictures and smaller copies of them: in any order, on any machine. Differences: classes can be dropped per sample, so
that guidance is possible; some small images stay clean (`--clean_prob`), so that level 0 is a trained one.
"""

import logging
from functools import partial

from diffusers_ext.data.labels import check_classes
from diffusers_ext.training.cascaded.args import CascadedArgs
from diffusers_ext.training.cascaded.data import Reader, count_classes, load_rows
from diffusers_ext.training.cascaded.networks import build_pipeline
from diffusers_ext.training.cascaded.objective import CascadedObjective
from diffusers_ext.training.cascaded.validation import CascadedValidation
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.args import parse_args as parse
from diffusers_ext.training_utils.command import run_command
from diffusers_ext.training_utils.kernels import plain_attention
from diffusers_ext.training_utils.loop import fit
from diffusers_ext.training_utils.lora import add_lora
from diffusers_ext.training_utils.results import finish
from diffusers_ext.training_utils.run import start

logger = logging.getLogger(__name__)


def parse_args(argv: list[str] | None = None) -> tuple[CascadedArgs, DataArgs, TrainArgs]:
    args, data, train = parse((CascadedArgs, DataArgs, TrainArgs), argv)
    if args.upscales:
        args.low_side(data.resolution)  # so that sizes that do not fit are an error before anything is loaded
    return args, data, train


def main(argv: list[str] | None = None) -> None:
    args, data, train = parse_args(argv)
    accelerator = start(train)
    sets = load_rows(args, data)
    classes = count_classes(sets, args, data)
    pipe = build_pipeline(args, data.resolution, classes)
    pipe.unet.float()  # weights to train, whatever the files hold
    pipe.set_progress_bar_config(disable=True)
    if classes is not None:
        check_classes([rows.dataset for rows in sets], data, classes.count)  # labels that would stop it in its middle

    objective, reader = CascadedObjective(pipe, args), Reader(args, data)
    if args.rank:
        add_lora(pipe.unet, args.rank)
    if accelerator.device.type == "cpu":
        plain_attention(objective)
    if train.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    logger.info("%d pictures, %d trained parameters", len(sets[0]), trained)

    finished = fit(
        accelerator,
        objective,
        sets[0],
        train,
        transform=reader,
        num_workers=data.dataloader_num_workers,
        on_validate=CascadedValidation(objective, reader, sets[1], train, accelerator),
    )
    kind = type(pipe)
    finish(
        accelerator,
        train,
        finished,
        pipe.save_pretrained,
        recipe="cascaded",
        argv=argv,
        summary=f"A {kind.__name__}: a stage of Cascaded Diffusion that {describe_stage(args, data)}.",
        usage=partial(kind.usage, config=pipe.config),
        header=kind.card_tags(),
        lora=pipe.unet if args.rank else None,
    )


def describe_stage(args: CascadedArgs, data: DataArgs) -> str:
    """What the stage does, for its card."""
    side = data.resolution
    if not args.upscales:
        stops = f", down to {args.min_timestep} steps of noise" if args.min_timestep else ""
        return f"draws images of {side} pixels{stops}"
    low = args.low_side(side)
    noise = f"level {args.truncation_level}" if args.truncation_level else "random levels"
    small = {
        "none": "as they are",
        "blur": "blurred at times",
        "truncated": f"noised to {noise}",
    }[args.augmentation]
    return f"enlarges images of {low} pixels to {side}; it was trained on small images {small}"


if __name__ == "__main__":
    run_command(main)
