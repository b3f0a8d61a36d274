"""train_piti.py --stage prior_upsampler and upsampler: from a base stage to two, both adversarial forms."""

import json
from pathlib import Path

import pytest
import torch
import train_piti
from accelerate.state import AcceleratorState
from pipelines.tiny_glide import WIDTH, tiny_condition, tiny_glide, tiny_piti
from safetensors.torch import load_file

from diffusers_ext import GlidePipeline, PITIPipeline
from diffusers_ext.degradations.resizing import resize
from diffusers_ext.pipelines.piti.pipeline_piti import truncate_to_8_bits
from diffusers_ext.training.piti.args import PITIArgs
from diffusers_ext.training.piti.data import UpscaleReader
from diffusers_ext.training.piti.objective import Prediction
from diffusers_ext.training.piti.upsampler import MapUpsamplerObjective, build_opponent, build_perceptual
from diffusers_ext.training.piti.upsampler_networks import build_upsampler
from diffusers_ext.training_utils.lora import LORA_FILE

SMALL = [
    "--dataset_name", "scenes", "--dataset_config_name", "plain+one", "--max_train_samples", "24",
    "--resolution", "16", "--train_batch_size", "4", "--logging_steps", "1", "--num_inference_steps", "2",
    "--num_validation_images", "2", "--block_out_channels", "8", "16", "--layers_per_block", "1",
    "--attention_levels", "1", "--dropout", "0", "--num_head_channels", "8", "--norm_num_groups", "4",
    "--cross_attention_dim", str(WIDTH),
]  # fmt: skip
PRIOR = [*SMALL, "--stage", "prior_upsampler", "--text_attention_heads", "2"]
SKETCH = [
    *SMALL, "--stage", "upsampler", "--condition", "sketch", "--encoder_sample_size", "32", "--encoder_layers", "1",
    "--encoder_attention_heads", "2", "--start_step", "1", "--disc_channels", "4", "--disc_layers", "2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(words: list[str], folder: Path, steps: int, *more: str) -> Path:
    train_piti.main([*words, "--output_dir", str(folder), "--max_train_steps", str(steps), *more])
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """Base stages of 8 pixels, and VGG-19's first convolutions with small random weights."""
    root = tmp_path_factory.mktemp("bases")
    tiny_glide(upscale=False).save_pretrained(root / "glide")
    tiny_piti("sketch", upscale=False).save_pretrained(root / "piti")
    torch.manual_seed(0)
    widths, weights, channels = {0: 4, 2: 4, 5: 6, 7: 6}, {}, 3
    for index, width in widths.items():
        weights[f"features.{index}.weight"] = torch.randn(width, channels, 3, 3) * 0.3
        weights[f"features.{index}.bias"], channels = torch.zeros(width), width
    torch.save(weights, root / "vgg.pt")
    return {name: str(root / name) for name in ("glide", "piti", "vgg.pt")}


@pytest.fixture(scope="module")
def prior(bases, tmp_path_factory) -> Path:
    words = [*PRIOR, "--pretrained_model_name_or_path", bases["glide"], "--downsampling", "area"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return run(words, tmp_path_factory.mktemp("prior") / "run", 2)


def test_a_prior_gets_an_upsampler(prior, bases):
    pipe, base = GlidePipeline.from_pretrained(prior), GlidePipeline.from_pretrained(bases["glide"])
    assert pipe.upscale_unet.config.sample_size == 16 and pipe.upscale_unet.config.in_channels == 6
    for name in (
        "unet",
        "text_encoder",
    ):  # the base stage stays as it is
        before = getattr(base, name).state_dict()
        assert all(torch.equal(value, before[key]) for key, value in getattr(pipe, name).state_dict().items())
    # the upsampler's text encoder began as a copy
    trained, before = pipe.upscale_text_encoder.state_dict(), base.text_encoder.state_dict()
    moved = [float((trained[key].float() - before[key].float()).abs().max()) for key in before]
    assert 0 < max(moved) < 0.01
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 2, "upscale_num_inference_steps": 2}
    images = pipe("a red ring", **steps, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (1, 3, 16, 16) and images.isfinite().all()
    (figures,) = [line for line in lines(prior) if "validation_psnr" in line]
    assert figures["validation_psnr"] > 0 and "adversarial" not in lines(prior)[-2]
    assert (prior / "validation-2.png").is_file() and not list(prior.glob("checkpoint-*/disc*"))


@pytest.mark.parametrize("form", ["wgan_gp", "log"])
def test_an_upsampler_of_maps_and_its_discriminator(form, prior, bases, tmp_path):
    """Both step from `--start_step` on, in bf16; the run goes on from a checkpoint as if nothing had been."""
    words = [*SKETCH, "--pretrained_model_name_or_path", bases["piti"], "--adversarial_loss", form]
    words += ["--pretrained_upsampler_name_or_path", str(prior), "--perceptual_model", bases["vgg.pt"]]
    words += ["--mixed_precision", "bf16", "--checkpointing_steps", "2", "--use_ema", "true"]
    folder = run(words, tmp_path / "run", 2)
    first = load_file(folder / "checkpoint-2" / "discriminator.safetensors")
    run(words, folder, 3, "--resume_from_checkpoint", "latest", "--resume_with_changes")
    straight = run(words, tmp_path / "straight", 3)
    for name in ("objective", "discriminator"):
        resumed, whole = (load_file(one / "checkpoint-3" / f"{name}.safetensors") for one in (folder, straight))
        assert resumed.keys() == whole.keys() and all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert any(not torch.equal(value, first[key]) for key, value in whole.items())

    before, *after = [line for line in lines(straight) if "loss" in line]
    assert "disc_loss" not in before and "vgg19" not in before
    for line in after:
        assert line["adaptive_weight"] == pytest.approx(0.01) and line["vgg19"] > 0
        whole = line["mse"] + line["vb"] + 0.004 * line["vgg19"] + 0.01 * line["adversarial"]
        assert line["loss"] == pytest.approx(whole, rel=1e-3)
        assert ("disc_penalty" in line) == (form == "wgan_gp")
        assert form == "wgan_gp" or line["adversarial"] < 0 < line["disc_loss"]  # log D, of probabilities

    pipe, base = PITIPipeline.from_pretrained(straight), PITIPipeline.from_pretrained(bases["piti"])
    assert all(torch.equal(value, base.unet.state_dict()[key]) for key, value in pipe.unet.state_dict().items())
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 2, "upscale_num_inference_steps": 2}
    images = pipe(**tiny_condition("sketch"), **steps, generator=torch.Generator().manual_seed(0), output_type="pt")[0]
    assert images.shape == (1, 3, 16, 16) and images.isfinite().all()


def options(**more) -> PITIArgs:
    return PITIArgs(stage="upsampler", condition="sketch", pretrained_model_name_or_path="piti", **more)


def test_the_two_forms_judge_the_other_way_round():
    """WGAN: real images get high scores. The paper's D marks the generated, and the generator lowers log D."""
    released, paper = (build_opponent(options(adversarial_loss=form), 256) for form in ("wgan_gp", "log"))
    high, low = torch.full((2, 1), 3.0), torch.full((2, 1), -3.0)
    assert released.loss(high, low) < released.loss(low, high) and released.penalty == 10
    assert paper.loss(low, high) < paper.loss(high, low) and not paper.penalty
    scores = torch.zeros(2, 1, requires_grad=True)
    assert (torch.autograd.grad(released.generator_loss(scores), scores)[0] < 0).all()
    assert (torch.autograd.grad(paper.generator_loss(scores), scores)[0] > 0).all()
    torch.testing.assert_close(paper.generator_loss(scores), torch.tensor(0.5).log())
    for opponent in (released, paper):
        assert (opponent.goes_first, opponent.weight, opponent.start) == (True, 0.01, 100)
        assert sum(p.numel() for p in opponent.network.parameters()) == 2_764_737  # pix2pix's, with biases
    assert build_opponent(options(adversarial_weight=0.0), 256) is None


def test_the_clean_image_of_the_true_noise_is_the_image():
    pipe = tiny_piti("sketch")
    objective = MapUpsamplerObjective(pipe, options())
    images, noise = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 3, 16, 16)
    timesteps = torch.tensor([0, 400, 900])
    noisy = pipe.upscale_scheduler.add_noise(images, noise, timesteps)
    output = torch.cat([noise, torch.zeros_like(noise)], dim=1)
    found = Prediction(images, noise, noisy, timesteps, torch.ones(3), output)
    torch.testing.assert_close(objective.clean(found), images, atol=2e-3, rtol=0)
    wrong = objective.clean(Prediction(images, noise, noisy, timesteps, torch.ones(3), output + 9))
    assert wrong.min() == -1 and wrong.max() <= 1


