"""The log of a run: `log.jsonl`, the trackers and the progress bar."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from .args import TrainArgs
from .checkpoints import replace_file


class RunLog:
    """Lines of `<output_dir>/log.jsonl`, the trackers' values and the progress bar's text.

    Its sums are a part of every checkpoint, so that the first line after a resume is the mean of the same steps.
    """

    def __init__(self, accelerator: Accelerator, args: TrainArgs):
        self.accelerator, self.args = accelerator, args
        self.path = Path(args.output_dir) / "log.jsonl"
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # in how many steps a name had a value: some have it in a few only
        self.samples, self.started = 0, time.monotonic()

    def begin(self, first_step: int) -> None:
        """Starts the progress bar, and drops the lines that were logged after the checkpoint."""
        self.bar = tqdm(
            total=self.args.max_train_steps,
            initial=first_step,
            disable=not self.accelerator.is_local_main_process,
            desc="train",
        )
        self.started = time.monotonic()
        if self.accelerator.is_main_process and self.path.is_file():
            written = self.path.read_text(encoding="utf-8").splitlines()
            lines = [line for line in written if line.endswith("}") and json.loads(line)["step"] <= first_step]
            text = "".join(line + "\n" for line in lines)
            replace_file(self.path, lambda path: path.write_text(text, encoding="utf-8"))

    def has_validation(self, step: int) -> bool:
        """Whether the file has a line of that step besides the one with the loss."""
        if not self.path.is_file():
            return False
        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        return any(line["step"] == step and "loss" not in line for line in lines)

    def add(self, values: Mapping[str, Tensor], num_samples: int) -> None:
        """Accumulates the values of one optimizer step, without a host synchronisation."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
            self.counts[name] = self.counts.get(name, 0) + 1
        self.samples += num_samples
        self.bar.update()

    def share(self) -> None:
        """Hands the sums of all processes to the main one, which alone writes checkpoints."""
        reduced = self.accelerator.reduce(self.sums, "sum")  # each process holds its share of the window
        keeps = self.accelerator.is_main_process
        self.sums = {name: value if keeps else torch.zeros_like(value) for name, value in reduced.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {name: value.cpu() for name, value in self.sums.items()}, "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = {name: value.to(self.accelerator.device) for name, value in state["sums"].items()}
        self.counts = dict(state["counts"])
        if not self.accelerator.is_main_process:
            self.sums = {name: torch.zeros_like(value) for name, value in self.sums.items()}

    def flush(self, step: int, **extra: float) -> dict[str, float]:
        """Writes the mean of what was added since the last call: of each name over the steps that had it."""
        self.share()
        rate = self.samples / (time.monotonic() - self.started)
        values = {name: float(value) / self.counts[name] for name, value in self.sums.items()}
        values |= {**extra, "samples_per_second": rate}
        self.sums, self.counts, self.samples, self.started = {}, {}, 0, time.monotonic()
        self.write(step, values)
        self.bar.set_postfix(loss=f"{values.get('loss', math.nan):.4f}", samples_s=f"{rate:.0f}")
        return values

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to the log and hands it to the trackers; nothing is written for no values."""
        if not values:
            return
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step, **{k: _significant(v) for k, v in values.items()}}) + "\n")
        self.accelerator.log(dict(values), step=step)


def _significant(value: float) -> float | None:
    """Seven significant digits, as many as float32 has; JSON knows no value that is not finite."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
