"""One run at a time in a folder: two would remove each other's half-written checkpoints.

The lock is the system's (`flock`) on `<output_dir>/run.lock`, so a kill releases it. The file holds the number of the
process that trains. It lies in the folder: where a result replaces the folder by another one, everything else of it is
linked there, which keeps the file and its lock (`result_folder.py`).
"""

import logging
import os
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK = "run.lock"

_held: dict[Path, IO[str]] = {}  # of this process, which may run one training after another in a folder


class FolderInUse(RuntimeError):
    """Another run trains in the folder."""


def acquire(output_dir: Path) -> None:
    """Locks a folder that exists for this process.

    Raises:
        FolderInUse: another process has it; names the folder, the process and the way out.
    """
    path = output_dir.resolve() / LOCK
    if fcntl is None or (path in _held and _is_at(_held[path], path)):
        return
    while True:
        file = path.open("a+", encoding="ascii")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise FolderInUse(
                f"Another run (process {holder}) trains in {output_dir}. Wait for it or stop it (`kill {holder}`: it "
                "saves a checkpoint first), or pass another --output_dir."
            ) from None
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s); start no second run here.", output_dir, error)
        if _is_at(file, path):
            break
        file.close()  # its owner removed it between the two lines
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    _held[path] = file


def release(output_dir: Path) -> None:
    """Gives the folder free, and removes the file; without a lock of this process nothing happens."""
    path = output_dir.resolve() / LOCK
    if (file := _held.pop(path, None)) is not None:
        if _is_at(file, path):
            path.unlink()
        file.close()


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _forget() -> None:
    """In a forked child: a loader process that outlives its parent would keep the folder locked."""
    for file in _held.values():
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
