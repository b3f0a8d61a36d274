"""What a `-paper-` preset says against what the papers and their configurations say.

The numbers are typed from the sources, not from the presets: arXiv 2112.10752 (tables 12 and 15) and the
configurations of CompVis/latent-diffusion@a506df5; arXiv 2211.07292 and dome272/Paella@b1f88ef; arXiv 2211.08332,
section 4; arXiv 2004.04092 and ChunyuanLI/Optimus@f3190fe; arXiv 2205.12952 and PITI-Synthesis/PITI@d9f7481;
openai/glide-text2im@69b5307; openai/guided-diffusion@22e0df8:README.md. The other
numbers of Cascaded Diffusion (arXiv 2106.15282, no code) are as the project's fact sheet has them, unverified. A batch
is that of a step, all processes together.
"""

import importlib
import math
import re
from pathlib import Path

import pytest
import torch

from diffusers_ext.training.ldm.args import LDMArgs
from diffusers_ext.training.ldm.networks import build_conditioner
from diffusers_ext.training.piti.networks import build_encoder as build_piti_encoder
from diffusers_ext.training.piti.networks import build_text_encoder
from diffusers_ext.training.piti.networks import build_unet as build_piti_unet
from diffusers_ext.training.piti.upsampler import build_opponent

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "training" / "presets"
PAPER = {path.stem.replace("paper-", ""): path for path in sorted(PRESETS.glob("*-paper-*.yaml"))}

# First stages: pictures of a step on one GPU, steps; the PatchGAN's first step, weight and strided layers; codes.
# The rate is 4.5e-6 a picture, AdamW's betas 0.5 and 0.9. f2 was not released: batch and steps are ours.
FIRST_STAGES = {
    "autoencoder-kl-f2": (4, 176991, 50001, 0.5, 3, None),
    "autoencoder-kl-f4": (10, 176991, 50001, 0.5, 3, None),
    "autoencoder-kl-f8": (4, 246803, 50001, 0.5, 3, None),
    "autoencoder-kl-f16": (6, 442998, 50001, 0.5, 3, None),
    "autoencoder-kl-f32": (6, 406763, 50001, 0.5, 3, None),
    "autoencoder-vq-f2": (4, 533066, 0, 0.75, 3, 2048),
    "autoencoder-vq-f4": (8, 533066, 0, 0.75, 3, 8192),
    "autoencoder-vq-f4-noattn": (8, 658131, 11, 0.75, 3, 8192),
    "autoencoder-vq-f8": (10, 971043, 1, 0.6, 2, 16384),
    "autoencoder-vq-f8-n256": (10, 1608649, 250001, 0.75, 3, 256),
    "autoencoder-vq-f16": (14, 1101166, 250001, 0.75, 2, 16384),
}

# Latent diffusion: batch, rate, steps (None: unpublished), noise levels, error, first stage, condition dropped.
LATENT_DIFFUSION = {
    "ldm-celebahq-256": (48, 9.6e-5, 410_000, (0.0015, 0.0195), "l2", "vq-f4", 0.0),
    "ldm-ffhq-256": (42, 8.4e-5, 635_000, (0.0015, 0.0195), "l2", "vq-f4", 0.0),
    "ldm-lsun-bedrooms-256": (48, 9.6e-5, 1_900_000, (0.0015, 0.0195), "l2", "vq-f4", 0.0),
    "ldm-lsun-churches-256": (96, 5e-5, 500_000, (0.0015, 0.0155), "l1", "kl-f8", 0.0),
    "ldm-imagenet-ldm8": (64, 6.4e-5, 4_800_000, (0.0015, 0.0195), "l2", "vq-f8", 0.0),
    "ldm-imagenet-ldm4": (1200, 1e-4, 178_000, (0.0015, 0.0195), "l2", "vq-f4", 0.1),
    "ldm-text-laion": (680, 1e-4, 390_000, (0.00085, 0.012), "l2", "kl-f8", 0.1),
    "ldm-text-conceptual": (28, 28 * 2e-6, None, (0.0015, 0.0195), "l2", "vq-f4", 0.1),
    "ldm-layout-openimages": (24, 4.8e-5, 4_400_000, (0.0015, 0.0205), "l1", "vq-f4", 0.1),
    "ldm-layout-coco": (48, 4.8e-5, 170_000, (0.0015, 0.0205), "l1", "vq-f8", 0.1),
    "ldm-semantic-256": (48, 4.8e-5, 360_000, (0.0015, 0.0205), "l1", "vq-f4", 0.0),
    "ldm-semantic-512": (8, 8 * 1e-6, None, (0.0015, 0.0205), "l1", "vq-f4", 0.0),
    "ldm-super-resolution": (64, 6.4e-5, 860_000, (0.0015, 0.0155), "l2", "vq-f4", 0.0),
    "ldm-super-resolution-bsr": (64, 6.4e-5, 860_000, (0.0015, 0.0155), "l2", "vq-f4", 0.0),
    "ldm-inpainting": (128, 128 * 1e-6, 360_000, (0.0015, 0.0205), "l1", "vq-f4", 0.0),
    "ldm-inpainting-big": (128, 128 * 1e-6, None, (0.0015, 0.0205), "l1", "vq-f4-noattn", 0.0),
}

