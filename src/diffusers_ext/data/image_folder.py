"""Users' own pictures as map-style data sets whose rows hold PIL pictures, decoded when a row is read.

Layouts of a folder (see `load_image_dataset`):

    metadata          metadata.jsonl, metadata.csv or metadata.parquet with a column `file_name`; its other columns
                      (captions, labels, boxes ...) become columns; `<name>_file_name` names further pictures
    parquet           *.parquet with a picture column (file bytes, or the struct that `datasets` writes)
    class folders     <class>/<any name>.jpg: the folder's name is the label, and in words the caption
    plain             pictures in one folder; captions come from the file names: a_red_house_003.jpg -> "a red house"
    save_to_disk      what `Dataset.save_to_disk` wrote

Each of them may lie below a folder `train`, `validation` or `test`.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps, UnidentifiedImageError

from ..conditions.pixels import read_rgb

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
# what cameras and tools write before the number says nothing about the picture
_EMPTY_NAMES = frozenset(("img", "dsc", "dscf", "dscn", "pxl", "image", "picture", "photo", "pic", "screenshot"))


def decode_image(value: Any, *, rgb: bool = True, name: str | None = None) -> Image.Image:
    """A picture from a path, file bytes, the struct of `datasets` (bytes, path), or a PIL picture.

    EXIF orientation is applied. With `rgb` it is read as sampling reads it, see `conditions.pixels.read_rgb`:
    transparent parts become white, and more than 8 bits are scaled to 8.

    Raises:
        ValueError: The picture cannot be read; names `name`, or the path.
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
        image = ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"Cannot read the picture {name or '(bytes without a name)'}: {error}. Repair or remove it."
        ) from error
    if not rgb:
        return image
    try:
        return read_rgb(image)
    except ValueError as error:
        raise ValueError(f"Cannot read the picture {name or '(bytes without a name)'}: {error}") from error


def caption_from_file_name(file_name: str | os.PathLike[str]) -> str:
    """The words of a file name without its number: "a_red_house_003.jpg" -> "a red house".

    Returns:
        "" for names that say nothing, such as "0017.png" or "IMG_0017.jpg".
    """
    words = re.sub(r"[_\-\s]+", " ", Path(file_name).stem).strip()
    words = re.sub(r"(?:(?<=\w) |^)\(?\d+\)?$", "", words).strip()  # "... 003", "... (3)"
    plain = re.sub(r"[\d ]+", "", words).lower()
    return "" if not plain or plain in _EMPTY_NAMES else words


@dataclass(frozen=True)
class _DecodeRows:
    """The data set's transform: picture columns hold paths or file bytes, rows show PIL pictures."""

    rgb_columns: tuple[str, ...]
    other_columns: tuple[str, ...] = ()

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        shown = dict(batch)
        for columns, rgb in ((self.rgb_columns, True), (self.other_columns, False)):
            for name in columns:
                if name in shown:
                    shown[name] = [None if value is None else decode_image(value, rgb=rgb) for value in shown[name]]
        return shown


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
    max_samples: int | None = None,
    verify_images: bool = False,
    cache_dir: str | None = None,
) -> Dataset:
    """A map-style data set of pictures from a folder or from the Hub.

    Rows are dictionaries: the picture under `image_column` (PIL, RGB, upright), and every other column as it is
    stored. String labels under `label_column` become integers of a `ClassLabel` (names sorted).

    Args:
        train_data_dir: A folder in one of the layouts above. Either this or `dataset_name`.
        dataset_name, dataset_config_name: Handed to `datasets.load_dataset`, together with `split`.
        split: Also chooses the subfolder where a folder has `train`, `validation` or `test`.
        image_column, caption_column, label_column: Names that the columns have, or get where the layout has none.
        columns: Columns that are needed beside the picture: each must exist and hold something in every row.
        max_samples: Keep only the first so many rows.
        verify_images: Decode every picture once, and list those that cannot be read.
        cache_dir: Where `datasets` keeps what it converts.

    Raises:
        ValueError: With the name of the file or column that is wrong, and the way out.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError('`load_image_dataset` needs datasets: pip install "diffusers_ext[train]"') from error
    one_source = f"but got {train_data_dir!r} and {dataset_name!r}."
    both_or_none = f"Exactly one of `train_data_dir` and `dataset_name` is needed, {one_source}"
    if train_data_dir is not None and dataset_name is not None:
        raise ValueError(both_or_none)
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"`max_samples` must be at least 1 or None, but is {max_samples}.")
    needed = tuple(dict.fromkeys((image_column, *columns)))
    if dataset_name is not None:
        source = f"the data set {dataset_name!r}"
        dataset = datasets.load_dataset(dataset_name, dataset_config_name, split=split, cache_dir=cache_dir)
    elif train_data_dir is not None:
        source = f"the folder {os.fspath(train_data_dir)!r}"
        dataset = _load_folder(
            Path(train_data_dir), split, image_column, caption_column, label_column, needed, cache_dir
        )
    else:
        raise ValueError(both_or_none)
    _check_columns(dataset, needed, source)
    if max_samples is not None:
        dataset = dataset.select(range(min(max_samples, len(dataset))))
    if label_column in dataset.column_names:
        dataset = _encode_labels(dataset, label_column)
    pictures = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    for name in pictures:
        dataset = dataset.cast_column(name, datasets.Image(decode=False))
    others = tuple(name for name in pictures if name != image_column)
    if verify_images:
        _verify(dataset.select_columns([image_column]), image_column, source)
    return dataset.with_transform(_DecodeRows((image_column,), others))


def _check_columns(dataset: Dataset, needed: Sequence[str], source: str) -> None:
    if len(dataset) == 0:
        raise ValueError(f"There are no rows in {source}.")
    missing = [name for name in needed if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"There is no column {missing[0]!r} in {source}; its columns are {', '.join(dataset.column_names)}. "
            "Name the right one (`image_column`, `caption_column`, `label_column`) or add it."
        )
    for name in needed:
        values = dataset.data.column(name)
        if values.null_count:
            row = values.is_null().to_pylist().index(True)
            raise ValueError(f"Row {row} of {source} has nothing in the column {name!r}: fill or remove it.")


def _encode_labels(dataset: Dataset, label_column: str) -> Dataset:
    """Strings become integers, with the sorted names as the column's `ClassLabel`."""
    from datasets import ClassLabel, Value

    feature = dataset.features[label_column]
    if not isinstance(feature, Value) or feature.dtype not in ("string", "large_string"):
        return dataset
    names = sorted(name for name in dataset.unique(label_column) if name is not None)
    return dataset.cast_column(label_column, ClassLabel(names=names))


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


