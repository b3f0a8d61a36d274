"""Whether an object that the verifier of `scenes` found fills a box, and what a case's wish is worth."""

from diffusers_ext.data.scenes import EXTENTS
from diffusers_ext.data.scenes_verifier import FoundObject

BOX_OVERLAP = 0.5  # intersection over union from which a box holds an object


def found_box(item: FoundObject) -> tuple[float, float, float, float]:
    half_width, half_height = (0.5 * extent * item.diameter for extent in EXTENTS[item.shape or "circle"])
    (x, y) = item.center
    return (x - half_width, y - half_height, x + half_width, y + half_height)


def box_overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in range(2))
    shared = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / (sum(areas) - shared)


def next_case(values: list) -> list:
    """Every case's wish replaced by the next one's."""
    return values[1:] + values[:1]
