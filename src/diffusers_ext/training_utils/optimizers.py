"""AdamW with its learning-rate schedule, and the steps that fp16 skips.

On a resume their options are those of the command line.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .args import TrainArgs


def build_optimizer(
    parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
    args: TrainArgs,
    learning_rate: float | None = None,
    lr_multiplier: Callable[[int], float] | None = None,
):
    """AdamW and its learning-rate schedule (`lr_multiplier` of the step, or that of `args`), in optimizer steps.

    The schedule is never `prepare`d: accelerate would step it once a process.
    """
    optimizer = torch.optim.AdamW(
        parameters,
        lr=args.learning_rate if learning_rate is None else learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=0.0 if args.weight_decay_matrices_only else args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    if args.weight_decay_matrices_only:  # not as groups of their own: checkpoints with and without fit each other
        optimizer.register_step_pre_hook(partial(decay_matrices, args.adam_weight_decay))
    if lr_multiplier is not None:
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lr_multiplier)
    schedule = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    return optimizer, schedule


@torch.no_grad()
def decay_matrices(weight_decay: float, optimizer: torch.optim.Optimizer, *call: Any) -> None:
    """AdamW's decay before a step, without norms, biases and single numbers: these have fewer than two dimensions."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.ndim > 1:
                parameter.mul_(1 - group["lr"] * weight_decay)


@contextmanager
def options_of_this_run(parts: Mapping[str, Any]) -> Iterator[None]:
    """Keeps what the command line says of optimizers, their schedules and averages, while their state is loaded.

    The learning rate follows the schedule from the step on at which the run resumes.
    """
    optimizers = [part for part in parts.values() if isinstance(part, torch.optim.Optimizer)]
    groups = [[{k: v for k, v in group.items() if k != "params"} for group in one.param_groups] for one in optimizers]
    schedules = {part: part.base_lrs for part in parts.values() if isinstance(part, LambdaLR)}
    # a schedule that is an object, not a function, is in the checkpoint with its options
    multiples = {one: dict(vars(one)) for part in schedules for one in part.lr_lambdas}
    averages = {part: part.decay for part in parts.values() if isinstance(part, EMAModel)}
    yield
    for optimizer, kept in zip(optimizers, groups, strict=True):
        for group, options in zip(optimizer.param_groups, kept, strict=True):
            group.update(options)
    for multiple, options in multiples.items():
        vars(multiple).update(options)
    for schedule, base_lrs in schedules.items():
        schedule.base_lrs = base_lrs
        pairs = zip(base_lrs, schedule.lr_lambdas, strict=True)
        schedule._last_lr = [base * multiple(schedule.last_epoch) for base, multiple in pairs]
        for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate
    for average, decay in averages.items():
        average.decay = decay


class SkippedSteps:
    """Counts the steps in a row that fp16's scaler skips because a gradient overflowed.

    A few are its way of finding the scale; many mean that the loss itself is not finite.
    """

    LIMIT = 20

    def __init__(self, name: str = "gradient"):
        self.name, self.count = name, 0

    def add(self, skipped: bool, step: int, loss: torch.Tensor | float) -> None:
        """Raises FloatingPointError at the 20th step in a row."""
        self.count = self.count + 1 if skipped else 0
        if self.count >= self.LIMIT:
            raise FloatingPointError(
                f"The {self.name} was not finite in {self.count} steps in a row, up to step {step} (loss "
                f"{float(loss)}): fp16's scaler skipped them all. The weights and the last checkpoint are untouched; "
                "lower --learning_rate, or pass --mixed_precision bf16."
            )
