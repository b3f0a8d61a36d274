"""The loop of train_autoencoder.py: one step of the autoencoder, one of the discriminator."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers.training_utils import EMAModel
from torch import Generator, Tensor

from diffusers_ext.evaluation.image_quality import picture_grid
from diffusers_ext.evaluation.reconstruction import reconstruction_figures
from diffusers_ext.losses.adversarial import (
    adaptive_weight,
    generator_loss,
    hinge_discriminator_loss,
    vanilla_discriminator_loss,
)
from diffusers_ext.losses.perceptual import CLIPDistance
from diffusers_ext.models.discriminator import PatchDiscriminator
from diffusers_ext.models.token_codec import downsample_factor
from diffusers_ext.training.autoencoder.args import AutoencoderArgs
from diffusers_ext.training.autoencoder.data import first_pictures, read_picture, validation_pictures
from diffusers_ext.training.autoencoder.objective import Objective, check_sizes, running_statistics_kept
from diffusers_ext.training_utils import loop
from diffusers_ext.training_utils.args import DataArgs, TrainArgs
from diffusers_ext.training_utils.checkpoints import replace_file

DISCRIMINATOR_LOSSES = {"hinge": hinge_discriminator_loss, "vanilla": vanilla_discriminator_loss}


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
