"""Captions: in which forms they are read, what is refused, and what the cleaning takes away and leaves."""

import json
import os

import datasets
import pytest
from PIL import Image

from diffusers_ext.data.captions import clean_caption
from diffusers_ext.data.image_folder import load_image_dataset
from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.data.sentences import load_sentences
from diffusers_ext.training_utils.args import DataArgs


def save(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (shade, 0, 0)).save(path)
    return path


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def texts(folder, **options):
    """{file name: caption}, as a recipe that needs captions reads them."""
    rows = load_image_dataset(folder, columns=("text",), **options).with_format(None)
    return {os.path.relpath(row["image"], folder): row["text"] for row in rows}


def refused(message, folder, columns=("text",), **options):
    with pytest.raises(ValueError, match=message):
        load_image_dataset(folder, columns=columns, **options)


# ------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("suffix", [".txt", ".caption", ".TXT", ".Caption"])
def test_text_files_beside_the_pictures(tmp_path, suffix):
    save(tmp_path / "photo of dog 1.png"), save(tmp_path / "B.JPG"), save(tmp_path / "deep" / "er" / "c.png")
    write(tmp_path / f"photo of dog 1{suffix}", "a corgi on a beach\r\n")
    write(tmp_path / f"b{suffix}", "\ufeffa fox, asleep\n\n")
    write(tmp_path / "deep" / "er" / f"c{suffix}", "an owl\u2028at night", "utf-16")
    expected = {"photo of dog 1.png": "a corgi on a beach", "B.JPG": "a fox, asleep"}
    assert texts(tmp_path) == {**expected, "deep/er/c.png": "an owl\u2028at night"}
    assert (
        texts(tmp_path, captions_from_names=True)["B.JPG"] == "a fox, asleep"
    )  # names only where there are no others


def test_each_line_of_a_text_file_is_a_caption(tmp_path):
    save(tmp_path / "a.png"), save(tmp_path / "b.png")
    write(tmp_path / "a.txt", "a cat\na cat indoors\n"), write(tmp_path / "b.txt", "a dog")
    assert texts(tmp_path) == {"a.png": ["a cat", "a cat indoors"], "b.png": ["a dog"]}


def test_kohya_folders_with_their_repeats(tmp_path, caplog):
    for folder, repeats in (("3_corgi dog", 3), ("1_cat", 1)):
        for number in range(10):
            save(tmp_path / folder / f"{number}.png", 20 * repeats + number)
            write(tmp_path / folder / f"{number}.txt", f"{folder[2:]}, number {number}")
    with caplog.at_level("INFO"):
        rows = load_image_dataset(tmp_path, columns=("text", "label"))
    assert "cat 1 times, corgi dog 3 times" in caplog.text
    assert len(rows) == 40 and rows.features["label"].names == ["cat", "corgi dog"]
    captions = list(rows["text"])
    assert captions.count("corgi dog, number 7") == 3 and captions.count("cat, number 7") == 1
    train, held_out = load_pictures(DataArgs(train_data_dir=str(tmp_path)), columns=("text",))
    assert not set(train["text"]) & set(held_out["text"])  # a repeated picture is held out with all its copies
    assert len(set(held_out["text"])) == len(held_out) == 2
    plain = load_image_dataset(tmp_path, columns=("label",), captions_from_names=False)
    assert len(plain) == 40
    for path in tmp_path.rglob("*.txt"):
        path.unlink()
    assert load_image_dataset(tmp_path, columns=("label",)).features["label"].names == ["1_cat", "3_corgi dog"]
    named = load_image_dataset(tmp_path, columns=("text",), captions_from_names=True)
    assert list(named["text"]).count("corgi dog") == 30


