"""The wheel alone, away from the repository: its recipes run by module and by name of a preset."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = [f"train_{path.parent.name}" for path in sorted((ROOT / "training").glob("*/args.py"))]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the repository."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("src", "training"):
        files = [path for path in (ROOT / name).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        for path in files:
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-index", "--target", str(folder), str(wheel))
    return folder


def pip(command: str, *words: str) -> None:
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps")
    ran = subprocess.run([sys.executable, "-m", "pip", command, *quiet, *words], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def python(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess:
    """A fresh process in a folder of its own that finds the installed wheel before the repository."""
    env = {**os.environ, "PYTHONPATH": str(installed), "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [sys.executable, "-P", *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def test_it_holds_every_recipe_and_preset(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("diffusers_ext/training/")}
    files = [path for path in (ROOT / "training").rglob("*") if path.suffix in (".py", ".yaml", ".md")]
    assert held == {f"diffusers_ext/{path.relative_to(ROOT).as_posix()}" for path in files}


def test_a_preset_runs_by_name_with_the_launcher(installed, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision"]
    launch += ["no", "--dynamo_backend", "no", "-m", "diffusers_ext.training.train_autoencoder", "autoencoder-smoke"]
    ran = python(installed, tmp_path, *launch, "--output_dir", "result", "--max_train_steps", "1")
    assert ran.returncode == 0, ran.stderr
    assert "The result lies in result." in ran.stderr
    assert {"config.json", "README.md", "log.jsonl", "checkpoint-1"} <= {
        p.name for p in (tmp_path / "result").iterdir()
    }


def test_recipes_are_functions_in_python(installed, tmp_path):
    """Every recipe can be imported, and what needs a clone says so before anything is made."""
    lines = [
        "import diffusers_ext, diffusers_ext.training as t; print(diffusers_ext.__file__, t.__file__, flush=True)",
        f"from diffusers_ext.training import {', '.join(RECIPES)}",
        "train_optimus.main(['optimus-smoke', '--output_dir', 'optimus', '--max_train_steps', '1', '--beta', '0'])",
        "train_paella.main(['paella-smoke', '--output_dir', 'paella'])",
    ]
    ran = python(installed, tmp_path, "-c", "\n".join(lines))
    assert ran.returncode == 1, ran.stderr
    places = ran.stdout.splitlines()[0].split()
    assert len(places) == 2 and all(Path(place).is_relative_to(installed) for place in places)
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: --pretrained_vqvae_name_or_path is checkpoints/paella-scenes-64/vqvae")
    assert "the bundled checkpoints lie in a clone of the repository" in last
    assert (tmp_path / "optimus" / "config.json").is_file() and not (tmp_path / "paella").exists()
