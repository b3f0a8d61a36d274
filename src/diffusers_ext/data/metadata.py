"""Tables that describe pictures: metadata.jsonl, .json, .csv, .tsv and .parquet, read and checked entry by entry."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .folder_contents import read_text, text_lines

Entry = dict[str, Any]


def read_metadata(path: Path, text_columns: Sequence[str] = ()) -> list[Entry]:
    """The entries of a table, as dictionaries.

    Args:
        path: Its suffix, in any letter case, tells the format: `.jsonl` (an object a line), `.json` (an array of
            objects), `.csv`, `.tsv` or `.parquet`.
        text_columns: Columns that stay text where the format has no types.

    Raises:
        ValueError: it cannot be read; names file and line.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix in (".csv", ".tsv"):
        return _read_csv(path, "\t" if suffix == ".tsv" else ",", text_columns)
    return _read_array(path) if suffix == ".json" else _read_lines(path)


def _read_parquet(path: Path) -> list[Entry]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as parquet: {error}") from error


def _read_csv(path: Path, delimiter: str, text_columns: Sequence[str]) -> list[Entry]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows: list[Entry] = []
    try:
        header = list(reader.fieldnames or ())
        if len(set(header)) < len(header):
            raise ValueError(f"{str(path)!r} has two columns of one name: {', '.join(header)}.")
        for row in reader:
            if None in row:
                raise ValueError(
                    f"Line {reader.line_num} of {str(path)!r} has {len(header) + len(row[None])} fields, but there "
                    f"are {len(header)} columns: put a text that holds {delimiter!r} into double quotes."
                )
            rows.append({key: value for key, value in row.items() if value not in (None, "")})
    except csv.Error as error:
        raise ValueError(f"Line {reader.reader.line_num} of {str(path)!r} is not CSV: {error}.") from error
    # CSV has no types: a column of nothing but integers (labels) becomes one of integers
    for name in {key for row in rows for key in row} - set(text_columns):
        if all(re.fullmatch(r"-?\d+", row.get(name, "0")) for row in rows):
            rows = [{**row, name: int(row[name])} if name in row else row for row in rows]
    return rows


def _read_array(path: Path) -> list[Entry]:
    try:
        entries = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}. One object a line: name it metadata.jsonl.") from error
    if not isinstance(entries, list):
        raise ValueError(f"{str(path)!r} holds a {type(entries).__name__}, but must hold an array of objects.")
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise ValueError(f"Entry {number} of {str(path)!r} is no JSON object: {str(entry)[:80]!r}")
    return entries


def _read_lines(path: Path) -> list[Entry]:
    entries = []
    for number, line in enumerate(text_lines(read_text(path)), start=1):
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


def picture_columns(names: Sequence[str], image_column: str) -> dict[str, str]:
    """Names of entries that hold file names, and the column that each becomes.

    `file_name` holds the picture itself, `<name>_file_name` a picture that becomes the column <name>.
    """
    others = {name: name.removesuffix("_file_name") for name in names if name.endswith("_file_name")}
    return others | {"file_name": image_column}


def check_entries(
    path: Path, entries: list[Entry], image_column: str, needed: Sequence[str], text_columns: Sequence[str]
) -> list[Entry]:
    """The entries with whole paths for file names.

    Raises:
        ValueError: there are none, one has no picture or one outside of the folder, or lacks what is needed, or has
            something else than text for a caption; names file, entry and column.
    """
    if not entries:
        raise ValueError(f"{str(path)!r} has no entries.")
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    files = picture_columns(names, image_column)
    checked = []
    for number, entry in enumerate(entries, start=1):
        where = f"Entry {number} of {str(path)!r}"
        if not entry.get("file_name"):
            raise ValueError(f"{where} has no `file_name`: {str(entry)[:120]}")
        entry = dict(entry)
        for name in needed:
            if name in names and _is_empty(entry.get(name)):
                raise ValueError(
                    f"The picture {entry['file_name']!r} has no {name!r} in {str(path)!r} (entry {number})."
                )
        for name in text_columns:
            if name in entry and not _is_empty(entry[name]):
                check_text(entry[name], f"{where} ({entry['file_name']!r})", name)
        for name in files:
            if entry.get(name):
                entry[name] = os.fspath(_inside(path.parent, entry[name], where))
        checked.append(entry)
    return checked


def check_text(value: Any, where: str, column: str) -> None:
    """A caption is a string, or a list of strings.

    Raises:
        ValueError: `value` is something else.
    """
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(text, str) for text in value)):
        return
    raise ValueError(
        f"{where} has {str(value)[:80]} ({type(value).__name__}) in the column {column!r}: a caption is a string, or "
        "a list of strings."
    )


def _is_empty(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _inside(folder: Path, name: Any, where: str) -> Path:
    if not isinstance(name, str):
        raise ValueError(f"{where} has the file name {name!r} ({type(name).__name__}): expected a string.")
    parts = (*PurePosixPath(name).parts, *PureWindowsPath(name).parts)
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in parts:
        raise ValueError(
            f"{where} names {name!r}, which leads out of its folder: name a picture below {str(folder)!r}, without "
            "'..'. For pictures elsewhere put a link into the folder."
        )
    if not (folder / name).is_file():
        raise ValueError(f"{where} names a picture that does not exist: {name!r}.")
    return folder / name
