"""The built-in data set: determinism, geometry, captions and their inverse, annotations, data set, folder."""

import json
import pickle
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffusers_ext.conditions.palettes import SCENES_CLASSES, SCENES_PALETTE, colorize_labels, labels_from_colors
from diffusers_ext.data.scenes import (
    CLASS_NAMES,
    COLORS,
    COLUMNS,
    GROUNDS,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
    Ground,
    Scene,
    SceneObject,
    WantedObject,
    balanced_prompts,
    boxes,
    captions,
    choose_caption,
    depth_and_normals,
    full_caption,
    hard_negatives,
    inside_distance,
    label,
    load_scenes,
    negative_caption,
    parse_caption,
    render,
    sample_scene,
    semantic_map,
    sketch,
    write_scenes,
)

GREY = Ground("plain", (128, 128, 128), (128, 128, 128), 0.5, 0.0)


def wanted_of(scene):
    return tuple(WantedObject(item.shape, item.color, item.size, item.place) for item in scene.objects)


def one(shape="circle", color="red", size="large", place="center", center=(0.5, 0.5), diameter=0.5):
    return SceneObject(shape, color, size, place, center, diameter, COLORS[color])


# ------------------------------------------------------------------------------------------------ drawing at random


def test_scene_is_a_function_of_seed_split_and_index():
    assert sample_scene(3, 17) == sample_scene(3, 17)
    different = {sample_scene(3, 17), sample_scene(4, 17), sample_scene(3, 18), sample_scene(3, 17, split="test")}
    assert len(different) == 4


def test_pictures_are_those_that_the_checkpoints_were_trained_on():
    """Regression slice of our own output: a change here changes the data set under the shipped checkpoints."""
    scenes = [sample_scene(0, index) for index in range(4)]
    assert [full_caption(scene) for scene in scenes] == [
        "a small red square on the left",
        "a large orange cross in the center",
        "a small purple square above a large yellow star",
        "a large green circle above a large purple ring",
    ]
    # the middle of each object is well inside every platform's rounding
    for scene in scenes:
        picture = render(scene, 64)
        for item in scene.objects:
            if item.shape != "ring":
                x, y = (int(part * 64) for part in item.center)
                assert np.abs(picture[y, x].astype(int) - item.rgb).max() <= 1


@pytest.mark.parametrize("seed", [0, 1, 999])
def test_splits_share_no_scene_for_any_seed(seed):
    """By construction: the last bits of the first object's x belong to the split."""
    residues = {split: set() for split in SPLITS}
    for split in SPLITS:
        for index in range(200):
            residues[split].add(int(sample_scene(seed, index, split=split).objects[0].center[0] * 2**20) % 16)
    assert residues["validation"] == {14} and residues["test"] == {15} and residues["train"] == set(range(14))


def test_objects_lie_inside_the_picture_and_apart():
    for index in range(600):
        scene = sample_scene(1, index, num_objects=1 + index % 3)
        for _, (x0, y0, x1, y1) in boxes(scene):
            assert x0 > 0 and y0 > 0 and x1 < 1 and y1 < 1
        for position, first in enumerate(scene.objects):
            for second in scene.objects[position + 1 :]:
                gaps = (second.box[0] - first.box[2], first.box[0] - second.box[2])
                gaps += (second.box[1] - first.box[3], first.box[1] - second.box[3])
                assert max(gaps) > (0.07 if len(scene.objects) == 2 else 0.03)


def test_words_are_drawn_evenly():
    scenes = [sample_scene(2, index) for index in range(3000)]
    objects = [item for scene in scenes for item in scene.objects]
    for words, counted in (
        (SHAPES, Counter(item.shape for item in objects)),
        (COLORS, Counter(item.color for item in objects)),
        (SIZES, Counter(item.size for item in objects)),
        (GROUNDS, Counter(scene.ground.kind for scene in scenes)),
        (PLACES, Counter(scene.objects[0].place for scene in scenes if len(scene.objects) == 1)),
    ):
        total = sum(counted.values())
        assert set(counted) == set(words)
        assert all(abs(count / total - 1 / len(words)) < 0.035 for count in counted.values())
    assert abs(sum(len(scene.objects) == 2 for scene in scenes) / 3000 - 0.55) < 0.03


