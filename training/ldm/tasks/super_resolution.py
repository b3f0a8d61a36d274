"""Large pictures of small ones."""

from collections.abc import Sequence
from typing import Any

from torch import Generator, Tensor
from torch.nn import functional as F

from diffusers_ext.data.crops import Crop, draw_patch
from diffusers_ext.degradations.bsr import degrade_bicubic, degrade_bsr
from diffusers_ext.pipelines.ldm.pipeline_ldm_upscale import LDMUpscalePipeline
from diffusers_ext.training.ldm.args import LDMArgs
from diffusers_ext.training.ldm.tasks.base import Task


class SuperResolution(Task):
    """The small picture is the row's own (`--low_column`), or the large one degraded, which is then resized by area as
    in the original.
    """

    pipeline = LDMUpscalePipeline
    stock = "LDMSuperResolutionPipeline"
    raw_condition = "low"  # (b, 3, h, w)
    has_one_answer = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.resampling = "bicubic" if self.args.low_column else "area"

    def columns(self) -> tuple[str, ...]:
        return (self.args.low_column,) if self.args.low_column else ()

    def crop(self, size: tuple[int, int], generator: Generator) -> Crop:
        if not self.args.low_column:
            return super().crop(size, generator)
        return draw_patch(
            size, self.data.resolution, generator, multiple=self.factor, center_crop=self.data.center_crop,
            random_flip=self.data.random_flip,
        )  # fmt: skip

    def read(
        self, example: dict[str, Any], image: Tensor | None, crop: Crop, generator: Generator
    ) -> dict[str, Tensor | str]:
        """The small picture (3, h / factor, w / factor)."""
        assert image is not None  # a cache is refused
        if self.args.low_column:
            low = example[self.args.low_column]
            if tuple(self.factor * side for side in low.size) != crop.size:
                raise ValueError(
                    f"Its small picture in {self.args.low_column!r} has {low.width}x{low.height} pixels, the large "
                    f"one {crop.size[0]}x{crop.size[1]}: expected a factor of {self.factor}, that of the first stage."
                )
            return {"low": crop.image(low, image.shape[1] // self.factor)}
        if self.args.degradation == "bicubic":
            return {"low": degrade_bicubic(image, self.factor)}
        light = self.args.degradation == "bsr_light"
        return {"low": degrade_bsr(image, self.factor, generator, light=light)}

    @staticmethod
    def concatenated_channels(args: LDMArgs, latent_channels: int) -> int:
        return 3

    def call(self, pipe: Any, batch: dict[str, Any], examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"image": (batch["low"] + 1) / 2, "guidance_scale": self.args.guidance_scale}

    def shown(self, pipe: Any, batch: dict[str, Any]) -> Tensor:
        return F.interpolate(batch["low"], size=batch["image"].shape[-2:])
