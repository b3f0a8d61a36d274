"""Trains (or fine-tunes) PITI and its GLIDE prior, a stage at a time.

    accelerate launch training/train_piti.py training/presets/piti-scenes-32-prior.yaml

Papers: Nichol et al., "GLIDE", arXiv 2112.10741, whose authors released no training code; Wang et al., "Pretraining is
All You Need for Image-to-Image Translation", arXiv 2205.12952; PITI-Synthesis/PITI@d9f7481. `--stage prior` trains
GLIDE's base stage, which draws small images of a text. Its result is a `GlidePipeline`.
"""

import logging
from functools import partial

from diffusers_ext.training.piti.args import PITIArgs
from diffusers_ext.training.piti.data import TextReader, load_rows
from diffusers_ext.training.piti.networks import build_prior
from diffusers_ext.training.piti.objective import PriorObjective
from diffusers_ext.training.piti.validation import PITIValidation
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.args import parse_args as parse
from diffusers_ext.training_utils.command import run_command
from diffusers_ext.training_utils.kernels import plain_attention
from diffusers_ext.training_utils.loop import fit
from diffusers_ext.training_utils.lora import add_lora
from diffusers_ext.training_utils.results import finish
from diffusers_ext.training_utils.run import start
from diffusers_ext.training_utils.tokenizers import read_captions

logger = logging.getLogger(__name__)


def parse_args(argv: list[str] | None = None) -> tuple[PITIArgs, DataArgs, TrainArgs]:
    return parse((PITIArgs, DataArgs, TrainArgs), argv)


def main(argv: list[str] | None = None) -> None:
    args, data, train = parse_args(argv)
    accelerator = start(train)
    sets = load_rows(args, data)
    captions = read_captions(sets[0].dataset, data.caption_column)
    pipe = build_prior(args, data.resolution, captions, train)
    pipe.unet.float()  # weights to train, whatever the files hold
    pipe.text_encoder.float()
    pipe.set_progress_bar_config(disable=True)

    reader = TextReader(data, pipe.tokenizer, pipe.text_encoder.config["max_length"], pipe.config["lower_case"])
    objective = PriorObjective(pipe, args, reader)
    if args.rank:
        objective.requires_grad_(False)
        add_lora(pipe.unet, args.rank)
    if accelerator.device.type == "cpu":
        plain_attention(objective)
    if train.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.text_encoder.enable_gradient_checkpointing()
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    logger.info("%d pictures, %d trained parameters", len(sets[0]), trained)

    finished = fit(
        accelerator,
        objective,
        sets[0],
        train,
        transform=reader,
        num_workers=data.dataloader_num_workers,
        on_validate=PITIValidation(objective, reader, sets[1], train, accelerator),
    )
    kind, prompt = type(pipe), (args.validation_prompts or captions or [None])[0]
    finish(
        accelerator,
        train,
        finished,
        pipe.save_pretrained,
        recipe="piti",
        argv=argv,
        summary=f"A {kind.__name__}: it draws images of {data.resolution} pixels that follow a text, as GLIDE does.",
        usage=partial(kind.usage, config=pipe.config, prompt=prompt),
        header=kind.card_tags(),
        lora=pipe.unet if args.rank else None,
    )


if __name__ == "__main__":
    run_command(main)
