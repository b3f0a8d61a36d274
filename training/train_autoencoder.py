"""Trains the first stage of a token model: a VQ or Gumbel-VQ autoencoder of any down-sampling factor.

    accelerate launch training/train_autoencoder.py training/presets/autoencoder-scenes-64.yaml

Papers: VQ-VAE (arXiv 1711.00937), VQGAN (arXiv 2012.09841: L1 + perceptual + PatchGAN with adaptive weight), DALL-E
(arXiv 2102.12092: Gumbel-softmax codes). Against codebook collapse a VQ run starts as a plain autoencoder, takes its
first codebook from k-means of the latents, and gives unused codes a new place at intervals.

Two optimisers, hence a visible loop of its own, from the pieces of `diffusers_ext.training_utils.loop`.
"""

import logging
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers import VQModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.data.preprocessing import prepare_image
from diffusers_ext.evaluation.image_quality import picture_grid, psnr
from diffusers_ext.losses.adversarial import adaptive_weight, generator_loss, hinge_discriminator_loss
from diffusers_ext.losses.perceptual import perceptual_distance
from diffusers_ext.losses.quantization import (
    codebook_perplexity,
    gumbel_quantize,
    kmeans_codebook,
    vector_quantize,
)
from diffusers_ext.models.discriminator import PatchDiscriminator
from diffusers_ext.models.vq_paella import (
    GumbelVQModel,
    decode_indices,
    downsample_factor,
    encode_indices,
    nearest_codes,
)
from diffusers_ext.training_utils import loop
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.args import parse_args as parse
from diffusers_ext.training_utils.results import publish_result

logger = logging.getLogger(__name__)

USAGE = """import diffusers
import diffusers_ext

vqvae = diffusers.{kind}.from_pretrained("{folder}")
"""


@dataclass
class AutoencoderArgs:
    """The network and its loss."""

    model: Literal["vq", "gumbel_vq"] = field(
        default="vq", metadata={"help": "Nearest code, or Gumbel-softmax codes."}
    )
    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Autoencoder to fine-tune; the sizes below then come from it."}
    )
    block_out_channels: list[int] = field(
        default_factory=lambda: [16, 32, 64, 96],
        metadata={"help": "Width of each level; the factor is 2^(levels - 1)."},
    )
    layers_per_block: int = field(default=1, metadata={"help": "ResNet blocks a level."})
    norm_num_groups: int = field(default=8, metadata={"help": "Groups of the group norms."})
    mid_block_add_attention: bool = field(default=True, metadata={"help": "Self-attention at the lowest resolution."})
    latent_channels: int = field(default=16, metadata={"help": "Channels between encoder and decoder."})
    vq_embed_dim: int | None = field(default=None, metadata={"help": "Width of a code; latent_channels when unset."})
    num_vq_embeddings: int = field(default=512, metadata={"help": "Codes in the codebook."})
    l1_weight: float = field(default=1.0, metadata={"help": "Weight of the mean absolute error."})
    l2_weight: float = field(default=0.0, metadata={"help": "Weight of the mean squared error."})
    perceptual_model: str = field(default="none", metadata={"help": "`none`, `lpips`, or a folder with a CLIP model."})
    perceptual_weight: float = field(default=1.0, metadata={"help": "Weight of the perceptual distance."})
    commitment_beta: float = field(default=0.25, metadata={"help": "VQ: weight of the commitment term."})
    codebook_weight: float = field(default=1.0, metadata={"help": "VQ: weight of codebook and commitment together."})
    plain_fraction: float = field(
        default=0.12, metadata={"help": "VQ: share of the steps before the codebook is started."}
    )
    kmeans_samples: int = field(default=512, metadata={"help": "VQ: pictures whose latents the k-means start uses."})
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
    disc_channels: int = field(default=64, metadata={"help": "Width of the discriminator's first layer."})
    disc_layers: int = field(default=3, metadata={"help": "Strided layers of the discriminator."})
    disc_learning_rate: float | None = field(default=None, metadata={"help": "learning_rate when unset."})

    def __post_init__(self):
        if len(self.gumbel_temperature) != 2 or min(self.gumbel_temperature) <= 0:
            raise ValueError(f"--gumbel_temperature needs two values > 0, got {self.gumbel_temperature}.")
        for name in ("restart_steps", "kmeans_samples", "disc_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be > 0, got {getattr(self, name)}.")
        for name in ("plain_fraction", "restart_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} must lie in [0, 1], got {getattr(self, name)}.")