@pytest.mark.parametrize("place", [".", "images"])
@pytest.mark.parametrize(
    "name", ["metadata.jsonl", "Metadata.JSONL", "metadata.json", "metadata.csv", "metadata.tsv", "metadata.parquet"]
)
def test_metadata_of_every_form_in_any_folder(tmp_path, place, name):
    entries = [{"file_name": f"p{i}.png", "text": f'a "quoted", caption {i}', "label": i} for i in range(3)]
    folder = tmp_path / place
    for i in range(3):
        save(folder / f"p{i}.png")
    if name.endswith("parquet"):
        datasets.Dataset.from_list(entries).to_parquet(str(folder / name))
    elif name.endswith(("csv", "tsv")):
        mark = "," if name.endswith("csv") else "\t"
        fields = [[e["file_name"], '"' + e["text"].replace('"', '""') + '"', str(e["label"])] for e in entries]
        lines = [mark.join(row) for row in (["file_name", "text", "label"], *fields)]
        write(folder / name, "\ufeff" + "\r\n".join(lines) + "\r\n")
    elif name.endswith("json"):
        write(folder / name, "\ufeff" + json.dumps(entries, indent=1))
    else:
        write(folder / name, "\ufeff" + "\r\n".join(map(json.dumps, entries)))
    rows = load_image_dataset(tmp_path, columns=("text", "label"))
    assert list(rows["text"]) == [entry["text"] for entry in entries] and list(rows["label"]) == [0, 1, 2]


def test_captions_in_two_forms_are_told(tmp_path, caplog):
    save(tmp_path / "a.png")
    write(tmp_path / "a.txt", "from the text file")
    write(tmp_path / "metadata.jsonl", json.dumps({"file_name": "a.png", "text": "from the metadata"}))
    assert list(load_image_dataset(tmp_path, columns=("text",))["text"]) == ["from the metadata"]
    assert "captions twice: those of 'metadata.jsonl' are used" in caplog.text and "'a.txt'" in caplog.text


def test_metadata_of_several_folders_is_one_table(tmp_path):
    for kind in ("cat", "dog"):
        save(tmp_path / kind / "1.png")
        write(tmp_path / kind / "metadata.jsonl", json.dumps({"file_name": "1.png", "text": f"a {kind} indoors"}))
    assert texts(tmp_path) == {"cat/1.png": "a cat indoors", "dog/1.png": "a dog indoors"}
    write(tmp_path / "metadata.jsonl", json.dumps({"file_name": "cat/1.png", "text": "another"}))
    refused("cat/metadata.jsonl' and .*metadata.jsonl' both describe|both describe the picture .*cat/1.png", tmp_path)


def test_digits_in_a_csv_are_text_where_text_is_asked_for(tmp_path):
    save(tmp_path / "a.png"), write(tmp_path / "metadata.csv", "file_name,text,label\na.png,7,3\n")
    row = load_image_dataset(tmp_path, columns=("text", "label"))[0]
    assert row["text"] == "7" and row["label"] == 3


def test_one_or_several_captions_a_picture(tmp_path):
    save(tmp_path / "a.png"), save(tmp_path / "b.png")
    lines = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": ["two", "three"]}]
    write(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, lines)))
    assert texts(tmp_path) == {"a.png": ["one"], "b.png": ["two", "three"]}


def test_labels_come_from_folders_and_captions_from_texts(tmp_path):
    for kind in ("cat", "dog"):
        save(tmp_path / kind / "1.png"), write(tmp_path / kind / "1.txt", f"one {kind}")
    rows = load_image_dataset(tmp_path, columns=("text", "label"))
    assert list(rows["label"]) == [0, 1] and list(rows["text"]) == ["one cat", "one dog"]


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("names", [("photo of dog.png",), ("cat/1.png", "dog/2.png")], ids=["files", "folders"])
@pytest.mark.parametrize(
    "unread", ["captions.json", "labels.csv", "photo of dog.json", "captions.xml", "notes.txt", "meta_cap.json", None]
)
def test_names_are_no_captions_unless_asked_for(tmp_path, names, unread):
    for name in names:
        save(tmp_path / name)
    if unread:
        write(tmp_path / unread, "[]")
    found = f".*not read: '{unread}'" if unread else ""
    kind = "folder" if len(names) > 1 else "file"
    refused(
        f"has no caption: .*\\.txt or \\.caption.*metadata.jsonl{found}.*{kind} names, pass --captions_from_names",
        tmp_path,
    )
    assert list(texts(tmp_path, captions_from_names=True).values()) == (
        ["photo of dog"] if kind == "file" else ["cat", "dog"]
    )
    assert len(load_image_dataset(tmp_path, columns=("image",))) == len(names)  # nobody asked for captions


