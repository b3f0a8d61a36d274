"""The KL first stage: its whole loss against hand computation, the recipe end to end, its refusals."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import train_autoencoder
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.losses.perceptual import CLIPDistance
from diffusers_ext.losses.quantization import vector_quantize
from diffusers_ext.models.discriminator import PatchDiscriminator
from diffusers_ext.training.autoencoder.data import read_picture
from diffusers_ext.training.autoencoder.networks import build_autoencoder
from diffusers_ext.training.autoencoder.objective import Quantized, check_sizes
from diffusers_ext.training_utils.plan import DATA_STREAM, LOSS_STREAM, StepPlan, keyed_generator
from diffusers_ext.training_utils.validation import first_rows

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "training" / "presets" / "autoencoder-kl-smoke.yaml")
PLAIN = (SMOKE, "--disc_start", "none")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    folder = tmp_path_factory.mktemp("kl") / "smoke"
    train_autoencoder.main([SMOKE, "--output_dir", str(folder)])
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    shared = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "projection_dim": 8,
    }  # fmt: skip
    text = CLIPTextConfig(vocab_size=30, max_position_embeddings=8, eos_token_id=1, bos_token_id=0, **shared)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **shared)
    folder = tmp_path_factory.mktemp("towers") / "tiny"
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def logged(folder: Path, name: str) -> list[float]:
    return [line[name] for line in lines(folder) if name in line]


def run(folder: Path, *words: str) -> Path:
    """The smoke preset with other options, without a discriminator unless asked for."""
    train_autoencoder.main([*PLAIN, "--output_dir", str(folder), "--logging_steps", "1", *words])
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def assert_same_weights(one: Path, other: Path, **tolerance) -> None:
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], **(tolerance or {"rtol": 0, "atol": 0}))


def test_smoke_run_goes_through_every_phase(smoke):
    assert AutoencoderKL.from_pretrained(smoke).config.latent_channels == 3
    assert len(logged(smoke, "disc_loss")) == 1 and logged(smoke, "adaptive_weight")[0] > 0  # from step 6 of 8
    assert all(value > 0 for value in logged(smoke, "kl")) and set(logged(smoke, "logvar")) == {0.0}
    report = lines(smoke)[-1]
    assert report.keys() >= {"validation_psnr", "validation_kl"} and report["validation_pictures"] == 64
    assert (smoke / "validation-8.png").is_file()
    card = (smoke / "README.md").read_text()
    assert "AutoencoderKL" in card and f"validation_psnr {report['validation_psnr']:.4g}" in card


def test_resuming_is_exact_with_discriminator_and_average(smoke, tmp_path):
    words = [SMOKE, "--output_dir", str(tmp_path)]
    train_autoencoder.main(words)
    (tmp_path / "checkpoint-8" / "manifest.json").unlink()  # as if the run had been killed after step 4
    train_autoencoder.main([*words, "--resume_from_checkpoint", "latest"])
    assert_same_weights(smoke, tmp_path)
    assert json.loads((smoke / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())


def test_the_scale_in_the_config_makes_unit_variance(smoke, tmp_path):
    _, data, train = train_autoencoder.parse_args([SMOKE])
    vae, (train_set, _) = AutoencoderKL.from_pretrained(smoke), load_pictures(data)
    draws = first_rows(train_set, 32, partial(read_picture, data=data), train.seed)
    ((image, generators),) = draws
    posterior = vae.encode(image).latent_dist
    noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=g) for g in generators])
    latents = vae.config.scaling_factor * (posterior.mean + posterior.std * noise)
    assert latents.std().item() == pytest.approx(1.0, rel=1e-4)
    untouched = run(tmp_path, "--max_train_steps", "1", "--scale_samples", "0")
    assert AutoencoderKL.from_pretrained(untouched).config.scaling_factor == 1.0


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_one_step_by_hand(tmp_path, reduction):
    """Every logged term of the first step, computed element by element from the same weights, pictures and draws."""
    words = [
        "--reduction", reduction, "--disc_start", "0", "--max_train_samples", "4", "--max_train_steps", "1",
        "--logvar_init", "0.3", "--kl_weight", "0.01", "--l2_weight", "0.5",
    ]  # fmt: skip
    record = lines(run(tmp_path, *words))[0]

    args, data, train = train_autoencoder.parse_args([*PLAIN, *words])
    set_seed(train.seed)
    vae, discriminator = build_autoencoder(args, 32), PatchDiscriminator(base_channels=8, num_layers=2)
    ((keys, _),) = StepPlan(4, 4, seed=train.seed).micro_batches(0)
    train_set, _ = load_pictures(data)
    image = torch.stack([
        read_picture(
            train_set[i], keyed_generator(train.seed, epoch, i, DATA_STREAM), data
        ) for epoch, i in keys
    ])  # fmt: skip
    posterior = vae.encode(image).latent_dist
    generators = [keyed_generator(train.seed, epoch, i, LOSS_STREAM) for epoch, i in keys]
    noise = torch.stack([torch.randn(3, 8, 8, generator=g) for g in generators])
    picture = vae.decode(posterior.mean + posterior.std * noise).sample
    s, difference = torch.tensor(0.3), picture - image
    elements = (difference.abs() + 0.5 * difference.square()) / s.exp() + s
    reconstruction = elements.sum() / 4 if reduction == "sum" else elements.mean()
    generator_term = -discriminator(picture).mean()
    last = vae.decoder.conv_out.weight
    norms = [torch.autograd.grad(t, last, retain_graph=True)[0].norm() for t in (reconstruction, generator_term)]
    balance = 0.5 * min(norms[0] / (norms[1] + 1e-4), torch.tensor(1e4))
    expected = {
        "l1": difference.abs().mean(),
        "kl": posterior.kl().mean(),
        "reconstruction": reconstruction,
        "adversarial": generator_term,
        "adaptive_weight": balance,
        "loss": reconstruction + 0.01 * posterior.kl().mean() + balance * generator_term,
        "disc_loss": 0.5
        * (torch.relu(1 - discriminator(image)).mean() + torch.relu(1 + discriminator(picture.detach())).mean()),
    }
    for name, value in expected.items():
        assert record[name] == pytest.approx(value.item(), rel=1e-4, abs=2e-6), name


def test_the_discriminator_waits_for_its_step_and_may_see_a_fresh_reconstruction(tmp_path):
    words = ["--disc_start", "2", "--max_train_steps", "4", "--disc_loss", "vanilla"]
    kept, fresh = run(tmp_path / "kept", *words), run(tmp_path / "fresh", *words, "--disc_fresh_forward", "true")
    for folder in (kept, fresh):
        assert [("disc_loss" in line) for line in lines(folder)[:4]] == [False, False, True, True]
    assert logged(kept, "loss")[:3] == logged(fresh, "loss")[:3]  # the generator's third step comes first
    assert logged(kept, "disc_loss") != logged(fresh, "disc_loss")


def test_the_log_variance_is_learnt_only_when_asked_for(tmp_path):
    learnt = run(tmp_path, "--max_train_steps", "3", "--learn_logvar", "true", "--logvar_init", "0.1")
    values = logged(learnt, "logvar")
    assert values[0] == pytest.approx(0.1) and values[0] > values[1] > values[2]  # l1 < 1: down to log(l1)


def test_accumulation_and_checkpointing_change_nothing_but_rounding(tmp_path):
    whole = run(tmp_path / "whole", "--max_train_steps", "2", "--train_batch_size", "8")
    split = run(tmp_path / "split", "--max_train_steps", "2", "--gradient_accumulation_steps", "2")
    assert logged(split, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-5)
    lean = ("--train_batch_size", "8", "--gradient_checkpointing", "true")
    assert_same_weights(whole, run(tmp_path / "lean", "--max_train_steps", "2", *lean), rtol=1e-4, atol=1e-5)


def test_fine_tuning_an_autoencoder_of_a_pipeline(smoke, tmp_path):
    AutoencoderKL.from_pretrained(smoke).save_pretrained(tmp_path / "pipeline" / "vae")
    place = ["--pretrained_model_name_or_path", str(tmp_path / "pipeline"), "--subfolder", "vae"]
    still = run(tmp_path / "still", *place, "--max_train_steps", "1", "--learning_rate", "0", "--scale_samples", "0")
    assert_same_weights(smoke, still)
    config = AutoencoderKL.from_pretrained(smoke).config
    assert AutoencoderKL.from_pretrained(still).config.scaling_factor == config.scaling_factor


def test_figures_carry_the_name_of_the_network_that_made_them(clip_folder, tmp_path):
    words = ["--perceptual_model", str(clip_folder), "--feature_model", str(clip_folder), "--max_train_steps", "1"]
    folder = run(tmp_path, *words, "--validation_samples", "20")
    report = lines(folder)[-1]
    assert report["validation_rfid-clip-tiny"] > 0 and report["validation_clip-tiny"] > 0
    assert report["validation_pictures"] == 20 and logged(folder, "clip-tiny")


def test_attention_sits_where_it_was_asked_for():
    words = ["--dataset_name", "scenes", "--model", "kl", "--attention_levels", "1", "2"]
    args, *_ = train_autoencoder.parse_args([*words, "--block_out_channels", "8", "16", "16"])
    config = build_autoencoder(args, 32).config
    assert config.down_block_types == ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "AttnDownEncoderBlock2D")
    assert config.up_block_types == ("AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D")


def test_the_paper_presets_of_vq_models_have_the_originals_quantiser_loss():
    """Weights 0.25 and 1 on codebook and commitment are what diffusers' legacy quantiser computes."""
    preset = ROOT / "training" / "presets" / "autoencoder-paper-vq-f4.yaml"
    args, *_ = train_autoencoder.parse_args([str(preset)])
    vqvae = VQModel(latent_channels=3, num_vq_embeddings=16, norm_num_groups=8)
    latents = torch.randn(2, 3, 4, 4, requires_grad=True)
    _, expected, (_, _, indices) = vqvae.quantize(latents)
    codebook = vqvae.quantize.embedding.weight
    _, loss = vector_quantize(latents, codebook, indices.view(2, 4, 4), beta=args.commitment_beta)
    loss = args.codebook_weight * loss
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value, (latents, codebook), retain_graph=True) for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)


