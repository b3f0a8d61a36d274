"""The loop's promises: order, draws, accumulation, resume, averaging and the guard against non-finite gradients."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn import functional as F

from diffusers_ext.training_utils.args import TrainArgs
from diffusers_ext.training_utils.checkpoints import CheckpointError
from diffusers_ext.training_utils.loop import fit
from diffusers_ext.training_utils.objective import Objective
from diffusers_ext.training_utils.plan import StepPlan, mix
from diffusers_ext.training_utils.run import start

SAMPLES = 22


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # the next file may ask for another precision


class Numbers:
    """Sample i is a fixed vector; a map-style data set."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(4, generator=torch.Generator().manual_seed(index))


def augment(sample: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"x": sample + 0.1 * torch.randn(4, generator=generator)}


class Denoising(Objective):
    """Finds a vector under noise; `usage` counts the samples that it has seen."""

    def __init__(self, network: nn.Module | None = None, *, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        new = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Dropout(dropout), nn.Linear(8, 4))
        self.network = network or new
        self.register_buffer("usage", torch.zeros(()))

    def losses(self, batch, generators, step):
        noise = torch.stack([torch.randn(4, generator=g) for g in generators])
        return {"loss": F.mse_loss(self.network(batch["x"] + noise), batch["x"]), "seen": batch["x"].detach()}

    def observe(self, found, weight, accelerator):
        self.usage += len(found["seen"])

    def logged(self):
        return {"usage": float(self.usage)}


def train(tmp_path, *, dropout: float = 0.0, workers: int = 0, kind=Denoising, **options) -> Objective:
    args = TrainArgs(output_dir=str(tmp_path), learning_rate=1e-2, logging_steps=1, **options)
    accelerator = start(args)
    objective = kind(dropout=dropout)
    fit(accelerator, objective, Numbers(), args, transform=augment, num_workers=workers)
    return objective


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_an_epoch_shows_every_sample_once_and_weights_sum_to_one():
    for processes in (1, 2, 3):
        for batch, accumulation in ((4, 1), (3, 2), (5, 4)):
            plans = [StepPlan(SAMPLES, batch, accumulation, processes, rank) for rank in range(processes)]
            seen = []
            for step in range(plans[0].steps_per_epoch):
                parts = [plan.micro_batches(step) for plan in plans]
                assert len({len(part) for part in parts}) == 1  # the same number of backward passes everywhere
                assert sum(weight for part in parts for _, weight in part) == pytest.approx(1)
                seen += [index for part in parts for keys, weight in part for _, index in keys if weight > 0]
            assert sorted(seen) == list(range(SAMPLES))


def test_order_differs_between_epochs_and_seeds_and_is_pinned():
    plan = StepPlan(SAMPLES, SAMPLES)
    first = [index for _, index in plan.micro_batches(0)[0][0]]
    second = [index for _, index in plan.micro_batches(1)[0][0]]
    other = [index for _, index in StepPlan(SAMPLES, SAMPLES, seed=1).micro_batches(0)[0][0]]
    assert first != second and first != other
    assert mix(1, 2, 3) == mix(1, 2, 3) != mix(3, 2, 1)
    assert 0 <= mix(2**70, -5) < 2**63


