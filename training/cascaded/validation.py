"""What train_cascaded.py shows as it runs: the loss of held-out images, and what the stage draws."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from diffusers_ext.data.annotations import NamedRows
from diffusers_ext.evaluation.image_quality import picture_grid, psnr
from diffusers_ext.training.cascaded.data import Reader
from diffusers_ext.training.cascaded.objective import CascadedObjective
from diffusers_ext.training_utils.args import TrainArgs
from diffusers_ext.training_utils.checkpoints import replace_file
from diffusers_ext.training_utils.validation import Batches, first_rows, mean_losses

LOSS_SAMPLES = 64  # held-out pictures for the loss


@dataclass
class Validation:
    """Figures and images of held-out rows, cut in their middle; every draw is the same each time."""

    objective: CascadedObjective
    reader: Reader
    rows: NamedRows
    train: TrainArgs
    accelerator: Accelerator

    def __post_init__(self):
        """Refuses before the first step what the pipeline would refuse after it.

        Raises:
            ValueError: The guidance, the number of steps or the level does not fit the stage.
        """
        self.pipe, self.args = self.objective.pipe, self.objective.args
        args, side = self.args, self.reader.data.resolution
        try:
            self.pipe.check_components()
            self.pipe.check_inputs(
                1, side, side, num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale
            )
            self.pipe.set_timesteps(args.num_inference_steps, None)
            if args.upscales:
                self.pipe.resolve_noise_level(args.noise_level)
        except ValueError as error:
            raise ValueError(f"--guidance_scale, --num_inference_steps or --noise_level: {error}") from error

    def __call__(self, step: int) -> dict[str, float]:
        """Figures after this step; the samples become `validation-<step>.png`."""
        self.pipe.to(self.accelerator.device)
        with self.accelerator.autocast():
            losses = mean_losses(self.objective, self.batches(LOSS_SAMPLES, self.train.train_batch_size), step)
        count = min(self.args.num_validation_images, len(self.rows))
        (batch, _), *_ = self.batches(count)
        shown, figures = self.draw(batch)
        side = max(images.shape[-1] for images in shown)
        rows = [F.interpolate(images, (side, side)) for images in shown]  # nearest: pixels stay pixels
        sheet = picture_grid(torch.cat(rows), columns=count if len(rows) > 1 else min(count, 8))
        replace_file(Path(self.train.output_dir) / f"validation-{step}.png", sheet.save)
        return losses | figures

    def batches(self, count: int, batch_size: int | None = None) -> Batches:
        """Samples of the first rows, without augmentation."""
        read, device = self.reader.without_augmentation(), self.accelerator.device
        return first_rows(self.rows, count, read, self.train.seed, batch_size=batch_size, device=device)

    def draw(self, batch: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, float]]:
        """The rows of a sheet, each (b, 3, h, w) in [-1, 1], and the peak signal-to-noise ratio of enlarged images.

        Of an upscaler: held-out small images, what it makes of them, and the true large ones.
        """
        images, args = batch["image"], self.args
        call: dict[str, Any] = {
            "class_labels": batch["label"].tolist() if "label" in batch else None,
            "guidance_scale": args.guidance_scale,
            "num_inference_steps": args.num_inference_steps,
            "generator": [torch.Generator().manual_seed(i) for i in range(len(images))],
            "output_type": "pt",
        }
        if args.upscales:
            low = batch["low"]
            made = 2 * self.pipe((low + 1) / 2, noise_level=args.noise_level, **call).images.float() - 1
            return [low, made, images], {"validation_psnr": psnr(made, images)}
        if call["class_labels"] is None:
            call["num_images_per_prompt"] = len(images)
        made = self.pipe(**call, stop_level=args.min_timestep or None).images
        return [2 * made.float() - 1], {}
