"""train_cascaded.py: each stage alone, its augmentations, its networks, and the chain that validation draws."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import train_cascaded
from accelerate.state import AcceleratorState
from PIL import Image

from diffusers_ext import CascadedBasePipeline, CascadedDiffusionPipeline, CascadedUNet, CascadedUpscalePipeline
from diffusers_ext.data.annotations import NamedRows
from diffusers_ext.data.labels import Classes
from diffusers_ext.degradations.resizing import resize
from diffusers_ext.losses.diffusion import VariationalLoss
from diffusers_ext.training.cascaded.args import CascadedArgs
from diffusers_ext.training.cascaded.data import Reader, load_rows
from diffusers_ext.training.cascaded.networks import build_pipeline
from diffusers_ext.training.cascaded.objective import CascadedObjective
from diffusers_ext.training.cascaded.validation import Neighbours
from diffusers_ext.training_utils.args import DataArgs
from diffusers_ext.training_utils.lora import LORA_FILE

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "training" / "presets"
BASE, UPSCALE = str(PRESETS / "cascaded-smoke.yaml"), str(PRESETS / "cascaded-upscale-smoke.yaml")
SHORT = ["--max_train_steps", "1", "--num_inference_steps", "2", "--num_validation_images", "2"]
SMALL = {
    "block_out_channels": [16, 32], "layers_per_block": 1, "num_head_channels": 8, "norm_num_groups": 8,
    "num_train_timesteps": 100,
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def train(preset: str, folder: Path, *words: str) -> Path:
    train_cascaded.main([preset, *SHORT, "--output_dir", str(folder), *words])
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def upscaling(**options) -> CascadedArgs:
    return CascadedArgs(stage="super_resolution", **{**SMALL, **options})


def objective_of(args: CascadedArgs) -> CascadedObjective:
    """With weights that are no longer zero, so that everything that the network is told counts."""
    torch.manual_seed(0)
    pipe = build_pipeline(args, 16, Classes(5) if args.condition == "class" else None)
    for parameter in pipe.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return CascadedObjective(pipe, args).eval()


def batch_of(args: CascadedArgs, count: int = 4) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    batch = {"image": torch.rand(count, 3, 16, 16, generator=draw) * 2 - 1}
    if args.upscales:
        batch["low"] = torch.rand(count, 3, 8, 8, generator=draw) * 2 - 1
    if args.condition == "class":
        batch["label"] = torch.randint(5, (count,), generator=draw)
    return batch


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# data


@pytest.mark.parametrize("downsampling", ["area", "bicubic"])
def test_the_small_picture_has_the_crop_and_the_flip_of_the_large_one(downsampling):
    """Mirrored first, then made smaller; a base stage of the same pictures gets what its successor is given."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    row = {"image": Image.fromarray(pixels), "row_name": "x", "label": 3}
    args = upscaling(downsampling=downsampling)
    data = DataArgs(dataset_name="scenes", resolution=32, random_flip=True)
    found = [Reader(args, data)(row, one) for one in generators(8)]
    assert all(
        torch.equal(one["low"], resize(one["image"], 16, 16, _method(downsampling)).clamp(-1, 1)) for one in found
    )
    assert len({one["image"].sum().item() for one in found}) == 8 and all(int(one["label"]) == 3 for one in found)
    plain = [Reader(args, DataArgs(dataset_name="scenes", resolution=32))(row, one) for one in generators(8)]
    flipped = [torch.equal(one["image"], other["image"].flip(2)) for one, other in zip(found, plain, strict=True)]
    assert any(flipped) and not all(flipped)
    base = CascadedArgs(downsampling=downsampling)
    below = [
        Reader(base, DataArgs(dataset_name="scenes", resolution=16, random_flip=True))(row, one)
        for one in generators(8)
    ]
    for one, other in zip(found, below, strict=True):
        # whole factors of areas agree up to rounding to 8 bits on the way
        close = {"area": 2 / 127.5, "bicubic": 0.2}[downsampling]
        assert (one["low"] - other["image"]).abs().max() < close and "low" not in other


def _method(downsampling: str) -> str:
    return "area" if downsampling == "area" else "antialiased"


