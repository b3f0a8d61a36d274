"""What train_cascaded.py shows as it runs: the loss of held-out images, and what the cascade draws."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffusers_ext.data.annotations import NamedRows
from diffusers_ext.evaluation.image_quality import picture_grid, psnr
from diffusers_ext.pipelines.cascaded.chain import STAGES, plan_run
from diffusers_ext.pipelines.cascaded.pipeline_cascaded import CascadedDiffusionPipeline
from diffusers_ext.pipelines.cascaded.sources import StageSource
from diffusers_ext.training.cascaded.args import CascadedArgs
from diffusers_ext.training.cascaded.data import Reader
from diffusers_ext.training.cascaded.objective import CascadedObjective
from diffusers_ext.training_utils.args import TrainArgs
from diffusers_ext.training_utils.validation import Validation


@dataclass
class Neighbours:
    """The stage that is trained, in its place among those that `--stages_before` and `--stages_after` name.

    Neighbours are read when their turn comes and freed after it. Without stages below it, an upscaling stage starts
    from given small images.

    Args:
        pipe: The stage.
        args: The options.
    """

    pipe: Any
    args: CascadedArgs

    def __post_init__(self):
        before, after = self.args.stages_before or [], self.args.stages_after or []
        first = 1 if self.args.upscales and not before else 0
        if first + len(before) + 1 + len(after) > len(STAGES):
            raise ValueError(
                f"--stages_before={before} and --stages_after={after}: with this one a cascade has at most "
                f"{len(STAGES) - first} stages here."
            )
        self.needs_image = first == 1
        self.own = STAGES[first + len(before)]
        self.names = STAGES[first : first + len(before) + 1 + len(after)]
        places = dict(zip(self.names, [*before, None, *after], strict=True))
        self.others = {name: place for name, place in places.items() if place is not None}
        self.cascade = CascadedDiffusionPipeline(**{self.own: self.pipe}, hub_stages=self.others)
        self.cascade.set_progress_bar_config(disable=True)
        # other stages may have other numbers for the same names
        self.class_names = self.pipe.class_names if all(map(knows_names, self.others.values())) else None
        # a base alone stops where its training did, which in a cascade only the next stage could ask it for
        self.is_alone = self.names == ("base",)

    def call(self, labels: list[int] | None, low: Tensor | None, count: int) -> dict[str, Any]:
        """What the cascade is called with.

        Args:
            labels: Classes of `count` images.
            low: Small images (count, 3, h, w) in [-1, 1], for a cascade that starts from such.
        """
        args, told = self.args, labels
        if labels is not None and self.class_names is not None:
            told = [self.class_names[label] for label in labels]
        if self.is_alone:
            return {
                "class_labels": told,
                "num_inference_steps": args.num_inference_steps,
                "guidance_scale": args.guidance_scale,
                "num_images_per_prompt": count if labels is None else 1,
            }
        drawn_freely = labels is None and not self.needs_image
        return {
            "class_labels": told,
            "image": (low + 1) / 2 if self.needs_image and low is not None else None,
            "num_inference_steps": args.num_inference_steps,
            "guidance_scale": [args.guidance_scale if name == self.own else None for name in self.names],
            "noise_level": [args.noise_level if name == self.own else None for name in self.names if name != "base"],
            "num_images_per_prompt": count if drawn_freely else 1,
        }

    def check(self, labels: list[int] | None, low: Tensor | None) -> None:
        """Refuses now what the cascade would refuse after hours.

        Raises:
            ValueError: Stages that do not chain, or a guidance, a number of steps or a level that does not fit.
        """
        call, side = self.call(labels, low, 1), self.pipe.unet.config["sample_size"]
        parts = {name: StageSource(self.others[name]) if name in self.others else self.pipe for name in self.names}
        try:
            if self.is_alone:
                self.pipe.check_components()
                steps, scale = call["num_inference_steps"], call["guidance_scale"]
                self.pipe.check_inputs(1, side, side, num_inference_steps=steps, guidance_scale=scale)
                self.pipe.set_timesteps(steps, None)
                return
            images = call.pop("image")
            plan_run(
                parts,
                **call,
                images=images,
                prompt=None,
                negative_prompt=None,
                conditioning_mode=None,
                start_stage=None,
                stop_stage=None,
                eta=0.0,
                generator=None,
                latents=None,
            )
        except (TypeError, ValueError) as error:
            options = "--stages_before, --stages_after, --guidance_scale, --noise_level or --num_inference_steps"
            raise ValueError(f"{options}: {error}") from error

    def draw(self, labels: list[int] | None, low: Tensor | None, count: int) -> list[Tensor]:
        """Images (count, 3, h, w) in [-1, 1] of every stage, in order; image k depends on k alone."""
        generator = [torch.Generator().manual_seed(i) for i in range(count)]
        options: dict[str, Any] = {"generator": generator, "output_type": "pt"}
        if self.is_alone:
            drawn = [self.pipe(**self.call(labels, low, count), **options).images]
        else:
            made = self.cascade(**self.call(labels, low, count), **options, return_intermediates=True).intermediates
            drawn = list((made or {}).values())
        return [2 * images.float().to(self.pipe.device) - 1 for images in drawn]


def knows_names(place: str) -> bool:
    """Whether a saved stage has names for its classes."""
    try:
        return bool(DiffusionPipeline.load_config(place).get("class_names"))
    except (OSError, ValueError):  # no stage, which `check` says
        return False


class CascadedValidation(Validation):
    """Held-out images, cut in their middle."""

    def __init__(
        self, objective: CascadedObjective, reader: Reader, rows: NamedRows, train: TrainArgs, accelerator: Accelerator
    ):
        """Refuses before the first step what the pipelines would refuse after it.

        Raises:
            ValueError: See `Neighbours`.
        """
        super().__init__(objective, reader.without_augmentation(), rows, train, accelerator)
        self.neighbours = Neighbours(objective.pipe, objective.args)
        (batch, _), *_ = self.batches(1)
        self.neighbours.check(*self.conditions(batch))

    def pictures(self) -> tuple[Image.Image, dict[str, float]]:
        """A row for each stage; where a cascade starts from small images these come first, and the true large ones
        last, from which the samples' peak signal-to-noise ratio is measured.
        """
        count = min(self.objective.args.num_validation_images, len(self.rows))
        (batch, _), *_ = self.batches(count)
        rows = self.neighbours.draw(*self.conditions(batch), count)
        figures = {}
        if self.neighbours.needs_image:
            figures = {"validation_psnr": psnr(rows[0], batch["image"])}
            rows = [batch["low"], *rows, batch["image"]]
        side = max(images.shape[-1] for images in rows)
        shown = torch.cat([F.interpolate(images, (side, side)) for images in rows])  # nearest: pixels stay pixels
        return picture_grid(shown, columns=count if len(rows) > 1 else min(count, 8)), figures

    @staticmethod
    def conditions(batch: dict[str, Tensor]) -> tuple[list[int] | None, Tensor | None]:
        """Classes and small images of a batch, as far as the stage has them."""
        return batch["label"].tolist() if "label" in batch else None, batch.get("low")
