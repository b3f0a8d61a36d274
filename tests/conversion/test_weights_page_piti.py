"""docs/weights_piti.md as a reader follows it: its commands and lines, on the recorded tiny models under its names.

The only changes: one sampling step a stage, and sizes of the stand-ins in the commands.
"""

import re
import shlex
from pathlib import Path

import torch
from conversion.test_glide_piti import weights
from conversion.test_glide_piti_pipelines import encoder_alone, inpainting, large
from PIL import Image
from pipelines.tiny_paella import tiny_tokenizer

from diffusers_ext import cli

PAGE = (Path(__file__).parents[2] / "docs" / "weights_piti.md").read_text(encoding="utf-8")
STAND_INS = {
    "base": lambda: weights("glide_base_unet"),
    "upsample": lambda: weights("glide_superres_unet"),
    "base_inpaint": lambda: inpainting("glide_base_unet"),
    "upsample_inpaint": lambda: inpainting("glide_superres_unet"),
    "base_mask": lambda: weights("piti_mask"),
    "upsample_mask": lambda: large("piti_mask"),
    "base_edge": lambda: weights("piti_sketch"),
    "upsample_edge": lambda: large("piti_sketch"),
    "encoder_mask": lambda: encoder_alone("piti_superres"),
}
_PITI = ["--num_heads", "4", "--num_head_channels", "16", "--resolution", "16", "32"]
_GLIDE = [
    "--num_heads",
    "4",
    "2",
    "--num_head_channels",
    "16",
    "32",
    "--resolution",
    "16",
    "32",
    "--tokenizer",
    "gpt2",
]
SIZES = {
    "glide": _GLIDE,
    "glide-inpaint": _GLIDE,
    "piti-mask": _PITI,
    "piti-edge": _PITI,
    "piti-stage-1": ["--num_heads", "2", "--num_head_channels", "16"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.M | re.S)


def test_a_reader_converts_and_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "original").mkdir()
    for name, make in STAND_INS.items():
        torch.save(make(), f"original/{name}.pt")
    tiny_tokenizer().save_pretrained("gpt2")
    Image.new("RGB", (32, 32), "orange").save("picture.png")
    Image.new("L", (32, 32), 255).save("mask.png")
    Image.new("L", (32, 32), 181).save("labels.png")
    commands = [shlex.split(line) for line in blocks("shell")[0].splitlines()]
    assert {words[4] for words in commands} == SIZES.keys()
    for words in commands:
        assert cli.main([*words[1:], *SIZES[words[4]]]) == 0, capsys.readouterr().err
    for block in blocks("python"):
        block = re.sub(r"num_inference_steps=\d+", "num_inference_steps=1, upscale_num_inference_steps=1", block)
        exec(compile(block, "weights_piti.md", "exec"), {})
    for name in ("text.png", "filled.png", "from-map.png"):
        assert Image.open(name).size == (32, 32)


def test_every_released_file_is_on_the_page():
    assert all(f"`{name}.pt`" in PAGE for name in STAND_INS if name != "encoder_mask")


def test_functions_of_the_page_exist():
    from diffusers_ext.conversion import glide, piti

    assert callable(glide.convert_glide_pipeline) and callable(piti.convert_piti_pipeline)
    assert "`convert_glide_pipeline` and `convert_piti_pipeline`" in PAGE
