"""Trains a first stage: a VQ, Gumbel-VQ or KL autoencoder of any down-sampling factor.

    accelerate launch training/train_autoencoder.py training/presets/autoencoder-scenes-64.yaml

Papers: VQ-VAE (arXiv 1711.00937), VQGAN (arXiv 2012.09841: L1 + perceptual + PatchGAN with adaptive weight), DALL-E
(arXiv 2102.12092: Gumbel-softmax codes), Latent Diffusion (arXiv 2112.10752: `--model kl`, the scale of the latents,
the `autoencoder-paper-` presets). What concerns one bottleneck alone, such as the k-means start and the restarts of a
codebook, is in `first_stages.py`.

Two optimisers, hence a visible loop of its own, from the pieces of `diffusers_ext.training_utils.loop`.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers.training_utils import EMAModel
from first_stages import OBJECTIVES, Objective, build_autoencoder, running_statistics_kept
from torch import Generator, Tensor

from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.data.preprocessing import prepare_image
from diffusers_ext.evaluation.image_quality import picture_grid
from diffusers_ext.evaluation.reconstruction import reconstruction_figures
from diffusers_ext.losses.adversarial import (
    adaptive_weight,
    generator_loss,
    hinge_discriminator_loss,
    vanilla_discriminator_loss,
)
from diffusers_ext.losses.kl import latent_scale
from diffusers_ext.losses.perceptual import CLIPDistance, perceptual_distance
from diffusers_ext.models.discriminator import PatchDiscriminator
from diffusers_ext.models.token_codec import downsample_factor
from diffusers_ext.training_utils import loop
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.args import parse_args as parse
from diffusers_ext.training_utils.checkpoints import replace_file
from diffusers_ext.training_utils.results import publish_result
from diffusers_ext.training_utils.weights import load_whole, refuse_not_finite

logger = logging.getLogger(__name__)

USAGE = """import diffusers
import diffusers_ext

