"""Users' folders: every documented layout with a small fixture, and every error with the file that it names."""

import io
import json
import pickle
import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from diffusers_ext.data.image_folder import caption_from_file_name, decode_image, load_image_dataset
from diffusers_ext.data.photographs import find_photographs
from diffusers_ext.data.scenes import load_scenes

RED, BLUE = (200, 30, 40), (20, 40, 210)


def save(path, color=RED, size=(12, 8), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path, **options)
    return path


def png_bytes(color=RED):
    file = io.BytesIO()
    Image.new("RGB", (12, 8), color).save(file, "PNG")
    return file.getvalue()


def write_metadata(folder, *entries, name="metadata.jsonl"):
    text = "\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries)
    (folder / name).write_text(text + "\n", encoding="utf-8")


@pytest.fixture
def captioned(tmp_path):
    save(tmp_path / "b.png", BLUE)
    save(tmp_path / "deep" / "a.png", RED)
    write_metadata(
        tmp_path,
        {"file_name": "deep/a.png", "text": ["a red picture", "red"], "label": "warm", "boxes": [[0, 0, 0.5, 1.0]]},
        {"file_name": "b.png", "text": ["a blue picture"], "label": "cold", "boxes": []},
    )
    return tmp_path


# ------------------------------------------------------------------------------------------------ layouts


def test_metadata(captioned):
    dataset = load_image_dataset(captioned, columns=("text", "label"))
    assert len(dataset) == 2 and dataset.column_names == ["image", "text", "label", "boxes"]
    row = dataset[0]
    assert row["image"].mode == "RGB" and row["image"].size == (12, 8) and row["image"].getpixel((3, 3)) == RED
    assert row["text"] == ["a red picture", "red"] and row["boxes"] == [[0, 0, 0.5, 1.0]]
    # string labels become integers of the sorted names
    assert [row["label"] for row in dataset] == [1, 0] and dataset.features["label"].names == ["cold", "warm"]
    assert list(dataset["text"])[1] == ["a blue picture"]


def test_rows_are_map_style_and_pickle(captioned):
    dataset = load_image_dataset(captioned)
    again = pickle.loads(pickle.dumps(dataset))
    assert again[1]["image"].getpixel((0, 0)) == BLUE
    assert dataset.select([1])[0]["image"].getpixel((0, 0)) == BLUE
    assert dataset[-1]["text"] == dataset[1]["text"]
    assert [image.getpixel((0, 0)) for image in dataset[[1, 0]]["image"]] == [BLUE, RED]


def test_metadata_csv_and_other_column_names(tmp_path):
    save(tmp_path / "a.png"), save(tmp_path / "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,title,class\na.png,red,10\nb.png,also red,9\n")
    dataset = load_image_dataset(
        tmp_path, image_column="picture", caption_column="title", label_column="class", columns=("title", "class")
    )
    assert dataset[1]["title"] == "also red" and dataset[0]["class"] == 10
    assert dataset[0]["picture"].getpixel((0, 0)) == RED


def test_metadata_parquet(tmp_path):
    save(tmp_path / "a.png")
    datasets.Dataset.from_dict({"file_name": ["a.png"], "text": ["red"]}).to_parquet(
        str(tmp_path / "metadata.parquet")
    )
    assert load_image_dataset(tmp_path, columns=("text",))[0]["text"] == "red"


def test_further_pictures_keep_their_mode(tmp_path):
    save(tmp_path / "a.png")
    Image.fromarray(np.full((8, 12), 3, np.uint8)).save(tmp_path / "map.png")
    write_metadata(tmp_path, {"file_name": "a.png", "semantic_file_name": "map.png"})
    row = load_image_dataset(tmp_path, columns=("semantic",))[0]
    assert row["semantic"].mode == "L" and (np.asarray(row["semantic"]) == 3).all()


