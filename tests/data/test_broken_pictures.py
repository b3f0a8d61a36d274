"""Pictures that cannot be read: named, or replaced by other rows, always the same, and listed."""

import io
import json
import logging
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_ext.data.broken_pictures import UnreadablePictureError
from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.training_utils.args import DataArgs

COLUMNS = ("text", "label", "semantic")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Picture i, its map and its caption say i."""
    (tmp_path / "data").mkdir()
    lines = []
    for i in range(40):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "data" / f"{i}.png")
        Image.new("L", (8, 8), i).save(tmp_path / "data" / f"map{i}.png")
        lines.append({"file_name": f"{i}.png", "semantic_file_name": f"map{i}.png", "text": f"number {i}", "label": i})
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "data"


def load(folder: Path, *, skip: bool = True, columns=COLUMNS):
    args = DataArgs(train_data_dir=str(folder), on_broken_picture="skip" if skip else "stop")
    args.broken_pictures = folder.parent / "broken.jsonl" if skip else None
    return load_pictures(args, columns=columns)


def listed(folder: Path) -> list[str]:
    return [json.loads(line)["error"] for line in (folder.parent / "broken.jsonl").read_text().splitlines()]


def number(row) -> int:
    values = {int(np.asarray(row["image"])[0, 0, 0]), int(np.asarray(row["semantic"])[0, 0]), row["label"]}
    assert len(values | {int(row["text"].split()[1])}) == 1  # nothing is mixed
    return values.pop()


def test_another_whole_row_stands_in(folder, caplog):
    before = [[number(row) for row in rows] for rows in load(folder)]
    broken = [before[0][3], before[0][17], before[1][0]]  # two of the training, one of the validation
    data = (folder / f"{broken[0]}.png").read_bytes()
    (folder / f"{broken[0]}.png").write_bytes(data[: len(data) // 2])
    (folder / f"map{broken[1]}.png").write_bytes(b"")
    (folder / f"{broken[2]}.png").write_text("<html></html>")
    with caplog.at_level(logging.WARNING):
        train, validation = load(folder)
        after = [[number(row) for row in rows] for rows in (train, validation)]
    changed = [[i for i, value in enumerate(old) if new[i] != value] for old, new in zip(before, after, strict=True)]
    assert changed == [[3, 17], [0]]  # every other sample stays as it is
    assert {after[0][3], after[0][17]} <= set(before[0]) - set(broken)
    assert after[1][0] in set(before[1]) - set(broken)  # each set stands in for itself
    assert len(caplog.messages) == 3 and "the 3 so far are in" in caplog.messages[-1]
    assert sorted(name for name in (f"{i}.png" for i in broken) if any(name in line for line in listed(folder)))
    again, _ = load(folder)
    copied = pickle.loads(pickle.dumps(again))  # as loader processes get it
    assert [number(row) for row in copied] == after[0] and len(listed(folder)) == 3  # the same, and listed once
    assert again.select_columns(["semantic"])[17]["semantic"].getpixel((0, 0)) in set(before[0]) - {broken[1]}
    assert again[[3, 4]]["label"] == after[0][3:5]


def test_many_broken_pictures_are_no_accident(folder):
    train, _ = load(folder)
    for row in range(4):
        (folder / f"{number(train[row])}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"4 pictures cannot be read, more than 3 of 36.*broken.jsonl lists them"):
        list(load(folder)[0])


def test_tars_are_read_by_their_suffixes(tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    for shard in range(2):
        with tarfile.open(tars / f"{shard}.tar", "w") as tar:
            for i in range(8):
                picture = io.BytesIO()
                Image.new("RGB", (8, 8), (i, 0, 0)).save(picture, "PNG")
                data = picture.getvalue()[: 40 if (shard, i) == (0, 2) else None]  # one member is broken
                for suffix, content in (("png", data), ("txt", f"number {i}".encode())):
                    member = tarfile.TarInfo(f"{shard}{i}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match="Tars of WebDataset are read by --dataset_name .*tars with --image_column"):
        load_pictures(DataArgs(train_data_dir=str(tars)))
    args = DataArgs(dataset_name=str(tars), image_column="png", caption_column="txt", on_broken_picture="skip")
    args.broken_pictures = tmp_path / "broken.jsonl"
    rows = [row for part in load_pictures(args, columns=("txt",)) for row in part]
    assert len(rows) == 16 and all(row["txt"] == f"number {row['png'].getpixel((0, 0))[0]}" for row in rows)
    assert "picture 02.png" in args.broken_pictures.read_text()


def test_a_run_that_stops_says_how_not_to(folder):
    train, _ = load(folder, skip=False)
    (folder / f"{number(train[5])}.png").write_bytes(b"")
    assert train[4]
    with pytest.raises(
        UnreadablePictureError, match=r"Repair or remove it. To train without .* --on_broken_picture skip."
    ):
        train[5]
