"""Trains Versatile Diffusion: one network for several flows, each from a type of context to a type of data.

    accelerate launch training/train_versatile.py training/presets/versatile-scenes-single.yaml

Paper: arXiv 2211.08332, section 4 and Algorithm 1; the authors released no training code (the layer groups and their
learning rates are those of SHI-Labs/Versatile-Diffusion@cf0f4a2). Three stages, each going on from the last: image
variation alone, then text-to-image beside it, then all four flows. Every step takes all flows on the same samples and
adds their losses; the image autoencoder, Optimus and CLIP stay frozen.
"""

import logging
from functools import partial
from pathlib import Path

import torch

from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.pipelines.versatile.denoising import versatile_scheduler
from diffusers_ext.pipelines.versatile.pipeline_versatile import VersatilePipeline
from diffusers_ext.training.versatile.args import VersatileArgs, parts_of, read_factors
from diffusers_ext.training.versatile.data import FlowRows, cache_pictures, check_autoencoder
from diffusers_ext.training.versatile.networks import (
    add_context_lora,
    check_resolution,
    freeze_unused,
    learning_rate_groups,
    load_parts,
    load_unet,
    untrained_parts,
    vae_factor,
)
from diffusers_ext.training.versatile.objective import FlowEncoders, FlowObjective
from diffusers_ext.training.versatile.validation import draw_validation
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.args import parse_args as parse
from diffusers_ext.training_utils.cache import check_cacheable
from diffusers_ext.training_utils.command import run_command
from diffusers_ext.training_utils.kernels import plain_attention
from diffusers_ext.training_utils.loop import fit
from diffusers_ext.training_utils.results import finish
from diffusers_ext.training_utils.run import start
from diffusers_ext.training_utils.validation import first_rows, mean_losses

logger = logging.getLogger(__name__)


def parse_args(argv: list[str] | None = None) -> tuple[VersatileArgs, DataArgs, TrainArgs]:
    args, data, train = parse((VersatileArgs, DataArgs, TrainArgs), argv)
    check_cacheable(args.cache_dir, data, "latents")
    return args, data, train


def main(argv: list[str] | None = None) -> None:
    args, data, train = parse_args(argv)
    accelerator = start(train)
    parts = load_parts(args)
    unet = load_unet(args, parts).float()  # weights to train, whatever the files hold
    check_resolution(data.resolution, args.flows, unet, parts)
    freeze_unused(unet, args.flows)
    if args.rank:
        add_context_lora(unet, args.flows, args.rank)
    groups = learning_rate_groups(unet, train.learning_rate, read_factors("lr_scales", args.lr_scales))
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.float().requires_grad_(False).eval().to(accelerator.device)
    if train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if accelerator.device.type == "cpu":
        plain_attention(unet)
    scheduler, decoder = versatile_scheduler(), parts["decoder_tokenizer"]
    encoders = FlowEncoders(**{name: part for name, part in parts.items() if part is not decoder})
    reader = FlowRows.of(encoders, args, data)
    train_set, validation_set = load_pictures(data, text_columns=tuple(reader.captions))
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    logger.info("%d pictures, %d parameters of %s", len(train_set), trained, ", ".join(args.flows))
    samples = train_set
    if accelerator.is_main_process:
        check_autoencoder(encoders, train_set, reader, train.seed)
    if args.cache_dir:
        samples = cache_pictures(args.cache_dir, encoders, train_set, reader, accelerator, train)
    weights = {flow: 1.0 for flow in args.flows} | read_factors("flow_weights", args.flow_weights)
    objective = FlowObjective(
        unet, encoders, scheduler, flow_weights=weights, cond_dropout_prob=args.cond_dropout_prob
    )  # fmt: skip

    def validate(step: int) -> dict[str, float]:
        rows = first_rows(
            validation_set, args.validation_samples, reader.read, train.seed,
            batch_size=16, collate=reader.collate, device=accelerator.device,
        )  # fmt: skip
        batches = list(rows)
        found = mean_losses(objective, batches, step)
        draw_validation(unet, encoders, decoder, batches[0][0], args, Path(train.output_dir, f"validation-{step}"))
        return found

    finished = fit(
        accelerator, objective, samples, train, transform=reader.read, collate=reader.collate,
        num_workers=data.dataloader_num_workers, on_validate=validate, parameter_groups=groups,
    )  # fmt: skip

    def save(folder: Path) -> None:
        side = data.resolution // vae_factor(parts)
        unet.register_to_config(sample_size=side)
        pipe = VersatilePipeline(
            unet=unet, scheduler=scheduler, **parts, default_guidance_scale=args.guidance_scale,
            default_sample_size=side,
        )  # fmt: skip
        pipe.save_pretrained(folder)

    summary = f"A VersatilePipeline with the flows {', '.join(unet.flows)}."
    if new := untrained_parts(args):
        verb = "was" if len(new) == 1 else "were"
        summary += f" Its {' and '.join(new)} {verb} never trained: it shows that the recipe runs, nothing else."
    contexts, results = zip(*(parts_of(flow) for flow in unet.flows), strict=True)
    lacking = {"text_encoder": "text" not in contexts, "vae": "image" not in results}
    finish(
        accelerator, train, finished, save, recipe="versatile", argv=argv, summary=summary,
        header=VersatilePipeline.card_tags(), lora=unet if args.rank else None,
        usage=partial(VersatilePipeline.usage, config={name: [None] for name, lacks in lacking.items() if lacks}),
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
