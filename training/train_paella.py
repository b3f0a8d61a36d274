"""Trains (or fine-tunes) Paella v1: a convolutional network that predicts all tokens of a picture from noised ones.

    accelerate launch training/train_paella.py training/presets/paella-scenes-64.yaml

Paper: arXiv 2211.07292 (first version), section 3; code dome272/Paella@b1f88ef. Label-smoothed cross-entropy at all
positions; time r uniform on [0, 1); the noise comes from the scheduler that samples. The condition is dropped to the
zero vector per sample (the original drops it once per step for the whole local batch).
"""

import logging
from functools import partial

from diffusers_ext.data.labels import check_classes
from diffusers_ext.pipelines.listed_options import record_option
from diffusers_ext.training.paella.args import PaellaArgs
from diffusers_ext.training.paella.card import card_pipeline, summary, usage
from diffusers_ext.training.paella.conditions import freeze, make_condition
from diffusers_ext.training.paella.data import (
    cache_samples,
    check_tokenizer,
    class_names,
    condition_column,
    count_labels,
    load_rows,
)
from diffusers_ext.training.paella.networks import build_pipeline
from diffusers_ext.training.paella.objective import PaellaObjective
from diffusers_ext.training.paella.validation import Sheet
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.args import parse_args as parse
from diffusers_ext.training_utils.cache import check_cacheable
from diffusers_ext.training_utils.command import run_command
from diffusers_ext.training_utils.loop import fit
from diffusers_ext.training_utils.lora import add_lora
from diffusers_ext.training_utils.results import finish
from diffusers_ext.training_utils.run import start

logger = logging.getLogger(__name__)


def parse_args(argv: list[str] | None = None) -> tuple[PaellaArgs, DataArgs, TrainArgs]:
    args, data, train = parse((PaellaArgs, DataArgs, TrainArgs), argv)
    check_cacheable(args.cache_dir, data, "tokens")
    return args, data, train


def main(argv: list[str] | None = None) -> None:
    args, data, train = parse_args(argv)
    accelerator = start(train)
    column = condition_column(args, data)
    sets = load_rows(args, data, column)
    args.num_labels = count_labels(sets, args, data)
    pipe = build_pipeline(args, data.resolution)
    if args.condition == "class":
        check_classes(sets, data, args.num_labels or 0)  # rows of a class that the network does not know
    train_set, validation_set = sets
    if (names := class_names(train_set, args, data)) is not None:
        pipe.register_to_config(id2label=record_option("id2label", names))

    unet, encoders = pipe.unet, freeze(pipe, accelerator.device, train.train_batch_size)
    if args.rank:
        add_lora(unet, args.rank)
    if train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    logger.info("%d pictures, %d parameters", len(train_set), sum(p.numel() for p in trained))
    groups = [{"params": trained}]
    if args.train_text_encoder:
        tower = pipe.text_encoder.requires_grad_(True)
        groups.append({"params": list(tower.parameters()), "lr": args.text_encoder_lr or train.learning_rate})

    condition = make_condition(args, data, pipe, column)
    if accelerator.is_main_process:
        check_tokenizer(args, pipe, condition, encoders, train_set, train.seed)
    if args.cache_dir:
        train_set = cache_samples(args, condition, encoders, train_set, accelerator)
    objective = PaellaObjective(pipe, condition, encoders, args)
    finished = fit(
        accelerator, objective, train_set, train,
        transform=condition.recall if args.cache_dir else condition.read, collate=condition.collate,
        num_workers=data.dataloader_num_workers, parameter_groups=groups,
        on_validate=Sheet(pipe, condition, encoders, validation_set, args, train),
    )  # fmt: skip

    kind = card_pipeline(args)
    finish(
        accelerator, train, finished, lambda folder: kind.from_pipe(pipe).save_pretrained(folder), recipe="paella",
        argv=argv, summary=summary(args), usage=partial(usage, args, pipe), header=kind.card_tags(),
        lora=unet if args.rank else None,
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
