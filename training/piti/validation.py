"""What train_piti.py shows as it runs: the loss of held-out images, and what the pipeline draws."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from diffusers_ext.data.annotations import NamedRows
from diffusers_ext.evaluation.image_quality import picture_grid
from diffusers_ext.pipelines.checks import check_timesteps
from diffusers_ext.training.piti.data import TextReader
from diffusers_ext.training.piti.objective import DiffusionObjective
from diffusers_ext.training_utils.args import TrainArgs
from diffusers_ext.training_utils.validation import Validation


class PITIValidation(Validation):
    """Held-out pictures, cut in their middle."""

    def __init__(
        self, objective: DiffusionObjective, reader: TextReader, rows: NamedRows, train: TrainArgs,
        accelerator: Accelerator,
    ):  # fmt: skip
        """Refuses before the first step what the pipeline would refuse after it.

        Raises:
            ValueError: The number of steps does not fit the scheduler.
        """
        super().__init__(objective, reader.without_augmentation(), rows, train, accelerator)
        self.pipe, self.args = objective.pipe, objective.args
        steps, scheduler = self.args.num_inference_steps, copy.deepcopy(self.pipe.scheduler)
        self.pipe.check_components()
        try:
            scheduler.set_timesteps(steps)
            check_timesteps(scheduler, steps)
        except ValueError as error:
            raise ValueError(f"--num_inference_steps: {error}") from error

    def pictures(self) -> tuple[Image.Image, dict[str, float]]:
        (batch, _), *_ = self.batches(min(self.args.num_validation_images, len(self.rows)))
        images = self.draw(batch)
        return picture_grid(images, columns=min(len(images), 8)), {}

    def draw(self, batch: Mapping[str, Any]) -> Tensor:
        """Images (n, 3, h, w) in [-1, 1]; image k depends on generator k alone."""
        prompts = self.args.validation_prompts or batch["text"]
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        steps = self.args.num_inference_steps
        drawn = self.pipe(prompts, num_inference_steps=steps, generator=generators, output_type="pt").images
        return 2 * drawn.float() - 1