# ---------------------------------------------------------------------------------------------------------------------
# folders


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _pictures_below(folder: Path) -> Iterator[Path]:
    """Pictures in a fixed order on every file system."""
    for entry in sorted(folder.iterdir(), key=lambda path: path.name):
        if entry.is_dir() and not entry.name.startswith("."):
            yield from _pictures_below(entry)
        elif _is_picture(entry):
            yield entry


def _load_folder(
    folder: Path,
    split: str,
    image_column: str,
    caption_column: str,
    label_column: str,
    needed: Sequence[str],
    cache_dir: str | None,
) -> Dataset:
    import datasets

    if not folder.is_dir():
        raise ValueError(f"`train_data_dir` must be a folder, but {str(folder)!r} is not one.")
    folder = _split_folder(folder, split)
    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        return datasets.Dataset.load_from_disk(os.fspath(folder))
    metadata = [folder / name for name in METADATA_NAMES if (folder / name).exists()]
    if len(metadata) > 1:
        raise ValueError(f"{str(folder)!r} has both {metadata[0].name} and {metadata[1].name}: keep one of them.")
    if metadata:
        return _from_metadata(metadata[0], image_column, needed)
    pictures = list(_pictures_below(folder))
    tables = sorted(folder.rglob("*.parquet"))
    if tables and pictures:
        raise ValueError(
            f"{str(folder)!r} has pictures ({pictures[0].name} ...) beside {tables[0].name}: name the table "
            "metadata.parquet, with a column `file_name`, or keep the pictures elsewhere."
        )
    if tables:
        files = [os.fspath(path) for path in tables]
        table = datasets.Dataset.from_parquet(files, cache_dir=cache_dir)  # pyright: ignore[reportArgumentType]
        return table  # pyright: ignore[reportReturnType]
    if not pictures:
        raise ValueError(
            f"There are no pictures in {str(folder)!r} (looked for {', '.join(IMAGE_SUFFIXES)}, "
            f"{', '.join(METADATA_NAMES)} and *.parquet)."
        )
    depths = {len(path.relative_to(folder).parts): path for path in reversed(pictures)}
    if set(depths) == {1}:
        return _from_names(pictures, image_column, caption_column, caption_column in needed)
    if set(depths) == {2}:
        return _from_class_folders(folder, pictures, image_column, caption_column, label_column)
    examples = " and ".join(repr(os.fspath(path.relative_to(folder))) for _, path in sorted(depths.items()))
    raise ValueError(
        f"{str(folder)!r} has pictures at different depths ({examples}): put all of them into one folder, or all into "
        "one subfolder a class, or describe them in a metadata.jsonl."
    )


