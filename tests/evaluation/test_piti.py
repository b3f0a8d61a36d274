"""benchmarks/*_piti.py: the figures on true pictures, the commands on tiny pipelines with random weights."""

import json
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines.tiny_glide import tiny_decoder, tiny_glide, tiny_piti

from diffusers_ext import NormalizedCFGScheduler, PITIPipeline
from diffusers_ext.data.scenes import SHAPES
from diffusers_ext.training.piti.args import PITIArgs
from diffusers_ext.training.piti.data import ConditionReader, load_rows
from diffusers_ext.training_utils.args import DataArgs

KINDS = ("label_map", "sketch", "geometry")
SMALL = ["--num_cases", "3", "--batch_size", "2", "--num_inference_steps", "2"]


@pytest.fixture(scope="module")
def load(repo_root):
    """A command of benchmarks/ by name."""
    sys.path.insert(0, str(repo_root / "benchmarks"))
    try:
        yield lambda name: SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / f"{name}.py")))
    finally:
        sys.path.remove(str(repo_root / "benchmarks"))


@pytest.fixture(scope="module")
def parts(load) -> SimpleNamespace:
    load("quality_piti")
    return SimpleNamespace(**vars(sys.modules["parts.piti_scenes"]))


def scenes_pipeline(kind: str, upscale: bool = True) -> PITIPipeline:
    """A tiny pipeline that knows the labels of `scenes`, 16 pixels and 32 (the least that `scenes` draws is 16)."""
    parts = tiny_piti(kind, upscale=upscale).components
    parts |= {"unet": tiny_decoder(3, 16)} | ({"upscale_unet": tiny_decoder(6, 32, 11)} if upscale else {})
    labels = {}
    if kind == "label_map":
        palette = [[40 * label, 255 - 40 * label, 128] for label in range(len(SHAPES) + 1)]
        labels = {"label_palette": palette, "label_names": ["ground", *SHAPES]}
    return PITIPipeline(**parts, condition_type=kind, **labels)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("piti")
    for kind in KINDS:
        scenes_pipeline(kind).save_pretrained(root / kind)
    scenes_pipeline("sketch", upscale=False).save_pretrained(root / "small")
    return {path.name: str(path) for path in root.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_true_pictures_follow_and_others_do_not(parts, kind):
    scenes = parts.held_out_scenes("plain+one", 48)
    for side, least in ((64, 0.9), (32, 0.8)):
        pictures = parts.true_pictures(scenes, side)
        right = {name: parts.as_number(one) for name, one in parts.fidelity(kind, pictures, scenes).items()}
        wrong = {name: parts.as_number(one) for name, one in parts.shuffled_fidelity(kind, pictures, scenes).items()}
        assert list(right) == list(wrong) and parts.FIDELITY[kind] in right
        assert min(right.values()) >= least and right["all shapes right"] >= 0.95
        assert wrong.pop("objects of named shapes") == right["objects of named shapes"]
        assert max(wrong.values()) < 0.5
    noise = {
        name: parts.as_number(one) for name, one in parts.fidelity(kind, torch.rand(4, 3, 64, 64), scenes[:4]).items()
    }
    assert max(noise.values()) == 0


def test_two_objects_are_judged_each_in_its_place(parts):
    scenes = parts.held_out_scenes("plain+two", 24)
    pictures = parts.true_pictures(scenes, 64)
    figures = parts.fidelity("sketch", pictures, scenes)
    assert figures["recall, large objects"].count + figures["recall, small objects"].count == 48
    assert min(parts.as_number(one) for one in figures.values()) > 0.9
    beside = [k for k, scene in enumerate(scenes) if scene.objects[0].place == "left"]
    mirrored = parts.fidelity("sketch", pictures[beside].flip(-1), [scenes[k] for k in beside])
    assert mirrored["all shapes right"].value > 0.9
    assert max(mirrored["recall, large objects"].value, mirrored["recall, small objects"].value) < 0.3


def test_conditions_are_what_the_pipeline_takes(parts):
    """Lines without grey rims, metres, unit normals; each scene gives another condition."""
    scenes = parts.held_out_scenes("plain+one", 4)
    for kind in KINDS:
        given = [parts.condition_of(kind, scene, 128) for scene in scenes]
        read = scenes_pipeline(kind).read_conditions(
            **{key: np.stack([one[key] for one in given]) for key in given[0]}
        )
        assert read.shape[0] == 4 and read.min() >= -1 and read.max() <= 1
        assert all(not torch.equal(read[0], one) for one in read[1:])
    lines = parts.condition_of("sketch", scenes[0], 128)["sketch"]
    assert 40 < (lines == 255).sum() < 128 * 128 / 16  # an outline, neither nothing nor an area


@pytest.mark.parametrize("kind", KINDS)
def test_conditions_are_those_of_the_training(parts, kind):
    args = PITIArgs(stage="joint", condition=kind, encoder_sample_size=128, downsampling="area")
    data = DataArgs("scenes", "plain+one", max_train_samples=2, resolution=32, center_crop=True)
    _, rows, columns = load_rows(args, data)
    pipe = scenes_pipeline(kind, upscale=False)
    pipe.encoder.register_to_config(sample_size=128)  # as large as the maps: nothing is resized
    reader = ConditionReader(args, data, columns, 128, pipe.label_palette if kind == "label_map" else None)
    for index, scene in enumerate(parts.held_out_scenes("plain+one", 2, split="validation")):
        learnt = reader(rows[index], torch.Generator())["condition"]
        torch.testing.assert_close(pipe.read_conditions(**parts.condition_of(kind, scene, 128))[0], learnt)


def test_quality_of_every_condition(load, folders, tmp_path, capsys):
    figures, grid = tmp_path / "figures.json", tmp_path / "grid.png"
    script = load("quality_piti")
    script.main([*(folders[kind] for kind in KINDS), *SMALL, "--upscale_num_inference_steps", "2",
                 "--guidance_scale", "2", "--grid", str(grid), "--json", str(figures)])  # fmt: skip
    rows, told = json.loads(figures.read_text()), capsys.readouterr().out
    assert [row["condition"] for row in rows] == list(KINDS) and {row["side"] for row in rows} == {32}
    for row in rows:
        assert row["figures"].keys() == row["shuffled"].keys() == row["true"].keys()
        assert all(f"| {row['checkpoint']} | {row['condition']} | 32 | {name} |" in told for name in row["figures"])
        assert row["figures"]["all shapes right"]["count"] == 3
    assert Image.open(grid).size == (3 * 34 + 2, 6 * 34 + 2)


def test_a_stage_alone_and_batches_change_nothing(load, folders, tmp_path):
    script, found = load("quality_piti"), []
    for batch in ("1", "3"):
        path = tmp_path / f"{batch}.json"
        script.main([folders["sketch"], *SMALL, "--stage", "base", "--batch_size", batch, "--json", str(path)])
        found.append(json.loads(path.read_text()))
    assert found[0] == found[1] and found[0][0]["side"] == 16


def test_what_cannot_be_measured_is_refused(load, folders, tmp_path, capsys):
    script = load("quality_piti")
    tiny_glide(upscale=False).save_pretrained(tmp_path / "glide")
    for words, message in (
        (["elsewhere"], "'elsewhere' is no pipeline folder"),
        ([str(tmp_path / "glide")], "holds a GlidePipeline: this command measures a PITIPipeline"),
        ([folders["sketch"], "--num_cases", "1"], "--num_cases must be at least 2, received 1"),
        ([folders["sketch"], "--scenes", "forest"], "--scenes: `grounds` must name some of"),
    ):
        with pytest.raises(SystemExit):
            script.main(words)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="has no upsampler: leave out --stage upscale"):
        script.main([folders["small"], *SMALL, "--stage", "upscale"])


