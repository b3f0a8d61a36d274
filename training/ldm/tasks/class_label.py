"""Pictures of a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from torch import Generator, Tensor

from diffusers_ext.data.annotations import NamedRows, check_labels
from diffusers_ext.data.crops import Crop
from diffusers_ext.data.labels import Classes, find_classes, follow_names
from diffusers_ext.models.encoders_ldm import LDMClassEmbedder
from diffusers_ext.pipelines.ldm.pipeline_ldm_class import LDMClassConditionalPipeline
from diffusers_ext.pipelines.listed_options import read_option
from diffusers_ext.training.ldm.args import LDMArgs
from diffusers_ext.training.ldm.tasks.base import Task

if TYPE_CHECKING:
    from datasets import Dataset


class ClassLabel(Task):
    pipeline = LDMClassConditionalPipeline
    conditioner = "class_embedder"
    raw_condition = "label"  # (b,)

    def columns(self) -> tuple[str, ...]:
        return (self.data.label_column,)

    def prepare(self, sets: tuple[Dataset, Dataset]) -> tuple[Dataset, Dataset]:
        place = self.args.pretrained_model_name_or_path
        if place is None:
            return sets
        known = read_option(DiffusionPipeline.load_config(place).get("class_names"))
        return follow_names(sets, self.data, known, place)

    def names_in(self, sets: Sequence[NamedRows]) -> Classes:
        return find_classes([rows.dataset for rows in sets], self.data)

    def check_rows(self, rows: NamedRows) -> None:
        if self.num_labels is not None:
            check_labels(rows.dataset, self.data.label_column, self.data.image_column, self.num_labels)

    def read(
        self, example: dict[str, Any], image: Tensor | None, crop: Crop, generator: Generator
    ) -> dict[str, Tensor | str]:
        return {"label": torch.tensor(int(example[self.data.label_column]))}

    @staticmethod
    def new_conditioner(
        args: LDMArgs, num_labels: int | None, vocab_size: int, num_stages: int
    ) -> LDMClassEmbedder:  # fmt: skip
        assert num_labels is not None
        null = num_labels if args.dropout_of_condition else None  # one more row
        return LDMClassEmbedder(num_labels + (null is not None), args.cross_attention_dim, null_class=null)

    def new_config(self, names: Classes | None) -> dict[str, Any]:
        found = {} if names is None else {"class_names": names.names}
        return {**found, "default_guidance_scale": self.args.guidance_scale}

    def known_labels(self, pipe: Any) -> int:
        config = pipe.class_embedder.config
        return config["num_class_embeds"] - (config["null_class"] is not None)

    def check_pretrained(self, pipe: Any) -> None:
        if self.args.dropout_of_condition and pipe.class_embedder.config["null_class"] is None:
            raise ValueError(
                f"{self.args.pretrained_model_name_or_path!r} has no null class that stands for a dropped condition: "
                "pass --cond_dropout_prob 0."
            )

    def null_condition(self, pipe: Any) -> Tensor:
        return torch.tensor(pipe.class_embedder.config["null_class"])

    def call(self, pipe: Any, batch: dict[str, Any], examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "class_labels": batch["label"].tolist(), "guidance_scale": self.args.guidance_scale, **self.square()
        }  # fmt: skip
