"""The scripts in pipelines/ that a user runs: each from a checkpoint on disk to a picture file."""

import importlib.util
from types import ModuleType

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image
from pipelines.tiny_ldm import TASKS, pipeline_class, tiny_labels, tiny_ldm, tiny_mask, tiny_picture


def script(repo_root, task) -> ModuleType:
    path = repo_root / "pipelines" / f"ldm_{task}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("task", TASKS)
def test_script(task, repo_root, tmp_path, capsys):
    tiny_ldm(task).save_pretrained(tmp_path / "checkpoint")
    tiny_picture(0, 16, 24).save(tmp_path / "picture.png")
    tiny_picture(0, 4, 6).save(tmp_path / "small.png")
    tiny_mask(16, 24).save(tmp_path / "mask.png")
    Image.fromarray(tiny_labels(0, 16, 24).astype(np.uint8)).save(tmp_path / "labels.png")
    picture, small, mask, labels = (str(tmp_path / f"{name}.png") for name in ("picture", "small", "mask", "labels"))
    size = ["--height", "16", "--width", "24"]
    own = {
        "unconditional": ["--image", picture, "--mask_image", mask, "--low_resolution", small],
        "class": ["star", "0", *size],
        "text": ["a red circle", "a star", "--negative_prompt", "blue", *size],
        "layout": ["circle 0.1 0.2 0.5 0.9", "star 0.6 0 1 0.4", *size],
        "semantic": [labels],
        "upscale": [small],
        "inpaint": [picture, mask],
    }[task]
    count = ["--batch_size" if task == "unconditional" else "--num_images_per_prompt", "3"]
    output = str(tmp_path / "grid.png")
    common = ["--num_inference_steps", "2", "--eta", "1", "--tile_size", "16", "--output", output]
    script(repo_root, task).main([str(tmp_path / "checkpoint"), *own, *count, *common])
    rows = 2 if task in ("class", "text", "layout") else 1
    assert Image.open(output).size == (3 * 24, rows * 16)
    assert f"{3 * rows} pictures" in capsys.readouterr().out


def test_a_box_that_is_none(repo_root, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script(repo_root, "layout").main([str(tmp_path), "circle 0.1 0.2"])
    assert "invalid named_box value: 'circle 0.1 0.2'" in capsys.readouterr().err


def test_as_custom_pipeline(repo_root, tmp_path):
    tiny_ldm("class").save_pretrained(tmp_path)
    file = str(repo_root / "pipelines" / "ldm_class.py")
    loaded = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=file, trust_remote_code=True)
    assert type(loaded) is pipeline_class("class")
