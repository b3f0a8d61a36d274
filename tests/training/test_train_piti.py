"""train_piti.py: the prior, an encoder in front of a frozen U-Net, and both; what they read, and what they refuse."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import train_piti
from accelerate.state import AcceleratorState
from PIL import Image
from pipelines.tiny_glide import PALETTE, tiny_glide, tiny_piti
from safetensors.torch import load_file

from diffusers_ext import GlidePipeline, PITIPipeline
from diffusers_ext.conditions.palettes import SCENES_PALETTE, colorize_labels
from diffusers_ext.data.scenes import WALL_METRES, write_scenes
from diffusers_ext.training.piti import data
from diffusers_ext.training.piti.args import PITIArgs
from diffusers_ext.training.piti.data import ConditionReader, load_rows
from diffusers_ext.training.piti.objective import PITIObjective, PriorObjective
from diffusers_ext.training_utils.args import DataArgs
from diffusers_ext.training_utils.lora import LORA_FILE

ROOT = Path(__file__).parents[2]
PRIOR, JOINT = (str(ROOT / "training" / "presets" / f"piti-{name}smoke.yaml") for name in ("", "joint-"))
SHORT = [
    "--max_train_steps",
    "1",
    "--num_inference_steps",
    "2",
    "--num_validation_images",
    "2",
    "--max_train_samples",
    "12",
]
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONDITIONS = ("label_map", "sketch", "geometry")
SIDE = 32


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(preset: str, folder: Path, *words: str) -> Path:
    train_piti.main([preset, *SHORT, "--output_dir", str(folder), *words])
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture(scope="module")
def prior(tmp_path_factory) -> str:
    """A prior with an upsampler, which a stage leaves out."""
    folder = tmp_path_factory.mktemp("prior")
    tiny_glide().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """`scenes` as a user's folder, with arrays and with pictures of depth and normals."""
    kinds = ("semantic", "sketch", "depth", "normal", "metres", "normals")
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", 12, resolution=64, extra_pictures=kinds)


def unet_of(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder, "unet", WEIGHTS))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# stages


def test_a_prior_becomes_a_pipeline_and_goes_on(tmp_path):
    folder = train(PRIOR, tmp_path / "prior")
    pipe = GlidePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert not pipe.upscales and pipe.config["default_guidance_scale"] == 3
    assert pipe("a red circle", num_inference_steps=2, output_type="pt").images.shape == (1, 3, 16, 16)
    again = train(PRIOR, tmp_path / "again", "--pretrained_model_name_or_path", str(folder), "--rank", "2")
    assert (again / LORA_FILE).is_file() and not same(unet_of(folder), unet_of(again))
    assert same(load_file(folder / "text_encoder" / WEIGHTS), load_file(again / "text_encoder" / WEIGHTS))
    fixed = train(PRIOR, tmp_path / "fixed", "--loss_type", "mse")  # without a learned variance
    assert GlidePipeline.from_pretrained(fixed).unet.config["out_channels"] == 3


@pytest.mark.parametrize("condition", CONDITIONS)
def test_an_encoder_learns_in_front_of_a_frozen_unet_and_then_with_it(prior, tmp_path, condition):
    words = ("--condition", condition)
    encoder = train(
        JOINT, tmp_path / "encoder", *words, "--stage", "encoder", "--pretrained_model_name_or_path", prior
    )
    first = PITIPipeline.from_pretrained(encoder)
    assert same(unet_of(prior), unet_of(encoder)) and not first.upscales
    assert first.config["condition_type"] == condition and first.config["default_guidance_scale"] == 1
    assert first.unet.config["sample_size"] == 16  # as asked for, not as the prior's 8
    trained = load_file(encoder / "checkpoint-1" / "model.safetensors")
    assert not any(key.startswith("unet.") for key in trained) and any(key.startswith("encoder.") for key in trained)
    joint = train(JOINT, tmp_path / "joint", *words, "--pretrained_model_name_or_path", str(encoder))
    assert not same(unet_of(encoder), unet_of(joint))
    assert not same(load_file(encoder / "encoder" / WEIGHTS), load_file(joint / "encoder" / WEIGHTS))
    assert PITIPipeline.from_pretrained(joint).config["default_guidance_scale"] == 1.3


