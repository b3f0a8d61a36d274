"""Trains a first stage: a VQ, Gumbel-VQ or KL autoencoder of any down-sampling factor.

    accelerate launch training/train_autoencoder.py training/presets/autoencoder-scenes-64.yaml

Papers: VQ-VAE (arXiv 1711.00937), VQGAN (arXiv 2012.09841: L1 + perceptual + PatchGAN with adaptive weight), DALL-E
(arXiv 2102.12092: Gumbel-softmax codes), Latent Diffusion (arXiv 2112.10752: `--model kl`, the scale of the latents,
the `autoencoder-paper-` presets). What concerns one bottleneck alone, such as the k-means start and the restarts of a
codebook, is in `autoencoder/objective.py`.
"""

import json
import logging
from functools import partial
from pathlib import Path

from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.losses.perceptual import CLIPDistance, perceptual_distance
from diffusers_ext.models.token_codec import downsample_factor
from diffusers_ext.training.autoencoder.args import AutoencoderArgs, check_accumulation
from diffusers_ext.training.autoencoder.data import read_picture
from diffusers_ext.training.autoencoder.networks import build_autoencoder, build_opponent
from diffusers_ext.training.autoencoder.objective import OBJECTIVES, check_sizes, store_scale
from diffusers_ext.training.autoencoder.validation import Validation
from diffusers_ext.training_utils.adversarial import fit_adversarial
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.args import parse_args as parse
from diffusers_ext.training_utils.command import run_command
from diffusers_ext.training_utils.results import finish
from diffusers_ext.training_utils.run import start
from diffusers_ext.training_utils.validation import first_rows
from diffusers_ext.training_utils.weights import load_whole, refuse_not_finite

logger = logging.getLogger(__name__)

USAGE = """import diffusers
import diffusers_ext

autoencoder = diffusers.{kind}.from_pretrained("{folder}")
"""


def parse_args(argv: list[str] | None = None) -> tuple[AutoencoderArgs, DataArgs, TrainArgs]:
    args, data, train = parse((AutoencoderArgs, DataArgs, TrainArgs), argv)
    if train.gradient_checkpointing and args.model != "kl":
        raise ValueError("--gradient_checkpointing: only AutoencoderKL has it. Lower --train_batch_size instead.")
    check_accumulation(args, train)
    return args, data, train


def main(argv: list[str] | None = None) -> None:
    args, data, train = parse_args(argv)
    accelerator = start(train)
    check_accumulation(args, train)  # once more, now that the number of processes is known
    device = accelerator.device
    autoencoder = build_autoencoder(args, data.resolution)
    if train.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    perceptual = perceptual_distance(args.perceptual_model, lpips_dropout=args.lpips_dropout, load=load_whole)
    features = CLIPDistance(args.feature_model, "--feature_model", load=load_whole) if args.feature_model else None
    if perceptual is not None:
        refuse_not_finite(perceptual, args.perceptual_model)
    for network in filter(None, (perceptual, features)):
        network.to(device)
    train_set, validation_set = load_pictures(data)
    logger.info("%d training pictures, %d for validation", len(train_set), len(validation_set))
    num_validation = min(args.validation_samples, len(validation_set))
    check_sizes(args, data.resolution, downsample_factor(autoencoder), len(train_set), num_validation)

    read = partial(read_picture, data=data)
    pictures = partial(first_rows, train_set, read=read, seed=train.seed, batch_size=32, device=device)
    objective = OBJECTIVES[args.model](
        autoencoder, args, train.max_train_steps, seed=train.seed, perceptual=perceptual, pictures=pictures
    )
    finished = fit_adversarial(
        accelerator, objective, build_opponent(args), train_set, train, transform=read,
        num_workers=data.dataloader_num_workers, averaged=autoencoder,
        on_validate=Validation(objective, features, validation_set, num_validation, data, train, device),
    )  # fmt: skip
    if finished and accelerator.is_main_process and args.scale_samples and "scaling_factor" in autoencoder.config:
        store_scale(objective, pictures(args.scale_samples))
    name = type(autoencoder).__name__
    scale = autoencoder.config.get("scaling_factor", 1.0)  # Paella's has a batch norm before its codes
    finish(
        accelerator,
        train,
        finished,
        autoencoder.save_pretrained,
        recipe="autoencoder",
        argv=argv,
        summary=f"First stage {name}; scaling_factor {scale:.5g}.{last_report(train)}",
        usage=lambda folder: USAGE.format(kind=name, folder=folder),
    )


def last_report(train: TrainArgs) -> str:
    """The figures of the last validation as a sentence for the model card."""
    log = Path(train.output_dir) / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    found = [line for line in lines if "validation_psnr" in line][-1:]
    figures = [f"{name} {value:.4g}" for line in found for name, value in line.items() if name != "step"]
    return f" At step {found[0]['step']}: {', '.join(figures)}." if found else ""


if __name__ == "__main__":
    run_command(main)
