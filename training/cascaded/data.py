"""The data of train_cascaded.py: a picture, the smaller one of the same crop, and the class."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Generator, Tensor

from diffusers_ext.data.annotations import ROW, NamedRows
from diffusers_ext.data.crops import draw_crop
from diffusers_ext.data.labels import Classes, as_asked, find_classes, follow_names
from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.degradations.resizing import resize
from diffusers_ext.pipelines.listed_options import read_option
from diffusers_ext.training.cascaded.args import CascadedArgs
from diffusers_ext.training_utils.args import DataArgs


def load_rows(args: CascadedArgs, data: DataArgs) -> tuple[NamedRows, NamedRows]:
    """Training and validation set; rows also tell what an error calls them."""
    columns = (data.label_column,) if args.condition == "class" else ()
    sets, place = load_pictures(data, columns=columns), args.pretrained_model_name_or_path
    if columns and place is not None:
        sets = follow_names(sets, data, read_option(DiffusionPipeline.load_config(place).get("class_names")), place)
    train_set, validation_set = sets
    return NamedRows(train_set, data.image_column), NamedRows(validation_set, data.image_column)


def count_classes(sets: tuple[NamedRows, NamedRows], args: CascadedArgs, data: DataArgs) -> Classes | None:
    """The classes of the data; None for an unconditional stage.

    Raises:
        ValueError: a label is none, or their number is not that of `--num_labels`.
    """
    if args.condition != "class":
        return None
    return as_asked(find_classes([rows.dataset for rows in sets], data), args.num_labels)


# Without networks, so that loader processes can be started with it on every platform.
@dataclass(frozen=True)
class Reader:
    """Makes a training sample of a row: the picture, cut and mirrored, and what belongs to it.

    Args:
        args: What the stage is given.
        data: How pictures are cut.
    """

    args: CascadedArgs
    data: DataArgs

    def __call__(self, row: dict[str, Any], generator: Generator) -> dict[str, Tensor]:
        """The `image` (3, h, w) in [-1, 1], the `low` one (3, h', w') and the `label` (), where there are such.

        The small picture is made of the large one, so that both have one crop and one flip. Draws four numbers of the
        crop.

        Raises:
            ValueError: the row does not fit; the message names its picture.
        """
        args, data = self.args, self.data
        picture = row[data.image_column]
        try:
            crop = draw_crop(
                picture.size,
                data.resolution,
                generator,
                center_crop=data.center_crop,
                random_flip=data.random_flip,
            )
            image = crop.image(picture, data.resolution, args.downsampling)
        except ValueError as error:
            raise ValueError(f"{row[ROW]}: {error}") from error
        sample = {"image": image}
        if args.upscales:
            sample["low"] = make_smaller(image, args.low_side(data.resolution), args.downsampling)
        if args.condition == "class":
            sample["label"] = torch.tensor(int(row[data.label_column]))
        return sample

    def without_augmentation(self) -> "Reader":
        """The one of the validation: the centre, not mirrored."""
        return replace(self, data=self.data.without_augmentation())


def make_smaller(image: Tensor, side: int, downsampling: str) -> Tensor:
    """A square picture (3, h, h) in [-1, 1] with `side` pixels a side: as the stage before would have to draw it."""
    method = "area" if downsampling == "area" else "antialiased"
    return resize(image, side, side, method).clamp(-1, 1)  # bicubic overshoots
