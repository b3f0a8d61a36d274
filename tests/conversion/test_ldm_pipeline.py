"""Original latent-diffusion files to pipelines by the command line: every task, on stand-ins with every key."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from conversion.ldm_originals import autoencoder_shapes, bert_shapes, checkpoint, random_weights, unet_shapes
from diffusers import AutoencoderKL, DiffusionPipeline, VQModel
from PIL import Image
from transformers import BertTokenizer

import diffusers_ext
from diffusers_ext import cli
from diffusers_ext.conversion.ldm_pipeline import LDM_TASKS, convert_ldm_pipeline, take_ldm_first_stage
from diffusers_ext.conversion.ldm_releases import RELEASES, TASKS, ldm_settings

PLAIN = {"ch": 32, "mult": (1, 2), "layers": 1, "attention": (2,)}
CROSS = {**PLAIN, "context": 12}
FIRST_STAGE = random_weights(autoencoder_shapes((1, 1, 1), 3, ch=32, layers=1, codes=8))  # factor 4, as the released
KL = random_weights(autoencoder_shapes((1, 1, 1), 3, ch=32, layers=1))
PICTURE = Image.new("RGB", (16, 16), "orange")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox", "##es"]

# release: the sizes of its U-Net, the other parts of its file, a call of the pipeline
CASES = {
    "celeba256": (PLAIN, {}, lambda pipe: pipe(2)),
    "ffhq256": (PLAIN, {}, lambda pipe: pipe(2)),
    "lsun_beds256": (PLAIN, {}, lambda pipe: pipe(2)),
    "lsun_churches256": (
        {**PLAIN, "attention": (1, 2), "film": True, "updown": True}, {"first_stage": KL, "scale_factor": 0.7},
        lambda pipe: pipe(2),
    ),
    "cin256": (CROSS, {"cond": random_weights({"embedding.weight": (1000, 12)})}, lambda pipe: pipe([3, 999])),
    "cin256-v2": (
        CROSS, {"cond": random_weights({"embedding.weight": (1001, 12)})},
        lambda pipe: pipe([3, 999], guidance_scale=2.0),
    ),
    "txt2img-1p4B": (
        CROSS, {"cond": random_weights(bert_shapes(2, 12, len(WORDS), 7, inner=64)), "first_stage": KL},
        lambda pipe: pipe(["a red fox", "foxes"], guidance_scale=2.0),
    ),
    "text2img256": (
        CROSS, {"cond": random_weights(bert_shapes(2, 12, len(WORDS), 7, inner=64))},
        lambda pipe: pipe(["a red fox", "foxes"]),
    ),
    "layout2img-openimages256": (
        CROSS, {"cond": random_weights(bert_shapes(1, 12, 8192, 92, inner=64))},
        lambda pipe: pipe([[(0.1, 0.2, 0.6, 0.9)], [(0.0, 0.0, 1.0, 1.0)]], [[3], [353]]),
    ),
    "semantic_synthesis256": (
        {**PLAIN, "in_channels": 6}, {"cond": random_weights({"channel_mapper.weight": (3, 182, 1, 1)})},
        lambda pipe: pipe(np.full((2, 16, 16), 181)),
    ),
    "semantic_synthesis512": (
        {**PLAIN, "in_channels": 6}, {"cond": random_weights({"channel_mapper.weight": (3, 182, 1, 1)})},
        lambda pipe: pipe(np.full((2, 16, 16), 181)),
    ),
    "bsr_sr": ({**PLAIN, "in_channels": 6}, {}, lambda pipe: pipe([PICTURE.resize((4, 4))] * 2)),
    "inpainting_big": (
        {**PLAIN, "attention": (1, 2), "in_channels": 7, "updown": True}, {"cond": FIRST_STAGE},
        lambda pipe: pipe([PICTURE] * 2, Image.new("L", (16, 16), 255)),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A folder with the files of a BERT tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def convert(file: dict, folder, *words: str) -> int:
    torch.save(file, folder / "model.ckpt")
    return cli.main(["convert", "ldm", str(folder / "model.ckpt"), str(folder / "out"), "--license", "mit", *words])


def original(sizes: dict, **parts) -> tuple[dict, dict]:
    """The U-Net's weights, and a whole file with these and their averages."""
    unet = random_weights(unet_shapes(**sizes))
    averaged = {key: 0.9 * value for key, value in unet.items()}
    return unet, checkpoint(unet, averaged=averaged, **{"first_stage": FIRST_STAGE, **parts})


