"""The training loop: stateless, so that resuming, worker counts, processes and accumulation do not change a result.

Nothing is drawn from a running generator. The order of the samples is a function of (seed, epoch); every draw of
augmentation and loss is keyed by (seed, epoch, sample); dropout inside a network uses the default generator, seeded
by (seed, micro-step, rank) after the batch has been fetched. The state of a run is therefore its weights, its
optimizer and one integer.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from .args import TrainArgs, apply_launcher, check_bundled
from .checkpoints import (
    CheckpointError,
    check_finite_state,
    find_checkpoint,
    list_checkpoints,
    load_state,
    publish,
    put_aside,
    replace_file,
    rotate,
    save_state,
)
from .folders import recover_result
from .launch import SkippedSteps, describe, make_accelerator
from .objective import Objective
from .plan import (  # noqa: F401  # some recipes still look for them here
    DATA_STREAM,
    DROPOUT_STREAM,
    LOSS_STREAM,
    ORDER_STREAM,
    Key,
    StepPlan,
    Window,
    keyed_generator,
    mix,
    windows,
)  # fmt: skip
from .record import Record, check_same_run, make_record, save_learnt, write_options

logger = logging.getLogger(__name__)


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


class Stopwatch:
    """Tells all processes alike when `--max_train_minutes` is over."""

    def __init__(self, accelerator: Accelerator, minutes: float | None):
        self.accelerator, self.minutes, self.started = accelerator, minutes, time.monotonic()

    def is_over(self) -> bool:
        if self.minutes is None:
            return False
        over = torch.tensor(float(time.monotonic() - self.started > 60 * self.minutes), device=self.accelerator.device)
        return float(self.accelerator.reduce(over, "sum")) > 0  # type: ignore[arg-type]  # a tensor in, a tensor out


def start(args: TrainArgs) -> Accelerator:
    """The accelerator of a run, its folder ready and the checkpoint found from which it goes on.

    Raises:
        ValueError: see `apply_launcher`, `check_bundled` and `make_accelerator`.
        CheckpointError: the one that is asked for is damaged, or the folder holds checkpoints and none is asked for:
            those of the older run would count as the newest.
    """
    if not args.origin.sources:
        apply_launcher(args)
    check_bundled(args)
    accelerator = make_accelerator(args)
    args.resolve_batch(accelerator.num_processes)
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    set_seed(args.seed)  # initial weights; every later draw is keyed
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        recover_result(output_dir)  # what an interrupted export has left behind
        output_dir.mkdir(exist_ok=True)
        rotate(output_dir, None)  # ... and an interrupted save
    accelerator.wait_for_everyone()
    older = list_checkpoints(output_dir)
    if older and args.resume_from_checkpoint is None:
        raise CheckpointError(
            f"{output_dir} holds {older[-1].name} of an earlier run: go on with --resume_from_checkpoint latest, name "
            "another --output_dir, or remove its checkpoints."
        )
    args.origin.checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint)
    logger.info("%s", describe(args))
    if args.trackers:
        accelerator.init_trackers("diffusers_ext")
    return accelerator


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
def ema_weights(model: nn.Module, ema: EMAModel | None):
    """Lends the averaged weights to `model` and gives the live ones back, bit for bit."""
    if ema is None:
        yield
        return
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        yield
    finally:
        ema.restore(model.parameters())


def fit(accelerator, objective, *call, before_step=None, **options) -> bool:
    """See `fit_objective`, which takes this name when all recipes have an Objective."""
    if isinstance(objective, Objective):
        return fit_objective(accelerator, objective, *call, **options)
    return _fit_old(accelerator, objective, *call, before_step=before_step, **options)


def fit_objective(
    accelerator: Accelerator,
    objective: Objective,
    dataset: Any,
    args: TrainArgs,
    *,
    transform: Callable[[Any, torch.Generator], Mapping[str, Any]],
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
        accelerator: From `start(args)`.
        objective: Its parameters with `requires_grad` are trained.
        dataset: Map-style.
        transform: `(dataset[index], generator) -> sample`, see `windows`.
        collate: `list of samples -> batch`.
        num_workers: Loader processes; the result does not depend on it.
        parameter_groups: For AdamW, where parts of the model have learning rates of their own; all trained parameters
            when unset.
        on_validate: `(step) -> values to log`; called on the main process, the averaged weights in place.
        lr_multiplier: `(step) -> multiple of the learning rate`, instead of `args.lr_scheduler`.
        averaged: The part of `objective` that the average covers; all of it when unset.
        make_ema: `(parameters, decay=...) -> average`: another rule than diffusers'.

    Returns:
        Whether training reached `max_train_steps` (`False`: the time limit came first; a checkpoint was saved).

    Raises:
        FloatingPointError: a gradient or a weight is not finite; the last checkpoint is untouched.
        CheckpointError: the checkpoint of `--resume_from_checkpoint` is foreign, or of a run with other options.
    """
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer, schedule = build_optimizer(parameter_groups or trained, args, lr_multiplier=lr_multiplier)
    averaged = objective if averaged is None else averaged
    ema = make_ema(averaged.parameters(), decay=args.ema_decay) if args.use_ema else None
    plan = StepPlan(
        num_samples=len(dataset),
        batch_size=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        seed=args.seed,
    )
    log, skipped = RunLog(accelerator, args), SkippedSteps()
    parts = {"model": objective, "optimizer": optimizer, "lr_scheduler": schedule, "log": log}
    if ema is not None:
        parts["ema"] = ema
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler
    first_step, record = resume(accelerator, args, parts, len(dataset))
    device = accelerator.device
    if ema is not None:
        ema.to(device)
    prepared, optimizer = accelerator.prepare(objective, optimizer)

    def validate(step: int) -> None:
        if on_validate is not None and accelerator.is_main_process:
            with ema_weights(averaged, ema), evaluating(objective):
                log.write(step, on_validate(step))
        accelerator.wait_for_everyone()

    log.begin(first_step)
    stopwatch = Stopwatch(accelerator, args.max_train_minutes)
    steps = range(first_step, args.max_train_steps)
    stream = windows(dataset, plan, steps, transform=transform, num_workers=num_workers, collate=collate)
    objective.train()
    for step in steps:
        window, values = next(stream), {}
        own = len(window[0][1]) if window[0][2] > 0 else 0
        objective.before_step(window[0][0], own, step, accelerator)
        for micro, (batch, keys, weight) in enumerate(window):
            torch.manual_seed(mix(args.seed, step, micro, accelerator.process_index, DROPOUT_STREAM))
            generators = [keyed_generator(args.seed, epoch, index, LOSS_STREAM) for epoch, index in keys]
            is_last = micro == len(window) - 1
            with nullcontext() if is_last else accelerator.no_sync(prepared):
                with accelerator.autocast():
                    losses = prepared(send_to_device(batch, device), generators, step)
                # DDP averages over the processes, each of which holds its share of the window's samples.
                accelerator.backward(losses["loss"] * (weight * accelerator.num_processes))
            objective.record(losses, weight, accelerator)
            for name, value in losses.items():
                if value.ndim == 0:
                    values[name] = values.get(name, 0) + value.detach() * weight
        grad_norm = accelerator.clip_grad_norm_(trained, args.max_grad_norm)
        check_finite(accelerator, grad_norm, values["loss"], step, window)
        optimizer.step()
        skipped.add(optimizer.step_was_skipped, step, values["loss"])
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.step(averaged.parameters())
        log.add(values, sum(len(keys) for _, keys, _ in window) * accelerator.num_processes)

        done = step + 1
        over = stopwatch.is_over() and done < args.max_train_steps
        if done % args.logging_steps == 0 or done == args.max_train_steps:
            log.flush(done, lr=float(schedule.get_last_lr()[0]), **objective.logged())
        if done % args.checkpointing_steps == 0 or done == args.max_train_steps or over:
            save_checkpoint(accelerator, done, parts, args, record)
        if done == args.max_train_steps or (args.validation_steps and done % args.validation_steps == 0):
            validate(done)
        if over:
            logger.info("Time limit: stopped after step %d; --resume_from_checkpoint latest goes on.", done)
            return False
    log.bar.close()
    if ema is not None:
        ema.copy_to(averaged.parameters())
    return True