@pytest.mark.parametrize("stop", [1, 3, 6, 7])  # 6 steps an epoch: within, at the end, beyond
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact_to_the_bit(tmp_path, stop, workers):
    options = {"dropout": 0.2, "train_batch_size": 2, "gradient_accumulation_steps": 2, "use_ema": True}
    straight = train(tmp_path / "straight", max_train_steps=9, **options)
    train(tmp_path / "resumed", max_train_steps=9, checkpointing_steps=stop, checkpoints_total_limit=9, **options)
    for path in (tmp_path / "resumed").glob("checkpoint-*"):
        if path.name != f"checkpoint-{stop}":
            (path / "manifest.json").unlink()  # as if the run had been stopped after step `stop`
    resumed = train(
        tmp_path / "resumed", max_train_steps=9, workers=workers, resume_from_checkpoint="latest", **options
    )
    assert torch.equal(weights(straight), weights(resumed))
    assert straight.usage == resumed.usage == SAMPLES + 3 * 4  # an epoch of 6 steps, and 3 steps: a buffer is resumed
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("straight", "resumed")]
    losses = [[(json.loads(line)["step"], json.loads(line)["loss"]) for line in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 9


def test_time_limit_saves_a_checkpoint_to_resume_from(tmp_path):
    options = {"train_batch_size": 4, "max_train_steps": 5}
    straight = train(tmp_path / "straight", **options)
    train(tmp_path / "limited", max_train_minutes=1e-9, **options)
    assert [p.name for p in (tmp_path / "limited").glob("checkpoint-*")] == ["checkpoint-1"]
    resumed = train(tmp_path / "limited", resume_from_checkpoint="latest", **options)
    assert torch.equal(weights(straight), weights(resumed))


@pytest.mark.parametrize("batch, accumulation", [(2, 4), (4, 2), (1, 8)])
def test_accumulation_equals_a_large_batch(tmp_path, batch, accumulation):
    large = train(tmp_path / "large", train_batch_size=8, max_train_steps=6)  # windows of 8, 8 and 6 samples
    small = train(
        tmp_path / "small", train_batch_size=batch, gradient_accumulation_steps=accumulation, max_train_steps=6
    )
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-5, atol=1e-6)


def test_average_matches_its_closed_form_and_is_exported(tmp_path):
    history = []

    class Recording(Denoising):
        def before_step(self, batch, own, step, accelerator):
            assert own == len(batch["x"])
            history.append(weights(self))

    options = {"train_batch_size": 8, "max_train_steps": 5}
    live = train(tmp_path / "live", **options)
    averaged = train(tmp_path / "ema", use_ema=True, ema_decay=0.9, kind=Recording, **options)
    expected = history[0]
    for step, value in enumerate([*history[1:], weights(live)]):
        decay = min((1 + step) / (10 + step), 0.9) if step > 0 else 0.0  # diffusers' EMAModel without warm-up
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(weights(averaged), expected, rtol=0, atol=1e-6)


def test_validation_sees_the_average_and_leaves_the_live_weights_alone(tmp_path):
    args = TrainArgs(
        output_dir=str(tmp_path), max_train_steps=4, validation_steps=2, use_ema=True, train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
    )  # fmt: skip
    model, seen = Denoising(), []

    def validate(step):
        seen.append((step, model.training, weights(model)))
        return {"value": 1.0}

    fit(start(args), model, Numbers(), args, transform=augment, on_validate=validate)
    plain = train(tmp_path / "plain", max_train_steps=4, use_ema=True, train_batch_size=8)
    assert [(step, training) for step, training, _ in seen] == [(2, False), (4, False)]
    assert torch.equal(seen[-1][2], weights(model)) and torch.equal(weights(model), weights(plain))
    assert any(json.loads(line).get("value") == 1.0 for line in (tmp_path / "log.jsonl").read_text().splitlines())


@pytest.mark.parametrize("steps", [2, 4])  # in the middle, and after the last step
def test_a_validation_that_a_kill_has_cut_off_is_made_up_for(tmp_path, steps):
    def run(folder, validate, **options):
        args = TrainArgs(
            output_dir=str(tmp_path / folder), max_train_steps=4, validation_steps=2, checkpointing_steps=2,
            use_ema=True, train_batch_size=8, logging_steps=1, **options,
        )  # fmt: skip
        model = Denoising()
        fit(start(args), model, Numbers(), args, transform=augment, on_validate=lambda step: validate(step, model))
        return model, [
            {name: value for name, value in json.loads(line).items() if name != "samples_per_second"}
            for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()
        ]

    asked = []

    def validate(step, model):
        asked.append(step)
        return {"validation_loss": float(weights(model).sum())}

    def killed(step, model):
        if step == steps:
            raise KeyboardInterrupt
        return validate(step, model)

    straight, log = run("straight", validate)
    with pytest.raises(KeyboardInterrupt):
        run("killed", killed)
    (tmp_path / "killed" / ".tmp-0123abcd-log.jsonl").touch()  # as a kill leaves it within a write
    resumed, again = run("killed", validate, resume_from_checkpoint="latest")
    assert torch.equal(weights(resumed), weights(straight)) and again == log
    assert not list((tmp_path / "killed").glob(".*"))
    asked.clear()
    assert run("killed", validate, resume_from_checkpoint="latest")[1] == log and asked == []  # once is enough


class OneIsBad(Numbers):
    def __init__(self, bad: int):
        self.bad = bad

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self.bad:
            raise ValueError("a.png cannot be read")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_learnt_before_a_bad_row_is_saved(tmp_path, workers):
    plan = StepPlan(SAMPLES, 4, 2)
    (_, bad) = plan.micro_batches(2)[1][0][1]  # in the second micro-batch of the third step
    options = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "max_train_steps": 4, "use_ema": True}
    straight = train(tmp_path / "straight", **options)
    args = TrainArgs(output_dir=str(tmp_path / "bad"), learning_rate=1e-2, logging_steps=1, **options)
    with pytest.raises(ValueError, match="a.png cannot be read"):
        fit(start(args), Denoising(), OneIsBad(bad), args, transform=augment, num_workers=workers)
    assert [path.name for path in (tmp_path / "bad").glob("checkpoint-*")] == ["checkpoint-2"]
    repaired = train(tmp_path / "bad", resume_from_checkpoint="latest", **options)
    assert torch.equal(weights(repaired), weights(straight))