def test_lora_of_the_unet_beside_a_whole_encoder(prior, tmp_path):
    folder = train(JOINT, tmp_path / "lora", "--rank", "2", "--pretrained_model_name_or_path", prior)
    merged = PITIPipeline.from_pretrained(folder)
    pipe = PITIPipeline.from_pretrained(folder, unet=GlidePipeline.from_pretrained(prior).unet)
    pipe.unet.register_to_config(sample_size=16)
    pipe.load_lora_weights(folder)  # beside the prior's own weights
    call = {"label_map": torch.zeros(64, 64, dtype=torch.long), "num_inference_steps": 2, "output_type": "pt"}
    drawn = []
    for one in (pipe, merged):
        one.set_progress_bar_config(disable=True)
        drawn.append(one(**call, generator=torch.Generator().manual_seed(0)).images)
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-4, atol=1e-4)
    assert not same(unet_of(prior), unet_of(folder))


def test_a_run_that_is_stopped_goes_on_to_the_same_bits(prior, tmp_path):
    words = ["--rank", "2", "--pretrained_model_name_or_path", prior, "--timestep_sampler", "loss_second_moment"]
    words += ["--dropout", "0", "--checkpointing_steps", "2"]
    whole = train(JOINT, tmp_path / "whole", *words, "--max_train_steps", "4")
    train(JOINT, tmp_path / "parts", *words, "--max_train_steps", "2")
    parts = train(
        JOINT, tmp_path / "parts", *words, "--max_train_steps", "4", "--resume_from_checkpoint", "latest"
    )  # fmt: skip
    assert same(unet_of(whole), unet_of(parts))
    assert same(load_file(whole / "encoder" / WEIGHTS), load_file(parts / "encoder" / WEIGHTS))
    counts = load_file(parts / "checkpoint-4" / "model.safetensors")["timesteps.counts"]
    assert int(counts.sum()) == 16  # the losses of 4 steps of 4 samples


# ---------------------------------------------------------------------------------------------------------------------
# objective


def test_a_dropped_condition_is_the_null_condition():
    """The empty text, and an image of ones, as the pipelines have them."""
    pipe = tiny_glide(upscale=False)
    reader = train_piti.make_reader(pipe, PITIArgs(), DataArgs(dataset_name="scenes"), {})
    objective = PriorObjective(pipe, PITIArgs(), reader.tokens("")).eval()
    tokens = torch.stack([reader.tokens("a red circle"), reader.tokens("A BLUE ring")])
    found = objective.embeds({"tokens": tokens}, torch.tensor([True, False]))
    torch.testing.assert_close(found, pipe.encode_prompt(["a red circle", ""]))
    torch.testing.assert_close(objective.embeds({"tokens": tokens}, None)[1:], pipe.encode_prompt("a blue ring"))
    pipe = tiny_piti(upscale=False)
    objective = PITIObjective(pipe, PITIArgs(stage="joint"), torch.device("cpu")).eval()
    conditions = pipe.read_conditions(label_map=torch.ones(2, SIDE, SIDE, dtype=torch.long))
    found = objective.embeds({"condition": conditions}, torch.tensor([True, False]))
    torch.testing.assert_close(found[:1], pipe.encode_conditions(conditions[:1]))
    torch.testing.assert_close(found[1:], pipe.null_embeds(1))
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="predicts 'v_prediction'; this recipe trains .*'epsilon'"):
        PITIObjective(pipe, PITIArgs(stage="joint"), torch.device("cpu"))