autoencoder = diffusers.{kind}.from_pretrained("{folder}")
"""

DISCRIMINATOR_LOSSES = {"hinge": hinge_discriminator_loss, "vanilla": vanilla_discriminator_loss}


@dataclass
class AutoencoderArgs:
    """The network and its loss."""

    # On a resume, see TrainArgs.
    APPLIED: ClassVar[tuple[str, ...]] = ("disc_learning_rate", "scale_samples")
    BOOKKEEPING: ClassVar[tuple[str, ...]] = ("validation_samples", "feature_model")

    model: Literal["vq", "paella_vq", "gumbel_vq", "kl"] = field(
        default="vq",
        metadata={"help": "Nearest code (stock network or Paella's), Gumbel-softmax codes, or a Gaussian posterior."},
    )
    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Autoencoder to fine-tune; the sizes below then come from it."}
    )
    subfolder: str | None = field(default=None, metadata={"help": "Where it lies there: `vae` in a pipeline."})
    block_out_channels: list[int] = field(
        default_factory=lambda: [16, 32, 64, 96],
        metadata={"help": "Width of each level; the factor is 2^(levels - 1), for paella_vq 2^levels."},
    )
    bottleneck_blocks: int = field(default=12, metadata={"help": "paella_vq: blocks of the decoder's deepest level."})
    layers_per_block: int = field(default=1, metadata={"help": "ResNet blocks a level."})
    norm_num_groups: int = field(default=8, metadata={"help": "Groups of the group norms."})
    mid_block_add_attention: bool = field(default=True, metadata={"help": "Self-attention in the middle block."})
    attention_levels: list[int] = field(
        default_factory=list, metadata={"help": "Levels (0: full size) with self-attention after each block."}
    )
    latent_channels: int = field(default=16, metadata={"help": "Channels between encoder and decoder."})
    vq_embed_dim: int | None = field(default=None, metadata={"help": "Width of a code; latent_channels when unset."})
    num_vq_embeddings: int = field(default=512, metadata={"help": "Codes in the codebook."})
    l1_weight: float = field(default=1.0, metadata={"help": "Weight of the mean absolute error."})
    l2_weight: float = field(default=0.0, metadata={"help": "Weight of the mean squared error."})
    perceptual_model: str = field(default="none", metadata={"help": "`none`, `lpips`, or a folder with a CLIP model."})
    perceptual_weight: float = field(default=1.0, metadata={"help": "Weight of the perceptual distance."})
    lpips_dropout: bool = field(
        default=False, metadata={"help": "Dropout before LPIPS's heads in training, as (by accident) the originals."}
    )
    reduction: Literal["sum", "mean"] | None = field(
        default=None, metadata={"help": "Of these three over a picture's elements; when unset, kl: sum, else mean."}
    )
    kl_weight: float = field(default=1e-6, metadata={"help": "KL: weight of the divergence from N(0, 1), in nats."})
    logvar_init: float = field(default=0.0, metadata={"help": "KL: log-variance of the output elements."})
    learn_logvar: bool = field(default=False, metadata={"help": "KL: learn it (the original keeps it fixed)."})
    commitment_beta: float = field(default=0.25, metadata={"help": "VQ: weight of the commitment term."})
    codebook_weight: float = field(default=1.0, metadata={"help": "VQ: weight of codebook and commitment together."})
    plain_fraction: float = field(
        default=0.12, metadata={"help": "VQ: share of the steps before the codebook is started."}
    )
    kmeans_samples: int = field(
        default=512, metadata={"help": "VQ: pictures whose latents the k-means start uses; 0: a random start."}
    )
    restart_steps: int = field(default=60, metadata={"help": "VQ: give unused codes a new place every so many steps."})
    restart_fraction: float = field(default=0.7, metadata={"help": "VQ: share of the steps after which restarts end."})
    gumbel_temperature: list[float] = field(
        default_factory=lambda: [1.0, 0.0625],
        metadata={"help": "Gumbel: first and last temperature (cosine between)."},
    )
    gumbel_kl_weight: float = field(
        default=1e-4, metadata={"help": "Gumbel: weight of the divergence from uniform codes."}
    )
    disc_start: int | None = field(default=None, metadata={"help": "First step with the PatchGAN; none when unset."})
    disc_weight: float = field(
        default=0.8, metadata={"help": "Weight of the adversarial term (times the adaptive one)."}
    )
    disc_loss: Literal["hinge", "vanilla"] = field(default="hinge", metadata={"help": "The discriminator's loss."})
    disc_channels: int = field(default=64, metadata={"help": "Width of the discriminator's first layer."})
    disc_layers: int = field(default=3, metadata={"help": "Strided layers of the discriminator."})
    disc_learning_rate: float | None = field(default=None, metadata={"help": "learning_rate when unset."})
    disc_fresh_forward: bool = field(
        default=False,
        metadata={"help": "Reconstruct anew for the discriminator, with the step's weights and new draws."},
    )
    scale_samples: int = field(
        default=256,
        metadata={"help": "Pictures that measure scaling_factor = 1 / std(latents) at the end; 0: keep it."},
    )
    validation_samples: int = field(default=64, metadata={"help": "Pictures of a validation."})
    feature_model: str | None = field(
        default=None, metadata={"help": "Folder with a CLIP image tower: report the Frechet distance of its vectors."}
    )

    def __post_init__(self):
        if len(self.gumbel_temperature) != 2 or min(self.gumbel_temperature) <= 0:
            raise ValueError(f"--gumbel_temperature needs two values > 0, got {self.gumbel_temperature}.")
        for name in ("restart_steps", "disc_layers", "validation_samples", "bottleneck_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be > 0, got {getattr(self, name)}.")
        for name in ("kmeans_samples", "scale_samples", "kl_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must be >= 0, got {getattr(self, name)}.")
        for name in ("plain_fraction", "restart_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must lie in [0, 1], got {getattr(self, name)}.")
        levels = len(self.block_out_channels)
        if not set(self.attention_levels) <= set(range(levels)):
            raise ValueError(
                f"--attention_levels={self.attention_levels}: --block_out_channels gives the levels 0 to {levels - 1}."
            )
        halves = [self.block_out_channels[-1] // 2**level for level in reversed(range(levels))]
        if self.model == "paella_vq" and list(self.block_out_channels) != halves:
            raise ValueError(
                f"--block_out_channels={self.block_out_channels}: for --model=paella_vq each level is twice as wide "
                f"as the one before, here {halves}."
            )
        if self.model != "kl" and (self.learn_logvar or self.logvar_init):
            raise ValueError(f"--logvar_init and --learn_logvar belong to --model=kl, got --model={self.model}.")
        if self.lpips_dropout and self.perceptual_model != "lpips":
            raise ValueError(
                f"--lpips_dropout goes with --perceptual_model=lpips, got --perceptual_model={self.perceptual_model}."
            )
        if self.subfolder and not self.pretrained_model_name_or_path:
            raise ValueError(f"--subfolder={self.subfolder} goes with --pretrained_model_name_or_path.")

    @property
    def resolved_reduction(self) -> Literal["sum", "mean"]:
        return self.reduction or ("sum" if self.model == "kl" else "mean")


def parse_args(argv: list[str] | None = None) -> tuple[AutoencoderArgs, DataArgs, TrainArgs]:
    args, data, train = parse((AutoencoderArgs, DataArgs, TrainArgs), argv)
    if train.gradient_checkpointing and args.model != "kl":
        raise ValueError("--gradient_checkpointing: only AutoencoderKL has it. Lower --train_batch_size instead.")
    check_accumulation(args, train)
    return args, data, train


def check_accumulation(args: AutoencoderArgs, train: TrainArgs) -> None:
    """Refuses micro-steps with the PatchGAN, also those that `--total_batch_size` makes on this many processes.

    Raises:
        ValueError: names the batch a process that needs none.
    """
    steps, batch = train.gradient_accumulation_steps, train.train_batch_size
    if steps > 1 and args.disc_start is not None:
        asked = "--gradient_accumulation_steps" if train.total_batch_size is None else "--total_batch_size"
        raise ValueError(
            f"{asked}={getattr(train, asked[2:])} makes {steps} micro-steps of {batch} samples a process, but with "
            "--disc_start the adaptive weight is one of a whole batch: pass --train_batch_size "
            f"{steps * batch}, more processes, or --disc_start none."
        )


def main(argv: list[str] | None = None) -> None:
    args, data, train = parse_args(argv)
    accelerator = loop.start(train)
    check_accumulation(args, train)  # once more, now that the number of processes is known
    autoencoder = build_autoencoder(args, data.resolution)
    if train.gradient_checkpointing:
        autoencoder.enable_gradient_checkpointing()
    objective = OBJECTIVES[args.model](autoencoder, args, train.max_train_steps)
    perceptual = perceptual_distance(args.perceptual_model, lpips_dropout=args.lpips_dropout, load=load_whole)
    features = CLIPDistance(args.feature_model, "--feature_model", load=load_whole) if args.feature_model else None
    if perceptual is not None:
        refuse_not_finite(perceptual, args.perceptual_model)
    train_set, validation_set = load_pictures(data)
    logger.info("%d training pictures, %d for validation", len(train_set), len(validation_set))
    if fit_autoencoder(
        accelerator, objective, perceptual, features, train_set, validation_set, args, data, train
    ):  # fmt: skip
        if accelerator.is_main_process:
            if args.scale_samples and "scaling_factor" in autoencoder.config:
                count, device = args.scale_samples, accelerator.device
                store_scale(objective, first_pictures(train_set, count, data, train.seed, device))
            name = type(autoencoder).__name__
            scale = autoencoder.config.get("scaling_factor", 1.0)  # Paella's has a batch norm before its codes
            publish_result(
                train,
                autoencoder.save_pretrained,
                recipe="autoencoder",
                argv=argv,
                summary=f"First stage {name}; scaling_factor {scale:.5g}.{last_report(train)}",
                usage=lambda folder: USAGE.format(kind=name, folder=folder),
            )
    accelerator.end_training()


def store_scale(objective: Objective, pictures: Iterator[tuple[Tensor, list[Generator]]]) -> None:
    """Writes 1 / std of the pictures' latents into the autoencoder's config, where diffusers' pipelines look."""
    with loop.evaluating(objective):
        latents = torch.cat([objective.latents(*batch) for batch in pictures])
    objective.autoencoder.register_to_config(scaling_factor=latent_scale(latents))