class Given:
    """A reader of one picture."""

    def __call__(self, row, generator):
        torch.rand(4, generator=generator)
        return {"image": row, "tokens": torch.zeros(3)}


def test_small_images_belong_to_large_ones():
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    plain, light, smooth = (
        UpscaleReader(Given(), 4, options(degradation=name, downsampling="area"))
        for name in ("none", "bsr_light", "bsr_light_l0")
    )
    small = [[one(image, torch.Generator().manual_seed(i)) for i in range(12)] for one in (plain, light, smooth)]
    for samples in small:
        for sample in samples:
            low = sample["low"]
            assert torch.equal(sample["image"], image) and low.shape == (3, 8, 8)
            torch.testing.assert_close((low + 1) * 127.5, ((low + 1) * 127.5).round(), atol=1e-3, rtol=0)
    torch.testing.assert_close(small[0][0]["low"], resize(image, 8, 8, "area"), atol=1 / 127.5, rtol=0)
    assert torch.equal(small[0][0]["low"], small[0][1]["low"]) and not torch.equal(
        small[1][0]["low"], small[1][1]["low"]
    )
    equal = [torch.equal(one["low"], other["low"]) for one, other in zip(*small[1:], strict=True)]
    assert 6 <= sum(equal) < 12  # but for the smoothing all draws are those of light BSR


