"""benchmarks/quality_paella_modes.py: the checks on true pictures, and the whole script on a tiny pipeline."""

import json
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from pipelines.tiny_paella import tiny_paella_components

from diffusers_ext.data.scenes import full_caption, render, sample_scene
from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline


@pytest.fixture(scope="module")
def script(repo_root) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / "quality_paella_modes.py")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("paella")
    PaellaPipeline(**tiny_paella_components(image_encoder=True)).save_pretrained(folder)
    return str(folder)


def test_every_mode_on_a_tiny_pipeline(script, folder, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    small = ["--num_cases", "3", "--batch_size", "2", "--num_inference_steps", "2", "--json", str(figures)]
    options = ["--checkpoint", folder, "--variation_checkpoint", folder, "--grid_dir", str(tmp_path / "grids")]
    assert script.main([*options, *small]) == 0
    found, told = json.loads(figures.read_text()), capsys.readouterr().out
    assert list(found) == list(script.MODES) and all(f"| {mode} |" in told for mode in script.MODES)
    for mode in ("inpaint", "outpaint"):
        kept = found[mode][0]
        assert "unchanged" in kept["measured"] and kept["value"]["value"] == 1.0 and kept["value"]["count"] == 3
    assert all((tmp_path / "grids" / f"{mode}.png").is_file() for mode in script.MODES)
    assert Image.open(tmp_path / "grids" / "inpaint.png").width > 3 * 32


def test_the_image_adapter_inside_a_text_checkpoint_serves_for_variations(script, folder, tmp_path):
    pipe = PaellaPipeline(**tiny_paella_components(image_encoder=True))
    targets = [name for name, module in pipe.unet.named_modules() if isinstance(module, torch.nn.Linear)]
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    pipe.unet.save_lora_adapter(tmp_path / "image_adapter")
    pipe.unet.unload_lora()
    pipe.save_pretrained(tmp_path)

    def grid(name, *options):
        small = ["--num_cases", "2", "--num_inference_steps", "2", "--grid_dir", str(tmp_path / name)]
        assert script.main(["--checkpoint", str(tmp_path), "--modes", "variation", *small, *options]) == 0
        return np.asarray(Image.open(tmp_path / name / "variation.png"))

    assert (grid("adapted") != grid("plain", "--variation_checkpoint", str(tmp_path))).any()


def test_a_changed_token_is_a_failure(script, folder, monkeypatch):
    original = script.Bench.run
    monkeypatch.setattr(script.Bench, "run", lambda *words, **options: original(*words, **options) ^ 1)
    arguments = ["--checkpoint", folder, "--modes", "outpaint", "--num_cases", "2", "--num_inference_steps", "1"]
    assert script.main(arguments) == 1


def test_no_seam_where_kept_and_drawn_meet(script, repo_root):
    checkpoint = str(repo_root / "checkpoints" / "paella-scenes-64")
    bench = script.Bench(script.parse_args(["--checkpoint", checkpoint, "--num_cases", "4"]))
    rows, columns = script.seam(bench)
    (_, outpainting, of_tokens), (_, inpainting, _) = rows
    assert outpainting <= 2 and inpainting <= 2
    assert of_tokens > 4  # tokens of the picture by itself describe a border: what a seam looks like
    assert columns[1][0].shape == (64, 128, 3)


def test_the_ratio_at_a_join(script):
    noise = np.random.default_rng(0).integers(100, 130, (64, 64, 3)).astype(np.uint8)
    mask = np.zeros((64, 64), dtype=bool)
    mask[20:40, 30:] = True
    assert script.join_ratio([noise], [mask]) == pytest.approx(1, abs=0.1)
    assert script.join_ratio([noise + 60 * mask[..., None].astype(np.uint8)], [mask]) > 4


def test_checks_on_true_pictures(script):
    scenes = [sample_scene(0, i, split="test", num_objects=2, grounds=("plain",)) for i in range(24)]
    pictures = [render(scene, 64) for scene in scenes]
    right, chance = script.followed(pictures, [full_caption(scene) for scene in scenes])
    assert right.value > 0.95 and chance.value < 0.1
    changed = [script.renamed(scene, i % 2) for i, scene in enumerate(scenes)]
    assert script.followed([render(scene, 64) for scene in changed], [full_caption(s) for s in changed])[0].value > 0.9
    assert script.followed(pictures, [full_caption(scene) for scene in changed])[0].value == 0.0
    maps = np.stack([script.object_map(picture) for picture in pictures])
    assert script.correlation(maps, maps) == pytest.approx(1.0)
    assert script.correlation(maps, np.roll(maps, 1, axis=0)) < 0.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "no/such"], "is no pipeline folder"),
        (["--checkpoint", "FOLDER", "--num_cases", "1"], "--num_cases must be at least 2"),
        (["--checkpoint", "FOLDER", "--modes", "variation"], "needs --variation_checkpoint"),
    ],
)
def test_bad_arguments(script, folder, arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.parse_args([folder if word == "FOLDER" else word for word in arguments])
    assert message in capsys.readouterr().err
