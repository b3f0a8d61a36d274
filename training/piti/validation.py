"""What train_piti.py shows as it runs: the loss of held-out images, and what the pipeline draws."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusers_ext.data.annotations import NamedRows
from diffusers_ext.evaluation.image_quality import picture_grid
from diffusers_ext.pipelines.checks import check_timesteps
from diffusers_ext.training.piti.data import TextReader
from diffusers_ext.training.piti.objective import DiffusionObjective
from diffusers_ext.training_utils.args import TrainArgs
from diffusers_ext.training_utils.validation import Batches, first_rows, mean_losses, save_sheet

LOSS_SAMPLES = 64  # held-out pictures for the loss


@dataclass
class Validation:
    """Figures and pictures of held-out rows, cut in their middle; every draw is the same each time."""

    objective: DiffusionObjective
    reader: TextReader
    rows: NamedRows
    train: TrainArgs
    accelerator: Accelerator

    def __post_init__(self):
        """Refuses before the first step what the pipeline would refuse after it.

        Raises:
            ValueError: The number of steps does not fit the scheduler.
        """
        self.pipe, self.args = self.objective.pipe, self.objective.args
        steps, scheduler = self.args.num_inference_steps, copy.deepcopy(self.pipe.scheduler)
        self.pipe.check_components()
        try:
            scheduler.set_timesteps(steps)
            check_timesteps(scheduler, steps)
        except ValueError as error:
            raise ValueError(f"--num_inference_steps: {error}") from error

    def __call__(self, step: int) -> dict[str, float]:
        """Figures after this step; the samples become `validation-<step>.png`."""
        self.pipe.to(self.accelerator.device)
        with self.accelerator.autocast():
            losses = mean_losses(self.objective, self.batches(LOSS_SAMPLES, self.train.train_batch_size), step)
        count = min(self.args.num_validation_images, len(self.rows))
        (batch, _), *_ = self.batches(count)
        images = self.draw(batch)
        save_sheet(picture_grid(images, columns=min(len(images), 8)), self.train, step)
        return losses

    def draw(self, batch: Mapping[str, Any]) -> Tensor:
        """Images (n, 3, h, w) in [-1, 1]; image k depends on generator k alone."""
        prompts = self.args.validation_prompts or batch["text"]
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        steps = self.args.num_inference_steps
        drawn = self.pipe(prompts, num_inference_steps=steps, generator=generators, output_type="pt").images
        return 2 * drawn.float() - 1

    def batches(self, count: int, batch_size: int | None = None) -> Batches:
        """Samples of the first rows, without augmentation."""
        read, device = self.reader.without_augmentation(), self.accelerator.device
        return first_rows(self.rows, count, read, self.train.seed, batch_size=batch_size, device=device)
