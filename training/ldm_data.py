"""The data of train_ldm.py: the columns that a task reads, what its classes are called, a row as a training sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from ldm_args import LDMArgs
from torch import Tensor

from diffusers_ext.conditions.layout import LayoutObject, LayoutTokenizer
from diffusers_ext.conditions.masks import random_mask
from diffusers_ext.conditions.palettes import SCENES_CLASSES, SCENES_PALETTE
from diffusers_ext.data.annotations import FLAGS, ROW, NamedRows, box_names, check_labels, layout_objects
from diffusers_ext.data.crops import Crop, draw_crop, draw_patch
from diffusers_ext.data.labels import count_map_labels, find_classes
from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.data.preprocessing import choose_text
from diffusers_ext.degradations.bsr import degrade_bicubic, degrade_bsr
from diffusers_ext.training_utils.args import DataArgs

LAYOUT_FLAGS: dict[str, tuple[str, ...]] = {"none": (), "group": FLAGS[:1], "all": FLAGS}


@dataclass(frozen=True)
class Names:
    """What the classes of a task are called: `names` is None where they only have numbers."""

    count: int
    names: list[str] | None = None
    palette: list[list[int]] | None = None


@dataclass(frozen=True)
class SampleFormat:
    """What reading a sample depends on besides the options.

    Args:
        factor: pixels a side of a latent.
        num_labels: classes, categories or labels that the networks know.
        layout: how boxes become tokens.
        categories: names in the data to numbers of categories.
    """

    factor: int
    num_labels: int | None = None
    layout: LayoutTokenizer | None = None
    categories: dict[str | int, int] | None = None


def condition_columns(args: LDMArgs, data: DataArgs) -> tuple[str, ...]:
    """The columns that the task reads beside the picture."""
    return {
        "class": (data.label_column,),
        "text": (data.caption_column,),
        "layout": (args.boxes_column, args.box_names_column, *LAYOUT_FLAGS[args.layout_flags]),
        "semantic": (args.semantic_column,),
        "super_resolution": (args.low_column,) if args.low_column else (),
    }.get(args.task, ())


def load_rows(args: LDMArgs, data: DataArgs) -> tuple[NamedRows, NamedRows]:
    """Training and validation set of pictures with what the task needs; rows also tell what an error calls them."""
    sets = load_pictures(data, columns=condition_columns(args, data))
    train_set, validation_set = (NamedRows(dataset, data.image_column) for dataset in sets)
    return train_set, validation_set


def find_names(sets: Sequence[NamedRows], args: LDMArgs, data: DataArgs) -> Names | None:
    """The classes of the task's data, or None for a task without.

    Args:
        sets: training and validation set; what is held out may hold a name that no other picture has.

    Raises:
        ValueError: a label is none, or their number is not that of `--num_labels`.
    """
    if args.task not in ("class", "layout", "semantic"):
        return None
    found = _names_in_data(sets, args, data)
    if args.num_labels is not None and args.num_labels != found.count:
        # numbers, of which the data need not hold all; `check_rows` names a picture with a label that is too large
        if found.names is None and (found.count < args.num_labels or args.task == "class"):
            return Names(args.num_labels)
        raise ValueError(f"--num_labels={args.num_labels}, but the data have {found.count} classes.")
    return found


def _names_in_data(sets: Sequence[NamedRows], args: LDMArgs, data: DataArgs) -> Names:
    datasets = [rows.dataset for rows in sets]
    if args.task == "semantic":
        if data.dataset_name == "scenes":
            return Names(len(SCENES_CLASSES), list(SCENES_CLASSES), SCENES_PALETTE.tolist())
        return Names(args.num_labels or count_map_labels(datasets, args.semantic_column, data))
    if args.task == "layout" and data.dataset_name != "scenes":
        found = [box_names(rows.dataset, args.box_names_column, data.image_column) for rows in sets]
        names = sorted({name for part in found for name in part}, key=lambda name: (isinstance(name, str), name))
        if all(isinstance(name, int) for name in names):
            return Names(max(map(int, names), default=-1) + 1)
        return Names(len(names), [str(name) for name in names])
    return Names(*find_classes(datasets, data))


def check_rows(rows: NamedRows, sample_format: SampleFormat, args: LDMArgs, data: DataArgs) -> None:
    """Refuses now labels that would stop the training in its middle; `scenes` needs no check.

    Raises:
        ValueError: naming the picture.
    """
    if data.dataset_name == "scenes":
        return
    if args.task == "class" and sample_format.num_labels is not None:
        check_labels(rows.dataset, data.label_column, data.image_column, sample_format.num_labels)
    if args.task == "layout" and sample_format.categories is not None:
        unknown = (
            set(box_names(rows.dataset, args.box_names_column, data.image_column)) - sample_format.categories.keys()
        )
        if unknown:
            raise ValueError(
                f"The column {args.box_names_column!r} holds {sorted(map(str, unknown))[:5]}, which the model's "
                f"{len(sample_format.categories)} categories lack."
            )


# At module level and without networks, so that loader processes can be started with it on every platform.


def read_sample(
    example: dict[str, Any], generator: torch.Generator, args: LDMArgs, data: DataArgs, sample_format: SampleFormat
) -> dict[str, Tensor | str]:
    """A row as a training sample: the picture (or its cached moments) and the task's raw condition, cropped alike.

    Draws, in this order: four of the crop, then those of the condition.

    Raises:
        ValueError: the row does not fit; the message names its picture.
    """
    sample: dict[str, Any] = {"moments": example["moments"]} if "moments" in example else {}
    try:
        size = example["size"].tolist() if sample else example[data.image_column].size
        crop = choose_crop(tuple(size), generator, args, data, sample_format)
        if not sample:
            sample["image"] = cut_picture(example, crop, args, data)
        return sample | read_condition(example, sample, crop, generator, args, data, sample_format)
    except ValueError as error:
        raise ValueError(f"{example[ROW]}: {error}") from error


def read_picture(
    example: dict[str, Any], generator: torch.Generator | None = None, *, args: LDMArgs, data: DataArgs,
    sample_format: SampleFormat,
) -> dict[str, Tensor]:  # fmt: skip
    """The picture of `read_sample` alone, with its draws, and the (width, height) that it had in its file."""
    size = example[data.image_column].size
    try:
        crop = choose_crop(size, generator or torch.Generator(), args, data, sample_format)
        return {"image": cut_picture(example, crop, args, data), "size": torch.tensor(size)}
    except ValueError as error:
        raise ValueError(f"{example[ROW]}: {error}") from error


def cut_picture(example: dict[str, Any], crop: Crop, args: LDMArgs, data: DataArgs) -> Tensor:
    """The picture (3, h, w); as in the original, pictures that are to be degraded are resized by area."""
    shrinks = args.task == "super_resolution" and not args.low_column
    return crop.image(example[data.image_column], data.resolution, "area" if shrinks else "bicubic")


def choose_crop(
    size: tuple[int, int], generator: torch.Generator, args: LDMArgs, data: DataArgs, sample_format: SampleFormat
) -> Crop:
    options = {"center_crop": data.center_crop, "random_flip": data.random_flip}
    if args.low_column:
        return draw_patch(size, data.resolution, generator, multiple=sample_format.factor, **options)
    return draw_crop(size, data.resolution, generator, scale=args.resolved_crop_scale, **options)


def read_condition(
    example: dict[str, Any], sample: dict[str, Any], crop: Crop, generator: torch.Generator, args: LDMArgs,
    data: DataArgs, sample_format: SampleFormat,
) -> dict[str, Tensor | str]:  # fmt: skip
    """The raw condition of a row whose picture was cut by `crop`."""
    if args.task == "class":
        return {"label": torch.tensor(int(example[data.label_column]))}
    if args.task == "text":
        return {"text": choose_text(example[data.caption_column], generator)}
    if args.task == "layout":
        assert sample_format.layout is not None
        objects = read_objects(example, crop.size, args, sample_format)
        return {"tokens": layout_tokens(objects, crop, generator, sample_format.layout)}
    if args.task == "semantic":
        labels = crop.labels(example[args.semantic_column], data.resolution)
        count = sample_format.num_labels or 0
        if not 0 <= int(labels.min()) <= int(labels.max()) < count:
            raise ValueError(
                f"Its label map in {args.semantic_column!r} holds {int(labels.min())} to {int(labels.max())}, but "
                f"there are {count} labels, 0 to {count - 1} (--num_labels): map others onto these."
            )
        return {"map": labels}
    if args.task == "super_resolution":
        return {"low": low_resolution(example, sample["image"], crop, generator, args, sample_format.factor)}
    if args.task == "inpainting":
        return {"mask": random_mask(data.resolution, data.resolution, generator)}
    return {}


def read_objects(
    example: dict[str, Any], size: tuple[int, int], args: LDMArgs, sample_format: SampleFormat
) -> list[LayoutObject]:
    """The boxes of a row whose picture has this (width, height)."""
    return layout_objects(
        example[args.boxes_column], example[args.box_names_column], sample_format.categories or {}, size,
        box_format=args.box_format, flags={name: example[name] for name in LAYOUT_FLAGS[args.layout_flags]},
    )  # fmt: skip


def layout_tokens(
    objects: list[LayoutObject], crop: Crop, generator: torch.Generator, tokenizer: LayoutTokenizer
) -> Tensor:
    """The tokens (l,) of boxes in random order, and of the crop."""
    shuffle = Random(int(torch.randint(2**62, (), generator=generator)))
    return tokenizer.encode(objects, crop=crop.box, flip=crop.flip, shuffle=shuffle)


def low_resolution(
    example: dict[str, Any], image: Tensor, crop: Crop, generator: torch.Generator, args: LDMArgs, factor: int
) -> Tensor:
    """The small picture (3, h / factor, w / factor): the row's own, or the large one degraded."""
    if args.low_column:
        low = example[args.low_column]
        if tuple(factor * side for side in low.size) != crop.size:
            raise ValueError(
                f"Its small picture in {args.low_column!r} has {low.width}x{low.height} pixels, the large one "
                f"{crop.size[0]}x{crop.size[1]}: expected a factor of {factor}, that of the first stage."
            )
        return crop.image(low, image.shape[1] // factor)
    if args.degradation == "bicubic":
        return degrade_bicubic(image, factor)
    return degrade_bsr(image, factor, generator, light=args.degradation == "bsr_light")