def test_the_second_stage_alone_is_that_of_a_call():
    pipe, steps = tiny_piti("sketch"), {"num_inference_steps": 2, "output_type": "latent"}
    told, generators = tiny_condition("sketch"), [torch.Generator().manual_seed(4) for _ in range(2)]
    whole = pipe(**told, **steps, upscale_num_inference_steps=3, generator=generators[0]).images
    base = PITIPipeline(pipe.encoder, pipe.unet, pipe.scheduler, condition_type="sketch")
    base.set_progress_bar_config(disable=True)
    low = truncate_to_8_bits(base(**told, **steps, generator=generators[1]).images)
    embeds = pipe.encode_conditions(pipe.read_conditions(**told), pipe.upscale_encoder)
    drawn = pipe.run_upsampler(low, embeds, num_inference_steps=3, generator=generators[1])
    torch.testing.assert_close(drawn, whole)
    with pytest.raises(ValueError, match="no `upscale_unet`"):
        base.run_upsampler(low, embeds)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [*PRIOR],
            r"--stage prior_upsampler enlarges .*: name a GLIDE prior \(--stage prior\) with --pretrained_model",
        ),
        ([*SKETCH], r"--stage upsampler enlarges .*: name a PITI pipeline \(--stage joint\)"),
        ([*SKETCH, "--cond_dropout_prob", "0.1"], "--stage upsampler enlarges"),
        ([*SMALL, "--adversarial_weight", "0.01"], "--adversarial_weight=0.01 goes with --stage prior_upsampler and"),
        (
            [*SMALL, "--degradation", "bsr_light"],
            "--degradation=bsr_light goes with --stage prior_ups",
        ),
        ([*SMALL, "--perceptual_model", "vgg19"], "--perceptual_model=vgg19 goes with --stage prior_upsampler and"),
        ([*SMALL, "--start_step", "-1"], "--start_step must be >= 0, got -1"),
        ([*SMALL, "--disc_layers", "0"], "--disc_layers must be > 0, got 0"),
    ],
)
def test_options_that_do_not_fit(words, message):
    with pytest.raises(ValueError, match=message):
        train_piti.parse_args(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cond_dropout_prob", "0.1"], "--cond_dropout_prob=0.1 goes with the base stages"),
        (["--guidance_scale", "2"], "--guidance_scale=2.0 goes with the base stages: an upsampler is not guided"),
        (
            ["--gradient_accumulation_steps", "2"],
            "makes 2 micro-steps of 4 .*, but the discriminator learns from a whole batch: pass --train_batch_size 8, "
            "more processes, or --adversarial_weight 0",
        ),
        (["--resolution", "12"], "--resolution=12 must be a multiple of the 8 pixels"),
        (["--resolution", "8"], "--resolution=8 must be a multiple of the 8 pixels"),
        (["--condition", "geometry"], "draws from sketch: pass --condition sketch"),
        (["--disc_layers", "3"], "--resolution=16 is too small for --disc_layers=3, which needs 24 pixels"),
        (
            ["--pretrained_upsampler_name_or_path", "PITI"],
            "has no upsampler: without --pretrained_upsampler_name_or_path it is new",
        ),
        (["--stage", "prior_upsampler"], "holds a PITIPipeline, but --stage prior_upsampler starts from a GlidePipel"),
        (
            ["--loss_type", "mse", "--pretrained_upsampler_name_or_path", "PRIOR"],
            "its variance is learned: pass --loss",
        ),
    ],
)
def test_bases_that_do_not_fit(words, message, bases, prior, tmp_path):
    words = [{"PITI": bases["piti"], "PRIOR": str(prior)}.get(word, word) for word in words]
    words = [*SKETCH, "--pretrained_model_name_or_path", bases["piti"], *words]
    with pytest.raises(ValueError, match=message):
        run(words, tmp_path, 1, "--text_attention_heads", "2")


