"""When a run ends before its last step: the time limit, SIGTERM and Ctrl-C, for all processes at the same step.

`accelerate launch` does not hand a SIGTERM on to its trainer when that is a single process, and no launcher can hand
on a SIGKILL. So a trainer whose launcher is gone ends as if it had got a SIGTERM itself.
"""

import os
import signal
import time
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .launch import launcher_process

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Launchers hand on a Ctrl-C that their processes have got from the terminal as well: that is no second one.
SAME_SECONDS = 1.0


class Reading:
    """A number of the device on its way to the host, for reading it one step later.

    A host that waits for a number of every step gives an accelerator nothing to do meanwhile.
    """

    def __init__(self, value: Tensor):
        self.value, self.copied = value.detach().to("cpu", non_blocking=True), None  # CUDA copies to pinned memory
        if value.device.type == "cuda":
            self.copied = torch.cuda.Event()
            self.copied.record()
        elif value.device.type != "cpu":
            self.value = value.detach()  # float() waits for it

    def tolist(self) -> Any:
        if self.copied is not None:
            self.copied.synchronize()
        return self.value.tolist()


class Stop:
    """Asked after each step, it says whether the run ends with it.

    As a context it catches SIGTERM and Ctrl-C, so that a step is finished and saved. A second Ctrl-C raises
    KeyboardInterrupt at once. Outside of the main thread signals are left alone: Python has no handlers there.
    """

    def __init__(self, accelerator: Accelerator, minutes: float | None):
        self.accelerator, self.minutes, self.started = accelerator, minutes, time.monotonic()
        self.signal: int | None = None
        self.launcher = launcher_process()
        self.caught, self.before = 0.0, {}
        self.last: Reading | None = None

    def __enter__(self) -> "Stop":
        try:
            self.before = {number: signal.signal(number, self._catch) for number in SIGNALS}
        except ValueError:  # not the main thread
            self.before = {}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self.caught = number, time.monotonic()
            if self.accelerator.is_main_process:
                line = f"\n{signal.Signals(number).name}: the run ends with a checkpoint after this step"
                more = "; a second Ctrl-C stops it at once, without one" if number == signal.SIGINT else ""
                os.write(2, f"{line}{more}.\n".encode())  # a handler must not use streams that it may have interrupted
        elif number == signal.SIGINT and time.monotonic() - self.caught > SAME_SECONDS:
            raise KeyboardInterrupt

    def reason(self) -> str | None:
        """Why the run ends after this step, on all processes alike; called once a step by each."""
        if self.launcher not in (None, os.getppid()):
            self.launcher = None
            self._catch(signal.SIGTERM, None)
        limit = self.minutes is not None and time.monotonic() - self.started > 60 * self.minutes
        asked = [float(self.signal == number) for number in SIGNALS] + [float(limit)]
        if self.accelerator.num_processes > 1:
            if (asked := self._shared(asked)) is None:
                return None
        for number, count in zip(SIGNALS, asked, strict=False):
            if count:
                self.signal = int(number)  # perhaps another process caught it
                return signal.Signals(number).name
        return "Time limit" if asked[-1] else None

    def _shared(self, asked: list[float]) -> list[float] | None:
        """The sums over all processes; on an accelerator those of the step before, which need not be waited for."""
        device = self.accelerator.device
        sums: Tensor = self.accelerator.reduce(torch.tensor(asked, device=device), "sum")  # type: ignore[assignment]
        if device.type == "cpu":
            return sums.tolist()
        self.last, last = Reading(sums), self.last
        return None if last is None else last.tolist()
