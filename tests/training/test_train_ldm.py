"""Latent diffusion: every task from data to samples, its loss by hand, and what is refused."""

import dataclasses
import json
import pickle
from pathlib import Path
from random import Random

import pytest
import torch
import train_ldm
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from noise_levels import scaled_linear_betas
from PIL import Image
from safetensors.torch import load_file

from diffusers_ext.conditions.layout import LayoutObject
from diffusers_ext.data.annotations import ROW
from diffusers_ext.data.scenes import CLASS_NAMES, load_scenes, write_scenes
from diffusers_ext.degradations.bsr import degrade_bicubic, degrade_bsr
from diffusers_ext.training.ldm.args import LDMArgs
from diffusers_ext.training.ldm.data import load_rows, read_picture
from diffusers_ext.training.ldm.networks import build_pipeline
from diffusers_ext.training.ldm.objective import LDMObjective
from diffusers_ext.training.ldm.tasks.table import TASKS as KINDS
from diffusers_ext.training_utils.lora import LORA_FILE
from diffusers_ext.training_utils.plan import LOSS_STREAM, keyed_generator

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "training" / "presets" / "ldm-smoke.yaml")
VQVAE = str(ROOT / "checkpoints" / "vq-f4-scenes-64")
TASKS = tuple(KINDS)
WEIGHTS = "diffusion_pytorch_model.safetensors"
CALLS = {
    "unconditional": {"batch_size": 2},
    "class": {"class_labels": ["red circle", 3], "guidance_scale": 2.0},
    "text": {"prompt": ["a red circle", "a blue star"], "guidance_scale": 2.0},
    "layout": {
        "boxes": [[(0, 0, 0.5, 0.5)], [(0.1, 0.1, 0.4, 0.4), (0.5, 0.5, 1, 1)]],
        "names": [["red circle"], ["blue star", 7]],
        "guidance_scale": 2.0,
    },
    "semantic": {"label_map": torch.arange(7).repeat(2, 32, 5)[:, :, :32]},
    "super_resolution": {"image": torch.rand(2, 3, 8, 8)},
    "inpainting": {"image": torch.rand(2, 3, 32, 32), "mask_image": torch.ones(32, 32).triu()},
}


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def scenes_folder(tmp_path_factory) -> Path:
    """A user's folder with every kind of annotation; `low_file_name` are the pictures at a quarter of the size."""
    folder = write_scenes(tmp_path_factory.mktemp("data") / "scenes", 12, resolution=32, extra_pictures=("semantic",))
    (folder / "low").mkdir()
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["low_file_name"] = f"low/{row['file_name']}"
        Image.open(folder / row["file_name"]).resize((8, 8), Image.Resampling.BICUBIC).save(
            folder / row["low_file_name"]
        )
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def words(task: str, folder: Path | str, *more: str, data: tuple[str, ...] = ()) -> list[str]:
    """The smoke preset of a task, shorter."""
    return [
        SMOKE, *data, "--task", task, "--output_dir", str(folder), "--max_train_samples", "12",
        "--pretrained_vqvae_name_or_path", VQVAE, "--max_train_steps", "2", "--logging_steps", "1",
        "--num_inference_steps", "2", "--num_validation_images", "2", *more,
    ]  # fmt: skip


def train(task: str, folder: Path, *more: str, data: tuple[str, ...] = ()) -> Path:
    train_ldm.main(words(task, folder, *more, data=data))
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def parts(task: str, *more: str, data: tuple[str, ...] = ()):
    """Options and formats, rows and pipeline, as `main` builds them."""
    args, data_args, _ = train_ldm.parse_args(words(task, "unused", *more, data=data))
    reading = KINDS[task](args, data_args)
    rows, held_out = load_rows(reading)
    torch.manual_seed(0)
    names = reading.find_names((rows, held_out))
    pipe = build_pipeline(reading, names, ["a red circle", "a blue star on the left"])
    reading.follow(pipe)
    return reading, rows, pipe


def read_batch(task, rows, count: int = 2) -> dict:
    samples = [task.sample(rows[i], keyed_generator(0, i)) for i in range(count)]
    return torch.utils.data.default_collate(samples)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def logged(folder: Path, name: str) -> list[float]:
    return [line[name] for line in lines(folder) if name in line]