def test_two_objects_never_have_the_same_name():
    for index in range(500):
        names = [item.name for item in sample_scene(0, index, num_objects=3).objects]
        assert len(set(names)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_objects": 4}, "`num_objects` must be 1, 2, 3 or None, but is 4"),
        ({"mixture": (1, 0)}, "`mixture` must be three weights"),
        ({"mixture": (0, 0, 0)}, "`mixture` must be three weights"),
        ({"grounds": ("plain", "marble")}, "`grounds` must name some of plain, gradient, striped, checkered"),
        ({"split": "dev"}, "`split` must be one of train, validation, test, but is 'dev'"),
        ({"index": -1}, "`seed` and `index` must not be negative"),
    ],
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_scene(**{"seed": 0, "index": 0, **arguments})


def test_mixture_weights_are_kept():
    assert all(len(sample_scene(0, index, mixture=(0, 0, 1)).objects) == 3 for index in range(20))
    assert all(len(sample_scene(0, index, mixture=(1, 0, 0)).objects) == 1 for index in range(20))


# ------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("diameter", [0.7, 0.3])
def test_area_and_box_agree_with_the_analytic_shape(shape, diameter):
    """Anti-aliased coverage sums to the area that closed formulas give, whatever the resolution."""
    radius = 0.5 * diameter
    tip = 1.08 * radius
    areas = {
        "circle": np.pi * radius**2,
        "square": (2 * 0.88 * radius) ** 2,
        "triangle": 0.5 * (2 * 1.05 * radius) * (2 * 0.92 * radius),
        "ring": np.pi * (1.04 * radius) ** 2 * (1 - 0.52**2),
        "cross": 2 * (2 * radius) * (2 * 0.34 * radius) - (2 * 0.34 * radius) ** 2,
        "star": 5 * tip * (0.48 * tip) * np.sin(np.pi / 5),
    }
    scene = Scene((one(shape, diameter=diameter),), GREY)
    for resolution in (64, 256):
        picture = render(scene, resolution).astype(float)
        coverage = (picture[..., 0] - 128) / (COLORS["red"][0] - 128)
        assert coverage.mean() == pytest.approx(areas[shape], rel=0.03)
        rows, columns = np.nonzero(coverage > 0.5)
        x0, y0, x1, y1 = (part * resolution for part in scene.objects[0].box)
        # thin tips of triangle and star cover less than half a pixel
        slack = 4 if shape in ("star", "triangle") else 1
        assert abs(columns.min() - x0) <= slack and abs(columns.max() + 1 - x1) <= slack
        assert abs(rows.min() - y0) <= slack and abs(rows.max() + 1 - y1) <= slack


def test_the_same_scene_at_other_resolutions():
    """Block means of the 256 pixel picture are the 64 pixel picture, up to the edges' anti-aliasing."""
    for index in range(20):
        scene = sample_scene(5, index)
        small = render(scene, 64).astype(float)
        large = render(scene, 256).reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        assert np.abs(small - large).mean() < 1.5


def test_picture_format_and_resolution_errors():
    picture = render(sample_scene(0, 0), 48)
    assert picture.shape == (48, 48, 3) and picture.dtype == np.uint8
    with pytest.raises(ValueError, match="`resolution` must be at least 16 pixels, but is 8"):
        render(sample_scene(0, 0), 8)
    with pytest.raises(TypeError, match="`resolution` must be an integer, but is 64.0"):
        render(sample_scene(0, 0), 64.0)
    with pytest.raises(ValueError, match="`shape` must be one of circle, square"):
        inside_distance("hexagon", np.zeros(1), np.zeros(1), 1.0)


def test_grounds_are_muted_and_colours_are_not():
    for index in range(200):
        scene = sample_scene(6, index)
        pixels = render(scene, 64).astype(int)
        chroma = pixels.max(axis=-1) - pixels.min(axis=-1)
        assert chroma[semantic_map(scene, 64) == 0].min() < 30
        assert all(max(item.rgb) - min(item.rgb) > 110 for item in scene.objects)
        for rgb in (scene.ground.rgb, scene.ground.second_rgb):
            assert max(rgb) - min(rgb) < 30


def test_colours_are_far_apart():
    table = np.array(list(COLORS.values()), dtype=float)
    distance = np.linalg.norm(table[:, None] - table[None], axis=-1) + 1e9 * np.eye(len(table))
    assert distance.min() > 100


