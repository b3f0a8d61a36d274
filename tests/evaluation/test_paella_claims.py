"""benchmarks/claims_paella.py on a tiny pipeline with random weights."""

import json
import runpy
import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from pipelines.tiny_paella import tiny_paella_components

from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline


@pytest.fixture(scope="module")
def script(repo_root) -> SimpleNamespace:
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        return SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / "claims_paella.py")))
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("paella")
    PaellaPipeline(**tiny_paella_components()).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("study", ["guidance", "typical", "steps", "renoising"])
def test_every_setting_of_a_study_is_a_row(script, folder, tmp_path, capsys, study):
    plot, figures = tmp_path / "figure.png", tmp_path / "figures.json"
    small = ["--num_prompts", "2", "--seeds", "0", "--num_inference_steps", "2", "--plot", str(plot)]
    script.main([study, "--checkpoint", folder, *small, "--json", str(figures)])
    labels = [label for label, *_ in script.settings(study, 2)]
    told, found = capsys.readouterr().out, json.loads(figures.read_text())["figures"]
    assert [one["label"] for one in found] == labels and all(f"| {label} |" in told for label in labels)
    assert all(row["shape_and_color"]["count"] == 1 for one in found for row in one["rows"][:2])
    assert Image.open(plot).size[0] > 300


def test_settings_reach_the_scheduler(script):
    changes = [change for _, _, change, _ in script.settings("renoising", 12)]
    assert {(one["renoise_mode"], one["renoise_positions"]) for one in changes} == {
        (mode, positions) for mode in ("start", "prev", "rand") for positions in ("random", "confidence")
    }
    assert [call["guidance_scale"] for *_, call in script.settings("guidance", 12)][::7] == [0.0, 8.0]
    assert {call["num_inference_steps"] for *_, call in script.settings("steps", 12)} == {1, 2, 4, 8, 12, 24}


def test_line_and_its_deviation(script):
    straight = [{"position": x, "seconds": 0.5 + 0.1 * x} for x in (1, 2, 4, 8)]
    slope, offset, deviation = script.fit_line(straight)
    assert slope == pytest.approx(0.1) and offset == pytest.approx(0.5) and deviation < 1e-9
    bent = [{"position": x, "seconds": 0.1 * x * x} for x in (1, 2, 4, 8)]
    assert script.fit_line(bent)[2] > 0.2


def test_times_of_batches(script, folder, tmp_path, capsys):
    script.main(["batch", "--checkpoint", folder, "--rounds", "1", "--num_inference_steps", "1",
                 "--plot", str(tmp_path / "figure.png")])  # fmt: skip
    told = capsys.readouterr().out
    assert "| batch 32 |" in told and "largest deviation" in told and (tmp_path / "figure.png").is_file()


def test_bad_arguments(script, tmp_path, capsys):
    for arguments, message in (
        (["steps", "--checkpoint", str(tmp_path)], "is no pipeline folder"),
        (["steps", "--num_prompts", "0"], "--num_prompts must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            script.parse_args(arguments)
        assert message in capsys.readouterr().err