def test_without_kmeans_pictures_the_codebook_keeps_its_random_start():
    words = ["--dataset_name", "scenes", "--kmeans_samples", "0", "--plain_fraction", "0", "--num_vq_embeddings", "16"]
    args, *_ = train_autoencoder.parse_args([*words, "--block_out_channels", "8", "8"])
    check_sizes(args, 32, 2, 1)  # no picture is too few for it
    objective = Quantized(build_autoencoder(args, 32), args, 10)
    before = objective.autoencoder.quantize.embedding.weight.clone()
    objective.before_step(torch.zeros(1, 3, 32, 32), 1, 0, None)
    assert torch.equal(before, objective.autoencoder.quantize.embedding.weight)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--kl_weight", "-1"], "--kl_weight must be >= 0, got -1"),
        (["--scale_samples", "-1"], "--scale_samples must be >= 0, got -1"),
        (["--kmeans_samples", "-1"], "--kmeans_samples must be >= 0, got -1"),
        (["--validation_samples", "0"], "--validation_samples must be > 0, got 0"),
        (["--attention_levels", "4"], r"--attention_levels=\[4\]: --block_out_channels gives the levels 0 to 3"),
        (["--learn_logvar", "--model", "vq"], "belong to --model=kl, got --model=vq"),
        (["--logvar_init", "1", "--model", "gumbel_vq"], "belong to --model=kl, got --model=gumbel_vq"),
        (["--lpips_dropout"], "--lpips_dropout goes with --perceptual_model=lpips, got --perceptual_model=none"),
        (["--subfolder", "vae"], "--subfolder=vae goes with --pretrained_model_name_or_path"),
        (["--disc_start", "1", "--gradient_accumulation_steps", "2"], "the adaptive weight is one of a whole batch"),
    ],
)
def test_wrong_options_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        train_autoencoder.parse_args(["--dataset_name", "scenes", "--model", "kl", *words])


def test_networks_that_do_not_fit_are_refused(smoke, tmp_path):
    words = ["--dataset_name", "scenes", "--pretrained_model_name_or_path", str(smoke)]
    args, *_ = train_autoencoder.parse_args(words)
    with pytest.raises(ValueError, match="holds a AutoencoderKL, but --model=vq trains a VQModel"):
        build_autoencoder(args, 32)
    args, *_ = train_autoencoder.parse_args([*words, "--model", "kl", "--feature_model", "somewhere"])
    with pytest.raises(ValueError, match="--resolution=30 is no multiple of the autoencoder's factor 4; .* is 32"):
        build_autoencoder(args, 30)
    with pytest.raises(ValueError, match="--feature_model needs at least 2 validation pictures, got 1"):
        check_sizes(args, 32, 4, 11, 1)
    with pytest.raises(ValueError, match="--feature_model='somewhere' is not a folder with a CLIP .* such a folder"):
        CLIPDistance("somewhere", "--feature_model")
