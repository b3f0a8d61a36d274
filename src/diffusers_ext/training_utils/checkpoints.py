"""Training checkpoints that exist only when they are complete.

A checkpoint is staged in a temporary folder beside its final place; a manifest with the size and SHA-256 of each file
is written last, everything is fsynced, and one rename makes it visible. Resuming takes the newest folder whose
manifest holds.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
OUTDATED = "outdated"  # suffix of a checkpoint that is being replaced


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged or does not belong to this run."""


def publish(folder: Path, write: Callable[[Path], None], metadata: Mapping[str, Any]) -> None:
    """Makes `folder` appear in one rename, filled by `write(temporary_folder)` and sealed by a manifest.

    An older folder of the same name is replaced only after the new one is complete. If `write` fails (a full disk,
    say), nothing is published, the temporary folder is removed and the error goes on to the caller.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(4)}")
    try:
        staging.mkdir()
        write(staging)
        files = {}
        for path in sorted(p for p in staging.rglob("*") if p.is_file()):
            files[path.relative_to(staging).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
            _fsync(path)
        manifest = staging / MANIFEST
        manifest.write_text(json.dumps({**metadata, "files": files}, indent=1), encoding="utf-8")
        _fsync(manifest)
        _fsync(staging)
        if folder.exists():
            outdated = folder.with_name(f"{folder.name}.tmp-{OUTDATED}")
            os.replace(folder, outdated)
            os.replace(staging, folder)
            shutil.rmtree(outdated)
        else:
            os.replace(staging, folder)
        _fsync(folder.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def verify(folder: Path) -> dict[str, Any]:
    """Checks size and SHA-256 of every file of a checkpoint against its manifest, and returns the manifest.

    Raises:
        CheckpointError: names the first file that is missing or differs.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} has no readable {MANIFEST}, so it was never completed ({error}).") from error
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing.")
        if path.stat().st_size != expected["size"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {expected['size']}.")
        if _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}.")
    return manifest


def find_checkpoint(output_dir: Path, resume_from: str | None) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from, verified, with its manifest; `None` means to start afresh.

    Args:
        output_dir: Holds the folders `checkpoint-<step>`.
        resume_from: `None`, `"latest"` (the newest complete one; damaged ones are skipped with a warning that says
            why), or the path of one checkpoint, which must be complete.
    """
    if resume_from is None:
        return None
    if resume_from != "latest":
        return Path(resume_from), verify(Path(resume_from))
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            return folder, verify(folder)
        except CheckpointError as error:
            logger.warning("Skipped checkpoint %s: %s", folder.name, error)
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """All visible `checkpoint-<step>` folders, oldest first."""
    steps = ((re.fullmatch(r"checkpoint-(\d+)", p.name), p) for p in output_dir.glob("checkpoint-*") if p.is_dir())
    return [path for _, path in sorted((int(match[1]), path) for match, path in steps if match)]


def rotate(output_dir: Path, limit: int | None) -> None:
    """Removes the oldest complete checkpoints beyond `limit`, and what an interrupted save has left behind.

    A checkpoint that was put aside to be replaced, and was not, comes back.
    """
    for leftover in output_dir.glob("checkpoint-*.tmp-*"):
        name, _, suffix = leftover.name.partition(".tmp-")
        if suffix == OUTDATED and not (output_dir / name).exists():
            os.replace(leftover, output_dir / name)
        else:
            shutil.rmtree(leftover, ignore_errors=True)
    if limit is not None:
        complete = [folder for folder in list_checkpoints(output_dir) if (folder / MANIFEST).is_file()]
        for folder in complete[:-limit]:
            shutil.rmtree(folder)


def save_state(folder: Path, parts: Mapping[str, Any]) -> None:
    """Writes each part's `state_dict()`: networks as safetensors, everything else with `torch.save`."""
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            tensors = {key: value.detach().contiguous().cpu() for key, value in part.state_dict().items()}
            save_file(tensors, folder / f"{name}.safetensors")
        else:
            torch.save(part.state_dict(), folder / f"{name}.pt")


def load_state(folder: Path, parts: Mapping[str, Any]) -> None:
    """The inverse of `save_state`, strict, and without executing pickles.

    Raises:
        CheckpointError: a part is missing or does not fit.
    """
    for name, part in parts.items():
        path = folder / (f"{name}.safetensors" if isinstance(part, nn.Module) else f"{name}.pt")
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing: the checkpoint was written with other options (EMA, stage, recipe)."
            )
        try:
            if isinstance(part, nn.Module):
                part.load_state_dict(load_file(path))
            else:
                part.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} does not fit, it was written with other options: {error}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
