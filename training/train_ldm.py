"""Trains (or fine-tunes) latent diffusion: pictures from nothing, a class, a text, boxes, a label map, a small picture
or a picture with a hole.

    accelerate launch training/train_ldm.py training/presets/ldm-scenes-64-text.yaml

Paper: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752; code
CompVis/latent-diffusion@a506df5. The U-Net learns to find the noise in the latents of a frozen first stage
(train_autoencoder.py); what encodes the condition is trained along. The average covers the U-Net alone, with the
original's decay. Differences: conditions are dropped per sample, so that guidance is possible (the authors' code drops
none); AdamW's gradients are clipped (`--max_grad_norm`).
"""

import logging
from functools import partial

import torch

from diffusers_ext.training.ldm.args import LDMArgs, lr_multiplier
from diffusers_ext.training.ldm.data import cache_moments, check_first_stage, load_rows, measure_std
from diffusers_ext.training.ldm.networks import build_pipeline, set_scale
from diffusers_ext.training.ldm.objective import LDMObjective
from diffusers_ext.training.ldm.tasks.table import TASKS
from diffusers_ext.training.ldm.validation import LDMValidation
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.args import parse_args as parse
from diffusers_ext.training_utils.cache import check_cacheable
from diffusers_ext.training_utils.command import run_command
from diffusers_ext.training_utils.loop import fit
from diffusers_ext.training_utils.lora import add_lora
from diffusers_ext.training_utils.results import finish
from diffusers_ext.training_utils.run import start
from diffusers_ext.training_utils.schedules import ldm_ema
from diffusers_ext.training_utils.tokenizers import read_captions

logger = logging.getLogger(__name__)


def parse_args(argv: list[str] | None = None) -> tuple[LDMArgs, DataArgs, TrainArgs]:
    args, data, train = parse((LDMArgs, DataArgs, TrainArgs), argv)
    if args.cache_dir and args.task in ("super_resolution", "inpainting"):
        raise ValueError(f"--cache_dir: --task {args.task} makes its condition from the picture, anew in every epoch.")
    check_cacheable(args.cache_dir, data, "latents", crop_scale=args.resolved_crop_scale)
    lr_multiplier(args, train)  # so that a wrong schedule is an error before anything is loaded
    return args, data, train


def main(argv: list[str] | None = None) -> None:
    args, data, train = parse_args(argv)
    accelerator = start(train)
    task = TASKS[args.task](args, data)
    train_set, validation_set = load_rows(task)
    captions = read_captions(train_set.dataset, data.caption_column) if args.task == "text" else ()
    names = task.find_names((train_set, validation_set))

    pipe = build_pipeline(task, names, captions, train)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.float(part)  # weights to train, whatever the files hold
    pipe.set_progress_bar_config(disable=True)
    pipe.vqvae.requires_grad_(False).eval().to(accelerator.device)
    task.follow(pipe)
    if data.dataset_name != "scenes":
        for rows in (train_set, validation_set):
            task.check_rows(rows)
    set_scale(pipe, measure_std(pipe, train_set, task, train.seed, accelerator.device), args)
    if accelerator.is_main_process:
        check_first_stage(pipe, train_set, task, train.seed, accelerator.device)

    objective = LDMObjective(pipe, task)
    if args.rank:
        objective.requires_grad_(False)
        add_lora(pipe.unet, args.rank)
    if accelerator.device.type == "cpu":
        objective.choose_cpu_kernels()
    if train.gradient_checkpointing:
        objective.checkpoint_gradients()
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    logger.info("%d pictures, %d trained parameters", len(train_set), trained)
    samples = (
        cache_moments(pipe, train_set, task, accelerator, train.train_batch_size) if args.cache_dir else train_set
    )

    finished = fit(
        accelerator, objective, samples, train, transform=task.sample,
        num_workers=data.dataloader_num_workers,
        on_validate=LDMValidation(objective, validation_set, train, accelerator),
        lr_multiplier=lr_multiplier(args, train), averaged=pipe.unet, make_ema=ldm_ema,
    )  # fmt: skip

    objective.store_scale()
    kind, prompt = type(pipe), (args.validation_prompts or captions or [None])[0]
    finish(
        accelerator, train, finished, pipe.save_pretrained, recipe="ldm", argv=argv,
        summary=f"A {kind.__name__} (latent diffusion, task {args.task}).",
        usage=partial(kind.usage, config=pipe.config, prompt=prompt), header=kind.card_tags(),
        lora=pipe.unet if args.rank else None,
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