def test_parquet_with_pictures(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": png_bytes(RED), "path": None}, {"bytes": png_bytes(BLUE), "path": None}]}
    table = datasets.Dataset.from_dict({**rows, "text": ["red", "blue"]}, features=features)
    table.to_parquet(str(tmp_path / "train-00000.parquet"))
    dataset = load_image_dataset(tmp_path, columns=("text",), cache_dir=str(tmp_path / "cache"))
    assert dataset[1]["image"].getpixel((0, 0)) == BLUE and dataset[1]["text"] == "blue"


def test_parquet_with_plain_bytes(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"image": [png_bytes(BLUE)], "text": ["blue"]}), tmp_path / "a.parquet")
    dataset = load_image_dataset(tmp_path, cache_dir=str(tmp_path / "cache"))
    assert dataset[0]["image"].getpixel((0, 0)) == BLUE


def test_class_folders(tmp_path):
    (
        save(tmp_path / "golden_retriever" / "1.jpg"),
        save(tmp_path / "cat" / "2.png", BLUE),
        save(tmp_path / "cat" / "1.png"),
    )
    assert load_image_dataset(tmp_path).column_names == ["image", "label"]  # nobody asked for words
    dataset = load_image_dataset(tmp_path, columns=("label", "text"), captions_from_names=True)
    assert [row["label"] for row in dataset] == [0, 0, 1]
    assert dataset.features["label"].names == ["cat", "golden_retriever"]
    assert dataset[2]["text"] == "golden retriever"


def test_plain_folder(tmp_path):
    save(tmp_path / "a_red_house_003.jpg"), save(tmp_path / "two-cats.PNG"), save(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("no picture")
    dataset = load_image_dataset(tmp_path, columns=("text",), captions_from_names=True)
    assert [row["text"] for row in dataset] == ["a red house", "two cats"]


def test_plain_folder_without_captions_serves_pictures_alone(tmp_path):
    save(tmp_path / "0001.png"), save(tmp_path / "a_house.png")
    assert load_image_dataset(tmp_path).column_names == ["image"]


def test_split_folders(tmp_path):
    save(tmp_path / "train" / "a_house.png"), save(tmp_path / "val" / "a_tree.png")
    assert load_image_dataset(tmp_path, captions_from_names=True)[0]["text"] == "a house"
    assert load_image_dataset(tmp_path, split="validation", captions_from_names=True)[0]["text"] == "a tree"
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        load_image_dataset(tmp_path, split="test")


def test_saved_to_disk_and_dataset_name(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": png_bytes(), "path": None}], "label": [1]}, features=features
    )
    table.save_to_disk(str(tmp_path / "saved"))
    row = load_image_dataset(tmp_path / "saved", columns=("label",))[0]
    assert row["label"] == 1 and row["image"].getpixel((0, 0)) == RED
    # a folder of parquet files is also a data set that `datasets.load_dataset` knows by name
    (tmp_path / "hub").mkdir()
    table.to_parquet(str(tmp_path / "hub" / "train.parquet"))
    dataset = load_image_dataset(
        dataset_name=str(tmp_path / "hub"), columns=("label",), cache_dir=str(tmp_path / "cache")
    )
    assert dataset[0]["label"] == 1 and dataset.features["label"].names == ["a", "b"]


def test_max_samples(captioned):
    assert len(load_image_dataset(captioned, max_samples=1)) == 1
    assert len(load_image_dataset(captioned, max_samples=50)) == 2
    with pytest.raises(ValueError, match="`max_samples` must be at least 1 or None, but is 0"):
        load_image_dataset(captioned, max_samples=0)


# ------------------------------------------------------------------------------------------------ pictures


def test_exif_orientation_is_honoured(tmp_path):
    image = Image.new("RGB", (20, 10), RED)
    image.paste(BLUE, (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    image.save(tmp_path / "a_house.png", exif=exif)
    upright = load_image_dataset(tmp_path)[0]["image"]
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 2)) == BLUE and upright.getpixel((5, 17)) == RED


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
def test_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    save(path, (255, 255, 255), mode=mode)
    image = decode_image(path)
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)


