"""Times of two functions that take turns, and memory: what the commands of speed share."""

import contextlib
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

Function = Callable[[], object]


def synchronize(device: str) -> None:
    """Waits until a GPU has done what it was asked for."""
    if device != "cpu":
        torch.accelerator.synchronize()


def now(device: str, *, cpu_time: bool = False) -> float:
    """Seconds of the clock, once a GPU has finished; with `cpu_time`, on a CPU those that this process had of it."""
    synchronize(device)
    return time.process_time() if cpu_time and device == "cpu" else time.perf_counter()


def race(
    first: Function,
    second: Function,
    *,
    rounds: int,
    device: str,
    cpu_time: bool = False,
    is_warm: bool = False,
    within: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> tuple[list[float], list[float]]:
    """Seconds of each round of both functions, which take turns: first the one, then the other.

    Args:
        cpu_time: See `now`. Other work on the machine disturbs it least.
        is_warm: Both have been called before; else each is called once more, uncounted.
        within: What each call runs in.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(is_warm, rounds + 1):
        for which, function in ((0, first), (1, second))[:: 1 if round_ % 2 else -1]:
            started = now(device, cpu_time=cpu_time)
            with within():
                function()
            seconds = now(device, cpu_time=cpu_time) - started
            if round_ > 0:
                times[which].append(seconds)
    return times


def peak_on_device(function: Function) -> int:
    """Bytes that a call adds at its peak to what is on the GPU."""
    torch.accelerator.synchronize()
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    function()
    torch.accelerator.synchronize()
    return torch.accelerator.max_memory_allocated() - before


def process_bytes(field: str) -> int:
    """Memory of this process: now ("VmRSS"), or the most since `forget_peak` ("VmHWM")."""
    found = re.findall(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="utf-8"), flags=re.M)
    if not found:
        raise RuntimeError(f"/proc/self/status has no {field}: peak memory on a CPU is measured on Linux only.")
    return 1024 * int(found[0])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