def _split_folder(folder: Path, split: str) -> Path:
    """The split's own subfolder, where the folder has nothing but subfolders of splits."""
    known = {name: key for key, names in SPLIT_FOLDERS.items() for name in names}
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    splits = {known[entry.name]: entry for entry in entries if entry.is_dir() and entry.name in known}
    others = [entry for entry in entries if entry.is_dir() and entry.name not in known or _is_picture(entry)]
    if not splits or others or any((folder / name).exists() for name in METADATA_NAMES):
        return folder
    if split not in splits:
        raise ValueError(f"{str(folder)!r} has no split {split!r}; it has {', '.join(sorted(splits))}.")
    return splits[split]


def _from_names(pictures: list[Path], image_column: str, caption_column: str, captions_needed: bool) -> Dataset:
    from datasets import Dataset

    captions = [caption_from_file_name(path) for path in pictures]
    data: dict[str, list[str]] = {image_column: [os.fspath(path) for path in pictures]}
    if all(captions):
        data[caption_column] = captions
    elif captions_needed:
        path = pictures[captions.index("")]
        raise ValueError(
            f"The picture {str(path)!r} has no caption: its name says nothing, and there is no metadata.jsonl. Name "
            'it like "a_red_house_003.jpg", or write a metadata.jsonl with lines like '
            f'{{"file_name": "{path.name}", "{caption_column}": "a red house"}}.'
        )
    return Dataset.from_dict(data)


def _from_class_folders(
    folder: Path, pictures: list[Path], image_column: str, caption_column: str, label_column: str
) -> Dataset:
    from datasets import ClassLabel, Dataset

    classes = [path.relative_to(folder).parts[0] for path in pictures]
    names = sorted(set(classes))
    data = {
        image_column: [os.fspath(path) for path in pictures],
        caption_column: [re.sub(r"[_\-\s]+", " ", name).strip() for name in classes],
        label_column: [names.index(name) for name in classes],
    }
    return Dataset.from_dict(data).cast_column(label_column, ClassLabel(names=names))


def _read_metadata(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [{key: value for key, value in row.items() if value != ""} for row in csv.DictReader(file)]
        # CSV has no types: a column of nothing but integers (labels) becomes one of integers
        for name in {key for row in rows for key in row}:
            if all(re.fullmatch(r"-?\d+", row.get(name, "0")) for row in rows):
                rows = [{**row, name: int(row[name])} if name in row else row for row in rows]
        return rows
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"Line {number} of {str(path)!r} is not JSON ({error}): {line[:80]!r}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"Line {number} of {str(path)!r} is no JSON object: {line[:80]!r}")
        entries.append(entry)
    return entries


def _from_metadata(path: Path, image_column: str, needed: Sequence[str]) -> Dataset:
    from datasets import Dataset, Image

    entries = _read_metadata(path)
    if not entries:
        raise ValueError(f"{str(path)!r} has no entries.")
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    # `file_name` holds the picture itself, `<name>_file_name` a picture that becomes the column <name>
    pictures = {name: name.removesuffix("_file_name") for name in names if name.endswith("_file_name")}
    pictures["file_name"] = image_column
    described = set()
    for number, entry in enumerate(entries, start=1):
        if not entry.get("file_name"):
            raise ValueError(f"Entry {number} of {str(path)!r} has no `file_name`: {str(entry)[:120]}")
        for name in pictures:
            if not entry.get(name):
                continue
            file = path.parent / entry[name]
            if not file.is_file():
                raise ValueError(
                    f"Entry {number} of {str(path)!r} names a picture that does not exist: {entry[name]!r}."
                )
            described.add(os.path.normpath(file))
        for name in needed:
            if name in names and entry.get(name) in (None, "", []):
                raise ValueError(
                    f"The picture {entry['file_name']!r} has no {name!r} in {str(path)!r} (entry {number})."
                )
    forgotten = [file for file in _pictures_below(path.parent) if os.path.normpath(file) not in described]
    if forgotten:
        raise ValueError(
            f"{str(path)!r} has no entry for {len(forgotten)} pictures beside it, such as "
            f"{os.fspath(forgotten[0].relative_to(path.parent))!r}: add entries, or move the pictures away."
        )
    data: dict[str, list[Any]] = {}
    for name in names:
        values = [entry.get(name) for entry in entries]
        if name in pictures:
            values = [None if not value else os.fspath(path.parent / value) for value in values]
        data[pictures.get(name, name)] = values
    try:
        dataset = Dataset.from_dict(data)
    except (TypeError, ValueError) as error:  # pyarrow's errors are subclasses of these
        raise ValueError(f"{str(path)!r} mixes types within a column: {error}") from error
    for name, column in pictures.items():
        if name in names and column != image_column:
            dataset = dataset.cast_column(column, Image(decode=False))
    return dataset
