"""What ends a run early, who may run in a folder, and the loop of two optimizers."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from slow_run import main as slow_run
from torch import nn

from diffusers_ext.losses.adversarial import (
    adaptive_weight,
    gradient_penalty,
    hinge_discriminator_loss,
    marking_discriminator_loss,
    marking_generator_loss,
    wasserstein_discriminator_loss,
)
from diffusers_ext.training_utils import lock
from diffusers_ext.training_utils.adversarial import AdversarialObjective, Opponent, fit_adversarial
from diffusers_ext.training_utils.args import TrainArgs
from diffusers_ext.training_utils.hub import NOT_FOR_THE_HUB
from diffusers_ext.training_utils.launch import launcher_process
from diffusers_ext.training_utils.loop import fit
from diffusers_ext.training_utils.objective import Objective
from diffusers_ext.training_utils.optimizers import build_optimizer
from diffusers_ext.training_utils.plan import LOSS_STREAM, StepPlan, keyed_generator
from diffusers_ext.training_utils.result_folder import write_result
from diffusers_ext.training_utils.run import start
from diffusers_ext.training_utils.stopping import Stop

SCRIPT = Path(__file__).parents[1] / "slow_run.py"


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


# Signals


SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}
LAUNCHER = "SIGKILL of its launcher"
LAUNCH = ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """For each signal a run that got it, both at once since most of their seconds are imports.

    SIGTERM goes to the trainer alone, Ctrl-C to its loader process as well; and one run's launcher is killed.
    """
    os.environ["ACCELERATE_USE_CPU"] = "true"
    trainers = {}
    for number in (*SIGNALS, LAUNCHER):
        folder = tmp_path_factory.mktemp("signals") / "run"
        words = [str(SCRIPT), str(folder), "0.2"]
        if number == LAUNCHER:
            words = ["-m", "accelerate.commands.launch", *LAUNCH, *words]
        words = [sys.executable, *words]
        trainers[number] = folder, subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    holders = {}
    for number, (folder, trainer) in trainers.items():
        while not (folder / "log.jsonl").is_file() and trainer.poll() is None:
            time.sleep(0.02)
        holders[number] = (folder / "run.lock").read_text() == f"{trainer.pid}\n"
        if number == LAUNCHER:
            trainer.kill()
        else:
            (os.kill if number == signal.SIGTERM else os.killpg)(trainer.pid, number)
    said = {number: trainer.communicate(timeout=60)[1] for number, (_, trainer) in trainers.items()}
    return {n: (folder, trainer.returncode, said[n], holders[n]) for n, (folder, trainer) in trainers.items()}


def test_a_trainer_whose_launcher_is_gone_ends_with_a_checkpoint(stopped):
    folder, _, said, _ = stopped[LAUNCHER]  # the trainer has the error stream too, so all of it is there
    (saved,) = folder.glob("checkpoint-*")
    step = int(saved.name.partition("-")[2])
    assert 1 <= step < 40 and (saved / "manifest.json").is_file(), said
    assert f"SIGTERM: stopped after step {step}; --resume_from_checkpoint latest goes on" in said
    assert not (folder / "run.lock").exists()


def test_only_a_launcher_is_watched():
    assert launcher_process() is None  # the parent of the tests, a shell or a worker's, may end
    with Stop(Accelerator(cpu=True), None) as stop:
        stop.launcher = os.getppid()
        assert stop.reason() is None
        stop.launcher = os.getppid() + 1  # another one has adopted the trainer
        assert stop.reason() == "SIGTERM" and stop.signal == signal.SIGTERM


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, stopped, number):
    folder, status, said, holds_lock = stopped[number]
    assert status == SIGNALS[number], said
    assert holds_lock
    (saved,) = folder.glob("checkpoint-*")
    step = int(saved.name.partition("-")[2])
    assert 1 <= step < 100 and not (folder / "weights.pt").exists()
    name = signal.Signals(number).name
    assert f"{name}: the run ends with a checkpoint after this step" in said
    assert f"{name}: stopped after step {step}; --resume_from_checkpoint latest goes on" in said
    assert not (folder / "run.lock").exists()

    resumed = slow_run(str(folder), 0, "--resume_from_checkpoint", "latest")
    AcceleratorState._reset_state(reset_partial_state=True)
    straight = slow_run(str(tmp_path / "straight"), 0)
    for one, other in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_second_ctrl_c_stops_at_once_and_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Stop(Accelerator(cpu=True), None) as stop:
        assert stop.reason() is None
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # a launcher hands on the same Ctrl-C
        assert stop.reason() == "SIGINT" and stop.signal == signal.SIGINT
        stop.caught -= 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# The lock


def locked(path: Path) -> bool:
    """Whether somebody has the lock: as another process would find it."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.lock").write_text("4711\n")
    (folder / "checkpoint-3.tmp-0123abcd").mkdir()  # what the other run is writing
    with (folder / "run.lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        message = (
            rf"Another run \(process 4711\) trains in {re.escape(str(folder))}.*`kill 4711`.*another --output_dir"
        )
        with pytest.raises(lock.FolderInUse, match=message):
            start(TrainArgs(output_dir=str(folder)))
        assert (folder / "checkpoint-3.tmp-0123abcd").is_dir()
    start(TrainArgs(output_dir=str(folder)))  # its end, also by a kill, gives the folder free
    assert locked(folder / "run.lock") and (folder / "run.lock").read_text() == f"{os.getpid()}\n"
    start(TrainArgs(output_dir=str(folder)))  # one training after another in a process
    lock.release(folder)
    assert not (folder / "run.lock").exists()


