"""Indices into a table of learned rows: what lies beyond it is refused by name."""

import torch
from torch import Tensor


def check_indices(name: str, indices: Tensor, size: int, what: str) -> None:
    """Refuses indices beyond a table of `size` rows, which the message calls `what`.

    Raises:
        ValueError: naming the argument, its range and that of the table.
    """
    if beyond := indices_beyond(indices, size):
        raise ValueError(f"`{name}` goes from {beyond[0]} to {beyond[1]}, {what} from 0 to {size - 1}.")


def indices_beyond(indices: Tensor, size: int) -> tuple[int, int] | None:
    """Least and greatest index if one of them lies beyond 0 ... size - 1.

    On an accelerator the question would wait for the device, and it would break a compiled graph: it is not asked.
    """
    if indices.device.type != "cpu" or indices.numel() == 0 or torch.compiler.is_compiling():
        return None
    low, high = int(indices.min()), int(indices.max())
    return (low, high) if low < 0 or high >= size else None