def test_missing_and_double_text_files(tmp_path):
    save(tmp_path / "a.png"), save(tmp_path / "b.png"), write(tmp_path / "a.txt", "a cat")
    for options in ({}, {"captions_from_names": True}):  # names do not fill gaps
        refused(
            r"b.png' has no caption, but other pictures have .*'a.txt'.*: write b.txt, .* \(1 such\)",
            tmp_path,
            **options,
        )
    write(tmp_path / "b.txt", "  \n")
    refused("b.png' has no caption", tmp_path)
    write(tmp_path / "b.caption", "a dog")
    refused("'b.png' in .* has captions in both 'b.caption' and 'b.txt': keep one", tmp_path)


WRONG = {
    "number": 5, "float": 0.5, "bool": True, "dict": {"en": "a cat"}, "list with None": ["a cat", None],
    "list of numbers": [1, 2], "nested list": [["a cat"]],
}  # fmt: skip


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("alone", [True, False], ids=["all rows", "one row"])
def test_captions_that_are_no_text_are_refused_with_file_row_and_column(tmp_path, value, alone):
    for i in range(3):
        save(tmp_path / f"p{i}.png")
    rows = [{"file_name": f"p{i}.png", "title": value if alone or i == 2 else "a cat"} for i in range(3)]
    write(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, rows)))
    first = 1 if alone else 3
    message = (
        rf"Entry {first} of '.*metadata.jsonl' \('p{first - 1}.png'\) has .* in the column 'title': a caption is a"
    )
    refused(message, tmp_path, ("title",), caption_column="title")
    refused(message, tmp_path, (), text_columns=("title",))  # a further column of captions
    source = DataArgs(train_data_dir=str(tmp_path), caption_column="title")
    for load in (lambda: load_pictures(source, columns=("title",)), lambda: load_sentences(source)):
        with pytest.raises(ValueError, match=message):
            load()
    if alone:  # the same in a table with pictures
        (tmp_path / "hub").mkdir()
        paths = [str(tmp_path / f"p{i}.png") for i in range(3)]
        table = datasets.Dataset.from_dict({"image": paths, "title": [value] * 3}).cast_column(
            "image", datasets.Image()
        )
        table.to_parquet(str(tmp_path / "hub" / "train.parquet"))
        options = {"caption_column": "title", "cache_dir": str(tmp_path / "cache")}
        for source in ({"train_data_dir": str(tmp_path / "hub")}, {"dataset_name": str(tmp_path / "hub")}):
            with pytest.raises(
                ValueError, match=r"p0.png' \(row 0\) of the (folder|data set) .* in the column 'title'"
            ):
                load_image_dataset(**source, columns=("title",), **options)


def test_class_labels_are_no_captions(tmp_path):
    table = datasets.Dataset.from_dict({"image": [str(save(tmp_path / "a.png"))], "text": [1]})
    (tmp_path / "hub").mkdir()
    table.cast_column("text", datasets.ClassLabel(names=["cat", "dog"])).to_parquet(
        str(tmp_path / "hub" / "a.parquet")
    )
    refused(
        "column 'text' of the folder .* holds class labels \\(cat, dog ...\\), not captions", tmp_path / "hub",
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", "file_name,text\na.png,one, two\n", "Line 2 of .*csv' has 3 fields, .* 2 columns: .*quotes"),
        ("metadata.tsv", "file_name\ttext\na.png\tone\ttwo\n", "Line 2 of .*tsv' has 3 fields, but there are 2 col"),
        ("metadata.csv", 'file_name,text\na.png,"never closed\n', "Line [23] of .*csv' is not CSV"),
        ("metadata.csv", "file_name,text,text\na.png,x,y\n", "has two columns of one name"),
        ("metadata.csv", "file_name,text\na.png,caf\xe9\n", "Line 2 of .*metadata.csv' is not UTF-8 \\(byte 0xe9\\)"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "caf\xe9"}', "Line 1 of .*jsonl' is not UTF-8"),
        ("metadata.json", '{"a.png": "a cat"}', "holds a dict, but must hold an array of objects"),
        ("metadata.json", '[{"file_name": "a.png"}, 3]', "Entry 2 of .*json' is no JSON object"),
        ("metadata.json", "[{", "metadata.json' is not JSON"),
        ("metadata.parquet", "PAR1 and nothing else", "metadata.parquet' cannot be read as parquet"),
        ("a.txt", "first\ncaf\xe9", "Line 2 of .*a.txt' is not UTF-8 .*save the file as UTF-8"),
    ],
)  # fmt: skip
def test_broken_tables_and_texts_are_named(tmp_path, name, content, message):
    save(tmp_path / "a.png"), write(tmp_path / name, content, "latin-1")
    refused(message, tmp_path)


