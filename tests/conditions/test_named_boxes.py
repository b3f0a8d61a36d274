"""Boxes and names, without a pipeline: what becomes of them, and how they are drawn."""

import numpy as np
import pytest
from PIL import Image

from diffusers_ext.conditions.layout import LayoutObject
from diffusers_ext.conditions.named_boxes import draw_layout, find_class, read_layouts

NAMES = ["cat", "dog", "tree"]


def test_corners_become_places_and_sizes():
    ((first, second),) = read_layouts(
        np.array([[0.25, 0.5, 0.75, 1.00005], [0, 0, 1, 1]]), ["dog", 2], num_classes=3, class_names=NAMES
    )
    assert first == LayoutObject(1, (0.25, 0.5, 0.5, 0.5))  # rounding may leave the picture, it is cut
    assert second == LayoutObject(2, (0, 0, 1, 1))


def test_several_layouts_and_their_messages():
    layouts = read_layouts([[(0, 0, 1, 1)], [(0, 0, 0.5, 1)]], [["cat"], ["cat"]], num_classes=3, class_names=NAMES)
    assert [len(layout) for layout in layouts] == [1, 1]
    with pytest.raises(ValueError, match=r"`names\[1\]\[0\]` is 'cow', which is no class.*known are cat, dog, tree\."):
        read_layouts([[(0, 0, 1, 1)]] * 2, [["cat"], ["cow"]], num_classes=3, class_names=NAMES)
    with pytest.raises(TypeError, match=r"`boxes\[1\]\[0\]` must be four numbers \(x0, y0, x1, y1\), received 'a'"):
        read_layouts([[(0, 0, 1, 1)], ["a"]], [["cat"], ["cat"]], num_classes=3, class_names=NAMES)
    with pytest.raises(TypeError, match=r"`names` must be a list, received str"):
        read_layouts([(0, 0, 1, 1)], "cat", num_classes=3, class_names=NAMES)


def test_long_lists_of_names_are_cut_in_messages():
    with pytest.raises(ValueError, match=r"known are 0, 1, .*, 19 \.\.\."):
        find_class("zebra", 100, [str(number) for number in range(100)], "names")
    assert find_class(np.int64(3), 4, None, "names") == 3


def test_one_colour_a_name():
    picture = Image.new("L", (100, 50), 128)
    drawn = np.asarray(
        draw_layout(picture, [(0, 0, 0.4, 1), (0.5, 0, 1, 1), (0.42, 0, 0.48, 1)], ["cat", "dog", "cat"])
    )
    assert drawn.shape == (50, 100, 3) and np.asarray(picture).std() == 0
    left, right, small = (tuple(drawn[49, column]) for column in (20, 70, 45))
    assert left == small != right and tuple(drawn[40, 20]) == (128,) * 3
