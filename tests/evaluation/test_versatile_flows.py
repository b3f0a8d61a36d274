"""benchmarks/quality_versatile_{flows,figures,frechet}.py: the checks on true cases, and a tiny pipeline."""

import json
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines.tiny_versatile import tiny_versatile_components

from diffusers_ext.data.scenes import (
    WantedObject,
    captions,
    full_caption,
    hard_negatives,
    parse_caption,
    render,
    sample_scene,
)
from diffusers_ext.data.scenes_verifier import check_caption, read_picture
from diffusers_ext.evaluation.frechet import frechet_distance
from diffusers_ext.models.unet_versatile import VersatileUNet
from diffusers_ext.pipelines.versatile.pipeline_versatile import VersatilePipeline

SMALL = ["--num_inference_steps", "2", "--batch_size", "3"]


def load(repo_root, name: str) -> SimpleNamespace:
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        return SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / name)))
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))


@pytest.fixture(scope="module")
def script(repo_root) -> SimpleNamespace:
    return load(repo_root, "quality_versatile_flows.py")


@pytest.fixture(scope="module")
def figures(repo_root) -> SimpleNamespace:
    return load(repo_root, "quality_versatile_figures.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Sixteen pixels, the least that `scenes` draws; weights are random."""
    folder = tmp_path_factory.mktemp("versatile")
    VersatilePipeline(**tiny_versatile_components()).save_pretrained(folder)
    return str(folder)


def test_every_row_of_the_table(script, folder, tmp_path, capsys):
    saved = tmp_path / "figures.json"
    dual = ["--text_ratios", "0.4", "--mixings", "attention", "layer", "--focus", "0.5", "1"]
    script.main([folder, *SMALL, "--num_cases", "4", "--seeds", "3", "4", *dual, "--json", str(saved)])
    printed, rows = capsys.readouterr().out, json.loads(saved.read_text())["rows"]
    assert "4 cases a flow, seed 3, 4, 2 steps, guidance 3, temperature of words 0" in printed
    named = {(row["flow"], row["measured"]): row for row in rows}
    for flow in ("text-to-image", "image-to-image", "image-to-text"):
        row = named[flow, "all: shape and colour"]
        assert row["value"]["count"] == row["shuffled"]["count"] == 8
        assert row["across_seeds"] >= 0 and named[flow, "2 objects: everything"]["value"]["count"] == 4
    assert named["text-to-text", "all: shape and colour, in other words"]["value"]["count"] == 8
    settings = {row["flow"] for row in rows if row["flow"].startswith("dual")}
    assert settings == {f"dual, {way}, text 0.4{end}" for way in ("attention", "layer") for end in ("", ", focus 1")}
    assert {"image autoencoder alone", "text autoencoder alone"} <= {row["flow"] for row in rows}
    assert printed.count("\n| ") == 1 + len(rows)  # the heading and every row


def test_a_checkpoint_of_some_flows(repo_root, script, figures, tmp_path, capsys):
    parts = tiny_versatile_components()
    sizes = {name: value for name, value in parts["unet"].config.items() if not name.startswith("_")}
    parts["unet"] = VersatileUNet(**{**sizes, "flows": ["image-to-image"]})
    VersatilePipeline(**parts).save_pretrained(tmp_path)
    script.main([str(tmp_path), *SMALL, "--num_cases", "4"])
    printed = capsys.readouterr().out
    assert "| image-to-image |" in printed and "-text |" not in printed and "| dual" not in printed
    frechet = load(repo_root, "quality_versatile_frechet.py")
    VersatilePipeline.from_pretrained(tmp_path, flows=["image-to-image"]).save_pretrained(tmp_path / "no-texts")
    frechet.main([str(tmp_path / "no-texts"), *SMALL, "--num_cases", "6", "--guidance_scales", "1"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("| - |")  # no text encoder to score by
    VersatilePipeline(**{**parts, "image_encoder": None, "feature_extractor": None}).save_pretrained(
        tmp_path / "blind"
    )
    with pytest.raises(SystemExit, match="measured by the checkpoint's image encoder: .* has image-to-image"):
        frechet.main([str(tmp_path / "blind"), *SMALL])
    with pytest.raises(SystemExit, match="--flows names dual; the checkpoint has image-to-image"):
        script.main([str(tmp_path), "--flows", "dual"])
    with pytest.raises(SystemExit, match="--figures names edit; .* can make image-to-image, focus, fidelity, colors"):
        figures.main([str(tmp_path), "--grid_dir", str(tmp_path), "--figures", "edit"])


def test_samples_do_not_depend_on_the_batch_size(script, folder):
    drawn = []
    for size in ("2", "4"):
        bench = script.Bench(script.parse_args([folder, "--batch_size", size, "--num_inference_steps", "2"]))
        pictures = bench.render(bench.scenes(4))
        drawn.append((np.stack(bench.sample(1, image=pictures)).astype(int), bench.sample(1, "text", image=pictures)))
    (together, texts), (apart, others) = drawn
    assert np.abs(together - apart).max() <= 1 and texts == others
    again = np.stack(bench.sample(2, image=pictures))
    assert np.abs(together - again).max() > 1


def test_true_captions_are_judged_right(script, folder):
    bench = script.Bench(script.parse_args([folder]))
    scenes = bench.scenes(40)
    wanted = [parse_caption(full_caption(scene)) for scene in scenes]
    assert [len(one) for one in wanted[:4]] == [1, 2, 1, 2] and all(scene.split == "test" for scene in scenes)
    for scene, asked in zip(scenes, wanted, strict=True):
        assert all(check_caption(caption, asked) == (True, True) for caption in captions(scene))
        assert all(check_caption(caption, asked)[1] is False for caption in hard_negatives(scene))
    asked = parse_caption("a large red ring to the left of a small blue star")
    for text, verdict in (
        ("a red ring and a blue star", (True, True)),
        ("a blue star and a red ring", (True, True)),
        ("a small red ring to the left of a small blue star", (True, False)),
        ("a large red ring to the right of a small blue star", (True, False)),
        ("a red ring and a red ring", (False, False)),
        ("a large red ring", (False, False)),
        ("a red ring, a blue star and a red ring", (False, False)),
        ("ring ring the", (False, False)),
        ("", (False, False)),
    ):
        assert check_caption(text, asked) == verdict, text


def test_dual_cases_disagree_in_shape_and_colour_alone(script, folder):
    bench = script.Bench(script.parse_args([folder]))
    texts, scenes, pairs = script.dual_cases(bench, 36)
    for text, scene, (told, shown) in zip(texts, scenes, pairs, strict=True):
        (asked,), item = parse_caption(text), scene.objects[0]
        assert (asked.shape, asked.color) == (told.shape, told.color)
        assert (item.shape, item.color) == (shown.shape, shown.color)
        assert told.shape != shown.shape and told.color != shown.color
        assert (asked.size, asked.place) == (item.size, item.place)
        origins = {
            (told.shape, told.color): "both of the text",
            (shown.shape, shown.color): "both of the picture",
            (shown.shape, told.color): "colour of the text, shape of the picture",
            (told.shape, shown.color): "colour of the picture, shape of the text",
            ("", ""): "",
        }
        assert {found: script.origin(*found, told, shown) for found in origins} == origins
    assert script.origin("ring", "red", WantedObject("star", "red"), WantedObject("cross", "blue")) == ""


def test_a_grid_for_every_figure(figures, folder, tmp_path, capsys):
    sizes = ["--num_cases", "2", "--num_draws", "2"]
    figures.main([folder, *SMALL, *sizes, "--grid_dir", str(tmp_path / "grids")])
    assert capsys.readouterr().out.split() == [str(tmp_path / "grids" / f"{name}.png") for name in figures.FIGURES]
    columns = {"text-to-image": 3, "image-to-text": 3, "dual": 8, "blender": 10, "focus": 6, "edit": 5, "colors": 4}
    for name, count in columns.items():
        picture = Image.open(tmp_path / "grids" / f"{name}.png")
        assert picture.size == (6 + 118 * count, 20 + 118 * 2)
        if name != "image-to-text":  # its samples are words
            last = picture.crop((picture.width - 118, 20, picture.width - 6, 132))  # a sample, without the gaps
            assert np.asarray(last).std() > 5, name


def test_what_the_figures_are_made_of(figures, folder, tmp_path):
    bench = figures.Bench(figures.parse_args([folder, *SMALL, "--grid_dir", str(tmp_path), "--num_cases", "2"]))
    heads, columns = figures.dual(bench)
    cells = dict(zip(heads, columns, strict=True))
    alone = bench.sample(0, image=cells["picture"])
    assert all(np.array_equal(*pair) for pair in zip(cells["text 0"], alone, strict=True))
    alone = bench.sample(0, prompt=cells["text"])
    assert all(np.array_equal(*pair) for pair in zip(cells["text 1"], alone, strict=True))
    heads, columns = figures.fidelity(bench)
    near = np.stack(columns[-1]).astype(int) - np.stack([np.asarray(one) for one in columns[0]])
    assert heads[-1] == "fidelity 1" and np.abs(near).max() <= 1
    heads, columns = figures.blender(bench)
    assert len(heads) == len(columns) and {len(column) for column in columns} == {2}


def test_frechet_distances_over_guidance(repo_root, folder, capsys):
    frechet = load(repo_root, "quality_versatile_frechet.py")
    frechet.main([folder, *SMALL, "--num_cases", "6", "--guidance_scales", "1", "3"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][
        1:
    ]
    assert [row[:2] for row in rows[:4]] == [
        [flow, scale] for flow in ("text-to-image", "image-to-image") for scale in ("1", "3")
    ]
    assert [row[0] for row in rows[4:]] == [
        "other true pictures", "other true pictures, encoded and decoded", "noise"
    ]  # fmt: skip
    assert all(-1 <= float(row[3]) <= 1 for row in rows)
    bench = frechet.Bench(frechet.parse_args([folder]))  # by hand: the first six against the next
    vectors = frechet.features(bench, bench.render(bench.scenes(12)))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(12))
    assert float(rows[4][2]) == pytest.approx(frechet_distance(vectors[6:], vectors[:6]), abs=1e-4)
    for options, message in (
        (["--guidance_scale", "2"], "use --guidance_scales"),
        (["--guidance_scales", "-1"], "at least 0, received -1"),
    ):
        with pytest.raises(SystemExit):
            frechet.main([folder, *options])
        assert message in capsys.readouterr().err


def test_the_mask_keeps_the_first_of_two_objects(figures):
    for i in range(20):
        scene = sample_scene(0, i, split="test", num_objects=2, grounds=("plain",))
        picture = render(scene, 64) * figures.first_object_mask(scene, 64)[..., None]
        found = {(item.shape, item.color) for item in read_picture(picture)}
        assert [(item.shape, item.color) in found for item in scene.objects] == [True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such"], "is no pipeline folder"),
        (["FOLDER", "--num_cases", "3"], "--num_cases must be at least 4, received 3"),
        (["FOLDER", "--batch_size", "0"], "--batch_size must be at least 1, received 0"),
        (["FOLDER", "--num_inference_steps", "0"], "--num_inference_steps must be at least 1, received 0"),
        (["FOLDER", "--text_ratios", "0.5", "1"], "--text_ratios must lie between 0 and 1, received 1"),
        (["FOLDER", "--focus", "2"], "--focus must lie between 0 and 1, received 2"),
        (["FOLDER", "--flows", "text-to-sound"], "invalid choice: 'text-to-sound'"),
    ],
)
def test_bad_arguments(script, folder, arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.parse_args([folder if word == "FOLDER" else word for word in arguments])
    assert message in capsys.readouterr().err


def test_bad_arguments_of_the_figures(figures, folder, capsys):
    for arguments, message in (
        ([folder], "the following arguments are required: --grid_dir"),
        ([folder, "--grid_dir", "x", "--num_draws", "0"], "--num_draws must be at least 1, received 0"),
        ([folder, "--grid_dir", "x", "--figures", "none"], "invalid choice: 'none'"),
    ):
        with pytest.raises(SystemExit):
            figures.parse_args(arguments)
        assert message in capsys.readouterr().err
