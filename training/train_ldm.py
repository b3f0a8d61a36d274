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
from pathlib import Path

import torch
from ldm_args import LDMArgs
from ldm_data import check_rows, find_names, load_rows, read_picture, read_sample
from ldm_latents import cache_moments, measure_std, set_scale
from ldm_networks import build_conditioner, build_pipeline, build_unet, sample_format  # noqa: F401  # for the tests
from ldm_tasks import Denoiser, LDMLoss, choose_cpu_kernels
from ldm_validation import Validation
from torch.utils.data import Dataset

from diffusers_ext.pipelines.ldm.base import LDMBasePipeline
from diffusers_ext.training_utils import loop
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.args import parse_args as parse
from diffusers_ext.training_utils.checkpoints import replace_file
from diffusers_ext.training_utils.lora import add_lora, merge_lora, save_lora
from diffusers_ext.training_utils.results import publish_result
from diffusers_ext.training_utils.schedules import WarmupDecay, ldm_ema
from diffusers_ext.training_utils.tokenizers import read_captions

logger = logging.getLogger(__name__)


def parse_args(argv: list[str] | None = None) -> tuple[LDMArgs, DataArgs, TrainArgs]:
    args, data, train = parse((LDMArgs, DataArgs, TrainArgs), argv)
    if args.cache_dir and args.task in ("super_resolution", "inpainting"):
        raise ValueError(f"--cache_dir: --task {args.task} makes its condition from the picture, anew in every epoch.")
    if args.cache_dir and (data.random_flip or not data.center_crop or args.resolved_crop_scale != (1.0, 1.0)):
        raise ValueError(
            "--cache_dir keeps one set of latents a picture, which excludes augmentation: pass --center_crop and "
            "leave out --random_flip and --crop_scale, or leave out --cache_dir."
        )
    lr_multiplier(args, train)  # so that a wrong schedule is an error before anything is loaded
    return args, data, train


def lr_multiplier(args: LDMArgs, train: TrainArgs) -> WarmupDecay | None:
    """The paper's schedules, where they are asked for."""
    if args.lr_multipliers is None:
        return None
    first, peak, last = args.lr_multipliers
    length = args.lr_decay_steps or train.max_train_steps
    try:
        return WarmupDecay(train.lr_warmup_steps, first, peak, last, length, args.lr_decay)
    except ValueError as error:
        raise ValueError(f"--lr_multipliers with --lr_warmup_steps and --lr_decay_steps: {error}") from error


def main(argv: list[str] | None = None) -> None:
    args, data, train = parse_args(argv)
    accelerator = loop.start(train)
    train_set, validation_set = load_rows(args, data)
    captions = read_captions(train_set.dataset, data.caption_column) if args.task == "text" else ()
    names = find_names((train_set, validation_set), args, data)
    pipe = build_pipeline(args, data.resolution, names, captions, train)
    for network in filter(lambda part: isinstance(part, torch.nn.Module), pipe.components.values()):
        torch.nn.Module.float(network)  # weights to train, whatever the files hold
    pipe.set_progress_bar_config(disable=True)
    pipe.vqvae.requires_grad_(False).eval().to(accelerator.device)
    reading = sample_format(pipe, args)
    for rows in (train_set, validation_set):
        check_rows(rows, reading, args, data)
    cut = partial(read_picture, args=args, data=data, sample_format=reading)
    set_scale(pipe, measure_std(pipe, train_set, cut, train.seed, accelerator.device), args)

    denoiser = Denoiser(pipe, args.task, drops=args.dropout_of_condition > 0)
    if args.rank:
        denoiser.requires_grad_(False)
        add_lora(pipe.unet, args.rank)
    if accelerator.device.type == "cpu":
        choose_cpu_kernels(denoiser, pipe.vqvae)
    if train.gradient_checkpointing:
        denoiser.checkpoint_gradients()
    trained = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    logger.info("%d pictures, %d trained parameters", len(train_set), trained)
    compute_loss = LDMLoss(pipe, args)
    samples: Dataset = train_set
    if args.cache_dir:
        samples = cache_moments(pipe, train_set, cut, accelerator, args, data, train.train_batch_size)
    transform = partial(read_sample, args=args, data=data, sample_format=reading)

    validation = Validation(
        pipe, compute_loss, validation_set, reading, args, data, train, accelerator.device
    )  # fmt: skip
    validation.check()

    def validate(step: int) -> dict[str, float]:
        pipe.to(accelerator.device)
        store_scale(pipe, denoiser, args)
        with accelerator.autocast():
            losses = validation.losses(denoiser)
        sheet, figures = validation.pictures()
        replace_file(Path(train.output_dir) / f"validation-{step}.png", sheet.save)
        return losses | figures

    finished = loop.fit(
        accelerator, denoiser, compute_loss, samples, train, transform=transform,
        num_workers=data.dataloader_num_workers, on_validate=validate, lr_multiplier=lr_multiplier(args, train),
        averaged=pipe.unet, make_ema=ldm_ema,
    )  # fmt: skip

    def save(folder: Path) -> None:
        store_scale(pipe, denoiser, args)
        if args.rank:
            save_lora(pipe.unet, folder)
            merge_lora(pipe.unet)
        pipe.save_pretrained(folder)

    if finished and accelerator.is_main_process:
        kind = type(pipe)
        prompt = (args.validation_prompts or captions or [None])[0]
        publish_result(
            train, save, recipe="ldm", argv=argv, summary=f"A {kind.__name__} (latent diffusion, task {args.task}).",
            usage=partial(kind.usage, config=pipe.config, prompt=prompt), header=kind.card_tags(),
        )  # fmt: skip
    accelerator.end_training()


def store_scale(pipe: LDMBasePipeline, denoiser: Denoiser, args: LDMArgs) -> None:
    """Hands a measured scale to the pipeline: after resuming, that of the checkpoint."""
    if args.scale_by_std:
        pipe.register_to_config(latent_scale=float(denoiser.latent_scale))


if __name__ == "__main__":
    main()
