"""Trains (or fine-tunes) PITI and its GLIDE prior, a stage at a time.

    accelerate launch training/train_piti.py training/presets/piti-scenes-32-prior.yaml
    accelerate launch training/train_piti.py training/presets/piti-scenes-32-label_map-encoder.yaml
    accelerate launch training/train_piti.py training/presets/piti-scenes-32-label_map-joint.yaml

Papers: Nichol et al., "GLIDE", arXiv 2112.10741, whose authors released no training code; Wang et al., "Pretraining is
All You Need for Image-to-Image Translation", arXiv 2205.12952; original: PITI-Synthesis/PITI@d9f7481. `--stage prior`
trains GLIDE's base stage, which draws small images of a text: a `GlidePipeline`. `--stage encoder` puts an encoder of
label maps, sketches or geometry in the place of the text's and leaves the U-Net as it is; `--stage joint` trains both:
a `PITIPipeline` each. Differences: pictures are cut to squares, not squashed; the frozen U-Net drops nothing out;
normals of mirrored pictures are mirrored too.
"""

import logging
from functools import partial

import torch

from diffusers_ext.pipelines.glide.pipeline_glide import GlidePipeline
from diffusers_ext.training.piti.args import PITIArgs
from diffusers_ext.training.piti.data import ConditionReader, Reader, TextReader, load_rows
from diffusers_ext.training.piti.networks import Pipeline, build_pipeline
from diffusers_ext.training.piti.objective import PITIObjective, PriorObjective
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
    train_set, validation_set, columns = load_rows(args, data)
    captions = read_captions(train_set.dataset, data.caption_column) if args.told == "text" else []
    pipe = build_pipeline(args, data, captions, train)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.float(part)  # weights to train, whatever the files hold
    pipe.set_progress_bar_config(disable=True)

    reader = make_reader(pipe, args, data, columns)
    if isinstance(pipe, GlidePipeline):
        objective = PriorObjective(pipe, args, reader.tokens(""))
    else:
        objective = PITIObjective(pipe, args, accelerator.device)
    if args.rank:
        if args.told == "text":
            objective.requires_grad_(False)
        add_lora(pipe.unet, args.rank)
    if accelerator.device.type == "cpu":
        for network in (pipe.unet, objective):
            plain_attention(network)
    if train.gradient_checkpointing:
        objective.checkpoint_gradients()
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    logger.info("%d pictures, %d trained parameters", len(train_set), trained)

    finished = fit(
        accelerator,
        objective,
        train_set,
        train,
        transform=reader,
        num_workers=data.dataloader_num_workers,
        on_validate=PITIValidation(objective, reader, validation_set, train, accelerator),
    )
    kind, prompt = type(pipe), (args.validation_prompts or captions or [None])[0]
    finish(
        accelerator,
        train,
        finished,
        pipe.save_pretrained,
        recipe="piti",
        argv=argv,
        summary=describe_stage(args, data, kind),
        usage=partial(kind.usage, config=pipe.config, prompt=prompt),
        header=kind.card_tags(),
        lora=pipe.unet if args.rank else None,
    )


def make_reader(pipe: Pipeline, args: PITIArgs, data: DataArgs, columns: dict[str, str]) -> Reader:
    """What reads rows as the pipeline reads what it is called with."""
    if isinstance(pipe, GlidePipeline):
        window = pipe.text_encoder.config["max_length"]
        return TextReader(args, data, pipe.tokenizer, window, pipe.config["lower_case"])
    palette = pipe.label_palette if args.condition == "label_map" else None
    return ConditionReader(args, data, columns, pipe.encoder.config["sample_size"], palette)


def describe_stage(args: PITIArgs, data: DataArgs, kind: type[Pipeline]) -> str:
    """What the stage does, for its card."""
    told = {"text": "a text, as GLIDE does", "label_map": "a label map", "sketch": "a sketch"}.get(
        args.told, "normals and depth"
    )
    drawn = f"A {kind.__name__}: it draws images of {data.resolution} pixels that follow {told}."
    if args.told == "text":
        return drawn
    how = "Its encoder was trained in front of a U-Net that stayed as it was."
    return f"{drawn} {how if args.stage == 'encoder' else 'Encoder and U-Net were trained together.'}"


if __name__ == "__main__":
    run_command(main)
