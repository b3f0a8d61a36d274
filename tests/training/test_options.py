"""Options that every recipe has: they are refused before the first step, and mean the same everywhere."""

import copy
import importlib
import json
import math
import os
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import train_autoencoder
import train_cascaded
import train_ldm
import train_piti
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from diffusers_ext.models.token_codec import codebook_weight
from diffusers_ext.models.vq_paella import PaellaVQModel
from diffusers_ext.training.autoencoder.networks import new_autoencoder
from diffusers_ext.training.autoencoder.objective import Quantized, check_sizes
from diffusers_ext.training.ldm.tasks.table import TASKS
from diffusers_ext.training_utils.args import TrainArgs
from diffusers_ext.training_utils.optimizers import build_optimizer
from diffusers_ext.training_utils.plan import StepPlan
from diffusers_ext.training_utils.run import start

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "training" / "presets"
SMOKE = sorted(path.name for path in PRESETS.glob("*-smoke.yaml"))
RECIPES = sorted({name.split("-")[0] for name in SMOKE})
MISSING = [name for name in LOGGER_TYPE_TO_CLASS if name not in map(str, get_available_trackers())]


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(ROOT)  # the smoke presets name bundled checkpoints
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def parse(recipe: str, *words: str):
    return importlib.import_module(f"train_{recipe}").parse_args([str(PRESETS / f"{recipe}-smoke.yaml"), *words])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_refuses_what_concerns_all(recipe):
    for words, message in (
        (("--lr_warmup_steps", "-5"), "--lr_warmup_steps must be >= 0, got -5"),
        (("--lr_warmup_steps", "10", "--max_train_steps", "5"), "--lr_warmup_steps=10 is longer than the run"),
        (("--total_batch_size", "0"), "--total_batch_size must be > 0, got 0"),
        (("--adam_beta1", "1"), r"--adam_beta1 must lie in \[0, 1\), got 1.0"),
        (("--adam_beta2", "-1"), r"--adam_beta2 must lie in \[0, 1\), got -1.0"),
        (("--adam_epsilon", "0"), "--adam_epsilon must be > 0, got 0.0"),
        (("--adam_weight_decay", "-1"), "--adam_weight_decay must be >= 0, got -1.0"),
        (("--seed", "-1"), r"--seed must lie in \[0, 4294967295\], got -1"),
        (("--seed", str(2**32)), r"--seed must lie in \[0, 4294967295\], got 4294967296"),
        (("--lr_scheduler", "sqrt"), "--lr_scheduler=sqrt must be one of linear, cosine.*constant_with_warmup"),
        (("--lr_scheduler", "piecewise_constant"), "--lr_scheduler=piecewise_constant must be one of"),
        (("--dataloader_num_workers", "-1"), "--dataloader_num_workers must be >= 0, got -1"),
        (("--learning_rate", "inf"), "--learning_rate must be a finite number, got inf"),
        (("--report_to", "nonsense"), "'nonsense' is unknown; known are .*tensorboard.* all and none"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(recipe, *words)
    with pytest.raises(ImportError, match=f"needs the package {MISSING[0]}: run `pip install {MISSING[0]}`"):
        parse(recipe, "--report_to", MISSING[0])
    assert parse(recipe, "--report_to", "none")[-1].trackers == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_number_is_one_and_sizes_are_above_zero(recipe):
    """Of all options, whatever a recipe adds."""
    for section in parse(recipe):
        for name, hint in get_type_hints(type(section)).items():
            kinds = get_args(hint) or (hint,)
            if float in kinds:
                with pytest.raises(ValueError, match=f"nan|--{name}"):
                    parse(recipe, f"--{name}", "nan")
            if int in kinds and name.endswith(
                ("_size", "_layers", "_heads", "_channels", "_width", "_dim", "_groups")
            ):
                for value in ("0", "-1"):
                    with pytest.raises(ValueError, match=f"--{name}.*{value}"):
                        parse(recipe, f"--{name}", value)
    assert parse(recipe, "--max_grad_norm", "inf")[-1].max_grad_norm == math.inf  # no limit


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_cache_knows_no_other_rows(recipe):
    if any(hasattr(section, "cache_dir") for section in parse(recipe)):
        with pytest.raises(
            ValueError, match="--on_broken_picture=skip with --cache_dir=cache: .* Leave one of them out"
        ):
            parse(recipe, "--cache_dir", "cache", "--center_crop", "true", "--on_broken_picture", "skip")


@pytest.mark.parametrize("recipe", RECIPES)
def test_lora_needs_a_network_to_stand_beside(recipe):
    if any(hasattr(section, "rank") for section in parse(recipe)):
        with pytest.raises(
            ValueError, match="--rank=2 trains matrices beside an existing network: name it with --pre"
        ):
            parse(recipe, "--rank", "2")


@pytest.mark.parametrize(
    "recipe, words, message",
    [
        ("paella", ("--guidance_scale", "-3"), "`guidance_scale` must be finite and at least 0, received -3"),
        ("paella", ("--guidance_scale", "nan"), "`guidance_scale` must be finite"),
        ("paella", ("--label_smoothing", "1.5"), r"--label_smoothing must lie in \[0, 1\), got 1.5"),
        ("paella", ("--condition", "image", "--validation_prompts", "a"), "--validation_prompts go with --condition"),
        ("ldm", ("--guidance_scale", "-3"), "`guidance_scale` must be finite and at least 0, received -3"),
        ("ldm", ("--task", "class", "--validation_prompts", "a"), "--validation_prompts go with --task text"),
        ("ldm", ("--eta", "2"), r"--eta must lie in \[0, 1\], got 2"),
        ("ldm", ("--token_init_std", "0"), "--token_init_std must be > 0, got 0"),
        ("ldm", ("--lr_multipliers", "0", "1", "0", "--lr_warmup_steps", "6"), "--lr_multipliers with --lr_warmup_st"),
        ("versatile", ("--guidance_scale", "-3"), "`guidance_scale` must be finite and at least 0, received -3"),
        ("versatile", ("--num_inference_steps", "2000"), "`num_inference_steps` must be at most 1000"),
        ("versatile", ("--num_inference_steps", "1000"), "`num_inference_steps`=1000 makes DDIMScheduler start at"),
        ("autoencoder", ("--validation_samples", "0"), "--validation_samples must be > 0, got 0"),
    ],
)
def test_what_only_validation_reads_is_refused_at_the_start(recipe, words, message):
    with pytest.raises(ValueError, match=message):
        parse(recipe, *words)


@pytest.mark.parametrize("task", TASKS)
def test_sampling_that_does_not_fit_the_network_is_refused_before_the_first_step(task, tmp_path):
    words = [str(PRESETS / "ldm-smoke.yaml"), "--task", task, "--output_dir", str(tmp_path)]
    wrong = [("--num_inference_steps", "2000"), ("--num_inference_steps", "1000")]
    if task in ("semantic", "super_resolution", "inpainting"):  # trained with their condition alone
        wrong = [*wrong[:1], ("--guidance_scale", "2")]
    for more in wrong:
        with pytest.raises(ValueError, match="--guidance_scale, --num_inference_steps or --eta: `"):
            train_ldm.main([*words, *more])
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_result_needs_a_folder(recipe, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir(mode=0o500)
    for place, why in (
        ("file", "file is no folder"),
        ("file/run", "file is no folder"),
        ("closed/run", "closed may not"),
    ):
        if why.startswith("closed") and os.access(tmp_path / "closed", os.W_OK):
            continue  # nothing is closed to root
        with pytest.raises(ValueError, match=f"--output_dir={tmp_path / place}: .*{why}.*Name another folder"):
            importlib.import_module(f"train_{recipe}").main(
                [str(PRESETS / f"{recipe}-smoke.yaml"), "--output_dir", str(tmp_path / place)]
            )


def test_several_trackers_and_all_that_are_installed():
    assert TrainArgs(report_to="tensorboard, tensorboard").trackers == ["tensorboard", "tensorboard"]
    assert TrainArgs(report_to="all").trackers == [str(name) for name in get_available_trackers()]
    assert TrainArgs().trackers == TrainArgs(report_to="None").trackers == []


def test_a_tracker_gets_what_the_log_gets(tmp_path):
    words = [str(PRESETS / "optimus-smoke.yaml"), "--max_train_steps", "2", "--logging_steps", "1"]
    importlib.import_module("train_optimus").main(
        [*words, "--report_to", "tensorboard", "--output_dir", str(tmp_path)]
    )
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events.parent)).Reload()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    logged = [line["loss"] for line in lines if "loss" in line]
    assert [event.value for event in read.Scalars("loss")] == pytest.approx(logged, rel=1e-5) and len(logged) == 2


# ---------------------------------------------------------------------------------------------------------------------
# the batch of a step


@pytest.mark.parametrize("processes, micro_steps", [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_micro_steps_follow_from_the_total(processes, micro_steps):
    args = TrainArgs(total_batch_size=48, train_batch_size=6)
    for _ in range(2):  # once more changes nothing
        args.resolve_batch(processes)
        assert args.gradient_accumulation_steps == micro_steps
    plans = [StepPlan(100, 6, micro_steps, processes, index) for index in range(processes)]
    keys = [key for plan in plans for batch, weight in plan.micro_batches(0) if weight for key in batch]
    assert len(set(keys)) == len(keys) == 48


@pytest.mark.parametrize(
    "options, processes, message",
    [
        (
            {"train_batch_size": 6},
            1,
            "=10 on 1 process is no multiple of --train_batch_size=6: .* are 1, 2, 5, 10",
        ),
        ({"train_batch_size": 2}, 2, "on 2 processes is no multiple of .*=2: batches a process that fit are 1, 5"),
        ({"train_batch_size": 1}, 4, "cannot be divided among 4 processes: start 1, 2, 5, 10 of them, or .* 8 or 12"),
        ({"train_batch_size": 5, "gradient_accumulation_steps": 3}, 1, "makes it 2: leave one of them out"),
    ],
)
def test_totals_that_do_not_divide_name_what_fits(options, processes, message):
    with pytest.raises(ValueError, match=message):
        TrainArgs(total_batch_size=10, **options).resolve_batch(processes)


def test_a_total_trains_as_its_micro_steps_do(tmp_path):
    words = [str(PRESETS / "optimus-smoke.yaml"), "--max_train_steps", "2", "--train_batch_size", "2"]
    for name, more in (("total", ("--total_batch_size", "8")), ("steps", ("--gradient_accumulation_steps", "4"))):
        importlib.import_module("train_optimus").main([*words, *more, "--output_dir", str(tmp_path / name)])
        AcceleratorState._reset_state(reset_partial_state=True)
    one, other = (
        json.loads((tmp_path / name / "log.jsonl").read_text().split("\n")[0]) for name in ("total", "steps")
    )
    assert one["loss"] == other["loss"]


def test_where_a_loop_refuses_micro_steps_the_total_names_the_batch(tmp_path):
    words = [str(PRESETS / "autoencoder-smoke.yaml"), "--output_dir", str(tmp_path), "--total_batch_size", "12"]
    with pytest.raises(
        ValueError, match="--total_batch_size=12 makes 3 micro-steps of 4 .* --train_batch_size 12, mor"
    ):
        train_autoencoder.main(words)


# ---------------------------------------------------------------------------------------------------------------------
# weight decay


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.scale = nn.Linear(3, 3), nn.LayerNorm(3), nn.Parameter(torch.tensor(2.0))


def test_matrices_alone_can_be_decayed():
    network = Mixed()
    before = copy.deepcopy(network.state_dict())
    images = torch.randn(4, 3)
    for rate in (0.1, 0.2):
        steps = {}
        for alone in (False, True):
            network.load_state_dict(before)
            args = TrainArgs(weight_decay_matrices_only=alone, adam_weight_decay=0.5, learning_rate=0.1)
            group = {"params": list(network.parameters()), "lr": rate}
            optimizer, _ = build_optimizer(group["params"] if rate == args.learning_rate else [group], args)
            (network.norm(network.linear(images)) * network.scale).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            steps[alone] = copy.deepcopy(network.state_dict())
        for name, value in before.items():
            decay = rate * 0.5 * value  # what the plain optimizer takes off all weights
            left = steps[True][name] if name == "linear.weight" else steps[True][name] - decay
            torch.testing.assert_close(steps[False][name], left)


def test_checkpoints_with_and_without_fit_each_other(tmp_path, caplog):
    def train(steps: int, *more: str) -> None:
        words = [str(PRESETS / "optimus-smoke.yaml"), "--output_dir", str(tmp_path), "--max_train_steps", str(steps)]
        importlib.import_module("train_optimus").main([*words, *more])
        AcceleratorState._reset_state(reset_partial_state=True)

    older = torch.optim.AdamW(Mixed().parameters())
    for alone in (False, True):
        optimizer, _ = build_optimizer(list(Mixed().parameters()), TrainArgs(weight_decay_matrices_only=alone))
        optimizer.load_state_dict(older.state_dict())  # one group in the network's order
    train(1)
    for steps, alone in ((2, "true"), (3, "false")):
        train(steps, "--resume_from_checkpoint", "latest", "--weight_decay_matrices_only", alone)
    assert "--weight_decay_matrices_only False -> True" in caplog.text and (tmp_path / "checkpoint-3").is_dir()
    assert not TrainArgs().weight_decay_matrices_only


# ---------------------------------------------------------------------------------------------------------------------
# first codes


def test_every_codebook_that_starts_with_means_needs_enough_pictures():
    for model in ("vq", "paella_vq"):
        widths = ["--block_out_channels", "8", "16"] if model == "paella_vq" else []
        args, _, _ = train_autoencoder.parse_args(["--dataset_name", "scenes", "--model", model, *widths])
        with pytest.raises(ValueError, match="512 codes cannot start from the 448 latents of 7 pictures"):
            check_sizes(args, 64, 8, 7)
        args.kmeans_samples = 0
        check_sizes(args, 64, 8, 7)
    args.model, args.kmeans_samples = "kl", 512
    check_sizes(args, 64, 8, 7)


def test_first_and_new_codes_leave_the_running_statistics_alone(tmp_path):
    words = [str(PRESETS / "autoencoder-smoke.yaml"), "--model", "paella_vq", "--block_out_channels", "8", "16"]
    args, _, train = train_autoencoder.parse_args(words)
    images = torch.rand(4, 3, 32, 32)

    def pictures(count):
        yield images, [torch.Generator() for _ in images]

    autoencoder = new_autoencoder(PaellaVQModel, args, 32)
    objective = Quantized(autoencoder, args, train.max_train_steps, pictures=pictures).train()
    accelerator = start(TrainArgs(output_dir=str(tmp_path)))
    before = {name: value.clone() for name, value in objective.named_buffers() if "running" in name}
    first, codes = objective.first_step, [codebook_weight(objective.autoencoder).clone()]
    for step in (first, first + args.restart_steps):
        objective.usage.zero_()
        objective.before_step(images, 4, step, accelerator)
        codes.append(codebook_weight(objective.autoencoder).clone())
    assert before and all(torch.equal(dict(objective.named_buffers())[name], value) for name, value in before.items())
    assert not torch.equal(codes[0], codes[1]) and not torch.equal(codes[1], codes[2])
    objective(images, [], first)  # a step of the training does move them
    assert not all(torch.equal(dict(objective.named_buffers())[name], value) for name, value in before.items())


@pytest.mark.parametrize("recipe", [train_cascaded, train_piti])
def test_help_begins_with_the_options_of_the_recipe(recipe, capsys):
    with pytest.raises(SystemExit):
        recipe.parse_args(["--help"])
    told = capsys.readouterr().out.partition("options:")[2]
    places = [told.index(f"\n  --{name} ") for name in ("stage", "condition", "block_out_channels", "train_data_dir")]
    assert places == sorted(places)
