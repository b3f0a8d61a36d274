"""PITI on `scenes`: held-out conditions, the pictures that a checkpoint draws of them, and how well they follow."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffusers_ext import PITIPipeline
from diffusers_ext.data.pictures import scenes_options
from diffusers_ext.data.scenes import SHAPES, SIZES, Scene, metres_and_normals, render, sample_scene, semantic_map
from diffusers_ext.data.scenes import sketch as draw_sketch
from diffusers_ext.data.scenes_verifier import FoundObject, read_picture, read_semantic_map
from diffusers_ext.evaluation.prompt_following import Share, case_generators, share
from diffusers_ext.evaluation.segmentation import mean_iou
from parts.found_boxes import BOX_OVERLAP, box_overlap, found_box, next_case

READ_AT = 64  # pixels a side at least, for the verifier
FIDELITY = {  # of a condition: the figure that stands for all
    "label_map": "mean intersection over union without the ground",
    "sketch": "all shapes right",
    "geometry": "all shapes right",
}
Figures = dict[str, Share | float]


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """What every command of PITI asks for."""
    parser.add_argument("--num_cases", type=int, default=256, help="held-out scenes")
    parser.add_argument("--scenes", default="plain+one", help="grounds, and `one` or `two` objects: as in training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=("base", "upscale"), help="the last one to run; default: all there are")
    parser.add_argument("--num_inference_steps", type=int, help="of the small image; default: the checkpoint's")
    parser.add_argument("--upscale_num_inference_steps", type=int, help="of the large image")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="file for the figures")


def check_sampling_options(parser: argparse.ArgumentParser, args: argparse.Namespace, folders: Sequence[str]) -> None:
    """Ends with a message at a number that is too small, unknown scenes, and a folder without a PITI pipeline."""
    for name, least in (("num_cases", 2), ("batch_size", 1), ("num_inference_steps", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, received {getattr(args, name)}")
    try:
        held_out_scenes(args.scenes, 1)
    except ValueError as error:
        parser.error(f"--scenes: {error}")
    for folder in folders:
        check_folder(parser, folder)


def check_folder(parser: argparse.ArgumentParser, folder: str) -> None:
    """Ends with a message at a folder that holds no PITI pipeline."""
    if not (Path(folder) / "model_index.json").is_file():
        parser.error(f"{folder!r} is no pipeline folder: it holds no model_index.json")
    kind = PITIPipeline.load_config(folder)["_class_name"]
    if kind != PITIPipeline.__name__:
        parser.error(f"{folder!r} holds a {kind}: this command measures a {PITIPipeline.__name__}")


def held_out_scenes(
    configuration: str, count: int, *, split: str = "test", num_objects: int | None = None
) -> list[Scene]:
    """Scenes 0, 1, ... of a split; the configuration is that of a training's `--dataset_config_name`."""
    options = scenes_options(configuration)
    options["num_objects"] = num_objects or options["num_objects"]
    return [sample_scene(0, index, split=split, **options) for index in range(count)]


def condition_of(kind: str, scene: Scene, side: int) -> dict[str, np.ndarray]:
    """A scene as the arguments of `PITIPipeline`, side x side pixels: what train_piti.py reads of `scenes`."""
    if kind == "label_map":
        return {"label_map": semantic_map(scene, side).astype(np.int64)}
    if kind == "sketch":
        return {"sketch": draw_sketch(scene, side)}  # its grey rims are no lines, neither here nor in the training
    metres, normals = metres_and_normals(scene, side)
    return {"normals": normals.transpose(2, 0, 1), "depth": metres}


def load_condition(folder: str) -> PITIPipeline:
    """A whole pipeline, or what lies below its prior and has no U-Net, as in `checkpoints/piti-scenes`."""
    if Path(folder, "unet").is_dir():
        return PITIPipeline.from_pretrained(folder, dtype=torch.float32)
    return PITIPipeline.from_prior(Path(folder).parent, folder, dtype=torch.float32)


def condition_picture(kind: str, condition: dict[str, np.ndarray], palette: np.ndarray) -> Image.Image:
    """A condition for the eye: the map's colours, the lines, or the normals as colours."""
    if kind == "label_map":
        return Image.fromarray(palette[condition["label_map"]])
    if kind == "sketch":
        return Image.fromarray(condition["sketch"]).convert("RGB")
    colours = (condition["normals"].transpose(1, 2, 0) + 1) * 127.5
    return Image.fromarray(colours.round().astype(np.uint8))