def parse_args(argv: list[str] | None = None) -> tuple[AutoencoderArgs, DataArgs, TrainArgs]:
    args, data, train = parse((AutoencoderArgs, DataArgs, TrainArgs), argv)
    if train.gradient_checkpointing:
        raise ValueError("--gradient_checkpointing: diffusers' VQModel has none. Lower --train_batch_size instead.")
    if train.gradient_accumulation_steps > 1 and args.disc_start is not None:
        raise ValueError(
            f"--gradient_accumulation_steps={train.gradient_accumulation_steps} with --disc_start: the adaptive "
            "weight is one of a whole batch. Use a larger --train_batch_size, or no discriminator."
        )
    return args, data, train


def build_autoencoder(args: AutoencoderArgs, resolution: int) -> VQModel:
    """A new (or the pretrained) autoencoder that takes pictures of `resolution` pixels a side.

    Raises:
        ValueError: the pretrained one is of another kind than `--model`, or the resolution does not fit the factor.
    """
    kind = {"vq": VQModel, "gumbel_vq": GumbelVQModel}[args.model]
    if args.pretrained_model_name_or_path:
        name = VQModel.load_config(args.pretrained_model_name_or_path)["_class_name"]
        if name != kind.__name__:
            raise ValueError(
                f"{args.pretrained_model_name_or_path!r} holds a {name}, but --model={args.model} trains a "
                f"{kind.__name__}."
            )
        vqvae = kind.from_pretrained(args.pretrained_model_name_or_path)
    else:
        vqvae = new_autoencoder(kind, args, resolution)
    factor = downsample_factor(vqvae)
    if resolution % factor:
        nearest = max(factor, round(resolution / factor) * factor)
        raise ValueError(
            f"--resolution={resolution} is no multiple of the autoencoder's factor {factor}; the nearest is {nearest}."
        )
    return vqvae


def new_autoencoder(kind: type[VQModel], args: AutoencoderArgs, resolution: int) -> VQModel:
    """An autoencoder with fresh weights."""
    levels = len(args.block_out_channels)
    return kind(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(args.block_out_channels),
        layers_per_block=args.layers_per_block,
        norm_num_groups=args.norm_num_groups,
        mid_block_add_attention=args.mid_block_add_attention,
        latent_channels=args.latent_channels,
        vq_embed_dim=args.vq_embed_dim,
        num_vq_embeddings=args.num_vq_embeddings,
        sample_size=resolution,
    )


