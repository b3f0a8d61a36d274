"""Boxes, labels and names from users' columns: every format, and complaints that name the picture."""

import json

import pytest
from PIL import Image

from diffusers_ext.conditions.layout import LayoutObject
from diffusers_ext.data.annotations import ROW, NamedRows, box_names, check_labels, layout_objects, relative_box
from diffusers_ext.data.image_folder import load_image_dataset
from diffusers_ext.data.scenes import load_scenes

SIZE = (200, 100)


@pytest.fixture
def folder(tmp_path):
    """Three pictures with boxes; the third has what a test writes into it."""

    def write(**third):
        rows = [
            {"label": 0, "boxes": [[0, 0, 0.5, 0.5]], "names": ["dog"]},
            {"label": 1, "boxes": [[0, 0, 1, 1], [0.5, 0, 1, 0.5]], "names": ["cat", "dog"]},
            {"label": 1, "boxes": [[0, 0, 1, 1]], "names": ["cat"], **third},
        ]
        lines = []
        for number, row in enumerate(rows):
            Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
            lines.append(json.dumps({"file_name": f"{number}.png", **row}))
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
        return load_image_dataset(tmp_path, columns=("boxes", "names", "label"))

    return write


@pytest.mark.parametrize(
    "box, box_format",
    [
        ([0.25, 0.5, 0.75, 1.0], "xyxy"),
        ([0.25, 0.5, 0.5, 0.5], "xywh"),
        ([50, 50, 150, 100], "xyxy_pixels"),
        ([50, 50, 100, 50], "xywh_pixels"),
    ],
)
def test_box_formats(box, box_format):
    assert relative_box(box, box_format, SIZE) == (0.25, 0.5, 0.5, 0.5)


def test_a_rounding_error_is_cut_at_the_border():
    assert relative_box([-0.00005, 0, 1.00005, 1], "xyxy", SIZE) == (0, 0, 1, 1)


def test_objects_with_flags():
    categories = {"cat": 3, "dog": 7}
    boxes = [[0, 0, 1, 1], [0, 0, 0.5, 0.5]]
    found = layout_objects(boxes, ["dog", "cat"], categories, SIZE, flags={"is_group_of": [False, True]})
    assert found == [LayoutObject(7, (0, 0, 1, 1)), LayoutObject(3, (0, 0, 0.5, 0.5), is_group_of=True)]


def test_names_and_rows_of_a_folder(folder):
    dataset = folder()
    assert box_names(dataset, "names", "image") == ["cat", "dog"]
    rows = NamedRows(dataset, "image")
    assert len(rows) == 3 and rows[1]["image"].size == (8, 8)
    assert str(rows[1][ROW]).endswith("1.png' (row 1)")
    check_labels(dataset, "label", "image", 2)


def test_rows_without_a_file_are_named_by_their_number():
    assert str(NamedRows(load_scenes(4, resolution=16), "image")[3][ROW]) == "row 3"


@pytest.mark.parametrize(
    "box, box_format, message",
    [
        ([0.5, 0.5, 1.25, 1.0], "xyxy", r"\[0.5, 0.5, 1.25, 1.0\] leaves its picture of 200x100 pixels as xyxy"),
        ([-0.1, 0, 0.5, 0.5], "xywh", "leaves its picture"),
        ([0, 0, 150, 101], "xyxy_pixels", "leaves its picture"),
        ([0.5, 0.5, 0.25, 0.75], "xyxy", "has no area as xyxy: name its format with --box_format"),
        ([0.5, 0.5, float("nan"), 0.75], "xyxy", "has no area"),
        ([0.5, 0.5, 0.25], "xyxy", "expected four numbers"),
        ("0 0 1 1", "xyxy", "expected four numbers"),
    ],
)
def test_boxes_that_are_refused(box, box_format, message):
    with pytest.raises(ValueError, match=message):
        relative_box(box, box_format, SIZE)


@pytest.mark.parametrize(
    "boxes, names, flags, message",
    [
        ([], [], None, "It has no boxes"),
        ([[0, 0, 1, 1]], ["cat", "dog"], None, "It has 1 boxes, but 2 names"),
        ([[0, 0, 1, 1]], ["cat"], {"is_group_of": []}, "It has 1 boxes, but 0 is_group_of"),
        ([[0, 0, 1, 1]], ["cow"], None, r"The name 'cow' is none of the 1 known ones \(cat"),
    ],
)
def test_layouts_that_are_refused(boxes, names, flags, message):
    with pytest.raises(ValueError, match=message):
        layout_objects(boxes, names, {"cat": 0}, SIZE, flags=flags)


def test_a_wrong_label_names_its_picture(folder):
    with pytest.raises(ValueError, match=r"2.png' \(row 2\) has the label 5 in 'label': expected .* 0 to 1"):
        check_labels(folder(label=5), "label", "image", 2)


def test_wrong_names_name_their_picture(folder):
    with pytest.raises(ValueError, match=r"0.png' \(row 0\) has 0 in 'label': expected a list with the name"):
        box_names(folder(), "label", "image")