def _fit_old(
    accelerator: Accelerator,
    model: nn.Module,
    compute_loss: Callable[[nn.Module, Any, list[torch.Generator]], Mapping[str, Tensor]],
    dataset: Any,
    args: TrainArgs,
    *,
    transform: Callable[[Any, torch.Generator], Mapping[str, Any]],
    collate: Callable = default_collate,
    num_workers: int = 0,
    on_validate: Callable[[int], Mapping[str, float]] | None = None,
    parameter_groups: Sequence[dict[str, Any]] | None = None,
    lr_multiplier: Callable[[int], float] | None = None,
    averaged: nn.Module | None = None,
    make_ema: Callable[..., EMAModel] = EMAModel,
    before_step: Callable[[int], None] | None = None,
) -> bool:
    """Trains `model` in place; at the end it holds the averaged weights if an average was asked for.

    Args:
        accelerator: From `start(args)`.
        model: Its parameters with `requires_grad` are trained.
        compute_loss: `(prepared model, batch, one generator a sample) -> {"loss": mean over the samples, ...}`; it
            must call the model that it is given. The other values are logged.
        dataset: Map-style.
        transform: `(dataset[index], generator) -> sample`, see `windows`.
        collate: `list of samples -> batch`.
        num_workers: Loader processes; the result does not depend on it.
        parameter_groups: For AdamW, where parts of the model have learning rates of their own; all trained parameters
            when unset.
        on_validate: `(step) -> values to log`; called on the main process, the averaged weights in place.
        lr_multiplier: `(step) -> multiple of the learning rate`, instead of `args.lr_scheduler`.
        averaged: The part of `model` that the average covers; all of it when unset.
        make_ema: `(parameters, decay=...) -> average`: another rule than diffusers'.
        before_step: Called with the number of each optimizer step before its losses are computed.

    Returns:
        Whether training reached `max_train_steps` (`False`: the time limit came first; a checkpoint was saved).

    Raises:
        FloatingPointError: a gradient or a weight is not finite; the last checkpoint is untouched.
        CheckpointError: the checkpoint of `--resume_from_checkpoint` is foreign, or of a run with other options.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, schedule = build_optimizer(parameter_groups or trained, args, lr_multiplier=lr_multiplier)
    averaged = model if averaged is None else averaged
    ema = make_ema(averaged.parameters(), decay=args.ema_decay) if args.use_ema else None
    plan = StepPlan(
        num_samples=len(dataset),
        batch_size=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        seed=args.seed,
    )
    log, skipped = RunLog(accelerator, args), SkippedSteps()
    parts = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule, "log": log}
    if ema is not None:
        parts["ema"] = ema
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler
    first_step, record = resume(accelerator, args, parts, len(dataset))
    device = accelerator.device
    if ema is not None:
        ema.to(device)
    prepared, optimizer = accelerator.prepare(model, optimizer)

    def validate(step: int) -> None:
        if on_validate is not None and accelerator.is_main_process:
            with ema_weights(averaged, ema), evaluating(model):
                log.write(step, on_validate(step))
        accelerator.wait_for_everyone()

    log.begin(first_step)
    stopwatch = Stopwatch(accelerator, args.max_train_minutes)
    steps = range(first_step, args.max_train_steps)
    stream = windows(dataset, plan, steps, transform=transform, num_workers=num_workers, collate=collate)
    model.train()
    for step in steps:
        window, values = next(stream), {}
        if before_step is not None:
            before_step(step)
        for micro, (batch, keys, weight) in enumerate(window):
            torch.manual_seed(mix(args.seed, step, micro, accelerator.process_index, DROPOUT_STREAM))
            generators = [keyed_generator(args.seed, epoch, index, LOSS_STREAM) for epoch, index in keys]
            is_last = micro == len(window) - 1
            with nullcontext() if is_last else accelerator.no_sync(prepared):
                with accelerator.autocast():
                    losses = compute_loss(prepared, send_to_device(batch, device), generators)
                # DDP averages over the processes, each of which holds its share of the window's samples.
                accelerator.backward(losses["loss"] * (weight * accelerator.num_processes))
            for name, value in losses.items():
                values[name] = values.get(name, 0) + value.detach() * weight
        grad_norm = accelerator.clip_grad_norm_(trained, args.max_grad_norm)
        check_finite(accelerator, grad_norm, values["loss"], step, window)
        optimizer.step()
        skipped.add(optimizer.step_was_skipped, step, values["loss"])
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.step(averaged.parameters())
        log.add(values, sum(len(keys) for _, keys, _ in window) * accelerator.num_processes)

        done = step + 1
        over = stopwatch.is_over() and done < args.max_train_steps
        if done % args.logging_steps == 0 or done == args.max_train_steps:
            log.flush(done, lr=float(schedule.get_last_lr()[0]))
        if done % args.checkpointing_steps == 0 or done == args.max_train_steps or over:
            save_checkpoint(accelerator, done, parts, args, record)
        if done == args.max_train_steps or (args.validation_steps and done % args.validation_steps == 0):
            validate(done)
        if over:
            logger.info("Time limit: stopped after step %d; --resume_from_checkpoint latest goes on.", done)
            return False
    log.bar.close()
    if ema is not None:
        ema.copy_to(averaged.parameters())
    return True


def check_finite(
    accelerator: Accelerator, grad_norm: Tensor | None, loss: Tensor, step: int, window: Window, of: str = ""
) -> None:
    """Stops before the optimizer consumes a gradient that is not finite.

    fp16's scaler skips such steps itself: `SkippedSteps` counts them.

    Args:
        of: Whose gradient it is, where a recipe has several optimizers.
    """
    if accelerator.scaler is not None or grad_norm is None or bool(torch.isfinite(grad_norm)):
        return
    samples = [index for _, keys, _ in window for _, index in keys]
    raise FloatingPointError(
        f"The gradient of {of}step {step} is not finite (norm {float(grad_norm)}, loss {float(loss)}; "
        f"samples {samples[:32]}). "
        "The weights and the last checkpoint are untouched; lower --learning_rate or look at these samples."
    )


@contextmanager
def evaluating(model: nn.Module):
    """Puts `model` into evaluation mode without gradients, and back into the mode that it had."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def resume(accelerator: Accelerator, args: TrainArgs, parts: Mapping[str, Any], rows: int) -> tuple[int, Record]:
    """Loads the checkpoint that `start` found, and returns the number of finished steps and the run's record.

    Options of the optimizers and the average apply as the command line gives them, whatever the checkpoint holds.

    Raises:
        CheckpointError: it is foreign, or of a run with other options, see `check_same_run`.
    """
    output_dir, step = Path(args.output_dir), 0
    record = make_record(args, accelerator, rows)
    branches: list[tuple[str, int]] = []
    if args.origin.checkpoint is not None:
        folder, manifest = args.origin.checkpoint
        check_same_run(folder, manifest, record, args)
        with options_of_this_run(parts):
            load_state(folder, parts, optional=("log",))  # older checkpoints have none
        step = manifest["step"]
        branches = [(name, first) for name, first in manifest.get("branches", [])]
        record.branches = [*branches, (record.branches[0][0], step)]
        logger.info("Resumed from %s.", folder)
    elif args.resume_from_checkpoint:
        logger.info("No complete checkpoint in %s: starting at step 0.", output_dir)
    if accelerator.is_main_process:
        put_aside(output_dir, step, branches)
        write_options(output_dir, record)
    accelerator.wait_for_everyone()
    return step, record


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


def save_checkpoint(
    accelerator: Accelerator, step: int, parts: Mapping[str, Any], args: TrainArgs, record: Record
) -> None:
    """Publishes `output_dir/checkpoint-<step>` and removes those beyond `--checkpoints_total_limit`; on all processes.

    Raises:
        FloatingPointError: a weight or a state is not finite; nothing is published.
    """
    for log in (part for part in parts.values() if isinstance(part, RunLog)):
        log.share()
    if accelerator.is_main_process:
        check_finite_state(parts, f"step {step}")
        folder = Path(args.output_dir) / f"checkpoint-{step}"

        def write(staging: Path) -> None:
            save_state(staging, parts)
            save_learnt(args, staging)

        publish(folder, write, {"step": step, "seed": args.seed, "torch": torch.__version__, **asdict(record)})
        rotate(folder.parent, args.checkpoints_total_limit, newest=folder)
    accelerator.wait_for_everyone()
