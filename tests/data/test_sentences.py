"""Sentences from every source: the built-in captions, a user's captions, text files, a data set without pictures."""

import datasets
import pytest

from diffusers_ext.data.scenes import load_scenes, write_scenes
from diffusers_ext.data.sentences import load_sentences
from diffusers_ext.training_utils.args import DataArgs


def test_built_in_captions_need_no_picture():
    train, validation = load_sentences(DataArgs(dataset_name="scenes", max_train_samples=12))
    assert train.column_names == validation.column_names == ["text"] and len(validation) == 256
    assert [row["text"] for row in train] == [row["text"] for row in load_scenes(12, columns=("text",))]
    full, _ = load_sentences(DataArgs(dataset_name="scenes", max_train_samples=2, caption_column="full_text"))
    assert full[0] == {"full_text": load_scenes(1, columns=("full_text",))[0]["full_text"]}


def test_captions_of_a_folder_of_pictures(tmp_path):
    write_scenes(tmp_path, 20, resolution=16)
    train, validation = load_sentences(DataArgs(train_data_dir=str(tmp_path)))
    assert (len(train), len(validation)) == (18, 2) and train.column_names == ["text"]
    shown = {row["text"] for rows in (train, validation) for row in rows}
    assert shown == {row["text"] for row in load_scenes(20, columns=("text",))}


def test_text_files_hold_a_sentence_a_line(tmp_path):
    (tmp_path / "b.txt").write_text("third\n\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first \n\n  second\n", encoding="utf-8")
    for source, expected in ((tmp_path, ["first", "second", "third"]), (tmp_path / "b.txt", ["third"])):
        train, validation = load_sentences(DataArgs(train_data_dir=str(source)))
        assert [row["text"] for row in train] == expected == [row["text"] for row in validation]
    few, _ = load_sentences(DataArgs(train_data_dir=str(tmp_path), max_train_samples=2))
    assert [row["text"] for row in few] == ["first", "third"]  # drawn from all, by a fixed permutation
    (tmp_path / "c.txt").write_text("\n".join(f"number {i}" for i in range(40)), encoding="utf-8")
    train, validation = load_sentences(DataArgs(train_data_dir=str(tmp_path / "c.txt"), caption_column="line"))
    lines = [[row["line"] for row in rows] for rows in (train, validation)]
    assert [len(part) for part in lines] == [36, 4] and not set(lines[0]) & set(lines[1])


def test_a_data_set_without_pictures(tmp_path):
    datasets.Dataset.from_dict({"premise": [f"a man {i}" for i in range(20)], "label": [0] * 20}).to_parquet(
        tmp_path / "data.parquet"
    )
    source = DataArgs(dataset_name=str(tmp_path), caption_column="premise")
    train, validation = load_sentences(source)
    assert (len(train), len(validation)) == (18, 2) and train[0]["premise"].startswith("a man")
    source.caption_column = "text"
    with pytest.raises(ValueError, match="There is no column 'text' in the data set .*premise, label"):
        load_sentences(source)


def test_files_that_are_no_sentences(tmp_path):
    (tmp_path / "words.json").write_text("{}")
    with pytest.raises(ValueError, match="is the file .*words.json': a file of sentences must end in .txt"):
        load_sentences(DataArgs(train_data_dir=str(tmp_path / "words.json")))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="There are no sentences in .*empty.txt'"):
        load_sentences(DataArgs(train_data_dir=str(tmp_path / "empty.txt")))
    with pytest.raises(ValueError, match="must be a folder, but .*nowhere"):
        load_sentences(DataArgs(train_data_dir=str(tmp_path / "nowhere")))
    (tmp_path / "empty.txt").unlink()
    (tmp_path / "words.json").unlink()
    with pytest.raises(ValueError, match="There are no pictures in"):
        load_sentences(DataArgs(train_data_dir=str(tmp_path)))