def test_transparent_parts_become_white(tmp_path):
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert decode_image(tmp_path / "clear.png").getpixel((1, 1)) == (255, 255, 255)
    indexed = Image.new("P", (4, 4), 1)
    indexed.putpalette([0, 0, 0, 200, 0, 0])
    indexed.save(tmp_path / "indexed.png", transparency=1)
    assert decode_image(tmp_path / "indexed.png").getpixel((1, 1)) == (255, 255, 255)


def test_sixteen_bit_greys_are_scaled(tmp_path):
    Image.fromarray(np.full((4, 4), 128 * 256, np.uint16)).save(tmp_path / "grey.png")
    assert decode_image(tmp_path / "grey.png").getpixel((1, 1)) == (128, 128, 128)


@pytest.mark.parametrize("form", ["path", "bytes", "struct", "picture"])
def test_decode_image_takes_every_form(tmp_path, form):
    path = save(tmp_path / "a.png")
    value = {
        "path": path,
        "bytes": png_bytes(),
        "struct": {"bytes": png_bytes(), "path": "somewhere.png"},
        "picture": Image.new("RGB", (2, 2), RED),
    }[form]
    assert decode_image(value).getpixel((0, 0)) == RED


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("a_red_house_003.jpg", "a red house"),
        ("a-red-house.png", "a red house"),
        ("a red house (3).png", "a red house"),
        ("A House.webp", "A House"),
        ("3_cats_12.png", "3 cats"),
        ("folder/r2d2.png", "r2d2"),
        ("0017.png", ""),
        ("2024-05-01.png", ""),
        ("IMG_0017.JPG", ""),
        ("DSC01234.jpg", ""),
        ("image (4).png", ""),
    ],
)
def test_captions_from_file_names(name, caption):
    assert caption_from_file_name(name) == caption


# ------------------------------------------------------------------------------------------------ errors


def refused(message, folder, **options):
    with pytest.raises(ValueError, match=message):
        load_image_dataset(folder, **options)


def test_no_or_both_sources():
    refused("Exactly one of `train_data_dir` and `dataset_name` is needed, but got None and None", None)
    refused("Exactly one of `train_data_dir` and `dataset_name` is needed, but got 'a' and 'b'", "a", dataset_name="b")


def test_no_folder_and_no_pictures(tmp_path):
    refused("`train_data_dir` must be a folder, but .*missing.* is not one", tmp_path / "missing")
    refused(r"There are no pictures in .* \(looked for .png, .*metadata.jsonl", tmp_path)


