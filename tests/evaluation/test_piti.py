"""benchmarks/*_piti.py: the figures on true pictures, the commands on tiny pipelines with random weights."""

import json
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines.tiny_glide import tiny_glide, tiny_piti

from diffusers_ext import PITIPipeline
from diffusers_ext.data.scenes import SHAPES

KINDS = ("label_map", "sketch", "geometry")
SMALL = ["--num_cases", "3", "--batch_size", "2", "--num_inference_steps", "2"]


@pytest.fixture(scope="module")
def load(repo_root):
    """A command of benchmarks/ by name."""
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        yield lambda name: SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / f"{name}.py")))
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))


@pytest.fixture(scope="module")
def parts(load) -> SimpleNamespace:
    load("quality_piti")
    return SimpleNamespace(**vars(sys.modules["parts.piti_scenes"]))


def scenes_pipeline(kind: str, upscale: bool = True) -> PITIPipeline:
    """A tiny pipeline that knows the labels of `scenes`."""
    pipe = tiny_piti(kind, upscale=upscale)
    if kind == "label_map":
        palette = [[40 * label, 255 - 40 * label, 128] for label in range(len(SHAPES) + 1)]
        pipe = PITIPipeline(**pipe.components, label_palette=palette, label_names=["ground", *SHAPES])
    return pipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("piti")
    for kind in KINDS:
        scenes_pipeline(kind).save_pretrained(root / kind)
    scenes_pipeline("sketch", upscale=False).save_pretrained(root / "small")
    return {path.name: str(path) for path in root.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_true_pictures_follow_and_others_do_not(parts, kind):
    scenes = parts.held_out_scenes("plain+one", 48)
    for side, least in ((64, 0.9), (32, 0.8)):
        pictures = parts.true_pictures(scenes, side)
        right = {name: parts.as_number(one) for name, one in parts.fidelity(kind, pictures, scenes).items()}
        wrong = {name: parts.as_number(one) for name, one in parts.shuffled_fidelity(kind, pictures, scenes).items()}
        assert list(right) == list(wrong) and parts.FIDELITY[kind] in right
        assert min(right.values()) >= least and right["all shapes right"] >= 0.95
        assert wrong.pop("objects of named shapes") == right["objects of named shapes"]
        assert max(wrong.values()) < 0.5
    noise = {
        name: parts.as_number(one) for name, one in parts.fidelity(kind, torch.rand(4, 3, 64, 64), scenes[:4]).items()
    }
    assert max(noise.values()) == 0


def test_two_objects_are_judged_each_in_its_place(parts):
    scenes = parts.held_out_scenes("plain+two", 24)
    pictures = parts.true_pictures(scenes, 64)
    figures = parts.fidelity("sketch", pictures, scenes)
    assert figures["recall, large objects"].count + figures["recall, small objects"].count == 48
    assert min(parts.as_number(one) for one in figures.values()) > 0.9
    turned = parts.fidelity("sketch", pictures.flip(-1, -2), scenes)
    assert turned["all shapes right"].value > 0.9 and turned["recall, large objects"].value < 0.5


def test_conditions_are_what_the_pipeline_takes(parts):
    """Lines without grey rims, metres, unit normals; each scene gives another condition."""
    scenes = parts.held_out_scenes("plain+one", 4)
    for kind in KINDS:
        given = [parts.condition_of(kind, scene, 32) for scene in scenes]
        read = scenes_pipeline(kind).read_conditions(
            **{key: np.stack([one[key] for one in given]) for key in given[0]}
        )
        assert read.shape[0] == 4 and read.min() >= -1 and read.max() <= 1
        assert all(not torch.equal(read[0], one) for one in read[1:])
    assert set(np.unique(parts.condition_of("sketch", scenes[0], 64)["sketch"])) == {0, 255}
    lines = parts.condition_of("sketch", scenes[0], 64)["sketch"]
    assert 20 < (lines == 255).sum() < 64 * 64 / 8  # an outline, neither nothing nor an area


def test_quality_of_every_condition(load, folders, tmp_path, capsys):
    figures, grid = tmp_path / "figures.json", tmp_path / "grid.png"
    script = load("quality_piti")
    script.main([*(folders[kind] for kind in KINDS), *SMALL, "--upscale_num_inference_steps", "2",
                 "--guidance_scale", "2", "--grid", str(grid), "--json", str(figures)])  # fmt: skip
    rows, told = json.loads(figures.read_text()), capsys.readouterr().out
    assert [row["condition"] for row in rows] == list(KINDS) and {row["side"] for row in rows} == {16}
    for row in rows:
        assert row["figures"].keys() == row["shuffled"].keys() == row["true"].keys()
        assert all(f"| {row['checkpoint']} | {row['condition']} | 16 | {name} |" in told for name in row["figures"])
        assert row["figures"]["all shapes right"]["count"] == 3
    assert Image.open(grid).size == (3 * 18 + 2, 6 * 18 + 2)


def test_a_stage_alone_and_batches_change_nothing(load, folders, tmp_path):
    script, found = load("quality_piti"), []
    for batch in ("1", "3"):
        path = tmp_path / f"{batch}.json"
        script.main([folders["sketch"], *SMALL, "--stage", "base", "--batch_size", batch, "--json", str(path)])
        found.append(json.loads(path.read_text()))
    assert found[0] == found[1] and found[0][0]["side"] == 8


def test_what_cannot_be_measured_is_refused(load, folders, tmp_path, capsys):
    script = load("quality_piti")
    tiny_glide(upscale=False).save_pretrained(tmp_path / "glide")
    for words, message in (
        (["elsewhere"], "'elsewhere' is no pipeline folder"),
        ([str(tmp_path / "glide")], "holds a GlidePipeline: this command measures a PITIPipeline"),
        ([folders["sketch"], "--num_cases", "1"], "--num_cases must be at least 2, received 1"),
        ([folders["sketch"], "--scenes", "forest"], "--scenes: `grounds` must name some of"),
    ):
        with pytest.raises(SystemExit):
            script.main(words)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="has no upsampler: leave out --stage upscale"):
        script.main([folders["small"], *SMALL, "--stage", "upscale"])
