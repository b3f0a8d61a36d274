"""What train_ldm.py shows as it runs: the loss of held-out pictures, and samples of the pipeline that is trained."""

import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator
from PIL import Image

from diffusers_ext.data.annotations import NamedRows
from diffusers_ext.evaluation.image_quality import picture_grid, psnr
from diffusers_ext.pipelines.checks import check_timesteps
from diffusers_ext.training.ldm.data import read_sample
from diffusers_ext.training.ldm.objective import LDMObjective
from diffusers_ext.training_utils.args import TrainArgs
from diffusers_ext.training_utils.validation import Batches, first_rows, mean_losses, save_sheet

LOSS_SAMPLES = 64  # held-out pictures for the loss


@dataclass
class Validation:
    """Figures and pictures of held-out rows, cut in their middle; every draw is the same each time."""

    objective: LDMObjective
    rows: NamedRows
    train: TrainArgs
    accelerator: Accelerator

    def __post_init__(self):
        """Refuses before the first step what the pipeline would refuse after it.

        Raises:
            ValueError: the guidance, the number of steps or eta does not fit the network and its scheduler.
        """
        self.pipe, self.task, self.args = self.objective.pipe, self.objective.task, self.objective.args
        args, side, scheduler = self.args, self.task.data.resolution, copy.deepcopy(self.pipe.scheduler)
        default = self.pipe.config.get("default_guidance_scale")
        scale = next((value for value in (args.guidance_scale, default) if value is not None), 1.0)
        steps = args.num_inference_steps
        try:
            self.pipe.check_inputs(1, side, side, num_inference_steps=steps, guidance_scale=scale, eta=args.eta)
            scheduler.set_timesteps(steps)
            check_timesteps(scheduler, steps)
        except ValueError as error:
            raise ValueError(f"--guidance_scale, --num_inference_steps or --eta: {error}") from error

    def __call__(self, step: int) -> dict[str, float]:
        """Figures after this step; the samples become `validation-<step>.png`."""
        self.pipe.to(self.accelerator.device)
        self.objective.store_scale()
        with self.accelerator.autocast():
            losses = mean_losses(self.objective, self.batches(LOSS_SAMPLES, self.train.train_batch_size), step)
        sheet, figures = self.pictures()
        save_sheet(sheet, self.train, step)
        return losses | figures

    def batches(self, count: int, batch_size: int | None = None) -> Batches:
        """Samples of the first rows, without augmentation."""
        task = replace(self.task, data=self.task.data.without_augmentation())
        read, device = partial(read_sample, task=task), self.accelerator.device
        return first_rows(self.rows, count, read, self.train.seed, batch_size=batch_size, device=device)

    def pictures(self) -> tuple[Image.Image, dict[str, float]]:
        """A sheet of samples, and the peak signal-to-noise ratio where the original is the one right answer.

        Where conditions are pictures they are in the first row, and the originals in the last; samples of layouts are
        shown once more with their boxes.
        """
        count = min(self.args.num_validation_images, len(self.rows))
        (batch, _), *_ = self.batches(count)
        call = self.task.call(self.pipe, batch, [self.rows[i] for i in range(count)])
        samples = len(call.get("prompt", range(count)))  # prompts of one's own may be more or fewer
        images = self.pipe(
            **call, num_inference_steps=self.args.num_inference_steps, eta=self.args.eta,
            generator=[torch.Generator().manual_seed(i) for i in range(samples)], output_type="pt",
        ).images  # fmt: skip
        images = self.task.annotated(self.pipe, 2 * images.float() - 1, call)
        shown = self.task.shown(self.pipe, batch)
        if shown is None:
            return picture_grid(images, columns=min(samples, 8)), {}
        figures = {"validation_psnr": psnr(images, batch["image"])} if self.task.has_one_answer else {}
        return picture_grid(torch.cat([shown, images, batch["image"]]), columns=count), figures
