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
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

from .args import TrainArgs
from .checkpoints import CheckpointError, find_checkpoint, list_checkpoints, load_state, publish, rotate, save_state

logger = logging.getLogger(__name__)

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

    def __init__(self, dataset, transform: Callable[[Any, torch.Generator], Mapping[str, Any]], seed: int):
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


Window = list[tuple[Any, list[Key], float]]


def windows(
    dataset: Any,
    plan: StepPlan,
    steps: range,
    *,
    transform: Callable[[Any, torch.Generator], Mapping[str, Any]],
    num_workers: int = 0,
    collate: Callable = default_collate,
) -> Iterator[Window]:
    """Yields, for every optimizer step of `steps`, its (micro-batch, keys of the samples, weight) triples.

    Args:
        dataset: Map-style; `transform(dataset[index], generator)` prepares one sample.
        plan: Says which samples belong to a step.
        num_workers: Loader processes; the result does not depend on it.
    """
    loader = DataLoader(
        _KeyedDataset(dataset, transform, plan.seed),
        batch_sampler=_KeyBatches(plan, steps),
        num_workers=num_workers,
        collate_fn=collate,
        generator=torch.Generator(),  # the loader's own seed must not advance the default generator
    )
    fetched = iter(loader)
    for step in steps:
        yield [(next(fetched), keys, weight) for keys, weight in plan.micro_batches(step)]


class RunLog:
    """Lines of `<output_dir>/log.jsonl`, the trackers' values and the progress bar's text."""

    def __init__(self, accelerator: Accelerator, args: TrainArgs, first_step: int):
        self.accelerator, self.args = accelerator, args
        self.path = Path(args.output_dir) / "log.jsonl"
        self.sums: dict[str, Tensor] = {}
        self.steps = self.samples = 0
        self.started = time.monotonic()
        self.bar = tqdm(
            total=args.max_train_steps, initial=first_step, disable=not accelerator.is_local_main_process, desc="train"
        )
        if accelerator.is_main_process and self.path.is_file():  # drop what was logged after the checkpoint
            written = self.path.read_text(encoding="utf-8").splitlines()
            lines = [line for line in written if line.endswith("}") and json.loads(line)["step"] <= first_step]
            self.path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def add(self, values: Mapping[str, Tensor], num_samples: int) -> None:
        """Accumulates the values of one optimizer step, without a host synchronisation."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.steps += 1
        self.samples += num_samples
        self.bar.update()

    def flush(self, step: int, **extra: float) -> dict[str, float]:
        """Writes the mean of what was added since the last call."""
        reduced = self.accelerator.reduce(self.sums, "sum")  # each process holds its share of the window
        rate = self.samples / (time.monotonic() - self.started)
        values = {name: float(value) / self.steps for name, value in reduced.items()}
        values |= {**extra, "samples_per_second": rate}
        self.sums, self.steps, self.samples, self.started = {}, 0, 0, time.monotonic()
        self.write(step, values)
        self.bar.set_postfix(loss=f"{values.get('loss', math.nan):.4f}", samples_s=f"{rate:.0f}")
        return values

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to the log and hands it to the trackers; nothing is written for no values."""
        if not values:
            return
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in values.items()}}) + "\n")
        self.accelerator.log(dict(values), step=step)


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
    """The accelerator of a run: `fit` does the accumulation itself, so accelerate is told of none."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, log_with=args.trackers or None, project_dir=args.output_dir
    )
    args.resolve_batch(accelerator.num_processes)
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    set_seed(args.seed)  # initial weights; every later draw is keyed
    if accelerator.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
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
        without_decay_of_vectors(parameters) if args.weight_decay_matrices_only else parameters,
        lr=args.learning_rate if learning_rate is None else learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    if lr_multiplier is not None:
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lr_multiplier)
    schedule = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    return optimizer, schedule


def without_decay_of_vectors(parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each group (a list of parameters is one) in two: its matrices, then its norms, biases and single numbers, which
    have fewer than two dimensions and are not decayed."""
    parameters = list(parameters)
    groups = parameters if parameters and isinstance(parameters[0], dict) else [{"params": parameters}]
    split = []
    for group in groups:
        members = list(group["params"])
        split.append({**group, "params": [p for p in members if p.ndim > 1]})
        split.append({**group, "params": [p for p in members if p.ndim < 2], "weight_decay": 0.0})
    return [group for group in split if group["params"]]


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


