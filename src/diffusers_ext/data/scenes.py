"""`scenes`: a small deterministic data set of named shapes, so that every stage trains and is judged offline.

A picture holds one to three objects (six shapes, eight colours, two sizes) at named places on a muted ground that no
caption mentions. It is a fixture for honest measurement: `scenes_verifier` reads the objects back from any picture,
so that "does the sample show what was asked" is a number. It makes no claim about photographs.

Everything is a function of (seed, split, index): the draws come from Philox counters, never from a global state, and
the splits cannot share a scene (see `SPLIT_RESIDUES`). Lengths and places are fractions of the picture's side, x to
the right and y downwards, and object coverage is analytic, so the same scene can be rendered at any resolution.

The file is long because it is the whole definition of the data set, in four parts that share its words and geometry:
drawing scenes, rendering, captions and their inverse, annotations and the data set itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from datasets import Dataset

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = {
    "red": (215, 25, 30),
    "orange": (250, 130, 10),
    "yellow": (252, 232, 50),
    "green": (25, 160, 50),
    "cyan": (45, 220, 230),
    "blue": (25, 65, 220),
    "purple": (140, 35, 170),
    "pink": (255, 130, 195),
}
SIZES = ("large", "small")
GROUNDS = ("plain", "gradient", "striped", "checkered")
PLACES = ("center", "left", "right", "top", "bottom")
CLASS_NAMES = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)
# nominal diameter by (number of objects, size): what "large" means depends on how many objects share the picture
DIAMETERS = {
    1: {"large": 0.56, "small": 0.30},
    2: {"large": 0.40, "small": 0.26},
    3: {"large": 0.25, "small": 0.165},
}
# width and height of each shape's bounding box in nominal diameters
EXTENTS = {
    "circle": (1.0, 1.0),
    "square": (0.88, 0.88),
    "triangle": (1.05, 0.92),
    "star": (1.027, 0.977),
    "ring": (1.04, 1.04),
    "cross": (1.0, 1.0),
}
SPLITS = ("train", "validation", "test")
# The x coordinate of a scene's first object is a multiple of 2**-20, plus one half; its last four bits belong to the
# split. Scenes of two splits therefore differ for every pair of seeds and indices: disjoint by construction.
SPLIT_RESIDUES = {"train": tuple(range(14)), "validation": (14,), "test": (15,)}
DEFAULT_MIXTURE = (0.45, 0.55, 0.0)
RING_HOLE = 0.52  # inner radius over outer radius
STAR_NOTCH = 0.48  # inner radius over outer radius
CROSS_ARM = 0.34  # arm's half width over half length
WALL_METRES = 4.0  # how far the ground is from a depth camera


@dataclass(frozen=True)
class SceneObject:
    """One object: what a caption can say of it, and where it is drawn.

    Args:
        shape, color, size: Words of `SHAPES`, `COLORS`, `SIZES`.
        place: Its named place ("left", "bottom right" ...); with two objects it is relative to the other one.
        center: x and y of the bounding box's centre, as fractions of the side.
        diameter: Nominal diameter, as a fraction of the side; `EXTENTS` gives the shape's box in diameters.
        rgb: The colour drawn, 0 to 255: the named colour with a slight jitter.
    """

    shape: str
    color: str
    size: str
    place: str
    center: tuple[float, float]
    diameter: float
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 as fractions of the side."""
        half_width, half_height = (0.5 * extent * self.diameter for extent in EXTENTS[self.shape])
        x, y = self.center
        return (x - half_width, y - half_height, x + half_width, y + half_height)


@dataclass(frozen=True)
class Ground:
    """The ground: two muted colours (0 to 255), mixed along `angle` (radians) with `period` (fraction of the side)."""

    kind: str
    rgb: tuple[int, int, int]
    second_rgb: tuple[int, int, int]
    period: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """Objects from left to right or top to bottom (as their places say), on a ground."""

    objects: tuple[SceneObject, ...]
    ground: Ground
    seed: int = 0
    index: int = 0
    split: str = "train"


@dataclass(frozen=True)
class WantedObject:
    """What a caption asks of one object; None where it does not say."""

    shape: str
    color: str
    size: str | None = None
    place: str | None = None

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


# ---------------------------------------------------------------------------------------------------------------------
# drawing scenes at random


class _Draws:
    """Uniform draws keyed by (seed, split, index, purpose): Philox in counter mode, the same on every platform."""

    def __init__(self, seed: int, split: str, index: int, purpose: int) -> None:
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, but is {split!r}.")
        if index < 0 or seed < 0:
            raise ValueError(f"`seed` and `index` must not be negative, but are {seed} and {index}.")
        key = (seed % 2**64) << 64 | (index % 2**64)
        bits = np.random.Philox(key=key, counter=SPLITS.index(split) << 128 | purpose << 64)
        self.values = iter(np.random.Generator(bits).random(48).tolist())

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self.values)

    def choice(self, options: Sequence[Any]) -> Any:
        return options[int(next(self.values) * len(options))]

    def weighted(self, weights: Sequence[float]) -> int:
        point = next(self.values) * sum(weights)
        for position, total in enumerate(itertools.accumulate(weights)):
            if point < total:
                return position
        return max(position for position, weight in enumerate(weights) if weight > 0)


