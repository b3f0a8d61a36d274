"""The recipes from raw pictures to a pipeline that samples, on real data at smoke size, in this process."""

import dataclasses
import json
import os
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import train_autoencoder
import train_clip
import train_paella
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPModel

from diffusers_ext import GumbelVQModel, PaellaPipeline, PaellaVQModel
from diffusers_ext.conversion.open_clip import load_open_clip
from diffusers_ext.data.photographs import tile_photographs
from diffusers_ext.data.pictures import load_pictures
from diffusers_ext.data.scenes import CLASS_NAMES, load_scenes, write_scenes
from diffusers_ext.models.token_codec import encode_indices
from diffusers_ext.training.autoencoder.data import read_picture
from diffusers_ext.training.autoencoder.objective import check_sizes
from diffusers_ext.training.clip.data import collate_samples, read_sample
from diffusers_ext.training.clip.objective import ClipObjective, contrastive_losses
from diffusers_ext.training.paella.card import CONDITIONS
from diffusers_ext.training.paella.conditions import make_condition
from diffusers_ext.training.paella.networks import build_pipeline
from diffusers_ext.training.paella.objective import PaellaObjective
from diffusers_ext.training_utils.clip import load_clip

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "training" / "presets"
TINY_UNET = [
    "--block_out_channels", "16", "32", "--down_layers_per_block", "1", "1", "--up_layers_per_block", "1", "1",
    "--time_embed_dim", "16", "--layer_scale_init", "0.1", "--num_inference_steps", "2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def stages(tmp_path_factory) -> dict[str, Path]:
    """A tokenizer, a CLIP and a folder of scenes, made by the recipes' smoke presets."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    base = tmp_path_factory.mktemp("stages")
    train_autoencoder.main([str(PRESETS / "autoencoder-smoke.yaml"), "--output_dir", str(base / "vq")])
    train_clip.main([str(PRESETS / "clip-smoke.yaml"), "--output_dir", str(base / "clip")])
    write_scenes(base / "scenes", 24, resolution=32, extra_pictures=("semantic",))
    AcceleratorState._reset_state(reset_partial_state=True)
    return {name: base / name for name in ("vq", "clip", "scenes")}


def paella_words(stages, output_dir, *more: str, data: tuple[str, ...] = ("--dataset_name", "scenes")) -> list[str]:
    return [
        *data, "--max_train_samples", "24", "--resolution", "32", "--output_dir", str(output_dir),
        "--pretrained_vqvae_name_or_path", str(stages["vq"]), "--pretrained_clip_name_or_path", str(stages["clip"]),
        "--train_batch_size", "4", "--max_train_steps", "3", "--logging_steps", "1", *TINY_UNET, *more,
    ]  # fmt: skip


def logged(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_autoencoder_smoke_run_goes_through_every_phase(stages):
    vqvae = diffusers.VQModel.from_pretrained(stages["vq"])
    assert vqvae.config.num_vq_embeddings == 32
    assert logged(stages["vq"], "usage_perplexity")[-1] > 1.5  # k-means start: no collapse to one code
    assert len(logged(stages["vq"], "disc_loss")) >= 1 and len(logged(stages["vq"], "validation_psnr")) == 1
    assert (stages["vq"] / "validation-8.png").is_file()
    card = (stages["vq"] / "README.md").read_text()
    assert (
        "accelerate launch --num_processes 1 --mixed_precision no training/train_autoencoder.py" in card
        and "| step |" in card
    )


def test_autoencoder_resumes_to_the_bit_with_its_discriminator(stages, tmp_path):
    words = [str(PRESETS / "autoencoder-smoke.yaml"), "--output_dir", str(tmp_path)]
    train_autoencoder.main(words)
    (tmp_path / "checkpoint-8" / "manifest.json").unlink()  # as if the run had been killed after step 4
    train_autoencoder.main([*words, "--resume_from_checkpoint", "latest"])
    straight = load_file(stages["vq"] / "diffusion_pytorch_model.safetensors")
    resumed = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_gumbel_autoencoder_smoke_run(tmp_path):
    train_autoencoder.main([str(PRESETS / "autoencoder-gumbel-smoke.yaml"), "--output_dir", str(tmp_path)])
    model = GumbelVQModel.from_pretrained(tmp_path)
    assert model.encode_indices(torch.zeros(1, 3, 32, 32)).shape == (1, 8, 8)
    assert all(value > 0 for value in logged(tmp_path, "bottleneck"))  # the divergence is in the loss


def test_paellas_own_tokenizer_trains_resumes_and_serves_the_predictor(stages, tmp_path):
    words = [str(PRESETS / "autoencoder-smoke.yaml"), "--model", "paella_vq", "--block_out_channels", "8", "16"]
    words += ["--bottleneck_blocks", "2", "--output_dir", str(tmp_path / "vq")]
    train_autoencoder.main(words)
    assert PaellaVQModel.from_pretrained(tmp_path / "vq").config.num_vq_embeddings == 32
    assert logged(tmp_path / "vq", "disc_loss") and logged(tmp_path / "vq", "usage_perplexity")[-1] > 1.5
    straight = load_file(tmp_path / "vq" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "vq" / "checkpoint-8" / "manifest.json").unlink()
    train_autoencoder.main([*words, "--resume_from_checkpoint", "latest"])
    resumed = load_file(tmp_path / "vq" / "diffusion_pytorch_model.safetensors")  # with the batch norm's statistics
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)

    train_paella.main(paella_words({**stages, "vq": tmp_path / "vq"}, tmp_path / "paella"))
    pipe = PaellaPipeline.from_pretrained(tmp_path / "paella")
    assert isinstance(pipe.vqvae, PaellaVQModel) and pipe.vae_scale_factor == 4
    assert pipe("a red circle", num_inference_steps=2).images[0].size == (32, 32)


def test_autoencoder_with_clip_features_is_named_after_them(stages, tmp_path):
    words = ["--perceptual_model", str(stages["clip"]), "--max_train_steps", "2", "--logging_steps", "1"]
    train_autoencoder.main([str(PRESETS / "autoencoder-smoke.yaml"), *words, "--output_dir", str(tmp_path)])
    assert logged(tmp_path, "clip-clip") and logged(tmp_path, "validation_clip-clip")


def test_clip_smoke_run_makes_both_towers_and_a_tokenizer(stages):
    clip, tokenizer = CLIPModel.from_pretrained(stages["clip"]), AutoTokenizer.from_pretrained(stages["clip"])
    ids = tokenizer("a large red circle in the center", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id and ids[0, -1] == tokenizer.eos_token_id
    assert clip.config.text_config.eos_token_id == tokenizer.eos_token_id != 2
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == "a large red circle in the center"
    assert len(logged(stages["clip"], "loss")) == 3 and len(logged(stages["clip"], "validation_accuracy")) == 1


def test_extra_negative_captions_only_concern_the_images():
    images, texts = torch.eye(3, 4), torch.eye(3, 4)
    negatives = torch.tensor([[0.0, 0, 0, 1]]).expand(3, 4)
    plain = contrastive_losses(images, texts, torch.tensor(2.0))["loss"]
    harder = contrastive_losses(images, torch.cat([texts, negatives]), torch.tensor(2.0))["loss"]
    e = torch.e
    rows, columns = -2 + torch.log(torch.tensor(e**2 + 2)), -2 + torch.log(torch.tensor(e**2 + 5))
    torch.testing.assert_close(plain, rows)
    torch.testing.assert_close(harder, 0.5 * (rows + columns))


def test_paraphrases_add_the_contrast_among_captions(stages):
    clip, tokenizer = CLIPModel.from_pretrained(stages["clip"]), AutoTokenizer.from_pretrained(stages["clip"])
    columns = ["a large red circle", "a small blue star"], ["red circle, large", "blue star, small"], ["a ring"] * 2
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = collate_samples(list(zip(images, zip(*columns, strict=True), strict=True)), tokenizer)
    assert len(batch["input_ids"]) == 6
    with torch.no_grad():
        got = ClipObjective(clip, has_paraphrases=True).contrast(**batch)
        seen = clip.visual_projection(clip.vision_model(images).pooler_output)
        read = clip.text_projection(clip.text_model(batch["input_ids"]).pooler_output)
        scale = clip.logit_scale.exp()
        with_images = contrastive_losses(seen, read[[0, 1, 4, 5]], scale)["loss"]
        among_texts = contrastive_losses(read[:2], read[2:], scale)["loss"]
    torch.testing.assert_close(got["text_loss"], among_texts)
    torch.testing.assert_close(got["loss"], with_images + among_texts)


def test_patch_tokens_are_contrasted_as_the_class_token_is(stages):
    clip, tokenizer = CLIPModel.from_pretrained(stages["clip"]), AutoTokenizer.from_pretrained(stages["clip"])
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ids, mask = tokenizer(["a large red circle", "a small blue star"], padding=True, return_tensors="pt").values()
    with torch.no_grad():
        got = ClipObjective(clip, has_paraphrases=False, patch_weight=0.5).contrast(images, ids, mask)
        tokens = clip.visual_projection(clip.vision_model.post_layernorm(clip.vision_model(images).last_hidden_state))
        texts = clip.text_projection(clip.text_model(ids).pooler_output)
        of_class, of_patches = (
            contrastive_losses(seen, texts, clip.logit_scale.exp())["loss"]
            for seen in (tokens[:, 0], tokens[:, 1:].mean(1))
        )
    torch.testing.assert_close(got["patch_loss"], of_patches)
    torch.testing.assert_close(got["loss"], of_class + 0.5 * of_patches)


def test_the_captioner_reads_nothing_but_the_mean_token(stages):
    clip, tokenizer = CLIPModel.from_pretrained(stages["clip"]), AutoTokenizer.from_pretrained(stages["clip"])
    torch.manual_seed(0)
    objective = ClipObjective(clip, has_paraphrases=True, caption_weight=0.5).eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    texts = ["a ring", "a star", "a red circle", "a star"]
    ids, mask = tokenizer(texts, padding=True, return_tensors="pt").values()
    with torch.no_grad():
        got = objective.contrast(images, ids, mask)
        plain = ClipObjective(clip, has_paraphrases=True).contrast(images, ids, mask)
        seen = clip.vision_model(images).last_hidden_state
        tokens = clip.visual_projection(clip.vision_model.post_layernorm(seen))
        mean = tokens.mean(1) / tokens[:, 0].norm(dim=-1, keepdim=True) * tokens.shape[-1] ** 0.5
        logits = objective.captioner(input_ids=ids[2:], encoder_hidden_states=mean[:, None]).logits[:, :-1]
        wanted = ids[2:, 1:]
        kept = wanted != tokenizer.pad_token_id
    assert not kept.all()  # the shorter caption is padded
    torch.testing.assert_close(got["caption_loss"], torch.nn.functional.cross_entropy(logits[kept], wanted[kept]))
    torch.testing.assert_close(got["loss"], plain["loss"] + 0.5 * got["caption_loss"])


def test_clip_goes_on_from_an_existing_one(stages, tmp_path):
    preset, start = str(PRESETS / "clip-smoke.yaml"), ["--pretrained_model_name_or_path", str(stages["clip"])]
    start += ["--negative_caption_column", "negative_texts", "--num_negative_captions", "3"]
    train_clip.main(
        [
            preset,
            *start,
            "--patch_weight",
            "1",
            "--caption_weight",
            "1",
            "--learning_rate",
            "0",
            "--text_width",
            "32",
            "--output_dir",
            str(tmp_path),
        ]
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (stages["clip"], tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (stages["clip"], tmp_path)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab() and logged(tmp_path, "patch_loss")
    assert len(logged(tmp_path, "caption_loss")) == len(logged(tmp_path, "patch_loss"))
    with pytest.raises(ValueError, match=r"--resolution=64, but the CLIP in .* sees 32 pixels: pass those"):
        train_clip.main([preset, *start, "--resolution", "64", "--output_dir", str(tmp_path / "other")])


@pytest.mark.parametrize(
    "options",
    [
        ("--condition", "text", "--use_ema"),
        ("--condition", "text", "--train_text_encoder", "--text_encoder_lr", "1e-4"),
        ("--condition", "image", "--gradient_checkpointing"),
        ("--condition", "class", "--num_labels", "48"),
        ("--condition", "semantic", "--num_labels", "7"),
    ],
    ids=lambda options: " ".join(options[1:3]),
)
def test_every_condition_trains_and_samples(stages, tmp_path, options, monkeypatch):
    train_paella.main(paella_words(stages, tmp_path, *options))
    pipe = PaellaPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    if options[1] == "text":
        condition = {"prompt": "a small blue star on the left"}
    elif options[1] == "semantic":
        condition = {"prompt_embeds": torch.zeros(1, 7, 8, 8).index_fill(1, torch.tensor([2]), 1.0)}
    elif options[1] == "class":
        assert pipe.class_names == list(CLASS_NAMES)
        condition = {"class_labels": "blue star"}
    else:
        condition = {"prompt_embeds": torch.zeros(1, pipe.unet.config.condition_dim)}
    image = pipe(**condition, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (32, 32) and (tmp_path / "validation-3.png").is_file()
    card = (tmp_path / "README.md").read_text()
    wanted = "PaellaImageVariationPipeline" if options[1] == "image" else "PaellaPipeline"
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == wanted
    assert f"A {wanted}, trained on pictures and {CONDITIONS[options[1]]}" in card
    assert "![samples](validation-3.png)" in card and "pipeline_tag: " in card and str(tmp_path.parent) not in card
    lines = re.findall(r"^```python\n(.*?)^```", card, re.M | re.S)[0].replace(f'"{tmp_path.name}"', f'"{tmp_path}"')
    load_scenes(1)[0]["image"].save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    drawn: dict[str, Any] = {}
    exec(lines, drawn)  # what a reader copies
    assert type(drawn["pipe"]).__name__ == wanted and drawn["image"].size == (32, 32)
    trained_tower = "--train_text_encoder" in options
    if pipe.text_encoder is not None:
        frozen = load_clip(str(stages["clip"]), load_open_clip)["text_encoder"].text_projection.weight
        assert torch.equal(frozen, pipe.text_encoder.text_projection.weight) != trained_tower


def test_training_from_a_written_out_folder_sees_the_same_pictures(stages, tmp_path):
    folder = ("--train_data_dir", str(stages["scenes"]))
    train_paella.main(paella_words(stages, tmp_path, data=folder))
    assert len(logged(tmp_path, "loss")) == 3 and (tmp_path / "model_index.json").is_file()
    built_in = load_scenes(24, resolution=32, columns=("image", "text"))
    args, data, _ = train_paella.parse_args(paella_words(stages, tmp_path, data=folder))
    pictures, _ = load_pictures(data, columns=("text",))
    shown = {(row["text"], row["image"].tobytes()) for row in pictures}
    assert shown < {(row["text"], row["image"].tobytes()) for row in built_in} and len(shown) >= 20


def test_fine_tuning_a_pipeline_with_lora(stages, tmp_path):
    train_paella.main(paella_words(stages, tmp_path / "base"))
    words = paella_words(stages, tmp_path / "lora", "--rank", "2", "--learning_rate", "1e-2")
    train_paella.main([*words, "--pretrained_model_name_or_path", str(tmp_path / "base")])
    base, tuned = (PaellaPipeline.from_pretrained(tmp_path / name).unet.state_dict() for name in ("base", "lora"))
    changed = {key for key in base if not torch.equal(base[key], tuned[key])}
    assert changed and all(base[key].ndim == 2 for key in changed)  # linear layers only, merged
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_dropped_conditions_are_the_zero_vector(stages, tmp_path):
    args, data, _ = train_paella.parse_args(paella_words(stages, tmp_path))
    pipe = build_pipeline(args, data.resolution)
    objective = PaellaObjective(pipe, make_condition(args, data, pipe, "text"), None, args).eval()
    tokens, r, condition = torch.randint(32, (2, 8, 8)), torch.rand(2), torch.randn(2, 16)
    logits = objective.predict(tokens, r, condition, torch.tensor([True, False]))
    expected = [
        pipe.unet(tokens[:1], r[:1], condition[:1]).sample,
        pipe.unet(tokens[1:], r[1:], 0 * condition[1:]).sample,
    ]
    torch.testing.assert_close(logits, torch.cat(expected))


def test_one_batch_can_be_learnt_by_heart(stages, tmp_path):
    words = [
        "--max_train_samples",
        "4",
        "--max_train_steps",
        "60",
        "--learning_rate",
        "5e-3",
        "--cond_dropout_prob",
        "0",
    ]
    train_paella.main(paella_words(stages, tmp_path, *words))
    losses = logged(tmp_path, "loss")
    assert sum(losses[-5:]) / 5 < 0.75 * losses[0]


@pytest.mark.parametrize(
    "recipe, words, message",
    [
        (train_paella, ["--cond_dropout_prob", "1.5"], r"--cond_dropout_prob must lie in \[0, 1\], got 1.5"),
        (train_paella, ["--condition", "image", "--train_text_encoder"], "goes with --condition text"),
        (train_paella, ["--train_batch_size", "0"], "--train_batch_size must be > 0, got 0"),
        (train_paella, ["--learning_rate", "-1"], "--learning_rate must be >= 0"),
        (train_paella, ["--train_data_dir", "x"], "Exactly one of --dataset_name .*scenes.* and --train_data_dir"),
        (train_paella, ["--dataset_name", "none"], "Exactly one of --dataset_name .*None.* and --train_data_dir"),
        (train_autoencoder, ["--gumbel_temperature", "1"], "--gumbel_temperature needs two values > 0"),
        (train_autoencoder, ["--plain_fraction", "2"], r"--plain_fraction must lie in \[0, 1\]"),
        (train_autoencoder, ["--disc_start", "1", "--gradient_accumulation_steps", "2"], "adaptive weight"),
        (train_autoencoder, ["--gradient_checkpointing"], "only AutoencoderKL has it"),
        (
            train_autoencoder,
            ["--model", "paella_vq", "--block_out_channels", "8", "24"],
            r"--block_out_channels=\[8, 24\]: for --model=paella_vq .* here \[12, 24\]",
        ),
        (train_autoencoder, ["--restart_steps", "0"], "--restart_steps must be > 0, got 0"),
        (train_paella, ["--condition", "class", "--num_labels", "-3"], "--num_labels must be > 0, got -3"),
        (train_paella, ["--rank", "0"], "--rank must be > 0, got 0"),
        (train_paella, ["--num_inference_steps", "0"], "--num_inference_steps must be > 0, got 0"),
        (train_paella, ["--ema_decay", "1.5"], r"--ema_decay must lie in \[0, 1\], got 1.5"),
        (train_paella, ["--no_such_option", "1"], "--no_such_option"),
        (train_clip, ["--vocab_size", "100"], "--vocab_size must be >= 259 .* got 100"),
        (train_clip, ["--num_negative_captions", "0"], "--num_negative_captions must be >= 1, got 0"),
        (train_clip, ["--num_negative_captions", "2"], "--num_negative_captions=2 needs --negative_caption_column"),
        (train_clip, ["--patch_weight", "-1"], "--patch_weight must be >= 0, got -1"),
        (train_clip, ["--caption_weight", "-1"], "--caption_weight must be >= 0, got -1"),
        (train_clip, ["--max_length", "2"], "--max_length must be >= 3 .* got 2"),
        (train_clip, ["--text_width", "30"], "--text_width=30 is no multiple of --num_attention_heads=4"),
        (train_clip, ["--resolution", "60"], "--resolution=60 is no multiple of --patch_size=8"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(recipe, words, message):
    with pytest.raises(ValueError, match=message):
        recipe.parse_args(["--dataset_name", "scenes", *words])


def test_an_autoencoder_that_cannot_work_is_refused_before_it_starts(stages):
    args, _, _ = train_autoencoder.parse_args(["--dataset_name", "scenes", "--disc_start", "9"])
    with pytest.raises(ValueError, match="--resolution=60 is no multiple of .* factor 8; the nearest is 64"):
        train_autoencoder.build_autoencoder(args, 60)
    with pytest.raises(ValueError, match="--resolution=16 is too small for --disc_layers=3, which needs 24"):
        check_sizes(args, 16, 8, 1000)
    with pytest.raises(ValueError, match="--num_vq_embeddings=512 codes cannot start from the 448 latents of 7 pic"):
        check_sizes(args, 64, 8, 7)
    args.model, args.pretrained_model_name_or_path = "gumbel_vq", str(stages["vq"])
    with pytest.raises(ValueError, match="holds a VQModel, but --model=gumbel_vq trains a GumbelVQModel"):
        train_autoencoder.build_autoencoder(args, 32)


def test_a_first_stage_without_codes_is_refused(stages, tmp_path):
    diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "kl")
    args, data, _ = train_paella.parse_args(paella_words({**stages, "vq": tmp_path / "kl"}, tmp_path))
    with pytest.raises(ValueError, match="kl holds a AutoencoderKL, which has no codes. Known are VQModel, GumbelVQM"):
        build_pipeline(args, data.resolution)


def test_labels_beyond_the_network_are_named(stages, tmp_path):
    words = paella_words(stages, tmp_path, "--condition", "class", "--num_labels", "3")
    args, data, _ = train_paella.parse_args(words)
    pipe, kept = build_pipeline(args, data.resolution), {"tokens": torch.zeros(8, 8)}
    condition = make_condition(args, data, pipe, "label")
    row = {"image": Image.new("RGB", (32, 32))}
    for label in (3, -1):
        message = f"labels {label} to {label}, but --num_labels=3 allows 0 to 2"
        with pytest.raises(ValueError, match=message):  # by the loader's processes, before any network sees it
            condition.read({**row, "label": label}, torch.Generator())
        with pytest.raises(ValueError, match=message):
            condition.recall({**kept, "label": torch.tensor(label)}, torch.Generator())
    args.condition = "semantic"
    condition, labels = make_condition(args, data, pipe, "map"), Image.new("L", (32, 32), 2)
    labels.putpixel((5, 5), 3)
    with pytest.raises(ValueError, match="labels 2 to 3, but --num_labels=3 allows 0 to 2"):
        condition.read({**row, "map": labels}, torch.Generator())


KINDS = [("text", False), ("text", True), ("image", False), ("class", False), ("semantic", False)]


def paella_work(kind: tuple[str, bool], args: Any, data: Any) -> list[Any]:
    """What the loader's processes do for a kind of condition."""
    condition, trained = kind
    args = dataclasses.replace(args, condition=condition, train_text_encoder=trained, num_labels=3)
    found = make_condition(args, data, build_pipeline(args, data.resolution), "text")
    return [found.read, found.recall, found.collate]


def test_loader_processes_change_nothing_and_need_no_fork(stages, tmp_path):
    args, data, _ = train_paella.parse_args(paella_words(stages, tmp_path))
    clip_data = ["text", "negative_text"]
    tokenizer = AutoTokenizer.from_pretrained(stages["clip"])
    for work in (
        *(work for kind in KINDS for work in paella_work(kind, args, data)),
        partial(read_sample, data=data, columns=clip_data),
        partial(collate_samples, tokenizer=tokenizer),
        partial(read_picture, data=data),
    ):
        pickle.loads(pickle.dumps(work))  # what starting a loader process asks for where there is no fork
    for workers in ("0", "2"):
        train_paella.main(paella_words(stages, tmp_path / workers, "--dataloader_num_workers", workers))
    assert logged(tmp_path / "0", "loss") == logged(tmp_path / "2", "loss")


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: {b: 1}", "`a` is a mapping"),
        ("- a\n- b", "one `option: value` a line, not a list"),
        ("a: [", "is not YAML"),
        (None, "is not a .yaml file that exists, nor the name of an installed one"),
    ],
    ids=["nested", "list", "broken", "missing"],
)
def test_wrong_presets_are_refused(tmp_path, text, message):
    preset = tmp_path / "preset.yaml"
    if text:
        preset.write_text(text)
    with pytest.raises(ValueError, match=message):
        train_paella.parse_args([str(preset)])