# --- claims_piti.py


@pytest.fixture(scope="module")
def claims(load) -> SimpleNamespace:
    return load("claims_piti")


def test_every_scale_and_rule_is_a_row(claims, folders, tmp_path, capsys):
    plot, figures = tmp_path / "figure.png", tmp_path / "figures.json"
    claims.main(["guidance", "--checkpoint", folders["label_map"], *SMALL, "--stage", "base",
                 "--guidance_scales", "1", "3", "--plot", str(plot), "--json", str(figures)])  # fmt: skip
    rows, told = json.loads(figures.read_text())["rows"], capsys.readouterr().out
    assert [(row["scale"], row["rule"]) for row in rows] == [(1, "none"), (3, "plain"), (3, "normalised")]
    none, plain, normalised = rows
    assert none["drift"] == {"mean": 0, "std": 0} and "std_ratio" not in none["trajectory"][0]
    assert [step["timestep"] for step in plain["trajectory"]] == [step["timestep"] for step in none["trajectory"]]
    first = [row["trajectory"][0] for row in (plain, normalised)]  # from the same noise
    assert first[0] == first[1] and first[0]["std_ratio"] > 1 and first[0]["std_ratio_predicted"] > 3
    assert abs(plain["drift"]["std"]) > abs(normalised["drift"]["std"])
    assert "| 3 | 2 | plain |" in told and "| 3 | 2 | normalised |" in told and Image.open(plot).size[0] > 900


