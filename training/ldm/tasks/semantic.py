"""Pictures of a label map."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from diffusers_ext.conditions.palettes import SCENES_CLASSES, SCENES_PALETTE
from diffusers_ext.data.annotations import NamedRows
from diffusers_ext.data.crops import Crop
from diffusers_ext.data.labels import Classes, count_map_labels
from diffusers_ext.models.encoders_ldm import LDMSpatialRescaler
from diffusers_ext.pipelines.ldm.pipeline_ldm_semantic import LDMSemanticPipeline
from diffusers_ext.training.ldm.args import LDMArgs
from diffusers_ext.training.ldm.tasks.base import Task


class Semantic(Task):
    pipeline = LDMSemanticPipeline
    conditioner = "spatial_rescaler"
    raw_condition = "map"  # (b, H, W)

    def columns(self) -> tuple[str, ...]:
        return (self.args.semantic_column,)

    def names_in(self, sets: Sequence[NamedRows]) -> Classes:
        if self.data.dataset_name == "scenes":
            return Classes(len(SCENES_CLASSES), list(SCENES_CLASSES))
        datasets = [rows.dataset for rows in sets]
        return Classes(self.args.num_labels or count_map_labels(datasets, self.args.semantic_column, self.data))

    def read(
        self, example: dict[str, Any], image: Tensor | None, crop: Crop, generator: Generator
    ) -> dict[str, Tensor | str]:
        labels = crop.labels(example[self.args.semantic_column], self.data.resolution)
        count = self.num_labels or 0
        if not 0 <= int(labels.min()) <= int(labels.max()) < count:
            raise ValueError(
                f"Its label map in {self.args.semantic_column!r} holds {int(labels.min())} to {int(labels.max())}, "
                f"but there are {count} labels, 0 to {count - 1} (--num_labels): map others onto these."
            )
        return {"map": labels}

    @staticmethod
    def concatenated_channels(args: LDMArgs, latent_channels: int) -> int:
        return args.rescaler_channels

    @staticmethod
    def new_conditioner(
        args: LDMArgs, num_labels: int | None, vocab_size: int, num_stages: int
    ) -> LDMSpatialRescaler:  # fmt: skip
        assert num_labels is not None
        return LDMSpatialRescaler(num_labels, args.rescaler_channels, num_stages)

    def new_config(self, names: Classes | None) -> dict[str, Any]:
        found = {} if names is None else {"label_names": names.names}
        if self.data.dataset_name == "scenes":
            found["label_palette"] = SCENES_PALETTE.tolist()
        return {**super().new_config(names), **found}

    def known_labels(self, pipe: Any) -> int:
        return pipe.spatial_rescaler.config["in_channels"]

    def call(self, pipe: Any, batch: dict[str, Any], examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"label_map": batch["map"], "guidance_scale": self.args.guidance_scale}

    def shown(self, pipe: Any, batch: dict[str, Any]) -> Tensor:
        labels = batch["map"]
        palette = torch.tensor(pipe.label_palette or arbitrary_palette(self.num_labels or 0), device=labels.device)
        return palette[labels].permute(0, 3, 1, 2) / 127.5 - 1  # from (b, h, w, 3)


def arbitrary_palette(count: int) -> list[list[int]]:
    """Colours that differ from label to label."""
    return [[(37 + 67 * label) % 256, (91 + 141 * label) % 256, (200 + 29 * label) % 256] for label in range(count)]