def test_every_release_and_every_task_has_a_case():
    assert CASES.keys() == RELEASES.keys()
    assert LDM_TASKS.keys() == set(TASKS)
    assert {settings.task for settings in RELEASES.values()} == LDM_TASKS.keys()


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_released_file_becomes_a_pipeline_that_samples(name, tmp_path, vocabulary, capsys):
    sizes, parts, call = CASES[name]
    settings = RELEASES[name]
    unet, file = original(sizes, **parts)
    words = ["--tokenizer", str(vocabulary)] if settings.task == "text" else []
    assert convert(file, tmp_path, "--release", name, "--resolution", "16", *words) == 0
    pipeline, conditioner = LDM_TASKS[settings.task]
    assert f"Wrote {tmp_path / 'out'}: {pipeline.__name__} with" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and f"diffusers_ext.{pipeline.__name__}.from_pretrained" in card

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe) is pipeline
    assert torch.equal(pipe.unet.conv_in.bias, 0.9 * unet["input_blocks.0.0.bias"])  # the average
    scale = parts.get("scale_factor") or settings.scale_factor or 1.0
    assert pipe.latent_scale == pytest.approx(scale) and pipe.vqvae.config.sample_size == 16
    stock = AutoencoderKL if parts.get("first_stage") is KL else VQModel
    assert type(pipe.vqvae) is stock and pipe.unet.config.sample_size == 4
    assert (pipe.scheduler.config.beta_start, pipe.scheduler.config.beta_end) == pytest.approx((0.0015, 0.0195))
    if conditioner is not None:
        left_out = "transformer.to_logits." if settings.task == "layout" else "-"
        total = sum(float(value.sum()) for key, value in parts["cond"].items() if not key.startswith(left_out))
        converted = sum(float(p.sum()) for p in getattr(pipe, conditioner).parameters())
        assert converted == pytest.approx(total, abs=1e-2)

    pipe.set_progress_bar_config(disable=True)
    images = call(partial(pipe, num_inference_steps=1, output_type="pt")).images
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all() and images.std() > 0


@torch.no_grad()
def test_in_python_as_by_the_command_line(tmp_path):
    sizes, parts, call = CASES["cin256-v2"]
    _, file = original(sizes, **parts)
    pipe = convert_ldm_pipeline(file, release="cin256-v2", resolution=16)
    assert convert(file, tmp_path, "--release", "cin256-v2", "--resolution", "16") == 0
    saved = DiffusionPipeline.from_pretrained(tmp_path / "out")
    for each in (pipe, saved):
        each.set_progress_bar_config(disable=True)
    draw = {"num_inference_steps": 1, "output_type": "pt"}
    images = [call(partial(p, generator=torch.Generator().manual_seed(0), **draw)).images for p in (pipe, saved)]
    assert torch.equal(*images)
    first_stage = take_ldm_first_stage(file, resolution=16).state_dict()
    assert all(torch.equal(value, first_stage[key]) for key, value in saved.vqvae.state_dict().items())


def test_what_the_releases_know(tmp_path, vocabulary, capsys):
    """Heads, null class, tokens of a layout, what may be guided."""
    for name, expected in {
        "cin256": {"null": None},
        "cin256-v2": {"null": 1000, "heads": 1},
        "txt2img-1p4B": {"guided": True, "heads": 8},
        "text2img256": {"guided": False},
        "layout2img-openimages256": {"classes": 354, "objects": 30},
    }.items():
        sizes, parts, _ = CASES[name]
        folder = tmp_path / name
        folder.mkdir()
        words = ["--tokenizer", str(vocabulary)] if RELEASES[name].task == "text" else []
        assert convert(original(sizes, **parts)[1], folder, "--release", name, *words) == 0
        pipe = LDM_TASKS[RELEASES[name].task][0].from_pretrained(folder / "out")
        assert pipe.unet.config.sample_size == 64  # of 256 pixels
        if "heads" in expected:
            assert set(pipe.unet.config.attention_head_dim) == {expected["heads"]}
        if "null" in expected:
            assert pipe.class_embedder.config.null_class == expected["null"]
        if "guided" in expected:
            assert pipe.has_null_condition == expected["guided"]
            assert pipe.text_window == 7
        if "classes" in expected:
            tokenizer = pipe.layout_tokenizer
            assert (tokenizer.num_classes, tokenizer.max_objects) == (354, 30)
            assert tokenizer.encode_crop and tokenizer.use_group_flag and tokenizer.use_other_flags


def test_released_noise_levels_serve_files_without_them(tmp_path):
    _, file = original(PLAIN)
    del file["state_dict"]["betas"]
    assert convert(file, tmp_path, "--release", "lsun_churches256", "--num_head_channels", "32") == 0
    pipe = diffusers_ext.LDMUnconditionalPipeline.from_pretrained(tmp_path / "out")
    assert (pipe.scheduler.config.beta_start, pipe.scheduler.config.beta_end) == (0.0015, 0.0155)
    assert pipe.unet.config.attention_head_dim == 32  # the argument, not the release's number of heads