def last_report(train: TrainArgs) -> str:
    """The figures of the last validation as a sentence for the model card."""
    log = Path(train.output_dir) / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    found = [line for line in lines if "validation_psnr" in line][-1:]
    figures = [f"{name} {value:.4g}" for line in found for name, value in line.items() if name != "step"]
    return f" At step {found[0]['step']}: {', '.join(figures)}." if found else ""


def read_picture(example: dict, generator: torch.Generator, data: DataArgs) -> Tensor:
    """One training picture; at module level, so that loader processes can be started with it on every platform."""
    return prepare_image(
        example[data.image_column], data.resolution, generator=generator,
        center_crop=data.center_crop, random_flip=data.random_flip,
    )  # fmt: skip


def first_pictures(
    train_set, count: int, data: DataArgs, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, list[Generator]]]:
    """The first `count` pictures of the data set in batches, each picture with a generator; equal on every process."""
    count = min(count, len(train_set))
    for start in range(0, count, 32):
        keys = range(start, min(start + 32, count))
        images = [read_picture(train_set[i], loop.keyed_generator(seed, i), data) for i in keys]
        yield torch.stack(images).to(device), [loop.keyed_generator(seed, i, loop.LOSS_STREAM) for i in keys]


def validation_pictures(validation_set, count: int, data: DataArgs, device: torch.device) -> Iterator[Tensor]:
    """The first `count` pictures, their centres, 16 at a time."""
    for start in range(0, count, 16):
        rows = [validation_set[i] for i in range(start, min(start + 16, count))]
        yield torch.stack(
            [prepare_image(row[data.image_column], data.resolution, center_crop=True) for row in rows]
        ).to(device)