def test_validation_sees_the_centre_unmirrored():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    row = {"image": Image.fromarray(pixels), "row_name": "x", "label": 3}
    reader = Reader(CascadedArgs(), DataArgs(dataset_name="scenes", resolution=64, random_flip=True))
    wanted = torch.from_numpy(pixels[:, 16:80].transpose(2, 0, 1) / np.float32(127.5) - 1)
    for one in generators(4):
        torch.testing.assert_close(reader.without_augmentation()(row, one)["image"], wanted)


def test_a_bad_row_is_named(tmp_path):
    (tmp_path / "cat").mkdir()
    for number in range(4):
        Image.new("RGB", (20, 20)).save(tmp_path / "cat" / f"{number}.png")
    args, data = CascadedArgs(), DataArgs(train_data_dir=str(tmp_path), resolution=16)
    rows, _ = load_rows(args, data)
    assert isinstance(rows, NamedRows) and int(Reader(args, data)(rows[0], torch.Generator())["label"]) == 0
    words = ["--train_data_dir", str(tmp_path), "--num_labels", "3", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="--num_labels=3, but the data have 1 classes"):
        train_cascaded.main([BASE, *words])


# ---------------------------------------------------------------------------------------------------------------------
# what the small picture goes through


def test_random_levels_are_uniform_with_some_clean_ones():
    args = upscaling(clean_prob=0.1)
    objective, count = objective_of(args), 1000
    low = torch.ones(count, 3, 4, 4)
    noised, told = objective.augment(low, generators(count))
    is_clean = told == 0
    assert torch.equal(noised[is_clean], low[is_clean]) and 0.07 < is_clean.float().mean() < 0.13
    levels = told[~is_clean]
    assert (levels.min(), levels.max()) == (1, 100) and 47 < levels.mean() < 54
    abar = objective.pipe.conditioning_scheduler.alphas_cumprod[levels.long() - 1].float()
    torch.testing.assert_close(noised[~is_clean].mean((1, 2, 3)), abar.sqrt(), atol=0.6, rtol=0)
    residue = (noised[~is_clean] - abar.sqrt().view(-1, 1, 1, 1)) / (1 - abar).sqrt().view(-1, 1, 1, 1)
    assert abs(residue.mean()) < 0.02 and abs(residue.std() - 1) < 0.02


def test_a_fixed_level_is_not_told():
    args = upscaling(truncation_level=30)
    objective = objective_of(args)
    assert objective.unet.config["aug_cond_type"] is None
    noised, told = objective.augment(torch.zeros(64, 3, 8, 8), generators(64))
    abar = objective.pipe.conditioning_scheduler.alphas_cumprod[29]
    assert told is None and abs(noised.std() - (1 - abar).sqrt()) < 0.02


def test_blur_takes_a_share_of_the_pictures_and_none_takes_nothing():
    low = batch_of(upscaling(), 200)["low"]
    blurred, told = objective_of(upscaling(augmentation="blur", blur_prob=0.3)).augment(low, generators(200))
    same = (blurred == low).flatten(1).all(1)
    assert told is None and 0.6 < same.float().mean() < 0.8
    assert (blurred[~same].std((1, 2, 3)) < low[~same].std((1, 2, 3))).all()
    plain, told = objective_of(upscaling(augmentation="none")).augment(low, generators(200))
    assert told is None and torch.equal(plain, low)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_small_pictures_can_have_a_schedule_of_their_own(schedule):
    args = upscaling(conditioning_schedule=schedule, conditioning_timesteps=40, beta_schedule="cosine")
    objective = objective_of(args)
    own, small = objective.pipe.scheduler, objective.pipe.conditioning_scheduler
    assert (len(own.alphas_cumprod), len(small.alphas_cumprod)) == (100, 40)
    if schedule == "linear":
        torch.testing.assert_close(small.betas[[0, -1]], torch.tensor([0.1 / 40, 20 / 40]).double())
    _, told = objective.augment(torch.zeros(500, 3, 4, 4), generators(500))
    assert told.max() == 40


# ---------------------------------------------------------------------------------------------------------------------
# the objective


