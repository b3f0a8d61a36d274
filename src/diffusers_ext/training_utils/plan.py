"""Which samples a step sees, and what is drawn for them: pure functions of integers.

Nothing is drawn from a running generator. The order of the samples is a function of (seed, epoch); every draw of
augmentation and loss is keyed by (seed, epoch, sample). So resuming, loader processes, processes and accumulation do
not change a result.
"""

import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

# Purposes that keep the draws of one sample apart.
DATA_STREAM, LOSS_STREAM, ORDER_STREAM, DROPOUT_STREAM = range(4)

Key = tuple[int, int]  # (epoch, index of the sample)


def mix(*integers: int) -> int:
    """Hashes integers to one of 63 bits, equal on every platform and process (splitmix64 finaliser)."""
    state = 0
    for value in integers:
        state = (state + value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def keyed_generator(*integers: int) -> torch.Generator:
    """A CPU generator whose stream depends on the integers alone."""
    return torch.Generator().manual_seed(mix(*integers))


@dataclass(frozen=True)
class StepPlan:
    """Which samples each optimizer step sees: a pure function of the step's number.

    The micro-batches of all processes together walk through the epoch's permutation once; the last window of an epoch
    may hold fewer micro-batches, and its last micro-batch fewer samples.
    """

    num_samples: int
    batch_size: int
    accumulation: int = 1
    num_processes: int = 1
    process_index: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.num_samples < 1:
            raise ValueError("The data set is empty; a training needs at least one sample.")

    @property
    def window_size(self) -> int:
        return self.batch_size * self.accumulation * self.num_processes

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_samples / self.window_size)

    def micro_batches(self, step: int) -> list[tuple[list[Key], float]]:
        """This process's micro-batches of optimizer step `step`, each with its share of the window's samples.

        A process that has no samples left for the last micro-batch gets the first key of the chunk with weight 0, so
        that all processes take part in the same number of backward passes.
        """
        epoch, window = divmod(step, self.steps_per_epoch)
        order = _permutation(self.num_samples, self.seed, epoch)
        order = order[window * self.window_size : (window + 1) * self.window_size].tolist()
        batches = []
        for start in range(0, len(order), self.batch_size * self.num_processes):
            chunk = order[start : start + self.batch_size * self.num_processes]
            mine = chunk[self.process_index * self.batch_size : (self.process_index + 1) * self.batch_size]
            batches.append(([(epoch, index) for index in mine or chunk[:1]], len(mine) / len(order)))
        return batches


@lru_cache(maxsize=2)
def _permutation(num_samples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_samples, generator=keyed_generator(seed, epoch, ORDER_STREAM))


class _KeyedDataset(Dataset):
    """Reads sample `index` and prepares it with a generator keyed by (seed, epoch, index)."""

    def __init__(self, dataset, transform: Callable[[Any, torch.Generator], Any], seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: Key):
        epoch, index = key
        return self.transform(self.dataset[index], keyed_generator(self.seed, epoch, index, DATA_STREAM))


@dataclass(frozen=True)
class _KeyBatches:
    """The batch sampler: skipping ahead is a matter of `steps`, nothing is iterated in vain."""

    plan: StepPlan
    steps: range

    def __iter__(self) -> Iterator[list[Key]]:
        for step in self.steps:
            for keys, _ in self.plan.micro_batches(step):
                yield keys


@dataclass(frozen=True)
class MicroBatch:
    """What a process computes at a time.

    Args:
        batch: The collated samples, not yet on the device.
        keys: Of the samples.
        own: How many of them, from the first on, are this process's own.
        weight: Their share of the step's samples; 0 on a process that has none of its own left.
        number: Of the micro-batch in its step.
        is_last: Of the step.
    """

    batch: Any
    keys: list[Key]
    own: int
    weight: float
    number: int
    is_last: bool


Window = list[MicroBatch]  # of one optimizer step


def load_micro_batches(
    dataset: Any,
    plan: StepPlan,
    steps: range,
    *,
    transform: Callable[[Any, torch.Generator], Any],
    num_workers: int = 0,
    collate: Callable = default_collate,
    pin_memory: bool = False,
) -> DataLoader:
    """The collated micro-batches of the optimizer steps `steps`, one after the other, as `plan` orders them.

    Args:
        dataset: Map-style; `transform(dataset[index], generator)` prepares one sample.
        plan: Says which samples belong to a step.
        num_workers: Loader processes; the result does not depend on it.
        pin_memory: Makes copies to an accelerator that need not be waited for.
    """
    return DataLoader(
        _KeyedDataset(dataset, transform, plan.seed),
        batch_sampler=_KeyBatches(plan, steps),
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_trainer,
        generator=torch.Generator(),  # the loader's own seed must not advance the default generator
    )


def _leave_signals_to_the_trainer(worker: int) -> None:
    """A Ctrl-C goes to the loader processes too, which still owe the rest of a step; they end with the trainer."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
