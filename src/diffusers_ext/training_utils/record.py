"""What a run was started with: kept in `options.json` and in every checkpoint, and compared when it is resumed.

One rule: what changes the order of the samples or the meaning of the loss is refused without `--resume_with_changes`;
what may change (`APPLIED` of the arguments) applies from there on and is listed; versions are a warning.
"""

import json
import logging
import math
import platform
import secrets
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .args import TrainArgs, all_options
from .checkpoints import Branches, CheckpointError, replace_file

logger = logging.getLogger(__name__)

OPTIONS = "options.json"
PACKAGES = (
    "diffusers_ext",
    "diffusers",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
)


@dataclass
class Record:
    """Everything that a run was started with.

    Args:
        options: Every option of the command line, resolved.
        processes: How many train together.
        rows: Samples of the data set.
        versions: Of Python and the packages that compute.
        commit: Of this package's sources, where they lie in a git repository.
        branches: The starts that led here, oldest first, each with its first step.
    """

    options: dict[str, Any]
    processes: int
    rows: int
    versions: dict[str, str]
    commit: str | None
    branches: Branches

    @property
    def samples_per_step(self) -> int:
        return _samples_per_step(self.options, self.processes)


def make_record(train: TrainArgs, accelerator: Accelerator, rows: int) -> Record:
    """The record of a run that starts now; `run.resume` adds the former starts of one that goes on."""
    options = {name: _plain(value) for name, value in all_options(train).items()}
    start = [(secrets.token_hex(8), 0)]
    return Record(options, accelerator.num_processes, rows, dict(_versions()), _commit(), start)


def write_options(output_dir: Path, record: Record) -> None:
    """Writes `options.json`, which says what the run in this folder was started with."""
    text = json.dumps(asdict(record), indent=1)
    replace_file(output_dir / OPTIONS, lambda path: path.write_text(text + "\n", encoding="utf-8"))


def check_same_run(folder: Path, manifest: Mapping[str, Any], record: Record, train: TrainArgs) -> None:
    """Compares a run that goes on with the one that wrote the checkpoint, and lists what differs.

    Raises:
        CheckpointError: it would be another run, and `--resume_with_changes` is not set; or it is over already.
    """
    if manifest["step"] > train.max_train_steps:
        raise CheckpointError(
            f"{folder} is at step {manifest['step']}, beyond --max_train_steps={train.max_train_steps}: raise it, or "
            "name an older checkpoint."
        )
    if "options" not in manifest:
        logger.info("%s says nothing of its options (it is of an older version): they are not compared.", folder)
        return
    refused, applied, warned = compare(manifest, record, train)
    if refused and not train.resume_with_changes:
        raise CheckpointError(
            f"{folder} is of a run with other options, which change the order of the samples or the meaning of the "
            f"loss: {'; '.join(refused)}. Give the former values, or pass --resume_with_changes to go on with these."
        )
    if refused or applied:
        logger.warning("From step %d on this differs: %s", manifest["step"], "; ".join([*refused, *applied]))
    for line in warned:
        logger.warning("%s", line)


def compare(manifest: Mapping[str, Any], record: Record, train: TrainArgs) -> tuple[list[str], list[str], list[str]]:
    """What differs from a checkpoint: what makes it another run, what applies from now on, and what may do harm."""
    sections = train.origin.sections or (train,)
    applies = {name for section in sections for name in getattr(section, "APPLIED", ())}
    ignored = {name for section in sections for name in getattr(section, "BOOKKEEPING", ())}
    before, now = manifest["options"], record.options
    changed = {name for name in before.keys() & now.keys() if before[name] != now[name]} - ignored
    refused, warned = [], []
    if manifest["processes"] != record.processes:
        samples = _samples_per_step(before, manifest["processes"])
        line = f"{manifest['processes']} -> {record.processes} processes"
        if samples == record.samples_per_step:
            changed -= {"train_batch_size", "gradient_accumulation_steps"}
            warned.append(
                f"{line}: the steps keep their {samples} samples, but rounding, dropout and losses over a whole "
                "micro-batch differ."
            )
        else:
            refused.append(f"{line}, so {samples} -> {record.samples_per_step} samples a step")
    if manifest["rows"] != record.rows:
        refused.append(f"{manifest['rows']} -> {record.rows} samples in the data set")
    described = {name: f"--{name} {before[name]} -> {now[name]}" for name in sorted(changed)}
    refused += [line for name, line in described.items() if name not in applies]
    versions = {name: (manifest["versions"].get(name), found) for name, found in record.versions.items()}
    moved = [f"{name} {old} -> {new}" for name, (old, new) in versions.items() if old != new]
    if manifest["commit"] != record.commit:
        moved.append(f"commit {manifest['commit']} -> {record.commit}")
    if moved:
        warned.append(f"The checkpoint was written by other versions, so results may differ: {', '.join(moved)}")
    return refused, [line for name, line in described.items() if name in applies], warned


def _samples_per_step(options: Mapping[str, Any], processes: int) -> int:
    return options["train_batch_size"] * options["gradient_accumulation_steps"] * processes


def _plain(value: Any) -> Any:
    """A value as it comes back from JSON, which knows no tuples and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


@lru_cache(maxsize=1)
def _versions() -> tuple[tuple[str, str], ...]:
    found = [("python", platform.python_version()), ("torch", torch.__version__)]  # with its build
    for package in PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return tuple(found)


@lru_cache(maxsize=1)
def _commit() -> str | None:
    """The commit of these sources, "-dirty" where they were changed since; None outside their own repository."""
    sources = Path(__file__).resolve().parents[3]
    if not (sources / ".git").exists():  # an installed package may lie in somebody else's repository
        return None
    words = ["git", "-C", str(sources), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
