"""`diffusers-ext convert glide` and `convert piti`, in process, on the recorded tiny weights."""

import re

import pytest
import torch
from conversion.test_glide_piti import weights
from diffusers import DiffusionPipeline
from pipelines.tiny_paella import tiny_tokenizer
from safetensors.torch import save_file

from diffusers_ext import GlidePipeline, GlideTextEncoder, NormalizedCFGScheduler, PITIEncoder, PITIPipeline, cli

FAST27 = [997, 800, 799, 600, 599, 500, 400]  # its beginning


def inpainting(name: str, stem: str = "input_blocks.0.0.weight") -> dict[str, torch.Tensor]:
    """The same model with a masked image and a mask behind the noisy image."""
    found = weights(name)
    old = found[stem]
    found[stem] = torch.cat([old[:, :3], old[:, :3], old[:, :1], old[:, 3:]], dim=1)
    return found


def large(name: str) -> dict[str, torch.Tensor]:
    """A base model as an upsampler."""
    found = weights(name)
    stem = next(key for key in found if key.endswith("input_blocks.0.0.weight"))
    found[stem] = torch.cat([found[stem]] * 2, dim=1)
    return found


def encoder_alone(name: str) -> dict[str, torch.Tensor]:
    whole = weights(name)
    return {key.removeprefix("encoder."): value for key, value in whole.items() if key.startswith("encoder.")}


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """Runs the command on files that it writes; words that are state dicts become files."""
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer().save_pretrained("words")

    def run(*words, status: int = 0) -> str:
        named = []
        for number, word in enumerate(words):
            if isinstance(word, dict):
                save_file({key: value.contiguous() for key, value in word.items()}, f"{number}.safetensors")
                word = f"{number}.safetensors"
            named.append(str(word))
        assert cli.main(["convert", *named[:2], "out", "--license", "mit", *named[2:]]) == status
        captured = capsys.readouterr()
        return captured.err if status else captured.out

    return run


TINY = ("--num_head_channels", 16)
GLIDE = ("--num_heads", 4, 2, "--num_head_channels", 16, 32, "--resolution", 16, 32, "--tokenizer", "words")


def test_glide_with_its_upsampler_has_the_released_samplers(convert):
    said = convert("glide", weights("glide_base_unet"), "--upsampler", weights("glide_superres_unet"), *GLIDE)
    assert "GlidePipeline with" in said
    pipe = DiffusionPipeline.from_pretrained("out", dtype=torch.float32)
    assert isinstance(pipe, GlidePipeline) and pipe.text_encoder.config["num_attention_heads"] == 4
    assert pipe.upscale_text_encoder.config["num_attention_heads"] == 2
    assert pipe.upscale_unet.config["attention_head_dim"] == 32
    base, upscale = pipe.scheduler, pipe.upscale_scheduler
    for scheduler, schedule, sampler, count in (
        (base, "squaredcos_cap_v2", "ancestral", 100),
        (upscale, "linear", "ddim", 27),
    ):
        scheduler.set_timesteps()
        config = scheduler.config
        assert len(scheduler.timesteps) == count
        assert (config["beta_schedule"], config["sampler"]) == (schedule, sampler)
        assert (config["variance_type"], config["num_train_timesteps"]) == ("learned_range", 1000)
    assert upscale.timesteps.tolist()[: len(FAST27)] == FAST27
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe("a red circle", num_inference_steps=2, upscale_num_inference_steps=2, generator=generator,
                  output_type="np").images  # fmt: skip
    assert images.shape == (1, 32, 32, 3)


def test_glide_for_inpainting_without_and_with_an_upsampler(convert):
    convert("glide", inpainting("glide_base_unet"), "--upsampler", inpainting("glide_superres_unet"), *GLIDE)
    pipe = GlidePipeline.from_pretrained("out")
    assert pipe.inpaints and (pipe.unet.config["in_channels"], pipe.upscale_unet.config["in_channels"]) == (7, 10)