def test_missing_caption_names_the_picture(tmp_path):
    save(tmp_path / "a.png"), save(tmp_path / "b.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "red"}, {"file_name": "b.png", "text": ""})
    refused(r"The picture 'b.png' has no 'text' in .*metadata.jsonl' \(entry 2\)", tmp_path, columns=("text",))
    assert len(load_image_dataset(tmp_path)) == 2  # nobody asked for captions


def test_file_name_without_words_names_the_picture(tmp_path):
    save(tmp_path / "a_house.png"), save(tmp_path / "IMG_0007.png")
    refused("The picture .*IMG_0007.png' has no caption: .*metadata.jsonl", tmp_path, columns=("text",))


def test_picture_without_an_entry(captioned):
    save(captioned / "deep" / "forgotten.png")
    refused("has no entry for 1 pictures beside it, such as 'deep/forgotten.png'", captioned)


def test_entry_without_a_picture(tmp_path):
    save(tmp_path / "a.png")
    write_metadata(tmp_path, {"file_name": "a.png"}, {"file_name": "gone.png"})
    refused("Entry 2 of .*metadata.jsonl' names a picture that does not exist: 'gone.png'", tmp_path)


def test_entry_without_a_file_name(tmp_path):
    save(tmp_path / "a.png")
    write_metadata(tmp_path, {"text": "red"})
    refused("Entry 1 of .*metadata.jsonl' has no `file_name`: .*red", tmp_path)


@pytest.mark.parametrize(
    ("line", "message"), [("{not json", "Line 2 of .* is not JSON"), ("[1]", "Line 2 of .* no JSON")]
)
def test_broken_metadata_names_the_line(tmp_path, line, message):
    save(tmp_path / "a.png")
    write_metadata(tmp_path, {"file_name": "a.png"}, line)
    refused(message, tmp_path)


def test_empty_metadata(tmp_path):
    save(tmp_path / "a.png")
    write_metadata(tmp_path, "")
    refused("metadata.jsonl' has no entries", tmp_path)


def test_mixed_types_in_a_column(tmp_path):
    save(tmp_path / "a.png"), save(tmp_path / "b.png")
    write_metadata(tmp_path, {"file_name": "a.png", "label": 1}, {"file_name": "b.png", "label": "two"})
    refused("metadata.jsonl' mixes types within a column", tmp_path)


def test_two_metadata_files(captioned):
    (captioned / "metadata.csv").write_text("file_name\nb.png\n")
    refused("has both metadata.jsonl and metadata.csv: keep one", captioned)


def test_missing_column_lists_the_present_ones(captioned):
    refused(
        "There is no column 'caption' in the folder .*; its columns are image, text, label, boxes",
        captioned,
        columns=("caption",),
    )


def test_missing_value_in_a_table_names_the_row(tmp_path):
    table = datasets.Dataset.from_dict({"image": [png_bytes(), png_bytes()], "text": ["red", None]})
    table.to_parquet(str(tmp_path / "a.parquet"))
    cache = str(tmp_path / "cache")
    refused("Row 1 of the folder .* has nothing in the column 'text'", tmp_path, columns=("text",), cache_dir=cache)


def test_pictures_at_different_depths(tmp_path):
    save(tmp_path / "a_house.png"), save(tmp_path / "cat" / "1.png")
    refused("different depths \\('a_house.png' and 'cat/1.png'\\)", tmp_path)


def test_pictures_beside_a_table(tmp_path):
    save(tmp_path / "a_house.png")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "captions.parquet"))
    refused("has pictures \\(a_house.png ...\\) beside captions.parquet: name the table metadata.parquet", tmp_path)


