"""What benchmarks/quality_ldm_tasks.py measures of each task of Latent Diffusion: the figures themselves."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from skimage.metrics import structural_similarity
from torch import Tensor

import diffusers_ext  # noqa: F401  # introduces its pipelines to the loader
from diffusers_ext.conditions.masks import random_mask
from diffusers_ext.data import scenes as scenes_data
from diffusers_ext.data.scenes import Scene, balanced_prompts, render, sample_scene
from diffusers_ext.data.scenes_verifier import FoundObject, check, read_picture, read_semantic_map
from diffusers_ext.degradations.bsr import degrade_bicubic
from diffusers_ext.evaluation.image_quality import psnr
from diffusers_ext.evaluation.prompt_following import Share, case_generators, judge, judge_by_chance, share
from diffusers_ext.evaluation.segmentation import mean_iou
from parts.found_boxes import BOX_OVERLAP, box_overlap, found_box, next_case
from parts.pixel_regression import load_regression

LOW_FACTOR = 4  # of super-resolution


@dataclass(frozen=True)
class Row:
    """A line of the table: `value` with the condition, and `without` it."""

    task: str
    measured: str
    value: Share | float
    without: Share | float | None = None


class Bench:
    """One checkpoint, and how it is called in batches."""

    def __init__(self, folder: str, args: argparse.Namespace):
        self.args = args
        self.pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(args.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.side = self.pipe.unet.config["sample_size"] * self.pipe.vae_scale_factor
        self.grid: list[Tensor] = []

    def scenes(self, *, plain: bool, num_objects: int | None = None) -> list[Scene]:
        grounds = scenes_data.GROUNDS[:1] if plain else scenes_data.GROUNDS
        return [
            sample_scene(0, i, split="test", num_objects=num_objects, grounds=grounds)
            for i in range(self.args.num_cases)
        ]

    def pictures(self, scenes: list[Scene]) -> Tensor:
        """(n, 3, h, w) in [-1, 1]."""
        return torch.stack([to_tensor(render(scene, self.side)) for scene in scenes])

    def sample(self, seed: int, conditions: dict[str, list], **options: Any) -> Tensor:
        """One picture a case, (n, 3, h, w) in [-1, 1]; `conditions` are cut into batches."""
        drawn = []
        for start in range(0, self.args.num_cases, self.args.batch_size):
            stop = min(start + self.args.batch_size, self.args.num_cases)
            generators = case_generators(seed, range(start, stop), self.args.device)
            batch = {name: stack(values[start:stop]) for name, values in conditions.items()}
            batch = batch or {"batch_size": stop - start}
            drawn.append(
                self.pipe(
                    **batch, **options, generator=generators, output_type="pt",
                    num_inference_steps=self.args.num_inference_steps, eta=self.args.eta,
                ).images
            )  # fmt: skip
            print(f"\r  {stop}/{self.args.num_cases} pictures", end="", file=sys.stderr, flush=True)
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
        pictures = torch.cat(drawn).cpu() * 2 - 1
        if not self.grid:
            self.grid = [pictures]
        return pictures


def stack(values: list) -> Any:
    return torch.stack(values) if isinstance(values[0], Tensor) else values


def to_tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1


def to_arrays(pictures: Tensor) -> list[np.ndarray]:
    """uint8 (h, w, 3) of pictures in [-1, 1]."""
    return list(((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def read_all(pictures: Tensor) -> list[list[FoundObject]]:
    return [read_picture(picture) for picture in to_arrays(pictures)]


# ---------------------------------------------------------------------------------------------------------------------
# the tasks: each gives the rows of its part of the table


def check_text(bench: Bench) -> list[Row]:
    prompts, wanted = zip(*balanced_prompts(bench.args.num_cases, seed=0), strict=True)
    rows = []
    for scale in [None, *bench.args.guidance_scales]:
        checks, chance = [], []
        for seed in bench.args.seeds:
            found = read_all(bench.sample(seed, {"prompt": list(prompts)}, guidance_scale=scale))
            checks += judge(found, wanted, check=check, seed=seed)
            chance += judge_by_chance(found, wanted, check=check, seed=seed)
        label = "" if scale is None else f", guidance {scale:g}"
        for number, name in ((1, "one object"), (2, "two objects"), (None, "all prompts")):
            mine, others = ([one for one in some if number in (None, one.num_objects)] for some in (checks, chance))
            value, without = (share(one.shape_and_color for one in some) for some in (mine, others))
            rows.append(Row("text", f"shape and colour of {name}{label}", value, without))
            if scale is None:
                value, without = (share(one.everything for one in some) for some in (mine, others))
                rows.append(Row("text", f"everything of {name}", value, without))
    return rows


def check_class(bench: Bench) -> list[Row]:
    labels = [scenes_data.label(scene) for scene in bench.scenes(plain=True)]
    rows = []
    for scale in [None, *bench.args.guidance_scales]:
        right, wrong = [], []
        for seed in bench.args.seeds:
            found = read_all(bench.sample(seed, {"class_labels": labels}, guidance_scale=scale))
            names = [f"{objects[0].color} {objects[0].shape}" if objects else None for objects in found]
            right += [name == scenes_data.CLASS_NAMES[label] for name, label in zip(names, labels, strict=True)]
            wrong += [
                name == scenes_data.CLASS_NAMES[label] for name, label in zip(names, next_case(labels), strict=True)
            ]
        label = "" if scale is None else f", guidance {scale:g}"
        rows.append(Row("class", f"largest object is of the class{label}", share(right), share(wrong)))
    return rows


def boxes_held(found: list[list[FoundObject]], layouts: list[list[tuple[str, tuple]]]) -> list[bool]:
    """For each box of each layout: whether an object of its name fills it."""
    return [
        any(
            f"{item.color} {item.shape}" == name and box_overlap(found_box(item), box) >= BOX_OVERLAP
            for item in objects
        )
        for objects, layout in zip(found, layouts, strict=True)
        for name, box in layout
    ]


def check_layout(bench: Bench) -> list[Row]:
    layouts = [scenes_data.boxes(scene) for scene in bench.scenes(plain=True)]
    held, chance = [], []
    for seed in bench.args.seeds:
        pictures = bench.sample(
            seed,
            {
                "boxes": [[box for _, box in layout] for layout in layouts],
                "names": [[name for name, _ in layout] for layout in layouts],
            },
        )
        found = read_all(pictures)
        held += boxes_held(found, layouts)
        chance += boxes_held(found, next_case(layouts))
    return [Row("layout", "boxes that hold their object", share(held), share(chance))]


def check_semantic(bench: Bench) -> list[Row]:
    maps = [scenes_data.semantic_map(scene, bench.side) for scene in bench.scenes(plain=False)]
    found = []
    for seed in bench.args.seeds:
        pictures = bench.sample(seed, {"label_map": [torch.from_numpy(one).long() for one in maps]})
        found += [read_semantic_map(picture) for picture in to_arrays(pictures)]
    count, times = len(scenes_data.SHAPES) + 1, len(bench.args.seeds)
    value, without = (mean_iou(found, wanted * times, count) for wanted in (maps, next_case(maps)))
    return [Row("semantic", "mean intersection over union", value, without)]


def sharpness(pictures: Tensor) -> float:
    """Mean length of the brightness's gradient."""
    grey = pictures.mean(dim=1)
    across, down = grey[:, :-1, 1:] - grey[:, :-1, :-1], grey[:, 1:, :-1] - grey[:, :-1, :-1]
    return float((across**2 + down**2).sqrt().mean())


