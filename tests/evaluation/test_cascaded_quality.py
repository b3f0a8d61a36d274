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
