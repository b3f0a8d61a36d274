"""benchmarks/quality_paella_prompts.py, on a tiny pipeline with random weights and on true pictures."""

import json
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pipelines.tiny_paella import tiny_paella_components

from diffusers_ext.data.scenes import full_caption, parse_caption, render, sample_scene
from diffusers_ext.data.scenes_verifier import check, read_picture
from diffusers_ext.evaluation.prompt_following import judge, judge_by_chance, summarize_by_objects
from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline


@pytest.fixture(scope="module")
def script(repo_root) -> SimpleNamespace:
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        return SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / "quality_paella_prompts.py")))
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("paella")
    PaellaPipeline(**tiny_paella_components()).save_pretrained(folder)
    return str(folder)


def test_true_pictures_follow_their_captions_and_not_those_of_others():
    scenes = [sample_scene(0, i, split="test", num_objects=1 + i % 2) for i in range(120)]
    found = [read_picture(render(scene, 64)) for scene in scenes]
    wanted = [parse_caption(full_caption(scene)) for scene in scenes]
    rows = summarize_by_objects(judge(found, wanted, check=check), judge_by_chance(found, wanted, check=check))
    assert [row.shape_and_color.count for row in rows] == [60, 60, 120]
    assert all(row.shape_and_color.value > 0.98 and row.everything.value > 0.95 for row in rows)
    assert all(row.chance.value < 0.15 and row.chance_everything.value < 0.1 for row in rows)


def test_table_figures_and_grid(script, folder, tmp_path, capsys):
    figures, grid = tmp_path / "figures.json", tmp_path / "grid.png"
    arguments = [folder, "--num_prompts", "5", "--seeds", "3", "4", "--steps", "2", "1", "--num_true_pictures", "4"]
    script.main([*arguments, "--batch_size", "2", "--grid", str(grid), "--json", str(figures)])
    out = capsys.readouterr().out
    assert "5 prompts, seed 3, 4, guidance 3, typical mass 0.6" in out
    for start in ("| 2 steps | 1 object | 6 |", "| 1 steps | 2 objects | 4 |", "| tokenizer alone | all | 4 |"):
        assert start in out
    assert "Prompts followed at 2 steps: shape and colour" in out
    saved = json.loads(figures.read_text())
    assert [setting["steps"] for setting in saved["settings"]] == [2, 1]
    row = saved["settings"][0]["rows"][-1]
    assert row["label"] == "all" and row["shape_and_color"]["count"] == row["chance"]["count"] == 10
    assert saved["tokenizer"][-1]["shape_and_color"]["count"] == 4
    assert Image.open(grid).width == 3 * (192 + 16) + 8  # 5 pictures, 3 a row


def test_settings_that_are_tried_reach_the_sampler(script, folder, capsys):
    script.main([folder, "--num_prompts", "2", "--steps", "1", "--guidance_scale", "1", "4", "--typical_mass", "0.5",
                 "--temperature", "0.7", "0.2", "--num_true_pictures", "0"])  # fmt: skip
    out = capsys.readouterr().out
    assert "| 1 steps, guidance 1 | all | 2 |" in out and "| 1 steps, guidance 4 | all | 2 |" in out
    assert "typical mass 0.5, temperature 0.7 to 0.2" in out and "tokenizer" not in out


def test_pictures_do_not_depend_on_the_batch_size(script, folder):
    pipe = PaellaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a large red circle", "a small blue star", "a ring"]
    draw = script.sample_pictures
    together, apart = (draw(pipe, prompts, 1, size, "cpu", num_inference_steps=2) for size in (3, 2))
    assert len(together) == 3 and together[0].dtype == np.uint8
    np.testing.assert_array_equal(together, apart)
    assert np.abs(together[0].astype(int) - draw(pipe, prompts, 2, 3, "cpu", num_inference_steps=2)[0]).max() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder"], "is no pipeline folder"),
        (["FOLDER", "--num_prompts", "0"], "--num_prompts must be at least 1, received 0"),
        (["FOLDER", "--batch_size", "-2"], "--batch_size must be at least 1, received -2"),
        (["FOLDER", "--seed", "1"], "unrecognized arguments: --seed 1"),
    ],
)
def test_bad_arguments(script, folder, capsys, arguments, message):
    with pytest.raises(SystemExit):
        script.main([folder if word == "FOLDER" else word for word in arguments])
    assert message in capsys.readouterr().err