def test_what_the_recorder_says_of_guidance(claims):
    """On predictions where everything can be written down: independent branches, another mean each."""
    shift_of = sys.modules["parts.piti_guidance"].shift_of
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (torch.randn(2, 3, 64, 64, generator=generator) * std + mean for std, mean in ((1, 0.5), (2, 0.25)))
    found = shift_of(cond, uncond, 3.0)
    torch.testing.assert_close(found["std_ratio_predicted"], torch.full((2,), 5.0), atol=0.1, rtol=0)  # 3^2 + 2^2 2^2
    torch.testing.assert_close(found["std_ratio"], found["std_ratio_predicted"], atol=0.1, rtol=0)
    torch.testing.assert_close(found["mean_shift"], torch.full((2,), 0.5), atol=0.1, rtol=0)
    same = shift_of(cond, cond + 1, 3.0)
    torch.testing.assert_close(same["std_ratio"], torch.ones(2))  # the formula's 3.6 does not hold here
    torch.testing.assert_close(same["mean_shift"], torch.full((2,), -2.0))


def test_recorded_guidance_draws_what_the_pipeline_draws(claims, load, folders):
    from parts.piti_guidance import RecordedGuidance

    pipe = PITIPipeline.from_pretrained(
        folders["sketch"], upscale_encoder=None, upscale_unet=None, upscale_scheduler=None
    )
    pipe.set_progress_bar_config(disable=True)
    lines = np.zeros((32, 32), np.uint8)
    lines[8, 4:20] = 255
    call = {"sketch": lines, "guidance_scale": 3.0, "num_inference_steps": 2, "output_type": "pt"}
    plain = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    pipe.scheduler = RecordedGuidance(pipe.scheduler, guidance_rescale=0.0)
    assert torch.equal(pipe(**call, generator=torch.Generator().manual_seed(0)).images, plain)
    assert len(pipe.scheduler.trajectory()) == 2


def test_models_beside_each_other(claims, folders, tmp_path, capsys, repo_root):
    figures = tmp_path / "figures.json"
    models = [f"encoder-only={folders['sketch']}", f"joint={folders['geometry']}"]
    clip = str(repo_root / "checkpoints" / "paella-scenes-64")
    claims.main(["stages", "--models", *models, *SMALL, "--stage", "base", "--feature_network", clip,
                 "--json", str(figures)])  # fmt: skip
    rows = json.loads(figures.read_text())["rows"]
    assert [(row["name"], row["condition"]) for row in rows] == [("encoder-only", "sketch"), ("joint", "geometry")]
    assert all(row["frechet"] > row["frechet_true"] > 0 for row in rows)
    assert "| joint | geometry |" in capsys.readouterr().out


def test_few_pairs_are_sorted_and_drawn(claims, folders, tmp_path, capsys):
    plot, figures, folder = tmp_path / "figure.png", tmp_path / "figures.json", folders["small"]
    models = ["--staged", f"all={folder}", f"200={folder}", "--scratch", f"50={folder}", f"200={folder}"]
    claims.main(["few", *models, *SMALL, "--plot", str(plot), "--json", str(figures)])
    rows = json.loads(figures.read_text())["rows"]
    found = [(row["pairs"], row["start"]) for row in rows]
    assert found == [("50", "scratch"), ("200", "staged"), ("200", "scratch"), ("all", "staged")]
    assert "| 200 | from nothing | sketch | all shapes right |" in capsys.readouterr().out
    assert Image.open(plot).size[0] > 300