class Quantized(nn.Module):
    """The autoencoder as it is trained with nearest codes: picture in, reconstruction and bottleneck loss out."""

    def __init__(self, vqvae: VQModel, args: AutoencoderArgs, num_steps: int):
        super().__init__()
        self.vqvae, self.args = vqvae, args
        self.first_step = 0 if args.pretrained_model_name_or_path else round(args.plain_fraction * num_steps)
        self.last_restart = round(args.restart_fraction * num_steps)
        self.register_buffer("usage", torch.zeros(vqvae.config.num_vq_embeddings))  # counts since the last restart

    def forward(self, image: Tensor, step: int, generators: list[torch.Generator]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the reconstruction (b, 3, h, w), the bottleneck's loss and the indices (b, h', w')."""
        latents = self.vqvae.encode(image).latents.float()
        codebook = self.vqvae.quantize.embedding.weight
        if step < self.first_step:  # still a plain autoencoder; the zero keeps the codebook in DDP's graph
            indices = torch.zeros(latents[:, 0].shape, dtype=torch.long, device=latents.device)
            return self.vqvae.decode(latents, force_not_quantize=True).sample, 0.0 * codebook.sum(), indices
        indices = nearest_codes(latents.detach(), codebook)
        codes, loss = vector_quantize(latents, codebook, indices, beta=self.args.commitment_beta)
        reconstruction = self.vqvae.decode(codes, force_not_quantize=True).sample
        return reconstruction, self.args.codebook_weight * loss, indices

    @torch.no_grad()
    def before_step(
        self, step: int, image: Tensor, count: int, first_latents, accelerator: Accelerator, seed: int
    ) -> None:
        """Starts the codebook, and gives unused codes the place of a random latent of the batch.

        Only the first `count` pictures are this process's own; a cut last batch has fewer on some processes.
        """
        weight = self.vqvae.quantize.embedding.weight
        if step == self.first_step and not self.args.pretrained_model_name_or_path:
            weight.copy_(kmeans_codebook(first_latents(self.vqvae), weight.shape[0], seed))
            self.usage.zero_()
        elif self.first_step < step <= self.last_restart and (step - self.first_step) % self.args.restart_steps == 0:
            dead = self.usage == 0
            latents = self.vqvae.encode(image).latents.float()
            counts = accelerator.gather(torch.tensor([count], device=latents.device)).tolist()
            parts = accelerator.gather(accelerator.pad_across_processes(latents))
            parts = parts.split(len(parts) // len(counts))
            latents = torch.cat([part[:own] for part, own in zip(parts, counts, strict=True)])
            latents = latents.permute(0, 2, 3, 1).flatten(0, 2)  # (n, d)
            rows = torch.randint(len(latents), (int(dead.sum()),), generator=loop.keyed_generator(seed, step))
            weight[dead] = latents[rows.to(latents.device)]
            self.usage.zero_()


class GumbelQuantized(nn.Module):
    """The autoencoder as it is trained with Gumbel-softmax codes."""

    def __init__(self, vqvae: GumbelVQModel, args: AutoencoderArgs, num_steps: int):
        super().__init__()
        self.vqvae, self.args, self.num_steps = vqvae, args, num_steps
        self.register_buffer("usage", torch.zeros(vqvae.config.num_vq_embeddings))

    def forward(self, image: Tensor, step: int, generators: list[torch.Generator]) -> tuple[Tensor, Tensor, Tensor]:
        """As `Quantized.forward`; draws (k, h', w') uniforms a sample."""
        first, last = self.args.gumbel_temperature
        temperature = last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.num_steps)))
        logits = self.vqvae.quantize_proj(self.vqvae.encode(image).latents)
        uniforms = torch.stack([torch.rand(logits.shape[1:], generator=g) for g in generators]).to(logits.device)
        codes, divergence = gumbel_quantize(
            logits, self.vqvae.quantize.embedding.weight, uniforms, temperature=temperature
        )
        reconstruction = self.vqvae.decode(codes, force_not_quantize=True).sample
        return reconstruction, self.args.gumbel_kl_weight * divergence, logits.argmax(1)

    def before_step(
        self, step: int, image: Tensor, count: int, first_latents, accelerator: Accelerator, seed: int
    ) -> None:
        """Gumbel codes need neither a start nor restarts."""


def main(argv: list[str] | None = None) -> None:
    args, data, train = parse_args(argv)
    accelerator = loop.start(train)
    vqvae = build_autoencoder(args, data.resolution)
    objective = (Quantized if args.model == "vq" else GumbelQuantized)(vqvae, args, train.max_train_steps)
    perceptual = perceptual_distance(args.perceptual_model)
    train_set, validation_set = load_pictures(data)
    logger.info("%d training pictures, %d for validation", len(train_set), len(validation_set))
    if fit_autoencoder(accelerator, objective, perceptual, train_set, validation_set, args, data, train):
        if accelerator.is_main_process:
            vqvae.save_pretrained(train.output_dir)
            publish_result(
                train,
                recipe="autoencoder",
                argv=argv,
                summary=f"A {type(vqvae).__name__}.",
                usage=USAGE.format(kind=type(vqvae).__name__, folder=train.output_dir),
            )
    accelerator.end_training()


def read_picture(example: dict, generator: torch.Generator, data: DataArgs) -> Tensor:
    """One training picture; at module level, so that loader processes can be started with it on every platform."""
    return prepare_image(
        example[data.image_column], data.resolution, generator=generator,
        center_crop=data.center_crop, random_flip=data.random_flip,
    )  # fmt: skip


