"""The layouts of a folder of pictures, each as a table whose picture column holds paths; nothing is decoded.

What a folder does not say is not guessed: names of files and folders become captions only on request.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folder_contents import (
    IMAGE_SUFFIXES,
    METADATA_NAMES,
    FolderContents,
    captions_beside,
    is_hidden,
    is_metadata,
    picture_suffixes,
    read_contents,
)
from .metadata import check_entries, picture_columns, read_metadata

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
# what cameras and tools write before the number says nothing about the picture
_EMPTY_NAMES = frozenset(("img", "dsc", "dscf", "dscn", "pxl", "image", "picture", "photo", "pic", "screenshot"))
_REPEATS = re.compile(r"([1-9]\d*)_(.+)")  # kohya's folders: 10_corgi dog


@dataclass(frozen=True)
class Columns:
    """What the columns are called, and which are needed.

    Args:
        image, caption, label: their names.
        needed: Columns that each row must fill.
        texts: Those of them that hold captions.
        captions_from_names: Make captions of names where there are no others.
        all: Take everything that the folder has, needed or not.
    """

    image: str = "image"
    caption: str = "text"
    label: str = "label"
    needed: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    captions_from_names: bool = False
    all: bool = False


@dataclass(frozen=True)
class Rows:
    """A table of pictures, and how often each counts in an epoch (`None`: once)."""

    dataset: Dataset
    repeats: list[int] | None = None


def caption_from_file_name(file_name: str | os.PathLike[str]) -> str:
    """The words of a file name without its number: "a_red_house_003.jpg" -> "a red house".

    Returns:
        "" for names that say nothing, such as "0017.png" or "IMG_0017.jpg".
    """
    words = re.sub(r"[_\-\s]+", " ", Path(file_name).stem).strip()
    words = re.sub(r"(?:(?<=\w) |^)\(?\d+\)?$", "", words).strip()  # "... 003", "... (3)"
    plain = re.sub(r"[\d ]+", "", words).lower()
    return "" if not plain or plain in _EMPTY_NAMES else words


def split_folders(folder: Path) -> dict[str, Path]:
    """The subfolders of `train`, `validation` and `test`, where all pictures lie in such; else none."""
    known = {name: key for key, names in SPLIT_FOLDERS.items() for name in names}
    entries = [entry for entry in sorted(folder.iterdir()) if not is_hidden(entry.name)]
    if any(is_metadata(entry.name) or entry.name in ("dataset_info.json", "state.json") for entry in entries):
        return {}
    named = [entry for entry in entries if entry.is_dir() and entry.name.lower() in known]
    if not named or any(_holds_pictures(entry) for entry in entries if entry not in named):
        return {}
    splits: dict[str, Path] = {}
    for entry in named:
        other = splits.setdefault(known[entry.name.lower()], entry)
        if other is not entry:
            raise ValueError(f"{str(folder)!r} has both {other.name!r} and {entry.name!r}: keep one of them.")
    return splits


def _holds_pictures(entry: Path) -> bool:
    if entry.is_dir():
        found = read_contents(entry)
        return bool(found.pictures or found.tables or found.metadata)
    return entry.suffix.lower() in picture_suffixes() or entry.suffix.lower() == ".parquet"


def read_folder(folder: Path, columns: Columns, cache_dir: str | None = None) -> Rows:
    """The rows of a folder without splits, in whichever layout it has.

    Raises:
        ValueError: With the name of the file or column that is wrong, and the way out.
    """
    import datasets

    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        return Rows(datasets.Dataset.load_from_disk(os.fspath(folder)))
    contents = read_contents(folder)
    if contents.metadata:
        dataset, described = _from_metadata(contents, columns)
        rows = Rows(dataset)
        others = [path for path in contents.others if os.path.normpath(path) not in described]
        unread = others + contents.tables
        if _any_beside(contents):
            logger.warning(
                "%s has captions twice: those of %s are used, text files beside the pictures (such as %s) are not.",
                folder,
                contents.names(contents.metadata),
                contents.names(contents.texts, 1),
            )
    elif contents.tables:
        rows = Rows(_from_tables(contents, cache_dir))
        unread = contents.others + contents.texts
    elif contents.pictures:
        rows = _from_pictures(contents, columns)
        unread = contents.others
    else:
        others = [*contents.others, *contents.texts]
        there = f"; it has {contents.names(others)}" if others else ""
        if any(path.suffix.lower() == ".tar" for path in others):
            there += (
                f". Tars of WebDataset are read by --dataset_name {folder} with --image_column jpg and the like, the "
                "suffixes of their members"
            )
        raise ValueError(
            f"There are no pictures in {str(folder)!r} (looked for {', '.join(IMAGE_SUFFIXES)} and what else Pillow "
            f"reads, {', '.join(METADATA_NAMES)} and *.parquet){there}."
        )
    if unread:
        logger.info("Not read in %s, since they are no pictures: %s.", folder, contents.names(unread))
    return rows


def _from_tables(contents: FolderContents, cache_dir: str | None) -> Dataset:
    import datasets
    import datasets.exceptions
    import pyarrow
    import pyarrow.parquet

    if contents.pictures:
        raise ValueError(
            f"{str(contents.folder)!r} has pictures ({contents.relative(contents.pictures[0])} ...) beside "
            f"{contents.relative(contents.tables[0])}: name the table metadata.parquet, with a column `file_name`, or "
            "keep the pictures elsewhere."
        )
    first: list[str] = []
    for path in contents.tables:
        try:
            names = pyarrow.parquet.read_schema(path).names
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{str(path)!r} cannot be read as parquet: {error}") from error
        first = first or names
        if sorted(names) != sorted(first):
            raise ValueError(
                f"{str(path)!r} has the columns {', '.join(names)}, but {contents.tables[0].name} beside it has "
                f"{', '.join(first)}: keep tables of other columns elsewhere."
            )
    files = [os.fspath(path) for path in contents.tables]
    try:
        return datasets.Dataset.from_parquet(files, cache_dir=cache_dir)  # pyright: ignore
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"The tables {contents.names(contents.tables)} cannot be read: {error.__cause__}") from error


def _from_metadata(contents: FolderContents, columns: Columns) -> tuple[Dataset, Collection[str]]:
    """The table, and the files that it names."""
    from datasets import Dataset, Image

    entries: list[dict[str, Any]] = []
    described: dict[str, Path] = {}
    folders: dict[Path, Path] = {}
    for path in contents.metadata:
        if (other := folders.setdefault(path.parent, path)) is not path:
            both = sorted((other.name, path.name), key=lambda name: METADATA_NAMES.index(name.lower()))
            raise ValueError(f"{str(path.parent)!r} has both {both[0]} and {both[1]}: keep one of them.")
        read = read_metadata(path, columns.texts)
        read = check_entries(path, read, columns.image, columns.needed, columns.texts)
        for entry in read:
            for name in picture_columns(list(entry), columns.image):
                if entry.get(name):
                    other = described.setdefault(os.path.normpath(entry[name]), path)
                    if other is not path:
                        raise ValueError(
                            f"{str(other)!r} and {str(path)!r} both describe the picture {entry[name]!r}: keep one "
                            "of the entries."
                        )
        entries += read
    forgotten = [file for file in contents.pictures if os.path.normpath(file) not in described]
    if forgotten:
        raise ValueError(
            f"{str(contents.metadata[0])!r} has no entry for {len(forgotten)} pictures beside it, such as "
            f"{contents.relative(forgotten[0])!r}: add entries, or move the pictures away."
        )
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    pictures = picture_columns(names, columns.image)
    data: dict[str, list[Any]] = {}
    for name in names:
        values = [entry.get(name) for entry in entries]
        if name in columns.texts and any(isinstance(value, list) for value in values):
            values = [[value] if isinstance(value, str) else value for value in values]
        data[pictures.get(name, name)] = values
    try:
        dataset = Dataset.from_dict(data)
    except (TypeError, ValueError, OverflowError) as error:  # pyarrow's errors are subclasses of these
        raise ValueError(f"{str(contents.metadata[0])!r} mixes types within a column: {error}") from error
    for name, column in pictures.items():
        if name in names and column != columns.image:
            dataset = dataset.cast_column(column, Image(decode=False))
    return dataset, described


def _from_pictures(contents: FolderContents, columns: Columns) -> Rows:
    """Pictures without a table: captions in text files beside them, or of names on request; labels from folders."""
    from datasets import ClassLabel, Dataset

    parts = [path.relative_to(contents.folder).parts for path in contents.pictures]
    depths = {len(part): part for part in reversed(parts)}
    classes = [part[0] for part in parts] if set(depths) == {2} else None
    beside = _any_beside(contents)
    if classes is None and set(depths) != {1} and (not beside or columns.label in columns.needed):
        raise ValueError(_depth_message(contents, depths))
    captions = _captions(contents, columns, beside, classes)
    data: dict[str, list[Any]] = {columns.image: [os.fspath(path) for path in contents.pictures]}
    if captions is not None:
        data[columns.caption] = captions
    if classes is None:
        return Rows(Dataset.from_dict(data))
    repeats = None
    named = [match.groups() for name in classes if (match := _REPEATS.fullmatch(name))]
    if len(named) == len(classes) and (beside or columns.captions_from_names):  # else 1_cat may be class number 1
        repeats, classes = [int(number) for number, _ in named], [name for _, name in named]
        told = ", ".join(f"{name} {number} times" for number, name in sorted(set(named)))
        logger.info("The folders of %s are named repeats_name; a picture counts: %s.", contents.folder, told)
    names = sorted(set(classes))
    data[columns.label] = [names.index(name) for name in classes]
    return Rows(Dataset.from_dict(data).cast_column(columns.label, ClassLabel(names=names)), repeats)


def _depth_message(contents: FolderContents, depths: dict[int, tuple[str, ...]]) -> str:
    ways_out = (
        "put all of them into one folder, or all into one subfolder a class, give each a text file with its caption "
        "beside it, or describe them in a metadata.jsonl."
    )
    examples = [repr("/".join(part)) for _, part in sorted(depths.items())][:3]
    if len(depths) == 1:
        return f"{str(contents.folder)!r} has its pictures {next(iter(depths)) - 1} folders deep ({examples[0]}): " + (
            f"name the folder above the classes, {ways_out}"
        )
    return f"{str(contents.folder)!r} has pictures at different depths ({' and '.join(examples)}): {ways_out}"


def _captions(
    contents: FolderContents, columns: Columns, beside: bool, classes: Sequence[str] | None
) -> list[str] | list[list[str]] | None:
    """A caption a picture, or a list of them a picture; `None` where none are there and none are needed."""
    wanted = columns.caption in columns.needed
    if not (wanted or columns.all):
        return None
    if not beside and columns.captions_from_names:
        return _names_as_captions(contents, wanted, classes, columns.caption)
    if not beside:
        if wanted:
            raise ValueError(_no_captions_message(contents, columns, classes))
        return None
    found = captions_beside(contents)
    missing = [path for path, lines in zip(contents.pictures, found, strict=True) if not lines]
    if missing and wanted:
        raise ValueError(
            f"The picture {str(missing[0])!r} has no caption, but other pictures have text files beside them "
            f"({contents.names(contents.texts, 1)}): write {missing[0].stem}.txt, or move the picture away "
            f"({len(missing)} such)."
        )
    if missing:
        return None
    captions = [lines or [] for lines in found]
    return captions if any(len(lines) > 1 for lines in captions) else [lines[0] for lines in captions]


def _any_beside(contents: FolderContents) -> bool:
    stems = {(path.parent, path.stem.casefold()) for path in contents.texts}
    return any((path.parent, path.stem.casefold()) in stems for path in contents.pictures) if stems else False


def _no_captions_message(contents: FolderContents, columns: Columns, classes: Sequence[str] | None) -> str:
    path = contents.pictures[0]
    unread = [*contents.others, *contents.texts]
    found = f" These files are not read: {contents.names(unread)}." if unread else ""
    kind = "file" if classes is None else "folder"
    return (
        f"The picture {str(path)!r} has no caption: there is no text file beside it ({path.stem}.txt or .caption), "
        f"and no metadata.jsonl (or .json, .csv, .tsv, .parquet) with lines like "
        f'{{"file_name": "{path.name}", "{columns.caption}": "a red house"}}.{found} To make captions of the '
        f"{kind} names, pass --captions_from_names (`captions_from_names=True`)."
    )


def _names_as_captions(
    contents: FolderContents, wanted: bool, classes: Sequence[str] | None, column: str
) -> list[str] | None:
    if classes is not None:
        named = [match[2] for name in classes if (match := _REPEATS.fullmatch(name))]
        words = named if len(named) == len(classes) else classes
        return [re.sub(r"[_\-\s]+", " ", name).strip() for name in words]
    captions = [caption_from_file_name(path) for path in contents.pictures]
    if all(captions):
        return captions
    if not wanted:
        return None
    path = contents.pictures[captions.index("")]
    raise ValueError(
        f"The picture {str(path)!r} has no caption: its name says nothing, and there is no metadata.jsonl. Name it "
        f'like "a_red_house_003.jpg", or write a metadata.jsonl with lines like {{"file_name": "{path.name}", '
        f'"{column}": "a red house"}}.'
    )