@pytest.mark.parametrize("guidance", ["normalized", "plain"])
def test_piti_with_its_upsampler_has_the_released_samplers(convert, guidance):
    options = ("--num_heads", 4, *TINY, "--resolution", 16, 32, "--condition_type", "label_map")
    chosen = () if guidance == "normalized" else ("--guidance", guidance)
    convert("piti", weights("piti_mask"), "--upsampler", large("piti_mask"), *options, *chosen)
    pipe = DiffusionPipeline.from_pretrained("out", dtype=torch.float32)
    assert isinstance(pipe, PITIPipeline) and pipe.config["condition_type"] == "label_map"
    assert isinstance(pipe.scheduler, NormalizedCFGScheduler) == (guidance == "normalized")
    inner = pipe.scheduler.scheduler if guidance == "normalized" else pipe.scheduler
    assert inner.config["timestep_respacing"] == "250" and inner.config["beta_schedule"] == "squaredcos_cap_v2"
    upscale = pipe.upscale_scheduler.config
    assert (upscale["timestep_respacing"], upscale["beta_schedule"], upscale["sampler"]) == (
        "fast27", "linear", "ancestral",
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        label_map=torch.randint(0, 5, (1, 256, 256)).numpy().astype("uint8"),
        num_inference_steps=2,
        upscale_num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert images.shape == (1, 32, 32, 3)


def test_piti_for_sketches_is_told_by_its_channels(convert):
    convert("piti", weights("piti_sketch"), "--num_heads", 4, *TINY)
    assert PITIPipeline.from_pretrained("out").config["condition_type"] == "sketch"


def test_an_encoder_alone_takes_the_decoder_of_glide(convert):
    encoder, glide = encoder_alone("piti_superres"), weights("glide_base_unet")
    convert("piti", encoder, "--decoder", glide, "--num_heads", 2, *TINY)
    pipe = PITIPipeline.from_pretrained("out")
    assert pipe.encoder.config["sample_size"] == 64 and pipe.upscale_unet is None
    assert torch.equal(pipe.unet.class_embedding.weight.float(), glide["transformer_proj.weight"].float())
    assert torch.equal(pipe.encoder.class_token.weight.float(), encoder["cls_token"][0].float())


@pytest.mark.parametrize(
    "words, message",
    [
        (lambda: ("glide", weights("piti_mask")), "is PITI's, not GLIDE's.*tfwang/PITI is a whole PITI model"),
        (lambda: ("glide", encoder_alone("piti_mask")), "is PITI's, not GLIDE's: it holds cls_token"),
        (lambda: ("piti", weights("glide_base_unet")), "is GLIDE's, not PITI's.*tfwang/PITI.*convert glide"),
        (lambda: ("glide", weights("glide_superres_unet")), "The checkpoint takes 6 channels, but a base model"),
        (
            lambda: ("glide", weights("glide_base_unet"), "--upsampler", weights("glide_base_unet")),
            "`upsampler` takes 3 channels, but an upsampler takes 6 or 10",
        ),
        (
            lambda: ("glide", weights("glide_base_unet"), "--upsampler", inpainting("glide_superres_unet"), *GLIDE),
            "`upscale_unet` takes 10 channels, expected 6",
        ),
        (lambda: ("glide", weights("glide_base_unet"), "--num_heads", 4, 4, 4), "`num_heads` is .4, 4, 4.: pass one"),
        (
            lambda: ("glide", weights("glide_base_unet"), "--num_heads", 4, *TINY, "--tokenizer", "./nowhere"),
            "`tokenizer` is './nowhere'",
        ),
        (lambda: ("glide", weights("perceptual_vgg22")), "not a GLIDE model: it lacks token_embedding.weight"),
        (lambda: ("piti", weights("perceptual_vgg22")), "not a PITI model: it lacks encoder.cls_token"),
        (lambda: ("piti", weights("piti_superres")), "The checkpoint takes 6 channels, but a base model"),
        (lambda: ("piti", encoder_alone("piti_mask")), "an encoder alone .*base.pt of GLIDE as `decoder`"),
        (
            lambda: ("piti", encoder_alone("piti_mask"), "--decoder", weights("piti_mask")),
            "`decoder` is not GLIDE's base model",
        ),
        (
            lambda: ("piti", weights("piti_mask"), "--decoder", weights("glide_base_unet")),
            "the checkpoint has a decoder of its own",
        ),
        (
            lambda: ("piti", weights("piti_mask"), "--num_heads", 4, *TINY, "--condition_type", "sketch"),
            "`condition_type` is 'sketch', and the encoder takes 3 channels",
        ),
        (
            lambda: ("piti", weights("piti_mask"), "--upsampler", weights("piti_superres"), "--num_heads", 4, 2,
                     "--num_head_channels", 16, 32),
            "`upscale_encoder` takes conditions of 64 pixels, `encoder` of 256",
        ),
    ],
)  # fmt: skip
def test_other_files_are_refused(convert, words, message):
    error = convert(*words(), status=2)
    assert re.search(message, error), error


@pytest.mark.parametrize(("channels", "count"), [(3, 338_015_302), (1, 338_012_166), (6, 338_020_006)])
def test_whole_files_have_the_published_numbers_of_parameters(channels, count):
    """With the U-Nets that test_glide_piti counts: 308,728,902 and 322,059,462 parameters."""
    with torch.device("meta"):
        text, encoder = GlideTextEncoder(), PITIEncoder(channels)
    words = sum(p.numel() for p in text.parameters())
    assert (words + 308_728_902, words + 322_059_462) == (385_030_726, 398_361_286)
    own = sum(p.numel() for p in encoder.parameters())
    assert own + 308_728_902 == count
    assert channels != 3 or own + 322_059_462 == 351_345_862