def ssim(pictures: Tensor, true: Tensor) -> float:
    """Structural similarity (scikit-image, its defaults) of colour pictures in [-1, 1], the mean over them."""
    pairs = zip(to_arrays(pictures), to_arrays(true), strict=True)
    return float(np.mean([structural_similarity(one, other, channel_axis=2) for one, other in pairs]))


def check_super_resolution(bench: Bench) -> list[Row]:
    true = bench.pictures(bench.scenes(plain=False))
    low = torch.stack([degrade_bicubic(picture, LOW_FACTOR) for picture in true])
    size = (bench.side, bench.side)
    enlarged = torch.stack(
        [
            to_tensor(np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)).copy())
            for small in to_arrays(low)
        ]
    )
    others = {"bicubic": enlarged}
    if bench.args.regression:
        with torch.no_grad():
            others["image regression"] = load_regression(bench.args.regression)(low).clamp(-1, 1)
    sampled = [bench.sample(seed, {"image": list((low + 1) / 2)}) for seed in bench.args.seeds]
    bench.grid += [enlarged, true]
    rows = []
    for name, other in others.items():
        for measured, figure in (("PSNR, dB", psnr), ("SSIM", ssim)):
            value = float(np.mean([figure(one, true) for one in sampled]))
            rows.append(Row("super_resolution", f"{measured}; without: {name}", value, figure(other, true)))
        value = float(np.mean([sharpness(one) for one in sampled])) / sharpness(true)
        rows.append(Row("super_resolution", f"sharpness; without: {name}", value, sharpness(other) / sharpness(true)))
    return rows