# The others: batch, rate, steps, weight decay, largest gradient norm.
OTHERS = {
    "paella-v1": (64 * 22, 3e-4, 501_000, 0.01, 5.0),
    "versatile-single-256": (2048, 1e-4, math.ceil(30e6 / 2048), 0.01, 1.0),
    "versatile-single-512": (2048, 1e-4, 6.4e6 / 2048, 0.01, 1.0),
    "versatile-dual-256": (1024, 1e-4, math.ceil(30e6 / 1024), 0.01, 1.0),
    "versatile-dual-512": (1024, 1e-4, 6.4e6 / 1024, 0.01, 1.0),
    "versatile-four-256": (512, 5e-5, math.ceil(30e6 / 512), 0.01, 1.0),
    "versatile-four-512": (512, 5e-5, 6.4e6 / 512, 0.01, 1.0),
    "optimus-snli": (5, 5e-5, 31_250, 0.0, 1.0),
    "optimus-wikipedia": (16, 5e-5, 508_523, 0.0, 1.0),
}


# Cascaded Diffusion: batch, rate, steps; levels, schedule, loss; widths, blocks, sides with attention, heads (their
# number, or the width of one), dropout; side of the small images and what is done to them.
CASCADED = {
    "cascaded-adm-64": (
        (2048, 3e-4, 540_000), (1000, "cosine", "hybrid"), ([192, 384, 576, 768], 3, {32, 16, 8}, (None, 64), 0.1),
        None,
    ),
    "cascaded-adm-64-256": (
        (256, 1e-4, 500_000), (1000, "linear", "hybrid"),
        ([192, 192, 384, 384, 768, 768], 2, {32, 16, 8}, (4, None), 0.0), (64, "none"),
    ),
    "cascaded-32": (
        (2048, 1e-4, 700_000), (4000, "cosine", "hybrid"), ([256, 512, 768, 1024], 6, {16, 8}, (4, None), 0.1), None
    ),
    "cascaded-32-64": (
        (2048, 1e-4, 400_000), (4000, "cosine", "hybrid"), ([256, 512, 768, 1024], 5, {16, 8}, (4, None), 0.1),
        (32, "truncated"),
    ),
    "cascaded-64-128": (
        (1024, 1e-4, 500_000), (2000, "cosine", "mse"), ([128, 256, 512, 1024, 1024], 3, {16}, (1, None), 0.0),
        (64, "blur"),
    ),
    "cascaded-64-256": (
        (1024, 1e-4, 500_000), (2000, "cosine", "mse"), ([128, 256, 512, 512, 1024, 1024], 3, {16}, (1, None), 0.0),
        (64, "blur"),
    ),
    "cascaded-lsun-64-128": (
        (1024, 1e-4, 500_000), (2000, "cosine", "mse"), ([128, 256, 512, 1024, 1024], 3, {16}, (1, None), 0.0),
        (64, "truncated"),
    ),
}  # fmt: skip

# PITI: trained part, rate, steps (None: unpublished), condition dropped, where it starts.
PITI_RUNS = {
    "encoder": ("encoder", 3.5e-5, 200_000, 0.0, "runs/glide-base"),
    "encoder-continued": ("encoder", 2e-5, 60_000, 0.2, "runs/piti-paper-{}-encoder"),
    "joint": ("joint", 3e-5, None, 0.2, "runs/piti-paper-{}-encoder-continued"),
}
# its conditions, and the parameters of encoder and U-Net together
PITI_CONDITIONS = {
    "mask": ("label_map", 338_015_302), "sketch": ("sketch", 338_012_166), "geometry": ("geometry", 338_020_006)
}  # fmt: skip
PITI = {f"piti-{kind}-{run}": (kind, run) for kind in PITI_CONDITIONS for run in PITI_RUNS}
GLIDE_PARAMETERS = 385_030_726


