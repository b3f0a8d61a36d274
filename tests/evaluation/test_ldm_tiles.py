"""benchmarks/quality_ldm_tiles.py: what it calls a seam, and the script on a tiny pipeline."""

import runpy
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pipelines.tiny_ldm import pipeline_class, tiny_ldm_components

from diffusers_ext.data.scenes import SHAPES
from diffusers_ext.models.encoders_ldm import LDMSpatialRescaler


@pytest.fixture(scope="module")
def script(repo_root) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / "quality_ldm_tiles.py")))


def test_seams_are_told_from_texture(script):
    noise = np.random.default_rng(0).integers(100, 130, (64, 64, 3)).astype(np.uint8)
    nothing = np.zeros((64, 64), dtype=np.uint8)
    assert script.border_ratio(noise, nothing, 32, 16) == pytest.approx(1, abs=0.1)
    seams = noise + (np.arange(64) // 16 % 2 * 30).astype(np.uint8)[:, None, None]
    assert script.border_ratio(seams, nothing, 32, 16) > 1.5
    grid = noise + (np.arange(64) // 4 % 2 * 30).astype(np.uint8)[:, None, None]  # of the first stage, no seams
    assert script.border_ratio(grid, nothing, 32, 16) > 1.3
    assert script.border_ratio(grid, nothing, 32, 16, 4) == pytest.approx(1, abs=0.1)
    assert script.border_ratio(seams, nothing, 32, 16, 4) > 1.5
    objects = nothing.copy()
    objects[8:56] = 1  # seams among objects do not count, nor next to them
    assert script.border_ratio(seams, objects, 32, 16) == pytest.approx(1, abs=0.15)


def test_mosaics_repeat_held_out_maps(script):
    labels = script.mosaic(80, 32)
    assert labels.shape == (80, 80) and labels.max() <= len(SHAPES)
    assert all(labels[top : top + 32, left : left + 32].any() for top in (0, 32) for left in (0, 32))


def test_the_script_on_a_tiny_pipeline(repo_root, warm_python, tmp_path):
    parts = tiny_ldm_components("semantic") | {"label_names": ["ground", *SHAPES], "label_palette": None}
    parts["spatial_rescaler"] = LDMSpatialRescaler(len(SHAPES) + 1, 3)
    parts["unet"].register_to_config(sample_size=8)
    pipeline_class("semantic")(**parts).save_pretrained(tmp_path / "pipe")
    small = ["--size", "64", "--tile_size", "32", "--num_inference_steps", "1", "--whole"]
    command = [str(repo_root / "benchmarks" / "quality_ldm_tiles.py"), str(tmp_path / "pipe"), *small]
    done = warm_python.run(*command, "--output", str(tmp_path / "tiles.png"))
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "MiB" in line]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [
        "tiles that overlap by half", "tiles that touch", "in one piece",
    ]  # fmt: skip
    assert Image.open(tmp_path / "tiles.png").size == (64, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["elsewhere"], "'elsewhere' is no pipeline folder"),
        (["--tile_size", "2048"], "--tile_size must be even and at most --size (1024), received 2048"),
    ],
)
def test_bad_options_are_refused(script, tmp_path, capsys, options, message):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(SystemExit):
        script.parse_args([*([] if options[0] == "elsewhere" else [str(tmp_path)]), *options])
    assert message in capsys.readouterr().err
