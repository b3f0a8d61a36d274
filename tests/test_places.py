"""A name that does not exist leads to those that are near, wherever users write one."""

from pathlib import Path

import pytest

import diffusers_ext
from diffusers_ext.cli import main as cli
from diffusers_ext.conversion.keys import load_original
from diffusers_ext.data.image_folder import load_image_dataset
from diffusers_ext.pipelines.base import house_pipelines
from diffusers_ext.places import did_you_mean, is_local, is_path, split_place
from diffusers_ext.training_utils.args import DataArgs, TrainArgs, check_places
from diffusers_ext.training_utils.saved_folders import read_saved


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("runs/my-kl/vae", "runs/my-vq", "my_images", "Pictures", "stabilityai/sd-vae"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "weights.ckpt").touch()


def test_a_folder_in_a_repository_is_told_from_a_path():
    assert split_place("user/repo/sub/folder") == ("user/repo", "sub/folder")
    for name in (
        "user/repo",
        "runs/my-kl/vae",
        "runs/none/here",
        "./user/repo/sub",
        "/user/repo/sub",
        "stabilityai/x/y",
    ):
        assert split_place(name) == (name, None)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("runs/my-lk", " Did you mean 'runs/my-kl'"),
        ("runs/my-lk/vae", " Did you mean 'runs/my-kl/vae'"),  # what lies below is kept where it is there
        ("runs/my-kl/vea", " Did you mean 'runs/my-kl/vae'?"),
        ("run/my-kl", " Did you mean 'runs/my-kl'?"),
        ("my_image", " Did you mean 'my_images'?"),
        ("pictures", " Did you mean 'Pictures'?"),  # letter case
        ("weights.ckp", " Did you mean 'weights.ckpt'?"),
        ("quite/another/thing", ""),
        ("", ""),
    ],
)
def test_near_names(name, hint):
    found = did_you_mean(name)
    assert found.startswith(hint) and bool(found) == bool(hint)


def test_an_absolute_path(tmp_path):
    assert did_you_mean(tmp_path / "my_imags") == f" Did you mean {str(tmp_path / 'my_images')!r}?"


def test_paths_are_told_from_names_of_repositories():
    assert all(map(is_path, ("runs/x", "checkpoints/x", "./x", "../x", "/x", "a/b/c")))
    assert not any(map(is_path, ("x", "stabilityai/other")))
    assert is_local("stabilityai/other") and not is_local("someone/other")


def test_everything_that_takes_a_name_says_what_is_near(caplog):
    near = "Did you mean 'runs/my-kl'"
    for pipeline in (one for one in house_pipelines() if one.__name__ in diffusers_ext.__all__):
        with pytest.raises(OSError, match=near):
            pipeline.from_pretrained("runs/my-lk")
    for take in (read_saved, lambda name: load_image_dataset(train_data_dir=name)):
        with pytest.raises(ValueError, match=near):
            take("runs/my-lk")
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'weights\.ckpt'\?"):
        load_original(Path("weight.ckpt"))


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "runs/my-lk"],
        ["info", "runs/my-lk"],
        ["info", "run/my-kl/x"],
        ["export-hub", "runs/my-lk"],
        ["prepare", "sketch", "runs/my-lk", "new"],
        ["search-truncation", "runs/my-lk"],
    ],
)
def test_every_command_says_what_is_near(words, capsys):
    assert cli(words) == 2
    printed = capsys.readouterr().err
    assert "Did you mean 'runs/my-kl'" in printed and printed.count("\n") == 1


def test_a_recipes_options_are_looked_at_before_anything_is_loaded(caplog):
    train = TrainArgs()
    train.origin.sections = (train, DataArgs(train_data_dir="my_image"))
    with pytest.raises(ValueError, match="--train_data_dir is my_image, a folder that is not here. Did you mean 'my_"):
        check_places(train)

    from diffusers_ext.training.ldm.args import LDMArgs

    train.origin.sections = (train, LDMArgs(task="unconditional", pretrained_vqvae_name_or_path="runs/my-lk"))
    with pytest.raises(ValueError, match="--pretrained_vqvae_name_or_path is runs/my-lk, .* Did you mean 'runs"):
        check_places(train)
    train.origin.sections = (train, LDMArgs(task="unconditional", pretrained_vqvae_name_or_path="stabilityai/sd-va"))
    check_places(train)  # may well be on the Hub
    assert "so it is looked up on the Hub. Did you mean 'stabilityai/sd-vae'?" in caplog.text