def load(task: str, folder: Path):
    pipe = KINDS[task].pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(count: int = 2) -> list[torch.Generator]:
    return [keyed_generator(0, i, LOSS_STREAM) for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# from data to samples


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_and_samples(task, tmp_path):
    folder = train(task, tmp_path / task)
    assert len(logged(folder, "loss")) == 2 and len(logged(folder, "validation_loss")) == 1
    assert bool(logged(folder, "validation_psnr")) == (task in ("super_resolution", "inpainting"))
    assert (folder / "validation-2.png").is_file()
    card = (folder / "README.md").read_text()
    assert (
        KINDS[task].pipeline.__name__ in card
        and "--num_processes 1 --mixed_precision no training/train_ldm.py" in card
    )
    pipe = load(task, folder)
    images = pipe(**CALLS[task], num_inference_steps=2, generator=generators(), output_type="pt").images
    assert images.shape == (2, 3, 32, 32) and bool(torch.isfinite(images).all()) and images.std() > 0


@pytest.mark.parametrize(
    "task, more",
    [
        ("layout", ("--crop_scale", "0.6", "1", "--random_flip")),
        ("semantic", ("--crop_scale", "0.6", "1", "--random_flip", "--num_labels", "7")),
        ("super_resolution", ("--low_column", "low", "--resolution", "16")),
    ],
)
def test_a_folder_of_ones_own(task, more, scenes_folder, tmp_path):
    folder = train(task, tmp_path, *more, data=("--train_data_dir", str(scenes_folder)))
    assert len(logged(folder, "loss")) == 2
    if task == "layout":  # the categories are the names in the data
        names = {name for row in load_scenes(12, columns=("box_names",)) for name in row["box_names"]}
        assert load(task, folder).class_names == sorted(names)


def test_resuming_is_exact_with_encoder_average_and_accumulation(tmp_path):
    more = ("--max_train_steps", "4", "--checkpointing_steps", "2", "--gradient_accumulation_steps", "2")
    straight = train("text", tmp_path / "straight", *more)
    stopped = train("text", tmp_path / "stopped", *more)
    (stopped / "checkpoint-4" / "manifest.json").unlink()  # as if the run had been killed after step 2
    train("text", stopped, *more, "--resume_from_checkpoint", "latest")
    for name in (f"unet/{WEIGHTS}", "bert/model.safetensors"):
        one, other = load_file(straight / name), load_file(stopped / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    assert logged(straight, "loss") == logged(stopped, "loss")
    assert load("text", straight).latent_scale == load("text", stopped).latent_scale


def test_a_measured_scale_gives_unit_variance_and_is_saved(tmp_path, caplog):
    more = ("--scale_by_std", "--center_crop", "--max_train_steps", "1")
    pipe = load("unconditional", train("unconditional", tmp_path, *more))
    task, rows, _ = parts("unconditional", *more)
    pictures = [read_picture(rows[i], task=task)["image"] for i in range(12)]
    with torch.no_grad():
        std = pipe.vqvae.encode(torch.stack(pictures)).latents.std().item()
    assert pipe.config["latent_scale"] * std == pytest.approx(1.0, rel=1e-3)
    assert pipe.vqvae.config["scaling_factor"] == 0.8775  # the first stage's own stays as it is
    with caplog.at_level("WARNING"):
        train("unconditional", tmp_path / "wrong", "--latent_scale", "5", "--max_train_steps", "1")
    assert "pass --scale_by_std, or --latent_scale" in caplog.text


def test_the_average_covers_the_unet_alone_by_the_originals_rule(tmp_path):
    folder = train("class", tmp_path, "--max_train_steps", "1")
    live = load_file(folder / "checkpoint-1" / "model.safetensors")
    average, embedder = load_file(folder / "unet" / WEIGHTS), load_file(folder / "class_embedder" / WEIGHTS)
    assert torch.equal(embedder["embedding.weight"], live["conditioner.embedding.weight"])
    torch.manual_seed(0)
    start = parts("class")[2].unet.state_dict()
    moved = 0
    for key, value in average.items():  # update 1: decay (1 + 1) / (10 + 1)
        torch.testing.assert_close(value, start[key] + (1 - 2 / 11) * (live[f"unet.{key}"] - start[key]))
        moved += int(not torch.equal(value, start[key]))
    assert moved > 0


def test_cached_latents_train_like_fresh_ones(tmp_path):
    more = ("--center_crop", "--task", "class")
    plain = train("class", tmp_path / "plain", *more)
    for name in ("written", "read"):
        cached = train("class", tmp_path / name, *more, "--cache_dir", str(tmp_path / "cache"))
        torch.testing.assert_close(logged(cached, "loss"), logged(plain, "loss"), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"was made of something else: .*resolution \(32 there, 64 here"):
        train("class", tmp_path / "other", *more, "--cache_dir", str(tmp_path / "cache"), "--resolution", "64")


@pytest.mark.parametrize("task", TASKS)  # UNet2DModel and UNet2DConditionModel
def test_fine_tuning_with_lora(task, tmp_path):
    base = train(task, tmp_path / "base", "--max_train_steps", "1")
    tuned = train(
        task, tmp_path / "tuned", "--rank", "2", "--learning_rate", "1e-2",
        "--pretrained_model_name_or_path", str(base),
    )  # fmt: skip
    one, other = (load_file(folder / "unet" / WEIGHTS) for folder in (base, tuned))
    changed = {key for key in one if not torch.equal(one[key], other[key])}
    assert one.keys() == other.keys() and changed and all(one[key].ndim == 2 for key in changed)  # merged
    assert load(task, tuned).latent_scale == load(task, base).latent_scale
    pipe, result = load(task, base), load(task, tuned)
    pipe.load_lora_weights(tuned)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    weights = pipe.unet.state_dict()
    for key, value in result.unet.state_dict().items():
        torch.testing.assert_close(weights[key], value)
    if task == "text":
        bert = [load_file(folder / "bert" / "model.safetensors") for folder in (base, tuned)]
        assert all(torch.equal(bert[0][key], bert[1][key]) for key in bert[0])  # frozen
        unet = UNet2DConditionModel.from_pretrained(base / "unet")
        unet.load_lora_adapter(
            tuned, prefix=None, weight_name=LORA_FILE
        )  # diffusers reads the matrices that were saved beside
        unet.fuse_lora()
        name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
        fused = unet.get_submodule(name).base_layer.weight
        torch.testing.assert_close(fused, other[f"{name}.weight"])


def test_checkpointed_gradients_are_the_same(tmp_path):
    for task in ("text", "layout"):
        plain, saving = train(task, tmp_path / task), train(task, tmp_path / f"{task}2", "--gradient_checkpointing")
        torch.testing.assert_close(logged(saving, "loss"), logged(plain, "loss"), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# the loss and the conditions, by hand


def test_the_loss_by_hand(tmp_path):
    """Every draw and every number of it, with a first stage that has a posterior."""
    levels = {
        "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 8), "norm_num_groups": 4, "latent_channels": 3,
    }  # fmt: skip
    AutoencoderKL(**levels, scaling_factor=0.5).save_pretrained(tmp_path)
    options = ("--pretrained_vqvae_name_or_path", str(tmp_path), "--loss_type", "l1")
    task, rows, pipe = parts("class", *options, "--vlb_weight", "0.25", "--cond_dropout_prob", "0.5")
    batch = read_batch(task, rows, count=8)
    objective = LDMObjective(pipe, task).eval()
    with torch.no_grad():
        got = objective(batch, generators(8), 0)
        betas, errors, bounds, dropped = scaled_linear_betas(0.0015, 0.0195), [], [], 0
        for i, draw in enumerate(generators(8)):
            posterior = pipe.vqvae.encode(batch["image"][i : i + 1]).latent_dist
            latents = 0.5 * (posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=draw))
            keep = float(torch.rand((), generator=draw)) >= 0.5
            t = torch.randint(1000, (), generator=draw)
            noise = torch.randn(latents.shape, generator=draw)
            noisy = pipe.scheduler.add_noise(latents, noise, t[None])
            label = int(batch["label"][i]) if keep else len(CLASS_NAMES)  # the last row of the table
            context = pipe.class_embedder.embedding.weight[label].view(1, 1, -1)
            errors.append((pipe.unet(noisy, t, context).sample - noise).abs().mean())
            abar = (1 - betas).cumprod(0)
            previous = max(int(t), 1)
            variance = betas[previous] * (1 - abar[previous - 1]) / (1 - abar[previous])
            weight = betas[previous] ** 2 / (2 * variance * (1 - betas[previous]) * (1 - abar[previous]))
            bounds.append(weight * errors[-1])
            dropped += not keep
    assert 0 < dropped < 8
    loss, bound = torch.stack(errors).mean(), torch.stack(bounds).mean().float()
    torch.testing.assert_close(got["loss_vlb"], bound, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got["loss"], loss + 0.25 * bound, rtol=1e-4, atol=1e-5)


def encoded_null(task: str, pipe) -> torch.Tensor:
    """What guidance leads away from when the pipeline samples."""
    pipe._guidance_scale = 2.0
    if task == "class":
        return pipe.encode_labels([0]).null_context
    if task == "text":
        return pipe.encode_prompt("a red circle")[1]
    return pipe.encode_layouts([[LayoutObject(0, (0, 0, 1, 1))]]).null_context


@pytest.mark.parametrize("task", ["class", "text", "layout", "semantic", "super_resolution", "inpainting"])
def test_dropped_conditions_are_those_that_guidance_uses(task):
    reading, rows, pipe = parts(task, "--cond_dropout_prob", "0.5")
    batch = read_batch(reading, rows)
    objective = LDMObjective(pipe, reading).eval()
    latents, noise, t = torch.randn(2, 8, 8, 8), torch.randn(2, 8, 8, 8), torch.tensor([10, 500])
    condition = reading.condition(pipe, batch)
    with torch.no_grad():
        got = objective.predict(latents, noise, t, condition, torch.tensor([True, False]))
        whole = objective.predict(latents, noise, t, condition)
        noisy = pipe.scheduler.add_noise(pipe.latent_scale * latents, noise, t)[1:]
        if task in ("class", "text", "layout"):
            null = pipe.unet(noisy, 500, encoded_null(task, pipe)[:1]).sample
        else:
            zeros = torch.zeros(1, pipe.unet.config["in_channels"] - 8, 8, 8)
            null = pipe.unet(torch.cat([noisy, zeros], dim=1), 500).sample
    torch.testing.assert_close(got, torch.cat([whole[:1], null]))
    assert not torch.allclose(whole[1:], null)
    assert pipe.has_null_condition
    assert not parts(task, "--cond_dropout_prob", "0")[2].has_null_condition


def test_conditions_are_dropped_by_the_tasks_of_which_the_paper_does():
    defaults = {task: LDMArgs(task=task).dropout_of_condition for task in TASKS}
    assert defaults == {task: 0.1 if task in ("class", "text", "layout") else 0.0 for task in TASKS}


def test_what_an_inpainting_network_is_given():
    task, rows, pipe = parts("inpainting")
    batch = read_batch(task, rows)
    assert set(batch["mask"].unique().tolist()) == {0.0, 1.0} and batch["mask"].shape == (2, 1, 32, 32)
    got = task.condition(pipe, batch)
    with torch.no_grad():
        hidden = torch.where(batch["mask"] > 0.5, torch.tensor(-1.0), batch["image"])  # black, not grey
        latents = pipe.vqvae.encode(hidden).latents  # not scaled
    torch.testing.assert_close(got[:, :8], latents)
    assert torch.equal(got[:, 8:], 2 * batch["mask"][:, :, ::4, ::4] - 1)
    other = task.sample(rows[0], keyed_generator(1, 0))
    assert not torch.equal(other["mask"], batch["mask"][0])  # anew in every epoch


def test_layouts_follow_crop_and_flip():
    task, rows, pipe = parts("layout", "--crop_scale", "0.5", "0.5", "--random_flip")
    seen = set()
    for i in range(8):
        sample = task.sample(rows[i], keyed_generator(0, i))
        row, draw = rows[i], keyed_generator(0, i)
        _, across, down, mirror = torch.rand(4, generator=draw, dtype=torch.float64).tolist()
        crop = (int(across * 17) / 32, int(down * 17) / 32, 0.5, 0.5)
        objects = [
            LayoutObject(CLASS_NAMES.index(name), (x0, y0, x1 - x0, y1 - y0))
            for name, (x0, y0, x1, y1) in zip(row["box_names"], row["boxes"], strict=True)
        ]
        order = Random(int(torch.randint(2**62, (), generator=draw)))
        expected = pipe.layout_tokenizer.encode(objects, crop=crop, flip=mirror < 0.5, shuffle=order)
        assert torch.equal(sample["tokens"], expected)
        seen.add(mirror < 0.5)
    assert seen == {True, False}
    assert torch.equal(task.null_condition(pipe), torch.full((11,), 255))


@pytest.mark.parametrize("degradation", ["bicubic", "bsr", "bsr_light"])
def test_small_pictures_are_degraded_large_ones(degradation):
    task, rows, _ = parts("super_resolution", "--degradation", degradation)
    sample = task.sample(rows[3], keyed_generator(0, 3))
    draw = keyed_generator(0, 3)
    torch.rand(4, generator=draw, dtype=torch.float64)  # the crop's
    light = degradation == "bsr_light"
    image = sample["image"]
    expected = degrade_bicubic(image, 4) if degradation == "bicubic" else degrade_bsr(image, 4, draw, light=light)
    assert torch.equal(sample["low"], expected) and sample["low"].shape == (3, 8, 8)


def test_reading_needs_no_networks_and_can_be_pickled():
    for task in TASKS:
        reading, rows, _ = parts(task)
        read = pickle.loads(pickle.dumps(reading.sample))
        again = pickle.loads(pickle.dumps(rows))
        one, other = (read(source[1], keyed_generator(0, 1)) for source in (rows, again))
        assert all(torch.equal(one[k], other[k]) if torch.is_tensor(one[k]) else one[k] == other[k] for k in one)
        cut = read_picture(rows[1], keyed_generator(0, 1), task=reading)
        assert torch.equal(cut["image"], one["image"])  # what is cached is what is trained on


def test_a_new_text_encoder_starts_with_rows_that_tell():
    bert = parts("text")[2].bert.model
    assert bert.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.1)
    assert bert.embed_positions.weight.std().item() == pytest.approx(0.5, rel=0.1)


def test_the_papers_learning_rates(tmp_path):
    more = ("--lr_multipliers", "0.001", "0.1", "0.0001", "--lr_warmup_steps", "2", "--lr_decay_steps", "4")
    folder = train("unconditional", tmp_path, *more, "--max_train_steps", "3", "--learning_rate", "1")
    assert logged(folder, "lr") == pytest.approx([0.0505, 0.1, 0.05005], abs=1e-6)  # of the step that comes next


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    "more, message",
    [
        (["--task", "unconditional", "--cond_dropout_prob", "0.1"], "--task unconditional has no condition to drop"),
        (["--task", "class", "--cond_dropout_prob", "1.5"], r"--cond_dropout_prob must lie in \[0, 1\], got 1.5"),
        (["--task", "class", "--low_column", "low"], "--low_column=low goes with --task super_resolution, got class"),
        (["--task", "super_resolution", "--low_column", "low", "--crop_scale", "1", "1"], "pairs are cut at"),
        (["--task", "text", "--resnet_updown"], "--resnet_updown goes with tasks without cross-attention"),
        (["--scale_by_std", "--latent_scale", "2"], "measures what --latent_scale=2.0 sets"),
        (["--scale_by_std", "--pretrained_model_name_or_path", "x"], "its latents have a scale already"),
        (["--attention_head_dim", "8", "--num_attention_heads", "2"], "say the same thing: leave one out"),
        (["--attention_levels", "2", "--block_out_channels", "32", "64"], "gives the levels 0 to 1"),
        (["--num_attention_heads", "5"], r"--num_attention_heads=5 must divide the widths \[896\]"),
        (["--norm_num_groups", "32", "--block_out_channels", "16", "32"], "--norm_num_groups=32 must divide"),
        (["--crop_scale", "0.5"], "--crop_scale needs two numbers"),
        (["--crop_scale", "0.8", "0.5"], r"0 <= first <= second <= 1, got \[0.8, 0.5\]"),
        (["--lr_multipliers", "1", "2"], "--lr_multipliers needs three numbers"),
        (["--beta_start", "0.02", "--beta_end", "0.01"], "0 < start <= end < 1 is needed"),
        (["--vlb_weight", "-1"], "--vlb_weight must be >= 0, got -1"),
        (["--latent_scale", "0"], "--latent_scale must be > 0, got 0"),
        (["--num_inference_steps", "0"], "--num_inference_steps must be > 0, got 0"),
        (["--cache_dir", "x", "--random_flip", "--center_crop"], "excludes augmentation: pass --center_crop"),
        (
            ["--cache_dir", "x", "--center_crop", "--crop_scale", "0.5", "1"],
            "leave out --random_flip and --crop_scale",
        ),
        (["--cache_dir", "x", "--center_crop", "--task", "inpainting"], "makes its condition from the picture"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(more, message):
    with pytest.raises(ValueError, match=message):
        train_ldm.parse_args(["--dataset_name", "scenes", *more])


def test_networks_that_do_not_fit_are_refused(tmp_path):
    base = train("class", tmp_path / "base", "--max_train_steps", "1", "--cond_dropout_prob", "0")
    own = ("--pretrained_model_name_or_path", str(base))
    for task, more, message in (
        ("class", ("--latent_channels", "3"), "--latent_channels=3, but the latents of the first stage .* have 8"),
        ("class", ("--resolution", "36"), "--resolution=36 is no multiple of 8 .* the nearest is 32"),
        ("class", ("--num_labels", "5"), "--num_labels=5, but the data have 48 classes"),
        ("text", own, "holds a LDMClassConditionalPipeline, but --task text trains a LDMTextPipeline or LDMTextToIm"),
        ("class", own, "has no null class .* pass --cond_dropout_prob 0"),
    ):
        with pytest.raises(ValueError, match=message):
            parts(task, *more)
    args, data, _ = train_ldm.parse_args(words("class", "unused"))
    for name, message in (
        (None, "--pretrained_vqvae_name_or_path is needed: train"),
        (str(base / "unet"), "holds a UNet"),
    ):
        with pytest.raises(ValueError, match=message):
            build_pipeline(KINDS["class"](dataclasses.replace(args, pretrained_vqvae_name_or_path=name), data))
    pipe = load("class", base)
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="predicts 'v_prediction'; this recipe trains .*'epsilon'"):
        LDMObjective(pipe, KINDS["class"](args, data))


SWAPPED = {"semantic_file_name": "low/000002.png", "low_file_name": "semantic/000002.png"}


def edited(folder: Path, to: Path, index: int = 2, **changes) -> tuple[str, str]:
    """A copy of a folder with one entry of its metadata changed."""
    to.mkdir()
    for entry in folder.iterdir():
        (to / entry.name).symlink_to(entry)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[index] |= changes
    (to / "metadata.jsonl").unlink()
    (to / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "--train_data_dir", str(to)


@pytest.mark.parametrize(
    "task, more, change, message",
    [
        ("class", ("--num_labels", "48"), {"label": 48}, "000002.png' .* has the label 48 in 'label'"),
        ("class", (), {"label": -1}, "000002.png' .* has the label -1 in 'label': expected an integer from 0 on"),
        ("semantic", (), SWAPPED, "000002.png' .* has a label map of the mode 'RGB'"),
        ("semantic", ("--num_labels", "2"), {}, "png' .*label map in 'semantic' holds 0 to ., but there are 2 labels"),
        ("semantic", ("--num_labels", "7"), SWAPPED, "000002.png' .* mode 'RGB'"),
        ("layout", (), {"boxes": [[0.5, 0.5, 1.2, 0.9]]}, "000002.png' .*(It has 1 boxes, but|leaves its picture)"),
        ("layout", ("--box_format", "xywh"), {}, "png' .*leaves its picture of 32x32 pixels as xywh"),
        ("layout", ("--layout_flags", "group"), {}, "no column 'is_group_of'"),
        ("super_resolution", ("--low_column", "low", "--resolution", "16"), SWAPPED,
         "000002.png' .*small picture in 'low' has 32x32 pixels, the large one 32x32: expected a factor of 4"),
        ("super_resolution", ("--low_column", "low", "--resolution", "64"), {}, "a crop without resizing needs 64"),
        ("text", (), {"text": ""}, "000002.png' has no 'text'"),
    ],
)  # fmt: skip
def test_wrong_data_name_the_file(task, more, change, message, scenes_folder, tmp_path):
    source = edited(scenes_folder, tmp_path / "data", **change)

    def read_all():
        reading, rows, _ = parts(task, *more, data=source)
        reading.check_rows(rows)
        for i in range(len(rows)):
            reading.sample(rows[i], keyed_generator(0, i))

    with pytest.raises(ValueError, match=message):
        read_all()


def test_unknown_names_are_refused_when_fine_tuning(scenes_folder):
    task, rows, pipe = parts("layout", data=("--train_data_dir", str(scenes_folder)))
    few = dataclasses.replace(task, categories={"red circle": 0})
    with pytest.raises(ValueError, match="'box_names' holds .* which the model's 1 categories lack"):
        few.check_rows(rows)
    assert "000001.png" in str(rows[1][ROW])
    assert isinstance(pipe.vqvae, VQModel)
