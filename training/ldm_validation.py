"""What train_ldm.py shows as it runs: the loss of held-out pictures, and samples of the pipeline that is trained."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from ldm_args import LDMArgs
from ldm_data import NamedRows, SampleFormat, read_objects, read_sample
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from diffusers_ext.conditions.inpainting import masked_image
from diffusers_ext.evaluation.image_quality import picture_grid, psnr
from diffusers_ext.pipelines.checks import check_timesteps
from diffusers_ext.pipelines.ldm.base import LDMBasePipeline
from diffusers_ext.training_utils import loop
from diffusers_ext.training_utils.args import DataArgs, TrainArgs

LOSS_SAMPLES = 64  # held-out pictures for the loss


@dataclass
class Validation:
    """Figures and pictures of held-out rows, cut in their middle; every draw is the same each time."""

    pipe: LDMBasePipeline
    compute_loss: Callable[..., dict[str, Tensor]]
    rows: NamedRows
    sample_format: SampleFormat
    args: LDMArgs
    data: DataArgs
    train: TrainArgs
    device: torch.device

    def check(self) -> None:
        """Refuses before the first step what the pipeline would refuse after it.

        Raises:
            ValueError: the guidance, the number of steps or eta does not fit the network and its scheduler.
        """
        args, side, scheduler = self.args, self.data.resolution, copy.deepcopy(self.pipe.scheduler)
        default = self.pipe.config.get("default_guidance_scale")
        scale = next((value for value in (args.guidance_scale, default) if value is not None), 1.0)
        steps = args.num_inference_steps
        try:
            self.pipe.check_inputs(1, side, side, num_inference_steps=steps, guidance_scale=scale, eta=args.eta)
            scheduler.set_timesteps(steps)
            check_timesteps(scheduler, steps)
        except ValueError as error:
            raise ValueError(f"--guidance_scale, --num_inference_steps or --eta: {error}") from error

    def batch(self, indices: range) -> dict[str, Any]:
        """Collated samples of these rows."""
        data = replace(self.data, center_crop=True, random_flip=False)
        read = partial(read_sample, args=self.args, data=data, sample_format=self.sample_format)
        samples = [read(self.rows[i], loop.keyed_generator(self.train.seed, i)) for i in indices]
        return loop.send_to_device(default_collate(samples), self.device)

    def losses(self, model: nn.Module) -> dict[str, float]:
        """Mean losses of the first held-out pictures."""
        count, sums = min(LOSS_SAMPLES, len(self.rows)), {}
        for start in range(0, count, self.train.train_batch_size):
            indices = range(start, min(start + self.train.train_batch_size, count))
            draws = [loop.keyed_generator(self.train.seed, i, loop.LOSS_STREAM) for i in indices]
            for name, value in self.compute_loss(model, self.batch(indices), draws).items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(indices)
        return {f"validation_{name}": value / count for name, value in sums.items()}

    def pictures(self) -> tuple[Image.Image, dict[str, float]]:
        """A sheet of samples, and the peak signal-to-noise ratio where the original is the one right answer.

        Where conditions are pictures they are in the first row, and the originals in the last; samples of layouts are
        shown once more with their boxes.
        """
        task, count = self.args.task, min(self.args.num_validation_images, len(self.rows))
        batch = self.batch(range(count))
        condition, options = self.condition(batch, range(count)), {}
        if task == "text":
            count = len(condition["prompt"])
        if task in ("unconditional", "class", "text", "layout"):
            options = {"height": self.data.resolution, "width": self.data.resolution}
        if task != "unconditional":
            options["guidance_scale"] = self.args.guidance_scale
        images = self.pipe(
            **condition, **options, num_inference_steps=self.args.num_inference_steps, eta=self.args.eta,
            generator=[torch.Generator().manual_seed(i) for i in range(count)], output_type="pt",
        ).images  # fmt: skip
        images = 2 * images.float() - 1
        if task == "layout":
            images = torch.cat([images, with_boxes(self.pipe, images, condition)])
        shown = self.shown(batch)
        if shown is None:
            return picture_grid(images, columns=min(count, 8)), {}
        figures = {} if task == "semantic" else {"validation_psnr": psnr(images, batch["image"])}
        return picture_grid(torch.cat([shown, images, batch["image"]]), columns=count), figures

    def condition(self, batch: dict[str, Any], indices: range) -> dict[str, Any]:
        """What the pipeline is called with for a batch."""
        task = self.args.task
        if task == "unconditional":
            return {"batch_size": len(indices)}
        if task == "class":
            return {"class_labels": batch["label"].tolist()}
        if task == "text":
            return {"prompt": self.args.validation_prompts or batch["text"]}
        if task == "layout":
            examples = [self.rows[i] for i in indices]
            rows = [
                read_objects(row, row[self.data.image_column].size, self.args, self.sample_format) for row in examples
            ]
            rows = [objects[: self.pipe.config["max_objects"]] for objects in rows]
            boxes = [[(x, y, x + w, y + h) for x, y, w, h in (item.box for item in row)] for row in rows]
            return {"boxes": boxes, "names": [[item.category for item in row] for row in rows]}
        if task == "semantic":
            return {"label_map": batch["map"]}
        if task == "super_resolution":
            return {"image": (batch["low"] + 1) / 2}
        return {"image": (batch["image"] + 1) / 2, "mask_image": batch["mask"].bool()}

    def shown(self, batch: dict[str, Any]) -> Tensor | None:
        """The conditions as pictures (b, 3, h, w) in [-1, 1], where they are any."""
        if self.args.task == "semantic":
            palette = self.pipe.label_palette or arbitrary_palette(self.sample_format.num_labels or 0)
            colors = torch.tensor(palette, device=self.device)[batch["map"]]  # (b, h, w, 3)
            return colors.permute(0, 3, 1, 2) / 127.5 - 1
        if self.args.task == "super_resolution":
            return F.interpolate(batch["low"], size=batch["image"].shape[-2:])
        return masked_image(batch["image"], batch["mask"]) if self.args.task == "inpainting" else None


def with_boxes(pipe: LDMBasePipeline, images: Tensor, condition: dict[str, Any]) -> Tensor:
    """Pictures (b, 3, h, w) in [-1, 1] with the boxes that they were to follow."""
    names = pipe.class_names
    labels = [[names[i] if names else str(i) for i in row] for row in condition["names"]]
    pictures = pipe.draw_boxes(pipe.image_processor.postprocess(images), condition["boxes"], labels)
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2) / 127.5 - 1


def arbitrary_palette(count: int) -> list[list[int]]:
    """Colours that differ from label to label."""
    return [[(37 + 67 * label) % 256, (91 + 141 * label) % 256, (200 + 29 * label) % 256] for label in range(count)]
