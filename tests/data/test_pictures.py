"""Which pictures a recipe's options name, and what a network gets of one picture."""

import json
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.data.crops import choose_text, draw_square, prepare_image
from diffusers_ext.data.labels import find_classes
from diffusers_ext.data.pictures import load_pictures


def source(**options) -> SimpleNamespace:
    defaults = {
        "dataset_name": None, "dataset_config_name": None, "train_data_dir": None, "image_column": "image",
        "caption_column": "text", "label_column": "label", "max_train_samples": None, "resolution": 32,
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **options})


def shades(folder, count: int) -> str:
    for i in range(count):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"shade_{i:03d}.png")
    return str(folder)


def test_scenes_with_a_validation_split_and_chosen_grounds():
    train, validation = load_pictures(source(dataset_name="scenes", max_train_samples=5), columns=("text",))
    assert len(train) == 5 and len(validation) == 256 and train.column_names == ["image", "text"]
    assert train[0]["image"].size == (32, 32) and train[0]["text"]
    plain, _ = load_pictures(source(dataset_name="scenes", dataset_config_name="plain", max_train_samples=8))
    corners = [np.asarray(row["image"])[:2, :2].reshape(-1, 3) for row in plain]
    assert all((corner == corner[0]).all() for corner in corners)  # one colour, no gradient


def test_scenes_with_a_chosen_number_of_objects():
    for word, number in (("one", 1), ("two", 2)):
        configured = source(dataset_name="scenes", dataset_config_name=f"plain+{word}", max_train_samples=8)
        train, validation = load_pictures(configured, columns=("boxes",))
        assert all(len(row["boxes"]) == number for part in (train, validation) for row in part)
    grounds, _ = load_pictures(source(dataset_name="scenes", dataset_config_name="two", max_train_samples=8))
    corners = [np.asarray(row["image"])[:2, :2].reshape(-1, 3) for row in grounds]
    assert not all((corner == corner[0]).all() for corner in corners)  # all grounds: some are no plain colour
    with pytest.raises(ValueError, match="'one\\+two': it names one of one, two, or none"):
        load_pictures(source(dataset_name="scenes", dataset_config_name="one+two", max_train_samples=8))


@pytest.mark.parametrize("options", [{"image_column": "photo"}, {"dataset_config_name": "plain+no_such_ground"}])
def test_what_scenes_does_not_have_is_refused(options):
    with pytest.raises(ValueError, match="photo|no_such_ground"):
        load_pictures(source(dataset_name="scenes", max_train_samples=2, **options))


def test_captions_and_classes_of_scenes_are_in_their_columns():
    for name in ("label", "image", "boxes"):
        with pytest.raises(ValueError, match=f"column '{name}' of `scenes` holds no captions .* are text, full_text,"):
            load_pictures(source(dataset_name="scenes", caption_column=name, max_train_samples=2), columns=(name,))
    with pytest.raises(ValueError, match="column 'label' of `scenes` holds no captions"):
        load_pictures(source(dataset_name="scenes", max_train_samples=2), text_columns=("label",))
    wrong = source(dataset_name="scenes", label_column="semantic", max_train_samples=2)
    with pytest.raises(ValueError, match="--label_column=semantic: the classes of `scenes` are in the column 'label'"):
        find_classes(load_pictures(wrong, columns=("semantic",)), wrong)


def test_numbers_that_name_things_are_no_classes(tmp_path):
    folder = shades(tmp_path, 3)
    lines = [{"file_name": f"shade_{i:03d}.png", "label": label} for i, label in enumerate((0, 7, 10**9))]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = source(train_data_dir=folder)
    with pytest.raises(ValueError, match="largest label in 'label' is 1000000000, but there are only 6 rows: number"):
        find_classes(load_pictures(own, columns=("label",)), own)


def test_a_tenth_of_a_folder_is_held_out_always_the_same(tmp_path):
    folder = source(train_data_dir=shades(tmp_path, 25))
    train, validation = load_pictures(folder)
    assert (len(train), len(validation)) == (23, 2)
    shown = [[row["image"].getpixel((0, 0))[0] for row in part] for part in (train, validation)]
    assert sorted(shown[0] + shown[1]) == list(range(25))
    assert [row["image"].getpixel((0, 0))[0] for row in load_pictures(folder)[1]] == shown[1]


def test_a_tiny_folder_is_validated_on_itself(tmp_path):
    train, validation = load_pictures(source(train_data_dir=shades(tmp_path, 4)))
    assert len(train) == len(validation) == 4


