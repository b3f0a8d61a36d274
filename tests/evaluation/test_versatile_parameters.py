"""benchmarks/claims_versatile_parameters.py: the paper's count, and that of a checkpoint."""

import runpy
from types import SimpleNamespace

import pytest
from pipelines.tiny_versatile import tiny_versatile_unet


@pytest.fixture(scope="module")
def script(repo_root) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / "claims_versatile_parameters.py")))


def test_four_flows_cost_half_of_four_networks_at_the_papers_sizes(script, capsys):
    script.main([])
    told = capsys.readouterr().out
    assert "| one network of 4 flows | 2,566,318,852 |" in told  # the case full_key_map
    assert "| text-to-image alone | 859,520,964 |" in told and "| one network / 4 networks | 0.500 |" in told


def test_the_sizes_of_a_checkpoint(script, tmp_path, capsys):
    unet = tiny_versatile_unet()
    unet.save_pretrained(tmp_path / "unet")
    script.main(["--config", str(tmp_path)])
    total = sum(p.numel() for p in unet.parameters())
    assert f"| one network of {len(unet.flows)} flows | {total:,} |" in capsys.readouterr().out