@pytest.mark.parametrize("options", [{}, {"augmentation": "blur"}, {"truncation_level": 9}, {"loss_type": "mse"}])
def test_a_sample_s_loss_depends_on_its_own_draws_alone(options):
    args = upscaling(cond_dropout_prob=0.5, **options)
    objective, batch = objective_of(args), batch_of(args)
    with torch.no_grad():
        whole = objective(batch, generators(4), 0)["loss"]
        alone = [objective({k: v[i : i + 1] for k, v in batch.items()}, generators(1, i), 0)["loss"] for i in range(4)]
    torch.testing.assert_close(whole, torch.stack(alone).mean(), rtol=1e-4, atol=1e-5)


def test_the_hybrid_loss_teaches_the_noise_by_its_error_alone():
    args = CascadedArgs(**SMALL)
    objective, batch = objective_of(args), batch_of(args)
    found = objective(batch, generators(4), 0)
    assert set(found) == {"loss", "mse", "vb"}
    torch.testing.assert_close(found["loss"], found["mse"] + found["vb"])
    last = objective.unet.conv_out.weight
    whole, error = (torch.autograd.grad(found[name], last, retain_graph=True)[0] for name in ("loss", "mse"))
    torch.testing.assert_close(whole[:3], error[:3])
    assert isinstance(objective.noise_loss.hybrid, VariationalLoss) and whole[3:].any() and not error[3:].any()
    assert not any(name.startswith("hybrid") for name in objective.state_dict())


def test_weighted_errors_of_the_noise_are_those_of_v_up_to_the_highest_weight():
    args = upscaling(loss_type="mse", max_loss_weight=4)
    objective = objective_of(args)
    abar = objective.pipe.scheduler.alphas_cumprod
    timesteps = torch.tensor([0, 50, 99])
    weights = torch.tensor([1 / abar[0], 1 / abar[50], 4])
    torch.testing.assert_close(objective.noise_loss.weights[timesteps], weights.float())
    # v = sqrt(abar) noise - sqrt(1 - abar) x0, with the x0 that a wrong noise stands for
    clean, noise, wrong = torch.randn(3, 1, 3, generator=torch.Generator().manual_seed(0)).double().unbind()
    a, s = abar[50].sqrt(), (1 - abar[50]).sqrt()
    other = (a * clean + s * noise - s * wrong) / a
    error = (a * (wrong - noise) - s * (other - clean)).square()
    torch.testing.assert_close(error.float(), ((wrong - noise).square() / abar[50]).float())
    plain = objective_of(upscaling(loss_type="mse"))
    assert (plain.noise_loss.weights == 1).all() and plain.state_dict().keys() == objective.state_dict().keys()
    found = objective(batch_of(args), generators(4), 0)
    assert found["loss"] > found["mse"] > 0


def test_a_base_is_not_trained_below_its_least_timestep():
    seen = []
    args = CascadedArgs(min_timestep=40, cond_dropout_prob=0.3, **SMALL)
    objective = objective_of(args)
    objective.unet.register_forward_pre_hook(lambda _, given: seen.append((given[1], given[2])))
    batch = batch_of(args, 300)
    with torch.no_grad():
        objective(batch, generators(300), 0)
    ((timesteps, labels),) = seen
    assert (timesteps.min(), timesteps.max()) == (40, 99)
    dropped = labels == 5  # the last row of six
    assert objective.unet.config["null_class"] == 5 and 0.2 < dropped.float().mean() < 0.4
    assert torch.equal(labels[~dropped], batch["label"][~dropped])


def test_a_stage_that_goes_on_takes_its_noise_levels_with_it(tmp_path):
    """A level where an earlier training stopped is not kept, and what a network does not predict is not trained."""
    build_pipeline(CascadedArgs(min_timestep=40, condition="unconditional", **SMALL), 16, None).save_pretrained(
        tmp_path
    )
    args = {"pretrained_model_name_or_path": str(tmp_path), "condition": "unconditional", **SMALL}
    for level in (40, 0):
        pipe = build_pipeline(CascadedArgs(min_timestep=level, **args), 16, None)
        assert pipe.usual_stop_level == level and pipe.scheduler.config["num_train_timesteps"] == 100
    pipe.scheduler.scheduler.register_to_config(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="predicts 'v_prediction'; this recipe trains .*'epsilon'"):
        CascadedObjective(pipe, CascadedArgs(**args))


