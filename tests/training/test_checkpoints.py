"""Checkpoints are complete or invisible, and damage is found before training starts."""

import pytest
import torch
from torch import nn

from diffusers_ext.training_utils import checkpoints


def write_two_files(folder):
    (folder / "weights.bin").write_bytes(bytes(range(256)))
    (folder / "sub").mkdir()
    (folder / "sub" / "note.txt").write_text("x")


def publish(folder, step=1):
    checkpoints.publish(folder, write_two_files, {"step": step})


def test_manifest_names_every_file(tmp_path):
    publish(tmp_path / "checkpoint-1")
    manifest = checkpoints.verify(tmp_path / "checkpoint-1")
    assert manifest["step"] == 1 and set(manifest["files"]) == {"weights.bin", "sub/note.txt"}
    assert manifest["files"]["weights.bin"]["size"] == 256


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "weights.bin").unlink(), "weights.bin is missing"),
        (lambda f: (f / "weights.bin").write_bytes(b"short"), "weights.bin has 5 bytes instead of 256"),
        (lambda f: (f / "weights.bin").write_bytes(bytes(256)), "weights.bin is damaged"),
        (lambda f: (f / "manifest.json").unlink(), "never completed"),
        (lambda f: (f / "manifest.json").write_text("{"), "never completed"),
    ],
)
def test_damage_is_found_and_latest_falls_back(tmp_path, damage, message, caplog):
    publish(tmp_path / "checkpoint-1")
    publish(tmp_path / "checkpoint-10", step=10)
    damage(tmp_path / "checkpoint-10")
    with pytest.raises(checkpoints.CheckpointError, match=message):
        checkpoints.find_checkpoint(tmp_path, str(tmp_path / "checkpoint-10"))
    folder, manifest = checkpoints.find_checkpoint(tmp_path, "latest")
    assert folder.name == "checkpoint-1" and manifest["step"] == 1
    assert "Skipped checkpoint checkpoint-10" in caplog.text and message in caplog.text


def test_a_failed_write_publishes_nothing_and_keeps_the_old_one(tmp_path):
    publish(tmp_path / "checkpoint-1")

    def fail(folder):
        (folder / "half.bin").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoints.publish(tmp_path / "checkpoint-1", fail, {"step": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    checkpoints.verify(tmp_path / "checkpoint-1")


def test_overwriting_replaces_the_whole_folder(tmp_path):
    publish(tmp_path / "checkpoint-1")
    checkpoints.publish(tmp_path / "checkpoint-1", lambda f: (f / "new.txt").write_text("y"), {"step": 1})
    assert set(checkpoints.verify(tmp_path / "checkpoint-1")["files"]) == {"new.txt"}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_rotation_keeps_the_newest_and_clears_leftovers(tmp_path):
    for step in (2, 10, 9):
        publish(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-11.tmp-abc").mkdir()
    checkpoints.rotate(tmp_path, 2)
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert not list(tmp_path.glob("*.tmp-*"))


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    publish(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1").rename(tmp_path / f"checkpoint-1.tmp-{checkpoints.OUTDATED}")
    checkpoints.rotate(tmp_path, None)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    checkpoints.verify(tmp_path / "checkpoint-1")


def test_rotation_never_counts_an_incomplete_folder(tmp_path):
    publish(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-9").mkdir()
    checkpoints.rotate(tmp_path, 1)
    checkpoints.verify(tmp_path / "checkpoint-1")


def test_state_round_trip_is_exact_and_strict(tmp_path):
    def parts():
        model = nn.Linear(3, 2)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}

    first, second = parts(), parts()
    first["model"](torch.ones(1, 3)).sum().backward()
    first["optimizer"].step()
    checkpoints.save_state(tmp_path, first)
    checkpoints.load_state(tmp_path, second)
    assert torch.equal(first["model"].weight, second["model"].weight)
    moments = [part["optimizer"].state_dict()["state"][0]["exp_avg"] for part in (first, second)]
    assert torch.equal(*moments)
    (tmp_path / "optimizer.pt").unlink()
    with pytest.raises(checkpoints.CheckpointError, match="optimizer.pt is missing"):
        checkpoints.load_state(tmp_path, parts())


def test_nothing_to_resume_from(tmp_path):
    assert checkpoints.find_checkpoint(tmp_path, None) is None
    assert checkpoints.find_checkpoint(tmp_path, "latest") is None
    with pytest.raises(checkpoints.CheckpointError, match="there is no such folder"):
        checkpoints.find_checkpoint(tmp_path, str(tmp_path / "checkpoint-7"))