PITI_UPSAMPLERS = ("piti-upsampler",)


def parse(name: str):
    return importlib.import_module(f"train_{name.split('-')[0]}").parse_args([str(PAPER[name])])


def test_every_paper_preset_is_in_a_table():
    assert set(PAPER) == {*FIRST_STAGES, *LATENT_DIFFUSION, *CASCADED, *PITI, *PITI_UPSAMPLERS, "piti-prior", *OTHERS}


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_first_stages(name):
    args, data, train = parse(name)
    batch, steps, *discriminator, codes = FIRST_STAGES[name]
    assert (train.total_batch_size, train.max_train_steps, data.resolution) == (batch, steps, 256)
    assert train.learning_rate == pytest.approx(4.5e-6 * batch)
    assert [args.disc_start, args.disc_weight, args.disc_layers] == discriminator
    assert (train.adam_beta1, train.adam_beta2, train.adam_weight_decay) == (0.5, 0.9, 0.0)
    assert (args.l1_weight, args.l2_weight, args.perceptual_model, args.perceptual_weight) == (1, 0, "lpips", 1)
    assert args.disc_loss == "hinge" and args.disc_fresh_forward and not train.use_ema
    if codes is None:
        assert (args.model, args.resolved_reduction, args.kl_weight) == ("kl", "sum", 1e-6)
        assert args.logvar_init == 0 and not args.learn_logvar
    else:  # 0.25 on the codebook's term and 1 on the commitment; neither k-means nor restarts
        assert (args.model, args.resolved_reduction, args.num_vq_embeddings) == ("vq", "mean", codes)
        assert (args.codebook_weight, args.codebook_weight * args.commitment_beta) == (0.25, 1.0)
        assert args.plain_fraction == args.restart_fraction == args.kmeans_samples == args.scale_samples == 0


@pytest.mark.parametrize("name", LATENT_DIFFUSION)
def test_latent_diffusion(name):
    args, _, train = parse(name)
    batch, rate, steps, betas, loss, first_stage, dropped = LATENT_DIFFUSION[name]
    assert train.total_batch_size == batch and train.learning_rate == pytest.approx(rate)
    assert steps is None or train.max_train_steps == steps
    assert (args.beta_start, args.beta_end, args.num_train_timesteps) == (*betas, 1000)
    assert (args.loss_type, args.vlb_weight, args.dropout_of_condition) == (loss, 0.0, dropped)
    assert args.pretrained_vqvae_name_or_path == f"runs/autoencoder-paper-{first_stage}"
    assert (train.adam_beta1, train.adam_beta2, train.adam_weight_decay) == (0.9, 0.999, 0.01)
    assert train.use_ema and train.ema_decay == 0.9999 and train.max_grad_norm == math.inf
    assert (args.lr_multipliers == [0.001, 0.1, 0.0001]) == (name == "ldm-inpainting-big")
    assert train.lr_warmup_steps == {"ldm-lsun-churches-256": 10_000, "ldm-inpainting-big": 1000}.get(name, 0)
    assert args.scale_by_std == (name == "ldm-lsun-churches-256")
    assert args.latent_scale == {"ldm-text-laion": 0.18215, "ldm-lsun-churches-256": None}.get(name, 1.0)


@pytest.mark.parametrize("name", OTHERS)
def test_paella_versatile_diffusion_and_optimus(name):
    _, _, train = parse(name)
    batch, rate, steps, decay, norm = OTHERS[name]
    assert (train.total_batch_size, train.learning_rate, train.max_train_steps) == (batch, rate, steps)
    assert (train.adam_beta1, train.adam_beta2, train.adam_weight_decay) == (0.9, 0.999, decay)
    assert train.max_grad_norm == norm and not train.use_ema


