"""The training and validation pictures that a recipe's data options name."""

import logging
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .image_folder import load_image_splits, repeat_rows, wanted_columns, with_advice, without_broken_pictures
from .scenes import COLUMNS, TEXT_COLUMNS, load_scenes

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SCENES_SAMPLES = 100_000
VALIDATION_SAMPLES = 256
NUMBERS = {"one": 1, "two": 2}  # of objects, in the names of the configurations of `scenes`


class PictureSource(Protocol):
    """The fields of `training_utils.args.DataArgs` that choose a data set."""

    dataset_name: str | None
    dataset_config_name: str | None
    train_data_dir: str | None
    image_column: str
    caption_column: str
    label_column: str
    max_train_samples: int | None
    resolution: int


def load_pictures(
    source: PictureSource, *, columns: tuple[str, ...] = (), text_columns: tuple[str, ...] = ()
) -> tuple["Dataset", "Dataset"]:
    """Training and validation set, map-style: rows are dictionaries with a PIL picture and what goes with it.

    `scenes` has a validation split of its own. Its configurations are words joined by +: grounds (`plain`,
    `plain+gradient` ...; all four by default), and `one` or `two` for pictures of as many objects (`plain+one`).
    Any other source is validated on its split `validation`, or else `test` (at most 256 pictures of it); where it has
    neither, a tenth, at most 256 pictures, is held out by a fixed permutation. The log says which.

    Args:
        source: Which data set; see `PictureSource`. The options `random_flip` and `captions_from_names` count where it
            has them, and so does `broken_pictures`, a file: it lists pictures that cannot be read, and other rows
            stand in for theirs.
        columns: Columns that the recipe reads beside the picture. They must exist.
        text_columns: Those of them that hold captions besides `caption_column`.
    """
    wanted = tuple(dict.fromkeys((source.image_column, *columns, *text_columns)))
    if getattr(source, "random_flip", False):
        logger.info("Half of the pictures are mirrored (--random_flip): wrong where sides or letters count.")
    if source.dataset_name == "scenes":
        unknown = [name for name in wanted if name not in COLUMNS]
        if unknown:
            raise ValueError(f"`scenes` has no column {unknown}; it has {', '.join(COLUMNS)}.")
        for name in (source.caption_column, *text_columns):
            if name in (*columns, *text_columns) and name not in TEXT_COLUMNS:
                raise ValueError(
                    f"The column {name!r} of `scenes` holds no captions (--caption_column and the like): those that do"
                    f" are {', '.join(TEXT_COLUMNS)}."
                )
        size = source.max_train_samples or SCENES_SAMPLES
        options: dict[str, Any] = {"resolution": source.resolution, "columns": wanted}
        if source.dataset_config_name:
            options |= scenes_options(source.dataset_config_name)
        return load_scenes(size, **options), load_scenes(VALIDATION_SAMPLES, split="validation", **options)
    from_names = getattr(source, "captions_from_names", False)
    splits = load_image_splits(
        wanted_columns(
            source.image_column, source.caption_column, source.label_column, wanted, text_columns, from_names
        ),
        source.train_data_dir,
        source.dataset_name,
        dataset_config_name=source.dataset_config_name,
        max_samples=source.max_train_samples,
    )
    dataset, validation, repeats = splits.train, splits.validation, splits.repeats
    if validation is not None:
        kept, _ = split_rows(len(validation), min(VALIDATION_SAMPLES, len(validation)))
        logger.info("Validation: %d of %d rows of the split %r.", len(kept), len(validation), splits.validation_split)
        validation = validation.select(kept)
    else:
        held_out, trained = hold_out(len(dataset))
        validation = dataset.select(held_out) if held_out else dataset
        dataset = dataset.select(trained) if held_out else dataset
        repeats = [repeats[index] for index in trained] if held_out and repeats is not None else repeats
    listed = getattr(source, "broken_pictures", None)
    if listed is not None:  # each of the two sets stands in for itself
        dataset, validation = (without_broken_pictures(one, listed) for one in (dataset, validation))
    elif hasattr(source, "on_broken_picture"):
        dataset, validation = (
            with_advice(one, " To train without such pictures: --on_broken_picture skip.")
            for one in (dataset, validation)
        )
    return repeat_rows(dataset, repeats), validation


def hold_out(count: int) -> tuple[list[int], list[int]]:
    """Which of `count` rows are for validation (a tenth, at most 256; none of fewer than ten), and the others."""
    held_out, trained = split_rows(count, min(VALIDATION_SAMPLES, count // 10))
    if held_out:
        logger.info("Validation: %d of %d rows are held out, by a fixed permutation.", len(held_out), count)
    else:
        logger.info("Validation: with only %d rows none is held out; it shows training rows.", count)
    return held_out, trained


def split_rows(count: int, first: int) -> tuple[list[int], list[int]]:
    """The first so many of `count` rows in a fixed permutation, and the others, both in order."""
    order = np.random.Generator(np.random.Philox(0)).permutation(count)
    return sorted(order[:first].tolist()), sorted(order[first:].tolist())


def scenes_options(configuration: str) -> dict[str, Any]:
    """The arguments of `load_scenes` that the words of a configuration stand for; a wrong ground is refused there."""
    words = configuration.split("+")
    counts = [NUMBERS[word] for word in words if word in NUMBERS]
    if len(counts) > 1:
        raise ValueError(f"`dataset_config_name` is {configuration!r}: it names one of {', '.join(NUMBERS)}, or none.")
    grounds = tuple(word for word in words if word not in NUMBERS)
    return {"num_objects": counts[0] if counts else None} | ({"grounds": grounds} if grounds else {})
