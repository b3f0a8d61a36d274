"""Users' own pictures as map-style data sets whose rows hold PIL pictures, decoded when a row is read.

Layouts of a folder (see `load_image_dataset`):

    metadata          metadata.jsonl, .json (an array), .csv, .tsv or .parquet, in the folder or in subfolders, with a
                      column `file_name` relative to it; its other columns (captions, labels, boxes ...) become
                      columns; `<name>_file_name` names further pictures
    texts beside      a.jpg and a.txt or a.caption: each line is a caption, at any depth
    class folders     <class>/<any name>.jpg: the folder's name is the label
    kohya's folders   <repeats>_<name>/a.jpg and a.txt: the name is the label, and a picture counts so often
    plain             pictures in one folder
    parquet           *.parquet with a picture column (file bytes, or the struct that `datasets` writes)
    save_to_disk      what `Dataset.save_to_disk` wrote

Each of them may lie below a folder `train`, `validation` or `test`. Suffixes and `metadata` may have any letter case;
whatever Pillow reads is a picture. Names of files and folders become captions only with `captions_from_names`, and
where there are no others: a_red_house_003.jpg -> "a red house", golden_retriever/7.jpg -> "golden retriever".
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..conditions.pixels import read_rgb
from ..places import did_you_mean
from .annotations import RowName, renumber_classes
from .broken_pictures import StandIns, UnreadablePictureError
from .folder_contents import IMAGE_SUFFIXES, METADATA_NAMES
from .layouts import SPLIT_FOLDERS, Columns, Rows, caption_from_file_name, read_folder, split_folders
from .metadata import check_text

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

__all__ = [
    "IMAGE_SUFFIXES",
    "METADATA_NAMES",
    "SPLIT_FOLDERS",
    "caption_from_file_name",
    "decode_image",
    "load_image_dataset",
    "load_image_splits",
    "wanted_columns",
]


def decode_image(value: Any, *, rgb: bool = True, name: str | None = None) -> Image.Image:
    """A picture from a path, file bytes, the struct of `datasets` (bytes, path), or a PIL picture.

    EXIF orientation is applied. With `rgb` it is read as sampling reads it, see `conditions.pixels.read_rgb`:
    transparent parts become white, and more than 8 bits are scaled to 8.

    Raises:
        UnreadablePictureError: It cannot be read; names `name`, or the path.
        ValueError: It is no picture, or one of an unknown mode.
    """
    source = value
    if isinstance(value, dict):
        name = name or value.get("path")
        source = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(source, (str, os.PathLike)):
        name = name or os.fspath(source)
    elif isinstance(source, bytes):
        source = io.BytesIO(source)
    elif not isinstance(source, Image.Image):
        raise ValueError(
            f"Cannot read the picture {name or ''}: expected a path, file bytes or a PIL picture, "
            f"but got {type(source).__name__}."
        )
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image.load()
        return read_rgb(image) if rgb else ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadablePictureError(
            f"Cannot read the picture {name or '(bytes without a name)'}: {error}. Repair or remove it."
        ) from error
    except ValueError as error:
        raise ValueError(f"Cannot read the picture {name or '(bytes without a name)'}: {error}") from error


@dataclass(frozen=True)
class _DecodeRows:
    """The data set's transform: picture columns hold paths or file bytes, rows show PIL pictures.

    With `stand_ins` other rows stand in for those whose pictures cannot be read; without, messages end in `advice`.
    """

    rgb_columns: tuple[str, ...]
    other_columns: tuple[str, ...] = ()
    stand_ins: StandIns | None = None
    advice: str = ""

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        try:
            return self.decode(batch)
        except UnreadablePictureError as error:
            if self.stand_ins is None:
                raise UnreadablePictureError(f"{error}{self.advice}") from error
        columns = (*self.rgb_columns, *self.other_columns)
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        read = [self.stand_ins.read(row, columns, self.decode) for row in rows]
        return {name: [row[name] for row in read] for name in batch}

    def decode(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        shown = dict(batch)
        for columns, rgb in ((self.rgb_columns, True), (self.other_columns, False)):
            for name in columns:
                if name in shown:
                    shown[name] = [None if value is None else decode_value(value, rgb=rgb) for value in shown[name]]
        return shown


def decode_value(value: Any, *, rgb: bool = True) -> Any:
    """What a picture column holds: a picture, see `decode_image`, or the array of a .npy file (normals, depth).

    Raises:
        UnreadablePictureError: it cannot be read; names the file.
        ValueError: see `decode_image`.
    """
    path = value.get("path") if isinstance(value, dict) else value
    if not (isinstance(path, str) and path.lower().endswith(".npy")):
        return decode_image(value, rgb=rgb)
    data = value.get("bytes") if isinstance(value, dict) else None
    try:
        return np.load(path if data is None else io.BytesIO(data), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UnreadablePictureError(f"Cannot read the array {path}: {error}. Repair or remove it.") from error


def load_image_dataset(
    train_data_dir: str | os.PathLike[str] | None = None,
    dataset_name: str | None = None,
    *,
    dataset_config_name: str | None = None,
    split: str = "train",
    image_column: str = "image",
    caption_column: str = "text",
    label_column: str = "label",
    columns: Sequence[str] = (),
    text_columns: Sequence[str] = (),
    captions_from_names: bool = False,
    max_samples: int | None = None,
    verify_images: bool = False,
    cache_dir: str | None = None,
) -> Dataset:
    """A map-style data set of pictures from a folder or from the Hub.

    Rows are dictionaries: the picture under `image_column` (PIL, RGB, upright), and every other column as it is
    stored. String labels under `label_column` become integers of a `ClassLabel` (names sorted).

    Args:
        train_data_dir: A folder in one of the layouts above. Either this or `dataset_name`.
        dataset_name, dataset_config_name: Handed to `datasets.load_dataset`.
        split: Also chooses the subfolder where a folder has `train`, `validation` or `test`.
        image_column, caption_column, label_column: Names that the columns have, or get where the layout has none.
        columns: Columns that are needed beside the picture: each must exist and hold something in every row.
        text_columns: Those of them that hold captions besides `caption_column`: a string or a list of strings a row.
        captions_from_names: Where there are no captions, make them of the names of files or class folders.
        max_samples: Keep only so many rows, drawn by a fixed permutation, in their order.
        verify_images: Decode every picture once, and list those that cannot be read.
        cache_dir: Where `datasets` keeps what it converts.

    Raises:
        ValueError: With the name of the file or column that is wrong, and the way out.
    """
    wanted = wanted_columns(image_column, caption_column, label_column, columns, text_columns, captions_from_names)
    source = _open(train_data_dir, dataset_name, dataset_config_name, cache_dir)
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"`max_samples` must be at least 1 or None, but is {max_samples}.")
    rows = source.read(split, wanted)
    dataset, repeats = _draw(rows, max_samples)
    if verify_images:
        plain = dataset.select_columns([image_column]).with_format(None)
        _verify(plain, image_column, source.name)
    return repeat_rows(dataset, repeats)


@dataclass(frozen=True)
class ImageSplits:
    """What a training is given: `repeats` tells how often each row of `train` counts (`None`: once).

    `validation` is `None` where the source has neither a split `validation` nor `test`; `validation_split` is its
    name.
    """

    train: Dataset
    repeats: list[int] | None
    validation: Dataset | None
    validation_split: str


def load_image_splits(
    columns: Columns,
    train_data_dir: str | os.PathLike[str] | None = None,
    dataset_name: str | None = None,
    *,
    dataset_config_name: str | None = None,
    max_samples: int | None = None,
    cache_dir: str | None = None,
) -> ImageSplits:
    """The split `train`, and `validation` (or else `test`) where the source has it; see `load_image_dataset`.

    Classes have the numbers that they have in `train`. A validation split from the Hub that lacks what is needed
    (test sets often come without labels) is left out with a line in the log.

    Raises:
        ValueError: As `load_image_dataset`; or a folder's validation split has a class that `train` lacks.
    """
    source = _open(train_data_dir, dataset_name, dataset_config_name, cache_dir)
    rows = source.read("train", columns)
    dataset, repeats = _draw(rows, max_samples)
    name = next((name for name in ("validation", "test") if name in source.splits), "")
    validation = None
    if name:
        try:
            validation = source.read(name, columns, like=rows.dataset).dataset
        except ValueError as error:
            if train_data_dir is not None:
                raise
            logger.warning("The split %r of %s is not used: %s", name, source.name, error)
    return ImageSplits(dataset, repeats, validation, name)


def repeat_rows(dataset: Dataset, repeats: Sequence[int] | None) -> Dataset:
    """Each row as often as `repeats` says, one after the other."""
    return dataset if repeats is None else dataset.select(np.repeat(np.arange(len(dataset)), repeats))


def wanted_columns(
    image: str, caption: str, label: str, columns: Sequence[str], texts: Sequence[str], captions_from_names: bool
) -> Columns:
    """What the columns are called, and those of them that every row must fill: see `load_image_dataset`."""
    needed = tuple(dict.fromkeys((image, *columns, *texts)))
    captions = tuple(dict.fromkeys(name for name in (caption, *texts) if name in needed))
    return Columns(image, caption, label, needed, captions, captions_from_names, all=not (columns or texts))


@dataclass(frozen=True)
class _Source:
    """A folder or a data set of the Hub; `splits` are its parts, "" stands for a folder without splits."""

    name: str
    splits: dict[str, Any]
    cache_dir: str | None = None

    def read(self, split: str, columns: Columns, like: Dataset | None = None) -> Rows:
        """The rows of a split, checked, with the class numbers of `like`."""
        if split not in self.splits and "" not in self.splits:
            hint = "" if "train" in self.splits else " Save the right one as a folder, and name that."
            raise ValueError(f"{self.name} has no split {split!r}; it has {', '.join(sorted(self.splits))}.{hint}")
        part = self.splits[split if split in self.splits else ""]
        rows = read_folder(part, columns, self.cache_dir) if isinstance(part, Path) else Rows(part)
        source = self.name if like is None else f"{self.name}, split {split!r}"
        _check_columns(rows.dataset, columns, source)
        dataset = _encode_labels(rows.dataset, columns, source, like)
        return Rows(_show_pictures(dataset, columns.image), rows.repeats)


def _open(
    folder: str | os.PathLike[str] | None, dataset_name: str | None, config: str | None, cache_dir: str | None
) -> _Source:
    try:
        import datasets
        import datasets.exceptions
    except ImportError as error:
        raise ImportError('`load_image_dataset` needs datasets: pip install datasets (extra "train")') from error
    if (folder is None) == (dataset_name is None):
        raise ValueError(
            f"Exactly one of `train_data_dir` and `dataset_name` is needed, but got {folder!r} and {dataset_name!r}."
        )
    if folder is not None:
        path = Path(folder)
        if not path.is_dir():
            raise ValueError(f"`train_data_dir` must be a folder, but {str(path)!r} is not one.{did_you_mean(path)}")
        return _Source(f"the folder {os.fspath(folder)!r}", split_folders(path) or {"": path}, cache_dir)
    try:
        splits: Any = datasets.load_dataset(str(dataset_name), config, cache_dir=cache_dir)
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"The data set {dataset_name!r} cannot be read: {error.__cause__ or error}") from error
    return _Source(f"the data set {dataset_name!r}", dict(splits), cache_dir)


def _draw(rows: Rows, count: int | None) -> tuple[Dataset, list[int] | None]:
    """`count` rows by a fixed permutation, so that sorted data keep all their classes."""
    size = len(rows.dataset)
    if count is None or count >= size:
        return rows.dataset, rows.repeats
    kept = sorted(np.random.Generator(np.random.Philox(0)).permutation(size)[:count].tolist())
    return rows.dataset.select(kept), None if rows.repeats is None else [rows.repeats[index] for index in kept]


def without_broken_pictures(dataset: Dataset, listed: Path) -> Dataset:
    """The same rows, but for those whose pictures cannot be read, in whose place others of them come up.

    Args:
        dataset: Of `load_image_dataset` or `load_image_splits`.
        listed: File that lists the broken pictures.
    """
    return _with_transform(dataset, stand_ins=StandIns(dataset.with_format(None), listed))


def with_advice(dataset: Dataset, advice: str) -> Dataset:
    """The same rows; messages about pictures that cannot be read end in `advice`."""
    return _with_transform(dataset, advice=advice)


def _with_transform(dataset: Dataset, **options: Any) -> Dataset:
    transform: Any = dataset.format["format_kwargs"]["transform"]
    return dataset.with_transform(replace(transform, **options))


def _show_pictures(dataset: Dataset, image_column: str) -> Dataset:
    import datasets

    pictures = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    for name in pictures:
        dataset = dataset.cast_column(name, datasets.Image(decode=False))
    others = tuple(name for name in pictures if name != image_column)
    return dataset.with_transform(_DecodeRows((image_column,), others))


def _check_columns(dataset: Dataset, columns: Columns, source: str) -> None:
    if len(dataset) == 0:
        raise ValueError(f"There are no rows in {source}.")
    missing = [name for name in columns.needed if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"There is no column {missing[0]!r} in {source}; its columns are {', '.join(dataset.column_names)}. "
            "Name the right one (`image_column`, `caption_column`, `label_column`) or add it"
            + (
                "."
                if missing[0] in (columns.image, columns.caption, columns.label)
                else f"; one of files has their names as {missing[0]}_file_name in metadata.jsonl."
            )
        )
    for name in columns.needed:
        values = dataset.data.column(name)
        if values.null_count:
            row = values.is_null().to_pylist().index(True)
            raise ValueError(f"Row {row} of {source} has nothing in the column {name!r}: fill or remove it.")
    for name in columns.texts:
        _check_texts(dataset, name, columns.image, source)


def _check_texts(dataset: Dataset, column: str, image_column: str, source: str) -> None:
    """A column of captions holds a string, or a list of strings, in every row."""
    import pyarrow
    import pyarrow.compute
    from datasets import ClassLabel

    feature, values = dataset.features[column], dataset.data.column(column)
    if isinstance(feature, ClassLabel):
        raise ValueError(
            f"The column {column!r} of {source} holds class labels ({', '.join(feature.names[:3])} ...), not captions"
            ": name a column of texts with --caption_column, or train on classes."
        )
    kind = values.type

    def is_text(kind: pyarrow.DataType) -> bool:
        return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)

    if is_text(kind):
        return
    is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
    if is_list and is_text(kind.value_type):
        compute: Any = pyarrow.compute  # its functions are made at run time
        if compute.min(compute.list_value_length(values)).as_py() > 0 and not compute.list_flatten(values).null_count:
            return
    for row, value in enumerate(values.to_pylist()):
        check_text(value, f"{RowName(dataset, image_column, row)} of {source}", column)


def _encode_labels(dataset: Dataset, columns: Columns, source: str, like: Dataset | None) -> Dataset:
    """Strings become integers, with the sorted names as the column's `ClassLabel`, or with those of `like`."""
    from datasets import ClassLabel, Value

    column = columns.label
    if column not in dataset.column_names:
        return dataset
    feature = dataset.features[column]
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        names = sorted(name for name in dataset.unique(column) if name is not None)
        dataset = dataset.cast_column(column, feature := ClassLabel(names=names))
    if like is None or column not in columns.needed:
        return dataset
    if isinstance(feature, Value) and min(dataset.data.column(column).to_pylist()) < 0:
        raise ValueError(f"{source} has negative numbers in the column {column!r}.")
    wanted = like.features[column]
    if not isinstance(feature, ClassLabel) or not isinstance(wanted, ClassLabel) or feature.names == wanted.names:
        return dataset
    unknown = sorted(set(feature.names) - set(wanted.names))
    if unknown:
        raise ValueError(f"{source} has the class {unknown[0]!r}, which the training pictures lack.")
    return renumber_classes(dataset, column, wanted.names)


def _verify(dataset: Dataset, image_column: str, source: str) -> None:
    broken = []
    for row, value in enumerate(dataset[image_column]):
        try:
            decode_image(value, name=_picture_name(value, row))
        except ValueError as error:
            broken.append(str(error))
    if broken:
        raise ValueError(f"{len(broken)} pictures of {source} cannot be read: {'; '.join(broken[:5])}")


def _picture_name(value: Any, row: int) -> str:
    if isinstance(value, dict):
        value = value.get("path")
    return value if isinstance(value, str) else f"in row {row}"