@pytest.mark.parametrize("name", CASCADED)
def test_cascaded_diffusion(name):
    args, data, train = parse(name)
    training, noise, (widths, blocks, attended, heads, dropout), small = CASCADED[name]
    assert (train.total_batch_size, train.learning_rate, train.max_train_steps) == training
    assert (args.num_train_timesteps, args.beta_schedule, args.loss_type) == noise
    assert (args.block_out_channels, args.layers_per_block, args.dropout) == (widths, blocks, dropout)
    assert {data.resolution >> level for level in args.attention_levels} == attended
    assert (args.num_heads, args.num_head_channels) == heads
    assert args.upscales == (small is not None)
    if small is not None:
        assert (args.low_side(data.resolution), args.augmentation) == small and args.downsampling == "area"
        assert (args.blur_prob, args.blur_sigma, args.truncation_level) == (0.5, [0.4, 0.6], None)
    assert (args.condition, args.num_labels) == (("unconditional", None) if "lsun" in name else ("class", 1000))
    assert data.random_flip and args.dropout_of_condition == 0
    assert (train.adam_beta1, train.adam_beta2, train.adam_weight_decay) == (0.9, 0.999, 0.0)
    assert train.use_ema and train.ema_decay == 0.9999 and train.lr_scheduler == "constant"
    header = [line for line in PAPER[name].read_text().splitlines() if line.startswith("#")]
    assert "ettings unverified" in " ".join(header)  # no source of the training's numbers could be read


@pytest.mark.parametrize("name", PITI_UPSAMPLERS)
def test_pitis_upsampler(name):
    args, data, train = parse(name)
    assert (train.total_batch_size, train.learning_rate, args.disc_learning_rate) == (4, 1e-5, 1e-5)
    assert (train.lr_scheduler, train.adam_weight_decay, train.max_grad_norm) == ("constant", 0.0, math.inf)
    assert (train.adam_beta1, train.adam_beta2, train.use_ema, train.ema_decay) == (0.9, 0.999, True, 0.9999)
    assert (args.perceptual_model, args.perceptual_levels, args.perceptual_weight) == ("vgg19", "conv2_2", 0.004)
    assert (args.adversarial_loss, args.adversarial_weight, args.start_step) == ("wgan_gp", 0.01, 100)
    assert (args.degradation, args.timestep_sampler, args.dropout_of_condition) == ("bsr_light_l0", "uniform", 0)
    assert (args.beta_schedule, args.num_train_timesteps, args.loss_type) == ("linear", 1000, "hybrid")
    assert {data.resolution >> level for level in args.attention_levels} == {32, 16, 8} and args.dropout == 0.1
    with torch.device("meta"):
        unet, encoder = build_piti_unet(args, sample_size=256, in_channels=6), build_piti_encoder(args)
        text_encoder = build_text_encoder(args)
        opponent = build_opponent(args, 256)
    count = {part: sum(p.numel() for p in part.parameters()) for part in (unet, encoder, text_encoder)}
    assert count[unet] + count[encoder] == 351_345_862  # PITI's upsample_mask.pt
    assert count[unet] + count[text_encoder] == 398_361_286  # GLIDE's upsample.pt, by the recipe's defaults
    assert opponent.penalty == 10 and sum(p.numel() for p in opponent.network.parameters()) == 2_764_737


@pytest.mark.parametrize("name", PITI)
def test_piti(name):
    args, data, train = parse(name)
    (condition, parameters), (stage, rate, steps, dropped, start) = (
        table[key] for table, key in zip((PITI_CONDITIONS, PITI_RUNS), PITI[name], strict=True)
    )
    assert (args.stage, args.condition, args.dropout_of_condition) == (stage, condition, dropped)
    assert args.pretrained_model_name_or_path == start.format(PITI[name][0])
    assert (train.total_batch_size, train.learning_rate) == (128, rate)
    assert steps is None or train.max_train_steps == steps
    assert (train.adam_beta1, train.adam_beta2, train.adam_weight_decay) == (0.9, 0.999, 0.0)
    assert train.use_ema and train.ema_decay == 0.9999 and train.max_grad_norm == math.inf
    assert (train.lr_scheduler, args.num_inference_steps) == ("constant", 250)
    assert (args.timestep_sampler, args.loss_type, args.max_loss_weight) == ("loss_second_moment", "hybrid", 1)
    assert (data.resolution, args.encoder_sample_size, data.random_flip) == (64, 256, True)
    assert args.palette == ("coco182" if name == "piti-mask-encoder" else None) and args.downsampling == "bicubic"
    with torch.device("meta"):
        networks = build_piti_encoder(args), build_piti_unet(args)
    assert sum(p.numel() for network in networks for p in network.parameters()) == parameters


def test_glides_base():
    args, data, train = parse("piti-prior")
    assert (args.stage, data.resolution, args.text_max_length) == ("prior", 64, 128)
    assert (args.beta_schedule, args.num_train_timesteps, args.loss_type) == ("cosine", 1000, "hybrid")
    assert args.dropout == 0.1 and args.pretrained_tokenizer_name_or_path == "gpt2"
    assert train.use_ema and train.ema_decay == 0.9999
    with torch.device("meta"):
        networks = build_text_encoder(args), build_piti_unet(args)
    assert sum(p.numel() for network in networks for p in network.parameters()) == GLIDE_PARAMETERS
    assert "ettings unverified" in PAPER["piti-prior"].read_text()