def test_unreadable_picture_is_named(tmp_path):
    save(tmp_path / "a_house.png")
    (tmp_path / "broken_tree.png").write_bytes(b"this is no picture")
    half = save(tmp_path / "half_tree.png", size=(64, 64)).read_bytes()
    (tmp_path / "half_tree.png").write_bytes(half[: len(half) // 2])
    dataset = load_image_dataset(tmp_path)
    assert dataset[0]["image"].size == (12, 8)
    for row, name in ((1, "broken_tree.png"), (2, "half_tree.png")):
        with pytest.raises(ValueError, match=f"Cannot read the picture .*{name}.*Repair or remove it"):
            dataset[row]
    refused("2 pictures of the folder .* cannot be read: .*broken_tree.png", tmp_path, verify_images=True)
    with pytest.raises(ValueError, match="expected a path, file bytes or a PIL picture, but got int"):
        decode_image(7)


# ------------------------------------------------------------------------------------------------ which files count


def test_whatever_pillow_reads_is_a_picture(tmp_path, caplog):
    for number, name in enumerate(("a.jfif", "b.avif", "c.JPE", "d.tga", "e.jp2", "f", "g.jpg_large")):
        form = {"b.avif": "AVIF", "d.tga": "TGA", "e.jp2": "JPEG2000", "f": "PNG"}.get(name, "JPEG")
        Image.new("RGB", (20, 10 + number), RED).save(tmp_path / name, form)
    (
        (tmp_path / "notes.md").write_text("# none"),
        (tmp_path / "Thumbs.db").write_bytes(b"x"),
        (tmp_path / "._a").touch(),
    )
    with caplog.at_level("INFO"):
        rows = load_image_dataset(tmp_path)
    assert [row["image"].size[1] for row in rows] == list(range(10, 17))
    assert "Not read in" in caplog.text and "'notes.md'" in caplog.text and "Thumbs" not in caplog.text


@pytest.mark.parametrize("name", ["b.heic", "deep/b.SVG", "b.cr2"])
def test_pictures_that_pillow_cannot_read_are_named(tmp_path, name):
    save(tmp_path / "a.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"whatever")
    refused(f"has 1 pictures in a format that Pillow does not read here, such as '{name}'", tmp_path)


def test_links(tmp_path):
    save(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.png").symlink_to(tmp_path / "elsewhere" / "a.png")  # the user's own act
    assert len(load_image_dataset(tmp_path / "own")) == 1
    (tmp_path / "own" / "again").symlink_to(tmp_path / "own")
    refused("again' is a link to a folder that it lies in", tmp_path / "own")
    (tmp_path / "own" / "again").unlink()
    (tmp_path / "own" / "b.png").symlink_to(tmp_path / "gone.png")
    refused("b.png' is a link to something that does not exist", tmp_path / "own")


@pytest.mark.parametrize("form", ["absolute", "above", "windows", "number"])
def test_file_names_stay_inside_their_folder(tmp_path, form):
    outside = save(tmp_path / "outside.png")
    folder = save(tmp_path / "own" / "a.png").parent
    name = {"absolute": str(outside), "above": "../outside.png", "windows": "..\\outside.png", "number": 5}[form]
    message = "Entry 2 of .* has the file name 5" if form == "number" else "Entry 2 of .* leads out of its folder"
    write_metadata(folder, {"file_name": "a.png"}, {"file_name": name})
    refused(message, folder)
    write_metadata(folder, {"file_name": "a.png"}, {"file_name": "a.png", "low_file_name": name})
    refused(message, folder)


def test_pictures_that_all_lie_deep(tmp_path):
    save(tmp_path / "a" / "b" / "1.png"), save(tmp_path / "a" / "c" / "2.png")
    refused(r"has its pictures 2 folders deep \('a/b/1.png'\): name the folder above the classes", tmp_path)


def test_split_folders_beside_other_things(tmp_path):
    save(tmp_path / "Train" / "cat" / "1.png"), save(tmp_path / "test" / "cat" / "2.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "x.xml").write_text("<a/>")
    assert load_image_dataset(tmp_path, columns=("label",)).features["label"].names == ["cat"]
    save(tmp_path / "val" / "cat" / "1.png"), save(tmp_path / "valid" / "cat" / "1.png")
    refused("has both 'val' and 'valid': keep one", tmp_path)


def test_max_samples_are_drawn_from_all_classes(tmp_path):
    for kind in ("cat", "dog", "fox"):
        for number in range(12):
            save(tmp_path / kind / f"{number}.png")
    labels = list(load_image_dataset(tmp_path, max_samples=12)["label"])
    assert len(labels) == 12 and set(labels) == {0, 1, 2} and labels == sorted(labels)  # drawn, in their order
    assert list(load_image_dataset(tmp_path, max_samples=12)["label"]) == labels


def test_missing_package_names_the_extra(monkeypatch):
    for name in ("datasets", "skimage", "skimage.data"):
        monkeypatch.setitem(sys.modules, name, None)  # what makes `import` fail
    for call, extra in (
        (lambda: load_image_dataset("x"), "train"),
        (lambda: load_scenes(1), "train"),
        (find_photographs, "eval"),
    ):
        with pytest.raises(ImportError, match=rf'pip install [\w-]+ \(extra "{extra}"\)'):
            call()