# ---------------------------------------------------------------------------------------------------------------------
# from networks of others


def converted(folder: Path, **options) -> Path:
    """As `diffusers-ext convert` leaves an ADM upsampler: a learned variance, labels, no null class, no level."""
    options = {"cond_dropout_prob": 0.0, "augmentation": "none", "low_resolution": 16, **options}
    pipe = build_pipeline(upscaling(**options), 32, Classes(48))
    for parameter in pipe.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipe.save_pretrained(folder)
    return folder


def test_an_upsampler_is_trained_further_with_a_level(tmp_path):
    folder = converted(tmp_path / "adm")
    args = upscaling(pretrained_unet_name_or_path=str(folder), unet_subfolder="unet", cond_dropout_prob=0.0)
    pipe = build_pipeline(args, 32, Classes(48))
    assert pipe.unet.config["aug_cond_type"] == "timestep" and pipe.config["augmentation"] == "truncated"
    before = CascadedUNet.from_pretrained(folder, subfolder="unet").eval()
    image, low, label, t = (
        torch.rand(2, 3, 32, 32),
        torch.rand(2, 3, 16, 16),
        torch.tensor([0, 47]),
        torch.tensor([3, 9]),
    )
    with torch.no_grad():
        wanted = before(image, t, label, low).sample
        for level in (0, 50):
            torch.testing.assert_close(pipe.unet.eval()(image, t, label, low, level).sample, wanted)
    words = ["--cond_dropout_prob", "0", "--learning_rate", "0.01"]
    result = train(
        UPSCALE, tmp_path / "run", "--pretrained_model_name_or_path", str(folder), *words, "--max_train_steps", "2"
    )
    trained = CascadedUpscalePipeline.from_pretrained(result)
    assert trained.unet.config["aug_cond_type"] == "timestep" and trained.unet.aug_embedding.linear_2.weight.any()
    assert trained.conditioning_scheduler is not None


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "has no null class that stands for a dropped one: pass --cond_dropout_prob 0"),
        (["--loss_type", "mse"], "has 6 outputs, so its variance is learned: pass --loss_type hybrid"),
        (["--stage", "base", "--low_resolution", "none"], "is one of --stage super_resolution, got --stage base"),
        (["--condition", "unconditional"], "has 48 classes: pass --condition class"),
    ],
)
def test_networks_that_do_not_fit_are_refused(tmp_path, words, message):
    network = ["--pretrained_unet_name_or_path", str(converted(tmp_path / "adm") / "unet")]
    with pytest.raises(ValueError, match=message):
        train(UPSCALE, tmp_path / "run", *network, *words)


def test_a_network_that_is_told_the_level_is_not_trained_without(tmp_path):
    folder = converted(tmp_path / "told", augmentation="truncated")
    words = ["--pretrained_model_name_or_path", str(folder), "--cond_dropout_prob", "0"]
    for more in (["--augmentation", "none"], ["--truncation_level", "5"]):
        with pytest.raises(ValueError, match="is told the level of the small picture's noise: pass --augmentation tr"):
            train(UPSCALE, tmp_path / "run", *words, *more)
    with pytest.raises(ValueError, match="holds a CascadedUpscalePipeline, but --stage base trains a CascadedBasePip"):
        train(BASE, tmp_path / "run", *words[:2])


# ---------------------------------------------------------------------------------------------------------------------
# options


@pytest.mark.parametrize(
    "words, message",
    [
        (("--low_resolution", "8"), "--low_resolution=8 goes with --stage super_resolution"),
        (("--truncation_level", "8"), "--truncation_level=8 goes with --stage super_resolution"),
        (("--stages_before", "x"), "--stages_before=.* goes with --stage super_resolution"),
        (("--min_timestep", "100"), r"--min_timestep must lie in \[0, 99\], got 100"),
        (("--condition", "unconditional", "--num_labels", "3"), "--num_labels=3 goes with --condition class"),
        (("--cond_dropout_prob", "0", "--guidance_scale", "2"), "--guidance_scale=2.0 needs samples trained without"),
        (("--num_heads", "2"), "--num_heads=2 and --num_head_channels=8 say the same"),
        (("--num_head_channels", "5"), r"--num_head_channels=5 must divide the widths \[32, 32\]"),
        (("--attention_levels", "2"), r"--attention_levels=\[2\]: --block_out_channels gives the levels 0 to 1"),
        (("--num_train_timesteps", "1"), "--num_train_timesteps must be >= 2, got 1"),
        (("--num_train_timesteps", "20", "--beta_schedule", "linear"), "--num_train_timesteps=20: the linear .*21"),
        (("--pretrained_model_name_or_path", "a", "--pretrained_unet_name_or_path", "b"), "leave one out"),
    ],
)
def test_options_of_a_base_that_do_not_fit_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        train_cascaded.parse_args([BASE, *words])


