"""Reads a `scenes` picture back with plain image processing, and compares it with what a caption asks for.

Grounds are near-grey and objects are not, so an object is a connected region of saturated pixels. Its colour is the
nearest named colour of its core. Its shape is the one whose analytic outline, put at the region's centroid with the
region's area, overlaps best. No network is involved, and nothing is tuned to the outputs of any model.

`python -m diffusers_ext.data.scenes_verifier --num_samples 2000` prints how often it reads true pictures right.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from .scenes import COLORS, DIAMETERS, SHAPES, WantedObject, full_caption, inside_distance, parse_caption, sample_scene
from .scenes import render as render_scene

MIN_CHROMA = 55  # largest minus smallest channel: grounds stay below 30, named colours are above 120
MIN_AREA = 0.006  # smaller regions are speckle; the smallest true object covers 0.011 of the picture
MIN_OVERLAP = 0.7  # below this intersection over union a region has no named shape (true pictures: above 0.93)
CENTER_ZONE = 0.105  # a lone object within this distance of the middle, along x and y, is "in the center"
STEEPNESS = 1.5  # of the edges' ramp
UNNAMED = 255  # in a semantic map: a region like none of the shapes
MIN_OFFSET = 0.1  # two objects are left and right (above and below) of each other from this distance on

_COLOR_NAMES = tuple(COLORS)
_COLOR_TABLE = np.array(list(COLORS.values()), dtype=np.float32)


@dataclass(frozen=True)
class FoundObject:
    """An object read from a picture.

    Args:
        shape: A word of `SHAPES`, or None for a region like none of them.
        color: The nearest word of `COLORS`.
        size: "large" or "small", as understood for a picture with as many objects as were found.
        center: x and y of the bounding box's centre, as fractions of the width and height.
        diameter: Nominal diameter as in `SceneObject`, as a fraction of the side.
        area: Covered share of the picture.
        overlap: Intersection over union with the ideal shape.
    """

    shape: str | None
    color: str
    size: str
    center: tuple[float, float]
    diameter: float
    area: float
    overlap: float


class Verdict(NamedTuple):
    shape_and_color: bool
    everything: bool


class Comparison(NamedTuple):
    """`Verdict` in detail; `size` and `place` are True where the caption does not name them."""

    shape: bool
    color: bool
    shape_and_color: bool
    number: bool
    size: bool
    place: bool
    everything: bool


# ---------------------------------------------------------------------------------------------------------------------
# reading


@cache
def _shape_moments(shape: str) -> tuple[float, float]:
    """Area in squared radii, and y of the centroid in radii below the bounding box's centre."""
    grid = (np.arange(1000) + 0.5) / 400 - 1.25
    inside = inside_distance(shape, grid[None], grid[:, None], 1.0) > 0
    return float(inside.sum()) / 400**2, float((inside.sum(axis=1) * grid).sum() / inside.sum())


def _size_word(diameter: float, num_objects: int) -> str:
    diameters = DIAMETERS[min(max(num_objects, 1), 3)]
    return "large" if diameter > math.sqrt(diameters["large"] * diameters["small"]) else "small"


def _fit_shape(coverage: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[str, float, float, tuple[float, float]]:
    """Best shape, its overlap, radius and box centre (pixels) for a soft mask at pixel centres x (1, w), y (h, 1)."""
    area = float(coverage.sum())
    centroid_x = float((coverage * x).sum()) / area
    centroid_y = float((coverage * y).sum()) / area
    best = ("", -1.0, 0.0, (0.0, 0.0))
    for shape in SHAPES:
        unit_area, unit_offset = _shape_moments(shape)
        radius = math.sqrt(area / unit_area)
        center_y = centroid_y - unit_offset * radius
        ideal = np.minimum(np.maximum(inside_distance(shape, x - centroid_x, y - center_y, radius) + 0.5, 0), 1)
        shared = float(np.minimum(ideal, coverage).sum())
        # the ideal shape's area equals the region's: what leaves the patch counts against the shape
        overlap = shared / (2 * area - shared)
        if overlap > best[1]:
            best = (shape, overlap, radius, (centroid_x, center_y))
    return best


def _prepare(picture: np.ndarray | Image.Image) -> np.ndarray:
    """float32 (h, w, 3), 0 to 255; pictures with sides of 128 pixels and more are reduced by averaging."""
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture.convert("RGB"))
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        described = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise ValueError(f"`picture` must be a PIL picture or a uint8 array (h, w, 3), but is {described}.")
    height, width = picture.shape[:2]
    if min(height, width) < 16:
        raise ValueError(f"`picture` must have sides of at least 16 pixels, but is {height} x {width}.")
    factor = min(height, width) // 64
    if factor >= 2:
        rows, columns = height // factor, width // factor
        blocks = picture[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor, 3)
        return blocks.mean(axis=(1, 3), dtype=np.float32)
    return picture.astype(np.float32)


