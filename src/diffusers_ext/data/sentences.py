"""The training and validation sentences that a recipe's data options name: captions of pictures, or plain text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from .folder_contents import is_hidden, read_text, text_lines
from .pictures import PictureSource, hold_out, load_pictures, split_rows

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
        if path.suffix.lower() != ".txt":
            raise ValueError(f"`train_data_dir` is the file {str(path)!r}: a file of sentences must end in .txt.")
        return [path]
    if not path.is_dir():
        return []
    entries = [entry for entry in sorted(path.iterdir()) if not is_hidden(entry.name)]
    return entries if all(entry.is_file() and entry.suffix.lower() == ".txt" for entry in entries) else []


def _read_lines(files: list[Path], column: str, limit: int | None) -> Dataset:
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ImportError('`load_sentences` needs datasets: pip install datasets (extra "train")') from error
    sentences = [stripped for path in files for line in text_lines(read_text(path)) if (stripped := line.strip())]
    if not sentences:
        raise ValueError(f"There are no sentences in {str(files[0])!r}: a text file holds one a line.")
    kept, _ = split_rows(len(sentences), len(sentences) if limit is None else limit)
    return Dataset.from_dict({column: [sentences[index] for index in kept]})


def _hold_out(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """As `load_pictures` does it."""
    held_out, trained = hold_out(len(dataset))
    return (dataset.select(trained), dataset.select(held_out)) if held_out else (dataset, dataset)