def test_weights_of_drawn_levels_keep_the_mean_and_the_losses_are_observed():
    pipe = tiny_piti(upscale=False)
    args = PITIArgs(stage="joint", timestep_sampler="loss_second_moment", cond_dropout_prob=0, guidance_scale=1)
    objective = PITIObjective(pipe, args, torch.device("cpu"))
    batch = {"image": torch.rand(3, 3, 8, 8) * 2 - 1, "condition": torch.rand(3, 3, SIDE, SIDE)}
    found = objective.losses(batch, generators(3), 0)
    assert torch.allclose(found["loss"], found["sample_losses"].mean())  # all levels alike as yet
    sampler = objective.timesteps
    sampler.losses.copy_(torch.linspace(1, 3, len(sampler.losses))[:, None].expand_as(sampler.losses))
    sampler.counts.fill_(10)
    objective.before_step(batch, 3, 0, None)
    found = objective.losses(batch, generators(3), 0)
    weights = 1 / (len(sampler.losses) * sampler.probabilities[found["timesteps"]])
    torch.testing.assert_close(found["loss"], (weights * found["sample_losses"]).mean())


def test_a_frozen_unet_gets_no_gradients_and_drops_nothing_out():
    pipe = tiny_piti(upscale=False)
    pipe.unet.train()
    args = PITIArgs(stage="encoder", pretrained_model_name_or_path="x")
    objective = PITIObjective(pipe, args, torch.device("cpu")).train()
    batch = {"image": torch.rand(2, 3, 8, 8) * 2 - 1, "condition": torch.rand(2, 3, SIDE, SIDE)}
    objective.losses(batch, generators(2), 0)["loss"].backward()
    assert all(parameter.grad is None for parameter in pipe.unet.parameters()) and not pipe.unet.training
    assert all(parameter.grad is not None for parameter in pipe.encoder.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# data


def reader_of(condition: str, columns: dict[str, str], side: int = SIDE, flip: bool = False) -> ConditionReader:
    cut = DataArgs(dataset_name="scenes", resolution=16, center_crop=True, random_flip=flip)
    palette = np.array(SCENES_PALETTE) if condition == "label_map" else None
    return ConditionReader(PITIArgs(stage="joint", condition=condition), cut, columns, side, palette)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions_are_those_of_the_pipeline(scenes, condition):
    args = PITIArgs(stage="joint", condition=condition, encoder_sample_size=64)
    rows, _, columns = load_rows(args, DataArgs(train_data_dir=str(scenes), resolution=16, center_crop=True))
    pipe = tiny_piti(condition, upscale=False)
    pipe.encoder.register_to_config(sample_size=64)
    pipe.register_to_config(label_palette=[list(map(int, color)) for color in SCENES_PALETTE])
    row = rows[0]
    sample = reader_of(condition, columns, 64)(row, torch.Generator())
    if condition == "geometry":
        assert columns == {"normals": "normals", "depth": "depth"}
        raw = {"normals": torch.from_numpy(row["normals"]).permute(2, 0, 1)}
        raw["depth"] = WALL_METRES - (WALL_METRES - 1) * np.asarray(row["depth"], dtype=np.float32) / 255
    else:
        raw = {condition: row[columns[{"label_map": "semantic"}.get(condition, condition)]]}
    assert torch.equal(sample["condition"], pipe.read_conditions(**raw)[0])
    cut = {name: sample[name][None] for name in raw}  # what a validation calls the pipeline with
    assert torch.equal(sample["condition"], pipe.read_conditions(**cut)[0])


def test_geometry_is_coloured_at_its_own_size_as_the_pipeline_does():
    generator = np.random.default_rng(0)
    normals = generator.normal(size=(40, 40, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    depth = generator.gamma(2, size=(40, 40)).astype(np.float32) + 0.5
    row = {"image": Image.new("RGB", (40, 40)), "row_name": "x", "n": normals, "d": depth}
    found = reader_of("geometry", {"normals": "n", "depth": "d"}, 32)(row, torch.Generator())["condition"]
    pipe = tiny_piti("geometry", upscale=False)
    pipe.encoder.register_to_config(sample_size=32)
    raw = {"normals": torch.from_numpy(normals).permute(2, 0, 1), "depth": torch.from_numpy(depth)}
    assert torch.equal(found, pipe.read_conditions(**raw)[0])


def test_arrays_and_pictures_of_geometry_are_read_alike(scenes):
    args, found = PITIArgs(stage="joint", condition="geometry", encoder_sample_size=64), {}
    rows, _, _ = load_rows(args, DataArgs(train_data_dir=str(scenes), resolution=16))
    whole = rows.source[0]
    for names in (("normals", "metres"), ("normal", "depth")):
        row = {"image": whole["image"], "row_name": "x", "n": whole[names[0]], "d": whole[names[1]]}
        found[names] = reader_of("geometry", {"normals": "n", "depth": "d"}, 64)(row, torch.Generator())["condition"]
    first, second = found.values()
    assert (first - second).abs().max() < 0.05  # 8 bits


def test_scenes_are_drawn_as_large_as_their_maps():
    for condition in CONDITIONS:
        args = PITIArgs(stage="joint", condition=condition, encoder_sample_size=48)
        rows, _, columns = load_rows(args, DataArgs(dataset_name="scenes", resolution=16, max_train_samples=2))
        sample = reader_of(condition, columns, 48)(rows[0], torch.Generator())
        assert rows[0]["image"].size == (48, 48) and sample["image"].shape == (3, 16, 16)
        assert sample["condition"].shape == ({"label_map": 3, "sketch": 1, "geometry": 6}[condition], 48, 48)


def row_of(**columns) -> dict:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    return {"image": picture, "row_name": "'a.png' (row 7)", **columns}


def test_mirrored_normals_look_the_other_way():
    normals = np.zeros((40, 56, 3), dtype=np.float32)
    normals[..., 0], normals[..., 2] = 0.6, 0.8
    row = row_of(n=normals, d=np.ones((40, 56), dtype=np.float32))
    reader = reader_of("geometry", {"normals": "n", "depth": "d"}, flip=True)
    seen = {float(reader(row, one)["normals"][0, 0, 0]) for one in generators(8)}
    assert seen == {np.float32(0.6), np.float32(-0.6)}


def test_maps_are_cut_and_mirrored_like_their_picture():
    labels = np.arange(40 * 56).reshape(40, 56) % 7
    picture = Image.fromarray(np.stack([labels * 30] * 3, axis=-1).astype(np.uint8))
    row = {"image": picture, "row_name": "x", "s": Image.fromarray(labels.astype(np.uint8))}
    cut = DataArgs(dataset_name="scenes", resolution=40, random_flip=True)
    reader = ConditionReader(PITIArgs(stage="joint"), cut, {"semantic": "s"}, 40, np.array(SCENES_PALETTE))
    for one in generators(6):
        sample = reader(row, one)
        assert torch.equal(((sample["image"][0] + 1) * 127.5 / 30).round().long(), sample["label_map"])


LABELS = np.zeros((40, 56), dtype=np.uint8)
NORMALS, DEPTH = np.tile(np.float32([0, 0, 1]), (40, 56, 1)), np.ones((40, 56), dtype=np.float32)


@pytest.mark.parametrize(
    "condition, columns, match",
    [
        ("label_map", {"semantic": Image.fromarray(LABELS + np.uint8(9))}, r"unknown label\(s\), 9 at .* but not 9"),
        ("label_map", {"semantic": Image.fromarray(np.eye(40, 56, dtype=np.uint8) * 90 + 7)}, "but not 7, 97"),
        ("label_map", {"semantic": Image.fromarray(LABELS[:20])}, "The label map has 56x20 pixels, its picture 56x40"),
        ("label_map", {"semantic": Image.new("RGBA", (56, 40))}, "mode 'RGBA'"),
        (
            "label_map",
            {"semantic": Image.new("RGB", (56, 40), (9, 200, 9))},
            r"no colour of the palette.* --palette says",
        ),
        ("sketch", {"sketch": np.zeros((40, 56, 3), dtype=np.uint8)}, "`sketch` must have shape"),
        ("sketch", {"sketch": Image.new("L", (56, 44), 255)}, "The sketch has 56x44 pixels"),
        ("geometry", {"normals": NORMALS, "depth": DEPTH * np.nan}, "`depth` holds 1600 values that are not finite"),
        ("geometry", {"normals": 3 * NORMALS, "depth": DEPTH}, "expected unit vectors"),
        ("geometry", {"normals": NORMALS[..., :2], "depth": DEPTH}, r"normals has the shape \(40, 56, 2\)"),
        ("geometry", {"normals": NORMALS, "depth": DEPTH[None]}, r"depth has the shape \(1, 40, 56\)"),
        ("geometry", {"normals": NORMALS[:20], "depth": DEPTH}, "The map of normals has 56x20 pixels"),
        ("geometry", {"normals": NORMALS, "depth": DEPTH[:20]}, "The map of depth has 56x20 pixels"),
        ("geometry", {"normals": NORMALS, "depth": Image.new("I;16", (56, 40))}, "a picture of mode I;16"),
        ("geometry", {"normals": NORMALS, "depth": -DEPTH}, "`depth` goes down to -1"),
    ],
)
def test_a_bad_row_is_named(condition, columns, match):
    reader = reader_of(condition, {name: name for name in columns})
    with pytest.raises(ValueError, match=rf"^'a\.png' \(row 7\): .*{match}"):
        reader(row_of(**columns), torch.Generator())


def test_a_row_without_its_map_is_refused_at_the_start(scenes, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(scenes, folder)
    shutil.rmtree(folder / "depth")  # the pictures; what is left is `metres`
    table = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    for row in rows:
        del row["depth_file_name"]
    rows[1]["metres_file_name"] = None
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--condition", "geometry", "--train_data_dir", str(folder)]
    with pytest.raises(ValueError, match=r"png' \(row \d+\) has nothing in the column 'metres': fill or remove it"):
        train(JOINT, tmp_path / "run", *words)


def test_a_coloured_map_is_read_by_the_palette():
    labels = np.arange(40 * 56).reshape(40, 56) % 7
    plain, colored = Image.fromarray(labels.astype(np.uint8)), Image.fromarray(colorize_labels(labels))
    reader = reader_of("label_map", {"semantic": "s"})
    first, second = (reader(row_of(s=one), torch.Generator())["condition"] for one in (plain, colored))
    assert torch.equal(first, second)


def test_sketches_without_lines_are_named_once(caplog):
    reader = reader_of("sketch", {"sketch": "s"})
    data._WITHOUT_LINES.clear()
    grey = Image.new("L", (56, 40), 200)  # grey is no line
    for number in range(20):
        row = row_of(s=grey) | {"row_name": f"row {number % 10}"}
        condition = reader(row, torch.Generator())["condition"]
    assert torch.equal(condition, torch.ones_like(condition))  # the null condition
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 6 and "row 0 has a sketch without lines" in named[0] and "More sketches" in named[-1]


# ---------------------------------------------------------------------------------------------------------------------
# what is refused before anything runs


@pytest.mark.parametrize(
    "options, match",
    [
        ({"stage": "encoder"}, "--stage encoder needs a U-Net that can draw"),
        ({"stage": "encoder", "rank": 4, "pretrained_model_name_or_path": "x"}, "--rank=4 goes with --stage joint"),
        ({"palette": "ade150"}, "--palette=ade150 goes with --condition label_map, got --stage prior"),
        ({"stage": "joint", "condition": "sketch", "palette": "ade150"}, "got --condition sketch"),
        ({"stage": "joint", "encoder_sample_size": 40}, "--encoder_sample_size=40 must be a multiple of 16"),
        ({"stage": "joint", "encoder_attention_heads": 7}, "--encoder_attention_heads=7 must divide"),
        ({"text_attention_heads": 7}, "--text_attention_heads=7 must divide --cross_attention_dim=512"),
        ({"cond_dropout_prob": 0, "guidance_scale": 2}, "--guidance_scale=2 needs samples trained without"),
        ({"num_head_channels": 7}, "--num_head_channels=7 must divide the widths"),
        ({"num_train_timesteps": 1}, "--num_train_timesteps must be >= 2"),
        ({"max_loss_weight": 0.5}, "--max_loss_weight"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        PITIArgs(**options)


def test_pipelines_that_do_not_fit_are_refused(prior, scenes, tmp_path):
    tiny_piti().save_pretrained(tmp_path / "piti")
    tiny_glide(inpaint=True, upscale=False).save_pretrained(tmp_path / "inpaint")
    (tmp_path / "two.json").write_text("[[1, 2, 3], [9, 9, 9], [1, 2, 3]]")
    (tmp_path / "other.json").write_text("[[1, 2, 3], [9, 9, 9]]")
    start = "--pretrained_model_name_or_path"
    for preset, words, match in (
        (PRIOR, (start, tmp_path / "piti"), "holds a PITIPipeline, but --stage prior starts from a GlidePipeline"),
        (JOINT, (start, tmp_path / "inpaint"), "fills parts of images"),
        (JOINT, (start, tmp_path / "piti", "--condition", "sketch"), "draws from label_map: pass --condition"),
        (JOINT, (start, prior, "--loss_type", "mse"), "its variance is learned: pass --loss_type hybrid"),
        (JOINT, (start, tmp_path / "piti", "--palette", tmp_path / "other.json"), "by other colours; leave it out"),
        (JOINT, ("--palette", tmp_path / "two.json"), r"colour \(1, 2, 3\) for labels 0 and 2"),
        (JOINT, ("--palette", "coco"), "is no file and none of coco182, ade150"),
        (JOINT, ("--resolution", "15"), "--resolution=15 is no multiple of 2"),
        (JOINT, ("--condition", "geometry", "--train_data_dir", scenes), None),
        (JOINT, ("--condition", "sketch", "--train_data_dir", _pictures(tmp_path / "plain")), "no column 'sketch'"),
        (JOINT, ("--condition", "geometry", "--train_data_dir", tmp_path / "plain"), "no column 'normals'"),
    ):
        words = list(map(str, words))
        if match is None:
            train(preset, tmp_path / "run", *words)
            continue
        with pytest.raises(ValueError, match=match):
            train(preset, tmp_path / "no", *words)
        AcceleratorState._reset_state(reset_partial_state=True)


def _pictures(folder: Path) -> Path:
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (20, 20)).save(folder / f"{number}.png")
    return folder


def test_a_palette_and_scenes_names_reach_the_pipeline(prior, scenes, tmp_path):
    (tmp_path / "colors.json").write_text(json.dumps([[7 * i, i, 255 - i] for i in range(9)]))
    words = ("--train_data_dir", str(scenes), "--palette", str(tmp_path / "colors.json"))
    pipe = PITIPipeline.from_pretrained(train(JOINT, tmp_path / "own", *words))
    assert pipe.label_palette.tolist() == [[7 * i, i, 255 - i] for i in range(9)]
    pipe = PITIPipeline.from_pretrained(train(JOINT, tmp_path / "scenes"))
    assert pipe.label_palette.tolist() == SCENES_PALETTE.tolist() and "star" in str(pipe.config["label_names"])
    tiny_piti(upscale=False).save_pretrained(tmp_path / "four")  # a pipeline keeps its own
    with pytest.raises(ValueError, match=r"row \d+.*unknown label"):
        train(JOINT, tmp_path / "no", "--pretrained_model_name_or_path", str(tmp_path / "four"))
    assert len(PALETTE) == 4