class _Region(NamedTuple):
    """A coloured region: where its patch lies, how far it covers each pixel there, and the ideal shape closest to it.

    Centre and diameter are fractions of the picture's sides, as in `FoundObject`.
    """

    area: float
    rows: slice
    columns: slice
    coverage: np.ndarray
    shape: str
    overlap: float
    color: str
    center: tuple[float, float]
    diameter: float

    @property
    def named_shape(self) -> str | None:
        return self.shape if self.overlap >= MIN_OVERLAP else None


def _read_regions(pixels: np.ndarray) -> list[_Region]:
    """The regions of prepared pixels (h, w, 3), the largest first."""
    height, width = pixels.shape[:2]
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]  # three steps are faster than one reduction
    chroma = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    min_pixels = MIN_AREA * height * width
    labels, _ = _label(chroma > MIN_CHROMA)
    found = []
    for number, where in enumerate(ndimage.find_objects(labels), start=1):
        # one pixel of rim: half covered pixels there may lie below the threshold
        rows, columns = (slice(max(0, part.start - 1), part.stop + 1) for part in where)
        member = labels[rows, columns] == number
        if np.count_nonzero(member) < min_pixels:
            continue
        for mask, color in _split_by_color(pixels[rows, columns], chroma[rows, columns], member, min_pixels):
            found.append(_describe(pixels, chroma, rows, columns, mask, color))
    return sorted(found, key=lambda region: -region.area)


def read_picture(picture: np.ndarray | Image.Image) -> list[FoundObject]:
    """The objects of a picture, the one with the largest area first.

    Args:
        picture: uint8 array (h, w, 3) or PIL picture, sides of at least 16 pixels.
    """
    regions = _read_regions(_prepare(picture))
    return [
        FoundObject(
            region.named_shape,
            region.color,
            _size_word(region.diameter, len(regions)),
            region.center,
            region.diameter,
            region.area,
            region.overlap,
        )
        for region in regions
    ]


def read_semantic_map(picture: np.ndarray | Image.Image) -> np.ndarray:
    """The counterpart of `scenes.semantic_map`, read from a picture.

    Returns:
        uint8 (h, w): 0 for the ground, 1 + the index into `SHAPES` for objects, `UNNAMED` for regions of no named
        shape. Pictures with sides of 128 pixels and more are reduced, as for `read_picture`.
    """
    pixels = _prepare(picture)
    classes = np.zeros(pixels.shape[:2], dtype=np.uint8)
    for region in _read_regions(pixels):
        value = UNNAMED if region.named_shape is None else 1 + SHAPES.index(region.named_shape)
        classes[region.rows, region.columns][region.coverage >= 0.5] = value
    return classes