def sample_scene(
    seed: int,
    index: int,
    *,
    split: str = "train",
    num_objects: int | None = None,
    mixture: Sequence[float] = DEFAULT_MIXTURE,
    grounds: Sequence[str] = GROUNDS,
) -> Scene:
    """The scene with this number.

    Args:
        seed, index: Any non-negative integers; the scene is a function of these, the split and the options.
        split: "train", "validation" or "test"; no two splits share a scene.
        num_objects: 1, 2 or 3; None draws it by `mixture`.
        mixture: Weights of one, two and three objects.
        grounds: Kinds of ground to draw from.
    """
    if num_objects not in (None, 1, 2, 3):
        raise ValueError(f"`num_objects` must be 1, 2, 3 or None, but is {num_objects!r}.")
    if len(mixture) != 3 or min(mixture) < 0 or sum(mixture) <= 0:
        raise ValueError(f"`mixture` must be three weights (one, two, three objects), but is {mixture!r}.")
    unknown = [kind for kind in grounds if kind not in GROUNDS]
    if unknown or not grounds:
        raise ValueError(f"`grounds` must name some of {', '.join(GROUNDS)}, but is {grounds!r}.")
    draws = _Draws(seed, split, index, purpose=0)
    count = draws.weighted(mixture) + 1
    count = num_objects or count
    names: list[tuple[str, str]] = []
    while len(names) < count:
        name = (draws.choice(SHAPES), draws.choice(tuple(COLORS)))
        # a second draw of the same name moves on to the next colour: no rejection loop, all pairs of names alike
        while name in names:
            colors = tuple(COLORS)
            name = (name[0], colors[(colors.index(name[1]) + 1) % len(colors)])
        names.append(name)
    sizes = [draws.choice(SIZES) for _ in range(count)]
    diameters = [DIAMETERS[count][size] * draws.uniform(0.97, 1.03) for size in sizes]
    boxes = [
        (EXTENTS[shape][0] * diameter, EXTENTS[shape][1] * diameter)
        for (shape, _), diameter in zip(names, diameters, strict=True)
    ]
    places, centers = (_place_one, _place_two, _place_three)[count - 1](draws, boxes)
    residue = draws.choice(SPLIT_RESIDUES[split])
    centers[0] = ((math.floor(centers[0][0] * 2**20) // 16 * 16 + residue + 0.5) / 2**20, centers[0][1])
    objects = tuple(
        SceneObject(shape, color, size, place, center, diameter, _jitter(draws, COLORS[color], 6))
        for (shape, color), size, place, center, diameter in zip(names, sizes, places, centers, diameters, strict=True)
    )
    return Scene(objects, _sample_ground(draws, grounds), seed, index, split)


def _jitter(draws: _Draws, rgb: Sequence[float], width: float) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, round(value + draws.uniform(-width, width)))) for value in rgb)
    return (red, green, blue)


def _sample_ground(draws: _Draws, grounds: Sequence[str]) -> Ground:
    kind = draws.choice(tuple(grounds))
    level = draws.uniform(55, 215)
    contrast = draws.uniform(16, 34)
    first = _jitter(draws, (level - contrast / 2,) * 3, 7)
    second = _jitter(draws, (level + contrast / 2,) * 3, 7)
    period = 1 / draws.choice((2, 3, 4))
    angle = draws.choice((0, 1, 2, 3)) * math.pi / 4 + (math.pi if draws.choice((False, True)) else 0.0)
    if kind == "checkered":
        angle = 0.0
    return Ground(kind, first, first if kind == "plain" else second, period, angle)