@pytest.mark.parametrize("name", ["validation", "val", "test"])
def test_a_validation_split_beside_train_is_used(tmp_path, caplog, name):
    for kind, shade in (("cat", 10), ("dog", 20)):
        for number in range(12):
            for split in ("train", name):
                if split == "train" or kind == "dog":
                    path = tmp_path / split / kind / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (4, 4), (shade + (split != "train"), 0, 0)).save(path)
    with caplog.at_level("INFO"):
        train, validation = load_pictures(source(train_data_dir=str(tmp_path)), columns=("label",))
    assert len(train) == 24 and len(validation) == 12  # nothing of train is held out
    assert {row["image"].getpixel((0, 0))[0] for row in validation} == {21}
    assert set(validation["label"]) == {1}  # the number that a dog has in train
    assert f"Validation: 12 of 12 rows of the split '{'test' if name == 'test' else 'validation'}'" in caplog.text
    shutil.copytree(tmp_path / name / "dog", tmp_path / name / "fox")
    with pytest.raises(ValueError, match="split .* has the class 'fox', which the training pictures lack"):
        load_pictures(source(train_data_dir=str(tmp_path)), columns=("label",))


def test_a_test_split_of_the_hub_without_labels_is_left_out(tmp_path, caplog):
    for split, label in (("train", 1), ("test", -1)):
        rows = {"image": [b"x"] * 20, "label": [label] * 20}
        (tmp_path / "hub").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "hub" / f"{split}-00000-of-00001.parquet"))
    with caplog.at_level("INFO"):
        train, validation = load_pictures(source(dataset_name=str(tmp_path / "hub")), columns=("label",))
    assert (len(train), len(validation)) == (18, 2)
    assert "'test' of the data set" in caplog.text and "negative numbers in the column 'label'" in caplog.text


def test_what_is_held_out_and_mirrored_is_logged(tmp_path, caplog):
    with caplog.at_level("INFO"):
        load_pictures(source(train_data_dir=shades(tmp_path, 25), random_flip=True))
    assert "Validation: 2 of 25 rows are held out" in caplog.text and "pictures are mirrored" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        load_pictures(source(train_data_dir=str(tmp_path), random_flip=False, max_train_samples=5))
    assert "with only 5 rows none is held out" in caplog.text and "mirrored" not in caplog.text


def test_pictures_are_scaled_to_the_shorter_side_and_cropped():
    ramp = Image.fromarray(np.tile(np.arange(0, 240, dtype=np.uint8)[None, :, None], (120, 1, 3)))  # 240 wide
    centre = prepare_image(ramp, 60, center_crop=True)
    assert centre.shape == (3, 60, 60) and centre.dtype == torch.float32
    assert centre[0, 30, 30].item() == pytest.approx(120 / 127.5 - 1, abs=0.03)
    places = {
        round(prepare_image(ramp, 60, generator=torch.Generator().manual_seed(i))[0, 0, 0].item(), 2) for i in range(9)
    }
    assert len(places) > 4
    white = Image.new("RGB", (3, 5), "white")
    assert prepare_image(white, 8).eq(1).all() and prepare_image(Image.new("RGB", (8, 8)), 8).eq(-1).all()


def test_flips_concern_half_of_the_pictures_and_take_the_same_draws():
    half = Image.fromarray(np.repeat(np.array([[[0] * 3, [255] * 3]], np.uint8), 4, axis=1).repeat(8, axis=0))  # 8x8
    flipped = [
        prepare_image(half, 8, generator=torch.Generator().manual_seed(i), random_flip=True)[0, 0, 0] > 0
        for i in range(200)
    ]
    assert 70 <= sum(flipped) <= 130
    for flip in (False, True):
        generator = torch.Generator().manual_seed(0)
        prepare_image(half, 8, generator=generator, random_flip=flip)
        assert torch.rand((), generator=generator) == torch.rand(4, generator=torch.Generator().manual_seed(0))[3]


def test_label_maps_go_with_their_pictures():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    picture, labels = Image.fromarray(pixels).convert("RGB"), Image.fromarray(pixels)
    for seed in range(8):
        options = {"random_flip": True}
        image = prepare_image(picture, 20, generator=torch.Generator().manual_seed(seed), **options)
        crop = draw_square(picture.size, 20, torch.Generator().manual_seed(seed), **options)
        label_map = crop.labels(labels, 20)
        assert label_map.dtype == torch.int64
        torch.testing.assert_close((image[0] + 1) * 127.5, label_map.float(), rtol=0, atol=1e-3)
    shrunk = draw_square(picture.size, 7)
    assert set(shrunk.labels(labels, 7).unique().tolist()) <= set(pixels.flatten().tolist())  # no mixed labels
    smaller = labels.resize((15, 10), Image.Resampling.NEAREST)  # resized first, as its picture is
    assert torch.equal(crop.labels(smaller, 20), crop.labels(smaller.resize((30, 20), Image.Resampling.NEAREST), 20))
    with pytest.raises(ValueError, match="label map has the mode 'RGB'"):
        shrunk.labels(picture, 7)


def test_one_caption_of_several_is_drawn():
    assert choose_text("a house") == "a house"
    drawn = {choose_text(["a", "b", "c"], torch.Generator().manual_seed(i)) for i in range(20)}
    assert drawn == {"a", "b", "c"}
    with pytest.raises(ValueError, match="empty list of captions"):
        choose_text([])