def psnr_inside(pictures: Tensor, true: Tensor, holes: Tensor) -> float:
    """PSNR in dB over the pixels of the holes (n, 1, h, w), the mean over the pictures."""
    error = ((pictures - true).square() * holes).sum(dim=(1, 2, 3)) / (3 * holes.sum(dim=(1, 2, 3)))
    return float((10 * (4 / error.clamp_min(1e-12)).log10()).mean())


def check_inpainting(bench: Bench) -> list[Row]:
    true = bench.pictures(bench.scenes(plain=True))
    draws = [torch.Generator().manual_seed(i) for i in range(len(true))]
    holes = torch.stack([random_mask(bench.side, bench.side, generator) for generator in draws])
    known = 1 - holes
    mean = (true * known).sum(dim=(2, 3), keepdim=True) / known.sum(dim=(2, 3), keepdim=True)
    filled, other = true * known + mean * holes, next_case(list(true))
    values, shuffled = [], []
    for seed in bench.args.seeds:
        masks = list(holes[:, 0])
        sampled = bench.sample(seed, {"image": list((true + 1) / 2), "mask_image": masks})
        values.append(psnr_inside(sampled, true, holes))
        wrong = bench.sample(seed, {"image": [(one + 1) / 2 for one in other], "mask_image": masks})
        shuffled.append(psnr_inside(wrong, true, holes))
    bench.grid += [true * known, true]
    value, name = float(np.mean(values)), "PSNR in the hole, dB; without: "
    return [
        Row("inpainting", name + "mean colour", value, psnr_inside(filled, true, holes)),
        Row("inpainting", name + "another picture around it", value, float(np.mean(shuffled))),
    ]


def check_unconditional(bench: Bench) -> list[Row]:
    whole = []
    for seed in bench.args.seeds:
        found = read_all(bench.sample(seed, {}))
        whole += [1 <= len(objects) <= 2 and all(item.shape for item in objects) for objects in found]
    noise = torch.rand(bench.args.num_cases, 3, bench.side, bench.side) * 2 - 1
    without = [1 <= len(objects) <= 2 and all(item.shape for item in objects) for objects in read_all(noise)]
    return [
        Row("unconditional", "one or two objects, all of named shapes; without: noise", share(whole), share(without))
    ]


TASKS: dict[str, Callable[[Bench], list[Row]]] = {
    "LDMTextPipeline": check_text,
    "LDMClassConditionalPipeline": check_class,
    "LDMLayoutPipeline": check_layout,
    "LDMSemanticPipeline": check_semantic,
    "LDMUpscalePipeline": check_super_resolution,
    "LDMInpaintPipeline": check_inpainting,
    "LDMUnconditionalPipeline": check_unconditional,
}
