"""The training and validation sentences that a recipe's data options name: captions of pictures, or plain text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .image_folder import METADATA_NAMES
from .pictures import VALIDATION_SAMPLES, PictureSource, load_pictures

if TYPE_CHECKING:
    from datasets import Dataset


def load_sentences(source: PictureSource) -> tuple[Dataset, Dataset]:
    """Training and validation set, map-style: rows are dictionaries with one column, `source.caption_column`.

    Captions of `scenes` and of a folder of pictures are those of `load_pictures`, and no picture is decoded; of a data
    set on the Hub the column is read, with or without pictures beside it. `train_data_dir` may also be a text file, or
    a folder of them (*.txt), with one sentence a line. Where there is no validation split, a tenth, at most 256
    sentences, is held out by a fixed permutation.

    Raises:
        ValueError: as `load_pictures`; or a text file has no lines.
    """
    column = source.caption_column
    if source.train_data_dir is not None:
        files = text_files(Path(source.train_data_dir))
        if files:
            return _hold_out(_read_lines(files, column, source.max_train_samples))
        sets = load_pictures(source, columns=(column,))
    else:
        only_text = copy.copy(source)
        only_text.image_column = column  # the one column that is needed
        sets = load_pictures(only_text)
        if source.dataset_name != "scenes":  # whose rows are made when they are read
            sets = tuple(rows.with_format(None) for rows in sets)
    train, validation = (rows.select_columns([column]) for rows in sets)
    return train, validation


def text_files(path: Path) -> list[Path]:
    """The text files that `path` stands for; none for a folder of pictures (whose captions may lie in text files)."""
    if path.is_file():
        if path.suffix != ".txt":
            raise ValueError(f"`train_data_dir` is the file {str(path)!r}: a file of sentences must end in .txt.")
        return [path]
    if not path.is_dir() or any((path / name).exists() for name in METADATA_NAMES):
        return []
    files = [entry for entry in sorted(path.iterdir()) if entry.is_file() and not entry.name.startswith(".")]
    return files if all(entry.suffix == ".txt" for entry in files) else []


def _read_lines(files: list[Path], column: str, limit: int | None) -> Dataset:
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ImportError('`load_sentences` needs datasets: pip install "diffusers_ext[train]"') from error
    sentences: list[str] = []
    for path in files:
        with path.open(encoding="utf-8") as lines:
            sentences += [stripped for line in lines if (stripped := line.strip())]
        if limit is not None and len(sentences) >= limit:
            break
    if not sentences:
        raise ValueError(f"There are no sentences in {str(files[0])!r}: a text file holds one a line.")
    return Dataset.from_dict({column: sentences[:limit]})


def _hold_out(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """As `load_pictures` does it."""
    held_out = min(VALIDATION_SAMPLES, len(dataset) // 10)
    if held_out == 0:
        return dataset, dataset
    order = np.random.Generator(np.random.Philox(0)).permutation(len(dataset))
    return dataset.select(sorted(order[held_out:])), dataset.select(sorted(order[:held_out]))