def test_probe_of_place(claims, folders, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    words = ["probe", "--models", f"one={folders['sketch']}", "--num_cases", "8", "--num_train", "40"]
    claims.main([*words, "--json", str(figures)])
    rows = json.loads(figures.read_text())["rows"]
    assert [row["read from"] for row in rows] == ["the vector", "the tokens' mean", "all tokens"]
    assert [row["width"] for row in rows] == [16, 16, 64] and all(0 < row["error"] < 1 for row in rows)
    assert "| one | sketch | all tokens | 64 |" in capsys.readouterr().out


def test_ridge_regression_finds_a_plane_and_not_noise(claims):
    generator = torch.Generator().manual_seed(0)
    seen, unseen = (torch.randn(count, 6, generator=generator).double() for count in (200, 50))
    plane = torch.randn(6, 2, generator=generator).double()
    error, explained = claims.probe(seen, seen @ plane + 0.5, unseen, unseen @ plane + 0.5)
    assert error < 0.01 and explained > 0.999
    noise = torch.randn(200, 2, generator=generator).double(), torch.randn(50, 2, generator=generator).double()
    assert claims.probe(seen, noise[0], unseen, noise[1])[1] < 0.2


def test_more_numbers_than_samples_are_solved_in_the_samples(claims):
    generator = torch.Generator().manual_seed(0)
    seen, unseen, target = (torch.randn(*size, generator=generator).double() for size in ((5, 9), (3, 9), (5, 2)))
    mean, std = seen.mean(0), seen.std(0)
    inputs, others = (seen - mean) / std, (unseen - mean) / std
    system = inputs.T @ inputs + 0.1 * 5 * torch.eye(9)
    expected = others @ torch.linalg.solve(system, inputs.T @ (target - target.mean(0))) + target.mean(0)
    torch.testing.assert_close(claims._ridge(seen, target, unseen, [7.0, 0.1])[1], expected)


def test_bad_words_for_claims(claims, folders, capsys):
    folder = folders["sketch"]
    for words, message in (
        (["stages", "--models", folder], "is no name=folder"),
        (["few", "--staged", f"some={folder}"], "begins with no number of pairs"),
        (["few"], "few needs --staged or --scratch"),
        (["probe", "--models", f"a={folder}", "--num_train", "4"], "--num_train must be at least 8, received 4"),
        (["guidance", "--checkpoint", "elsewhere"], "'elsewhere' is no pipeline folder"),
    ):
        with pytest.raises(SystemExit):
            claims.parse_args(words)
        assert message in capsys.readouterr().err


# --- speed_piti.py


@pytest.fixture(scope="module")
def speed(load) -> SimpleNamespace:
    return load("speed_piti")


def test_the_released_form_and_ours_draw_the_same(speed, tmp_path, capsys):
    speed.main(["--smoke", "--threads", "1", "--json", str(tmp_path / "figures.json")])
    tables = json.loads((tmp_path / "figures.json").read_text())
    (row,) = tables["released form and ours"]
    assert float(row["difference"]) < 1e-5 and row["ratio"] > 0 and "eager and compiled" not in tables
    assert "| ours / released form |" in capsys.readouterr().out


def test_the_released_form_runs_its_encoder_in_every_step(speed):
    pipe, calls = speed.build(speed.parse_args(["--smoke"])), []
    pipe.encoder.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    condition, start = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 16, 16)
    speed.plain.sample(
        pipe.unet, pipe.encoder, condition, start, steps=3, scale=2.0, draw=lambda: torch.zeros_like(start)
    )
    assert calls == [2, 2, 2]  # condition and null condition


def test_released_sizes_on_a_gpu(speed):
    args = speed.parse_args(["--device", "cuda"])
    assert (args.width, args.condition_size, args.layers) == (192, 256, 3)
    assert speed.parse_args([]).width == 96


def test_samplers_beside_each_other(speed, folders, tmp_path, capsys):
    """The adapter that guides stays around the other solver."""
    pipe = PITIPipeline.from_pretrained(folders["small"])
    pipe.scheduler = NormalizedCFGScheduler(pipe.scheduler)
    pipe.save_pretrained(tmp_path / "guided")
    seen = []
    for folder in (folders["small"], str(tmp_path / "guided")):
        speed.main(["--checkpoint", folder, "--num_cases", "2", "--solver_steps", "3", "--ancestral_steps", "4",
                    "--json", str(tmp_path / "figures.json")])  # fmt: skip
        seen.append(json.loads((tmp_path / "figures.json").read_text())["samplers"])
        assert [(row["sampler"], row["steps"]) for row in seen[-1]] == [
            ("checkpoint's own, ancestral", 4), ("DPM-Solver++", 3), ("DPM-Solver++ with noise", 3)
        ]  # fmt: skip
        assert all(row["seconds"] > 0 and row["figures"]["all shapes right"]["count"] == 2 for row in seen[-1])
    assert "| DPM-Solver++ | 3 |" in capsys.readouterr().out


def test_bad_sizes_are_refused(speed, capsys):
    for words, message in (
        (["--width", "48"], "--width must be a positive multiple of 32, received 48"),
        (["--rounds", "0"], "--rounds must be a positive multiple of 1, received 0"),
        (["--checkpoint", "elsewhere"], "'elsewhere' is no pipeline folder"),
    ):
        with pytest.raises(SystemExit):
            speed.parse_args(words)
        assert message in capsys.readouterr().err