class Sampler:
    """A checkpoint, and the pictures that it draws of scenes.

    Args:
        folder: A `PITIPipeline`, or one of the conditions below a prior.
        args: As `add_sampling_options` reads them.

    Raises:
        SystemExit: For a stage that the checkpoint lacks.
    """

    def __init__(self, folder: str, args: argparse.Namespace):
        parts = {}
        if args.stage == "base":
            parts = {f"upscale_{name}": None for name in ("encoder", "unet", "scheduler")}
        self.args = args
        self.pipe: Any = load_condition(folder).to(args.device)
        self.pipe.register_modules(**parts)
        self.pipe.set_progress_bar_config(disable=True)
        if args.stage == "upscale" and not self.pipe.upscales:
            raise SystemExit(f"{folder!r} has no upsampler: leave out --stage upscale")
        self.kind: str = self.pipe.config["condition_type"]

    def conditions(self, scenes: Sequence[Scene]) -> list[dict[str, np.ndarray]]:
        """The scenes as the checkpoint's encoder takes them."""
        return [condition_of(self.kind, scene, self.pipe.encoder.config["sample_size"]) for scene in scenes]

    def draw(self, scenes: Sequence[Scene], guidance_scale: float | None = None, **options: Any) -> Tensor:
        """One picture a scene, (n, 3, h, w) in [0, 1]; each has a generator of its own."""
        args, drawn = self.args, []
        if self.pipe.upscales:
            options["upscale_num_inference_steps"] = args.upscale_num_inference_steps
        options = {"num_inference_steps": args.num_inference_steps, **options}
        for start in range(0, len(scenes), args.batch_size):
            some = self.conditions(scenes[start : start + args.batch_size])
            given = {name: np.stack([one[name] for one in some]) for name in some[0]}
            generator = case_generators(args.seed, range(start, start + len(some)), args.device)
            images = self.pipe(
                **given, guidance_scale=guidance_scale, generator=generator, output_type="pt", **options
            ).images
            drawn.append(images.float().cpu())
            print(f"\r  {start + len(some)}/{len(scenes)} pictures", end="", file=sys.stderr, flush=True)
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
        return torch.cat(drawn)


def true_pictures(scenes: Sequence[Scene], side: int) -> Tensor:
    """(n, 3, side, side) in [0, 1]."""
    return torch.stack([torch.from_numpy(render(scene, side)).permute(2, 0, 1) / 255 for scene in scenes])


def readable(pictures: Tensor) -> list[np.ndarray]:
    """uint8 (h, w, 3) of pictures in [0, 1]; small ones are enlarged for the verifier."""
    if pictures.shape[-1] < READ_AT:
        pictures = F.interpolate(pictures, (READ_AT, READ_AT), mode="bicubic")
    return list((pictures.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def fidelity(kind: str, pictures: Tensor, scenes: Sequence[Scene]) -> Figures:
    """How far pictures (n, 3, h, w) in [0, 1] follow the scenes that their conditions were made of.

    - label maps: the map that the verifier reads against the given one, without the ground
    - "all shapes right": of as many objects as the scene has, the largest ones
    - "recall, large objects", "small": those with one of their shape whose box overlaps theirs by half or more
    - "objects of named shapes": pictures that hold objects, all of them clear, whatever the condition
    """
    arrays = readable(pictures)
    found = [read_picture(array) for array in arrays]
    figures: Figures = {}
    if kind == "label_map":
        maps = [read_semantic_map(array) for array in arrays]
        wanted = [semantic_map(scene, len(one)) for one, scene in zip(maps, scenes, strict=True)]
        figures[FIDELITY[kind]] = mean_iou(maps, wanted, len(SHAPES) + 1, left_out=(0,))
    pairs = list(zip(found, scenes, strict=True))
    figures["all shapes right"] = share(shapes_right(objects, scene) for objects, scene in pairs)
    for size in SIZES:
        hits = [
            recalled(objects, item.shape, item.box)
            for objects, scene in pairs
            for item in scene.objects
            if item.size == size
        ]
        figures[f"recall, {size} objects"] = share(hits)
    figures["objects of named shapes"] = share(bool(some) and all(item.shape for item in some) for some in found)
    return figures


def shapes_right(found: Sequence[FoundObject], scene: Scene) -> bool:
    """Whether the largest found objects, as many as the scene has, are of its shapes."""
    wanted = sorted(item.shape for item in scene.objects)
    return sorted(item.shape or "" for item in found[: len(wanted)]) == wanted


def recalled(found: Sequence[FoundObject], shape: str, box: tuple[float, ...]) -> bool:
    """Whether an object of a shape fills a box (x0, y0, x1, y1), fractions of the side."""
    return any(item.shape == shape and box_overlap(found_box(item), box) >= BOX_OVERLAP for item in found)


def shuffled_fidelity(kind: str, pictures: Tensor, scenes: Sequence[Scene]) -> Figures:
    """The same pictures judged by the next case's scene: what the condition is worth."""
    return fidelity(kind, pictures, next_case(list(scenes)))


def show(value: Share | float) -> str:
    return str(value) if isinstance(value, Share) else f"{value:.3f}"


def as_number(value: Share | float) -> float:
    return value.value if isinstance(value, Share) else float(value)


def as_plain(figures: Figures) -> dict[str, Any]:
    """Figures for a JSON file, shares with their standard errors."""
    return {
        name: {"value": one.value, "standard_error": one.standard_error, "count": one.count}
        if isinstance(one, Share)
        else one
        for name, one in figures.items()
    }


def clip_distance(folder: str) -> Callable[[Tensor, Tensor], float]:
    """The Frechet distance of two sets of pictures (n, 3, h, w) in [0, 1], over the vectors of a CLIP's images."""
    from diffusers_ext.evaluation.frechet import frechet_distance
    from diffusers_ext.evaluation.picture_features import clip_features

    features = clip_features(folder)
    return lambda pictures, target: frechet_distance(features(pictures), features(target))