def _place_one(draws: _Draws, boxes: list[tuple[float, float]]) -> tuple[list[str], list[tuple[float, float]]]:
    place = draws.choice(PLACES)
    slack = 0.5 - 0.02 - max(boxes[0]) / 2  # largest shift that leaves a margin
    shift = min(slack, draws.uniform(0.19, 0.27))
    dx, dy = {"center": (0, 0), "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}[place]
    x = 0.5 + dx * shift + draws.uniform(-0.03, 0.03) * (dx == 0)
    y = 0.5 + dy * shift + draws.uniform(-0.03, 0.03) * (dy == 0)
    return [place], [(x, y)]


def _place_two(draws: _Draws, boxes: list[tuple[float, float]]) -> tuple[list[str], list[tuple[float, float]]]:
    axis = draws.choice((0, 1))
    first, second = boxes[0][axis], boxes[1][axis]
    slack = 1 - first - second - 0.075 - 2 * 0.02  # what is left after the smallest gap and the margins
    spare_gap = draws.uniform(0, 0.4) * slack
    start = 0.02 + draws.uniform(0.25, 0.75) * (slack - spare_gap)
    along = (start + first / 2, start + first + 0.075 + spare_gap + second / 2)
    across = (0.5 + draws.uniform(-0.06, 0.06), 0.5 + draws.uniform(-0.06, 0.06))
    if axis == 0:
        return ["left", "right"], [(along[0], across[0]), (along[1], across[1])]
    return ["top", "bottom"], [(across[0], along[0]), (across[1], along[1])]


def _place_three(draws: _Draws, boxes: list[tuple[float, float]]) -> tuple[list[str], list[tuple[float, float]]]:
    if draws.choice((False, True)):
        places, centers = ["left", "center", "right"], [(0.175, 0.5), (0.5, 0.5), (0.825, 0.5)]
        width_x, width_y = 0.01, 0.08
    else:
        places = ["top", "bottom left", "bottom right"]
        centers, width_x, width_y = [(0.5, 0.26), (0.25, 0.72), (0.75, 0.72)], 0.04, 0.04
    jittered = [(x + draws.uniform(-width_x, width_x), y + draws.uniform(-width_y, width_y)) for x, y in centers]
    return places, jittered


# ---------------------------------------------------------------------------------------------------------------------
# rendering


def inside_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """How far a point lies inside the shape (negative outside), in the unit of `x`, `y` and `radius`.

    Args:
        x, y: Coordinates relative to the bounding box's centre, broadcast against each other.
        radius: Half the nominal diameter.
    """
    if shape == "circle":
        return radius - np.sqrt(x * x + y * y)
    if shape == "ring":
        distance = np.sqrt(x * x + y * y)
        outer = 1.04 * radius
        return np.minimum(outer - distance, distance - RING_HOLE * outer)
    if shape == "square":
        return 0.88 * radius - np.maximum(np.abs(x), np.abs(y))
    if shape == "cross":
        ax, ay = np.abs(x), np.abs(y)
        return np.minimum(radius - np.maximum(ax, ay), CROSS_ARM * radius - np.minimum(ax, ay))
    if shape == "triangle":
        # apex up; the sides run from (0, -0.92) to (+-1.05, 0.92)
        length = math.hypot(1.05, 1.84)
        side = (1.05 * (y + 0.92 * radius) - 1.84 * np.abs(x)) / length
        return np.minimum(0.92 * radius - y, side)
    if shape == "star":
        # five equal sectors, each mirrored: one edge from the tip (angle 0) to the notch (angle 36 degrees)
        outer = 1.08 * radius
        notch = STAR_NOTCH * outer
        y = y - 0.5 * outer * (1 - math.cos(math.pi / 5))  # the box's centre is above the star's
        angle = np.arctan2(x, -y)
        sector = 2 * math.pi / 5
        folded = np.abs(angle - sector * np.round(angle / sector))
        distance = np.sqrt(x * x + y * y)
        u, v = distance * np.cos(folded), distance * np.sin(folded)
        edge_u, edge_v = notch * math.cos(math.pi / 5) - outer, notch * math.sin(math.pi / 5)
        return (v * edge_u - (u - outer) * edge_v) / math.hypot(edge_u, edge_v)
    raise ValueError(f"`shape` must be one of {', '.join(SHAPES)}, but is {shape!r}.")


def _check_resolution(resolution: int) -> None:
    if not isinstance(resolution, (int, np.integer)) or isinstance(resolution, bool):
        raise TypeError(f"`resolution` must be an integer, but is {resolution!r}.")
    if resolution < 16:
        raise ValueError(f"`resolution` must be at least 16 pixels, but is {resolution}.")


def _patch(item: SceneObject, resolution: int) -> tuple[slice, slice, np.ndarray]:
    """Rows, columns and inside distance (pixels) of the part of the picture that the object can touch."""
    x0, y0, x1, y1 = item.box
    rows = slice(max(0, math.floor(y0 * resolution) - 1), min(resolution, math.ceil(y1 * resolution) + 1))
    columns = slice(max(0, math.floor(x0 * resolution) - 1), min(resolution, math.ceil(x1 * resolution) + 1))
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + np.float32(0.5 - item.center[1] * resolution)
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None] + np.float32(0.5 - item.center[0] * resolution)
    return rows, columns, inside_distance(item.shape, x, y, 0.5 * item.diameter * resolution)


def _bands(position: np.ndarray, period: float, resolution: int) -> np.ndarray:
    """Anti-aliased square wave of 0 and 1 with the given full period (fraction of the side)."""
    phase = np.abs((position / period) % 1.0 - 0.5)  # 0 .. 0.5, crosses 0.25 at each edge
    return np.clip(0.5 + (0.25 - phase) * (period * resolution), 0.0, 1.0)


