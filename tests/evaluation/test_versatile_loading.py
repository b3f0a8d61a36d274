"""benchmarks/speed_versatile_loading.py: a flow reads its own layer groups of the file."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from pipelines.tiny_versatile import tiny_versatile_unet

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="tells what was read, Linux only")


@pytest.fixture(scope="module")
def script(repo_root) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / "speed_versatile_loading.py")))


def table(text: str) -> dict[str, list[float]]:
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    return {name: [float(value.replace(",", "")) for value in values] for name, *values in rows}


def test_a_flow_reads_less_than_all(script, capsys):
    script.main(["--width", "32"])
    found = table(capsys.readouterr().out)
    assert found.keys() == {"image-to-image", "image-to-text", "text-to-image", "text-to-text", "all"}
    read, share, weights, memory = found["text-to-image"]
    assert weights <= read and share < 0.65  # 0.55; with the text layers 0.84
    assert found["all"][1] == pytest.approx(1, abs=0.01) and found["all"][2] > 1.5 * weights
    assert 0.9 * weights < memory < 0.9 * found["all"][3]


def test_a_checkpoint(script, tmp_path, capsys):
    unet = tiny_versatile_unet()
    unet.save_pretrained(tmp_path / "unet")
    script.main(["--checkpoint", str(tmp_path)])
    assert table(capsys.readouterr().out)["all"][2] == sum(p.nbytes for p in unet.parameters())


def test_wrong_options(script, tmp_path, capsys):
    for options, message in ((["--checkpoint", str(tmp_path)], "no pipeline folder"), (["--width", "5"], "of 16")):
        with pytest.raises(SystemExit):
            script.main(options)
        assert message in capsys.readouterr().err
