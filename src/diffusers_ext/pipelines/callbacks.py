"""diffusers' `callback_on_step_end` for all pipelines: which tensors a callback gets, and what it may change.

A callback may set `pipe._guidance_scale`. In a run, a scale of 0 means what it means in diffusers, guidance off, and
counts as 1; only the argument `guidance_scale=0` of a call ignores the condition.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    PipelineCallback,
    SDCFGCutoffCallback,
)
from torch import Tensor

from .checks import check_callback_tensors, check_guidance_scale

Callback = Callable[[Any, int, Tensor, dict], dict | None] | PipelineCallback | MultiPipelineCallbacks
READ_ONLY = ("pred_original_sample",)


def callback_tensor_names(pipe: Any, callback: Callback, names: Sequence[str] | None) -> list[str]:
    """The names of the tensors that a callback gets: those that it asks for itself, else `names`, else the latents.

    Raises:
        TypeError, ValueError: For a callback that cannot be called, names that the pipeline does not offer, and
            callbacks of diffusers for other pipelines.
    """
    if not callable(callback):
        raise TypeError(
            f"`callback_on_step_end` must be a function or a PipelineCallback, received {type(callback).__name__}."
        )
    allowed = pipe._callback_tensor_inputs
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        for one in callback.callbacks if isinstance(callback, MultiPipelineCallbacks) else [callback]:
            _check_fit(pipe, one, allowed)
        names = callback.tensor_inputs
    if names is None:
        return ["latents"]
    check_callback_tensors(names, allowed)
    return list(dict.fromkeys(names))


def report_step(
    pipe: Any, callback: Callback, names: Sequence[str], step: int, timestep: Tensor, tensors: dict[str, Tensor | None]
) -> dict[str, Tensor]:
    """Calls a callback after a step and returns the tensors that it replaced, by name.

    Args:
        names: What it gets, as `callback_tensor_names` gave them.
        tensors: All that it may ask for or replace. Several names may stand for one tensor.

    Raises:
        TypeError, ValueError: For what it returns: no dictionary, an unknown name, a tensor of another shape; and for
            a guidance scale that it sets.
    """
    given = {name: tensors[name] for name in names}
    before = pipe._guidance_scale
    returned = callback(pipe, step, timestep, dict(given))
    off = False
    if pipe._guidance_scale is not before:
        check_guidance_scale(pipe._guidance_scale)
        off = pipe._guidance_scale == 0
        pipe._guidance_scale = 1.0 if off else float(pipe._guidance_scale)
    if returned is None:
        return {}
    if not isinstance(returned, dict):
        raise TypeError(
            "`callback_on_step_end` must return a dictionary of tensors, or None to change nothing; received"
            f" {type(returned).__name__}."
        )
    unknown = sorted(set(returned) - set(tensors) - set(READ_ONLY))
    if unknown:
        raise ValueError(
            f"`callback_on_step_end` returned {unknown}, which this call does not have; allowed are {list(tensors)}."
        )
    changed = {}
    for name, value in returned.items():
        if name in given and value is given[name]:
            continue
        if off and _is_tail(value, given.get(name)):
            # diffusers' pipelines hold both branches in one batch, and its callbacks keep the last rows when they turn
            # guidance off; here these are conditions of the batch like the others
            continue
        changed[name] = _fitting(name, value, tensors)
    return changed


def _check_fit(pipe: Any, callback: PipelineCallback, allowed: Sequence[str]) -> None:
    unknown = [name for name in callback.tensor_inputs if name not in allowed]
    if isinstance(callback, IPAdapterScaleCutoffCallback) and not hasattr(pipe, "set_ip_adapter_scale"):
        unknown = ["an IP-Adapter"]
    if unknown:
        advice = f"; to turn guidance off in a run, use {SDCFGCutoffCallback.__name__}"
        raise ValueError(
            f"`callback_on_step_end` holds a {type(callback).__name__}, which needs {', '.join(unknown)}:"
            f" {type(pipe).__name__} has none. Allowed are {', '.join(allowed)}"
            f"{advice if 'prompt_embeds' in allowed else ''}."
        )


def _is_tail(value: Any, whole: Tensor | None) -> bool:
    """Whether `value` is the last rows of a batch, and not all of them."""
    if not isinstance(value, Tensor) or whole is None or value.shape[1:] != whole.shape[1:]:
        return False
    return 0 < len(value) < len(whole) and torch.equal(value, whole[-len(value) :])


def _fitting(name: str, value: Any, tensors: dict[str, Tensor | None]) -> Tensor:
    """A tensor that a callback returned, as the loop needs it."""
    if name in READ_ONLY:
        raise ValueError(
            f"`callback_on_step_end` returned another `{name}`: it is for reading only. Change `latents` instead."
        )
    current = tensors[name]
    if current is None:  # without guidance there is no null branch yet; it has the shape of the other one
        current = tensors[name.removeprefix("negative_")]
    if current is None or not isinstance(value, Tensor) or _kind(value) != _kind(current):
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        wanted = "nothing: the call has no such tensor" if current is None else current.dtype
        raise TypeError(f"`callback_on_step_end` returned {kind} as `{name}`; it must be a tensor of {wanted}.")
    if value.shape != current.shape:
        raise ValueError(
            f"`callback_on_step_end` returned `{name}` of shape {tuple(value.shape)}; the run needs"
            f" {tuple(current.shape)}, as the callback received it."
        )
    return value.to(device=current.device, dtype=current.dtype)


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "numbers"
    return "truth values" if tensor.dtype == torch.bool else "tokens"