def test_presets_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_path = train_paella.parse_args([str(PRESETS / "paella-smoke.yaml")])
    for name in ("paella-smoke", "paella-smoke.yaml"):
        assert train_paella.parse_args([name]) == by_path
    with pytest.raises(ValueError, match="'training/paella-smok.yaml' is not .* Did you mean paella-smoke or "):
        train_paella.parse_args(["training/paella-smok.yaml"])
    (tmp_path / "paella-smoke").mkdir()  # such as the last run's folder
    assert train_paella.parse_args(["paella-smoke"]) == by_path
    (tmp_path / "paella-smoke.yaml").write_text("dataset_name: scenes\nlearning_rate: 2e-5\n")
    assert train_paella.parse_args(["paella-smoke.yaml"])[2].learning_rate == 2e-5  # a file goes before a name


def test_presets_with_bundled_checkpoints_ask_for_a_clone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--output_dir", str(tmp_path / "run")]
    with pytest.raises(
        ValueError, match="--pretrained_vqvae_name_or_path is checkpoints/.*: run from the clone's top"
    ):
        train_paella.main(["paella-smoke", *words])
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="rudalle-gumbel-f8, a folder that is not here; it is not among the bundled"):
        train_paella.main(["paella-paper-v1", *words])
    assert not (tmp_path / "run").exists()


