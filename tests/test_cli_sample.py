"""`diffusers-ext sample` and `info` over all public pipelines, from a saved folder to files."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from pipelines.contract import CASES, ONE_EACH, networks
from pipelines.tiny_cascaded import tiny_base
from pipelines.tiny_glide import SIDE, tiny_decoder, tiny_glide, tiny_piti
from pipelines.tiny_ldm import tiny_labels, tiny_mask
from pipelines.tiny_paella import tiny_picture

from diffusers_ext import CascadedDiffusionPipeline, cli
from diffusers_ext.pipelines.drawing import ARGUMENTS, _option, call_arguments, options_of, pipeline_class

WORDS = {  # case -> what a user writes
    "paella": ["a red circle"],
    "paella-inpaint": ["a red circle", "--image", "image.png", "--mask", "mask.png"],
    "paella-img2img": ["a red circle", "--image", "image.png", "--strength", "0.5"],
    "paella-variation": ["--image", "image.png"],
    "ldm-unconditional": ["--height", "16", "--width", "16"],
    "ldm-class": ["--class_label", "star"],
    "ldm-text": ["a red circle", "--negative_prompt", "blue", "--guidance", "2"],
    "ldm-layout": ["--boxes", "circle 0.1 0.2 0.5 0.9", "star 0.6 0 1 0.4"],
    "ldm-semantic": ["--map", "map.png"],
    "ldm-upscale": ["--image", "small.png"],
    "ldm-inpaint": ["--image", "image.png", "--mask", "mask.png"],
    "cascaded": ["--class_label", "star", "--noise_level", "101"],
    "cascaded-base": ["--class_label", "2"],
    "cascaded-upscale": ["--image", "small.png", "--class_label", "star", "--noise_level", "0"],
    "glide": ["a red circle", "--guidance", "2"],
    "piti": ["--map", "map.png"],
    "versatile-edit": ["a red circle", "--negative_prompt", "a blue star", "--image", "image.png"],
    "versatile-text-to-image": ["a red circle"],
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_picture(1).save("image.png")
    tiny_picture(1, 4, 4).save("small.png")
    tiny_mask().save("mask.png")
    Image.fromarray(tiny_labels().astype(np.uint8)).save("map.png")
    return tmp_path


@pytest.mark.parametrize("name", ONE_EACH)
def test_every_pipeline_draws_by_one_command(name, files, capsys, monkeypatch):
    def read(config):
        raise AssertionError("`use_return_dict` is deprecated and would be told to every user: pass `return_dict`")

    monkeypatch.setattr(transformers.PreTrainedConfig, "use_return_dict", property(read))
    CASES[name].build().save_pretrained("saved")
    words = ["sample", "saved", *WORDS[name], "--steps", "2", "--num", "2", "--seed", "5", "--out", "drawn"]
    assert cli.main(words) == 0
    paths = sorted((files / "drawn").iterdir())
    assert [path.name for path in paths] == ["00005.png", "00006.png"]
    assert capsys.readouterr().out.split() == ["drawn/00005.png", "drawn/00006.png"]
    pictures = [Image.open(path) for path in paths]
    settings = json.loads(pictures[1].info["diffusers_ext"])
    assert settings["pipeline"] == CASES[name].pipeline and settings["seed"] == 6 and settings["steps"] == 2
    assert None not in settings.values()
    # a picture can be drawn again by itself, from the seed that is in it
    assert cli.main([*words[:-6], "--seed", "6", "--out", "again.png"]) == 0
    assert np.abs(np.asarray(Image.open("again.png"), int) - np.asarray(pictures[1], int)).max() <= 1


def test_texts_are_printed(files, capsys):
    CASES["versatile-image-to-text"].build().save_pretrained("saved")
    assert cli.main(["sample", "saved", "--image", "image.png", "--caption", "--num", "2", "--steps", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 and not (files / "samples").exists()


def test_an_adapter_changes_the_picture(files):
    pipe = CASES["ldm-text"].build()
    pipe.save_pretrained("saved")
    pipe.unet.add_adapter(_lora(["to_q", "to_k"]))
    for parameter in (p for p in pipe.unet.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter)
    pipe.unet.save_lora_adapter("lora")
    words = ["sample", "saved", "a red circle", "--steps", "2", "--out"]
    assert cli.main([*words, "plain.png"]) == 0
    assert cli.main([*words, "adapted.png", "--lora", "lora"]) == 0
    assert np.abs(np.asarray(Image.open("plain.png"), int) - np.asarray(Image.open("adapted.png"), int)).max() > 3


def _lora(layers):
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=layers)


def test_info_names_class_options_and_components(files, capsys):
    CASES["ldm-class"].build().save_pretrained("saved")
    assert cli.main(["info", "saved"]) == 0
    told = capsys.readouterr().out
    task = "unconditional-image-generation, class-conditional: LDMClassConditionalPipeline takes --class_label, "
    assert told.startswith(task) and "class_embedder" in told and "licence: not known" in told
    parameters = sum(p.numel() for p in pipeline_class("saved").from_pretrained("saved").unet.parameters())
    assert f"unet: UNet2DConditionModel, {parameters:,} parameters" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "saved", "--map", "map.png"], "LDMTextPipeline takes no --map; it takes a prompt"),
        (["sample", "saved"], "LDMTextPipeline needs a prompt."),
        (["sample", "saved", "a", "--lora", "runs/none"], "There is no adapter 'runs/none'. A training with --rank"),
        (["sample", "saved", "a", "--lora", "saved"], "--lora 'saved' is the pipeline itself"),
        (["sample", "runs/none", "a"], "There is no folder 'runs/none'. A training makes such a folder"),
        (["sample", "./none", "a"], "There is no folder './none'. Pipelines in '.': saved. A training makes"),
        (["sample", "runs/paella-scenes-64", "a"], "train_paella.py training/presets/paella-scenes-64.yaml` makes it"),
        (["sample", "stopped", "a"], "--resume_from_checkpoint latest --output_dir stopped"),
        (["sample", "saved", "a", "--num", "0"], "--num must be at least 1, received 0"),
        (["sample", "saved", "a red circle", "--steps", "2", "--num", "2", "--out", "x.png"], "is one file, but 2"),
        (["sample", "nowhere-at-all", "a"], "nowhere-at-all"),
        (["sample", "empty", "a"], "'empty' holds no pipeline"),
        (["sample", "saved/unet", "a"], "'saved/unet' holds a model"),
    ],
)
def test_what_does_not_fit_is_one_line(words, message, files, capsys):
    CASES["ldm-text"].build().save_pretrained("saved")
    (files / "empty").mkdir()
    (files / "stopped" / "checkpoint-10").mkdir(parents=True)
    assert cli.main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("diffusers-ext")


def test_variations_by_weights_that_draw_from_texts_ask_for_their_adapter(files, capsys):
    CASES["paella"].build().save_pretrained("saved")
    assert cli.main(["sample", "saved", "--image", "image.png", "--steps", "2", "--out", "a.png"]) == 0
    (files / "saved" / "image_adapter").mkdir()
    assert cli.main(["sample", "saved", "--image", "image.png", "--steps", "2"]) == 2
    assert "pass --lora saved/image_adapter" in capsys.readouterr().err


def test_a_prior_draws_from_a_condition_with_the_folder_that_holds_its_encoder(files, capsys):
    tiny_glide(upscale=False).save_pretrained("prior")
    pipe = tiny_piti("sketch", upscale=False)
    pipe.unet = tiny_decoder(seed=7)
    pipe.save_adapter("prior/sketch", "prior", rank=4)
    lines = np.zeros((SIDE, SIDE), np.uint8)
    lines[4, 3:20] = 255
    Image.fromarray(lines).save("lines.png")
    words = ["sample", "prior", "--sketch", "lines.png", "--steps", "2", "--out", "drawn.png"]
    assert cli.main(words) == 2
    assert (
        "'prior' holds a GlidePipeline, which takes other options: pass --lora prior/sketch" in capsys.readouterr().err
    )
    assert cli.main([*words, "--lora", "prior/sketch"]) == 0
    settings = json.loads(Image.open("drawn.png").info["diffusers_ext"])
    assert settings["pipeline"] == "PITIPipeline" and settings["lora"] == "sketch"
    assert settings["checkpoint"] == "prior" and settings["sketch"] == "lines.png"
    assert cli.main(["info", "prior"]) == 0
    assert "adapter: --lora prior/sketch, " in capsys.readouterr().out
    assert cli.main(["sample", "prior", "a star", "--steps", "2", "--out", "text.png"]) == 0


def test_other_files_and_boxes_are_refused(files, capsys):
    CASES["ldm-layout"].build().save_pretrained("saved")
    assert cli.main(["sample", "saved", "--boxes", "circle 0.1 0.2"]) == 2
    assert '--boxes takes "name x0 y0 x1 y1"' in capsys.readouterr().err
    CASES["ldm-upscale"].build().save_pretrained("other")
    assert cli.main(["sample", "other", "--image", "none.png"]) == 2
    assert "There is no image 'none.png'" in capsys.readouterr().err


def test_info_of_every_pipeline_says_what_its_checkpoint_draws(files, capsys):
    for name in ONE_EACH:
        saved = CASES[name].build()
        saved.save_pretrained(name)
        assert cli.main(["info", name]) == 0
        told = capsys.readouterr().out.splitlines()
        assert saved._pipeline_tag and told[0].startswith(saved._pipeline_tag) and CASES[name].pipeline in told[0]
        total = sum(p.numel() for network in networks(saved).values() for p in network.parameters())
        assert any(line.startswith("all: ") and f" {total:,} parameters" in line for line in told), told


def test_info_of_a_model_and_of_an_adapter(files, capsys):
    pipe = CASES["paella"].build()
    pipe.save_pretrained("saved")
    pipe.unet.add_adapter(
        _lora([name for name, part in pipe.unet.named_modules() if isinstance(part, torch.nn.Linear)])
    )
    pipe.unet.save_lora_adapter("saved/image_adapter")
    (files / "saved" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert cli.main(["info", "saved"]) == 0
    told = capsys.readouterr().out
    assert "licence: mit" in told and "adapter: --lora saved/image_adapter, " in told
    assert "inpainting: PaellaInpaintPipeline takes a prompt" in told and "guidance scale: " in told
    assert cli.main(["info", "saved/unet"]) == 0
    assert capsys.readouterr().out.startswith("model: PaellaUNet, ")


def test_one_checkpoint_is_drawn_with_the_mode_that_the_options_ask_for(files, capsys):
    CASES["paella"].build().save_pretrained("saved")
    asked = {
        "PaellaImg2ImgPipeline": ["a red circle", "--image", "image.png"],
        "PaellaInpaintPipeline": ["a red circle", "--image", "image.png", "--mask", "mask.png"],
        "PaellaImageVariationPipeline": ["--image", "image.png"],
    }
    for pipeline, words in asked.items():
        assert cli.main(["sample", "saved", *words, "--steps", "2", "--out", f"{pipeline}.png"]) == 0
        settings = json.loads(Image.open(f"{pipeline}.png").info["diffusers_ext"])
        assert settings["pipeline"] == pipeline and settings["image"] == "image.png"


def test_sketches_are_files_too(files):
    CASES["piti-upscaled"].build().save_pretrained("saved")
    sketch = Image.new("L", (32, 32))
    sketch.paste(255, (4, 9, 20, 10))
    sketch.save("sketch.png")
    assert cli.main(["sample", "saved", "--sketch", "sketch.png", "--steps", "2", "--out", "a.png"]) == 0
    assert json.loads(Image.open("a.png").info["diffusers_ext"])["sketch"] == "sketch.png"


def test_the_settings_in_a_picture_are_whole(files):
    CASES["ldm-layout"].build().save_pretrained("saved")
    box = "circle 0.1 0.2 0.5 0.9"
    assert cli.main(["sample", "saved", "--boxes", box, "--steps", "2", "--out", "a.png"]) == 0
    settings = json.loads(Image.open("a.png").info["diffusers_ext"])
    assert settings["boxes"] == [box] and settings["dtype"] == "float32" and settings["diffusers-ext"]
    pipe = CASES["ldm-unconditional"].build()
    assert call_arguments(type(pipe), {"num": 2}) == {"batch_size": 2}
    pipe.save_pretrained("other")
    (files / "private").mkdir()
    Image.open("image.png").save("private/image.png")
    words = ["sample", "other", "--image", "private/image.png", "--mask", "mask.png", "--out", "b.png"]
    assert cli.main([*words, "--height", "16", "--width", "16"]) == 0
    settings = json.loads(Image.open("b.png").info["diffusers_ext"])
    assert settings["image"] == "image.png" and settings["steps"] == 50  # no path; what the call's default was


def test_every_condition_has_an_option():
    for name in ONE_EACH:
        assert set(options_of(type(CASES[name].build()))) <= set(ARGUMENTS)
        assert "num" in options_of(type(CASES[name].build())) and "steps" in options_of(type(CASES[name].build()))


def test_info_lists_what_the_networks_of_a_checkpoint_can_use(files, capsys):
    """Of every case of the contract, classes among them, and of a cascade without classes."""
    conditions = {"prompt", "negative_prompt", "image", "map", "sketch", "normals", "depth", "class_label", "caption"}
    unlike = {"paella": {"class_label"}, "cascaded": {"prompt", "negative_prompt"}}
    unlike |= {"piti": {"sketch", "normals", "depth"}, "versatile-image-to-text": set()}
    for name, lacks in unlike.items():
        pipe = CASES[name].build()
        pipe.save_pretrained(name)
        assert cli.main(["info", name]) == 0
        told = capsys.readouterr().out.splitlines()[0].split(" takes ")[1].split(", ")
        wanted = {option for option in options_of(type(pipe)) if option in conditions} - lacks
        assert {_option(option) for option in wanted} == set(told) & {_option(option) for option in conditions}
    CascadedDiffusionPipeline(base=tiny_base(classes=False)).save_pretrained("plain")
    assert cli.main(["info", "plain"]) == 0 and "--class_label" not in capsys.readouterr().out
    assert cli.main(["sample", "plain", "--class_label", "star"]) == 2
    assert "takes no --class_label" in capsys.readouterr().err
    assert cli.main(["sample", "paella", "--class_label", "star"]) == 2
    assert "PaellaPipeline takes no --class_label; it takes a prompt" in capsys.readouterr().err


def test_messages_of_pipelines_speak_of_options(files, capsys):
    CASES["ldm-text"].build().save_pretrained("saved")
    for words, message in (
        (["--steps", "0"], "--steps"),
        (["--guidance", "-1"], "--guidance"),
        (["--height", "17"], "--height"),
    ):
        assert cli.main(["sample", "saved", "a red circle", *words]) == 2
        told = capsys.readouterr().err
        assert message in told and not any(f"`{name}`" in told for names in ARGUMENTS.values() for name in names)


def test_normals_and_depth_are_arrays(files, capsys):
    tiny_piti("geometry").save_pretrained("saved")
    draw = np.random.default_rng(0)
    normals = draw.normal(size=(16, 16, 3)).astype(np.float32)
    np.save("n.npy", normals / np.linalg.norm(normals, axis=2, keepdims=True))
    np.save("d.npy", draw.uniform(0, 9, (16, 16, 1)).astype(np.float32))  # as DIODE has it
    np.save("whole.npy", np.zeros((16, 16), int))
    (files / "text.npy").write_text("no array")
    words = ["sample", "saved", "--steps", "2", "--normals", "n.npy"]
    assert cli.main([*words, "--depth", "d.npy", "--out", "a.png"]) == 0
    settings = json.loads(Image.open("a.png").info["diffusers_ext"])
    assert (settings["normals"], settings["depth"], settings["steps"]) == ("n.npy", "d.npy", 2)
    capsys.readouterr()
    for name, message in (
        ("image.png", "is no .npy file of metres (h, w), 0 where unknown. A picture does not say"),
        ("whole.npy", "holds int64 of shape (16, 16); wanted are floats of (h, w) or (h, w, 1)"),
        ("n.npy", "holds float32 of shape (16, 16, 3); wanted are floats of (h, w)"),
        ("text.npy", "is no .npy file of numbers"),
        ("none.npy", "There is no file 'none.npy'"),
    ):
        assert cli.main([*words, "--depth", name]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["sample", "saved", "--depth", "d.npy", "--normals", "text.txt"]) == 2
    (files / "text.txt").write_text("no picture")
    assert cli.main(["sample", "saved", "--depth", "d.npy", "--normals", "text.txt"]) == 2
    assert "is neither a .npy file nor an image" in capsys.readouterr().err