def test_broken_parquet_with_pictures_is_named(tmp_path):
    table = datasets.Dataset.from_dict({"image": [b"x"] * 50, "text": ["a"] * 50})
    table.to_parquet(str(tmp_path / "a.parquet"))
    cache = {"cache_dir": str(tmp_path / "cache")}
    table.rename_column("text", "caption").to_parquet(str(tmp_path / "b.parquet"))
    refused("b.parquet' has the columns image, caption, but a.parquet beside it has image, text", tmp_path, **cache)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    refused("b.parquet' cannot be read as parquet", tmp_path, **cache)


def test_a_missing_split_lists_the_others(tmp_path):
    (tmp_path / "hub").mkdir()
    table = datasets.Dataset.from_dict({"image": [b"x"], "text": ["a"]})
    table.to_parquet(str(tmp_path / "hub" / "test-00000-of-00001.parquet"))
    with pytest.raises(ValueError, match="has no split 'train'; it has test. Save"):
        load_image_dataset(dataset_name=str(tmp_path / "hub"), cache_dir=str(tmp_path / "cache"))


def test_a_parquet_column_of_text_lists_is_fine(tmp_path):
    table = datasets.Dataset.from_dict({"image": [b"x", b"y"], "text": [["a", "b"], ["c"]]})
    table.to_parquet(str(tmp_path / "a.parquet"))
    rows = load_image_dataset(tmp_path, columns=("text",), cache_dir=str(tmp_path / "cache")).with_format(None)
    assert rows["text"][:] == [["a", "b"], ["c"]]


def test_sentences_of_text_files_in_other_encodings(tmp_path):
    write(tmp_path / "a.TXT", "\ufefffirst\r\nsecond\r\n")
    train, _ = load_sentences(DataArgs(train_data_dir=str(tmp_path)))
    assert list(train["text"]) == ["first", "second"]
    write(tmp_path / "b.txt", "caf\xe9", "latin-1")
    with pytest.raises(ValueError, match="Line 1 of .*b.txt' is not UTF-8"):
        load_sentences(DataArgs(train_data_dir=str(tmp_path)))
    (tmp_path / "b.txt").unlink(), (tmp_path / "a.TXT").rename(tmp_path / "a.txt"), save(tmp_path / "sub" / "b.png")
    with pytest.raises(ValueError, match="has no caption"):  # a note beside folders of pictures is no text to train on
        load_sentences(DataArgs(train_data_dir=str(tmp_path)))


# ------------------------------------------------------------------------------------------------ cleaning


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("a large red circle on the left", "a large red circle on the left"),
        ("A man's hat, size 5.5!", "A man's hat, size 5.5!"),
        ("Shop now: https://shop.example/a?b=1 today", "Shop now: today"),
        ("see WWW.example.com/x or mail me@example.org.", "see or mail."),
        ("<b>Tom</b> &amp; Jerry<br/> &lt;3", "Tom & Jerry 3"),
        ("photo [stock image] of a cat {id: [7]} asleep", "photo of a cat asleep"),
        ("black-and-white / mono_chrome | 35mm", "black and white mono chrome 35mm"),
        ("the \u201cold\u201d 'new' dog\u2019s tail isn't `here`", "the old new dog's tail isnt here"),
        ("a cat , asleep .", "a cat, asleep."),
        ("an open [bracket", "an open bracket"),
        ("[removed] http://x.y", ""),
        ("  a \n\t cat ", "a cat"),
        ("2 < 3 and 5 > 4", "2 3 and 5 4"),
        ("\u00e9t\u00e9 \u00e0 Paris (1999)", "\u00e9t\u00e9 \u00e0 Paris (1999)"),
    ],
)
def test_captions(caption, cleaned):
    assert clean_caption(caption) == cleaned
    assert clean_caption(cleaned) == cleaned