@pytest.mark.parametrize("kind", GROUNDS)
def test_each_ground_shows_its_pattern(kind):
    scene = sample_scene(0, 3, grounds=(kind,))
    background = render(replace(scene, objects=()), 64).astype(int)
    tones = np.unique(background.reshape(-1, 3), axis=0)
    assert len(tones) == 1 if kind == "plain" else len(tones) >= 2
    if kind in ("striped", "checkered"):  # most pixels have one of the two tones
        near = [
            np.abs(background - np.array(rgb)).max(axis=-1) <= 1 for rgb in (scene.ground.rgb, scene.ground.second_rgb)
        ]
        assert near[0].mean() > 0.3 and near[1].mean() > 0.3


def test_rendering_is_fast():
    scenes = [sample_scene(0, index) for index in range(300)]
    render(scenes[0])
    start = time.process_time()
    for scene in scenes:
        render(scene)
    # 0.15 ms measured on one quiet core; the bound leaves room for slow and busy machines
    assert (time.process_time() - start) / len(scenes) < 2e-3


# ------------------------------------------------------------------------------------------------ captions


def test_every_caption_is_read_back():
    for index in range(300):
        scene = sample_scene(8, index, num_objects=1 + index % 3)
        truth = wanted_of(scene)
        texts = captions(scene)
        assert len(set(texts)) == len(texts) >= 8
        assert parse_caption(texts[0]) == truth
        for text in texts:
            read = parse_caption(text)
            assert len(read) == len(truth)
            if all(item.place for item in read):
                pairs = zip(read, truth, strict=True)
            else:  # without places the order is free
                pairs = zip(sorted(read, key=str), sorted(truth, key=lambda item: item.name), strict=True)
                pairs = [(item, next(true for true in truth if true.name == item.name)) for item, _ in pairs]
            for item, true in pairs:
                assert item.name == true.name
                assert item.size in (None, true.size) and item.place in (None, true.place)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a large red circle in the center", [("circle", "red", "large", "center")]),
        ("A picture of a small blue star on the left.", [("star", "blue", "small", "left")]),
        ("an orange ring at the top", [("ring", "orange", None, "top")]),
        ("large pink cross", [("cross", "pink", "large", None)]),
        (
            "a large red circle to the right of a small green square",
            [("square", "green", "small", "left"), ("circle", "red", "large", "right")],
        ),
        (
            "there is a blue cross below a pink triangle",
            [("triangle", "pink", None, "top"), ("cross", "blue", None, "bottom")],
        ),
        ("a red ring and a cyan star", [("ring", "red", None, None), ("star", "cyan", None, None)]),
        (
            "a red ring at the top, a cyan star at the bottom left and a small blue cross at the bottom right",
            [
                ("ring", "red", None, "top"),
                ("star", "cyan", None, "bottom left"),
                ("cross", "blue", "small", "bottom right"),
            ],
        ),
    ],
)
def test_captions_by_hand(text, wanted):
    assert parse_caption(text) == tuple(WantedObject(*words) for words in wanted)


@pytest.mark.parametrize(
    "text",
    ["", "a cat", "a large red circle somewhere", "a red circle a blue square", "a huge red circle", "a red hexagon"],
)
def test_other_texts_are_refused_by_name(text):
    with pytest.raises(ValueError, match="does not understand") as error:
        parse_caption(text)
    assert repr(text) in str(error.value) and "templates:" in str(error.value)


def test_full_captions_are_the_most_frequent():
    kinds = Counter()
    for index in range(2000):
        scene = sample_scene(0, index)
        text, read = choose_caption(scene), parse_caption(choose_caption(scene))
        complete = all(item.size and item.place for item in read)
        kinds["full" if text == full_caption(scene) else "paraphrase" if complete else "partial"] += 1
        assert text in captions(scene) and full_caption(scene) in captions(scene)
    assert abs(kinds["full"] / 2000 - 0.6) < 0.05
    assert abs(kinds["paraphrase"] / 2000 - 0.2) < 0.05
    assert abs(kinds["partial"] / 2000 - 0.2) < 0.05


