"""docs/weights_versatile.md as a reader follows it: its lines, on small stand-ins under its file names."""

import re
from pathlib import Path

import pytest
import torch
import train_versatile
from conversion.ldm_originals import autoencoder_shapes, random_weights
from conversion.test_optimus import original as optimus_weights
from conversion.test_optimus import saved_tokenizer
from conversion.test_versatile import stable_diffusion, write_repository
from conversion.versatile_originals import original_weights, tiny_unet
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from diffusers_ext import VersatilePipeline, VersatileUNet, cli
from diffusers_ext.conversion.open_clip import build_open_clip_processors
from diffusers_ext.conversion.versatile import convert_stable_diffusion_unet
from diffusers_ext.training.versatile.networks import load_parts

PAGE = Path(__file__).parents[2] / "docs" / "weights_versatile.md"
PAPER = Path(__file__).parents[2] / "training" / "presets" / "versatile-paper-single-256.yaml"
ENCODER_WORDS, DECODER_WORDS = ["[PAD]", "a", "red", "car", "[UNK]"], ["a", "red", "car", "?"]


def blocks() -> list[str]:
    """The page's Python, with pictures and steps of a size for tests."""
    found = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [block.replace("num_inference_steps=50", "num_inference_steps=1, height=32, width=32") for block in found]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A folder with `original/` and `published/` as they look after the downloads."""
    folder = tmp_path_factory.mktemp("reader")
    weights = folder / "original" / "pretrained_pth"
    weights.mkdir(parents=True)
    torch.manual_seed(0)
    unet = tiny_unet(num_attention_heads=8)
    vae = random_weights(autoencoder_shapes(ch=32, mult=(1, 1, 1, 1), z=4, layers=1))
    sizes = {"encoder": (5, 64, 1, 64, 80), "decoder": (7, 64, 1, 40), "latent": 6}
    optimus = optimus_weights(**sizes)
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    size["projection_dim"] = 12
    text = {**size, "eos_token_id": 2}  # as the original's file says
    clip = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**size, "image_size": 16, "patch_size": 8}, projection_dim=12)
    )
    torch.save(original_weights(unet, "current"), weights / "vd-four-flow-v1-0.pth")
    torch.save(vae, weights / "kl-f8.pth")
    torch.save(optimus, weights / "optimus-vae.pth")
    whole = original_weights(unet, "first release")
    for prefix, part in (("autokl.", vae), ("optimus.", optimus), ("clip.model.", clip.state_dict())):
        whole |= {prefix + key: value for key, value in part.items()}
    torch.save(whole, weights / "vd-four-flow-v1-0-deprecated.pth")
    for part in (clip, *build_open_clip_processors(clip)):
        part.save_pretrained(folder / "original" / "clip")
    saved_tokenizer(folder / "original" / "bert", ENCODER_WORDS, pad_token="[PAD]")
    saved_tokenizer(folder / "original" / "gpt2", DECODER_WORDS)
    _, tokenizer = write_repository(folder / "published")
    tokenizer.save_pretrained(folder / "published" / "tokenizer")
    torch.save({"state_dict": stable_diffusion_original()}, folder / "original" / "sd-v1-4.ckpt")
    return folder


def stable_diffusion_original() -> dict[str, torch.Tensor]:
    own = original_weights(
        convert_stable_diffusion_unet(stable_diffusion().state_dict(), num_heads=4), "first release"
    )
    return {key.replace("unet_image.", ""): value for key, value in own.items()}


@torch.no_grad()
def test_the_page_makes_pipelines_that_sample(reader, monkeypatch):
    monkeypatch.chdir(reader)
    current, sample, first_release, published, parts = blocks()
    for code in (current, sample, first_release, parts):
        exec(compile(code, PAGE.name, "exec"), {})
    commands = re.findall(r"^diffusers-ext (convert .*)$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    assert [command.split()[1] for command in commands] == ["versatile-unet", "optimus", "versatile-start"]
    for command in commands:
        assert cli.main(command.split()) == 0
    assert Image.open("car.png").size == (32, 32)
    pipes = [VersatilePipeline.from_pretrained(name) for name in ("versatile", "versatile-first-release")]
    options = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "pt"}
    made, texts = [], []
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
        assert pipe.unet.flows == pipe.unet.known_flows
        made.append(pipe("a red car", generator=torch.Generator().manual_seed(0), **options).images)
        generator = torch.Generator().manual_seed(0)
        texts.append(pipe("a red car", data_type="text", num_inference_steps=1, generator=generator).texts[0])
        edited = pipe.edit_image(
            Image.new("RGB", (20, 20)), "a car", "red", num_inference_steps=1, height=32, width=32
        )
        assert edited.images[0].size == (32, 32)
    torch.testing.assert_close(*made)  # one checkpoint in two layouts
    assert texts[0] == texts[1] != "" and set(texts[0].replace("?", " ?").split()) <= set(DECODER_WORDS)
    unet = VersatileUNet.from_pretrained("versatile-start")
    assert unet.flows == ["image-to-image"]
    args, _, _ = train_versatile.parse_args([str(PAPER), "--pretrained_clip_name_or_path", "original/clip"])
    loaded = load_parts(args)  # under the names of the preset
    assert args.pretrained_unet_name_or_path == "versatile-start"
    words = ["--pretrained_clip_name_or_path", "original/clip", "--pretrained_optimus_name_or_path"]
    args, _, _ = train_versatile.parse_args([str(PAPER), *words, "versatile-optimus"])
    again = load_parts(args)  # as the command wrote it
    for name in ("encoder_tokenizer", "decoder_tokenizer"):
        assert again[name].get_vocab() == loaded[name].get_vocab()
    assert loaded["optimus"].config["latent_dim"] == 6 and loaded["vae"].config["latent_channels"] == 4
    # CLIPTokenizer reads BPE files, the stand-in's tokenizer has whole words
    known = {"tokenizer": AutoTokenizer.from_pretrained("published/tokenizer")}
    exec(compile(published.replace('"published"', '"published", tokenizer=tokenizer'), PAGE.name, "exec"), known)
    assert VersatilePipeline.from_pretrained("versatile-diffusers").optimus is None
