"""Pictures that cannot be read: other rows stand in for theirs, and a file lists them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import fcntl
except ImportError:  # Windows: processes may list a picture twice
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

BROKEN_LIST = "broken_pictures.jsonl"
_FEW, _SHARE = 3, 0.05  # so many may be broken in any data set, and of a large one this share
_TRIES = 8


class UnreadablePictureError(ValueError):
    """The file of a picture (or of a .npy array) is damaged, or is something else."""


@dataclass(frozen=True)
class StandIns:
    """Rows that stand in for those whose pictures cannot be read.

    Which one stands in follows from the name of the file alone, so it is the same in every process, in every epoch and
    after a resume, and every other sample stays as it is.

    Args:
        rows: The data set, pictures undecoded.
        listed: File that gets a line, with name and reason, for each broken picture.
    """

    rows: Dataset
    listed: Path

    def read(
        self, row: Mapping[str, Any], picture_columns: tuple[str, ...], decode: Callable[[dict], dict]
    ) -> dict[str, Any]:
        """A row as it is, or the one that stands in for it.

        Args:
            row: Values of its columns, pictures undecoded.
            picture_columns: Those of them that hold pictures.
            decode: Reads the pictures of a batch of rows.

        Raises:
            ValueError: Too many pictures are broken.
        """
        key = " ".join(_name(row[name]) for name in picture_columns if name in row)
        found: UnreadablePictureError | None = None
        for attempt in range(_TRIES):
            try:
                return {name: values[0] for name, values in decode({k: [v] for k, v in row.items()}).items()}
            except UnreadablePictureError as error:
                found = error
                self.note(error)
            number = int.from_bytes(hashlib.sha256(f"{attempt} {key}".encode()).digest()[:8], "big") % len(self.rows)
            other: Mapping[str, Any] = self.rows[number]  # type: ignore[assignment]
            row = {name: other[name] for name in row}
        assert found is not None
        raise found

    def note(self, error: UnreadablePictureError) -> None:
        """Lists a picture, once.

        Raises:
            ValueError: They are more than a twentieth of the rows (and more than three).
        """
        line = json.dumps({"error": str(error)}, ensure_ascii=False)
        self.listed.parent.mkdir(parents=True, exist_ok=True)
        with self.listed.open("a+", encoding="utf-8") as stream:
            if fcntl is not None:
                fcntl.flock(stream, fcntl.LOCK_EX)  # until the file is closed; loader processes write as well
            stream.seek(0)
            lines = stream.read().splitlines()
            if line in lines:
                return
            stream.write(line + "\n")
        count, limit = len(lines) + 1, max(_FEW, int(_SHARE * len(self.rows)))
        if count > limit:
            raise ValueError(
                f"{count} pictures cannot be read, more than {limit} of {len(self.rows)}: that is no accident. "
                f"{self.listed} lists them; the last: {error}"
            )
        logger.warning("%s Another row stands in for it (the %d so far are in %s).", error, count, self.listed)


def _name(value: Any) -> str:
    """What tells a picture from others: the name of its file, or else what it holds."""
    if isinstance(value, Mapping):
        value = value.get("path") or value.get("bytes")
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return os.path.basename(value) if isinstance(value, str | os.PathLike) else str(value)
