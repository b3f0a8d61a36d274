"""Does every mode of Paella do what it says? A grid to look at and an automatic check for each, on a small checkpoint.

    python benchmarks/quality_paella_modes.py --num_cases 64 --grid_dir modes

Sources are true pictures of held-out `scenes`; results are read by the verifier. "Chance" judges the same results by
what another case asked for. Kept tokens are compared one by one: any that differs is a failure, and the exit status
says so. The seam of in- and outpainting is the size of steps where kept and drawn meet, over that elsewhere.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder is read; nothing is looked up

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

from diffusers_ext.data.scenes import COLORS, SHAPES, Scene, full_caption, parse_caption, render, sample_scene
from diffusers_ext.data.scenes_verifier import check, read_picture
from diffusers_ext.evaluation.prompt_following import Share, share
from diffusers_ext.models.token_codec import decode_indices, encode_indices
from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline
from diffusers_ext.pipelines.paella.pipeline_paella_image_variation import PaellaImageVariationPipeline
from diffusers_ext.pipelines.paella.pipeline_paella_img2img import PaellaImg2ImgPipeline
from diffusers_ext.pipelines.paella.pipeline_paella_inpaint import PaellaInpaintPipeline

IMAGE_ADAPTER = "image_adapter"  # LoRA matrices inside a text checkpoint
CHROMA = 40  # of 255: what counts as an object's pixel against the muted grounds
Row = tuple[str, Share | float, Share | float | None]  # what is measured, its value, the level of chance


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", default="checkpoints/paella-scenes-64", help="pipeline folder")
    parser.add_argument(
        "--variation_checkpoint",
        help="pipeline fine-tuned on image vectors; default: the checkpoint with its image_adapter, if it has one",
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: all that the checkpoints allow")
    parser.add_argument("--num_cases", type=int, default=64)
    parser.add_argument("--num_inference_steps", type=int, default=12)
    parser.add_argument("--strength", type=float, default=0.5, help="of structural editing")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--grid_dir", help="folder for one PNG a mode")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(arguments)
    for name in ("num_cases", "batch_size", "num_inference_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, received {getattr(args, name)}")
    if args.num_cases < 2:
        parser.error("--num_cases must be at least 2: chance compares each case with another")
    for folder in filter(None, (args.checkpoint, args.variation_checkpoint)):
        if not (Path(folder) / "model_index.json").is_file():
            parser.error(f"{folder!r} is no pipeline folder: it holds no model_index.json")
    varies = args.variation_checkpoint is not None or (Path(args.checkpoint) / IMAGE_ADAPTER).is_dir()
    if "variation" in (args.modes or ()) and not varies:
        parser.error(
            f"--modes variation needs --variation_checkpoint, a pipeline fine-tuned on image vectors, or a folder "
            f"{IMAGE_ADAPTER!r} in the checkpoint"
        )
    args.modes = args.modes or [mode for mode in MODES if mode != "variation" or varies]
    return args


class Bench:
    """The pipelines around one set of components, and how they are called in batches."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.pipe = PaellaPipeline.from_pretrained(args.checkpoint, dtype=torch.float32).to(args.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.side = self.pipe.config.default_sample_size * self.pipe.vae_scale_factor

    def scenes(self, num_objects: int) -> list[Scene]:
        return [
            sample_scene(self.args.seed, i, split="test", num_objects=num_objects, grounds=("plain",))
            for i in range(self.args.num_cases)
        ]

    def render(self, scenes: list[Scene]) -> list[Image.Image]:
        return [Image.fromarray(render(scene, self.side)) for scene in scenes]

    def run(self, pipe: Any, prompts: list[str] | None, **lists: Any) -> torch.Tensor:
        """Tokens `(n, h, w)`; lists and tensors are cut into batches like the prompts, the rest goes to every call."""
        options = {name: value for name, value in lists.items() if not isinstance(value, (list, torch.Tensor))}
        lists = {name: value for name, value in lists.items() if isinstance(value, (list, torch.Tensor))}
        if prompts is not None:
            lists["prompt"] = prompts
        pipe.set_progress_bar_config(disable=True)
        count, drawn = self.args.num_cases, []
        for start in range(0, count, self.args.batch_size):
            stop = min(start + self.args.batch_size, count)
            generators = [
                torch.Generator(self.args.device).manual_seed(1000 * self.args.seed + i) for i in range(start, stop)
            ]
            batch = {name: value[start:stop] for name, value in lists.items()}
            drawn.append(pipe(generator=generators, output_type="latent", **batch, **options).images)
        return torch.cat(drawn)

    def encode(self, pictures: list[Image.Image]) -> torch.Tensor:
        """The pictures' tokens. They are handed over in place of the pictures where kept tokens are counted: a second
        encoding may fall the other way at a near tie, in the last bits of a float."""
        pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
        parts = (pixels.to(self.args.device) / 127.5 - 1).split(self.args.batch_size)
        with torch.no_grad():
            return torch.cat([encode_indices(self.pipe.vqvae, part) for part in parts])

    def decode(self, tokens: torch.Tensor) -> list[np.ndarray]:
        with torch.no_grad():
            pixels = torch.cat([decode_indices(self.pipe.vqvae, part) for part in tokens.split(64)]).clamp(-1, 1)
        return list(((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())


def followed(pictures: list[np.ndarray], captions: list[str]) -> tuple[Share, Share]:
    """Share whose shapes and colours are those of the caption, and the same against the next case's caption."""
    found = [read_picture(picture) for picture in pictures]
    wanted = [parse_caption(caption) for caption in captions]
    other = wanted[1:] + wanted[:1]
    right = share(check(*pair)[0] for pair in zip(found, wanted, strict=True))
    return right, share(check(*pair)[0] for pair in zip(found, other, strict=True))


def renamed(scene: Scene, number: int) -> Scene:
    """The scene with object `number` in another shape and another colour."""
    item = scene.objects[number]
    shapes = [name for name in SHAPES if name not in {one.shape for one in scene.objects}]
    colors = [name for name in COLORS if name not in {one.color for one in scene.objects}]
    color = colors[scene.index % len(colors)]
    new = dataclasses.replace(item, shape=shapes[scene.index % len(shapes)], color=color, rgb=COLORS[color])
    objects = tuple(new if i == number else one for i, one in enumerate(scene.objects))
    return dataclasses.replace(scene, objects=objects)


def inpaint(bench: Bench) -> tuple[list[Row], list[list]]:
    """One of two objects is painted over with another one; the mask is its side of the gap between the two."""
    scenes = bench.scenes(2)
    pictures, targets, masks = bench.render(scenes), [renamed(scene, scene.index % 2) for scene in scenes], []
    for scene in scenes:
        axis = 0 if scene.objects[0].place == "left" else 1
        middle = (scene.objects[0].box[2 + axis] + scene.objects[1].box[axis]) / 2 * bench.side
        inside = np.arange(bench.side) < round(middle)
        inside = inside if scene.index % 2 == 0 else ~inside
        mask = np.broadcast_to(inside[None, :] if axis == 0 else inside[:, None], (bench.side, bench.side))
        masks.append(Image.fromarray((255 * mask).astype(np.uint8)))
    prompts = [full_caption(target) for target in targets]
    pipe = PaellaInpaintPipeline.from_pipe(bench.pipe)
    steps = bench.args.num_inference_steps
    known = bench.encode(pictures)
    tokens = bench.run(pipe, prompts, image=known, mask_image=masks, num_inference_steps=steps)
    factor = bench.pipe.vae_scale_factor
    kept = torch.stack([torch.from_numpy(np.asarray(mask) == 0) for mask in masks])
    kept = kept.unflatten(2, (-1, factor)).unflatten(1, (-1, factor)).all(dim=4).all(dim=2)  # all pixels of a token
    same = (tokens.cpu() == known.cpu()) | ~kept
    results = bench.decode(tokens)
    right, chance = followed(results, prompts)
    rows: list[Row] = [
        ("pictures whose kept tokens are unchanged", share(same.flatten(1).all(dim=1).tolist()), None),
        ("both objects, the new and the kept one, right", right, chance),
    ]
    return rows, [pictures, masks, results]


def beside(scenes: list[Scene]) -> list[str]:
    """Captions of pictures twice as wide, with another object to the right."""
    named = [(scene.objects[0], renamed(scene, 0).objects[0]) for scene in scenes]
    return [f"a {old.size} {old.name} to the left of a {new.size} {new.name}" for old, new in named]


def outpaint(bench: Bench) -> tuple[list[Row], list[list]]:
    """A picture is continued to the right, on a canvas of twice its width, in one pass."""
    scenes = bench.scenes(1)
    pictures, other = bench.render(scenes), [renamed(scene, 0) for scene in scenes]
    prompts = beside(scenes)
    pipe, steps = PaellaInpaintPipeline.from_pipe(bench.pipe), bench.args.num_inference_steps
    size = {"height": bench.side, "width": 2 * bench.side, "position": (0, 0)}
    known = bench.encode(pictures)
    tokens = bench.run(pipe, prompts, image=known, num_inference_steps=steps, **size)
    half = tokens.shape[2] // 2
    same = (tokens[:, :, :half] == known).flatten(1).all(dim=1)
    results = bench.decode(tokens)
    right, chance = followed(
        [one[:, bench.side :] for one in results], [f"a {target.objects[0].name}" for target in other]
    )
    rows: list[Row] = [
        ("pictures whose kept tokens are unchanged", share(same.tolist()), None),
        ("new object right in the new half", right, chance),
    ]
    return rows, [pictures, results]


def join_ratio(pictures: list[np.ndarray], masks: list[np.ndarray]) -> float:
    """How large the steps from pixel to pixel are where kept and drawn meet, over those elsewhere; 1 without a seam.

    Args:
        pictures: (h, w, 3) each.
        masks: bool (h, w) each, of what was drawn.
    """
    at_join, elsewhere = [], []
    for picture, mask in zip(pictures, masks, strict=True):
        for axis in range(2):
            steps = np.abs(np.diff(picture.astype(np.float32), axis=axis)).mean(axis=2)
            meets = np.diff(mask, axis=axis)
            at_join.append(steps[meets])
            elsewhere.append(steps[~meets])
    return float(np.concatenate(at_join).mean() / np.concatenate(elsewhere).mean())


def seam(bench: Bench) -> tuple[list[Row], list[list]]:
    """Where kept and drawn meet, the picture given as pixels; beside it given as tokens of the picture by itself.

    A hole is the box of the object, which another one replaces, and some ground around it.
    """
    scenes = bench.scenes(1)
    pictures = bench.render(scenes)
    side = bench.side
    pipe = PaellaInpaintPipeline.from_pipe(bench.pipe)
    around = np.broadcast_to(np.arange(2 * side) >= side, (side, 2 * side))
    holes = []
    for scene in scenes:
        left, top, right, bottom = (round(side * edge) for edge in scene.objects[0].box)
        hole, margin = np.zeros((side, side), dtype=bool), side // 16
        hole[max(top - margin, 0) : bottom + margin, max(left - margin, 0) : right + margin] = True
        holes.append(hole)
    ways: dict[str, tuple[dict[str, Any], list[np.ndarray]]] = {
        "outpainting": (
            {"prompts": beside(scenes), "height": side, "width": 2 * side, "position": (0, 0)},
            [around] * len(pictures),
        ),
        "inpainting": (
            {
                "prompts": [full_caption(renamed(scene, 0)) for scene in scenes],
                "mask_image": [Image.fromarray(hole) for hole in holes],
            },
            holes,
        ),
    }
    rows: list[Row] = []
    columns: list[list] = [pictures]
    for name, (options, masks) in ways.items():
        ratios = []
        for source in (pictures, bench.encode(pictures)):
            options = {**options, "num_inference_steps": bench.args.num_inference_steps}
            results = bench.decode(bench.run(pipe, image=source, **options))
            ratios.append(join_ratio(results, masks))
            columns.append(results)
        rows.append((f"{name}: step at the join / elsewhere (beside: of tokens)", ratios[0], ratios[1]))
    return rows, columns


def edit(bench: Bench) -> tuple[list[Row], list[list]]:
    """Structural editing: another colour, the same structure."""
    scenes = bench.scenes(1)
    pictures, targets = bench.render(scenes), []
    for scene in scenes:
        colors = [name for name in COLORS if name != scene.objects[0].color]
        item = dataclasses.replace(scene.objects[0], color=colors[scene.index % len(colors)])
        targets.append(dataclasses.replace(scene, objects=(item,)))
    prompts = [full_caption(target) for target in targets]
    pipe = PaellaImg2ImgPipeline.from_pipe(bench.pipe)
    tokens = bench.run(
        pipe,
        prompts,
        image=pictures,
        strength=bench.args.strength,
        num_inference_steps=2 * bench.args.num_inference_steps,
    )
    results = bench.decode(tokens)
    before, after = (np.stack([object_map(one) for one in some]) for some in (pictures, results))
    own, other = correlation(before, after), correlation(np.roll(before, -1, axis=0), after)
    found = [read_picture(one) for one in results]
    colored = [bool(items) and items[0].color == t.objects[0].color for items, t in zip(found, targets, strict=True)]
    shifted = targets[1:] + targets[:1]
    chance = [bool(items) and items[0].color == t.objects[0].color for items, t in zip(found, shifted, strict=True)]
    rows: list[Row] = [
        ("correlation of the object's place with the source (chance: with another source)", own, other),
        ("colour of the prompt", share(colored), share(chance)),
    ]
    return rows, [pictures, results]


def object_map(picture: Any) -> np.ndarray:
    pixels = np.asarray(picture).astype(int)
    return (pixels.max(axis=-1) - pixels.min(axis=-1) > CHROMA).astype(float)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Mean over the pairs of pictures; a picture without objects counts 0."""
    values = []
    for a, b in zip(first, second, strict=True):
        a, b = a - a.mean(), b - b.mean()
        norm = np.sqrt((a * a).sum() * (b * b).sum())
        values.append((a * b).sum() / norm if norm > 0 else 0.0)
    return float(np.mean(values))


def interpolate(bench: Bench) -> tuple[list[Row], list[list]]:
    """From one prompt to another in five frames, one noise for all."""
    scenes = bench.scenes(1)
    ends = [(full_caption(scene), full_caption(renamed(scene, 0))) for scene in scenes]
    frames: list[list[np.ndarray]] = []
    for number, prompts in enumerate(ends):
        images = bench.pipe.interpolate(
            list(prompts),
            num_frames=5,
            interpolation="slerp",
            num_inference_steps=bench.args.num_inference_steps,
            generator=torch.Generator(bench.args.device).manual_seed(1000 * bench.args.seed + number),
            output_type="np",
        ).images
        frames.append(list((images * 255).round().astype(np.uint8)))
    rows: list[Row] = []
    for name, position in (("first", 0), ("last", -1)):
        right, chance = followed([one[position] for one in frames], [pair[position] for pair in ends])
        rows.append((f"{name} frame follows its prompt", right, chance))
    return rows, [list(column) for column in zip(*frames, strict=True)]


def regions(bench: Bench) -> tuple[list[Row], list[list]]:
    """Two prompts in one picture, each in its own half."""
    scenes, pairs = bench.scenes(1), []
    for scene in scenes:
        left, right = scene.objects[0], renamed(scene, 0).objects[0]
        pairs.append([f"a small {left.name} on the left", f"a small {right.name} on the right"])
    embeds = [bench.pipe.encode_regions(pair, "columns", height=bench.side, width=bench.side) for pair in pairs]
    steps = bench.args.num_inference_steps
    results = bench.decode(bench.run(bench.pipe, None, prompt_embeds=torch.cat(embeds), num_inference_steps=steps))
    right, chance = followed(results, [f"{first} and {second}" for first, second in named(pairs)])
    rows: list[Row] = [("both objects right", right, chance)]
    for number, name in enumerate(("left", "right")):
        colors = [largest_color(one, number / 2, (number + 1) / 2) for one in results]
        wanted = [parse_caption(pair[number])[0].color for pair in pairs]
        own = share(one == other for one, other in zip(colors, wanted, strict=True))
        rows.append((f"{name} half in its own colour", own, share(map(str.__eq__, colors, wanted[1:] + wanted[:1]))))
    return rows, [results]


def named(pairs: list[list[str]]) -> list[list[str]]:
    """The prompts without size and place."""
    return [[f"a {parse_caption(prompt)[0].name}" for prompt in pair] for pair in pairs]


def largest_color(picture: np.ndarray, left: float, right: float) -> str:
    """Colour of the largest object between two fractions of the width; empty without one."""
    return next((item.color for item in read_picture(picture) if left <= item.center[0] < right), "")


def variation(bench: Bench) -> tuple[list[Row], list[list]]:
    """Other pictures of what a picture shows, from its CLIP image vector alone."""
    scenes = bench.scenes(1)
    pictures = bench.render(scenes)
    folder = bench.args.variation_checkpoint or bench.args.checkpoint
    pipe = PaellaImageVariationPipeline.from_pretrained(folder, dtype=torch.float32).to(bench.args.device)
    if bench.args.variation_checkpoint is None:
        weights = f"{folder}/{IMAGE_ADAPTER}/pytorch_lora_weights.safetensors"
        pipe.load_lora_weights(weights)
    steps = bench.args.num_inference_steps
    results = bench.decode(bench.run(pipe, None, image=pictures, num_inference_steps=steps))
    right, chance = followed(results, [f"a {scene.objects[0].name}" for scene in scenes])
    return [("shape and colour kept", right, chance)], [pictures, results]


MODES: dict[str, Callable[[Bench], tuple[list[Row], list[list]]]] = {
    "inpaint": inpaint,
    "outpaint": outpaint,
    "seam": seam,
    "edit": edit,
    "interpolate": interpolate,
    "regions": regions,
    "variation": variation,
}


def draw_grid(columns: list[list], shown: int = 8, scale: int = 2, gap: int = 6) -> Image.Image:
    """One line a case: source, mask and result, or the frames, side by side."""
    lines = [[Image.fromarray(np.asarray(column[i])).convert("RGB") for column in columns] for i in range(shown)]
    width = sum(one.width * scale + gap for one in lines[0]) + gap
    height = lines[0][0].height * scale + gap
    sheet = Image.new("RGB", (2 * width, height * ((shown + 1) // 2) + gap), "white")
    for number, line in enumerate(lines):
        x, y = gap + number % 2 * width, gap + number // 2 * height
        for one in line:
            sheet.paste(one.resize((one.width * scale, one.height * scale), Image.Resampling.NEAREST), (x, y))
            x += one.width * scale + gap
    return sheet


def as_number(value: Share | float | None) -> Any:
    if isinstance(value, Share):
        return {"value": value.value, "standard_error": value.standard_error, "count": value.count}
    return value


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    bench, figures, broken = Bench(args), {}, False
    print(f"{Path(args.checkpoint).name}: {args.num_cases} cases a mode, {args.num_inference_steps} steps\n")
    print("| mode | measured | value | chance |\n|---|---|---|---|")
    for mode in args.modes:
        print(mode, file=sys.stderr)
        rows, columns = MODES[mode](bench)
        for name, value, chance in rows:
            shown = [f"{one:.2f}" if isinstance(one, float) else str(one or "-") for one in (value, chance)]
            print(f"| {mode} | {name} | {shown[0]} | {shown[1]} |", flush=True)
            broken |= "unchanged" in name and isinstance(value, Share) and value.successes < value.count
        figures[mode] = [
            {"measured": name, "value": as_number(value), "chance": as_number(chance)} for name, value, chance in rows
        ]
        if args.grid_dir:
            Path(args.grid_dir).mkdir(parents=True, exist_ok=True)
            draw_grid(columns, min(8, args.num_cases)).save(Path(args.grid_dir) / f"{mode}.png")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