def test_what_was_learnt_before_a_failed_validation_is_saved(tmp_path):
    def fails(step):
        raise ValueError("no memory left")

    args = TrainArgs(output_dir=str(tmp_path), max_train_steps=9, validation_steps=3, train_batch_size=8)
    with pytest.raises(ValueError, match="no memory left"):
        fit(start(args), Denoising(), Numbers(), args, transform=augment, on_validate=fails)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    class Poisoned(Denoising):
        def losses(self, batch, generators, step):
            found = super().losses(batch, generators, step)
            return {**found, "loss": found["loss"] * float("nan")} if step == 2 else found

    with pytest.raises(FloatingPointError, match=r"gradient of step 2 is not finite .*samples \[.*learning_rate"):
        train(tmp_path, kind=Poisoned, train_batch_size=4, max_train_steps=5, checkpointing_steps=1)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    train(tmp_path, train_batch_size=8, max_train_steps=2)
    with pytest.raises(CheckpointError, match="ema.pt is missing.*other options"):
        train(tmp_path, train_batch_size=8, max_train_steps=4, use_ema=True, resume_from_checkpoint="latest")


def test_checkpoints_of_other_sizes_are_refused(tmp_path):
    train(tmp_path, train_batch_size=8, max_train_steps=1)
    args = TrainArgs(output_dir=str(tmp_path), train_batch_size=8, max_train_steps=2, resume_from_checkpoint="latest")
    with pytest.raises(CheckpointError, match="model.safetensors does not fit, it was written with other options"):
        fit(start(args), Denoising(nn.Linear(4, 4)), Numbers(), args, transform=augment)


def test_an_older_run_is_not_mixed_with_a_new_one(tmp_path):
    train(tmp_path, train_batch_size=8, max_train_steps=2)
    with pytest.raises(CheckpointError, match="holds checkpoint-2 of an earlier run.*--resume_from_checkpoint latest"):
        train(tmp_path, train_batch_size=8, max_train_steps=1)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_a_log_line_that_was_cut_by_a_kill_does_not_stop_the_resume(tmp_path):
    train(tmp_path, train_batch_size=8, max_train_steps=2)
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write('{"step": 3, "lo')
    train(tmp_path, train_batch_size=8, max_train_steps=3, resume_from_checkpoint="latest")
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="data set is empty"):
        StepPlan(0, 4)
