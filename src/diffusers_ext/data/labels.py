"""How many classes the data have: names where they tell them, else 1 + the largest number in use."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..conditions.palettes import SCENES_CLASSES
from .annotations import RowName, check_labels, column_values, renumber_classes
from .pictures import PictureSource
from .scenes import CLASS_NAMES, LABEL_COLUMN

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

MANY_CLASSES = 100_000  # larger numbers are identifiers, unless there are as many rows


class Classes(NamedTuple):
    """How many classes there are, and their names: `None` where they only have numbers."""

    count: int
    names: list[str] | None = None


def find_classes(sets: Sequence[Dataset], source: PictureSource) -> Classes:
    """The classes in the column `source.label_column`.

    Args:
        sets: Training and validation set of `source`; either may hold a number that the other lacks.

    Raises:
        ValueError: a label is no integer from 0 on; names the picture.
    """
    from datasets import ClassLabel

    column = source.label_column
    if source.dataset_name == "scenes":
        if column != LABEL_COLUMN:
            raise ValueError(f"--label_column={column}: the classes of `scenes` are in the column {LABEL_COLUMN!r}.")
        return Classes(len(CLASS_NAMES), list(CLASS_NAMES))
    feature = sets[0].features[column]
    if isinstance(feature, ClassLabel):
        return Classes(len(feature.names), list(feature.names))
    count = 0
    for dataset in sets:
        for index, label in enumerate(column_values(dataset, column)):
            if isinstance(label, bool) or not isinstance(label, int) or label < 0:
                raise ValueError(
                    f"{RowName(dataset, source.image_column, index)} has the label {label!r} in {column!r}: expected "
                    "an integer from 0 on, or names of classes."
                )
            count = max(count, label + 1)
    rows = sum(map(len, sets))
    if count > max(MANY_CLASSES, rows):
        raise ValueError(
            f"The largest label in {column!r} is {count - 1}, but there are only {rows} rows: number the classes from "
            "0 on, or give their names."
        )
    logger.info("The largest label in %r is %d: %d classes (--num_labels sets more).", column, count - 1, count)
    return Classes(count)


def as_asked(found: Classes, num_labels: int | None, *, rows_are_checked: bool = True) -> Classes:
    """The classes of the data, or so many as `--num_labels` asks for where they only have numbers.

    Args:
        rows_are_checked: A row with a larger number is named by a later check (`check_classes`), so pass it here.

    Raises:
        ValueError: the numbers differ.
    """
    if num_labels in (None, found.count):
        return found
    if found.names is None and (rows_are_checked or found.count < num_labels):  # the data need not hold all of them
        return Classes(num_labels)
    raise ValueError(f"--num_labels={num_labels}, but the data have {found.count} classes.")


def follow_names(
    sets: tuple[Dataset, Dataset], source: PictureSource, known: Sequence[str] | None, place: str
) -> tuple[Dataset, Dataset]:
    """The data with the number that a network has for each of their classes, found by the names.

    Folders number classes in the order of their names; a network that is trained further keeps its own numbers.

    Args:
        sets: Training and validation set of `source`.
        known: Names of the network's classes 0, 1, ...; None where it only has numbers.
        place: Where the network was found, for messages.

    Raises:
        ValueError: The data have names that the network does not know.
    """
    column, is_built_in = source.label_column, source.dataset_name == "scenes"
    names = list(CLASS_NAMES) if is_built_in else getattr(sets[0].features[column], "names", None)
    if known is None or names is None or names == list(known[: len(names)]):
        return sets
    unknown = [name for name in names if is_built_in or name not in known]  # the built-in numbers are fixed
    if unknown:
        raise ValueError(
            f"{place!r} knows the classes {', '.join(known[:5])}{' ...' if len(known) > 5 else ''}, but the data have "
            f"others: {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}. Name them as there, or give its "
            f"numbers in a column {column!r} of integers."
        )
    logger.info("Classes have the numbers that %r knows their names by.", place)
    train_set, validation_set = (renumber_classes(dataset, column, known) for dataset in sets)
    return train_set, validation_set


def warn_of_numbers(found: Classes, count: int, place: str) -> None:
    """Says which classes the names of the data become in a network that has numbers alone, and more of them."""
    if found.names is not None and found.count < count:
        shown = ", ".join(f"{name} is {number}" for number, name in enumerate(found.names[:3]))
        logger.warning(
            "%r knows %d classes by number, and folders are numbered by their names: %s%s. If classes are to keep its "
            "numbers, give these in a column of integers.",
            place,
            count,
            shown,
            " ..." if found.count > 3 else "",
        )


def check_classes(sets: Sequence[Dataset], source: PictureSource, num_labels: int) -> None:
    """Class numbers of all rows lie in 0 ... `num_labels` - 1; those of `scenes` are known to.

    Raises:
        ValueError: names the first picture whose label does not.
    """
    if source.dataset_name != "scenes":
        for dataset in sets:
            check_labels(dataset, source.label_column, source.image_column, num_labels)


def count_map_labels(sets: Sequence[Dataset], column: str, source: PictureSource) -> int:
    """1 + the largest number in the label maps of a column, each of which is read for it.

    Raises:
        ValueError: a map has several channels; names the picture.
    """
    if source.dataset_name == "scenes":
        return len(SCENES_CLASSES)
    logger.info("Reading %d label maps to count their labels; --num_labels spares that.", sum(map(len, sets)))
    count = 0
    for dataset in sets:
        for index, row in enumerate(dataset.select_columns([column])):
            label_map = row[column]  # type: ignore[call-overload]
            if len(label_map.getbands()) != 1:
                raise ValueError(
                    f"{RowName(dataset, source.image_column, index)} has a label map of the mode {label_map.mode!r} "
                    f"in {column!r}: expected one channel whose pixels are class numbers (mode L, P or I)."
                )
            count = max(count, int(np.asarray(label_map).max()) + 1)
    logger.info("The largest number in the label maps is %d: %d labels.", count - 1, count)
    return count