@lru_cache(maxsize=256)
def _ground_mix(kind: str, period: float, angle: float, resolution: int) -> np.ndarray:
    """How much of the second colour each pixel has: float32 (h, w, 1), read-only."""
    pixel = (np.arange(resolution) + 0.5) / resolution - 0.5
    if kind == "checkered":
        wave = _bands(pixel, period, resolution)
        mix = wave[:, None] * wave[None] + (1 - wave[:, None]) * (1 - wave[None])
    else:
        along = pixel[None] * math.cos(angle) + pixel[:, None] * math.sin(angle)
        if kind == "gradient":
            mix = along / (abs(math.cos(angle)) + abs(math.sin(angle))) + 0.5
        else:
            mix = _bands(along, period, resolution)
    mix = mix[..., None].astype(np.float32)
    mix.setflags(write=False)
    return mix


def _render_ground(ground: Ground, resolution: int) -> np.ndarray:
    first = np.asarray(ground.rgb, dtype=np.float32)
    if ground.kind == "plain":
        return np.broadcast_to(first, (resolution, resolution, 3)).copy()
    picture = _ground_mix(ground.kind, ground.period, ground.angle, resolution) * (
        np.asarray(ground.second_rgb, dtype=np.float32) - first
    )
    picture += first
    return picture


def render(scene: Scene, resolution: int = 64) -> np.ndarray:
    """The picture: uint8 (h, w, 3), RGB, anti-aliased."""
    _check_resolution(resolution)
    picture = _render_ground(scene.ground, resolution)
    for item in scene.objects:
        rows, columns, distance = _patch(item, resolution)
        # a pixel's coverage, by the distance of its centre from the outline
        coverage = np.minimum(np.maximum(distance + np.float32(0.5), 0), 1)[..., None]
        area = picture[rows, columns]
        area += coverage * (np.asarray(item.rgb, dtype=np.float32) - area)
    picture += np.float32(0.5)
    return picture.astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# captions