def test_the_command_line_wins_over_the_preset(tmp_path):
    preset = tmp_path / "p.yaml"
    preset.write_text("dataset_name: scenes\nlearning_rate: 1e-4\nblock_out_channels: [8, 16]\nuse_ema: true\n")
    args, _, train = train_paella.parse_args([str(preset), "--learning_rate", "2e-3"])
    assert train.learning_rate == 2e-3 and train.use_ema and args.block_out_channels == [8, 16]


def test_missing_stages_are_named(tmp_path, stages):
    words = paella_words(stages, tmp_path)
    for option, way_out in (("vqvae", "train_autoencoder.py"), ("clip", "train_clip.py")):
        at = words.index(f"--pretrained_{option}_name_or_path")
        args, data, _ = train_paella.parse_args(words[:at] + words[at + 2 :])
        with pytest.raises(ValueError, match=f"--pretrained_{option}_name_or_path.*{way_out}"):
            build_pipeline(args, data.resolution)


def test_photographs_from_folder_to_sample(tmp_path):
    """The README's example: tiles of scikit-image's colour photographs, captioned by their names."""
    tile_photographs(tmp_path / "photos", tile=256, stride=256)
    data = ["--train_data_dir", str(tmp_path / "photos"), "--resolution", "32", "--random_flip"]
    for recipe, preset, name in (
        (train_autoencoder, "autoencoder-smoke.yaml", "vq"), (train_clip, "clip-smoke.yaml", "clip"),
    ):  # fmt: skip
        recipe.main([str(PRESETS / preset), *data, "--output_dir", str(tmp_path / name)])
    stages = {"vq": tmp_path / "vq", "clip": tmp_path / "clip"}
    train_paella.main(paella_words(stages, tmp_path / "paella", data=tuple(data[:2])))
    pipe = PaellaPipeline.from_pretrained(tmp_path / "paella")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("coffee", num_inference_steps=2).images[0]
    assert image.size == (32, 32)
    tokens = encode_indices(pipe.vqvae, torch.zeros(1, 3, 32, 32))
    assert tokens.shape == (1, 8, 8)