def _label(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Connected regions (over edges and corners) numbered from 1, and how many there are."""
    regions = np.zeros(mask.shape, dtype=np.int32)
    count = ndimage.label(mask, structure=np.ones((3, 3)), output=regions)
    return regions, int(count)  # pyright: ignore[reportArgumentType]


def _quantile(values: np.ndarray, share: float) -> float:
    """The value at this rank, without interpolation (and much of the cost of `np.quantile`)."""
    rank = int(share * (values.size - 1))
    return float(np.partition(values, rank)[rank])


def _nearest_color(rgb: np.ndarray) -> np.ndarray:
    """Index of the nearest named colour for colours (..., 3)."""
    return ((rgb[..., None, :] - _COLOR_TABLE) ** 2).sum(axis=-1).argmin(axis=-1)


def _split_by_color(
    pixels: np.ndarray, chroma: np.ndarray, member: np.ndarray, min_pixels: float
) -> list[tuple[np.ndarray, int]]:
    """Masks and colour indices: one for a region of one colour, several where coloured objects touch."""
    # pixels of the rim are mixed with the ground: only saturated ones say what colours there are
    core = member & (chroma >= 0.75 * _quantile(chroma[member], 0.75))
    rows, columns = np.nonzero(core)
    nearest = _nearest_color(pixels[rows, columns])
    counts = np.bincount(nearest, minlength=len(_COLOR_NAMES))
    colors = [int(color) for color in np.argsort(-counts) if counts[color] >= max(min_pixels, 0.15 * len(rows))]
    if len(colors) < 2:
        return [(member, int(counts.argmax()))]
    # every pixel goes to the nearest core pixel's colour
    owner = np.full(member.shape, -1)
    kept = np.isin(nearest, colors)
    owner[rows[kept], columns[kept]] = nearest[kept]
    where = ndimage.distance_transform_edt(owner < 0, return_distances=False, return_indices=True)
    owner = owner[tuple(np.asarray(where))]
    parts = []
    for color in colors:
        pieces, count = _label(member & (owner == color))
        sizes = np.bincount(pieces.ravel(), minlength=count + 1)
        parts += [(pieces == piece, color) for piece in range(1, count + 1) if sizes[piece] >= min_pixels]
    return parts


def _describe(
    pixels: np.ndarray, chroma: np.ndarray, rows: slice, columns: slice, member: np.ndarray, color: int
) -> _Region:
    height, width = chroma.shape
    part = chroma[rows, columns]
    inner = part[member]
    core = member & (part >= 0.75 * _quantile(inner, 0.75))
    reach = np.asarray(ndimage.binary_dilation(member, structure=np.ones((3, 3))), dtype=bool)
    colors = pixels[rows, columns]
    full = np.median(colors[core], axis=0)
    outside = colors[~reach & (part < MIN_CHROMA)]
    ground = np.median(outside, axis=0) if len(outside) else np.full(3, full.mean())
    # share of the pixel that the object covers: where its colour lies on the way from the ground's to the object's
    step = full - ground
    coverage = (colors - ground) @ (step / (step @ step))
    # blur spreads an edge over several pixels: a steeper ramp through 1/2 takes that back
    coverage = np.where(reach, np.minimum(np.maximum(0.5 + STEEPNESS * (coverage - 0.5), 0), 1), 0)
    x = np.arange(columns.start, columns.start + part.shape[1], dtype=np.float32)[None] + 0.5
    y = np.arange(rows.start, rows.start + part.shape[0], dtype=np.float32)[:, None] + 0.5
    shape, overlap, radius, (center_x, center_y) = _fit_shape(coverage, x, y)
    return _Region(
        float(coverage.sum()) / (height * width),
        rows,
        columns,
        coverage,
        shape,
        overlap,
        _COLOR_NAMES[color],
        (center_x / width, center_y / height),
        2 * radius / math.sqrt(height * width),
    )


# ---------------------------------------------------------------------------------------------------------------------
# comparing


def _place_right(places: Sequence[str | None], centers: Sequence[tuple[float, float]]) -> bool:
    """Whether centres fit the named places: absolute for one object, relative to each other for several."""
    if not any(places):
        return True
    if len(places) == 1:
        dx, dy = centers[0][0] - 0.5, centers[0][1] - 0.5
        if max(abs(dx), abs(dy)) < CENTER_ZONE:
            return places[0] == "center"
        actual = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("top" if dy < 0 else "bottom")
        return places[0] == actual
    at = dict(zip(places, centers, strict=True))
    if set(at) == {"left", "right"}:
        return _is_before(at["left"], at["right"], axis=0)
    if set(at) == {"top", "bottom"}:
        return _is_before(at["top"], at["bottom"], axis=1)
    if set(at) == {"left", "center", "right"}:
        steps = (at["center"][0] - at["left"][0], at["right"][0] - at["center"][0])
        return min(steps) >= MIN_OFFSET and _is_before(at["left"], at["right"], axis=0)
    if set(at) == {"top", "bottom left", "bottom right"}:
        drop = min(at["bottom left"][1], at["bottom right"][1]) - at["top"][1]
        return drop >= MIN_OFFSET and _is_before(at["bottom left"], at["bottom right"], axis=0)
    raise ValueError(f"`wanted` has places that no caption names together: {list(places)}.")


def _is_before(first: tuple[float, float], second: tuple[float, float], axis: int) -> bool:
    along = second[axis] - first[axis]
    across = abs(second[1 - axis] - first[1 - axis])
    return along >= MIN_OFFSET and along > across


def compare(found: Sequence[FoundObject], wanted: Sequence[WantedObject]) -> Comparison:
    """What of `wanted` a picture shows.

    For one wanted object, the largest found one must have its shape and colour; for several, each must have a found
    object of its own with its shape and colour. Sizes and places are judged for the best such assignment.
    """
    if not wanted:
        raise ValueError("`wanted` must hold at least one object: use `parse_caption`.")
    number = len(found) == len(wanted)
    candidates = list(found[:1]) if len(wanted) == 1 else list(found[:8])
    nothing = Comparison(False, False, False, number, False, False, False)
    best = nothing
    for chosen in itertools.permutations(candidates, len(wanted)):
        pairs = list(zip(chosen, wanted, strict=True))
        shape = all(item.shape == want.shape for item, want in pairs)
        color = all(item.color == want.color for item, want in pairs)
        size = all(want.size in (None, _size_word(item.diameter, len(wanted))) for item, want in pairs)
        place = _place_right([want.place for want in wanted], [item.center for item in chosen])
        both = shape and color
        result = Comparison(shape, color, both, number, size, place, both and number and size and place)
        best = max(best, result, key=lambda outcome: (outcome.shape_and_color, sum(outcome)))
    return best


def check(found: Sequence[FoundObject], wanted: Sequence[WantedObject]) -> Verdict:
    """(shape and colour right, everything right): "everything" adds the size and place where named, and the number."""
    result = compare(found, wanted)
    return Verdict(result.shape_and_color, result.everything)


def check_caption(text: str, wanted: Sequence[WantedObject]) -> Verdict:
    """What a caption says of a picture: exactly these shapes and colours, and no size or place that is wrong.

    A text that is no caption of `scenes` has nothing right.
    """
    try:
        objects = parse_caption(text)
    except ValueError:
        return Verdict(False, False)
    said, asked = ({item.name: item for item in items} for items in (objects, wanted))
    named = said.keys() == asked.keys() and len(objects) == len(wanted)
    everything = named and all(
        getattr(item, field) in (None, getattr(asked[name], field))
        for name, item in said.items()
        for field in ("size", "place")
    )
    return Verdict(named, everything)


def chance_level(
    found: Sequence[Sequence[FoundObject]],
    wanted: Sequence[Sequence[WantedObject]],
    *,
    num_shuffles: int = 16,
    seed: int = 0,
) -> tuple[float, float]:
    """Shares of `check` when each picture meets the prompt of another picture with as many wanted objects.

    Args:
        found, wanted: One entry a picture, in the same order.
        num_shuffles: Other prompts tried for each picture.
    """
    if len(found) != len(wanted):
        raise ValueError(f"`found` and `wanted` must be equally long, but are {len(found)} and {len(wanted)}.")
    if num_shuffles < 1:
        raise ValueError(f"`num_shuffles` must be at least 1, but is {num_shuffles}.")
    uniforms = np.random.Generator(np.random.Philox(key=seed))
    verdicts = []
    for count in sorted({len(items) for items in wanted}):
        group = [position for position, items in enumerate(wanted) if len(items) == count]
        order = [group[position] for position in np.argsort(uniforms.random(len(group)), kind="stable")]
        # shifts of one shuffled order: no picture meets its own prompt
        for shift in range(1, min(num_shuffles, len(order) - 1) + 1):
            partners = order[shift:] + order[:shift]
            verdicts += [check(found[mine], wanted[other]) for mine, other in zip(order, partners, strict=True)]
    if not verdicts:
        raise ValueError("`wanted` must hold two prompts with the same number of objects to be shuffled.")
    both, everything = np.mean(np.array(verdicts, dtype=np.float64), axis=0).tolist()
    return both, everything


def measure(
    pictures: Sequence[np.ndarray | Image.Image], wanted: Sequence[Sequence[WantedObject]]
) -> dict[str, dict[str, float]]:
    """Shares of pictures that show what was wanted: by number of wanted objects ("1", "2" ...) and for "all".

    Each entry has the fields of `Comparison`, and "count".
    """
    if len(pictures) != len(wanted) or not wanted:
        raise ValueError(
            f"`pictures` and `wanted` must be equally long and not empty, but have {len(pictures)} and {len(wanted)}."
        )
    results = [compare(read_picture(picture), items) for picture, items in zip(pictures, wanted, strict=True)]
    groups = {str(count): count for count in sorted({len(items) for items in wanted})}
    shares: dict[str, dict[str, float]] = {}
    for name, count in (*groups.items(), ("all", None)):
        chosen = [result for result, items in zip(results, wanted, strict=True) if count in (None, len(items))]
        values = np.mean(np.array(chosen, dtype=np.float64), axis=0).tolist()
        shares[name] = {"count": float(len(chosen)), **dict(zip(Comparison._fields, values, strict=True))}
    return shares


def degrade(picture: np.ndarray, *, blur: float, noise: float, seed: int = 0) -> np.ndarray:
    """A picture as a weak tokenizer might return it: Gaussian blur (sigma in pixels) and noise (sigma of 255)."""
    soft = ndimage.gaussian_filter(picture.astype(np.float32), (blur, blur, 0))
    rough = np.random.Generator(np.random.Philox(key=seed)).standard_normal(picture.shape) * noise
    return np.clip(np.round(soft + rough), 0, 255).astype(np.uint8)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_ext.data.scenes_verifier",
        description="How often the verifier reads true pictures right, by number of objects.",
        allow_abbrev=False,
    )
    parser.add_argument("--num_samples", type=int, default=2000)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--num_objects", type=int, choices=(1, 2, 3), nargs="*", default=(1, 2, 3))
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blur", type=float, default=0.0, help="Gaussian blur first: sigma in pixels")
    parser.add_argument("--noise", type=float, default=0.0, help="noise after it: sigma, of 255")
    options = parser.parse_args(arguments)
    print(f"{'objects':>8} {'count':>6} " + " ".join(f"{name:>15}" for name in (*Comparison._fields, "chance")))
    for num_objects in options.num_objects:
        scenes = [
            sample_scene(options.seed, index, split=options.split, num_objects=num_objects)
            for index in range(options.num_samples)
        ]
        wanted = [parse_caption(full_caption(scene)) for scene in scenes]
        pictures = [render_scene(scene, options.resolution) for scene in scenes]
        if options.blur or options.noise:
            pictures = [
                degrade(picture, blur=options.blur, noise=options.noise, seed=index)
                for index, picture in enumerate(pictures)
            ]
        start = time.perf_counter()
        found = [read_picture(picture) for picture in pictures]
        seconds = (time.perf_counter() - start) / len(pictures)
        shares = measure(pictures, wanted)["all"]
        chance = chance_level(found, wanted)[0] if len(wanted) > 1 else math.nan
        columns = [*(shares[name] for name in Comparison._fields), chance]
        print(f"{num_objects:>8} {len(pictures):>6} " + " ".join(f"{value:>15.4f}" for value in columns))
        print(f"{'':>8} {1000 * seconds:.2f} ms a picture to read")


if __name__ == "__main__":
    main()
