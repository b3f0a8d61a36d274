"""What every validation shares: the rows, which it sees alike, their mean losses, and the sheet of samples."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from PIL import Image
from torch import Generator
from torch.utils.data import default_collate

from .args import TrainArgs
from .checkpoints import replace_file
from .objective import Objective
from .plan import LOSS_STREAM, keyed_generator

LOSS_SAMPLES = 64  # held-out rows for the loss

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
        with torch.autocast("cpu", enabled=False):  # data are made as in training, whatever networks compute in
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


@dataclass
class Validation:
    """Called with a step: the loss of held-out rows, and what the pipeline in training draws for the first of them.

    Every draw is the same each time.

    Args:
        objective: Has the pipeline, `pipe`.
        read: `(row, generator) -> sample`, without augmentation.
        rows: Map-style.
    """

    objective: Any
    read: Callable[[Any, Generator], Any]
    rows: Any
    train: TrainArgs
    accelerator: Accelerator

    def __call__(self, step: int) -> dict[str, float]:
        """Figures after this step; the samples become `validation-<step>.png`."""
        self.objective.pipe.to(self.accelerator.device)
        with self.accelerator.autocast():
            losses = mean_losses(self.objective, self.batches(LOSS_SAMPLES, self.train.train_batch_size), step)
        sheet, figures = self.pictures()
        save_sheet(sheet, self.train, step)
        return losses | figures

    def batches(self, count: int, batch_size: int | None = None) -> Batches:
        """The first rows; all at once when `batch_size` is unset."""
        device = self.accelerator.device
        return first_rows(self.rows, count, self.read, self.train.seed, batch_size=batch_size, device=device)

    def pictures(self) -> tuple[Image.Image, dict[str, float]]:
        """A sheet of samples, and figures of them."""
        raise NotImplementedError
