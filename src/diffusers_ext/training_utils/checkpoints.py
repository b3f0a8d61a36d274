"""Training checkpoints that exist only when they are complete.

A checkpoint is staged in a temporary folder beside its final place; a manifest with the size and SHA-256 of each file
is written last, everything is fsynced, and one rename makes it visible. Resuming takes the newest folder whose
manifest holds.
"""

import ctypes
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
OWN_HASH = "sha256"  # of the manifest without this entry
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
    with removed_on_error(staging):
        staging.mkdir()
        write(staging)
        files = {}
        for path in sorted(p for p in staging.rglob("*") if p.is_file()):
            files[path.relative_to(staging).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        manifest = {**metadata, "files": files}
        text = json.dumps({**manifest, OWN_HASH: _manifest_hash(manifest)}, indent=1)
        (staging / MANIFEST).write_text(text, encoding="utf-8")
        settle(staging)
        replace_folder(staging, folder)


@contextmanager
def removed_on_error(staging: Path) -> Iterator[None]:
    """Removes a half-written folder when the block fails, and says so where the disk is what failed.

    Raises:
        OSError: the disk is full; names it and what was written (torch and safetensors do not say so).
    """
    try:
        yield
    except BaseException as error:
        full = isinstance(error, Exception) and _is_disk_full(error, staging.parent)
        written = sum(p.stat().st_size for p in staging.rglob("*") if p.is_file()) if full else 0
        shutil.rmtree(staging, ignore_errors=True)
        if full:
            free = shutil.disk_usage(staging.parent).free
            raise OSError(
                errno.ENOSPC,
                f"No space left on the disk of {staging.parent}: {staging.name.partition('.tmp-')[0]} could not be "
                f"written after {written:,} bytes; without its remains {free:,} bytes are free. Nothing was replaced: "
                "free some space, or lower --checkpoints_total_limit, and go on from the last checkpoint",
            ) from error
        raise


def _is_disk_full(error: BaseException | None, folder: Path) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # torch.save and safetensors raise errors of their own, without the system's number
        if isinstance(error, RuntimeError | SafetensorError) and shutil.disk_usage(folder).free < 2**20:
            return True
        error = error.__cause__
    return False


def settle(folder: Path) -> None:
    """Gives all files the mode that the umask asks for (safetensors writes 0600), and puts them on the disk."""
    probe = folder / f".mode-{secrets.token_hex(4)}"
    probe.touch()  # asking for the umask itself would set it for all threads
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            _fsync(path)
        elif path.is_dir():
            _fsync(path)
    _fsync(folder)


def replace_folder(staging: Path, folder: Path) -> None:
    """Puts `staging` in the place of `folder`, at once where the system can exchange two folders.

    Elsewhere two renames are needed. Between them the older one is called `<name>.tmp-outdated`: `restore` brings it
    back.
    """
    if not folder.exists():
        os.replace(staging, folder)
    else:
        try:
            _exchange(staging, folder)
            outdated = staging
        except OSError:
            outdated = folder.with_name(f"{folder.name}.tmp-{OUTDATED}")
            os.replace(folder, outdated)
            os.replace(staging, folder)
        shutil.rmtree(outdated)
    _fsync(folder.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swaps two folders in one system call: renameat2 of Linux, renamex_np of macOS.

    Raises:
        OSError: this system or file system cannot.
    """
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(library, "renameat2"):
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        failed = library.renameat2(here, names[0], here, names[1], exchange)
    elif hasattr(library, "renamex_np"):
        failed = library.renamex_np(*names, 2)  # RENAME_SWAP
    else:
        raise OSError(errno.ENOSYS, "no exchange of two folders")
    if failed:
        raise OSError(ctypes.get_errno(), "the two folders cannot be exchanged")


def restore(folder: Path) -> None:
    """Ends what was interrupted while `folder` was replaced: what was put aside and not replaced comes back, and
    half-written folders go."""
    for leftover in list(folder.parent.iterdir()):
        name, _, suffix = leftover.name.rpartition(".tmp-")
        if name != folder.name or not re.fullmatch(rf"[0-9a-f]+|{OUTDATED}", suffix):
            continue
        if suffix == OUTDATED and not folder.exists():
            os.replace(leftover, folder)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside `path` with `write(temporary_path)`, and puts it there in one rename."""
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")  # the suffix says the format
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_half_files(folder: Path) -> None:
    """Removes what a kill has left of `replace_file` in a folder."""
    for path in folder.iterdir():
        if re.match(r"\.tmp-[0-9a-f]{8}-", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def verify(folder: Path) -> dict[str, Any]:
    """Checks the manifest of a checkpoint, and size and SHA-256 of every file against it; returns the manifest.

    Raises:
        CheckpointError: names the first file that is missing or differs.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing.")
        if path.stat().st_size != expected["size"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes instead of {expected['size']}.")
        if _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}.")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; the files themselves are not looked at.

    Raises:
        CheckpointError: there is none, or it is not the one that was written.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        own_hash = manifest.pop(OWN_HASH, None)
        if not {"step", "files"} <= manifest.keys():
            raise KeyError("step or files")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder} has no readable {MANIFEST}, so it was never completed ({error}).") from error
    if own_hash is None and manifest.keys() <= {"step", "seed", "torch", "files"}:  # before manifests had a hash
        return manifest
    if own_hash != _manifest_hash(manifest):
        raise CheckpointError(f"{folder / MANIFEST} is damaged: it is not the one that was written.")
    return manifest


def _manifest_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def find_checkpoint(output_dir: Path, resume_from: str | None) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to resume from, verified, with its manifest; `None` means to start afresh.

    Args:
        output_dir: Holds the folders `checkpoint-<step>`.
        resume_from: `None`, `"latest"` (the newest complete one; damaged ones are skipped with a warning that says
            why), the name of one in `output_dir`, or the path of one, which must be complete.

    Raises:
        CheckpointError: the one that is named is damaged, or no checkpoint.
    """
    if resume_from is None:
        return None
    if resume_from != "latest":
        folder = _named_checkpoint(output_dir, resume_from)
        return folder, verify(folder)
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            return folder, verify(folder)
        except CheckpointError as error:
            logger.warning("Skipped checkpoint %s: %s", folder.name, error)
    return None


def _named_checkpoint(output_dir: Path, name: str) -> Path:
    """A bare name lies in the run's folder, as in diffusers' examples; anything else is a path."""
    folder = Path(name)
    if folder.name == name and (output_dir / name).is_dir():
        return output_dir / name
    if folder.is_dir() and (list_checkpoints(folder) or (folder / MANIFEST).is_file()):
        if (folder / MANIFEST).is_file():
            return folder
        inside = ", ".join(path.name for path in list_checkpoints(folder))
        raise CheckpointError(
            f"--resume_from_checkpoint {name} is the folder of a run: name one of its checkpoints ({inside}), or pass "
            "--output_dir with it and --resume_from_checkpoint latest."
        )
    if not folder.is_dir():
        there = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
        raise CheckpointError(
            f"--resume_from_checkpoint {name}: there is no such folder, neither in {output_dir} (checkpoints there: "
            f"{there}) nor in {Path.cwd()}. Pass `latest`, the name of a checkpoint in --output_dir, or a path."
        )
    return folder


def list_checkpoints(output_dir: Path) -> list[Path]:
    """All visible `checkpoint-<step>` folders, oldest first."""
    steps = ((re.fullmatch(r"checkpoint-(\d+)", p.name), p) for p in output_dir.glob("checkpoint-*") if p.is_dir())
    return [path for _, path in sorted((int(match[1]), path) for match, path in steps if match)]


def rotate(output_dir: Path, limit: int | None, newest: Path | None = None) -> None:
    """Removes the oldest complete checkpoints beyond `limit`, and what an interrupted save has left behind.

    A checkpoint that was put aside to be replaced, and was not, comes back.

    Args:
        newest: The one that was just written; it stays, whatever the numbers of the others.
    """
    for name in {p.name.rpartition(".tmp-")[0] for p in output_dir.glob("checkpoint-*.tmp-*")}:
        restore(output_dir / name)
    if limit is not None:
        complete = [folder for folder in list_checkpoints(output_dir) if (folder / MANIFEST).is_file()]
        if newest in complete:
            complete.append(complete.pop(complete.index(newest)))
        for folder in complete[:-limit]:
            shutil.rmtree(folder)


Branches = list[tuple[str, int]]  # the starts that led to a checkpoint: name of the start, step at which it began


def put_aside(output_dir: Path, step: int, branches: Branches) -> None:
    """Renames the checkpoints that do not lie on the way to step `step` of the run with these `branches`.

    They would count as the newest of the run that goes on from there, though another one wrote them. Each becomes
    `checkpoint-<step>.aside`, from which one can still resume by name.
    """
    for folder in reversed(list_checkpoints(output_dir)):
        if not _lies_on_the_way(folder, step, branches):
            number, aside = 2, folder.with_name(f"{folder.name}.aside")
            while aside.exists():
                number, aside = number + 1, folder.with_name(f"{folder.name}.aside-{number}")
            os.replace(folder, aside)
            logger.warning("%s is none of this run's: it is called %s from now on.", folder, aside.name)


def _lies_on_the_way(folder: Path, step: int, branches: Branches) -> bool:
    if int(folder.name.partition("-")[2]) > step:
        return False
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return True  # `latest` skips it, and says why
    found: Branches = [(name, start) for name, start in manifest.get("branches", [])]
    end = branches[len(found)][1] if len(found) < len(branches) else step  # where the run left that branch
    return found == branches[: len(found)] and manifest["step"] <= end


def save_state(folder: Path, parts: Mapping[str, Any]) -> None:
    """Writes each part's `state_dict()`: networks as safetensors, everything else with `torch.save`."""
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            tensors = {key: value.detach().contiguous().cpu() for key, value in part.state_dict().items()}
            save_file(tensors, folder / f"{name}.safetensors")
        else:
            torch.save(part.state_dict(), folder / f"{name}.pt")


def check_finite_state(parts: Mapping[str, Any], what: str) -> None:
    """Refuses to save what is not finite: a run could not go on from it, and nobody would see why.

    Raises:
        FloatingPointError: names the part and the tensor.
    """
    for name, part in parts.items():
        if (tensor := first_not_finite(part.state_dict())) is not None:
            raise FloatingPointError(
                f"`{tensor}` of {name} is not finite after {what}, so nothing is saved; the last checkpoint is "
                "untouched. Lower --learning_rate, or look at the last lines of the log."
            )


def first_not_finite(state: Any, name: str = "") -> str | None:
    """The name of the first tensor in nested mappings and lists that holds infinity or no number."""
    tensors = dict(_floating_tensors(state, name))
    # one number of all, and one pass: it is finite only if they are (their squares may overflow, so ask each then)
    if not tensors or bool(torch.isfinite(get_total_norm(tensors.values()))):
        return None
    return next((name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)


def _floating_tensors(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        if state.is_floating_point() and not state.is_meta:
            yield name, state.detach().float() if state.itemsize == 1 else state.detach()  # float8 has no norms
        return
    pairs = (
        state.items() if isinstance(state, Mapping) else enumerate(state) if isinstance(state, list | tuple) else ()
    )
    for key, value in pairs:
        yield from _floating_tensors(value, f"{name}.{key}" if name else str(key))


def load_state(folder: Path, parts: Mapping[str, Any], optional: Collection[str] = ()) -> None:
    """The inverse of `save_state`, strict, and without executing pickles.

    Args:
        optional: Parts that may be missing, and stay as they are then.

    Raises:
        CheckpointError: a part is missing or does not fit.
    """
    for name, part in parts.items():
        path = folder / (f"{name}.safetensors" if isinstance(part, nn.Module) else f"{name}.pt")
        if not path.is_file() and name in optional:
            continue
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing: the checkpoint was written with other options (EMA, stage, recipe)."
            )
        try:
            is_network = isinstance(part, nn.Module)
            state = load_file(path) if is_network else torch.load(path, map_location="cpu", weights_only=True)
            if (tensor := first_not_finite(state)) is not None:
                raise CheckpointError(f"`{tensor}` in {path} is not finite: resume from an older checkpoint.")
            part.load_state_dict(state)
        except CheckpointError:
            raise
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
