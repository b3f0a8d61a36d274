"""Own pictures over every preset that is no paper's: the first batch reaches the loss."""

import json
import logging
import os
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import train_autoencoder
import train_cascaded
import train_clip
import train_ldm
import train_optimus
import train_paella
import train_piti
import train_versatile
import yaml
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, VQModel
from PIL import Image

from diffusers_ext import LDMTextPipeline, LDMUpscalePipeline, PaellaPipeline
from diffusers_ext.conditions.images import image_batch
from diffusers_ext.data.labels import Classes, warn_of_numbers
from diffusers_ext.data.scenes import CLASS_NAMES, load_scenes
from diffusers_ext.evaluation.reconstruction import warn_of_first_stage
from diffusers_ext.models.unet_paella import PaellaUNet
from diffusers_ext.pipelines.ldm.first_stage import decode_first_stage, encode_first_stage
from diffusers_ext.training_utils.weights import warn_of_size

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "training" / "presets"
OWN = sorted(path for path in PRESETS.glob("*.yaml") if "-paper-" not in path.stem)
CLASSES = ("cat", "dog", "fox")


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(ROOT)  # presets name the bundled checkpoints from there
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A user's folder of pictures that are no `scenes`: captions, class numbers, boxes, label maps, sketches, normals
    and depth.
    """
    folder = tmp_path_factory.mktemp("own") / "pictures"
    for name in ("maps", "sketches", "geometry"):
        (folder / name).mkdir(parents=True)
    draw, lines = np.random.default_rng(0), []
    for number in range(12):
        Image.fromarray(draw.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(draw.integers(0, 5, (40, 36), dtype=np.uint8)).save(folder / "maps" / f"{number}.png")
        lines_on_black = np.where(draw.random((40, 36)) < 0.1, 255, 0).astype(np.uint8)
        Image.fromarray(lines_on_black).save(folder / "sketches" / f"{number}.png")
        np.save(folder / "geometry" / f"{number}n.npy", np.tile(np.float32([0.6, 0, 0.8]), (40, 36, 1)))
        np.save(folder / "geometry" / f"{number}d.npy", draw.uniform(1, 9, (40, 36)).astype(np.float32))
        kind = CLASSES[number % 3]
        entry = {
            "file_name": f"{number}.png", "semantic_file_name": f"maps/{number}.png",
            "sketch_file_name": f"sketches/{number}.png", "normals_file_name": f"geometry/{number}n.npy",
            "depth_file_name": f"geometry/{number}d.npy", "text": f"a {kind} in the grass",
            "label": number % 3, "boxes": [[0.1, 0.2, 0.6, 0.9]], "box_names": [kind],
        }  # fmt: skip
        lines.append(json.dumps(entry) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def predecessors(tmp_path_factory) -> dict[str, str]:
    """Results of earlier stages where a preset names one under runs/: tiny, one step each, or bundled ones."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    base = tmp_path_factory.mktemp("stages")
    scenes = ("--dataset_name", "scenes", "--max_train_samples", "12", "--max_train_steps", "1")
    runs = {
        "kl": (train_autoencoder, "autoencoder-kl-smoke.yaml", ("--resolution", "32", "--disc_start", "none")),
        "vq": (train_autoencoder, "autoencoder-smoke.yaml", ("--resolution", "32", "--disc_start", "none")),
        "clip": (train_clip, "clip-smoke.yaml", ("--resolution", "32")),
        "optimus": (train_optimus, "optimus-smoke.yaml", ()),
        "piti": (train_piti, "piti-smoke.yaml", ("--num_inference_steps", "1")),
        "piti-maps": (train_piti, "piti-joint-smoke.yaml", ("--num_inference_steps", "1")),
    }
    for name, (recipe, preset, words) in runs.items():
        recipe.main([str(PRESETS / preset), *scenes, *words, "--output_dir", str(base / name)])
        AcceleratorState._reset_state(reset_partial_state=True)
    return {name: str(base / name) for name in runs} | {
        "paella": "checkpoints/paella-scenes-64", "versatile": "checkpoints/versatile-scenes-64",
    }  # fmt: skip


# what a preset's option names -> the predecessor that stands for it
PARTS = {
    "pretrained_vqvae_name_or_path": "vq",
    "pretrained_clip_name_or_path": "clip",
    "pretrained_optimus_name_or_path": "optimus",
}