def test_a_prior_whose_width_or_words_are_others(bases, prior, tmp_path):
    words = [*PRIOR, "--pretrained_model_name_or_path", bases["glide"]]
    with pytest.raises(ValueError, match=r"--cross_attention_dim=32, but the text encoder .* has a width of 16"):
        run([*words, "--cross_attention_dim", "32"], tmp_path / "wide", 1)
    AcceleratorState._reset_state(reset_partial_state=True)
    inpaint = tiny_glide(inpaint=True)
    inpaint.save_pretrained(tmp_path / "inpaint")
    with pytest.raises(ValueError, match="fills parts of images"):
        run([*PRIOR, "--pretrained_model_name_or_path", str(tmp_path / "inpaint")], tmp_path / "fill", 1)
    AcceleratorState._reset_state(reset_partial_state=True)
    other = GlidePipeline.from_pretrained(prior)
    other.tokenizer.add_tokens(["zebra"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained with another tokenizer"):
        run([*words, "--pretrained_upsampler_name_or_path", str(tmp_path / "other")], tmp_path / "words", 1)


def test_an_upsampler_that_is_there_is_trained_on(tmp_path, prior):
    """`--pretrained_model_name_or_path` with an upsampler: its networks and noise levels."""
    tiny_piti("sketch").save_pretrained(tmp_path / "piti")
    words = [*SKETCH, "--pretrained_model_name_or_path", str(tmp_path / "piti"), "--adversarial_weight", "0"]
    folder = run([*words, "--learning_rate", "1e-6", "--gradient_accumulation_steps", "2"], tmp_path / "run", 1)
    trained, before = (PITIPipeline.from_pretrained(one) for one in (folder, tmp_path / "piti"))
    for name in ("upscale_unet", "upscale_encoder"):
        pairs = zip(getattr(trained, name).parameters(), getattr(before, name).parameters(), strict=True)
        moved = [float((one - other).detach().abs().max()) for one, other in pairs]
        assert 0 < max(moved) < 1e-4
    assert type(trained.upscale_scheduler) is type(before.upscale_scheduler)


def test_matrices_of_an_upsampler_do_not_get_into_the_base(tmp_path):
    """Both have layers of the same names and sizes."""
    tiny_piti("sketch").save_pretrained(tmp_path / "piti")
    words = [*SKETCH, "--pretrained_model_name_or_path", str(tmp_path / "piti"), "--adversarial_weight", "0"]
    folder = run([*words, "--rank", "2", "--learning_rate", "1e-2"], tmp_path / "run", 2)
    trained, pipe = (PITIPipeline.from_pretrained(one) for one in (folder, tmp_path / "piti"))
    with pytest.raises(ValueError, match="matrices of upscale_unet, not of unet: call `pipe.upscale_unet.load_lora_a"):
        pipe.load_lora_weights(folder)
    pipe.upscale_unet.load_lora_adapter(folder, prefix="upscale_unet", weight_name=LORA_FILE)  # as the message says
    pipe.upscale_unet.fuse_lora()
    pipe.upscale_unet.unload_lora()
    for part in ("unet", "upscale_unet"):
        merged, found = getattr(trained, part).state_dict(), getattr(pipe, part).state_dict()
        assert all(torch.allclose(value, found[name], atol=1e-6) for name, value in merged.items())
    base = PITIPipeline.from_pretrained(tmp_path / "piti").upscale_unet.state_dict()
    assert not all(torch.equal(value, base[name]) for name, value in trained.upscale_unet.state_dict().items())


def test_an_upsampler_keeps_the_colours_of_its_base(tmp_path):
    tiny_piti(upscale=False).save_pretrained(tmp_path)
    words = [*SMALL, "--stage", "upsampler", "--encoder_attention_heads", "2", "--encoder_layers", "1"]
    words += ["--pretrained_model_name_or_path", str(tmp_path), "--palette", "coco182"]
    with pytest.raises(ValueError, match="--palette=coco182: .* knows its labels by other colours; leave it out"):
        build_upsampler(train_piti.parse_args(words)[0], 16)


@pytest.mark.parametrize("content", [b"no weights", None])
def test_a_file_that_is_no_vgg_is_named_with_its_option(content, tmp_path):
    file = tmp_path / "other.pt"
    if content is None:
        torch.save({"0.weight": torch.zeros(4, 3, 3, 3)}, file)
    else:
        file.write_bytes(content)
    args = train_piti.parse_args([*PRIOR, "--pretrained_model_name_or_path", "x", "--perceptual_model", str(file)])[0]
    with pytest.raises(ValueError, match=r"^--perceptual_model=.*other\.pt: "):
        build_perceptual(args, torch.device("cpu"))
