"""benchmarks/speed_cascaded.py at its smallest sizes, and the plain form's steps."""

import json
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="module")
def script(repo_root) -> SimpleNamespace:
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        return SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / "speed_cascaded.py")))
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))


def test_both_forms_draw_the_same_images(script, tmp_path, capsys):
    script.main(["sampling", "search", "upsampler", "--smoke", "--json", str(tmp_path / "figures.json")])
    tables = json.loads((tmp_path / "figures.json").read_text())
    for name in ("plain and ours, a cascade", "upsampler: plain and ours"):
        assert all(row["difference"] < 1e-5 and row["ratio"] > 0 for row in tables[name]), name
    assert [row["case"] for row in tables["search"]] == [
        "2 levels, truncated in one pass",
        "2 levels, non-truncated with z_0 kept",
    ]
    told = capsys.readouterr().out
    assert "| plain, CPU s | ours, CPU s |" in told and "compiled" not in told


def test_memory_stage_by_stage_is_less(script, tmp_path):
    """In this process; the command starts one for each form."""
    for index, name in enumerate(script.STAGES):
        options = {"block_out_channels": (320, 320), "layers_per_block": 2, "attention_levels": (False, False)}
        script.build_stage(index, 8, options).save_pretrained(tmp_path / name)
    weights = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    found = {}
    for form in ("stage_by_stage", "resident"):
        args = script.parse_args(["memory", "--folder", str(tmp_path), "--measure_memory", form])
        found[form] = script.measure_memory(args)
    assert weights / 4 < found["stage_by_stage"] < found["resident"]


def test_the_plain_form_stops_with_the_noise_of_its_level(script):
    """With the exact prediction for pixels of law N(0, 0.5^2)."""
    plain, scheduler = script.plain, script.adm_scheduler("cosine", num_train_timesteps=100)
    process = plain.Process(scheduler.betas, range(99, -1, -1))
    abar = (1 - scheduler.betas).cumprod(0)

    def network(x, t):
        signal = abar[int(t[0])]
        noise = (1 - signal).sqrt() / (0.25 * signal + 1 - signal) * x.double()
        return torch.cat([noise, torch.full_like(noise, -1.0)], dim=1).float()

    draw = torch.Generator().manual_seed(0)
    stopped = plain.sample_stage(network, process, torch.randn(4, 3, 32, 32, generator=draw), draw, stop=41)
    wanted = (0.25 * abar[40] + 1 - abar[40]).sqrt()
    assert float(stopped.std()) == pytest.approx(float(wanted), rel=0.03)
    clean = 0.5 * torch.randn(4, 3, 32, 32, generator=draw)
    noised = plain.noise_to_level(scheduler.betas, clean, 41, torch.randn(clean.shape, generator=draw))
    assert float(noised.std()) == pytest.approx(float(wanted), rel=0.03)
    assert plain.noise_to_level(scheduler.betas, clean, 0, clean) is clean


def test_bad_arguments(script, capsys):
    for words, message in (
        (["speed"], "parts are sampling, search, memory, upsampler, received speed"),
        (["--width", "48"], "--width must be a positive multiple of 32, received 48"),
    ):
        with pytest.raises(SystemExit):
            script.parse_args(words)
        assert message in capsys.readouterr().err
    args = script.parse_args(["--device", "cuda"])
    assert args.parts == ["upsampler"] and args.dtype == "bfloat16"
