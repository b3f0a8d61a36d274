"""benchmarks/quality_ldm_{tasks,regression}.py: the checks on true pictures, the scripts on tiny pipelines."""

import json
import math
import runpy
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from pipelines.tiny_ldm import CONTEXT_DIM, pipeline_class, tiny_ldm_components

from diffusers_ext.data.scenes import CLASS_NAMES, SHAPES, boxes, render, sample_scene
from diffusers_ext.data.scenes_verifier import read_picture
from diffusers_ext.models.encoders_ldm import LDMClassEmbedder, LDMLayoutEncoder, LDMSpatialRescaler

SIDE = 32  # the least that `scenes` draws


@pytest.fixture(scope="module")
def script(repo_root):
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        yield SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / "quality_ldm_tasks.py")))
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """A pipeline a task that knows the classes of `scenes`; weights are random."""
    root = tmp_path_factory.mktemp("ldm")
    found = []
    for task in ("unconditional", "inpaint", "upscale", "semantic", "layout", "class", "text"):
        parts = tiny_ldm_components(task)
        parts["unet"].register_to_config(sample_size=SIDE // 4)
        if task == "class":
            count = len(CLASS_NAMES)
            parts |= {"class_embedder": LDMClassEmbedder(count + 1, CONTEXT_DIM, null_class=count)}
            parts["class_names"] = list(CLASS_NAMES)
        if task == "layout":
            parts["layout_encoder"] = LDMLayoutEncoder(
                vocab_size=256, max_length=14, hidden_size=CONTEXT_DIM, num_layers=1, num_attention_heads=2,
                attention_head_dim=8,
            )  # fmt: skip
            parts["class_names"] = list(CLASS_NAMES)
        if task == "semantic":
            parts["spatial_rescaler"] = LDMSpatialRescaler(len(SHAPES) + 1, 3)
            parts |= {"label_names": ["ground", *SHAPES], "label_palette": None}
        pipeline_class(task)(**parts).save_pretrained(root / task)
        found.append(str(root / task))
    return found


def test_every_task_on_tiny_pipelines(script, folders, tmp_path, capsys):
    figures, grids = tmp_path / "figures.json", tmp_path / "grids"
    small = ["--num_cases", "3", "--batch_size", "2", "--num_inference_steps", "1", "--guidance_scales", "1"]
    script.main([*folders, *small, "--grid_dir", str(grids), "--json", str(figures)])
    rows, told = json.loads(figures.read_text()), capsys.readouterr().out
    tasks = [row["task"] for row in rows]
    assert tasks == sorted(tasks, key=["text", "class", "layout", "semantic", "super_resolution", "inpainting",
                                       "unconditional"].index)  # fmt: skip
    assert len(set(tasks)) == 7 and tasks.count("text") == 9 and tasks.count("class") == 2
    assert all(f"| {row['task']} | {row['measured']} |" in told for row in rows)
    counts = {row["task"]: row["value"]["count"] for row in rows if isinstance(row["value"], dict)}
    layouts = [boxes(sample_scene(0, i, split="test", grounds=("plain",))) for i in range(3)]
    assert counts == {"text": 3, "class": 3, "layout": sum(map(len, layouts)), "unconditional": 3}
    assert all(math.isfinite(row["value"]) for row in rows if not isinstance(row["value"], dict))
    assert all((grids / f"{task}.png").is_file() for task in tasks)


def test_the_regression_trains_and_takes_its_part_in_the_table(script, folders, repo_root, tmp_path, capsys):
    regression = SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / "quality_ldm_regression.py")))
    output = str(tmp_path / "regression")
    upscale = next(folder for folder in folders if folder.endswith("upscale"))
    small = ["--max_train_steps", "40", "--train_batch_size", "4"]
    regression.main([upscale, "--output_dir", output, *small])
    trained = sys.modules["parts.pixel_regression"].load_regression(output)
    true, low = regression.draw_batch(1000, 8, SIDE)
    with torch.no_grad():
        error = (trained(low) - true).square().mean()
        torch.nn.init.zeros_(trained.unet.conv_out.weight), torch.nn.init.zeros_(trained.unet.conv_out.bias)
        enlarged = (trained(low) - true).square().mean()  # without the network: bicubic enlargement
    assert low.shape == (8, 3, SIDE // 4, SIDE // 4) and error < enlarged
    script.main([upscale, "--num_cases", "2", "--num_inference_steps", "1", "--regression", output])
    assert capsys.readouterr().out.count("without: image regression") == 3


@pytest.fixture(scope="module")
def checks(script) -> SimpleNamespace:
    return SimpleNamespace(**vars(sys.modules["parts.ldm_task_checks"]))


def test_true_pictures_hold_their_boxes_and_no_others(checks):
    scenes = [sample_scene(0, i, split="test") for i in range(40)]
    found = [read_picture(render(scene)) for scene in scenes]
    layouts = [boxes(scene) for scene in scenes]
    assert sum(checks.boxes_held(found, layouts)) >= 0.98 * sum(map(len, layouts))
    assert sum(checks.boxes_held(found, checks.next_case(layouts))) <= 0.1 * sum(map(len, layouts))
    mirrored = [[replace(item, center=(1 - item.center[0], item.center[1])) for item in objects] for objects in found]
    assert sum(checks.boxes_held(mirrored, layouts)) < sum(checks.boxes_held(found, layouts))


def test_box_overlap(checks):
    assert checks.box_overlap((0, 0, 1, 1), (0, 0, 1, 1)) == 1
    assert checks.box_overlap((0, 0, 1, 1), (0.5, 0, 1.5, 1)) == pytest.approx(1 / 3)
    assert checks.box_overlap((0, 0, 0.4, 0.4), (0.5, 0.5, 1, 1)) == 0


def test_picture_figures(checks):
    flat, step = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    step[..., 8:] = 1
    assert checks.sharpness(flat) == 0 and checks.sharpness(step) == pytest.approx(1 / 15)
    assert checks.ssim(step, step) == 1 and checks.ssim(flat, step) < 1
    hole = torch.zeros(1, 1, 16, 16)
    hole[..., 8:12] = 1
    assert checks.psnr_inside(flat, step, hole) == pytest.approx(10 * math.log10(4))  # an error of 1, range 2
    assert checks.psnr_inside(step, step, hole) == pytest.approx(126, abs=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_cases", "1"], "--num_cases must be at least 2, received 1"),
        (["--num_inference_steps", "0"], "--num_inference_steps must be at least 1, received 0"),
        (["elsewhere"], "'elsewhere' is no pipeline folder: it holds no model_index.json"),
    ],
)
def test_bad_options_are_refused(script, folders, capsys, options, message):
    with pytest.raises(SystemExit):
        script.parse_args([folders[0], *options])
    assert message in capsys.readouterr().err


def test_grids_show_condition_result_and_truth(script, folders, tmp_path):
    inpaint = next(folder for folder in folders if folder.endswith("inpaint"))
    script.main([inpaint, "--num_cases", "2", "--num_inference_steps", "1", "--grid_dir", str(tmp_path)])
    assert Image.open(tmp_path / "inpainting.png").size == (12 * (SIDE + 2) + 2, SIDE + 4)
