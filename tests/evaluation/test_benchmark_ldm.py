"""benchmarks/speed_ldm.py at its smallest sizes."""

import json
import runpy
import sys
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def script(repo_root) -> SimpleNamespace:
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        return SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / "speed_ldm.py")))
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))


def test_the_tables_compare_like_with_like(script, tmp_path, capsys):
    small = ["--channel_mult", "1", "1", "--attention_levels", "1", "--text_layers", "1", "--threads", "1"]
    script.main(["--smoke", *small, "--json", str(tmp_path / "figures.json")])
    tables = json.loads((tmp_path / "figures.json").read_text())
    training, sampling = tables["pixels and latents"]
    assert training["difference"] == sampling["difference"] and "parameters" in training["difference"]
    assert training["ratio"] > 0 and sampling["ratio"] > 0
    for row in tables["stock and ours"]:
        assert float(row["difference"]) < 1e-5 and row["ratio"] > 0
    printed = capsys.readouterr().out
    assert "| latents / pixels |" in printed and "| ours / diffusers |" in printed
    assert "eager and compiled" not in tables and "compiled" not in printed


def test_sizes_follow_the_device_unless_given(script):
    assert script.parse_args([]).resolution == 64
    args = script.parse_args(["--device", "cuda", "--channels", "64"])
    assert (args.resolution, args.channels) == (256, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--resolution 48", "--resolution must be a positive multiple of 32, received 48"),
        ("--rounds 0", "--rounds must be a positive multiple of 1, received 0"),
    ],
)
def test_bad_arguments(script, arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(arguments.split())
    assert message in capsys.readouterr().err
