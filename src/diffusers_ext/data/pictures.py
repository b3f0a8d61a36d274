"""The training and validation pictures that a recipe's data options name."""

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .image_folder import load_image_dataset
from .scenes import COLUMNS, load_scenes

if TYPE_CHECKING:
    from datasets import Dataset

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


def load_pictures(source: PictureSource, *, columns: tuple[str, ...] = ()) -> tuple["Dataset", "Dataset"]:
    """Training and validation set, map-style: rows are dictionaries with a PIL picture and what goes with it.

    `scenes` has a validation split of its own. Its configurations are words joined by +: grounds (`plain`,
    `plain+gradient` ...; all four by default), and `one` or `two` for pictures of as many objects (`plain+one`).
    From any other source a tenth, at most 256 pictures, is held out by a fixed permutation.

    Args:
        source: Which data set; see `PictureSource`.
        columns: Columns that the recipe reads beside the picture. They must exist.
    """
    wanted = tuple(dict.fromkeys((source.image_column, *columns)))
    if source.dataset_name == "scenes":
        unknown = [name for name in wanted if name not in COLUMNS]
        if unknown:
            raise ValueError(f"`scenes` has no column {unknown}; it has {', '.join(COLUMNS)}.")
        size = source.max_train_samples or SCENES_SAMPLES
        options: dict[str, Any] = {"resolution": source.resolution, "columns": wanted}
        if source.dataset_config_name:
            options |= _scenes_options(source.dataset_config_name)
        return load_scenes(size, **options), load_scenes(VALIDATION_SAMPLES, split="validation", **options)
    dataset = load_image_dataset(
        source.train_data_dir,
        source.dataset_name,
        dataset_config_name=source.dataset_config_name,
        image_column=source.image_column,
        caption_column=source.caption_column,
        label_column=source.label_column,
        columns=wanted,
        max_samples=source.max_train_samples,
    )
    held_out = min(VALIDATION_SAMPLES, len(dataset) // 10)
    order = np.random.Generator(np.random.Philox(0)).permutation(len(dataset))
    if held_out == 0:  # too few pictures to hold any out: validation shows training pictures
        return dataset, dataset
    return dataset.select(sorted(order[held_out:])), dataset.select(sorted(order[:held_out]))


def _scenes_options(configuration: str) -> dict[str, Any]:
    """The arguments of `load_scenes` that the words of a configuration stand for; a wrong ground is refused there."""
    words = configuration.split("+")
    counts = [NUMBERS[word] for word in words if word in NUMBERS]
    if len(counts) > 1:
        raise ValueError(f"`dataset_config_name` is {configuration!r}: it names one of {', '.join(NUMBERS)}, or none.")
    grounds = tuple(word for word in words if word not in NUMBERS)
    return {"num_objects": counts[0] if counts else None} | ({"grounds": grounds} if grounds else {})
