"""The figures of the Versatile Diffusion paper, small: one PNG each, from a checkpoint that learnt `scenes`.

    python benchmarks/quality_versatile_figures.py checkpoints/versatile-scenes-64 --grid_dir figures
    python benchmarks/quality_versatile_figures.py CHECKPOINT --grid_dir figures --figures dual blender

| figure | what it shows (arXiv 2211.08332 and the authors' application, SHI-Labs/Versatile-Diffusion@cf0f4a2) |
|---|---|
| text-to-image, image-to-image, image-to-text, text-to-text | a context and what is made of it, several draws |
| dual | a text and a picture that disagree in shape and colour, from all picture to all text |
| blender | two pictures and a text in one context: weights of the pictures, and one of them read through a mask |
| focus | variations from the meaning of a picture to its style |
| edit | image to text, text edited as a vector, text and picture to image |
| fidelity | variations that start from the noised picture, from far to near |
| colors | variations that are given the colours of the picture |

All cases are held-out scenes. Shares of what is right in them: benchmarks/quality_versatile_flows.py.
"""

import argparse
import dataclasses
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from parts.versatile_bench import Bench, add_options, check_options, dual_cases
from PIL import Image, ImageDraw, ImageFont

from diffusers_ext.data.scenes import COLORS, SHAPES, Scene, balanced_prompts, full_caption
from diffusers_ext.evaluation.prompt_following import case_generators

Cell = Image.Image | np.ndarray | str  # a picture, or a text in its place
Columns = Sequence[Sequence[Cell]]
Figure = tuple[list[str], Columns]  # headings of the columns, and the columns
CELL = 112  # pixels of a cell's side

