"""`diffusers-ext prepare`: three files of each original layout become a folder that the trainings read."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext import cli
from diffusers_ext.conditions.geometry import geometry_condition
from diffusers_ext.conditions.palettes import NAMED_PALETTES, check_palette, read_palette
from diffusers_ext.data.image_folder import load_image_dataset
from diffusers_ext.data.prepare import prepare, thin_sobel


def picture(path, side=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((side, side, 3), 30, dtype=np.uint8)
    pixels[3:9, 3:9] = 220
    Image.fromarray(pixels).save(path)


def labels(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.resize(np.array(values, dtype=np.uint8), (12, 12))).save(path)


@pytest.mark.parametrize(
    "kind, folders, values, wanted",
    [
        ("coco-stuff", ("train2017", "val2017"), [0, 181, 255], {0, 181, 182}),
        ("ade20k", ("training", "validation"), [0, 1, 150], {0, 1, 150}),
    ],
)
def test_label_maps_of_the_original_layout(tmp_path, capsys, kind, folders, values, wanted):
    for folder, name in zip((folders[0], folders[0], folders[1]), "abc", strict=True):
        picture(tmp_path / "in/images" / folder / f"{name}.png")
        labels(tmp_path / "in/annotations" / folder / f"{name}.png", values)
    assert cli.main(["prepare", kind, str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert "3 pictures" in capsys.readouterr().out
    for split, count in (("train", 2), ("validation", 1)):
        rows = load_image_dataset(str(tmp_path / "out"), split=split, columns=["image", "semantic"])
        assert len(rows) == count
        assert set(np.unique(np.asarray(rows[0]["semantic"])).tolist()) == wanted
    assert max(wanted) < len(NAMED_PALETTES["coco182" if kind == "coco-stuff" else "ade150"])
    labels(tmp_path / "in/annotations" / folders[0] / "a.png", [0, 200])
    with pytest.raises(ValueError, match=r"no label map of .*labels \[200\]"):
        prepare(kind, tmp_path / "in", tmp_path / "other")
    (tmp_path / "in/annotations" / folders[0] / "a.png").unlink()
    with pytest.raises(ValueError, match="has no label map"):
        prepare(kind, tmp_path / "in", tmp_path / "third")


def test_sketches_of_pictures_and_of_edge_maps(tmp_path, caplog):
    for name in "abc":
        picture(tmp_path / "in" / f"{name}.png")
        edge = Image.new("L", (12, 12))
        if name != "c":
            edge.paste(200, (2, 2, 10, 3))
            edge.paste(120, (2, 6, 10, 7))  # below the threshold
        (tmp_path / "edges").mkdir(exist_ok=True)
        edge.save(tmp_path / "edges" / f"{name}.png")
    assert prepare("sketch", tmp_path / "in", tmp_path / "detected") == 3
    words = ["prepare", "sketch", str(tmp_path / "in"), str(tmp_path / "given"), "--edges", str(tmp_path / "edges")]
    assert cli.main(words) == 0
    assert "1 sketches have no lines, which equals no condition: c.png" in caplog.text
    detected, given = (np.asarray(Image.open(tmp_path / name / "sketch/a.png")) for name in ("detected", "given"))
    assert set(np.unique(detected).tolist()) == {0, 255} and 4 < (detected == 255).sum() < 60
    assert (given == 255).sum() == 8 and bool((given[2, 2:10] == 255).all())
    (tmp_path / "edges" / "b.png").unlink()
    with pytest.raises(ValueError, match="no edge map of the name 'b'"):
        prepare("sketch", tmp_path / "in", tmp_path / "again", edges=tmp_path / "edges")


def test_sobel_edges_are_thin_and_where_the_square_is():
    grey = np.zeros((20, 20))
    grey[5:15, 5:15] = 1
    lines = thin_sobel(grey)
    assert lines[10].sum() == 2 and lines[:, 10].sum() == 2 and not lines[8:12, 8:12].any()
    assert not thin_sobel(np.full((8, 8), 0.5)).any()


def test_diode_becomes_normals_and_depth(tmp_path):
    for split, name in (("train", "a"), ("train", "b"), ("val", "c")):
        path = tmp_path / "in" / split / "indoors/scene_1/scan_2" / f"{name}.png"
        picture(path)
        depth = np.full((12, 12, 1), 2.0, dtype=np.float32)
        depth[0, 0] = np.nan
        mask = np.ones((12, 12))
        mask[1, 1] = 0
        normal = np.zeros((12, 12, 3), dtype=np.float32)
        normal[..., 2] = 1
        for suffix, values in (("depth", depth), ("depth_mask", mask), ("normal", normal)):
            np.save(path.with_name(f"{name}_{suffix}.npy"), values)
    assert cli.main(["prepare", "diode", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out/train/metadata.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    assert len(lines) == 2 and row["file_name"] == "indoors_scene_1_scan_2_a.png"
    depth = torch.from_numpy(np.load(tmp_path / "out/train" / row["depth_file_name"]))
    normals = torch.from_numpy(np.load(tmp_path / "out/train" / row["normals_file_name"]))
    assert depth[0, 0] == depth[1, 1] == 0 and depth[5, 5] == 2
    assert geometry_condition(normals.permute(2, 0, 1)[None], depth[None]).shape == (1, 6, 12, 12)
    np.save(tmp_path / "in/train/indoors/scene_1/scan_2/a_depth.npy", np.ones((4, 4)))
    with pytest.raises(ValueError, match="has 4x4 pixels, but"):
        prepare("diode", tmp_path / "in", tmp_path / "other")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    """After an error the same command works again, and no condition is that of another picture."""
    source, out = tmp_path / "in", tmp_path / "below" / "out"
    source.mkdir()
    for name in ("a.jpg", "a.png"):
        Image.new("RGB", (8, 8)).save(source / name)
    with pytest.raises(ValueError, match=r"a\.jpg' and '.*a\.png' would both be called 'a' .*: rename one of them"):
        prepare("sketch", source, out)
    assert list(out.parent.iterdir()) == []
    (source / "a.jpg").rename(source / "b.jpg")
    assert prepare("sketch", source, out) == 2 and list(out.parent.iterdir()) == [out]


def test_arrays_that_are_none_are_named(tmp_path):
    folder = tmp_path / "in" / "train"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 6)).save(folder / "x.png")
    good = {"depth": np.ones((6, 8, 1)), "depth_mask": np.ones((6, 8)), "normal": np.zeros((6, 8, 3))}
    for name, bad, message in (
        ("depth", np.ones((6, 8, 2)), r"x_depth\.npy' has the shape \(6, 8, 2\): expected \(h, w\)"),
        ("normal", np.ones((6, 8)), r"x_normal\.npy' has the shape \(6, 8\): expected \(h, w, 3\)"),
        ("depth_mask", None, r"x_depth_mask\.npy' is no \.npy file of numbers"),
    ):
        for part, values in (good | {name: bad}).items():
            if values is None:
                (folder / f"x_{part}.npy").write_bytes(b"junk")
            else:
                np.save(folder / f"x_{part}.npy", values)
        with pytest.raises(ValueError, match=message):
            prepare("diode", tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_such_data_set_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    for kind, message in (
        ("cityscapes", "must be one of sketch"),
        ("coco-stuff", "is not coco-stuff: it has no folder images/train2017 or"),
        ("diode", "is not diode: it has no folder train or val"),
        ("sketch", "has no pictures"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(kind, tmp_path / "in", tmp_path / "out")
    with pytest.raises(ValueError, match="`edges` is given, but ade20k"):
        prepare("ade20k", tmp_path / "in", tmp_path / "out", edges=tmp_path)
    with pytest.raises(ValueError, match="exists: name a new folder"):
        prepare("sketch", tmp_path / "in", tmp_path / "in")


def test_palettes_by_name_and_file(tmp_path):
    assert [len(read_palette(name)) for name in ("coco182", "ade150")] == [183, 151]
    for palette in NAMED_PALETTES.values():
        check_palette(palette)
    path = tmp_path / "palette.json"
    for content, message in (
        ([[0, 0, 0], [9, 9, 9], [0, 0, 0]], r"colour \(0, 0, 0\) for labels 0 and 2"),
        ([[0, 0, 256]], "whole numbers from 0 to 255"),
        ([[0.5, 0, 0]], "whole numbers from 0 to 255"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            read_palette(str(path))
    path.write_text("no list")
    with pytest.raises(ValueError, match="is no JSON list"):
        read_palette(str(path))
    path.write_text("[[1, 2, 3], [4, 5, 6]]")
    assert read_palette(str(path)).tolist() == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match="is no file and none of coco182, ade150"):
        read_palette("cityscapes")
