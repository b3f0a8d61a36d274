"""What every validation shares: the rows, which it sees alike, their mean losses, and the sheet of samples."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Generator
from torch.utils.data import default_collate

from .args import TrainArgs
from .checkpoints import replace_file
from .objective import Objective
from .plan import LOSS_STREAM, keyed_generator

Batches = Iterable[tuple[Any, list[Generator]]]


def first_rows(
    rows: Any,
    count: int,
    read: Callable[[Any, Generator], Any],
    seed: int,
    *,
    batch_size: int | None = None,
    collate: Callable = default_collate,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Any, list[Generator]]]:
    """The first `count` rows (or all, if there are fewer) in batches, with what their losses are drawn from.

    The draws depend on seed and row alone, so they are equal at every call and on every process.

    Args:
        rows: Map-style.
        count: How many rows.
        read: `(row, generator) -> sample`, as in training.
        seed: Of the run.
        batch_size: Rows at a time; all at once when unset.
        collate: `list of samples -> batch`.
        device: Where the batches go.
    """
    count = min(count, len(rows))
    size = batch_size or max(count, 1)
    for start in range(0, count, size):
        indices = range(start, min(start + size, count))
        batch = collate([read(rows[i], keyed_generator(seed, i)) for i in indices])
        yield send_to_device(batch, device), [keyed_generator(seed, i, LOSS_STREAM) for i in indices]


def mean_losses(objective: Objective, batches: Batches, step: int) -> dict[str, float]:
    """The mean over all samples of each number that `objective.losses` gives, as `validation_<name>`."""
    sums: dict[str, float] = {}
    count = 0
    for batch, generators in batches:
        for name, value in objective(batch, generators, step).items():
            if value.ndim == 0:
                sums[name] = sums.get(name, 0.0) + float(value) * len(generators)
        count += len(generators)
    return {f"validation_{name}": value / count for name, value in sums.items()}


def save_sheet(sheet: Image.Image, train: TrainArgs, step: int) -> None:
    """Writes `<output_dir>/validation-<step>.png`; the model card shows the last one."""
    replace_file(Path(train.output_dir) / f"validation-{step}.png", sheet.save)
