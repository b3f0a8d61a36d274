"""Every smoke preset and every task of latent diffusion in bf16, and on two processes (one launch for all).

Also what two processes are held to: the same losses and weights as one with the double batch, and one cache.
"""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from filelock import FileLock
from pipelines.tiny_glide import WIDTH, tiny_glide, tiny_piti
from safetensors.torch import load_file

from diffusers_ext.data.scenes import write_scenes
from diffusers_ext.training.ldm.tasks.table import TASKS

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "training" / "presets"
WEIGHTS = "diffusion_pytorch_model.safetensors"

# a phase of the first stages a step: k-means and PatchGAN at once, then unused codes
PHASES = ("--plain_fraction", "0", "--restart_steps", "1", "--disc_start", "0", "--validation_samples", "2")
SHORT = {
    "cascaded": ("--num_inference_steps", "1", "--num_validation_images", "2"),
    "autoencoder": (*PHASES, "--kmeans_samples", "4", "--scale_samples", "4"),
    "ldm": ("--num_inference_steps", "1", "--num_validation_images", "2"),
    "paella": ("--num_inference_steps", "1", "--max_train_samples", "24"),
    "piti": ("--num_inference_steps", "1", "--num_validation_images", "2"),
    "versatile": ("--num_inference_steps", "1", "--validation_samples", "2"),
}
JOBS = {path.stem: (path.stem.split("-")[0], [str(path)]) for path in sorted(PRESETS.glob("*-smoke.yaml"))}
JOBS |= {f"ldm-{task}": ("ldm", [str(PRESETS / "ldm-smoke.yaml"), "--task", task]) for task in TASKS if task != "text"}
JOBS["autoencoder-paella"] = (
    "autoencoder",
    [str(PRESETS / "autoencoder-smoke.yaml"), "--model", "paella_vq", "--block_out_channels", "8", "16"]
    + ["--bottleneck_blocks", "1"],
)
JOBS["cascaded-blur"] = (
    "cascaded",
    [str(PRESETS / "cascaded-upscale-smoke.yaml"), "--augmentation", "blur", "--condition", "unconditional"]
    + ["--loss_type", "mse"],
)
JOBS["piti-geometry"] = ("piti", [str(PRESETS / "piti-joint-smoke.yaml"), "--condition", "geometry", "--rank", "2"])
JOBS = {name: (recipe, [*words, *SHORT.get(recipe, ())]) for name, (recipe, words) in JOBS.items()}


def base_words(name: str, folder: Path) -> list[str]:
    """What another preset trains before: the base stage of an upsampler, the network beside which LoRA trains."""
    base, place = folder / f"base-of-{name}", "--pretrained_model_name_or_path"
    if "--rank" in JOBS[name][1]:  # matrices beside a network that is there
        tiny_piti("geometry", upscale=False).save_pretrained(base)
        return [place, str(base)]
    if not name.endswith("upsampler-smoke"):
        return []
    if "prior" in name:
        tiny_glide(upscale=False).save_pretrained(base)
        return [place, str(base), "--cross_attention_dim", str(WIDTH)]
    tiny_piti("sketch", upscale=False).save_pretrained(base)  # it knows no labels of `scenes`
    return [place, str(base), "--cross_attention_dim", str(WIDTH), "--condition", "sketch"]


def words_of(name: str, folder: Path, *more: str, steps: int = 2) -> list[str]:
    words = [*JOBS[name][1], *base_words(name, folder)]
    steps_words = ["--max_train_steps", str(steps), "--logging_steps", "1", "--checkpointing_steps", str(steps)]
    return [*words, *steps_words, "--output_dir", str(folder / name), *more]


def run(name: str, folder: Path, *more: str, steps: int = 2) -> Path:
    importlib.import_module(f"train_{JOBS[name][0]}").main(words_of(name, folder, *more, steps=steps))
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder / name


