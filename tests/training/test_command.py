"""What a recipe prints where its user made a mistake, and what it takes a wrong name for."""

import importlib
import runpy
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader, Dataset

from diffusers_ext.data.image_folder import decode_image
from diffusers_ext.training_utils.args import DataArgs, TrainArgs, parse_args
from diffusers_ext.training_utils.command import run_command

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "training").glob("train_*.py"))


@pytest.fixture(autouse=True)
def plain_launch(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for variable in ("ACCELERATE_MIXED_PRECISION", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_every_recipe_says_what_is_wrong_without_a_traceback(script, monkeypatch, capsys):
    wrong = [f"{script.stem.removeprefix('train_')}-smok"]
    monkeypatch.setattr(sys, "argv", [str(script), *wrong])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and ended.value.__suppress_context__
    assert printed.startswith(f"{script.stem}: The preset {wrong[0]!r} is not a .yaml file") and "Did you" in printed
    with pytest.raises(ValueError, match="Did you mean"):  # what a caller from Python gets
        importlib.import_module(script.stem).main(wrong)


def fails(error: Exception):
    def main() -> None:
        raise error

    return main


def test_messages_are_told_from_bugs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-c"])  # as in pytest-xdist's processes

    def of_the_house() -> None:
        DataArgs()

    for main, message in (
        (of_the_house, "Exactly one of --dataset_name"),
        (fails(OSError(28, "No space left on device")), "No space left on device"),
        (fails(FloatingPointError("The gradient of step 3 is not finite.")), "The gradient of step 3"),
    ):
        with pytest.raises(SystemExit) as ended:
            run_command(main)
        assert ended.value.code == 2 and message in capsys.readouterr().err
    for bug in (ValueError("from elsewhere"), TypeError("from elsewhere"), KeyError("x"), RuntimeError("of torch")):
        with pytest.raises(type(bug)) as raised:
            run_command(fails(bug))
        assert raised.value is bug
    assert capsys.readouterr().err == ""


class Broken(Dataset):
    def __init__(self, path: Path):
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        return decode_image(str(self.path))


def test_an_error_of_a_loader_process_is_a_message_too(capsys, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        run_command(lambda: list(DataLoader(Broken(path), num_workers=1)))
    printed = capsys.readouterr().err
    assert "broken.png" in printed and "Traceback" not in printed and "worker" not in printed


@pytest.mark.parametrize("processes, way_out", [(1, True), (2, False)])
def test_a_launched_recipe_says_what_the_launcher_adds(processes, way_out, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit):
            run_command(fails(OSError("no such file")))
        lines = capsys.readouterr().err.splitlines()
        assert ("(process 1): no such file" in lines[0]) == (rank == 1)
        assert len(lines) == 2 - (rank == 1)
        assert rank or ("The launcher adds" in lines[1] and ("--quiet" in lines[1]) == way_out)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--learing-rate=3"], "There is no option --learing-rate. Did you mean --learning_rate"),
        (["--qqq", "3"], "There is no option --qqq. --help lists all"),
        (["--seed", "1", "2"], "2 belongs to no option. A preset comes first"),
    ],
)
def test_unknown_options_name_those_that_are_near(words, message):
    with pytest.raises(ValueError, match=message):
        parse_args((DataArgs, TrainArgs), ["--dataset_name", "scenes", *words])
