"""Layouts as users write them, boxes and names, to the objects of `layout.py`; and drawn over a picture."""

import colorsys
import difflib
import numbers
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

from .layout import LayoutObject

_ROUNDING = 1e-4  # by which a box may leave the picture


def read_layouts(
    boxes: Any, names: Any, *, num_classes: int, class_names: Sequence[str] | None = None, max_objects: int = 30
) -> list[list[LayoutObject]]:
    """One layout or several.

    Args:
        boxes: (x0, y0, x1, y1) of each object, left upper and right lower corner as fractions of the picture's sides;
            or a list of such lists, one a picture. Arrays and tensors do as well.
        names: category of each object, its name or its number; nested like `boxes`.
        num_classes: categories are 0 to `num_classes` - 1.
        class_names: their names.
        max_objects: objects that a sequence holds.

    Raises:
        TypeError: something else.
        ValueError: an empty layout, other numbers of boxes and names, a box that leaves the picture or has no area,
            an unknown category, too many objects.
    """
    boxes, names = _plain(boxes), _plain(names)
    for argument, value in (("boxes", boxes), ("names", names)):
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"`{argument}` must be a list, received {type(value).__name__}.")
        if len(value) == 0:
            raise ValueError(f"`{argument}` is empty: a layout needs at least one box with its name.")
    several = isinstance(names[0], (list, tuple))
    if not several:
        boxes, names = [boxes], [names]
    if len(boxes) != len(names):
        raise ValueError(f"`boxes` holds {len(boxes)} layouts, `names` {len(names)}: they belong together.")
    layouts = []
    for number, (some_boxes, some_names) in enumerate(zip(boxes, names, strict=True)):
        where = f"[{number}]" if several else ""
        layouts.append(_read_layout(some_boxes, some_names, where, num_classes, class_names, max_objects))
    return layouts


def draw_layout(image: Image.Image, boxes: Any, names: Any) -> Image.Image:
    """A copy of a picture with one layout's boxes and names drawn over it, one colour a name.

    Args:
        image: any mode, any size.
        boxes, names: of one layout, as in `read_layouts`.
    """
    picture = image.convert("RGB")
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    labels = [str(name) for name in _plain(names)]
    order = sorted(set(labels))
    line = max(1, round(min(width, height) / 128))
    for (x0, y0, x1, y1), label in zip(_plain(boxes), labels, strict=True):
        rgb = colorsys.hsv_to_rgb(order.index(label) / len(order), 1.0, 1.0)
        color = tuple(round(255 * value) for value in rgb)
        corners = [
            round(value * (side - 1)) for value, side in zip((x0, y0, x1, y1), (width, height) * 2, strict=True)
        ]
        draw.rectangle(corners, outline=color, width=line)
        place = (corners[0] + line + 1, corners[1] + line)
        draw.rectangle(draw.textbbox(place, label), fill=color)
        draw.text(place, label, fill=(0, 0, 0) if sum(color) > 300 else (255, 255, 255))
    return picture


def find_class(name: Any, num_classes: int, class_names: Sequence[str] | None, argument: str) -> int:
    """The number of a class that is given by number or by name.

    Raises:
        TypeError: neither.
        ValueError: an unknown one.
    """
    if isinstance(name, numbers.Integral) and not isinstance(name, bool):
        if not 0 <= int(name) < num_classes:
            raise ValueError(f"`{argument}` is {name}: this model knows the classes 0 to {num_classes - 1}.")
        return int(name)
    if not isinstance(name, str):
        raise TypeError(f"`{argument}` must be the name of a class or its number, received {name!r}.")
    if class_names is None:
        raise ValueError(
            f"`{argument}` is {name!r}, but the pipeline has no `class_names`: name a class by its number, 0 to"
            f" {num_classes - 1}."
        )
    if name in class_names:
        return list(class_names).index(name)
    close = difflib.get_close_matches(name, class_names, n=3)
    hint = (
        f"did you mean {' or '.join(map(repr, close))}?"
        if close
        else f"known are {', '.join(class_names[:20])}" + (" ..." if len(class_names) > 20 else ".")
    )
    raise ValueError(f"`{argument}` is {name!r}, which is no class of this model; {hint}")


def _read_layout(
    boxes: Any, names: Any, where: str, num_classes: int, class_names: Sequence[str] | None, max_objects: int
) -> list[LayoutObject]:
    for argument, value in (("boxes", boxes), ("names", names)):
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"`{argument}{where}` must be a list, received {type(value).__name__}.")
    if not 1 <= len(boxes) == len(names) <= max_objects:
        raise ValueError(
            f"`boxes{where}` holds {len(boxes)} boxes and `names{where}` {len(names)} names: pass one name a box, and"
            f" 1 to {max_objects} of them."
        )
    objects = []
    for number, (box, name) in enumerate(zip(boxes, names, strict=True)):
        category = find_class(name, num_classes, class_names, f"names{where}[{number}]")
        x0, y0, x1, y1 = _check_box(f"boxes{where}[{number}]", box)
        objects.append(LayoutObject(category, (x0, y0, x1 - x0, y1 - y0)))
    return objects


def _check_box(argument: str, box: Any) -> tuple[float, float, float, float]:
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(isinstance(v, numbers.Real) for v in box):
        raise TypeError(f"`{argument}` must be four numbers (x0, y0, x1, y1), received {box!r}.")
    x0, y0, x1, y1 = (float(value) for value in box)
    if not all(-_ROUNDING <= value <= 1 + _ROUNDING for value in (x0, y0, x1, y1)):  # also refuses NaN
        raise ValueError(
            f"`{argument}` is {tuple(box)}: corners are fractions of the picture's sides and lie in [0, 1]; divide"
            " pixels by width and height."
        )
    if x1 <= x0 or y1 <= y0:
        raise ValueError(
            f"`{argument}` is {tuple(box)}: expected (x0, y0, x1, y1) with x0 < x1 and y0 < y1, the left upper and the"
            " right lower corner (not width and height)."
        )
    return tuple(min(max(value, 0.0), 1.0) for value in (x0, y0, x1, y1))  # type: ignore[return-value]


def _plain(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values