# One table for writing and reading: a caption is a template whose `@` are objects, in the order of the places given.
# `None` as place: the caption leaves it open.
_ONE_PLACE_WORDS = {
    "center": "in the center",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
# the first templates of each kind are the full, canonical ones
_CANONICAL = {
    **{f"@ {words}": (place,) for place, words in _ONE_PLACE_WORDS.items()},
    "@ to the left of @": ("left", "right"),
    "@ to the right of @": ("right", "left"),
    "@ above @": ("top", "bottom"),
    "@ below @": ("bottom", "top"),
    "@ on the left, @ in the center and @ on the right": ("left", "center", "right"),
    "@ at the top, @ at the bottom left and @ at the bottom right": ("top", "bottom left", "bottom right"),
}
_VARIANTS = {
    **{f"{words}, @": (place,) for place, words in _ONE_PLACE_WORDS.items()},
    "@ on the left and @ on the right": ("left", "right"),
    "@ at the top and @ at the bottom": ("top", "bottom"),
    "@ over @": ("top", "bottom"),
    "@ under @": ("bottom", "top"),
    "from left to right: @, @ and @": ("left", "center", "right"),
    "@ above @ on the left and @ on the right": ("top", "bottom left", "bottom right"),
}
_PLACELESS = {"@": (None,), "@ and @": (None, None), "@, @ and @": (None, None, None)}
_TEMPLATES = {**_CANONICAL, **_VARIANTS, **_PLACELESS}
_OPENINGS = ("a picture of ", "there is ", "an image showing ")
_OBJECT = re.compile(
    rf"(?:\b(?:a|an)\s+)?(?:\b({'|'.join(SIZES)})\s+)?\b({'|'.join(COLORS)})\s+({'|'.join(SHAPES)})\b",
)


def _phrase(item: SceneObject | WantedObject, *, size: bool = True, article: bool = True) -> str:
    words = f"{item.size} {item.name}" if size and item.size else item.name
    if not article:
        return words
    return f"{'an' if words.startswith('orange') else 'a'} {words}"


def _fill(template: str, items: Sequence[SceneObject | WantedObject], **phrase_options: bool) -> str:
    for item in items:
        template = template.replace("@", _phrase(item, **phrase_options), 1)
    return template


def _arrangements(items: Sequence[SceneObject | WantedObject], templates: dict[str, tuple[str | None, ...]]) -> list:
    """(template, items in its order) for every template that tells these items' places."""
    by_place = {item.place: item for item in items}
    return [
        (template, [by_place[place] for place in places])
        for template, places in templates.items()
        if len(places) == len(items) and set(places) == set(by_place)
    ]


def _full_captions(items: Sequence[SceneObject | WantedObject]) -> list[str]:
    return [_fill(*arrangement) for arrangement in _arrangements(items, _CANONICAL)]


def _caption_groups(items: Sequence[SceneObject | WantedObject]) -> tuple[list[str], list[str], list[str]]:
    """Full canonical captions, full paraphrases, and captions that leave out sizes or places."""
    canonical = _arrangements(items, _CANONICAL)
    variants = _arrangements(items, _VARIANTS)
    orders = [list(items)] if len(items) == 1 else [list(items), list(reversed(items))]
    placeless = [
        (template, order) for template, places in _PLACELESS.items() if len(places) == len(items) for order in orders
    ]
    full = _full_captions(items)
    paraphrases = [_fill(*arrangement) for arrangement in variants]
    paraphrases += [_fill(*arrangement, article=False) for arrangement in canonical]
    paraphrases += [opening + caption for opening in _OPENINGS for caption in full]
    partial = [_fill(*arrangement, size=False) for arrangement in canonical + variants]
    partial += [_fill(*arrangement, size=size) for arrangement in placeless for size in (True, False)]
    partial += [opening + _fill(*placeless[0]) for opening in _OPENINGS]
    return full, paraphrases, partial


def captions(scene: Scene) -> list[str]:
    """Every caption of the scene: the full ones (article, size, place) first, then paraphrases, then partial ones."""
    return [caption for group in _caption_groups(scene.objects) for caption in group]


def full_caption(scene: Scene) -> str:
    """One canonical caption with all sizes and places; which of the equivalent ones depends on (seed, index)."""
    return _Draws(scene.seed, scene.split, scene.index, purpose=1).choice(_full_captions(scene.objects))


def choose_caption(scene: Scene, weights: Sequence[float] = (0.6, 0.2, 0.2)) -> str:
    """One caption by (seed, index): canonical, paraphrased or partial with these weights."""
    draws = _Draws(scene.seed, scene.split, scene.index, purpose=1)
    full = draws.choice(_full_captions(scene.objects))  # first draw: the same as in `full_caption`
    group = draws.weighted(weights)
    return full if group == 0 else draws.choice(_caption_groups(scene.objects)[group])


def _one_thing_changed(scene: Scene, draws: _Draws) -> list[list[WantedObject]]:
    """Swaps between two objects, and changes of one word of one object; `draws` says to which other word."""
    items = [WantedObject(item.shape, item.color, item.size, item.place) for item in scene.objects]
    changed: list[list[WantedObject]] = []
    for first, second in itertools.combinations(range(len(items)), 2):
        for field in ("color", "shape", "size", "place"):
            one, other = items[first], items[second]
            changed.append(list(items))
            changed[-1][first] = replace(one, **{field: getattr(other, field)})
            changed[-1][second] = replace(other, **{field: getattr(one, field)})
    options = {"color": tuple(COLORS), "shape": SHAPES, "size": SIZES}
    if len(items) == 1:
        options["place"] = PLACES
    for position, item in enumerate(items):
        for field, words in options.items():
            other_words = [word for word in words if word != getattr(item, field)]
            changed.append(list(items))
            changed[-1][position] = replace(item, **{field: draws.choice(other_words)})
    return [wrong for wrong in changed if frozenset(wrong) != frozenset(items)]


def hard_negatives(scene: Scene) -> list[str]:
    """Full captions that are false of the scene in one thing.

    Swapped colours, shapes, sizes or places of two objects, and one object's colour, shape, size or place changed.
    Which other word is taken depends on (seed, index) alone.
    """
    draws = _Draws(scene.seed, scene.split, scene.index, purpose=2)
    changed = _one_thing_changed(scene, draws)
    return list(dict.fromkeys(draws.choice(_full_captions(wrong)) for wrong in changed))


def negative_caption(scene: Scene) -> str:
    """One caption like those of `hard_negatives`, by (seed, index)."""
    draws = _Draws(scene.seed, scene.split, scene.index, purpose=3)
    return draws.choice(_full_captions(draws.choice(_one_thing_changed(scene, draws))))


def parse_caption(text: str) -> tuple[WantedObject, ...]:
    """What a caption asks for: its objects, from left to right and top to bottom where it names places.

    Raises:
        ValueError: The text is not one of the templates.
    """
    plain = " ".join(text.lower().strip().rstrip(".").split())
    for opening in _OPENINGS:
        plain = plain.removeprefix(opening)
    skeleton = _OBJECT.sub("@", plain)
    if skeleton not in _TEMPLATES:
        raise ValueError(
            f"`parse_caption` does not understand {text!r} (read as {skeleton!r} with @ for objects). "
            f"Objects are '[a] [{'|'.join(SIZES)}] <color> <shape>' with the colors {', '.join(COLORS)} "
            f"and the shapes {', '.join(SHAPES)}; templates: {'; '.join(_TEMPLATES)}."
        )
    found = [
        WantedObject(match[3], match[2], match[1], place)
        for match, place in zip(_OBJECT.finditer(plain), _TEMPLATES[skeleton], strict=True)
    ]
    order = ("left", "top", "center", "bottom left", "bottom", "right", "bottom right", None)
    return tuple(sorted(found, key=lambda item: order.index(item.place)))


def balanced_prompts(num_prompts: int = 256, seed: int = 0) -> list[tuple[str, tuple[WantedObject, ...]]]:
    """Canonical prompts with what they ask for: one object and two objects by turns.

    Shapes and colours (together), and sizes and places (together), each occur equally often up to the remainder.
    """
    if num_prompts < 1:
        raise ValueError(f"`num_prompts` must be at least 1, but is {num_prompts}.")
    uniforms = np.random.Generator(np.random.Philox(key=(seed % 2**64) << 64 | 0x70726F6D707473))

    def blocks(options: Sequence[Any], count: int) -> list[Any]:
        """Shuffled copies of the options, one after the other, cut to `count`."""
        drawn: list[Any] = []
        while len(drawn) < count:
            drawn += [options[position] for position in np.argsort(uniforms.random(len(options)), kind="stable")]
        return drawn[:count]

    colors = tuple(COLORS)
    names = list(itertools.product(SHAPES, colors))
    num_two = num_prompts // 2
    one = [
        _fill(f"@ {_ONE_PLACE_WORDS[place]}", [WantedObject(shape, color, size, place)])
        for (shape, color), (size, place) in zip(
            blocks(names, num_prompts - num_two),
            blocks(list(itertools.product(SIZES, PLACES)), num_prompts - num_two),
            strict=True,
        )
    ]
    relations = [template for template, places in _CANONICAL.items() if len(places) == 2]
    settings = blocks(list(itertools.product(relations, SIZES, SIZES)), num_two)
    first_names, second_names = blocks(names, num_two), blocks(names, num_two)
    two = []
    for first, second, (template, first_size, second_size) in zip(first_names, second_names, settings, strict=True):
        if first == second:  # the same thing twice is no scene of this data set: take the next colour
            second = (second[0], colors[(colors.index(second[1]) + 1) % len(colors)])
        items = [WantedObject(first[0], first[1], first_size), WantedObject(second[0], second[1], second_size)]
        two.append(_fill(template, items))
    mixed = [prompt for pair in itertools.zip_longest(one, two) for prompt in pair if prompt is not None]
    return [(prompt, parse_caption(prompt)) for prompt in mixed]


# ---------------------------------------------------------------------------------------------------------------------
# other annotations


def label(scene: Scene) -> int:
    """Class of the object with the largest box, an index into `CLASS_NAMES`."""
    largest = max(scene.objects, key=lambda item: (item.box[2] - item.box[0]) * (item.box[3] - item.box[1]))
    return CLASS_NAMES.index(largest.name)


def semantic_map(scene: Scene, resolution: int = 64) -> np.ndarray:
    """Class of each pixel: uint8 (h, w), 0 for the ground and 1 + the index into `SHAPES` for objects."""
    _check_resolution(resolution)
    classes = np.zeros((resolution, resolution), dtype=np.uint8)
    for item in scene.objects:
        rows, columns, distance = _patch(item, resolution)
        classes[rows, columns][distance >= 0] = 1 + SHAPES.index(item.shape)
    return classes


def sketch(scene: Scene, resolution: int = 64, *, line_width: float | None = None) -> np.ndarray:
    """Outlines: uint8 (h, w), white lines on black.

    Args:
        line_width: In pixels; by default resolution / 64, but at least 1.
    """
    _check_resolution(resolution)
    half = 0.5 * (max(1.0, resolution / 64) if line_width is None else line_width)
    lines = np.zeros((resolution, resolution), dtype=np.float32)
    for item in scene.objects:
        rows, columns, distance = _patch(item, resolution)
        # the line lies just inside the outline, so that it never leaves the object's box
        stroke = np.clip(half + 0.5 - np.abs(distance - half), 0, 1)
        np.maximum(lines[rows, columns], stroke, out=lines[rows, columns])
    return np.round(lines * 255).astype(np.uint8)


def depth_and_normals(scene: Scene, resolution: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Nearness and surface normals, as if the objects were rounded reliefs on a wall.

    A circle becomes a half sphere and a ring a half torus; the other shapes get rounded edges.

    Returns:
        Nearness, float32 (h, w) in [0, 1] (0 = the wall), and unit normals, float32 (h, w, 3): x right, y down,
        z towards the viewer (the wall is 0, 0, 1).
    """
    _check_resolution(resolution)
    nearness = np.zeros((resolution, resolution), dtype=np.float32)
    normals = np.zeros((resolution, resolution, 3), dtype=np.float32)
    normals[..., 2] = 1
    for item in scene.objects:
        rows, columns, distance = _patch(item, resolution)
        radius = 0.5 * item.diameter * resolution
        bevel = {"circle": 1.0, "ring": 0.5 * 1.04 * (1 - RING_HOLE)}.get(item.shape, 0.3) * radius
        # profile of a quarter circle: height(d) = sqrt(b^2 - (b - d)^2), slope (b - d) / height
        rest = bevel - np.clip(distance, 0, bevel)
        height = np.sqrt(np.maximum(bevel * bevel - rest * rest, 1e-6))
        gradient_y, gradient_x = np.gradient(distance)
        slope = rest / height
        normal = np.stack((-slope * gradient_x, -slope * gradient_y, np.ones_like(slope)), axis=-1)
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        inside = distance >= 0
        nearness[rows, columns][inside] = (height[inside] / (0.28 * resolution)).clip(0, 1)
        normals[rows, columns][inside] = normal[inside]
    return nearness, normals


def metres_and_normals(scene: Scene, resolution: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """`depth_and_normals` in the units of a depth camera: a wall `WALL_METRES` away, nearness 1 is one metre away.

    Returns:
        Metres, float32 (h, w), and the unit normals, float32 (h, w, 3).
    """
    nearness, normals = depth_and_normals(scene, resolution)
    return WALL_METRES - (WALL_METRES - 1) * nearness, normals


def metres_of_nearness(nearness: np.ndarray) -> np.ndarray:
    """Metres, float32, of the column "depth": nearness as 8-bit grey, white one metre away, black the wall."""
    return WALL_METRES - (WALL_METRES - 1) * nearness.astype(np.float32) / 255


def boxes(scene: Scene) -> list[tuple[str, tuple[float, float, float, float]]]:
    """(name such as "red circle", (x0, y0, x1, y1) as fractions of the side) for each object."""
    return [(item.name, item.box) for item in scene.objects]


# ---------------------------------------------------------------------------------------------------------------------
# as a data set, and as a folder


def _normal_picture(scene: Scene, resolution: int) -> Image.Image:
    return Image.fromarray(np.round((depth_and_normals(scene, resolution)[1] * 0.5 + 0.5) * 255).astype(np.uint8))


_COLUMNS = {
    "image": lambda scene, resolution: Image.fromarray(render(scene, resolution)),
    "text": lambda scene, resolution: choose_caption(scene),
    "full_text": lambda scene, resolution: full_caption(scene),
    "negative_text": lambda scene, resolution: negative_caption(scene),
    "negative_texts": lambda scene, resolution: hard_negatives(scene),
    "label": lambda scene, resolution: label(scene),
    "class_name": lambda scene, resolution: CLASS_NAMES[label(scene)],
    "semantic": lambda scene, resolution: Image.fromarray(semantic_map(scene, resolution)),
    "sketch": lambda scene, resolution: Image.fromarray(sketch(scene, resolution)),
    "depth": lambda scene, resolution: Image.fromarray(
        np.round(depth_and_normals(scene, resolution)[0] * 255).astype(np.uint8)
    ),
    "normal": _normal_picture,
    "metres": lambda scene, resolution: metres_and_normals(scene, resolution)[0],
    "normals": lambda scene, resolution: metres_and_normals(scene, resolution)[1],
    "boxes": lambda scene, resolution: [list(box) for _, box in boxes(scene)],
    "box_names": lambda scene, resolution: [name for name, _ in boxes(scene)],
    "index": lambda scene, resolution: scene.index,
}
COLUMNS = tuple(_COLUMNS)
TEXT_COLUMNS = ("text", "full_text", "negative_text", "negative_texts", "class_name")  # those that hold captions
LABEL_COLUMN = "label"  # the one that holds classes
DEFAULT_COLUMNS = ("image", "text", "full_text", "negative_text", "label", "index")


@dataclass(frozen=True)
class _RenderRows:
    """The data set's transform: replaces the scene numbers in every column by what the column names."""

    seed: int
    split: str
    resolution: int
    num_objects: int | None
    mixture: tuple[float, ...]
    grounds: tuple[str, ...]

    def scene(self, index: int) -> Scene:
        return sample_scene(
            self.seed,
            index,
            split=self.split,
            num_objects=self.num_objects,
            mixture=self.mixture,
            grounds=self.grounds,
        )

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        numbers = next(iter(batch.values()), [])
        scenes = [self.scene(int(number)) for number in numbers]
        return {name: [_COLUMNS[name](scene, self.resolution) for scene in scenes] for name in batch}


def load_scenes(
    num_samples: int,
    *,
    resolution: int = 64,
    seed: int = 0,
    split: str = "train",
    columns: Sequence[str] = DEFAULT_COLUMNS,
    num_objects: int | None = None,
    mixture: Sequence[float] = DEFAULT_MIXTURE,
    grounds: Sequence[str] = GROUNDS,
) -> Dataset:
    """Scenes number 0 to `num_samples` - 1 as a `datasets.Dataset`, rendered when a row is read.

    Args:
        resolution: Side of the pictures, in pixels.
        columns: Any of `COLUMNS`. "image", "semantic" (mode L, class ids), "sketch", "depth" (mode L) and "normal"
            (RGB, (n + 1) / 2) are PIL pictures, "metres" (h, w) and "normals" (h, w, 3) float32 arrays, "text",
            "full_text", "negative_text" and "class_name" strings, "negative_texts" a list of strings, "label" and
            "index" integers, "boxes" a list of (x0, y0, x1, y1) with names in "box_names".
        seed, split, num_objects, mixture, grounds: As in `sample_scene`.

    The table behind it holds only scene numbers (in every column), so it is built at once and pickles small.
    `select`, `shuffle`, `train_test_split` and `remove_columns` work; use `write_scenes` before `map` or
    `save_to_disk`, which store what a row shows under the transform.
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ImportError('`load_scenes` needs datasets: pip install datasets (extra "train")') from error
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, but is {num_samples}.")
    _check_resolution(resolution)
    unknown = [name for name in columns if name not in _COLUMNS]
    if unknown or not columns:
        raise ValueError(f"`columns` must name some of {', '.join(COLUMNS)}, but is {list(columns)!r}.")
    rows = _RenderRows(seed, split, resolution, num_objects, tuple(mixture), tuple(grounds))
    rows.scene(0)  # so that a wrong option is an error here, not at the first row
    numbers = np.arange(num_samples)
    return Dataset.from_dict({name: numbers for name in columns}).with_transform(rows)


def write_scenes(
    folder: str | os.PathLike[str],
    num_samples: int,
    *,
    resolution: int = 64,
    seed: int = 0,
    split: str = "train",
    num_objects: int | None = None,
    mixture: Sequence[float] = DEFAULT_MIXTURE,
    grounds: Sequence[str] = GROUNDS,
    extra_pictures: Sequence[str] = (),
) -> Path:
    """Writes scenes as a user's folder: PNG files and `metadata.jsonl` (file_name, text, full_text, label ...).

    Args:
        folder: Created if missing; must not hold a `metadata.jsonl` already.
        extra_pictures: Any of "semantic", "sketch", "depth", "normal", "metres", "normals": written to subfolders of
            that name, the last two as .npy files, and named in the columns `<kind>_file_name`. What is a picture there
            is decoded by `datasets` too.

    Returns:
        The folder.
    """
    pictures = ("semantic", "sketch", "depth", "normal", "metres", "normals")
    unknown = [kind for kind in extra_pictures if kind not in pictures]
    if unknown:
        raise ValueError(f"`extra_pictures` must name some of {', '.join(pictures)}, but is {list(extra_pictures)!r}.")
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1, but is {num_samples}.")
    folder = Path(folder)
    if (folder / "metadata.jsonl").exists():
        raise ValueError(f"`folder` {str(folder)!r} already holds a metadata.jsonl: name another or remove it first.")
    for name in ("", *extra_pictures):
        (folder / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(num_samples):
        scene = sample_scene(seed, index, split=split, num_objects=num_objects, mixture=mixture, grounds=grounds)
        file_name = f"{index:06d}.png"
        Image.fromarray(render(scene, resolution)).save(folder / file_name)
        entry: dict[str, Any] = {"file_name": file_name}
        for kind in extra_pictures:
            value, extra_name = _COLUMNS[kind](scene, resolution), f"{kind}/{file_name}"
            if isinstance(value, np.ndarray):
                extra_name = f"{kind}/{index:06d}.npy"
                np.save(folder / extra_name, value)
            else:
                value.save(folder / extra_name)
            entry[f"{kind}_file_name"] = extra_name
        for name in ("text", "full_text", "negative_text", "label", "class_name", "boxes", "box_names"):
            entry[name] = _COLUMNS[name](scene, resolution)
        lines.append(json.dumps(entry))
    # written last, so that a folder with metadata is a complete one
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def main(arguments: Sequence[str] | None = None, prog: str = "python -m diffusers_ext.data.scenes") -> None:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write pictures of the built-in data set as an image folder with metadata.jsonl.",
        allow_abbrev=False,
    )
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--resolution", type=int, default=64, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--num_objects", type=int, choices=(1, 2, 3), default=None, help="default: one or two")
    parser.add_argument(
        "--extra_pictures", nargs="*", default=(), help="semantic, sketch, depth, normal, metres, normals"
    )
    options = parser.parse_args(arguments)
    folder = write_scenes(
        options.output_dir,
        options.num_samples,
        resolution=options.resolution,
        seed=options.seed,
        split=options.split,
        num_objects=options.num_objects,
        extra_pictures=options.extra_pictures,
    )
    print(f"{options.num_samples} pictures with captions in {folder}")


if __name__ == "__main__":
    main()