def shrunk(preset: Path, predecessors: dict[str, str]) -> list[str]:
    """Options for a small batch, and predecessors in place of those that lie under runs/."""
    options, family = yaml.safe_load(preset.read_text()), preset.stem.split("-")[0]
    words = ["--train_batch_size", "2", "--logging_steps", "1", "--checkpointing_steps", "99"]
    whole = {"autoencoder": predecessors["kl"], **predecessors}
    for name, value in options.items():
        if name.startswith("pretrained_") and str(value).startswith("runs/"):
            goes_on = "pretrained_model_name_or_path" in options  # with a CLIP of the width that it knows
            words += [f"--{name}", whole[family] if goes_on or name not in PARTS else predecessors[PARTS[name]]]
    # the sides of a cascade's stages belong together, as do those of PITI's maps and images
    if family not in ("cascaded", "optimus", "piti"):
        words += ["--resolution", "64" if str(options.get("pretrained_model_name_or_path")) != "None" else "32"]
    if family in ("autoencoder", "clip") and "pretrained_model_name_or_path" in options:
        words[-1] = "32"  # as the tiny ones
    if family == "piti" and "upsampler" in options["stage"]:  # a new one, of the width of the tiny stage below it
        words += ["--cross_attention_dim", "32", "--pretrained_upsampler_name_or_path", "none"]
        base = "piti" if options["stage"] == "prior_upsampler" else "piti-maps"
        words += ["--pretrained_model_name_or_path", predecessors[base]]
    if "kmeans_samples" in options:
        words += ["--kmeans_samples", "8", "--num_vq_embeddings", "8"]
    return words


class _Reached(Exception):
    """The first batch has been through the loss and back."""


def recipe_of(preset: Path):
    return import_module(f"train_{preset.stem.split('-')[0]}")


