"""Pictures with a hole, filled."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from diffusers_ext.conditions.inpainting import masked_image
from diffusers_ext.conditions.masks import random_mask
from diffusers_ext.data.crops import Crop
from diffusers_ext.pipelines.ldm.first_stage import encode_masked_image
from diffusers_ext.pipelines.ldm.pipeline_ldm_inpaint import LDMInpaintPipeline
from diffusers_ext.training.ldm.args import LDMArgs
from diffusers_ext.training.ldm.tasks.base import Task


class Inpainting(Task):
    pipeline = LDMInpaintPipeline
    has_one_answer = True

    def read(
        self, example: dict[str, Any], image: Tensor | None, crop: Crop, generator: Generator
    ) -> dict[str, Tensor | str]:
        return {"mask": random_mask(self.data.resolution, self.data.resolution, generator)}

    @staticmethod
    def concatenated_channels(args: LDMArgs, latent_channels: int) -> int:
        return latent_channels + 1

    @torch.no_grad()
    def condition(self, pipe: Any, batch: dict[str, Any]) -> Tensor:
        """The encoded picture with a hole, and the mask, (b, c + 1, h, w)."""
        with torch.autocast(batch["image"].device.type, enabled=False):
            return encode_masked_image(pipe.vqvae, batch["image"], batch["mask"].float())

    def call(self, pipe: Any, batch: dict[str, Any], examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        image, mask = (batch["image"] + 1) / 2, batch["mask"].bool()
        return {"image": image, "mask_image": mask, "guidance_scale": self.args.guidance_scale}

    def shown(self, pipe: Any, batch: dict[str, Any]) -> Tensor:
        return masked_image(batch["image"], batch["mask"])
