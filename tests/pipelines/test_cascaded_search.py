"""The sweep over levels of noise: what it reuses, and that it draws what the cascade draws."""

import pytest
import torch
from PIL import Image
from pipelines.tiny_cascaded import small_picture, tiny_base, tiny_cascade, tiny_scheduler, tiny_upscale

from diffusers_ext import CascadedDiffusionPipeline, cli
from diffusers_ext.data.scenes import CLASS_NAMES
from diffusers_ext.pipelines.cascaded.search import TruncationSearch, usual_levels

RUN = {"num_inference_steps": 3, "batch_size": 2}


def search(pipe, **options):
    return TruncationSearch(pipe, ["star", "circle", "square"], **RUN | options)


def watched(pipe):
    """How many images each stage's network saw."""
    seen = dict.fromkeys(pipe.stage_names, 0)

    def watch(name):
        def count(module, inputs):
            seen[name] += len(inputs[0])

        return count

    for name in seen:
        getattr(pipe, name).unet.register_forward_pre_hook(watch(name))
    return seen


def test_the_stages_before_run_once_for_all_levels():
    pipe, images = tiny_cascade(2), []
    seen, sweep = watched(pipe), search(pipe)
    points = sweep.run([0, 301, 601], lambda found: images.append(found) or float(found.mean()))
    assert [(point.conditioning_mode, point.noise_level) for point in points] == [
        (mode, level) for mode in ("truncated", "non_truncated") for level in (0, 301, 601)
    ]
    # three steps for z_0; two more for the pass that goes through both levels
    assert seen == {"base": 3 * (3 + 5), "upscale_1": 3 * 3 * 6}
    assert all(found.shape == (3, 3, 16, 16) and 0 <= float(found.min()) for found in images)
    assert [point.value for point in points] == [float(found.mean()) for found in images]
    assert not any(torch.equal(images[3], found) for found in images[4:])
    sweep.run([101], lambda found: 0.0, conditioning_modes=["non_truncated"])
    assert seen["base"] == 3 * (3 + 5)  # z_0 is kept


def test_clean_images_are_those_of_the_cascade_and_true_ones_need_no_first_stage():
    pipe = tiny_cascade(2)
    seen, sweep = watched(pipe), search(pipe)
    given = [small_picture(8, seed) for seed in range(3)]
    points = sweep.run([0, 501], lambda found: float(found.mean()), conditioning_modes=["non_truncated"], image=given)
    assert len(points) == 2 and seen["base"] == 0
    generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
    wanted = pipe(
        ["star", "circle"], num_inference_steps=3, generator=generator, stop_stage="base", output_type="latent"
    )
    assert torch.equal(sweep._finished()[0], wanted.images.clamp(-1, 1))


def test_later_stages_and_stages_without_classes():
    pipe = tiny_cascade(3)
    points = search(pipe, stage="upscale_2", num_inference_steps=[2, 3, 2]).run(
        [0, 401], lambda found: found.shape[-1]
    )
    assert [point.value for point in points] == [32] * 4
    plain = TruncationSearch(tiny_cascade(2, classes=False), count=3, **RUN)
    assert len(plain.run([101], lambda found: len(found))) == 2


def test_bad_input():
    pipe = tiny_cascade(2)
    for options, match in [
        ({"stage": "base"}, "`stage` is 'base'; allowed are 'upscale_1'"),
        ({"stage": "upscale_2"}, "`stage` is 'upscale_2'; allowed are 'upscale_1'."),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=match):
            search(pipe, **options)
    for levels, options, match in [
        ([], {}, "`levels` is empty"),
        ([1001], {}, "`noise_level` is 1001"),
        ([1], {"conditioning_modes": ["none"]}, "`conditioning_modes` is 'none'"),
        ([1], {"image": [small_picture()] * 3}, "`image` holds finished images"),
        ([1], {"image": [small_picture()], "conditioning_modes": ["non_truncated"]}, "1 images for 3 to draw"),
    ]:
        with pytest.raises(ValueError, match=match):
            search(pipe).run(levels, lambda found: 0.0, **options)


def test_a_search_that_names_no_levels_tries_some_that_are_reached(capsys):
    for steps in (100, 1000, 4000):
        stage = tiny_upscale(1, conditioning_scheduler=tiny_scheduler(num_train_timesteps=steps))
        levels = usual_levels(stage)
        assert levels == [0, steps // 10 + 1, steps // 4 + 1, steps // 2 + 1, steps * 3 // 4 + 1]
        stage.corrupter.set_timesteps(25, stop_level=levels)
    assert cli.main(["search-truncation", "checkpoints/cascaded-scenes-64", "--num", "0"]) == 2
    assert "--num is 0: draw at least 1 image a level" in capsys.readouterr().err


@pytest.mark.parametrize("metric", ["frechet", "scenes"])
def test_one_command_draws_the_curve(metric, tmp_path, capsys):
    names = list(CLASS_NAMES[:3])
    parts = {"base": tiny_base(class_names=names), "upscale_1": tiny_upscale(1, class_names=names)}
    stage = {"unet": {"sample_size": 32}, "low_res_size": 8}  # the smallest size that scenes are drawn at
    parts["upscale_1"] = tiny_upscale(1, class_names=names, **stage)
    CascadedDiffusionPipeline(**parts).save_pretrained(tmp_path / "saved")
    real = tmp_path / "real"
    for seed, name in enumerate([*names, names[1]]):
        (real / name).mkdir(parents=True, exist_ok=True)
        small_picture(40, seed).save(real / name / f"{seed}.png")
    source = ["--real", str(real)] if metric == "frechet" else []
    words = ["search-truncation", str(tmp_path / "saved"), "--levels", "0", "201", "--num", "3", "--steps", "2"]
    assert cli.main([*words, *source, "--metric", metric, "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert told.count("| truncated |") == told.count("| non_truncated |") == 2
    assert (tmp_path / "out" / "table.md").read_text() in told
    assert Image.open(tmp_path / "out" / "curve.png").width > 400
    assert cli.main([*words, *source, "--metric", metric, "--from_real", "--out", str(tmp_path / "true")]) == 0
    assert "| truncated |" not in capsys.readouterr().out
    flat = [*words, "--from_real", "--out", str(tmp_path / "flat"), "--real", str(real / names[1])]
    assert cli.main(flat) == 0  # its own name says the class of all
    (real / names[1]).rename(real / "others")
    flat[-1] = str(real / "others")
    assert cli.main(flat) == 2
    assert "nothing says of which class each image" in capsys.readouterr().err
    assert cli.main([*flat, "--class_labels", "1"]) == 0
    assert cli.main([*words, "--real", str(tmp_path / "out" / "none")]) == 2
    assert "holds no images" in capsys.readouterr().err


def test_real_images_are_of_the_classes_that_are_drawn(tmp_path):
    images, kinds = cli.real_images("scenes", 4, 32, ["red circle", "blue star"])
    assert images.shape == (4, 3, 32, 32) and set(kinds) <= {"red circle", "blue star"}
    for name in ("7", "8", "cat"):
        (tmp_path / name).mkdir()
        for seed in range(4):
            small_picture(8, seed).save(tmp_path / name / f"{seed}.png")
    assert cli.real_images(str(tmp_path), 4, 8, [7, 8])[1] == [7, 7, 8, 8]  # evenly spread
    assert cli.real_images(str(tmp_path), 99, 8, ["cat", "dog"])[1] == ["cat"] * 4
    assert cli.real_images(str(tmp_path), 3, 8, [])[1] == [7, 8, "cat"]  # nothing to be left out