@pytest.mark.parametrize(
    "words, message",
    [
        (("--min_timestep", "5"), "--min_timestep=5 goes with --stage base"),
        (("--max_loss_weight", "0.5"), r"--max_loss_weight must lie in \[1, 1e\+06\], got 0.5"),
        (("--low_resolution", "32"), "--low_resolution=32 must be smaller than --resolution=32 and divide it"),
        (("--low_resolution", "12"), "--low_resolution=12 must be smaller .* for a factor of 2 it is 16"),
        (("--augmentation", "blur", "--truncation_level", "5"), "--truncation_level=5 goes with --augmentation trunc"),
        (("--augmentation", "blur", "--noise_level", "5"), "--noise_level=5.0 goes with --augmentation truncated"),
        (("--truncation_level", "5", "--noise_level", "6"), "--noise_level=6.0, but --truncation_level=5 trains no"),
        (("--conditioning_timesteps", "5", "--conditioning_schedule", "linear"), "--conditioning_timesteps=5: the l"),
        (("--truncation_level", "101"), r"--truncation_level must lie in \[0, 100\], got 101"),
        (("--blur_sigma", "0.4", "inf"), "--blur_sigma needs two numbers, 0 < first <= second"),
        (("--block_out_channels", "0", "16"), r"--block_out_channels=\[0, 16\]: give each level a width above 0"),
        (("--blur_sigma", "0.6", "0.4"), "--blur_sigma needs two numbers, 0 < first <= second"),
        (("--clean_prob", "2"), r"--clean_prob must lie in \[0, 1\], got 2"),
    ],
)
def test_options_of_an_upscaler_that_do_not_fit_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        train_cascaded.parse_args([UPSCALE, *words])


def test_a_size_that_the_network_cannot_halve_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="--resolution=18 is no multiple of 4, as the U-Net halves it 2 times; the ne"
    ):
        train(BASE, tmp_path, "--resolution", "18", "--block_out_channels", "8", "8", "8")


# ---------------------------------------------------------------------------------------------------------------------
# stages, and the chain that validation draws


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Folders of classes."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(24):
        place = folder / ("cat", "dog", "fox")[number % 3]
        place.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return folder


def sides(pictures: Path, low: int | None, side: int) -> list[str]:
    small = [] if low is None else ["--low_resolution", str(low)]
    return ["--train_data_dir", str(pictures), "--resolution", str(side), *small]


@pytest.fixture(scope="module")
def base(pictures, tmp_path_factory) -> Path:
    """A trained base stage of 8 pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return train(BASE, tmp_path_factory.mktemp("stages") / "base", *sides(pictures, None, 8))


def sheet(folder: Path, side: int) -> tuple[int, int]:
    """Columns and rows of the validation's pictures, which have 2 pixels around each."""
    width, height = Image.open(folder / "validation-1.png").size
    return (width - 2) // (side + 2), (height - 2) // (side + 2)


