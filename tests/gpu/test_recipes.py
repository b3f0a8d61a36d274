"""Two training steps of every recipe on a GPU, in bf16 and in fp16 with its scaler, and a third one resumed.

The jobs are those of `tests/training/test_every_recipe.py`: every smoke preset, every task of latent diffusion.
"""

import importlib
import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
EVERY_RECIPE = runpy.run_path(str(ROOT / "tests" / "training" / "test_every_recipe.py"))
JOBS = EVERY_RECIPE["JOBS"]


def run(name: str, folder: Path, *more: str, steps: int) -> list[float]:
    """The losses of the log so far."""
    recipe, words = JOBS[name]
    words = [*words, *EVERY_RECIPE["base_words"](name, folder / "base")]
    plan = ["--max_train_steps", str(steps), "--logging_steps", "1", "--checkpointing_steps", "1"]
    importlib.import_module(f"train_{recipe}").main([*words, *plan, "--output_dir", str(folder), *more])
    AcceleratorState._reset_state(reset_partial_state=True)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(autouse=True)
def place(monkeypatch, device):
    pytest.importorskip("datasets")
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(device.type == "cpu").lower())
    monkeypatch.chdir(ROOT)  # the smoke presets name bundled checkpoints
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", JOBS)
def test_two_steps_in_bf16(name, tmp_path):
    losses = run(name, tmp_path, "--mixed_precision", "bf16", steps=2)
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    weights = load_file(next((tmp_path / "checkpoint-2").glob("*.safetensors")))
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("name", JOBS)
def test_two_steps_in_fp16_and_a_resumed_one(name, tmp_path, device):
    if device.type == "cpu":
        pytest.skip("accelerate trains in fp16 on a GPU only")
    words = ("--mixed_precision", "fp16")
    losses = run(name, tmp_path, *words, steps=2)
    scaler = torch.load(tmp_path / "checkpoint-2" / "scaler.pt", weights_only=True)
    assert scaler["scale"] > 0 and len(losses) == 2 and all(map(math.isfinite, losses))
    losses = run(name, tmp_path, *words, "--resume_from_checkpoint", "latest", steps=3)
    assert len(losses) == 3 and math.isfinite(losses[2])