def fit(
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

    Returns:
        Whether training reached `max_train_steps` (`False`: the time limit came first; a checkpoint was saved).

    Raises:
        FloatingPointError: the loss or the gradient is not finite; the last checkpoint is untouched.
        CheckpointError: `--resume_from_checkpoint` names a damaged or foreign checkpoint, or the folder holds
            checkpoints and it is unset.
    """
    output_dir = Path(args.output_dir)
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
    parts = {"model": model, "optimizer": optimizer, "lr_scheduler": schedule}
    if ema is not None:
        parts["ema"] = ema
    if accelerator.scaler is not None:
        parts["scaler"] = accelerator.scaler
    first_step = resume(accelerator, args, parts)
    device = accelerator.device
    if ema is not None:
        ema.to(device)
    prepared, optimizer = accelerator.prepare(model, optimizer)

    def save(step: int) -> None:
        if accelerator.is_main_process:
            save_checkpoint(output_dir, step, parts, args)
        accelerator.wait_for_everyone()

    def validate(step: int) -> None:
        if on_validate is not None and accelerator.is_main_process:
            with ema_weights(averaged, ema), evaluating(model):
                log.write(step, on_validate(step))
        accelerator.wait_for_everyone()

    log, stopwatch = RunLog(accelerator, args, first_step), Stopwatch(accelerator, args.max_train_minutes)
    steps = range(first_step, args.max_train_steps)
    stream = windows(dataset, plan, steps, transform=transform, num_workers=num_workers, collate=collate)
    model.train()
    for step in steps:
        window, values = next(stream), {}
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
            save(done)
        if done == args.max_train_steps or (args.validation_steps and done % args.validation_steps == 0):
            validate(done)
        if over:
            logger.info("Time limit: stopped after step %d; --resume_from_checkpoint latest goes on.", done)
            return False
    log.bar.close()
    if ema is not None:
        ema.copy_to(averaged.parameters())
    return True


def check_finite(accelerator: Accelerator, grad_norm: Tensor | None, loss: Tensor, step: int, window: Window) -> None:
    """Stops before the optimizer consumes a gradient that is not finite (fp16's scaler skips such steps itself)."""
    if accelerator.scaler is not None or grad_norm is None or bool(torch.isfinite(grad_norm)):
        return
    samples = [index for _, keys, _ in window for _, index in keys]
    raise FloatingPointError(
        f"The gradient of step {step} is not finite (norm {float(grad_norm)}, loss {float(loss)}; "
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


def resume(accelerator: Accelerator, args: TrainArgs, parts: Mapping[str, Any]) -> int:
    """Loads the checkpoint that `--resume_from_checkpoint` asks for, and returns the number of finished steps.

    Raises:
        CheckpointError: it is damaged or foreign, or the folder holds checkpoints and none is asked for: those of the
            older run would count as the newest.
    """
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        rotate(output_dir, None)  # what an interrupted save has left behind
    accelerator.wait_for_everyone()
    older = list_checkpoints(output_dir)
    if older and args.resume_from_checkpoint is None:
        raise CheckpointError(
            f"{output_dir} holds {older[-1].name} of an earlier run: go on with --resume_from_checkpoint latest, name "
            "another --output_dir, or remove its checkpoints."
        )
    found = find_checkpoint(output_dir, args.resume_from_checkpoint)
    if found is None:
        if args.resume_from_checkpoint:
            logger.info("No complete checkpoint in %s: starting at step 0.", output_dir)
        return 0
    folder, manifest = found
    load_state(folder, parts)
    logger.info("Resumed from %s.", folder)
    return manifest["step"]


def save_checkpoint(output_dir: Path, step: int, parts: Mapping[str, Any], args: TrainArgs) -> None:
    """Publishes `output_dir/checkpoint-<step>` and removes the ones beyond `--checkpoints_total_limit`."""
    metadata = {"step": step, "seed": args.seed, "torch": torch.__version__}
    publish(output_dir / f"checkpoint-{step}", lambda folder: save_state(folder, parts), metadata)
    rotate(output_dir, args.checkpoints_total_limit)