def test_hard_negatives_are_false_in_one_thing():
    for index in range(200):
        scene = sample_scene(9, index, num_objects=1 + index % 3)
        truth = wanted_of(scene)
        negatives = hard_negatives(scene)
        assert len(negatives) >= 3 and not set(negatives) & set(captions(scene))
        for text in [*negatives, negative_caption(scene)]:
            read = parse_caption(text)
            assert set(read) != set(truth)
            differing = [
                field
                for field in ("shape", "color", "size", "place")
                if sorted(getattr(item, field) for item in read) != sorted(getattr(item, field) for item in truth)
            ]
            assert len(differing) <= 1  # none at all when two objects swap something


def test_hard_negatives_hold_the_swaps():
    first, second = one("circle", "red", "large", "left"), one("star", "blue", "large", "right")
    negatives = [parse_caption(text) for text in hard_negatives(Scene((first, second), GREY))]
    swaps = {
        "colors": (("circle", "blue", "large", "left"), ("star", "red", "large", "right")),
        "shapes": (("star", "red", "large", "left"), ("circle", "blue", "large", "right")),
        "places": (("star", "blue", "large", "left"), ("circle", "red", "large", "right")),
    }
    for swapped in swaps.values():
        assert tuple(WantedObject(*words) for words in swapped) in negatives


def test_balanced_prompts():
    prompts = balanced_prompts(960, seed=3)
    assert prompts == balanced_prompts(960, seed=3) != balanced_prompts(960, seed=4)
    ones = [wanted[0] for _, wanted in prompts if len(wanted) == 1]
    twos = [wanted for _, wanted in prompts if len(wanted) == 2]
    assert len(ones) == len(twos) == 480
    assert set(Counter(item.name for item in ones).values()) == {10}
    assert set(Counter((item.size, item.place) for item in ones).values()) == {48}
    assert set(Counter((wanted[0].place, wanted[0].size, wanted[1].size) for wanted in twos).values()) == {60}
    colors = Counter(item.color for wanted in twos for item in wanted)
    assert all(abs(count - 120) <= 12 for count in colors.values())
    assert all(count == 160 for count in Counter(item.shape for wanted in twos for item in wanted).values())
    assert all(wanted[0].name != wanted[1].name for wanted in twos)
    assert all(parse_caption(text) == wanted for text, wanted in prompts)
    assert {text.split(" of ")[0].rsplit(" ", 3)[-1] for text, wanted in prompts if " of " in text} == {
        "left",
        "right",
    }
    assert [len(wanted) for _, wanted in balanced_prompts(5)] == [1, 2, 1, 2, 1]
    with pytest.raises(ValueError, match="`num_prompts` must be at least 1, but is 0"):
        balanced_prompts(0)


# ------------------------------------------------------------------------------------------------ annotations


def test_label_is_the_largest_object():
    small, large = one("star", "red", diameter=0.2), one("ring", "blue", diameter=0.4)
    assert CLASS_NAMES[label(Scene((small, large), GREY))] == "blue ring"
    assert len(CLASS_NAMES) == 48


def test_semantic_map_and_palette():
    assert SCENES_CLASSES[1:] == SHAPES and len(SCENES_PALETTE) == len(SCENES_CLASSES)
    scene = Scene((one("square", diameter=0.5), one("ring", center=(0.8, 0.8), diameter=0.2)), GREY)
    classes = semantic_map(scene, 64)
    assert classes[32, 32] == 2 and classes[0, 0] == 0
    assert set(np.unique(classes)) == {0, 2, 5}
    assert (classes == 2).mean() == pytest.approx((0.88 * 0.5) ** 2, rel=0.05)
    picture = colorize_labels(classes)
    assert (labels_from_colors(picture) == classes).all()
    assert (
        labels_from_colors(Image.fromarray(np.clip(picture.astype(int) + 9, 0, 255).astype(np.uint8))) == classes
    ).all()


