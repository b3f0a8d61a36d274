"""docs/weights_paella.md as a reader follows it: its commands and lines, on small stand-ins under its file names."""

import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from conversion.test_paella import original_unet, original_vqgan
from open_clip.model import CLIP
from PIL import Image

from diffusers_ext import PaellaPipeline, cli

PAGE = Path(__file__).parents[2] / "docs" / "weights_paella.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """An empty folder to work in, with `original/` as it looks after the downloads."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "original"
    folder.mkdir()
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    torch.save(CLIP(12, vision, text).state_dict(), folder / "open_clip_pytorch_model.bin")
    sizes = {"levels": 3, "widths": (4, 4, 8), "down": (1, 1, 1), "up": (1, 1, 1), "codes": 8192, "cond": 12 + 64}
    torch.save(original_unet(**sizes), folder / "f8_600000.pt")
    tokenizer = original_vqgan(ch_mult=(1, 1, 1, 1), attn_levels=(3,), codes=8192)
    losses = {"loss.discriminator.main.0.weight": torch.zeros(1)}
    torch.save({"state_dict": {**tokenizer, **losses}}, folder / "vqgan.gumbelf8-sber.model.ckpt")
    return tmp_path


def test_the_page_makes_a_pipeline_that_samples(reader):
    lines = [shlex.split(line) for block in blocks("shell") for line in block.splitlines()]
    downloads, commands = lines[:2], lines[2:]
    for words in downloads:
        assert words[:2] == ["hf", "download"] and (reader / "original" / words[3]).is_file()
    assert len(commands) == 3
    for words in commands:
        assert words[0] == "diffusers-ext" and cli.main(words[1:]) == 0
    assemble, sample = blocks("python")
    exec(compile(assemble, PAGE.name, "exec"), {})
    with torch.no_grad():
        exec(compile(sample, PAGE.name, "exec"), {})
    assert Image.open("fox.png").size == (256, 256)
    pipe = PaellaPipeline.from_pretrained("paella-v1")
    assert pipe.image_encoder.config.projection_dim == pipe.unet.config.condition_dim == 12
    assert pipe.tokenizer("a fox").input_ids == [49406, 320, 3240, 49407]
    assert os.listdir("converted/clip").count("README.md") == 1
