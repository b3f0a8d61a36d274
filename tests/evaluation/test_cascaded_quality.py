"""The judge of cascades, and the commands that use it, on tiny stages with random weights."""

import json
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from pipelines.tiny_cascaded import tiny_base, tiny_scheduler, tiny_upscale

from diffusers_ext import CascadedDiffusionPipeline
from diffusers_ext.data.scenes import CLASS_NAMES, label

NAMES = list(CLASS_NAMES)
SMALL = ["--num_cases", "4", "--num_inference_steps", "2", "--batch_size", "3"]
CLASSES = {"num_class_embeds": len(NAMES) + 1, "null_class": len(NAMES), "out_channels": 3}
NOISE = tiny_scheduler(variance_type="fixed_small")


@pytest.fixture(scope="module")
def command(repo_root):
    sys.path.insert(0, str(repo_root / "benchmarks"))
    yield lambda name: SimpleNamespace(**runpy.run_path(str(repo_root / "benchmarks" / f"{name}.py")))
    sys.path.remove(str(repo_root / "benchmarks"))


@pytest.fixture(scope="module")
def judge(command):
    import parts.cascade_judge

    return parts.cascade_judge


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> dict[str, str]:
    """Folders: stages of 16, 32 and 64 pixels, and variants of them."""
    root = tmp_path_factory.mktemp("stages")

    def base(side: int, **unet):
        return tiny_base(unet=CLASSES | {"sample_size": side} | unet, class_names=NAMES, scheduler=NOISE)

    def upscale(side: int, unet=(), **changes):
        options = {"class_names": NAMES, "scheduler": NOISE, "low_res_size": side // 2} | changes
        return tiny_upscale(1, unet=CLASSES | {"sample_size": side} | dict(unet), **options)

    untold = {"unet": {"aug_cond_type": None}, "default_noise_level": None}
    parts = {
        "base": base(16),
        "upscale_1": upscale(32),
        "upscale_2": upscale(64),
        "other_base": base(16, seed=7),
        "large_base": base(64),
        "fixed": upscale(64, truncation_level=301, **untold),
        "blur": upscale(64, augmentation="blur", **untold),
        "unconditional": upscale(64, unet={"num_class_embeds": None, "null_class": None}, class_names=None),
    }
    for name, pipe in parts.items():
        pipe.save_pretrained(root / name)
    CascadedDiffusionPipeline(**{name: parts[name] for name in ("base", "upscale_1", "upscale_2")}).save_pretrained(
        root / "whole"
    )
    return {name: str(root / name) for name in [*parts, "whole"]}


def chain(stages) -> list[str]:
    return [stages["base"], stages["upscale_1"], stages["upscale_2"]]


def test_true_images_are_read_right_and_compare_well(judge):
    scenes = judge.scenes_of_classes(48, ["plain"])
    assert [label(scene) for scene in scenes] == list(range(48))
    images = judge.pictures(scenes, 32)
    assert judge.read_classes(images) == list(range(48))
    found = judge.Judge("pixels", 48, ["plain"])
    right, wrong = found("right", images, range(48)), found("noise", torch.rand(48, 3, 32, 32), range(48))
    assert right.followed.value == 1.0 and wrong.followed.value < 0.2
    assert right.frechet["held_out"] < wrong.frechet["held_out"] and right.frechet["train"] < wrong.frechet["train"]
    assert right.manifold["held_out"].precision > 0.5 > wrong.manifold["held_out"].recall
    known = found("training", judge.pictures(judge.true_scenes(range(48), ["plain"], "train"), 32), range(48))
    assert known.frechet["train"] < 1e-6 and known.manifold["train"] == (1.0, 1.0)
    assert set(right.plain()) >= {"case", "followed", "frechet_held_out", "precision_train", "recall_train"}


def test_a_row_for_each_stage(command, stages, tmp_path, capsys):
    script, told = command("quality_cascaded"), {}
    for name, folders in (("whole", [stages["whole"]]), ("stages", chain(stages))):
        files = ["--json", str(tmp_path / f"{name}.json"), "--grid", str(tmp_path / "grid.png")]
        script.main([*folders, *SMALL, "--noise_level", "0", "201", *files])
        told[name] = json.loads((tmp_path / f"{name}.json").read_text())
    assert [row["case"] for row in told["whole"]] == ["base", "upscale_1", "upscale_2"]
    assert [row["side"] for row in told["whole"]] == [16, 32, 64]
    assert told["whole"] == told["stages"]
    assert capsys.readouterr().out.count("| upscale_2 | 64 |") == 2
    assert Image.open(tmp_path / "grid.png").width == 16 * 66 + 2


def test_bad_arguments(command, stages, tmp_path, capsys):
    script = command("quality_cascaded")
    for words, message in (
        ([str(tmp_path)], "is no pipeline folder"),
        ([stages["whole"], "--num_cases", "3"], "--num_cases must be at least 4, received 3"),
        ([stages["whole"], "--grounds", "plane"], "--grounds must name some of plain"),
    ):
        with pytest.raises(SystemExit):
            script.parse_args(words)
        assert message in capsys.readouterr().err


def run_claim(command, tmp_path, *words: str) -> list[dict]:
    file = tmp_path / "figures.json"
    command("claims_cascaded").main([*words, *SMALL, "--json", str(file)])
    return json.loads(file.read_text())


@pytest.mark.parametrize("claim", ["fidelity", "truncation", "unconditional"])
def test_sweeps_judge_every_level_in_both_forms(command, stages, tmp_path, capsys, claim):
    against = ["--against", stages["unconditional"]] if claim == "unconditional" else []
    rows = run_claim(command, tmp_path, claim, *chain(stages), *against, "--levels", "0", "301")
    forms = ("truncated", "non-truncated") if claim == "truncation" else ("generated", "true small images")
    assert [row["case"] for row in rows] == [
        *(f"{form}, s = {level}" for form in forms for level in (0, 301)),
        "true images",
    ]
    assert {row["side"] for row in rows} == {64} and {row["count"] for row in rows} == {4}
    assert all(0 <= row[name] <= 1 for row in rows for name in ("precision_held_out", "recall_train"))
    assert rows[-1]["followed"] == 1.0 and rows[-1]["frechet_held_out"] < rows[0]["frechet_held_out"]
    told = capsys.readouterr().out
    assert "judged at upscale_2" in told and told.count("\n| ") == 6


def test_variants_take_the_place_of_a_stage(command, stages, tmp_path):
    rows = run_claim(command, tmp_path, "augmentation", *chain(stages), "--against", stages["fixed"])
    assert [row["case"] for row in rows] == ["given, s = 301", "fixed, s = 301", "true images"]
    assert rows[0]["frechet_train"] != rows[1]["frechet_train"]
    words = ["blur", stages["whole"], "--against", stages["blur"], stages["upscale_2"], "--from_true"]
    rows = run_claim(command, tmp_path, *words)
    assert [row["case"] for row in rows] == ["given", "blur", "upscale_2", "true images"]
    assert {**rows[0], "case": ""} == {**rows[2], "case": ""}  # the same stage, the same generators
    words = ["ladder", *chain(stages), "--stage", "base", "--against", stages["other_base"]]
    rows = run_claim(command, tmp_path, *words)
    assert [row["side"] for row in rows] == [16, 16, 16] and rows[0]["frechet_train"] != rows[1]["frechet_train"]


def test_a_single_network_gets_the_steps_that_the_cascade_computes(command, stages, tmp_path, capsys):
    rows = run_claim(command, tmp_path, "single", *chain(stages), "--against", stages["large_base"])
    told = capsys.readouterr().out
    lines = told.split("\n\n")[1].splitlines()[2:]  # the first table, without its heading
    cells = [line.split(" | ") for line in lines]
    costs, steps = [float(cell[1]) for cell in cells], [int(cell[2]) for cell in cells]
    assert costs[0] < costs[1] < costs[2] and steps[:3] == [2, 2, 2]
    assert steps[3] == round(2 * sum(costs[:3]) / costs[3])
    assert [row["case"] for row in rows] == ["cascade, 2+2+2 steps", f"large_base, {steps[3]} steps", "true images"]


def test_the_classifier_of_samples_beside_that_of_true_images(command, stages, tmp_path, capsys):
    found = run_claim(command, tmp_path, "cas", *chain(stages), "--stage", "base", "--classifier_steps", "2")
    assert set(found) == {"samples", "true images"} and len(found["samples"]["by_class"]) == 48
    assert found["samples"]["count"] == 480 and found["samples"]["top_1"] <= found["samples"]["top_5"]
    told = capsys.readouterr().out
    assert "held-out true images of 16 pixels" in told and "| star | " in told


def test_claims_refuse_what_does_not_fit(command, stages, capsys):
    script = command("claims_cascaded")
    three = chain(stages)
    for words, message in (
        (["blur", *three], "--against is needed for blur"),
        (["cas", *three, "--against", stages["blur"]], "not with cas"),
        (["unconditional", *three, "--against", stages["blur"], stages["fixed"]], "one folder for unconditional"),
    ):
        with pytest.raises(SystemExit):
            script.parse_args(words)
        assert message in capsys.readouterr().err
    for words, message in (
        (["ladder", *three, "--stage", "upscale_3", "--against", stages["blur"]], "stages that were given are base"),
        (["fidelity", *three, "--stage", "base"], "takes no small image"),
        (["blur", *three, "--against", stages["base"]], "holds a CascadedBasePipeline"),
        (["augmentation", *three, "--against", stages["blur"]], "blur was not trained at one level"),
    ):
        with pytest.raises(SystemExit, match=message):
            script.main([*words, *SMALL])