def test_a_preset_starts_from_what_another_one_or_its_header_makes():
    texts = {path.name: path.read_text() for path in PRESETS.glob("*.yaml")}
    made = {found[1] for text in texts.values() if (found := re.search(r"^output_dir: (\S+)", text, re.M))}
    missing = [
        (name, field, place)
        for name, text in texts.items()
        for field, place in re.findall(r"^(pretrained_\w+): (runs/[^\s/]+)", text, re.M)
        if place not in made and not re.search(rf"^#.*{place}\b", text, re.M)
    ]
    assert len(made) > 50 and missing == []


def test_paellas_schedule():
    args, data, train = parse("paella-v1")
    assert (train.lr_scheduler, train.lr_warmup_steps) == ("constant_with_warmup", 50_100)
    assert (args.label_smoothing, args.cond_dropout_prob, data.resolution) == (0.1, 0.1, 256)
    assert (args.guidance_scale, args.num_inference_steps, args.typical_mass) == (5.0, 12, 0.2)


def test_the_sentences_weight_goes_through_the_originals_cycles():
    for name, cycles, bits, weighted in (("optimus-wikipedia", 10, 1.0, False), ("optimus-snli", 1, 0.5, True)):
        args, _, train = parse(name)
        assert (args.beta, args.beta_cycles, args.beta_zero_fraction, args.beta_rise_fraction) == (
            1,
            cycles,
            0.5,
            0.25,
        )
        assert (args.free_bits, args.length_weighted_loss, train.lr_scheduler) == (bits, weighted, "linear")


def test_small_pictures_are_the_papers_or_the_released_models():
    for name, kind in (("ldm-super-resolution", "bicubic"), ("ldm-super-resolution-bsr", "bsr_light")):
        args, _, _ = parse(name)
        assert (args.degradation, args.resolved_crop_scale) == (kind, (0.5, 1.0))


@pytest.mark.parametrize("name", PAPER)
def test_what_was_added_since_is_off(name):
    _, data, train = parse(name)
    assert not train.weight_decay_matrices_only and not train.gradient_checkpointing
    header = [line for line in PAPER[name].read_text().splitlines() if line.startswith("#")]
    assert "Differences:" in " ".join(header) and "multiply it by the number of processes" not in " ".join(header)
    # the paper's number on one process as on many
    train.resolve_batch(1)
    assert train.train_batch_size * train.gradient_accumulation_steps == train.total_batch_size


@pytest.mark.parametrize("name", [name for name in LATENT_DIFFUSION if LATENT_DIFFUSION[name][0] not in (42, 28)])
def test_models_of_one_paper_start_on_1_2_4_and_8_processes(name):
    for processes in (1, 2, 4, 8):
        _, _, train = parse(name)
        train.resolve_batch(processes)
        assert train.train_batch_size * train.gradient_accumulation_steps * processes == train.total_batch_size


@pytest.mark.parametrize("task", ["text", "layout"])
def test_token_rows_start_as_in_the_paper_in_its_presets_alone(task):
    names = [name for name in LATENT_DIFFUSION if name.startswith(f"ldm-{task}-")]
    assert len(names) == 2 and {parse(name)[0].token_init_std for name in names} == {0.02}
    small = {"encoder_layers": 1, "encoder_attention_heads": 1, "encoder_head_dim": 8, "cross_attention_dim": 64}
    for std, places in ((0.02, 0.02), (1.0, 0.5 if task == "text" else 1.0)):
        encoder = build_conditioner(LDMArgs(task=task, token_init_std=std, **small), vocab_size=2000)
        if task == "text":
            tables = encoder.model.embed_tokens.weight, encoder.model.embed_positions.weight
        else:
            tables = encoder.token_embedding.weight, encoder.position_embedding.weight
        torch.testing.assert_close(tables[0].std(), torch.tensor(std), rtol=0.05, atol=0)
        torch.testing.assert_close(tables[1].std(), torch.tensor(places), rtol=0.05, atol=0)


def test_other_presets_keep_the_rows_that_small_models_need():
    for path in PRESETS.glob("ldm-*.yaml"):
        if "-paper-" not in path.name:
            args, _, _ = importlib.import_module("train_ldm").parse_args([str(path)])
            assert args.token_init_std == 1.0
