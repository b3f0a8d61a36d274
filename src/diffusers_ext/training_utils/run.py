"""A run: everything around a training step. `loop.fit` is its client with one optimizer, `adversarial` that with two.

The run is stateless, so that resuming, loader processes, processes and accumulation do not change a result: what a
step sees and draws is a function of integers (`plan.py`), and dropout inside a network uses the default generator,
seeded by (seed, micro-step, rank) after the batch has been fetched. The state of a run is therefore its weights, its
optimizers and one integer.

No step waits for the host to read a number from an accelerator. Whether the gradient of a step is finite is read one
step later there, and before anything is logged, validated or saved; so a step that is not finite may be applied to
weights that nobody sees any more, and nothing of it gets out. On a CPU reading costs nothing and comes first.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device, set_seed
from diffusers.training_utils import EMAModel
from torch import Generator, Tensor, nn
from torch.utils.data import default_collate

from ..data.broken_pictures import BROKEN_LIST
from .args import TrainArgs, apply_launcher, check_places
from .checkpoints import (
    CheckpointError,
    check_finite_state,
    find_checkpoint,
    list_checkpoints,
    load_state,
    publish,
    put_aside,
    remove_half_files,
    rotate,
    save_state,
)
from .launch import describe, make_accelerator
from .lock import FolderInUse, acquire
from .log import RunLog
from .objective import Objective
from .optimizers import SkippedSteps, options_of_this_run
from .plan import DROPOUT_STREAM, LOSS_STREAM, MicroBatch, StepPlan, Window, keyed_generator, load_micro_batches, mix
from .record import Record, check_same_run, make_record, write_options
from .result_folder import recover_result
from .stopping import Reading, Stop
from .tokenizers import save_learnt

logger = logging.getLogger(__name__)


def start(args: TrainArgs) -> Accelerator:
    """The accelerator of a run, its folder ready and the checkpoint found from which it goes on.

    Raises:
        ValueError: see `apply_launcher`, `check_places` and `make_accelerator`.
        FolderInUse: another run trains in the folder.
        CheckpointError: the one that is asked for is damaged, or the folder holds checkpoints and none is asked for:
            those of the older run would count as the newest.
    """
    if not args.origin.sources:
        apply_launcher(args)
    check_places(args)
    accelerator = make_accelerator(args)
    args.resolve_batch(accelerator.num_processes)
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    set_seed(args.seed)  # initial weights; every later draw is keyed
    output_dir = Path(args.output_dir)
    refused: list[FolderInUse | None] = [None]
    if accelerator.is_main_process:
        try:
            prepare_folder(output_dir)
            if args.resume_from_checkpoint is None:  # of a run before, which had no checkpoint
                (output_dir / BROKEN_LIST).unlink(missing_ok=True)
        except FolderInUse as error:
            refused = [error]
    if (error := broadcast_object_list(refused)[0]) is not None:  # so that no process waits for another in vain
        raise error
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


def prepare_folder(output_dir: Path) -> None:
    """Makes a run's folder, locks it, and ends there what a kill has interrupted.

    Raises:
        FolderInUse: another run trains in it.
    """
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    if not output_dir.exists():
        recover_result(output_dir)  # an interrupted export may have put the folder aside
        output_dir.mkdir(exist_ok=True)
    acquire(output_dir)
    recover_result(output_dir)
    rotate(output_dir, None)
    remove_half_files(output_dir)


class Run:
    """The steps of a run, from the checkpoint on that `start` found.

        run = Run(accelerator, args, {"model": objective, ...}, dataset, transform=read)
        prepared, optimizer = accelerator.prepare(objective, optimizer)
        with run:
            for step, window in run.steps():
                for micro in window:
                    with run.micro_step(micro, prepared) as (batch, generators):
                        found = prepared(batch, generators, step)
                        run.backward(found, micro)
                run.update(optimizer, schedule, norm_of_the_gradient, run.values["loss"])
                run.end_step()
        run.end()

    Making it loads the checkpoint, so the parts must not be prepared yet.

    Args:
        accelerator: From `start(args)`.
        args: Length, step and bookkeeping.
        parts: What a checkpoint holds, by the names of its files: the objective first, optimizers, and the schedule
            whose learning rate is logged as "lr_scheduler".
        dataset: Map-style.
        transform: `(dataset[index], generator) -> sample`.
        collate: `list of samples -> batch`.
        num_workers: Loader processes; the result does not depend on it.
        on_validate: `(step) -> values to log`; called on the main process, the averaged weights in place.
        averaged: The part of the objective that the average covers; all of it when unset.
        make_ema: `(parameters, decay=...) -> average`: another rule than diffusers'.

    Raises:
        CheckpointError: the checkpoint of `--resume_from_checkpoint` is foreign, or of a run with other options.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: TrainArgs,
        parts: Mapping[str, Any],
        dataset: Any,
        *,
        transform: Callable[[Any, Generator], Any],
        collate: Callable = default_collate,
        num_workers: int = 0,
        on_validate: Callable[[int], Mapping[str, float]] | None = None,
        averaged: nn.Module | None = None,
        make_ema: Callable[..., EMAModel] = EMAModel,
    ):
        self.accelerator, self.args, self.on_validate = accelerator, args, on_validate
        self.objective: Objective = next(iter(parts.values()))
        self.averaged = self.objective if averaged is None else averaged
        # without `foreach`: diffusers' rounds otherwise (2.4e-7 after 50 steps), so old runs would resume otherwise
        self.ema = make_ema(self.averaged.parameters(), decay=args.ema_decay) if args.use_ema else None
        self.log = RunLog(accelerator, args)
        own = {"log": self.log, "ema": self.ema, "scaler": accelerator.scaler}
        self.parts = {**parts, **{name: part for name, part in own.items() if part is not None}}
        self.first_step, self.record = resume(accelerator, args, self.parts, len(dataset))
        self.finished = self.first_step == args.max_train_steps
        if self.ema is not None:
            self.ema.to(accelerator.device)
        self.plan = StepPlan(
            num_samples=len(dataset),
            batch_size=args.train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            seed=args.seed,
        )
        self.loader = load_micro_batches(
            dataset, self.plan, range(self.first_step, args.max_train_steps), transform=transform, collate=collate,
            num_workers=num_workers, pin_memory=accelerator.device.type == "cuda",
        )  # fmt: skip
        self.stop = Stop(accelerator, args.max_train_minutes)
        self.skipped: dict[str, SkippedSteps] = {}
        self.unread: deque[GradientNorm] = deque()
        self.step, self.window, self.values, self.ended = self.first_step, [], {}, False
        self.saved = self.first_step  # the step of the last checkpoint

    def __enter__(self) -> "Run":
        self.log.begin(self.first_step)
        self.stop.__enter__()
        if self.first_step and self.validates(self.first_step):  # a kill may have come between the two
            self.validate(self.first_step, unless_logged=True)
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop.__exit__(*error)
        self.log.bar.close()

    def steps(self) -> Iterator[tuple[int, Window]]:
        """Yields the number of each step with this process's micro-batches, until the last one or a stop."""
        self.objective.train()
        batches = iter(self.loader)
        for step in range(self.first_step, self.args.max_train_steps):
            parts = self.plan.micro_batches(step)
            self.step, self.values = step, {}
            with self.saved_on_error(step):  # a bad row, say
                read = [next(batches) for _ in parts]
            self.window = [
                MicroBatch(batch, keys, len(keys) if weight else 0, weight, number, number == len(parts) - 1)
                for number, (batch, (keys, weight)) in enumerate(zip(read, parts, strict=True))
            ]
            yield step, self.window
            if self.ended:
                return

    @contextmanager
    def micro_step(self, micro: MicroBatch, prepared: nn.Module) -> Iterator[tuple[Any, list[Generator]]]:
        """Lends a micro-batch on the device and one generator a sample; processes exchange gradients at the last one.

        Dropout draws from the default generator, which is seeded here.
        """
        seed, accelerator = self.args.seed, self.accelerator
        batch = send_to_device(micro.batch, accelerator.device, non_blocking=accelerator.device.type == "cuda")
        torch.manual_seed(mix(seed, self.step, micro.number, accelerator.process_index, DROPOUT_STREAM))
        with nullcontext() if micro.is_last else accelerator.no_sync(prepared):
            yield batch, [keyed_generator(seed, epoch, index, LOSS_STREAM) for epoch, index in micro.keys]

    def backward(self, found: Mapping[str, Tensor], micro: MicroBatch, loss: str = "loss") -> None:
        """Adds the gradients of `found[loss]` to the step's, and all single numbers to its values for the log.

        DDP averages over the processes, each of which holds its share of the step's samples.
        """
        self.accelerator.backward(found[loss] * (micro.weight * self.accelerator.num_processes))
        for name, value in found.items():
            if value.ndim == 0:
                self.values[name] = self.values.get(name, 0) + value.detach() * micro.weight

    def update(self, optimizer: Any, schedule: Any, norm: Tensor | None, loss: Tensor, of: str = "") -> None:
        """One step of an optimizer and its schedule.

        Args:
            norm: Of the whole gradient.
            loss: For the message.
            of: Whose gradient it is, where there are several optimizers.

        Raises:
            FloatingPointError: the gradient (on an accelerator: that of the step before) is not finite, or fp16's
                scaler has skipped too many steps.
        """
        if norm is not None and self.accelerator.scaler is None:  # the scaler skips such steps itself
            on_cpu = norm.device.type == "cpu"
            value = norm.detach() if on_cpu else Reading(norm)
            self.unread.append(GradientNorm(value, loss.detach(), self.step, self.window, of))
            self.check_finite(up_to=self.step if on_cpu else self.step - 1)
        optimizer.step()
        skipped = self.skipped.setdefault(of, SkippedSteps(f"gradient of {of}" if of else "gradient"))
        skipped.add(optimizer.step_was_skipped, self.step, loss.detach())
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

    def check_finite(self, up_to: int) -> None:
        """Reads the norms of the gradients up to that step.

        Raises:
            FloatingPointError: one is not finite.
        """
        while self.unread and self.unread[0].step <= up_to:
            one = self.unread.popleft()
            norm: Any = one.value.tolist()
            if not math.isfinite(norm):
                samples = [index for micro in one.window for _, index in micro.keys]
                raise FloatingPointError(
                    f"The gradient of {f'{one.of} in ' if one.of else ''}step {one.step} is not finite (norm {norm}, "
                    f"loss {float(one.loss)}; samples {samples[:32]}). Nothing of it is saved, and the last "
                    "checkpoint is untouched; lower --learning_rate or look at these samples."
                )

    def end_step(self) -> None:
        """Averages, logs, saves, validates, and says whether to stop: as often as the arguments ask for it."""
        args, done = self.args, self.step + 1
        if self.ema is not None:
            self.ema.step(self.averaged.parameters())
        self.log.add(self.values, sum(len(m.keys) for m in self.window) * self.accelerator.num_processes)
        self.finished = done == args.max_train_steps
        reason = self.stop.reason()
        self.ended = self.finished or reason is not None
        logs = self.finished or done % args.logging_steps == 0
        saves = self.ended or done % args.checkpointing_steps == 0
        validates = self.validates(done)
        if logs or saves or validates:
            self.check_finite(up_to=self.step)
        if logs:
            rate = float(self.parts["lr_scheduler"].get_last_lr()[0])
            self.log.flush(done, lr=rate, **self.objective.logged())
        if saves:
            save_checkpoint(self.accelerator, done, self.parts, args, self.record)
            self.saved = done
        if validates:
            with self.saved_on_error(done):
                self.validate(done)
        if self.ended and not self.finished:
            args.origin.stopped_by = self.stop.signal
            self.log.bar.close()
            logger.warning("%s: stopped after step %d; --resume_from_checkpoint latest goes on.", reason, done)

    @contextmanager
    def saved_on_error(self, done: int) -> Iterator[None]:
        """Between two steps: an error ends the run with a checkpoint, so that nothing is lost of `done` steps.

        Not with several processes: the others are at work, and would have to take part.
        """
        try:
            yield
        except Exception:
            if done > self.saved and self.accelerator.num_processes == 1:
                self.check_finite(up_to=done - 1)
                save_checkpoint(self.accelerator, done, self.parts, self.args, self.record)
                logger.warning("Step %d was saved; --resume_from_checkpoint latest goes on from there.", done)
            raise

    def validates(self, done: int) -> bool:
        """Whether a validation follows so many steps."""
        every = self.args.validation_steps
        return done == self.args.max_train_steps or bool(every and done % every == 0)

    def validate(self, step: int, unless_logged: bool = False) -> None:
        """Validates on the main process, `unless_logged`: if the log has no figures of it yet."""
        known = unless_logged and self.log.has_validation(step)
        if self.on_validate is not None and self.accelerator.is_main_process and not known:
            with ema_weights(self.averaged, self.ema), evaluating(self.objective):
                self.log.write(step, self.on_validate(step))
        self.accelerator.wait_for_everyone()

    def end(self) -> bool:
        """Puts the average in the place of the weights if training got to its end, and returns whether it did."""
        if self.finished and self.ema is not None:
            self.ema.copy_to(self.averaged.parameters())
        return self.finished


@dataclass(frozen=True)
class GradientNorm:
    """The norm of a step's gradient, and what a message says about it."""

    value: Tensor | Reading
    loss: Tensor
    step: int
    window: Window
    of: str


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

        publish(folder, write, {"step": step, "seed": args.seed, "torch": torch.__version__, **vars(record)})
        rotate(folder.parent, args.checkpoints_total_limit, newest=folder)
    accelerator.wait_for_everyone()
