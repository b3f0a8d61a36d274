"""docs/weights_ldm.md as a reader follows it: its commands and lines, on small stand-ins under its names.

The only change: one sampling step.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conversion.test_ldm_pipeline import CASES, FIRST_STAGE, KL, WORDS, original
from diffusers import DDIMScheduler
from PIL import Image
from pipelines.tiny_ldm import tiny_bert, tiny_first_stage, tiny_unet
from transformers import BertTokenizer

from diffusers_ext import LDMTextPipeline, LDMUnconditionalPipeline, LDMUpscalePipeline, cli
from diffusers_ext.conversion.ldm_releases import RELEASES

PAGE = Path(__file__).parents[2] / "docs" / "weights_ldm.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands() -> list[list[str]]:
    return [shlex.split(line) for block in blocks("shell") for line in block.splitlines()]


def examples() -> dict[str, str]:
    """Name of the folder that is loaded -> lines; in the order of the page."""
    found = {re.search(r'from_pretrained\("([^"]+)"', block): block for block in blocks("python")}
    return {match[1]: block for match, block in found.items() if match}


def run(lines: str, names: dict | None = None) -> dict:
    names = {} if names is None else names
    with torch.no_grad():
        exec(compile(re.sub(r"num_inference_steps=\d+", "num_inference_steps=1", lines), PAGE.name, "exec"), names)
    return names


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """An empty folder to work in, with the tokenizer of the text models where the Hub would be."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert-base-uncased").mkdir()
    (tmp_path / "bert-base-uncased" / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer.from_pretrained(tmp_path / "bert-base-uncased").save_pretrained(tmp_path / "bert-base-uncased")
    for name, side in (("picture", 32), ("small", 8)):
        Image.new("RGB", (side, side), "orange").save(f"{name}.png")
    Image.new("L", (32, 32), 255).save("mask.png")
    Image.new("L", (32, 32), 181).save("labels.png")
    return tmp_path


def test_every_release_is_on_the_page():
    assert all(words[0] == "diffusers-ext" and words[3].startswith("original/") for words in commands())
    whole = [words for words in commands() if words[2] == "ldm"]
    assert {words[words.index("--release") + 1] for words in whole} == RELEASES.keys()
    assert all(f"`{name}`" in PAGE.read_text(encoding="utf-8") for name in RELEASES)


# command by command, so that no test is long
@pytest.mark.parametrize("words", commands(), ids=lambda words: words[4])
def test_commands_make_what_the_lines_load(words, reader):
    checkpoint, folder = Path(words[3]), words[4]
    checkpoint.parent.mkdir(parents=True)
    if words[2] == "ldm-first-stage":
        torch.save({"state_dict": KL if folder.startswith("kl") else FIRST_STAGE}, checkpoint)
    else:
        sizes, parts, _ = CASES[words[words.index("--release") + 1]]
        torch.save(original(sizes, **parts)[1], checkpoint)
    shown = ["--resolution", "32"] if folder in examples() else []  # of the stand-ins, else 256
    assert cli.main([*words[1:], *shown]) == 0
    assert (Path(folder) / "README.md").is_file()
    if folder in examples():
        before = set(reader.glob("*.png"))
        run(examples()[folder])
        (picture,) = set(reader.glob("*.png")) - before
        assert Image.open(picture).size == (32, 32)


def test_every_task_is_sampled_on_the_page():
    made = {words[4]: words[words.index("--release") + 1] for words in commands() if words[2] == "ldm"}
    shown = [RELEASES[made[folder]].task for folder in examples() if folder in made]
    assert sorted(shown) == sorted({settings.task for settings in RELEASES.values()})


# Repositories in diffusers' format of 2022

OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
NEWER = (
    "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "use_quant_conv", "norm_type",
    "use_post_quant_conv", "mid_block_add_attention", "lookup_from_codebook", "attn_norm_num_groups", "dropout",
    "resnet_time_scale_shift", "time_embedding_dim", "add_attention", "downsample_type", "upsample_type",
)  # fmt: skip # entries that configs did not have then; stand-ins have their defaults


def write_old(component, folder: Path) -> None:
    """A model as diffusers 0.0.4 wrote it: a pickle of tensors, attention under its old names, a shorter config."""
    folder.mkdir(parents=True)
    config = {key: value for key, value in component.config.items() if key not in NEWER and value is not None}
    config |= {"_class_name": type(component).__name__, "_diffusers_version": "0.0.4"}
    (folder / "config.json").write_text(json.dumps(config))
    old = {name for name, module in component.named_modules() if getattr(module, "_from_deprecated_attn_block", False)}
    weights = {}
    for key, value in component.state_dict().items():
        for new, name in OLD_NAMES.items():
            stem, found, kind = key.rpartition(f".{new}.")
            key = f"{stem}.{name}.{kind}" if found and stem in old else key
        weights[key] = value
    assert any(".query." in key for key in weights) == bool(old)
    torch.save(weights, folder / "diffusion_pytorch_model.bin")


def write_repository(folder: Path, index: dict, betas: tuple[float, float], **models) -> None:
    for name, model in models.items():
        write_old(model, folder / name)
    (folder / "scheduler").mkdir(parents=True)
    scheduler = {"beta_start": betas[0], "beta_end": betas[1], "beta_schedule": "scaled_linear", "clip_sample": False}
    scheduler |= {"_class_name": "DDIMScheduler", "_diffusers_version": "0.0.4", "timesteps": 1000}
    scheduler |= {"timestep_values": None, "trained_betas": None}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {"_diffusers_version": "0.0.4", "scheduler": ["diffusers", "DDIMScheduler"], **index}
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture
def repositories(reader):
    """The three repositories of the page, as folders of their names."""
    folder, stock = reader / "CompVis", {"unet": ["diffusers", "UNet2DModel"], "vqvae": ["diffusers", "VQModel"]}
    faces = {"vqvae": tiny_first_stage("vq"), "unet": tiny_unet()}
    large = {"vqvae": tiny_first_stage("vq"), "unet": tiny_unet(6)}
    text = {"vqvae": tiny_first_stage(), "unet": tiny_unet(context=True)}
    write_repository(folder / "ldm-celebahq-256", {"_class_name": "LDMPipeline", **stock}, (0.0015, 0.0195), **faces)
    write_repository(
        folder / "ldm-super-resolution-4x-openimages",
        {"_class_name": "LDMSuperResolutionPipeline", **stock}, (0.0015, 0.0155), **large,
    )  # fmt: skip
    place = folder / "ldm-text2im-large-256"
    index = {
        "_class_name": "LDMTextToImagePipeline",
        "bert": ["latent_diffusion", "LDMBertModel"],
        "tokenizer": ["transformers", "BertTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vqvae": ["diffusers", "AutoencoderKL"],
    }
    write_repository(place, index, (0.00085, 0.012), **text)
    (place / "tokenizer").mkdir()
    (place / "tokenizer" / "vocab.txt").write_text("\n".join(WORDS))
    settings = {"do_lower_case": True, "model_max_length": 512, "tokenizer_class": "BertTokenizer"}
    (place / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = BertTokenizer.from_pretrained(place / "tokenizer")
    tokenizer.model_max_length = 7
    bert = tiny_bert(tokenizer)
    (place / "bert").mkdir()
    (place / "bert" / "config.json").write_text(json.dumps(bert.config.to_dict()))
    torch.save(bert.state_dict(), place / "bert" / "pytorch_model.bin")
    return {"faces": faces, "large": large, "text": {**text, "bert": bert}}


@torch.no_grad()
def test_repositories_in_diffusers_format_load_and_sample(repositories):
    (load,) = (block for block in blocks("python") if "CompVis/" in block)
    (reschedule,) = (block for block in blocks("python") if "steps_offset" in block)
    names = run(load)
    for name, cls in (("text", LDMTextPipeline), ("faces", LDMUnconditionalPipeline), ("large", LDMUpscalePipeline)):
        pipe = names[name]
        assert type(pipe) is cls
        assert pipe.latent_scale == (0.18215 if name == "text" else 1.0)
        for part, model in repositories[name].items():
            loaded = getattr(pipe, part).state_dict()
            assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items()), (name, part)
        pipe.set_progress_bar_config(disable=True)
        call = {"text": {"prompt": "a red fox"}, "faces": {}, "large": {"image": Image.new("RGB", (8, 8), "orange")}}
        image = pipe(**call[name], num_inference_steps=2, output_type="pt").images
        assert image.isfinite().all() and image.shape[:2] == (1, 3)
    assert names["faces"].scheduler.config.steps_offset == 0
    run(reschedule, names)
    scheduler = names["faces"].scheduler
    assert isinstance(scheduler, DDIMScheduler) and scheduler.config.beta_end == 0.0195
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[-1] == 1 and float(scheduler.final_alpha_cumprod) < 1


def test_stand_ins_of_repositories_are_no_copies_of_what_is_saved_today(repositories, reader):
    """They are in the old form, as far as it differs."""
    place = reader / "CompVis" / "ldm-celebahq-256"
    assert not list(place.rglob("*.safetensors")) and "scaling_factor" not in (place / "vqvae/config.json").read_text()
    keys = torch.load(place / "unet" / "diffusion_pytorch_model.bin", weights_only=True)
    assert any(".proj_attn." in key for key in keys) and not any(".to_q." in key for key in keys)