def test_a_model_of_ones_own(tmp_path):
    unet, file = original(CROSS, cond=random_weights({"embedding.weight": (5, 12)}), scale_factor=0.5)
    words = ["--num_heads", "4", "--null_class", "4", "--scale_factor", "0.25", "--no-use_ema", "--resolution", "32"]
    assert convert(file, tmp_path, "--task", "class", *words) == 0
    pipe = diffusers_ext.LDMClassConditionalPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(pipe.unet.conv_in.weight, unet["input_blocks.0.0.weight"])
    assert pipe.class_embedder.config.null_class == 4 and pipe.latent_scale == 0.25
    assert set(pipe.unet.config.attention_head_dim) == {4} and pipe.unet.config.sample_size == 8
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["class_embedder"] == ["diffusers_ext", "LDMClassEmbedder"]


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("weights", "stock"), [(FIRST_STAGE, VQModel), (KL, AutoencoderKL)])
def test_first_stages_alone_and_out_of_a_checkpoint(weights, stock, whole, tmp_path, capsys):
    file = {"state_dict": {**weights, "loss.logvar": torch.zeros(())}}
    if whole:
        file = original(PLAIN, first_stage=weights, scale_factor=0.5)[1]
    torch.save(file, tmp_path / "model.ckpt")
    words = ["convert", "ldm-first-stage", str(tmp_path / "model.ckpt"), str(tmp_path / "out"), "--license", "mit"]
    assert cli.main([*words, "--resolution", "64"]) == 0
    assert f"{stock.__name__} with" in capsys.readouterr().out
    model = stock.from_pretrained(tmp_path / "out")
    assert model.config.scaling_factor == (0.5 if whole else 1.0) and model.config.sample_size == 64
    assert model.decode(torch.zeros(1, 3, 4, 4)).sample.shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("sizes", "parts", "words", "message"),
    [
        (PLAIN, {}, [], "Name a `task` (unconditional, class, text,"),
        (PLAIN, {}, ["--release", "bsr_sr", "--task", "class"], "`task` is 'class', but bsr_sr is a model for"),
        (PLAIN, {}, ["--task", "unconditional"], "`num_heads` is None and `num_head_channels` None: pass the one"),
        (PLAIN, {}, ["--release", "ffhq256", "--resolution", "258"], "`resolution` is 258: it must be a multiple"),
        (PLAIN, {"first_stage": {}}, ["--release", "ffhq256"], "The checkpoint holds no first stage"),
        (
            PLAIN, {"cond": {"embedding.weight": torch.zeros(2, 2)}}, ["--release", "ffhq256"],
            "holds a conditioner ('cond_stage_model.': embedding.weight ...), which models for 'unconditional' do not",
        ),
        (
            {**PLAIN, "in_channels": 7}, {"cond": KL}, ["--task", "inpainting", "--num_heads", "4"],
            "holds a conditioner ('cond_stage_model.': encoder.conv_",
        ),
        (CROSS, {}, ["--release", "cin256"], "no conditioner ('cond_stage_model.'); models for 'class' have"),
        (CROSS, CASES["cin256"][1], ["--task", "layout", "--num_heads", "4"], "is not a BERTEmbedder: it lacks"),
        (
            CROSS, CASES["layout2img-openimages256"][1], ["--task", "layout", "--num_heads", "4"],
            "`num_classes` is None: a layout model needs",
        ),
        (CROSS, CASES["txt2img-1p4B"][1], ["--release", "txt2img-1p4B"], "`tokenizer` is 'bert-base-uncased': "),
        (PLAIN, {}, ["--release", "ffhq256", "--null_class", "3"], "`null_class` is 3, but only models for 'class'"),
        (CROSS, {}, ["--release", "cin256", "--num_classes", "3"], "`num_classes` is 3, but only models for 'layout'"),
        (PLAIN, {}, ["--release", "ffhq256", "--tokenizer", "x"], "`tokenizer` is 'x', but only models for 'text'"),
        (PLAIN, {}, ["--release", "ffhq256", "--time_embed_dim", "3"], "ldm takes no --time_embed_dim"),
    ],
)  # fmt: skip
def test_rejects(sizes, parts, words, message, tmp_path, capsys):
    _, file = original(sizes, **parts)
    assert convert(file, tmp_path, *words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_rejects_the_tokenizer_of_a_larger_vocabulary(tmp_path, vocabulary, capsys):
    _, file = original(CROSS, cond=random_weights(bert_shapes(1, 12, 4, 7, inner=64)))
    assert convert(file, tmp_path, "--release", "text2img256", "--tokenizer", str(vocabulary)) == 2
    assert "`tokenizer` knows 9 tokens, the text encoder 4: pass the one" in capsys.readouterr().err


def test_rejects_files_without_noise_levels_of_unreleased_models(tmp_path, capsys):
    _, file = original(PLAIN)
    del file["state_dict"]["betas"]
    assert convert(file, tmp_path, "--task", "unconditional", "--num_heads", "4") == 2
    assert "The checkpoint holds no `betas`: name the released model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "video"}, r"`task` is 'video': it must be one of unconditional, class"),
        ({"release": "sd"}, r"`release` is 'sd': it must be one of celeba256, ffhq256"),
    ],
)
def test_settings_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        ldm_settings(**arguments)