def check_sizes(
    args: AutoencoderArgs, resolution: int, factor: int, num_pictures: int, num_validation: int = 2
) -> None:
    """Refuses now what would otherwise stop the run in its middle: the discriminator's start, the k-means, the report.

    Raises:
        ValueError: the pictures are too small for the discriminator, or too few for a first codebook or a covariance.
    """
    if args.feature_model and num_validation < 2:
        raise ValueError(
            f"--feature_model needs at least 2 validation pictures, got {num_validation}: raise --validation_samples, "
            "or use more pictures (a tenth of them is held out)."
        )
    smallest = 3 * 2**args.disc_layers
    if args.disc_start is not None and resolution < smallest:
        raise ValueError(
            f"--resolution={resolution} is too small for --disc_layers={args.disc_layers}, which needs {smallest} "
            "pixels a side."
        )
    num_latents = min(args.kmeans_samples, num_pictures) * (resolution // factor) ** 2
    if OBJECTIVES[args.model].starts_with_kmeans(args) and num_latents < args.num_vq_embeddings:
        raise ValueError(
            f"--num_vq_embeddings={args.num_vq_embeddings} codes cannot start from the {num_latents} latents of "
            f"{min(args.kmeans_samples, num_pictures)} pictures: raise --kmeans_samples, use more pictures, or fewer "
            "codes."
        )


def fit_autoencoder(
    accelerator: Accelerator, objective: Objective, perceptual, features: CLIPDistance | None, train_set,
    validation_set, args: AutoencoderArgs, data: DataArgs, train: TrainArgs,
) -> bool:  # fmt: skip
    """The loop: autoencoder step, then discriminator step; returns whether `max_train_steps` was reached."""
    autoencoder, device = objective.autoencoder, accelerator.device
    num_validation = min(args.validation_samples, len(validation_set))
    check_sizes(args, data.resolution, downsample_factor(autoencoder), len(train_set), num_validation)
    discriminator = PatchDiscriminator(base_channels=args.disc_channels, num_layers=args.disc_layers)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer, schedule = loop.build_optimizer(trained, train)
    disc_optimizer, disc_schedule = loop.build_optimizer(
        list(discriminator.parameters()), train, args.disc_learning_rate
    )
    ema = EMAModel(autoencoder.parameters(), decay=train.ema_decay) if train.use_ema else None
    parts = {"objective": objective, "optimizer": optimizer, "lr_scheduler": schedule}
    if args.disc_start is not None:
        parts |= {"discriminator": discriminator, "disc_optimizer": disc_optimizer, "disc_lr_scheduler": disc_schedule}
    if ema is not None:
        parts["ema"] = ema
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler
    log, skipped = loop.RunLog(accelerator, train), loop.SkippedSteps()
    disc_skipped = loop.SkippedSteps("gradient of the discriminator")
    parts["log"] = log
    first_step, record = loop.resume(accelerator, train, parts, len(train_set))
    if ema is not None:
        ema.to(device)
    model, disc, optimizer, disc_optimizer = accelerator.prepare(objective, discriminator, optimizer, disc_optimizer)
    for network in filter(None, (perceptual, features)):
        network.to(device)

    def pictures(count: int) -> Iterator[tuple[Tensor, list[Generator]]]:
        return first_pictures(train_set, count, data, train.seed, device)

    def autoencoder_losses(
        image: Tensor, step: int, generators: list[Generator]
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        reconstruction, terms, seen = model(image, step, generators)
        error = reconstruction.float() - image
        losses = {"l1": error.abs().mean(), "l2": error.square().mean(), **terms}
        total = args.l1_weight * losses["l1"] + args.l2_weight * losses["l2"]
        if perceptual is not None:
            perceptual.train(args.lpips_dropout)
            losses[perceptual.name] = perceptual(reconstruction.float(), image).mean()
            total = total + args.perceptual_weight * losses[perceptual.name]
        losses["reconstruction"] = objective.reconstruction_loss(total, image[0].numel())
        losses["loss"] = losses["reconstruction"] + terms["bottleneck"]
        return losses, reconstruction, seen

    def validate(step: int) -> None:
        if not accelerator.is_main_process:
            return
        seen: list[Tensor] = []

        def reconstruct(originals: Tensor) -> Tensor:
            decoded, details = objective.reconstruct(originals)
            decoded = decoded.clamp(-1, 1)
            if not seen:
                pairs = torch.stack([originals, decoded], 1).flatten(0, 1)
                replace_file(Path(train.output_dir) / f"validation-{step}.png", picture_grid(pairs, columns=8).save)
            seen.append(details)
            return decoded

        if perceptual is not None:
            perceptual.eval()
        with loop.ema_weights(autoencoder, ema), loop.evaluating(objective):
            batches = validation_pictures(validation_set, num_validation, data, device)
            figures = reconstruction_figures(batches, reconstruct, distance=perceptual, features=features)
            figures = {f"validation_{name}": value for name, value in figures.items()}
            log.write(step, figures | objective.figures(torch.cat(seen)))

    plan = loop.StepPlan(
        len(train_set), train.train_batch_size, train.gradient_accumulation_steps,
        accelerator.num_processes, accelerator.process_index, train.seed,
    )  # fmt: skip
    steps = range(first_step, train.max_train_steps)
    transform, num_workers = partial(read_picture, data=data), data.dataloader_num_workers
    stream = loop.windows(train_set, plan, steps, transform=transform, num_workers=num_workers)
    log.begin(first_step)
    stopwatch = loop.Stopwatch(accelerator, train.max_train_minutes)
    objective.train()
    for step in steps:
        window, values = next(stream), {}
        adversarial = args.disc_start is not None and step >= args.disc_start
        for micro, (batch, keys, weight) in enumerate(window):
            image = send_to_device(batch, device)
            if micro == 0:
                count = len(keys) if weight > 0 else 0
                objective.before_step(step, image, count, pictures, accelerator, train.seed)
            torch.manual_seed(loop.mix(train.seed, step, micro, accelerator.process_index, loop.DROPOUT_STREAM))
            generators = [loop.keyed_generator(train.seed, epoch, i, loop.LOSS_STREAM) for epoch, i in keys]
            with accelerator.autocast():
                losses, reconstruction, seen = autoencoder_losses(image, step, generators)
                if adversarial:
                    disc.requires_grad_(False)  # its gradients belong to its own step
                    losses["adversarial"] = generator_loss(disc(reconstruction.float()).float())
                    balance = adaptive_weight(losses["reconstruction"], losses["adversarial"], objective.last_weight)
                    losses["adaptive_weight"] = args.disc_weight * balance
                    losses["loss"] = losses["loss"] + losses["adaptive_weight"] * losses["adversarial"]
                    disc.requires_grad_(True)
            objective.record(seen, weight, accelerator)
            with accelerator.no_sync(model) if micro < len(window) - 1 else loop.nullcontext():
                accelerator.backward(losses["loss"] * (weight * accelerator.num_processes))
            for name, value in losses.items():
                values[name] = values.get(name, 0) + value.detach() * weight
        norm = accelerator.clip_grad_norm_(trained, train.max_grad_norm)
        loop.check_finite(accelerator, norm, values["loss"], step, window)
        optimizer.step()
        skipped.add(optimizer.step_was_skipped, step, values["loss"])
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.step(autoencoder.parameters())
        if adversarial:
            with accelerator.autocast():
                if args.disc_fresh_forward:
                    with torch.no_grad(), running_statistics_kept(objective):
                        reconstruction = model(image, step, generators)[0]  # the generators go on: new draws
                real, fake = disc(image), disc(reconstruction.detach().float())
                disc_loss = DISCRIMINATOR_LOSSES[args.disc_loss](real.float(), fake.float())
            accelerator.backward(disc_loss * (weight * accelerator.num_processes))  # one micro-batch, see parse_args
            values["disc_loss"] = disc_loss.detach() * weight
            accelerator.unscale_gradients(disc_optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in discriminator.parameters() if p.grad is not None])
            loop.check_finite(accelerator, norm, disc_loss.detach(), step, window, of="the discriminator in ")
            disc_optimizer.step()
            disc_skipped.add(disc_optimizer.step_was_skipped, step, disc_loss.detach())
            disc_schedule.step()
            disc_optimizer.zero_grad(set_to_none=True)
        log.add(values, sum(len(keys) for _, keys, _ in window) * accelerator.num_processes)

        done = step + 1
        finished = done == train.max_train_steps
        over = not finished and stopwatch.is_over()
        if done % train.logging_steps == 0 or finished:
            log.flush(done, lr=schedule.get_last_lr()[0], **objective.logged())
        if done % train.checkpointing_steps == 0 or finished or over:
            loop.save_checkpoint(accelerator, done, parts, train, record)
        if finished or (train.validation_steps and done % train.validation_steps == 0):
            validate(done)
        if over:
            return False
    log.bar.close()
    if ema is not None:
        ema.copy_to(autoencoder.parameters())
    return True


if __name__ == "__main__":
    main()
