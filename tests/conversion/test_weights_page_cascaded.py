"""docs/weights_cascaded.md as a reader follows it: its commands and lines, on small stand-ins under its names.

The only change: one sampling step.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conversion.ldm_originals import random_weights, unet_shapes
from conversion.test_cascaded import PARAMETERS, SIZES
from diffusers import DiffusionPipeline

from diffusers_ext import cli
from diffusers_ext.conversion.adm_releases import RELEASES

PAGE = (Path(__file__).parents[2] / "docs" / "weights_cascaded.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.M | re.S)


COMMANDS = [shlex.split(line) for line in blocks("shell")[0].splitlines()]


def test_table_tells_what_the_converter_knows():
    rows = {cells[1].strip(" `"): cells for line in PAGE.splitlines() if len(cells := line.split("|")) == 8}
    for release, settings in RELEASES.items():
        _, _, stage, parameters, heads, order, schedule, _ = (cell.strip() for cell in rows[release])
        assert parameters == f"{PARAMETERS[release]:,}"
        assert heads == (str(settings.num_heads) if settings.num_heads else f"{settings.num_head_channels} wide")
        assert (order, schedule) == (settings.attention_order, settings.beta_schedule)
        assert f"{settings.resolution} pixels" in stage
        assert settings.small_resolution is None or f"{settings.small_resolution} to" in stage
    assert {command[command.index("--release") + 1] for command in COMMANDS} == RELEASES.keys()


def stand_in(release: str) -> dict[str, torch.Tensor]:
    """64 channels and attention on few pixels: quick to sample at the released resolution."""
    sizes = {**SIZES[release], "ch": 64, "mult": (1, 1, 1, 1, 1), "layers": 1, "attention": (16,)}
    return random_weights(unet_shapes(**sizes))


def test_a_reader_converts_samples_and_trains_further(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "original").mkdir()
    wanted = {"adm-64", "adm-64-256"}
    for command in COMMANDS:
        if command[4] in wanted:
            torch.save(stand_in(Path(command[3]).stem), command[3])
            assert cli.main(command[1:]) == 0
    assert capsys.readouterr().out.count("parameters.") == len(wanted)
    for block in blocks("python"):
        names: dict = {}
        block = re.sub(r"num_inference_steps=\d+", "num_inference_steps=1", block)
        exec(compile(block, "weights_cascaded.md", "exec"), names)
        if "unet" in names:
            assert names["unet"].config["aug_cond_type"] == "timestep"
    assert all((tmp_path / name).is_file() for name in ("small.png", "large.png", "ddim.png"))
    pipe = DiffusionPipeline.from_pretrained("adm-64-256")
    assert pipe.scheduler.config["variance_type"] == "learned_range"


@pytest.mark.parametrize("name", ["convert_adm_pipeline", "convert_adm_unet"])
def test_functions_of_the_page_exist(name):
    from diffusers_ext.conversion import cascaded

    assert f"`{name}" in PAGE and callable(getattr(cascaded, name))