def check_sizes(args: AutoencoderArgs, resolution: int, factor: int, num_pictures: int) -> None:
    """Refuses now what would otherwise stop the run in its middle: the discriminator's and the k-means start.

    Raises:
        ValueError: the pictures are too small for the discriminator, or too few for a first codebook.
    """
    smallest = 3 * 2**args.disc_layers
    if args.disc_start is not None and resolution < smallest:
        raise ValueError(
            f"--resolution={resolution} is too small for --disc_layers={args.disc_layers}, which needs {smallest} "
            "pixels a side."
        )
    num_latents = min(args.kmeans_samples, num_pictures) * (resolution // factor) ** 2
    if args.model == "vq" and not args.pretrained_model_name_or_path and num_latents < args.num_vq_embeddings:
        raise ValueError(
            f"--num_vq_embeddings={args.num_vq_embeddings} codes cannot start from the {num_latents} latents of "
            f"{min(args.kmeans_samples, num_pictures)} pictures: raise --kmeans_samples, use more pictures, or fewer "
            "codes."
        )


def fit_autoencoder(
    accelerator: Accelerator, objective: Quantized | GumbelQuantized, perceptual, train_set, validation_set,
    args: AutoencoderArgs, data: DataArgs, train: TrainArgs,
) -> bool:  # fmt: skip
    """The loop: autoencoder step, then discriminator step; returns whether `max_train_steps` was reached."""
    vqvae, device = objective.vqvae, accelerator.device
    check_sizes(args, data.resolution, downsample_factor(vqvae), len(train_set))
    discriminator = PatchDiscriminator(base_channels=args.disc_channels, num_layers=args.disc_layers)
    optimizer, schedule = loop.build_optimizer(list(objective.parameters()), train)
    disc_optimizer, disc_schedule = loop.build_optimizer(
        list(discriminator.parameters()), train, args.disc_learning_rate
    )
    ema = EMAModel(vqvae.parameters(), decay=train.ema_decay) if train.use_ema else None
    parts = {"objective": objective, "optimizer": optimizer, "lr_scheduler": schedule}
    if args.disc_start is not None:
        parts |= {"discriminator": discriminator, "disc_optimizer": disc_optimizer, "disc_lr_scheduler": disc_schedule}
    if ema is not None:
        parts["ema"] = ema
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler
    first_step = loop.resume(accelerator, train, parts)
    if ema is not None:
        ema.to(device)
    model, disc, optimizer, disc_optimizer = accelerator.prepare(objective, discriminator, optimizer, disc_optimizer)
    if perceptual is not None:
        perceptual.to(device)

    transform = partial(read_picture, data=data)

    @torch.no_grad()
    def first_latents(vqvae: VQModel) -> Tensor:
        """Latents (n, d) of the first pictures of the data set, equal on every process."""
        count = min(args.kmeans_samples, len(train_set))
        latents = []
        for start in range(0, count, 32):
            keys = range(start, min(start + 32, count))
            images = [transform(train_set[i], loop.keyed_generator(train.seed, i)) for i in keys]
            latents.append(vqvae.encode(torch.stack(images).to(device)).latents.float())
        return torch.cat(latents).permute(0, 2, 3, 1).flatten(0, 2)

    def autoencoder_losses(image: Tensor, step: int, generators) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        reconstruction, bottleneck, indices = model(image, step, generators)
        error = reconstruction.float() - image
        losses = {"l1": error.abs().mean(), "l2": error.square().mean(), "bottleneck": bottleneck}
        losses["loss"] = args.l1_weight * losses["l1"] + args.l2_weight * losses["l2"] + bottleneck
        if perceptual is not None:
            losses[perceptual.name] = perceptual(reconstruction.float(), image).mean()
            losses["loss"] = losses["loss"] + args.perceptual_weight * losses[perceptual.name]
        return losses, reconstruction, indices

    def validate(step: int) -> None:
        if not accelerator.is_main_process:
            return
        with loop.ema_weights(vqvae, ema), loop.evaluating(vqvae):
            originals = torch.stack([
                prepare_image(validation_set[i][data.image_column], data.resolution, center_crop=True)
                for i in range(min(64, len(validation_set)))
            ]).to(device)  # fmt: skip
            indices = encode_indices(vqvae, originals)
            decoded = decode_indices(vqvae, indices).clamp(-1, 1)
            counts = torch.bincount(indices.flatten(), minlength=vqvae.config.num_vq_embeddings)
            values = {"validation_psnr": psnr(decoded, originals), "codes_used": float((counts > 0).sum())}
            if perceptual is not None:
                values[f"validation_{perceptual.name}"] = float(perceptual(decoded, originals).mean())
            log.write(step, values | {"codebook_perplexity": float(codebook_perplexity(counts))})
            pairs = torch.stack([originals[:16], decoded[:16]], 1).flatten(0, 1)
            picture_grid(pairs, columns=8).save(Path(train.output_dir) / f"validation-{step}.png")

    plan = loop.StepPlan(
        len(train_set), train.train_batch_size, train.gradient_accumulation_steps,
        accelerator.num_processes, accelerator.process_index, train.seed,
    )  # fmt: skip
    steps = range(first_step, train.max_train_steps)
    stream = loop.windows(train_set, plan, steps, transform=transform, num_workers=data.dataloader_num_workers)
    log, stopwatch = loop.RunLog(accelerator, train, first_step), loop.Stopwatch(accelerator, train.max_train_minutes)
    objective.train()
    for step in steps:
        window, values = next(stream), {}
        adversarial = args.disc_start is not None and step >= args.disc_start
        for micro, (batch, keys, weight) in enumerate(window):
            image = send_to_device(batch, device)
            if micro == 0:
                count = len(keys) if weight > 0 else 0
                objective.before_step(step, image, count, first_latents, accelerator, train.seed)
            torch.manual_seed(loop.mix(train.seed, step, micro, accelerator.process_index, loop.DROPOUT_STREAM))
            generators = [loop.keyed_generator(train.seed, epoch, i, loop.LOSS_STREAM) for epoch, i in keys]
            with accelerator.autocast():
                losses, reconstruction, indices = autoencoder_losses(image, step, generators)
                if adversarial:
                    disc.requires_grad_(False)  # its gradients belong to its own step
                    losses["adversarial"] = generator_loss(disc(reconstruction.float()).float())
                    balance = adaptive_weight(losses["loss"], losses["adversarial"], vqvae.decoder.conv_out.weight)
                    losses["loss"] = losses["loss"] + args.disc_weight * balance * losses["adversarial"]
                    disc.requires_grad_(True)
            if weight == 0:  # a process without samples of its own took another's
                counts = torch.zeros_like(objective.usage)
            else:
                counts = torch.bincount(indices.flatten(), minlength=len(objective.usage)).float()
            objective.usage += accelerator.reduce(counts, "sum")  # equal on all processes, as DDP wants buffers
            with accelerator.no_sync(model) if micro < len(window) - 1 else loop.nullcontext():
                accelerator.backward(losses["loss"] * (weight * accelerator.num_processes))
            for name, value in losses.items():
                values[name] = values.get(name, 0) + value.detach() * weight
        norm = accelerator.clip_grad_norm_(objective.parameters(), train.max_grad_norm)
        loop.check_finite(accelerator, norm, values["loss"], step, window)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.step(vqvae.parameters())
        if adversarial:
            with accelerator.autocast():
                real, fake = disc(image), disc(reconstruction.detach().float())
                disc_loss = hinge_discriminator_loss(real.float(), fake.float())
            accelerator.backward(disc_loss * (weight * accelerator.num_processes))  # one micro-batch, see parse_args
            values["disc_loss"] = disc_loss.detach() * weight
            disc_optimizer.step()
            disc_schedule.step()
            disc_optimizer.zero_grad(set_to_none=True)
        log.add(values, sum(len(keys) for _, keys, _ in window) * accelerator.num_processes)

        done = step + 1
        finished = done == train.max_train_steps
        over = not finished and stopwatch.is_over()
        if done % train.logging_steps == 0 or finished:
            perplexity = float(codebook_perplexity(objective.usage))
            log.flush(done, lr=schedule.get_last_lr()[0], usage_perplexity=perplexity)
        if done % train.checkpointing_steps == 0 or finished or over:
            if accelerator.is_main_process:
                loop.save_checkpoint(Path(train.output_dir), done, parts, train)
            accelerator.wait_for_everyone()
        if finished or (train.validation_steps and done % train.validation_steps == 0):
            validate(done)
        if over:
            return False
    log.bar.close()
    if ema is not None:
        ema.copy_to(vqvae.parameters())
    return True


if __name__ == "__main__":
    main()
