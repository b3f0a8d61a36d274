"""Boxes, labels and names as users store them in columns, checked; every complaint names the picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import Dataset as TorchDataset

from ..conditions.layout import LayoutObject

if TYPE_CHECKING:
    from datasets import Dataset

BoxFormat = Literal["xyxy", "xywh", "xyxy_pixels", "xywh_pixels"]
FLAGS = ("is_group_of", "is_occluded", "is_depiction", "is_inside")
ROW = "row_name"  # the key under which `NamedRows` puts a row's name
_ROUNDING = 1e-4  # by which a box may leave its picture


@dataclass(frozen=True)
class RowName:
    """What an error calls a row: the file of its picture where there is one. Looked up when it is needed."""

    dataset: Dataset
    image_column: str
    index: int

    def __str__(self) -> str:
        value = column_values(self.dataset.select([self.index]), self.image_column)[0]
        if isinstance(value, Mapping):
            value = value.get("path")
        row = f"row {self.index}"
        return f"{os.fspath(value)!r} ({row})" if isinstance(value, str) and value else row


class NamedRows(TorchDataset):
    """A data set of pictures whose rows also hold their name, under `ROW`."""

    def __init__(self, dataset: Dataset, image_column: str):
        self.dataset, self.image_column = dataset, image_column
        self.source = dataset  # where the names are

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.dataset[index], ROW: RowName(self.source, self.image_column, index)}

    def select_columns(self, columns: list[str]) -> NamedRows:
        """The same rows with these columns alone; their names still tell the file of the picture."""
        selected = NamedRows(self.dataset.select_columns(columns), self.image_column)
        selected.source = self.source
        return selected


def relative_box(box: Sequence[float], box_format: BoxFormat, size: tuple[int, int]) -> tuple[float, ...]:
    """A box as (x, y, width, height) relative to its picture.

    Args:
        box: four numbers.
        box_format: `xyxy` (left, top, right, bottom) or `xywh`, relative to the picture or in `_pixels`.
        size: (width, height) of the picture.

    Raises:
        ValueError: not four numbers, a box without area, or one that leaves the picture.
    """
    numbers = list(box) if isinstance(box, (list, tuple)) else []
    if len(numbers) != 4 or not all(isinstance(n, (int, float)) for n in numbers):
        raise ValueError(f"A box is {box!r}: expected four numbers.")
    units = (*size, *size) if box_format.endswith("pixels") else (1, 1, 1, 1)
    x, y, third, fourth = (float(number) / unit for number, unit in zip(numbers, units, strict=True))
    width, height = (third - x, fourth - y) if box_format.startswith("xyxy") else (third, fourth)
    if not (width > 0 and height > 0):  # also NaN
        raise ValueError(f"The box {numbers} has no area as {box_format}: name its format with --box_format.")
    if not (min(x, y) >= -_ROUNDING and max(x + width, y + height) <= 1 + _ROUNDING):
        raise ValueError(
            f"The box {numbers} leaves its picture of {size[0]}x{size[1]} pixels as {box_format}: name its format "
            "with --box_format (relative numbers lie in [0, 1]), or cut it at the picture's border."
        )
    left, top = max(x, 0.0), max(y, 0.0)
    return left, top, min(x + width, 1.0) - left, min(y + height, 1.0) - top


def layout_objects(
    boxes: Sequence[Sequence[float]],
    names: Sequence[str | int],
    categories: Mapping[str | int, int],
    size: tuple[int, int],
    *,
    box_format: BoxFormat = "xyxy",
    flags: Mapping[str, Sequence[bool]] | None = None,
) -> list[LayoutObject]:
    """A picture's boxes as objects of a layout.

    Args:
        boxes: see `relative_box`.
        names: what each box holds, keys of `categories`.
        categories: name to class number.
        size: (width, height) of the picture.
        flags: some of `FLAGS`, each with one value a box.

    Raises:
        ValueError: there are no boxes, the lists differ in length, a name is unknown, or a box is refused.
    """
    if len(boxes) == 0:
        raise ValueError("It has no boxes: give it some, or leave it out.")
    lengths = {"names": len(names), **{name: len(values) for name, values in (flags or {}).items()}}
    for name, length in lengths.items():
        if length != len(boxes):
            raise ValueError(f"It has {len(boxes)} boxes, but {length} {name}: one a box is needed.")
    unknown = [name for name in names if name not in categories]
    if unknown:
        known = ", ".join(map(str, list(categories)[:8]))
        raise ValueError(f"The name {unknown[0]!r} is none of the {len(categories)} known ones ({known} ...).")
    return [
        LayoutObject(
            categories[name],
            relative_box(box, box_format, size),  # type: ignore[arg-type]  # four numbers
            **{flag: bool(values[number]) for flag, values in (flags or {}).items()},
        )
        for number, (box, name) in enumerate(zip(boxes, names, strict=True))
    ]


def column_values(dataset: Dataset, column: str) -> list[Any]:
    """All values of a column as they are stored, without decoding a picture."""
    table: Any = dataset.with_format("arrow").select_columns([column])[:]
    return table.column(column).to_pylist()


def box_names(dataset: Dataset, column: str, image_column: str) -> list[str | int]:
    """The different names in a column that holds a list of them in every row, sorted.

    Raises:
        ValueError: a row holds something else than a list of strings or integers; the message names its picture.
    """
    found: set[str | int] = set()
    for index, names in enumerate(column_values(dataset, column)):
        if not isinstance(names, list) or not all(isinstance(name, (str, int)) for name in names):
            raise ValueError(
                f"{RowName(dataset, image_column, index)} has {names!r} in {column!r}: expected a list with the name "
                "of each box."
            )
        found.update(names)
    return sorted(found, key=lambda name: (isinstance(name, str), name))


def check_filled(dataset: Dataset, column: str, image_column: str) -> None:
    """Every row of a column holds something.

    Raises:
        ValueError: naming the first picture without.
    """
    for index, value in enumerate(column_values(dataset, column)):
        if value is None:
            raise ValueError(
                f"{RowName(dataset, image_column, index)} has nothing in the column {column!r}: fill or remove it."
            )


def renumber_classes(dataset: Dataset, column: str, names: Sequence[str]) -> Dataset:
    """The rows with other numbers for their classes.

    Args:
        column: A `ClassLabel`, all of whose names are among `names`.
        names: Of the classes 0, 1, ...
    """
    from datasets import ClassLabel

    plain, shape = dataset.with_format(None), dataset.format  # pictures stay undecoded
    numbers = [names.index(name) for name in plain.features[column].names]
    labels: Any = [numbers[label] for label in column_values(plain, column)]
    plain = plain.remove_columns(column).add_column(column, labels).cast_column(column, ClassLabel(names=list(names)))
    options = dict(shape["format_kwargs"])
    if (stand_ins := getattr(options.get("transform"), "stand_ins", None)) is not None:  # rows with the old numbers
        options["transform"] = replace(options["transform"], stand_ins=replace(stand_ins, rows=plain))
    return plain.with_format(shape["type"], shape["columns"], shape["output_all_columns"], **options)


def check_labels(dataset: Dataset, column: str, image_column: str, num_labels: int) -> None:
    """Class numbers of all rows lie in 0 ... num_labels - 1.

    Raises:
        ValueError: naming the first picture whose label does not.
    """
    for index, label in enumerate(column_values(dataset, column)):
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < num_labels:
            raise ValueError(
                f"{RowName(dataset, image_column, index)} has the label {label!r} in {column!r}: expected an integer "
                f"from 0 to {num_labels - 1}, as there are {num_labels} classes (--num_labels)."
            )
