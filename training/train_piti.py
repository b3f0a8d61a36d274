"""Trains (or fine-tunes) PITI and its GLIDE prior, a stage at a time.

    accelerate launch training/train_piti.py training/presets/piti-scenes-32-prior.yaml
    accelerate launch training/train_piti.py training/presets/piti-scenes-32-label_map-encoder.yaml
    accelerate launch training/train_piti.py training/presets/piti-scenes-32-label_map-joint.yaml

Papers: Nichol et al., "GLIDE", arXiv 2112.10741, whose authors released no training code; Wang et al., "Pretraining is
All You Need for Image-to-Image Translation", arXiv 2205.12952; original: PITI-Synthesis/PITI@d9f7481. `--stage prior`
trains GLIDE's base stage, which draws small images of a text: a `GlidePipeline`. `--stage encoder` puts an encoder of
label maps, sketches or geometry in the place of the text's and leaves the U-Net as it is; `--stage joint` trains both:
a `PITIPipeline` each. `--stage prior_upsampler` and `--stage upsampler` train their second stages. Differences:
pictures are cut to squares, not squashed; the frozen U-Net drops nothing out; normals of mirrored pictures are
mirrored too.
"""

import logging
from functools import partial
from typing import Any

import torch

from diffusers_ext.pipelines.glide.pipeline_glide import GlidePipeline
from diffusers_ext.training.piti.args import PITIArgs, check_accumulation
from diffusers_ext.training.piti.data import ConditionReader, TextReader, UpscaleReader, load_rows
from diffusers_ext.training.piti.networks import Pipeline, build_pipeline
from diffusers_ext.training.piti.objective import DiffusionObjective, PITIObjective, PriorObjective
from diffusers_ext.training.piti.upsampler import (
    MapUpsamplerObjective,
    TextUpsamplerObjective,
    UpsamplerObjective,
    UpscaleValidation,
    build_opponent,
    build_perceptual,
)
from diffusers_ext.training.piti.upsampler_networks import build_upsampler
from diffusers_ext.training.piti.validation import PITIValidation
from diffusers_ext.training_utils.adversarial import fit_adversarial
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
    args, data, train = parse((PITIArgs, DataArgs, TrainArgs), argv)
    check_accumulation(args, train)
    return args, data, train


def main(argv: list[str] | None = None) -> None:
    args, data, train = parse_args(argv)
    accelerator = start(train)
    check_accumulation(args, train)  # once more, now that the number of processes is known
    train_set, validation_set, columns = load_rows(args, data)
    captions = read_captions(train_set.dataset, data.caption_column) if args.told == "text" else []
    pipe = build_upsampler(args, data.resolution) if args.upsamples else build_pipeline(args, data, captions, train)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.float(part)  # weights to train, whatever the files hold
    pipe.set_progress_bar_config(disable=True)

    reader = make_reader(pipe, args, data, columns)
    objective = make_objective(pipe, args, reader, accelerator.device)
    if args.rank:
        if args.told == "text":
            objective.requires_grad_(False)
        add_lora(objective.denoiser, args.rank)
    if accelerator.device.type == "cpu":
        for network in (objective.denoiser, objective):
            plain_attention(network)
    if train.gradient_checkpointing:
        objective.checkpoint_gradients()
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    logger.info("%d pictures, %d trained parameters", len(train_set), trained)

    options = {"transform": reader, "num_workers": data.dataloader_num_workers}
    validation = UpscaleValidation if args.upsamples else PITIValidation
    options["on_validate"] = validation(objective, reader, validation_set, train, accelerator)
    if isinstance(objective, UpsamplerObjective):
        opponent = build_opponent(args, data.resolution)
        finished = fit_adversarial(accelerator, objective, opponent, train_set, train, **options)
    else:
        finished = fit(accelerator, objective, train_set, train, **options)
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
        lora=objective.denoiser if args.rank else None,
        lora_part="upscale_unet" if args.upsamples else None,
    )


def make_reader(
    pipe: Pipeline, args: PITIArgs, data: DataArgs, columns: dict[str, str]
) -> TextReader | ConditionReader | UpscaleReader:
    """What reads rows as the pipeline reads what it is called with."""
    if isinstance(pipe, GlidePipeline):
        encoder = pipe.upscale_text_encoder if args.upsamples else pipe.text_encoder
        window = encoder.config["max_length"]
        reader = TextReader(args, data, pipe.tokenizer, window, pipe.config["lower_case"])
    else:
        palette = pipe.label_palette if args.condition == "label_map" else None
        reader = ConditionReader(args, data, columns, pipe.encoder.config["sample_size"], palette)
    if not args.upsamples:
        return reader
    return UpscaleReader(reader, data.resolution // pipe.unet.config["sample_size"], args)


def make_objective(pipe: Pipeline, args: PITIArgs, reader: Any, device: torch.device) -> DiffusionObjective:
    """What the stage learns."""
    is_text = isinstance(pipe, GlidePipeline)
    if args.upsamples:
        perceptual = build_perceptual(args, device)
        return (TextUpsamplerObjective if is_text else MapUpsamplerObjective)(pipe, args, perceptual)
    return PriorObjective(pipe, args, reader.tokens("")) if is_text else PITIObjective(pipe, args, device)


def describe_stage(args: PITIArgs, data: DataArgs, kind: type[Pipeline]) -> str:
    """What the stage does, for its card."""
    told = {"text": "a text, as GLIDE does", "label_map": "a label map", "sketch": "a sketch"}.get(
        args.told, "normals and depth"
    )
    drawn = f"A {kind.__name__}: it draws images of {data.resolution} pixels that follow {told}."
    if args.upsamples:
        return f"{drawn} Its upsampler was trained; the base stage stayed as it was."
    if args.told == "text":
        return drawn
    how = "Its encoder was trained in front of a U-Net that stayed as it was."
    return f"{drawn} {how if args.stage == 'encoder' else 'Encoder and U-Net were trained together.'}"


if __name__ == "__main__":
    run_command(main)