def test_palette_errors():
    with pytest.raises(ValueError, match=r"`labels` must lie between 0 and 6 .* and 9"):
        colorize_labels(np.array([[0, 9]]))
    with pytest.raises(ValueError, match=r"`labels` must be integers of shape \(h, w\), but is float64"):
        colorize_labels(np.zeros((2, 2)))
    odd = colorize_labels(np.zeros((3, 4), dtype=int))
    odd[1, 2] = (120, 120, 120)
    with pytest.raises(ValueError, match=r"colour \(120, 120, 120\) in row 1, column 2"):
        labels_from_colors(odd)
    with pytest.raises(ValueError, match=r"`picture` must be uint8 of shape \(h, w, 3\)"):
        labels_from_colors(np.zeros((4, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match="`palette` must have 1 to 256 colours, but has 0"):
        labels_from_colors(odd, np.zeros((0, 3), dtype=np.uint8))


def test_sketch_follows_the_outline():
    scene = Scene((one("circle", diameter=0.5),), GREY)
    lines = sketch(scene, 128, line_width=2)
    assert lines.dtype == np.uint8 and lines[64, 64] == 0 and lines[0, 0] == 0
    rows, columns = np.nonzero(lines > 128)
    radii = np.hypot(rows + 0.5 - 64, columns + 0.5 - 64)
    assert radii.min() > 29 and radii.max() < 32.5
    # length times width of the line
    assert lines.sum() / 255 == pytest.approx(2 * np.pi * 31 * 2, rel=0.03)


def test_a_circle_is_a_half_sphere():
    scene = Scene((one("circle", diameter=0.5),), GREY)
    nearness, normals = depth_and_normals(scene, 128)
    assert np.allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-5)
    assert (normals[0, 0] == (0, 0, 1)).all() and nearness[0, 0] == 0
    coordinate = np.arange(128) + 0.5 - 64
    x, y = np.meshgrid(coordinate, coordinate)
    well_inside = np.hypot(x, y) < 28
    well_inside &= np.hypot(x, y) > 3  # the distance has a kink in the middle
    height = np.sqrt(32**2 - x**2 - y**2, where=well_inside, out=np.zeros_like(x))
    assert np.allclose(nearness[well_inside] * 0.28 * 128, height[well_inside], atol=0.05)
    sphere = np.stack((x, y, height), axis=-1) / 32
    assert np.abs(normals - sphere)[well_inside].max() < 0.03


@pytest.mark.parametrize("shape", SHAPES)
def test_normals_lean_outwards_for_every_shape(shape):
    nearness, normals = depth_and_normals(Scene((one(shape),), GREY), 64)
    assert np.allclose(np.linalg.norm(normals, axis=-1), 1, atol=1e-5)
    assert (normals[..., 2] > 0).all() and 0 < nearness.max() <= 1
    assert abs(normals[..., 0].sum()) < 2.0  # mirrored left to right


# ------------------------------------------------------------------------------------------------ data set and folder


def test_dataset_rows():
    dataset = load_scenes(12, resolution=32, seed=4, columns=COLUMNS)
    assert len(dataset) == 12 and tuple(dataset.column_names) == COLUMNS
    row = dataset[7]
    scene = sample_scene(4, 7)
    assert row["image"].mode == "RGB" and row["image"].size == (32, 32)
    assert (np.asarray(row["image"]) == render(scene, 32)).all()
    assert row["text"] == choose_caption(scene) and row["full_text"] == full_caption(scene)
    assert row["negative_text"] == negative_caption(scene) and row["index"] == 7
    assert row["negative_texts"] == hard_negatives(scene)
    assert row["label"] == label(scene) and row["class_name"] == CLASS_NAMES[label(scene)]
    assert (np.asarray(row["semantic"]) == semantic_map(scene, 32)).all()
    assert (np.asarray(row["sketch"]) == sketch(scene, 32)).all()
    nearness, normals = depth_and_normals(scene, 32)
    assert np.allclose(np.asarray(row["depth"]) / 255, nearness, atol=1 / 255)
    assert np.allclose(np.asarray(row["normal"]) / 255 * 2 - 1, normals, atol=2 / 255)
    assert np.array_equal(row["normals"], normals) and row["metres"].shape == nearness.shape
    assert np.allclose(row["metres"], 4 - 3 * nearness) and row["metres"].min() >= 1  # nearness 0 is the wall
    assert row["box_names"] == [name for name, _ in boxes(scene)]
    assert np.allclose(row["boxes"], [box for _, box in boxes(scene)])


def test_dataset_can_be_indexed_like_any_other():
    dataset = load_scenes(20)
    assert dataset[[3, 5]]["text"] == [dataset[3]["text"], dataset[5]["text"]]
    assert dataset[-1]["index"] == 19
    assert list(dataset["label"])[4] == dataset[4]["label"]
    assert dataset.select([9])[0] == {**dataset[9], "image": dataset.select([9])[0]["image"]}
    parts = dataset.train_test_split(0.2, seed=0)
    rows = [row["index"] for part in parts.values() for row in part.select_columns(["index"])]
    assert sorted(rows) == list(range(20))
    again = pickle.loads(pickle.dumps(dataset))
    assert again[6]["text"] == dataset[6]["text"]
    assert (np.asarray(again[6]["image"]) == np.asarray(dataset[6]["image"])).all()


def test_dataset_in_a_loader_with_workers():
    import torch

    dataset = load_scenes(8, resolution=32, columns=("image", "label"))
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=1, collate_fn=list)
    rows = [row for batch in loader for row in batch]
    assert [row["label"] for row in rows] == [dataset[index]["label"] for index in range(8)]


