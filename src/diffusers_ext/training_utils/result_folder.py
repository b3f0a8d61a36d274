"""The result of a run appears in its folder whole or not at all, though checkpoints and the log lie there as well.

The new result is written beside the folder; everything of the folder that is no part of a result is linked to it; then
the two folders are exchanged in one system call. So a kill leaves the old result or the new one. Where folders cannot
be exchanged, two renames are needed, and a kill between them is mended by the next start (`recover_result`). Where
the folder itself cannot be renamed (it is the root of a volume, or the process works in it and would be left in the
older one) or the file system knows no links, the parts are renamed one by one: the index goes first and comes last, so
that nobody loads a mixture, and the next start ends it.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import safe_open

from .checkpoints import first_not_finite, removed_on_error, replace_folder, restore, settle

INDICES = ("model_index.json", "config.json")  # what `from_pretrained` looks for first
# weights of an older result, whole or in parts; no other files that a user may keep there
WEIGHTS = (
    "model.safetensors", "model-[0-9]*-of-*.safetensors", "model.safetensors.index.json", "diffusion_pytorch_model*",
    "pytorch_lora_weights*",
)  # fmt: skip
COMPLETE = "result.tmp-complete"


def write_result(output_dir: Path, write: Callable[[Path], None]) -> None:
    """Replaces the result in `output_dir` by what `write(temporary_folder)` writes; all else there stays.

    Raises:
        FloatingPointError: a weight is not finite; the older result stays.
        OSError: the disk is full; the older result stays.
    """
    output_dir = output_dir.resolve()
    is_worked_in = Path.cwd().resolve().is_relative_to(output_dir)
    movable = not is_worked_in and not output_dir.is_mount() and os.access(output_dir.parent, os.W_OK)
    staging = (output_dir if movable else output_dir / "result").with_name(
        f"{output_dir.name if movable else 'result'}.tmp-{secrets.token_hex(4)}"
    )
    with removed_on_error(staging):
        staging.mkdir()
        if output_dir.is_dir():
            shutil.copymode(output_dir, staging)
        write(staging)
        check_finite_files(staging)
        settle(staging)
        if movable and _link_rest(output_dir, staging):
            replace_folder(staging, output_dir)
        else:
            os.replace(staging, output_dir / COMPLETE)
            _move_parts(output_dir)


def recover_result(output_dir: Path) -> None:
    """Ends what a kill has interrupted; called before a run starts."""
    output_dir = output_dir.resolve()
    restore(output_dir)
    if output_dir.is_dir():
        for leftover in output_dir.glob("result.tmp-*"):
            if leftover.name != COMPLETE:
                shutil.rmtree(leftover, ignore_errors=True)
        _move_parts(output_dir)


def check_finite_files(folder: Path) -> None:
    """Reads every safetensors file of a folder.

    Raises:
        FloatingPointError: names the file and the tensor that is not finite.
    """
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():
                if first_not_finite(tensors.get_tensor(name), name) is not None:
                    raise FloatingPointError(
                        f"`{name}` of {path.relative_to(folder)} is not finite: the result is not written. What was "
                        "there before and the checkpoints are untouched."
                    )


def _link_rest(output_dir: Path, staging: Path) -> bool:
    """Gives `staging` what lies in the folder besides the older result, as further names of the same files.

    Returns:
        Whether the file system can do that; if not, `staging` is as it was.
    """
    linked = []
    try:
        for path in _other_than_result(output_dir, {path.name for path in staging.iterdir()}):
            linked.append(staging / path.name)
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, linked[-1], copy_function=os.link, symlinks=True)
            else:
                os.link(path, linked[-1], follow_symlinks=False)
    except OSError:
        for path in linked:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        return False
    return True


def _other_than_result(output_dir: Path, new: set[str]) -> Iterator[Path]:
    components = _components(output_dir)
    for path in output_dir.iterdir():
        is_weight = path.is_file() and any(path.match(pattern) for pattern in WEIGHTS)
        if path.name not in new | components and not is_weight:
            yield path


def _components(output_dir: Path) -> set[str]:
    """The folders of the pipeline that lies in a folder."""
    try:
        index = json.loads((output_dir / INDICES[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    return {name for name, value in index.items() if isinstance(value, list)}


def _move_parts(output_dir: Path) -> None:
    """Renames the parts of a complete new result to where they belong; may be interrupted and called again."""
    complete = output_dir / COMPLETE
    if not complete.is_dir():
        return
    parts = sorted(complete.iterdir(), key=lambda path: path.name in INDICES)
    names = {path.name for path in parts}
    if names & set(INDICES):  # nothing loads until the new index is there
        for name in INDICES:
            (output_dir / name).unlink(missing_ok=True)
        kept = {path.name for path in _other_than_result(output_dir, names)}
        for path in output_dir.iterdir():
            if path.name not in kept | names and path.is_file():  # weights of an older result in other files
                path.unlink()
    for part in parts:
        place = output_dir / part.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(part, place)
    complete.rmdir()
