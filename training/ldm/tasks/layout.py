"""Pictures of named boxes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from diffusers_ext.conditions.layout import LayoutObject, LayoutTokenizer
from diffusers_ext.data.annotations import FLAGS, NamedRows, box_names, layout_objects
from diffusers_ext.data.crops import Crop
from diffusers_ext.data.labels import Classes, find_classes
from diffusers_ext.models.encoders_ldm import LDMLayoutEncoder
from diffusers_ext.pipelines.ldm.pipeline_ldm_layout import LDMLayoutPipeline
from diffusers_ext.training.ldm.args import LDMArgs
from diffusers_ext.training.ldm.tasks.base import Task

LAYOUT_FLAGS: dict[str, tuple[str, ...]] = {"none": (), "group": FLAGS[:1], "all": FLAGS}


@dataclass
class Layout(Task):
    """Boxes become tokens where the row is read.

    Args:
        layout: How.
        categories: Classes in the data to numbers of categories.
    """

    pipeline = LDMLayoutPipeline
    conditioner = "layout_encoder"
    raw_condition = "tokens"  # (b, l)

    layout: LayoutTokenizer | None = None
    categories: dict[str | int, int] | None = None

    @property
    def flags(self) -> tuple[str, ...]:
        return LAYOUT_FLAGS[self.args.layout_flags]

    def columns(self) -> tuple[str, ...]:
        return (self.args.boxes_column, self.args.box_names_column, *self.flags)

    def names_in(self, sets: Sequence[NamedRows]) -> Classes:
        if self.data.dataset_name == "scenes":
            return find_classes([rows.dataset for rows in sets], self.data)
        found = [self._names(rows) for rows in sets]
        names = sorted({name for part in found for name in part}, key=lambda name: (isinstance(name, str), name))
        if all(isinstance(name, int) for name in names):
            return Classes(max(map(int, names), default=-1) + 1)
        return Classes(len(names), [str(name) for name in names])

    def check_rows(self, rows: NamedRows) -> None:
        if self.categories is not None and (unknown := set(self._names(rows)) - self.categories.keys()):
            raise ValueError(
                f"The column {self.args.box_names_column!r} holds {sorted(map(str, unknown))[:5]}, which the model's "
                f"{len(self.categories)} categories lack."
            )

    def _names(self, rows: NamedRows) -> Iterable[str | int]:
        return box_names(rows.dataset, self.args.box_names_column, self.data.image_column)

    def read(
        self, example: dict[str, Any], image: Tensor | None, crop: Crop, generator: Generator
    ) -> dict[str, Tensor | str]:
        """The tokens (l,) of the boxes in random order, and of the crop."""
        assert self.layout is not None
        objects = self.objects(example, crop.size)
        shuffle = Random(int(torch.randint(2**62, (), generator=generator)))
        return {"tokens": self.layout.encode(objects, crop=crop.box, flip=crop.flip, shuffle=shuffle)}

    def objects(self, example: dict[str, Any], size: tuple[int, int]) -> list[LayoutObject]:
        """The boxes of a row whose picture has this (width, height)."""
        args = self.args
        return layout_objects(
            example[args.boxes_column], example[args.box_names_column], self.categories or {}, size,
            box_format=args.box_format, flags={name: example[name] for name in self.flags},
        )  # fmt: skip

    @staticmethod
    def new_conditioner(args: LDMArgs, num_labels: int | None, vocab_size: int, num_stages: int) -> LDMLayoutEncoder:
        encoder = LDMLayoutEncoder(
            args.layout_vocab_size, 3 * args.max_objects + 2, args.cross_attention_dim, args.encoder_layers,
            args.encoder_attention_heads, args.encoder_head_dim,
        )  # fmt: skip
        with torch.no_grad():  # both tables are drawn with a standard deviation of 1
            encoder.token_embedding.weight.mul_(args.token_init_std)
            encoder.position_embedding.weight.mul_(args.token_init_std)
        return encoder

    def new_config(self, names: Classes | None) -> dict[str, Any]:
        found = {} if names is None else {"class_names": names.names}
        return {
            **super().new_config(names),
            **found,
            "num_classes": None if names is None else names.count,
            "max_objects": self.args.max_objects,
            "use_group_flag": self.args.layout_flags != "none",
            "use_other_flags": self.args.layout_flags == "all",
        }

    def known_labels(self, pipe: Any) -> int | None:
        return pipe.config["num_classes"] or len(pipe.class_names or ()) or None

    def check_pretrained(self, pipe: Any) -> None:
        flags = "all" if pipe.config["use_other_flags"] else "group" if pipe.config["use_group_flag"] else "none"
        if self.flags and self.args.layout_flags != flags:
            raise ValueError(
                f"{self.args.pretrained_model_name_or_path!r} was trained with --layout_flags {flags}, got "
                f"{self.args.layout_flags}."
            )

    def follow(self, pipe: Any) -> None:
        super().follow(pipe)
        self.layout = layout = pipe.layout_tokenizer
        names: Iterable[str | int] = pipe.class_names or range(layout.num_classes)
        self.categories = {name: number for number, name in enumerate(names)}

    def checkpoint_gradients(self, conditioner: LDMLayoutEncoder) -> None:
        conditioner.enable_gradient_checkpointing()

    def null_condition(self, pipe: Any) -> Tensor:
        return torch.full((pipe.layout_tokenizer.length,), pipe.layout_tokenizer.none_token)

    def call(self, pipe: Any, batch: dict[str, Any], examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = [self.objects(row, row[self.data.image_column].size) for row in examples]
        rows = [objects[: pipe.config["max_objects"]] for objects in rows]
        boxes = [[(x, y, x + w, y + h) for x, y, w, h in (item.box for item in row)] for row in rows]
        names = [[item.category for item in row] for row in rows]
        return {"boxes": boxes, "names": names, "guidance_scale": self.args.guidance_scale, **self.square()}

    def annotated(self, pipe: Any, images: Tensor, call: dict[str, Any]) -> Tensor:
        names = pipe.class_names
        labels = [[names[i] if names else str(i) for i in row] for row in call["names"]]
        drawn = pipe.draw_boxes(pipe.image_processor.postprocess(images), call["boxes"], labels)
        boxed = torch.from_numpy(np.stack([np.asarray(picture) for picture in drawn])).permute(0, 3, 1, 2)
        return torch.cat([images, boxed / 127.5 - 1])