def log(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "samples_per_second"} for line in lines]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in log(folder) if "loss" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the result, without its checkpoints."""
    files = [path for path in sorted(folder.rglob("*.safetensors")) if "checkpoint-" not in str(path)]
    return {f"{path.name}:{key}": value for path in files for key, value in load_file(path).items()}


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(ROOT)  # the smoke presets name bundled checkpoints
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", JOBS)
def test_it_runs_in_bf16_with_weights_in_float32(name, tmp_path):
    folder = run(name, tmp_path, "--mixed_precision", "bf16")
    found = losses(folder)
    assert len(found) == 2 and all(map(math.isfinite, found))
    assert any(abs(float(torch.tensor(loss).bfloat16()) - loss) > 1e-5 * loss for loss in found)  # a float32 mean
    for key, value in weights(folder).items():
        assert value.dtype in (torch.float32, torch.int64) and bool(torch.isfinite(value).all()), key
    trained = load_file(next(folder.glob("checkpoint-2/*.safetensors")))
    assert {value.dtype for value in trained.values() if value.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("name", [name for name in JOBS if name.endswith("-smoke") and name != "optimus-smoke"])
def test_a_broken_picture_is_left_out(name, pictures, tmp_path):
    """In a folder of one's own, wherever it lies; the run goes on and lists it."""
    words = ["--train_data_dir", str(pictures), "--on_broken_picture", "skip", "--train_batch_size", "12"]
    needed = {"versatile-smoke": ("--paraphrase_column", "full_text")}.get(name, ())
    folder = run(name, tmp_path, *words, *needed)
    (line,) = (folder / "broken_pictures.jsonl").read_text().splitlines()
    assert "000005.png: image file is truncated" in json.loads(line)["error"]
    assert len(losses(folder)) == 2 and list(folder.glob("*.json"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """`scenes` as a user's folder, one of whose pictures is damaged."""
    kinds = ("semantic", "sketch")
    folder = write_scenes(tmp_path_factory.mktemp("data") / "scenes", 26, resolution=64, extra_pictures=kinds)
    data = (folder / "000005.png").read_bytes()
    (folder / "000005.png").write_bytes(data[: len(data) // 2])
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# two processes

# What neither looks at a whole micro-batch nor drops out: two processes are one with the double batch, also where the
# second one has nothing left of the last batch.
EQUAL = {
    "autoencoder-gumbel-smoke": ("--disc_start", "none"),
    "autoencoder-kl-smoke": ("--disc_start", "none", "--learn_logvar", "true"),  # which no forward of DDP's uses
    "autoencoder-smoke": ("--disc_start", "none"),
    "optimus-smoke": ("--dropout", "0"),
    "paella-smoke": (),
    "versatile-smoke": (),
    **{name: () for name in JOBS if name.startswith(("cascaded-", "ldm-", "piti-"))},
}
# Adam with its own epsilon makes whole steps of what is only rounding in the smallest gradients.
CUT = ("--max_train_samples", "10", "--adam_epsilon", "1e-3")


def batch(name: str, size: int) -> tuple[str, ...]:
    return ("--train_batch_size", str(size), *(CUT if name in EQUAL else ()), *EQUAL.get(name, ()))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """The real launcher, two CPU processes over gloo; once for all workers of pytest-xdist."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / "two_processes"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            folder.mkdir()
            launch(folder)
    assert (folder / "finished").is_file(), (folder / "stderr.txt").read_text()[-3000:]
    return folder


def launch(folder: Path) -> None:
    jobs = [[name, JOBS[name][0], words_of(name, folder, *batch(name, 2), steps=3)] for name in JOBS]
    (folder / "jobs.json").write_text(json.dumps([["codes", None, []], ["numbers", None, []], *jobs]))
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        str(Path(__file__).with_name("two_processes.py")), str(folder / "jobs.json"),
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "training"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env, cwd=ROOT)
    (folder / "stderr.txt").write_text(result.stderr)
    if result.returncode == 0:
        (folder / "finished").touch()


@pytest.mark.parametrize("name", JOBS)
def test_it_runs_on_two_processes(name, two_processes):
    said = [json.loads((two_processes / f"{name}.{rank}.json").read_text()) for rank in range(2)]
    assert [one["processes"] for one in said] == [2, 2]
    folder = two_processes / name
    assert len(losses(folder)) == 3 and all(map(math.isfinite, losses(folder)))
    assert all(bool(torch.isfinite(value).all()) for value in weights(folder).values())


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_train_like_one_with_the_double_batch(name, two_processes, tmp_path):
    one, two = run(name, tmp_path, *batch(name, 4), steps=3), two_processes / name
    for first_line, second_line in zip(log(one), log(two), strict=True):
        assert first_line.keys() == second_line.keys() and second_line == pytest.approx(first_line, rel=1e-3, abs=1e-4)
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(
            second[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_two_processes_share_the_work_of_a_cache(two_processes):
    seen = [json.loads((two_processes / f"numbers.{rank}.json").read_text())["seen"] for rank in range(2)]
    assert seen == [[0, 1, 2, 3, 8, 9], [4, 5, 6, 7]]


def test_all_processes_start_from_the_same_codes(two_processes):
    first, second = (json.loads((two_processes / f"codes.{rank}.json").read_text())["codes"] for rank in range(2))
    assert first == second and len(set(first)) == 16
