"""benchmarks/claims_piti_upsampler.py: the ladder on tiny pipelines with random weights."""

import json
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from pipelines.tiny_glide import tiny_decoder, tiny_piti
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusers_ext import PITIPipeline


@pytest.fixture(scope="module")
def script(repo_root):
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        yield SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / "claims_piti_upsampler.py")))
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Two upsamplers from 16 to 32 pixels on one base stage, another size, a base alone, and a tower of a CLIP."""
    root = tmp_path_factory.mktemp("ladder")
    for name, seed, side in (("plain", 11, 32), ("sharp", 12, 32), ("large", 11, 64)):
        parts = tiny_piti("geometry").components
        parts |= {"unet": tiny_decoder(3, 16), "upscale_unet": tiny_decoder(6, side, seed)}
        PITIPipeline(**parts, condition_type="geometry").save_pretrained(root / name)
    tiny_piti("geometry", upscale=False).save_pretrained(root / "base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=4, **sizes)
    CLIPVisionModelWithProjection(config).save_pretrained(root / "clip")
    CLIPImageProcessor(size={"height": 16, "width": 16}).save_pretrained(root / "clip")
    return {path.name: str(path) for path in root.iterdir()}


def words(folders, *names: str) -> list[str]:
    return [
        *(folders[name] for name in names), "--feature_model", folders["clip"], "--num_cases", "3",
        "--batch_size", "2", "--num_inference_steps", "2", "--upscale_num_inference_steps", "2",
    ]  # fmt: skip


def test_a_row_each_on_both_inputs(script, folders, tmp_path, capsys):
    script.main([*words(folders, "plain", "sharp"), "--json", str(tmp_path / "rows.json")])
    rows, told = json.loads((tmp_path / "rows.json").read_text()), capsys.readouterr().out
    names = ["plain", "sharp", "bilinear enlargement"]
    assert [(row["upsampler"], row["input"]) for row in rows] == [(n, i) for n in names for i in ("true", "base")]
    assert "perceptual (clip-clip)" in told and "Frechet (clip-clip)" in told
    assert all(f"| {row['upsampler']} | {row['input']} | {row['gradient']:.3f} |" in told for row in rows)
    plain, sharp, bilinear = rows[::2]
    assert plain["PSNR"] != sharp["PSNR"]
    assert bilinear["gradient"] < 1 and bilinear["Laplacian"] < 0.5 and bilinear["PSNR"] > 15  # smooth, but true
    assert max(plain["PSNR"], sharp["PSNR"]) < bilinear["PSNR"] > rows[-1]["PSNR"]
    script.main([*words(folders, "plain"), "--batch_size", "3", "--json", str(tmp_path / "again.json")])
    again = json.loads((tmp_path / "again.json").read_text())
    for one, other in zip(again[:2], rows[:2], strict=True):  # batches change nothing
        assert one.pop("upsampler") == other.pop("upsampler") and one.pop("input") == other.pop("input")
        assert one == pytest.approx(other, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (("base",), (), "has no upsampler: train one with train_piti.py --stage upsampler"),
        (
            ("plain", "large"),
            (),
            "draws geometry at 32 pixels to 16, then 64, the first one geometry at",
        ),
        (("clip",), (), "no model_index.json"),
        (("plain",), ("--num_cases", "1"), "--num_cases must be at least 2, received 1"),
    ],
)
def test_what_it_cannot_measure_ends_with_a_message(script, folders, capsys, names, more, message):
    with pytest.raises(SystemExit):
        script.main([*words(folders, *names), *more])
    assert message in capsys.readouterr().err
