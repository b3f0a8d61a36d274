"""What train_ldm.py shows as it runs: the loss of held-out pictures, and samples of the pipeline that is trained."""

import copy
from dataclasses import replace

import torch
from accelerate import Accelerator
from PIL import Image

from diffusers_ext.data.annotations import NamedRows
from diffusers_ext.evaluation.image_quality import picture_grid, psnr
from diffusers_ext.pipelines.checks import check_timesteps
from diffusers_ext.training.ldm.objective import LDMObjective
from diffusers_ext.training_utils.args import TrainArgs
from diffusers_ext.training_utils.validation import Validation


class LDMValidation(Validation):
    """Held-out pictures, cut in their middle."""

    def __init__(self, objective: LDMObjective, rows: NamedRows, train: TrainArgs, accelerator: Accelerator):
        """Refuses before the first step what the pipeline would refuse after it.

        Raises:
            ValueError: the guidance, the number of steps or eta does not fit the network and its scheduler.
        """
        self.pipe, self.task, self.args = objective.pipe, objective.task, objective.args
        read = replace(self.task, data=self.task.data.without_augmentation()).sample
        super().__init__(objective, read, rows, train, accelerator)
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

    def pictures(self) -> tuple[Image.Image, dict[str, float]]:
        """A sheet of samples, and the peak signal-to-noise ratio where the original is the one right answer.

        Where conditions are pictures they are in the first row, and the originals in the last; samples of layouts are
        shown once more with their boxes.
        """
        self.objective.store_scale()
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