def test_a_large_dataset_costs_nothing_before_it_is_read():
    start = time.process_time()
    dataset = load_scenes(1_000_000)
    assert dataset[999_999]["index"] == 999_999
    assert time.process_time() - start < 5


def test_dataset_options_and_errors():
    assert all(row["text"].count("a ") <= 3 for row in load_scenes(5, columns=("text",), num_objects=1))
    assert load_scenes(1, split="test")[0]["index"] == 0
    for arguments, message in (
        ({"num_samples": 0}, "`num_samples` must be at least 1, but is 0"),
        ({"num_samples": 1, "columns": ("image", "mask")}, "`columns` must name some of image, text"),
        ({"num_samples": 1, "split": "dev"}, "`split` must be one of"),
        ({"num_samples": 1, "resolution": 4}, "`resolution` must be at least 16"),
    ):
        with pytest.raises(ValueError, match=message):
            load_scenes(**arguments)


def test_written_folder_equals_the_dataset(tmp_path):
    from diffusers_ext.data.image_folder import load_image_dataset

    folder = write_scenes(tmp_path / "pictures", 6, resolution=32, seed=2, extra_pictures=("semantic", "normal"))
    columns = ("image", "text", "full_text", "negative_text", "label", "class_name", "semantic", "normal", "boxes")
    wanted = load_scenes(6, resolution=32, seed=2, columns=columns)
    read = load_image_dataset(folder, columns=columns[1:])
    assert len(read) == 6 and set(read.column_names) == {*columns, "box_names"}
    for one_row, other in zip(wanted, read, strict=True):
        for name in columns:
            if name in ("image", "semantic", "normal"):
                assert one_row[name].mode == other[name].mode
                assert (np.asarray(one_row[name]) == np.asarray(other[name])).all()
            else:
                assert one_row[name] == other[name]
    # and `datasets` itself reads the layout too
    import datasets

    stock = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    assert stock[4]["text"] == wanted[4]["text"] and stock[4]["semantic"].size == (32, 32)


def test_write_scenes_errors(tmp_path):
    write_scenes(tmp_path, 1, resolution=16)
    with pytest.raises(ValueError, match="already holds a metadata.jsonl"):
        write_scenes(tmp_path, 1)
    with pytest.raises(ValueError, match="`extra_pictures` must name some of semantic, sketch, depth, normal"):
        write_scenes(tmp_path / "x", 1, extra_pictures=("mask",))
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, but is 0"):
        write_scenes(tmp_path / "x", 0)


def test_command_in_a_fresh_process_draws_the_same(tmp_path, run_python):
    arguments = ["--output_dir", str(tmp_path / "out"), "--num_samples", "3", "--resolution", "32", "--seed", "11"]
    arguments += ["--split", "test", "--num_objects", "2"]
    done = run_python(
        "import runpy, sys, warnings\n"
        f"sys.argv = ['scenes', *{arguments!r}]\n"
        "import diffusers_ext.data\n"
        "warnings.simplefilter('error', RuntimeWarning)  # runpy's, when the package imports the module first\n"
        "runpy.run_module('diffusers_ext.data.scenes', run_name='__main__')"
    )
    assert "3 pictures with captions" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        scene = sample_scene(11, index, split="test", num_objects=2)
        assert line["text"] == choose_caption(scene) and line["boxes"] == [list(box) for _, box in boxes(scene)]
        with Image.open(tmp_path / "out" / line["file_name"]) as picture:
            assert (np.asarray(picture) == render(scene, 32)).all()
