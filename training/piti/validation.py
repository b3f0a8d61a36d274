"""What train_piti.py shows as it runs: the loss of held-out images, and what the pipeline draws."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffusers_ext.data.annotations import NamedRows
from diffusers_ext.evaluation.image_quality import picture_grid
from diffusers_ext.pipelines.checks import check_timesteps
from diffusers_ext.training.piti.data import Reader, UpscaleReader
from diffusers_ext.training.piti.objective import DiffusionObjective
from diffusers_ext.training_utils.args import TrainArgs
from diffusers_ext.training_utils.validation import Validation

CALLED_WITH = ("label_map", "sketch", "normals", "depth")  # arguments of a PITI pipeline that a batch holds


class PITIValidation(Validation):
    """Held-out pictures, cut in their middle."""

    def __init__(
        self, objective: DiffusionObjective, reader: Reader | UpscaleReader, rows: NamedRows, train: TrainArgs,
        accelerator: Accelerator,
    ):  # fmt: skip
        """Refuses before the first step what the pipeline would refuse after it.

        Raises:
            ValueError: The number of steps does not fit the scheduler.
        """
        super().__init__(objective, reader.without_augmentation(), rows, train, accelerator)
        self.pipe, self.args = objective.pipe, objective.args
        steps, scheduler = self.args.num_inference_steps, copy.deepcopy(objective.scheduler)
        self.pipe.check_components()
        try:
            scheduler.set_timesteps(steps)
            check_timesteps(scheduler, steps)
        except ValueError as error:
            raise ValueError(f"--num_inference_steps: {error}") from error

    def pictures(self) -> tuple[Image.Image, dict[str, float]]:
        """A sheet of samples; those of maps stand between the maps and the true images."""
        (batch, _), *_ = self.batches(min(self.args.num_validation_images, len(self.rows)))
        images = self.draw(batch)
        if "condition" not in batch:
            return picture_grid(images, columns=min(len(images), 8)), {}
        shown = F.interpolate(as_pictures(batch["condition"]), images.shape[-2:])  # nearest: labels stay labels
        return picture_grid(torch.cat([shown, images, batch["image"]]), columns=len(images)), {}

    def draw(self, batch: Mapping[str, Any]) -> Tensor:
        """Images (n, 3, h, w) in [-1, 1] of a batch's captions (or of `--validation_prompts`) or conditions; image k
        depends on generator k alone.
        """
        told: dict[str, Any] = {name: batch[name] for name in CALLED_WITH if name in batch}
        if "text" in batch:
            told = {"prompt": self.args.validation_prompts or batch["text"]}
        count, steps = len(next(iter(told.values()))), self.args.num_inference_steps
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        drawn = self.pipe(**told, num_inference_steps=steps, generator=generators, output_type="pt").images
        return 2 * drawn.float().to(self.pipe.device) - 1


def as_pictures(conditions: Tensor) -> Tensor:
    """Conditions (b, c, h, w) in [-1, 1] as pictures (b, 3, h, w): labels or depth in colours, distances in grey."""
    return conditions.expand(-1, 3, -1, -1) if conditions.shape[1] == 1 else conditions[:, -3:]