def test_the_lock_outlives_the_exchange_of_the_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lock.acquire(folder)
    before = folder.stat().st_ino
    for text in ("old", "new"):
        write_result(folder, lambda staging, text=text: (staging / "config.json").write_text(text))
    assert folder.stat().st_ino != before and (folder / "config.json").read_text() == "new"
    assert locked(folder / "run.lock")
    lock.release(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json"] and lock.LOCK in NOT_FOR_THE_HUB


# Two optimizers


class Painting(AdversarialObjective):
    """Pictures (b, 1, 2, 2) through a bottleneck and noise; `seen` counts them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)
        self.register_buffer("seen", torch.zeros(()))

    @property
    def last_weight(self):
        return self.last.weight

    def paint(self, batch, generators):
        noise = torch.stack([torch.randn(2, 2, 2, generator=g) for g in generators])
        return self.last(torch.tanh(self.first(batch)) + 0.1 * noise)

    def losses(self, batch, generators, step):
        fake = self.paint(batch, generators)
        error = (fake - batch).square().mean()
        return {
            "loss": error + step * self.last.bias.square().sum(),
            "reconstruction": error,
            "real": batch,
            "fake": fake,
        }

    def fake(self, batch, generators, step):
        return self.paint(batch, generators)

    def observe(self, found, weight, accelerator):
        self.seen += len(found["real"])

    def logged(self):
        return {"seen": float(self.seen)}


def judge() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.LeakyReLU(0.2), nn.Conv2d(3, 1, 1))


def picture(row: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(row)) + 0.1 * torch.randn(
        (), generator=generator
    )


@pytest.mark.parametrize("fresh", [False, True])
def test_the_adversarial_loop_is_the_loop_by_hand(tmp_path, fresh):
    args = TrainArgs(
        output_dir=str(tmp_path), max_train_steps=5, train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        max_grad_norm=0.1, lr_warmup_steps=2,
    )  # fmt: skip
    objective, discriminator = Painting(), judge()
    options = {"weight": 0.8, "learning_rate": 3e-2, "fresh_forward": fresh}
    opponent = Opponent(discriminator, 2, hinge_discriminator_loss, **options)
    assert fit_adversarial(start(args), objective, opponent, range(10), args, transform=picture)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]

    by_hand, other = Painting(), judge()
    optimizer, schedule = build_optimizer(list(by_hand.parameters()), args)
    disc_optimizer, disc_schedule = build_optimizer(list(other.parameters()), args, 3e-2)
    plan, wanted = StepPlan(10, 4), []
    for step in range(5):
        ((keys, weight),) = plan.micro_batches(step)
        real = torch.stack([picture(i, keyed_generator(0, epoch, i, 0)) for epoch, i in keys])
        draws = [keyed_generator(0, epoch, i, LOSS_STREAM) for epoch, i in keys]
        fake = by_hand.paint(real, draws)
        error = (fake - real).square().mean()
        loss = error + step * by_hand.last.bias.square().sum()
        if step >= 2:
            cheat = -other(fake).mean()
            loss = loss + 0.8 * adaptive_weight(error, cheat, by_hand.last.weight) * cheat
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        wanted.append({"loss": loss.item()})
        if step >= 2:
            shown = by_hand.paint(real, draws) if fresh else fake
            judged = hinge_discriminator_loss(other(real), other(shown.detach()))
            disc_optimizer.zero_grad()
            judged.backward()
            disc_optimizer.step()
            disc_schedule.step()
            wanted[-1]["disc_loss"] = judged.item()
    for line, expected in zip(lines, wanted, strict=True):
        assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        assert ("disc_loss" in line) == ("disc_loss" in expected)
    for one, two in ((objective, by_hand), (discriminator, other)):
        for found, hand in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(found, hand, rtol=1e-5, atol=1e-6)
    # five steps over 10 pictures, 4 + 4 + 2 an epoch: what the objective keeps is in the checkpoint
    assert load_file(tmp_path / "checkpoint-5" / "objective.safetensors")["seen"] == 18 == lines[-1]["seen"]


class Plain(Painting):
    @property
    def last_weight(self):
        return None


def test_a_constant_weight_where_there_is_no_last_weight(tmp_path):
    args = TrainArgs(output_dir=str(tmp_path), max_train_steps=2, train_batch_size=4, logging_steps=1)
    fit_adversarial(
        start(args), Plain(), Opponent(judge(), 1, hinge_discriminator_loss, weight=0.25), range(10), args,
        transform=picture,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line.get("adaptive_weight") for line in lines] == [None, 0.25]


WGAN = {"loss": wasserstein_discriminator_loss, "penalty": 10.0}
MARKS = {"loss": marking_discriminator_loss, "generator_loss": marking_generator_loss}


@pytest.mark.parametrize("form", [WGAN, MARKS])
def test_an_opponent_that_goes_first_is_that_of_piti_by_hand(tmp_path, form):
    """It is stepped before the adversarial term is taken, which comes from its new weights, with a constant weight."""
    args = TrainArgs(
        output_dir=str(tmp_path), max_train_steps=4, train_batch_size=5, learning_rate=1e-2, logging_steps=1,
        max_grad_norm=0.1,
    )  # fmt: skip
    objective, discriminator = Plain(), judge()
    opponent = Opponent(discriminator, 1, weight=0.3, learning_rate=3e-2, goes_first=True, **form)
    slow, fast = ([p] for p in objective.parameters() if p.ndim == 4)
    groups = [{"params": slow, "lr": 1e-3}, {"params": fast}]
    assert fit_adversarial(
        start(args), objective, opponent, range(10), args, transform=picture, parameter_groups=groups,
        collate=lambda samples: torch.stack(samples) + 0.5,
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]

    by_hand, other = Plain(), judge()
    slow, fast = ([p] for p in by_hand.parameters() if p.ndim == 4)
    optimizer, _ = build_optimizer([{"params": slow, "lr": 1e-3}, {"params": fast}], args)
    disc_optimizer, _ = build_optimizer(list(other.parameters()), args, 3e-2)
    plan = StepPlan(10, 5)
    for step in range(4):
        ((keys, _),) = plan.micro_batches(step)
        real = torch.stack([picture(i, keyed_generator(0, epoch, i, 0)) for epoch, i in keys]) + 0.5
        draws = [keyed_generator(0, epoch, i, LOSS_STREAM) for epoch, i in keys]
        fake = by_hand.paint(real, draws)
        loss = (fake - real).square().mean() + step * by_hand.last.bias.square().sum()
        if step >= 1:
            judged = form["loss"](other(real), other(fake.detach()))
            if form is WGAN:
                epsilon = torch.stack([torch.rand(1, 1, 1, generator=g) for g in draws])
                penalty = gradient_penalty(other, real, fake, epsilon)
                assert lines[step]["disc_penalty"] == pytest.approx(penalty.item(), rel=1e-4)
                judged = judged + penalty
            assert lines[step]["disc_loss"] == pytest.approx(judged.item(), rel=1e-4)
            disc_optimizer.zero_grad()
            judged.backward()
            disc_optimizer.step()
            cheat = -other(fake).mean() if form is WGAN else other(fake).sigmoid().log().mean()
            assert lines[step]["adversarial"] == pytest.approx(cheat.item(), rel=1e-4)
            loss = loss + 0.3 * cheat
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1)
        optimizer.step()
        assert lines[step]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for one, two in ((objective, by_hand), (discriminator, other)):
        for found, hand in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(found, hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [WGAN, MARKS])
def test_what_the_two_learn_of_each_other(tmp_path, form):
    """WGAN: high scores are real. Marking: high scores are generated. The adversarial term goes the other way."""
    args = TrainArgs(output_dir=str(tmp_path), max_train_steps=80, train_batch_size=10, learning_rate=1e-12)
    objective, discriminator = Plain(), judge()
    opponent = Opponent(discriminator, 0, learning_rate=3e-2, goes_first=True, **form)
    fit_adversarial(start(args), objective, opponent, range(10), args, transform=picture)
    real = torch.stack([picture(i, torch.Generator().manual_seed(i)) for i in range(10)])
    fake = objective.paint(real, [torch.Generator().manual_seed(i) for i in range(10)]).detach().requires_grad_()
    gap = (discriminator(fake) - discriminator(real)).mean()
    assert gap > 0.5 if form is MARKS else gap < -0.2
    (slope,) = torch.autograd.grad(opponent.generator_loss(discriminator(fake)), fake)
    moved = discriminator(fake - 1e-2 * slope).mean() - discriminator(fake).mean()
    assert moved < 0 if form is MARKS else moved > 0  # down the term: less generated, or more real


def test_a_launcher_that_compiles_leaves_the_penalty_its_second_derivative(tmp_path, monkeypatch):
    found = []
    for backend in ("NO", "AOT_EAGER"):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        AcceleratorState._reset_state(reset_partial_state=True)
        args = TrainArgs(output_dir=str(tmp_path / backend), max_train_steps=2, train_batch_size=10, logging_steps=1)
        discriminator = judge()
        opponent = Opponent(discriminator, 0, goes_first=True, **WGAN)
        fit_adversarial(start(args), Plain(), opponent, range(10), args, transform=picture)
        found.append(torch.cat([p.detach().flatten() for p in discriminator.parameters()]))
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_an_opponent_cannot_go_first_and_last():
    with pytest.raises(ValueError, match="`fresh_forward` and `goes_first` are both set"):
        Opponent(judge(), 0, hinge_discriminator_loss, fresh_forward=True, goes_first=True)


def test_an_objective_must_say_its_losses(tmp_path):
    args = TrainArgs(output_dir=str(tmp_path), max_train_steps=1)

    class Empty(Objective):
        def __init__(self):
            super().__init__()
            self.network = nn.Linear(1, 1)

    with pytest.raises(NotImplementedError):
        fit(start(args), Empty(), range(4), args, transform=picture)