NEEDS = {
    "dual": ["text-to-image", "image-to-image"],
    "blender": ["text-to-image", "image-to-image"],
    "focus": ["image-to-image"],
    "edit": ["image-to-text", "text-to-image", "image-to-image"],
    "fidelity": ["image-to-image"],
    "colors": ["image-to-image"],
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_options(parser)
    parser.add_argument("--grid_dir", required=True, help="folder for one PNG a figure")
    parser.add_argument("--figures", nargs="+", choices=FIGURES, help="default: all that the checkpoint can make")
    parser.add_argument("--num_cases", type=int, default=6, help="rows of each figure")
    parser.add_argument("--num_draws", type=int, default=4, help="samples of each case in the figures of one flow")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    check_options(parser, args, num_cases=1, num_draws=1)
    return args


def one_flow(bench: Bench, flow: str) -> Figure:
    context, data = flow.split("-to-")
    prompts = [prompt for prompt, _ in balanced_prompts(bench.args.num_cases, seed=1)]
    cases: list[Any] = prompts if context == "text" else bench.render(bench.scenes(bench.args.num_cases))
    name = "prompt" if context == "text" else "image"
    draws = [bench.sample(bench.args.seed + k, data, **{name: cases}) for k in range(bench.args.num_draws)]
    return [context, *[f"{data} {k + 1}" for k in range(len(draws))]], [cases, *draws]


def dual(bench: Bench) -> Figure:
    texts, scenes, _ = dual_cases(bench, bench.args.num_cases)
    pictures = bench.render(scenes)
    both: dict[str, Any] = {"prompt": texts, "image": pictures}
    ratios = [0.0, 0.25, 0.5, 0.75, 1.0]
    columns = [bench.sample(bench.args.seed, **both, text_ratio=ratio) for ratio in ratios]
    layer = bench.sample(bench.args.seed, **both, text_ratio=0.5, mixing="layer")
    heads = ["text", "picture", *[f"text {ratio:g}" for ratio in ratios], "layers, 0.5"]
    return heads, [texts, pictures, *columns, layer]


def blender(bench: Bench) -> Figure:
    """The mask leaves out the half of the first picture that the second object lies in."""
    count = bench.args.num_cases
    texts, second, _ = dual_cases(bench, count)
    first = [scene for scene in bench.scenes(2 * count) if len(scene.objects) == 2]
    pairs = list(zip(bench.render(first), bench.render(second), strict=True))
    masks = [first_object_mask(scene, bench.side) for scene in first]
    seen = [
        Image.fromarray((np.asarray(picture) * np.asarray(mask)[..., None]).astype(np.uint8))
        for (picture, _), mask in zip(pairs, masks, strict=True)
    ]
    images: dict[str, Any] = {"image": [list(pair) for pair in pairs]}
    only = {"image": [[picture] for picture, _ in pairs], "image_masks": [[mask] for mask in masks]}
    seed = bench.args.seed
    columns: dict[str, Sequence[Cell]] = {
        "first": [pair[0] for pair in pairs],
        "second": [pair[1] for pair in pairs],
        "1 and 0.2": bench.sample(seed, **images, image_weights=[1.0, 0.2]),
        "1 and 1": bench.sample(seed, **images, image_weights=[1.0, 1.0]),
        "0.2 and 1": bench.sample(seed, **images, image_weights=[0.2, 1.0]),
        "first, masked": seen,
        "of it alone": bench.sample(seed, **only),
        "and second": bench.sample(seed, **images, image_masks=[[mask, None] for mask in masks]),
        "text": texts,
        "all three": bench.sample(seed, prompt=texts, **images, text_ratio=0.5),
    }
    return list(columns), list(columns.values())


def first_object_mask(scene: Scene, side: int) -> np.ndarray:
    """1 on the first object's side of the gap between two, 0 elsewhere: uint8 (h, w)."""
    one, other = scene.objects
    axis = 0 if one.place == "left" else 1
    inside = np.arange(side) < round((one.box[2 + axis] + other.box[axis]) / 2 * side)
    return np.broadcast_to(inside[None, :] if axis == 0 else inside[:, None], (side, side)).astype(np.uint8)


def levels_of(bench: Bench, name: str, values: list[Any], heads: list[str], num_objects: int | None = None) -> Figure:
    """Variations of pictures under several values of one argument, from the same noise."""
    pictures = bench.render(bench.scenes(bench.args.num_cases, num_objects))
    columns = [bench.sample(bench.args.seed, image=pictures, **{name: value}) for value in values]
    return ["picture", *heads], [pictures, *columns]


def focus(bench: Bench) -> Figure:
    values = [0.0, 0.25, 0.5, 0.75, 1.0]
    return levels_of(bench, "focus", values, ["meaning: 0", "0.25", "all: 0.5", "0.75", "style: 1"])


def fidelity(bench: Bench) -> Figure:
    values = [1.0, 0.75, 0.5, 0.25, 0.0]
    return levels_of(bench, "strength", values, [f"fidelity {1 - value:g}" for value in values])


def colors(bench: Bench) -> Figure:
    return levels_of(bench, "color_adjust", [None, "simple", "histogram"], ["as drawn", "mean, spread", "histogram"])


def edit(bench: Bench) -> Figure:
    """One object of a picture is taken away in words, another one put in its place."""
    scenes, args = bench.scenes(bench.args.num_cases, 1), bench.args
    pictures = bench.render(scenes)
    columns: list[list[Cell]] = [[] for _ in range(4)]
    for i, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        item = scene.objects[0]
        shapes, names = ([word for word in words if word != own]
                         for words, own in ((SHAPES, item.shape), (tuple(COLORS), item.color)))  # fmt: skip
        new = dataclasses.replace(item, shape=shapes[i % len(shapes)], color=names[i % len(names)])
        away, towards = full_caption(scene), full_caption(dataclasses.replace(scene, objects=(new,)))
        generator = case_generators(args.seed, [i], args.device)
        out = bench.pipe.edit_image(
            picture, towards, away, generator=generator, temperature=args.temperature,
            num_inference_steps=args.num_inference_steps, guidance_scale=args.guidance_scale,
        )  # fmt: skip
        for column, cell in zip(columns, (f"- {away}", f"+ {towards}", out.texts[0], out.images[0]), strict=True):
            column.append(cell)
    return ["picture", "away", "towards", "new caption", "edited"], [pictures, *columns]


FIGURES: dict[str, Callable[[Bench], Figure]] = {
    **{
        flow: (lambda bench, flow=flow: one_flow(bench, flow))
        for flow in ("text-to-image", "image-to-image", "image-to-text", "text-to-text")
    },
    "dual": dual,
    "blender": blender,
    "focus": focus,
    "edit": edit,
    "fidelity": fidelity,
    "colors": colors,
}


def draw_figure(heads: list[str], columns: Columns, gap: int = 6) -> Image.Image:
    """One line a case; texts are set in the place of a picture."""
    font, step = ImageFont.load_default(size=12), CELL + gap
    rows = max(map(len, columns))
    sheet = Image.new("RGB", (gap + step * len(columns), 20 + step * rows), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (head, column) in enumerate(zip(heads, columns, strict=True)):
        x = gap + step * number
        draw.text((x, 3), head, fill="black", font=font)
        for row, cell in enumerate(column):
            y = 20 + step * row
            if isinstance(cell, str):
                draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=(240, 240, 240))
                draw.multiline_text((x + 4, y + 4), textwrap.fill(cell, 17), fill="black", font=font)
                continue
            picture = cell if isinstance(cell, Image.Image) else Image.fromarray(cell)
            sheet.paste(picture.convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST), (x, y))
    return sheet


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    bench, folder = Bench(args), Path(args.grid_dir)
    figures = bench.available(list(FIGURES), NEEDS)
    if missing := [name for name in args.figures or () if name not in figures]:
        sys.exit(f"--figures names {', '.join(missing)}; with its flows the checkpoint can make {', '.join(figures)}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.figures or figures:
        draw_figure(*FIGURES[name](bench)).save(folder / f"{name}.png")
        print(folder / f"{name}.png", flush=True)


if __name__ == "__main__":
    main()