def test_a_stage_is_drawn_in_the_chain_of_its_neighbours(base, pictures, tmp_path):
    """From a folder below and one above, while the middle one trains; each result is a stage on its own."""
    top = train(UPSCALE, tmp_path / "top", *sides(pictures, 16, 32))
    alone = train(UPSCALE, tmp_path / "alone", *sides(pictures, 8, 16))
    words = [*sides(pictures, 8, 16), "--stages_before", str(base), "--stages_after", str(top)]
    middle = train(UPSCALE, tmp_path / "middle", *words, "--noise_level", "12")
    # small pictures, what becomes of them and the truth; then base, middle and top, all as large as the largest
    assert sheet(alone, 16) == sheet(middle, 32) == (2, 3)
    logged = [json.loads(line) for line in (alone / "log.jsonl").read_text().splitlines()]
    assert "validation_psnr" in logged[-1] and "validation_loss" in logged[-1]
    stage = CascadedUpscalePipeline.from_pretrained(middle)
    assert (stage.config["low_res_size"], stage.config["default_noise_level"]) == (8, 12)
    assert stage.class_names == ["cat", "dog", "fox"] and stage.config["augmentation"] == "truncated"
    cascade = CascadedDiffusionPipeline.from_stages([str(base), str(middle), str(top)])
    cascade.set_progress_bar_config(disable=True)
    assert cascade("dog", num_inference_steps=2, output_type="pt").images.shape == (1, 3, 32, 32)


def test_neighbours_with_other_numbers_are_asked_by_name(base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    index = json.loads((other / "model_index.json").read_text())
    index["class_names"] = {"0": "fox", "1": "dog", "2": "cat"}
    (other / "model_index.json").write_text(json.dumps(index))
    args = upscaling(stages_before=[str(other)])
    pipe = build_pipeline(args, 16, Classes(3, ["cat", "dog", "fox"]))
    assert Neighbours(pipe, args).call([0, 2], None, 2)["class_labels"] == ["cat", "fox"]
    Neighbours(pipe, args).check([0, 2], None)
    del index["class_names"]
    (other / "model_index.json").write_text(json.dumps(index))
    assert Neighbours(pipe, args).call([0, 2], None, 2)["class_labels"] == [0, 2]


def test_stages_that_do_not_chain_are_refused_before_the_first_step(base, pictures, tmp_path):
    words = [*sides(pictures, 16, 32), "--stages_before", str(base)]
    with pytest.raises(ValueError, match="--stages_before.*The stages do not chain: upscale_1 takes images of 16x16"):
        train(UPSCALE, tmp_path / "run", *words)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="a cascade has at most 3 stages here"):
        train(UPSCALE, tmp_path / "run", "--stages_after", *["x"] * 3)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="`num_inference_steps`"):
        train(UPSCALE, tmp_path / "run", "--num_inference_steps", "200")
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_base_that_stops_early_and_the_stage_that_takes_its_noise(pictures, tmp_path):
    """One level for both: it is in their configs, and in no embedding."""
    steps = ["--num_inference_steps", "10"]
    below = train(BASE, tmp_path / "base", "--min_timestep", "40", *steps, *sides(pictures, None, 8))
    pipe = CascadedBasePipeline.from_pretrained(below)
    assert pipe.config["min_timestep"] == 40 and pipe.usual_stop_level == 40
    level = ["--truncation_level", "40", "--augmentation", "truncated"]
    words = [*steps, *sides(pictures, 8, 16), "--stages_before", str(below)]
    above = train(UPSCALE, tmp_path / "above", *level, *words)
    assert sheet(above, 16) == (2, 2)  # what the base leaves, and what becomes of it
    stage = CascadedUpscalePipeline.from_pretrained(above)
    assert stage.config["truncation_level"] == 40 and stage.unet.config["aug_cond_type"] is None
    assert stage.resolve_noise_level(None) == 40
    with pytest.raises(ValueError, match="was trained at level 40 alone"):
        stage.resolve_noise_level(0)


def test_lora_trains_matrices_alone_and_an_unconditional_stage_has_no_classes(base, pictures, tmp_path):
    data = sides(pictures, None, 8)
    words = [*data, "--pretrained_model_name_or_path", str(base), "--learning_rate", "0.1"]
    result = train(BASE, tmp_path / "lora", *words, "--rank", "2")
    assert (result / LORA_FILE).is_file()
    before, after = (CascadedUNet.from_pretrained(folder, subfolder="unet").state_dict() for folder in (base, result))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert before.keys() == after.keys() and changed and all(before[name].ndim == 2 for name in changed)
    free = train(BASE, tmp_path / "free", *data, "--condition", "unconditional", "--loss_type", "mse")
    pipe = CascadedBasePipeline.from_pretrained(free)
    assert pipe.num_classes is None and pipe.unet.config["out_channels"] == 3 and sheet(free, 8) == (2, 1)
