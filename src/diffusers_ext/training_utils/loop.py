"""The training loop of one optimizer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Generator, nn
from torch.utils.data import default_collate

from .args import TrainArgs
from .objective import Objective
from .optimizers import build_optimizer
from .run import Run


def fit(
    accelerator: Accelerator,
    objective: Objective,
    dataset: Any,
    args: TrainArgs,
    *,
    transform: Callable[[Any, Generator], Any],
    collate: Callable = default_collate,
    num_workers: int = 0,
    on_validate: Callable[[int], Mapping[str, float]] | None = None,
    parameter_groups: Sequence[dict[str, Any]] | None = None,
    lr_multiplier: Callable[[int], float] | None = None,
    averaged: nn.Module | None = None,
    make_ema: Callable[..., EMAModel] = EMAModel,
) -> bool:
    """Trains `objective` in place; at the end it holds the averaged weights if an average was asked for.

    Args:
        accelerator: From `run.start(args)`.
        objective: Its parameters with `requires_grad` are trained.
        parameter_groups: For AdamW, where parts of the objective have learning rates of their own; all trained
            parameters when unset.
        lr_multiplier: `(step) -> multiple of the learning rate`, instead of `args.lr_scheduler`.
        dataset, transform, collate, num_workers, on_validate, averaged, make_ema: See `Run`.

    Returns:
        Whether training reached `max_train_steps` (`False`: the time limit, SIGTERM or Ctrl-C came first; a checkpoint
        was saved).

    Raises:
        FloatingPointError: a gradient or a weight is not finite; the last checkpoint is untouched.
        CheckpointError: the checkpoint of `--resume_from_checkpoint` is foreign, or of a run with other options.
    """
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer, schedule = build_optimizer(parameter_groups or trained, args, lr_multiplier=lr_multiplier)
    run = Run(
        accelerator, args, {"model": objective, "optimizer": optimizer, "lr_scheduler": schedule}, dataset,
        transform=transform, collate=collate, num_workers=num_workers, on_validate=on_validate, averaged=averaged,
        make_ema=make_ema,
    )  # fmt: skip
    prepared, optimizer = accelerator.prepare(objective, optimizer)
    with run:
        for step, window in run.steps():
            objective.before_step(window[0].batch, window[0].own, step, accelerator)
            for micro in window:
                with run.micro_step(micro, prepared) as (batch, generators):
                    with accelerator.autocast():
                        found = prepared(batch, generators, step)
                    run.backward(found, micro)
                objective.observe(found, micro.weight, accelerator)
            norm = accelerator.clip_grad_norm_(trained, args.max_grad_norm)
            run.update(optimizer, schedule, norm, run.values["loss"])
            run.end_step()
    return run.end()