@pytest.mark.parametrize("preset", OWN, ids=lambda path: path.stem)
def test_every_preset_starts_on_an_own_folder(preset, pictures, predecessors, tmp_path, monkeypatch, caplog):
    """One option more than the preset, `--train_data_dir`; the optimizer is stopped before its first step."""

    def stop(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
        raise _Reached

    monkeypatch.setattr(torch.optim.AdamW, "step", stop)
    data = ["--train_data_dir", str(pictures), "--output_dir", str(tmp_path / "run")]
    with caplog.at_level(logging.INFO), pytest.raises(_Reached):
        recipe_of(preset).main([str(preset), *data, *shrunk(preset, predecessors)])
    options = yaml.safe_load(preset.read_text())
    assert "mirrored" not in caplog.text  # no preset for own data does it unasked
    assert "1 of 12 rows are held out" in caplog.text
    for name in ("negative_caption_column", "paraphrase_column", "cache_dir", "dataset_config_name"):
        assert (f"--{name}" in caplog.text) == (name in options)  # told what does not count any more
    # no first stage here shows noise
    draws = [flow for flow in options.get("flows", ["text-to-image"]) if flow.endswith("-to-image")]
    stands = {"ldm", "paella", *(["versatile"] if draws and "vae" not in options.get("untrained_parts", []) else [])}
    warned = "does not show these pictures: it gives 8 of them back with a PSNR of" in caplog.text
    assert warned == (preset.stem.split("-")[0] in stands)


def test_first_stages_that_show_the_pictures_say_nothing(caplog):
    images = [image_batch(row["image"]) * 2 - 1 for row in load_scenes(4)]
    for folder, kind in (("kl-f4", AutoencoderKL), ("vq-f4", VQModel)):
        vqvae = kind.from_pretrained(f"checkpoints/{folder}-scenes-64")
        found = warn_of_first_stage(
            images, lambda batch, vqvae=vqvae: decode_first_stage(vqvae, encode_first_stage(vqvae, batch)), folder, ""
        )
        assert 25 < found < 60
    assert not caplog.text


@pytest.mark.parametrize("resolution", [32, 64])
def test_another_size_than_the_pretrained_pipeline_draws(resolution, caplog):
    for kind, folder in (
        (LDMTextPipeline, "ldm-text"),
        (PaellaPipeline, "paella"),
        (LDMUpscalePipeline, "ldm-super-resolution"),
    ):
        caplog.clear()
        pipe = kind.from_pretrained(f"checkpoints/{folder}-scenes-64")
        warn_of_size(pipe, folder, resolution)
        has_a_size = kind is not LDMUpscalePipeline  # which takes that of its picture
        wanted = f"--resolution is 32, but {folder} was trained on 64 x 64, which its result goes on to draw"
        assert (wanted in caplog.text) == (has_a_size and resolution == 32)


def test_recipes_are_all_there():
    assert {preset.stem.split("-")[0] for preset in OWN} == {
        module.__name__.removeprefix("train_")
        for module in (
            train_autoencoder,
            train_cascaded,
            train_clip,
            train_ldm,
            train_optimus,
            train_paella,
            train_piti,
            train_versatile,
        )
    }


@pytest.mark.parametrize(
    "words", [("--disc_start", "none"), ("--disc-start=None",), ("--disc_start", "3", "--disc_start", "none")]
)
def test_none_unsets_an_optional_field(words):
    preset = str(PRESETS / "autoencoder-smoke.yaml")
    assert train_autoencoder.parse_args([preset])[0].disc_start == 6
    assert train_autoencoder.parse_args([preset, *words])[0].disc_start is None
    assert train_autoencoder.parse_args([preset, *words, "--disc_start", "4"])[0].disc_start == 4
    train = train_autoencoder.parse_args([preset, "--checkpoints_total_limit", "none"])[2]
    assert train.checkpoints_total_limit is None  # also where the default is a number
    assert train_ldm.parse_args([str(PRESETS / "ldm-smoke.yaml"), "--layout_flags", "none"])[0].layout_flags == "none"
    with pytest.raises(SystemExit):
        train_autoencoder.parse_args([preset, "--train_batch_size", "none"])


def test_an_empty_value_of_a_preset_unsets_as_well(tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text("dataset_name: scenes\ncheckpoints_total_limit: null\nguidance_scale: null\n")
    args, _, train = train_paella.parse_args([str(preset)])
    assert train.checkpoints_total_limit is None and args.guidance_scale == 5.0  # may not be unset: says nothing


def test_another_source_replaces_what_the_preset_says_of_its_data(caplog):
    preset = str(PRESETS / "clip-versatile-scenes-64-bindings.yaml")
    for words in ((), ("--dataset_name", "scenes"), ("--learning_rate", "1")):
        args, data, _ = train_clip.parse_args([preset, *words])
        assert (data.dataset_name, data.dataset_config_name, data.train_data_dir) == ("scenes", "plain", None)
        assert args.negative_caption_column == "negative_texts" and data.max_train_samples == 500000
    assert not caplog.text
    for words, folder, name in (
        (("--train_data_dir", "x"), "x", None), (("--train-data-dir=x", "--dataset_name", "none"), "x", None),
        (("--dataset_name", "me/pictures"), None, "me/pictures"),
    ):  # fmt: skip
        caplog.clear()
        args, data, _ = train_clip.parse_args([preset, *words, "--paraphrase_column", "other"])
        assert (data.dataset_name, data.dataset_config_name, data.train_data_dir) == (name, None, folder)
        assert (args.negative_caption_column, args.num_negative_captions, args.paraphrase_column) == (None, 1, "other")
        assert data.max_train_samples is None and data.resolution == 64 and data.center_crop
        assert "--negative_caption_column negative_texts" in caplog.text and "paraphrase" not in caplog.text
    paper = str(PRESETS / "ldm-paper-imagenet-ldm4.yaml")
    args, data, _ = train_ldm.parse_args([paper, "--dataset_name", "ILSVRC/imagenet-1k"])
    assert (data.dataset_name, data.train_data_dir, args.num_labels) == ("ILSVRC/imagenet-1k", None, None)
    assert train_ldm.parse_args([paper, "--dataset_name", "x", "--num_labels", "9"])[0].num_labels == 9


@pytest.mark.parametrize("condition, largest", [("class", 2), ("semantic", 4)])
def test_the_number_of_labels_follows_from_the_data(pictures, predecessors, tmp_path, condition, largest, caplog):
    words = [str(PRESETS / "paella-smoke.yaml"), "--train_data_dir", str(pictures), "--condition", condition]
    words += ["--max_train_steps", "1", "--resolution", "32", "--pretrained_vqvae_name_or_path", predecessors["vq"]]
    with caplog.at_level(logging.INFO):
        train_paella.main([*words, "--output_dir", str(tmp_path / "run")])
    assert PaellaUNet.from_pretrained(tmp_path / "run" / "unet").config["condition_dim"] == largest + 1
    assert f"is {largest}: {largest + 1} {'classes' if condition == 'class' else 'labels'}" in caplog.text
    again = ["--pretrained_model_name_or_path", str(tmp_path / "run"), "--output_dir", str(tmp_path / "again")]
    AcceleratorState._reset_state(reset_partial_state=True)
    train_paella.main([*words, *again])  # a pipeline tells how many it knows
    with pytest.raises(ValueError, match="11 classes|--num_labels=11"):
        train_paella.main([*words, *again, "--num_labels", "11", "--output_dir", str(tmp_path / "other")])


def class_rows(recipe: str, place: Path, folder: Path, *more: str):
    """Training and validation rows of a recipe that fine-tunes `place` on folders of classes, and the column."""
    words = ["--pretrained_model_name_or_path", str(place), "--train_data_dir", str(folder), *more]
    if recipe == "ldm":
        args, data, _ = train_ldm.parse_args(["ldm-smoke", "--task", "class", *words])
        return train_ldm.load_rows(train_ldm.TASKS["class"](args, data))
    if recipe == "cascaded":
        args, data, _ = train_cascaded.parse_args(["cascaded-smoke", *words])
        return train_cascaded.load_rows(args, data)
    args, data, _ = train_paella.parse_args(["paella-smoke", "--condition", "class", *words])
    return train_paella.load_rows(args, data, data.label_column)


@pytest.mark.parametrize("recipe", ["ldm", "cascaded", "paella"])
def test_folders_get_the_numbers_that_a_pretrained_network_knows_their_names_by(recipe, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (8, 8), "white" if name == "cat" else "black").save(
                tmp_path / "own" / name / f"{number}.png"
            )
    place = tmp_path / "pipe"
    place.mkdir()
    key = "id2label" if recipe == "paella" else "class_names"
    for known in (["fox", "dog", "cat"], ["cat", "dog", "fox"]):
        (place / "model_index.json").write_text(json.dumps({"_class_name": "X", key: dict(enumerate(known))}))
        for rows in class_rows(recipe, place, tmp_path / "own"):
            assert len(rows) in (1, 11)
            for row in (rows[index] for index in range(len(rows))):
                assert row["label"] == known.index("cat" if row["image"].getpixel((0, 0))[0] else "dog")
    (tmp_path / "own" / "cat" / "0.png").write_bytes(b"broken")  # another row stands in for it, with its own number
    (place / "model_index.json").write_text(
        json.dumps({"_class_name": "X", key: dict(enumerate(["dog", "fox", "cat"]))})
    )
    for rows in class_rows(recipe, place, tmp_path / "own", "--on_broken_picture", "skip", "--output_dir", str(place)):
        for row in (rows[index] for index in range(len(rows))):
            assert row["label"] == (2 if row["image"].getpixel((0, 0))[0] else 0)
    (place / "model_index.json").write_text(json.dumps({"_class_name": "X", key: {"0": "fox", "1": "dog"}}))
    with pytest.raises(ValueError, match="knows the classes fox, dog, but the data have others: cat"):
        class_rows(recipe, place, tmp_path / "own")


def test_says_which_numbers_folders_become_in_a_network_without_names(caplog):
    warn_of_numbers(Classes(3, ["cat", "dog", "fox"]), 3, "place")
    warn_of_numbers(Classes(3), 1000, "place")  # numbers are numbers
    assert not caplog.text
    warn_of_numbers(Classes(3, ["cat", "dog", "fox"]), 1000, "place")
    assert "knows 1000 classes by number" in caplog.text and "cat is 0, dog is 1" in caplog.text


def test_the_built_in_classes_keep_their_numbers(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "X", "class_names": {"0": "red circle"}}))
    words = ["cascaded-smoke", "--pretrained_model_name_or_path", str(tmp_path)]
    args, data, _ = train_cascaded.parse_args(words)
    with pytest.raises(ValueError, match="knows the classes red circle, but the data have others"):
        train_cascaded.load_rows(args, data)
    names = dict(enumerate(CLASS_NAMES))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "X", "class_names": names}))
    assert len(train_cascaded.load_rows(args, data)[0])
