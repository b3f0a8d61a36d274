"""Do a cascade's images show the class that was asked for, at every size, and how near do they come to true ones?

    python benchmarks/quality_cascaded.py runs/cascaded-scenes-16 runs/cascaded-scenes-16-32 runs/cascaded-scenes-32-64

One folder is a whole cascade, several are its stages in order; they learnt the 48 classes of `scenes`. A row a stage:

- images whose largest object is of the class, read by the verifier of `scenes` (small ones are enlarged for it, and
  true images of 16, 32 and 64 pixels are all read right), and the same images judged by the next case's class
- the Frechet distance to held-out true images of that size, over vectors of `--feature_network`, and that of other
  true images, which is what a perfect cascade would reach. It is no FID, and comparable only within a table.

Case k has the class k modulo 48 and a generator of its own.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # folders are read; nothing is looked up

import diffusers
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

from diffusers_ext import CascadedDiffusionPipeline
from diffusers_ext.data.scenes import CLASS_NAMES, render, sample_scene
from diffusers_ext.data.scenes_verifier import read_picture
from diffusers_ext.evaluation.frechet import frechet_distance
from diffusers_ext.evaluation.image_quality import picture_grid
from diffusers_ext.evaluation.prompt_following import Share, case_generators, share
from diffusers_ext.pipelines.clip_vectors import prepare_pictures

READ_AT = 64  # pixels a side at least, for the verifier


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoints", nargs="+", help="a cascade, or its stages in order")
    parser.add_argument("--num_cases", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_inference_steps", type=int, nargs="+", help="one, or one a stage; default 50")
    parser.add_argument("--guidance_scale", type=float, nargs="+", help="one, or one a stage; default: their own")
    parser.add_argument("--noise_level", type=float, nargs="+", help="one, or one an upscaler; default: their own")
    parser.add_argument("--conditioning_mode", choices=("truncated", "non_truncated", "none"))
    parser.add_argument("--feature_network", default="checkpoints/paella-scenes-64", help="folder with a CLIP")
    parser.add_argument("--grounds", nargs="+", default=["plain"], help="of the true images")
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--grid", help="PNG: 48 classes of every stage")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(arguments)
    for name, least in (("num_cases", 2), ("batch_size", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, received {getattr(args, name)}")
    for folder in [*args.checkpoints, args.feature_network]:
        if not (Path(folder) / "model_index.json").is_file():
            parser.error(f"{folder!r} is no pipeline folder: it holds no model_index.json")
    return args


def one_or_each(values: list | None, default: object = None) -> object:
    """A command-line list as the pipeline takes it."""
    if not values:
        return default
    return values[0] if len(values) == 1 else values


def draw(args: argparse.Namespace) -> dict[str, Tensor]:
    """Images (n, 3, h, w) in [0, 1] by stage."""
    folders = args.checkpoints
    whole = CascadedDiffusionPipeline.load_config(folders[0])["_class_name"] == CascadedDiffusionPipeline.__name__
    if whole and len(folders) == 1:
        pipe = CascadedDiffusionPipeline.from_pretrained(folders[0], dtype=torch.float32)
    else:
        pipe = CascadedDiffusionPipeline.from_stages(folders)
    pipe.to(args.device)
    pipe.set_progress_bar_config(disable=True)
    drawn: dict[str, list[Tensor]] = {}
    for start in range(0, args.num_cases, args.batch_size):
        cases = range(start, min(start + args.batch_size, args.num_cases))
        found = pipe(
            [case % len(CLASS_NAMES) for case in cases],
            num_inference_steps=one_or_each(args.num_inference_steps, 50),
            guidance_scale=one_or_each(args.guidance_scale),
            noise_level=one_or_each(args.noise_level),
            conditioning_mode=args.conditioning_mode,
            generator=case_generators(args.seed, cases, args.device),
            output_type="pt",
            return_intermediates=True,
        ).intermediates
        for name, images in found.items():
            drawn.setdefault(name, []).append(images.float().cpu().clamp(0, 1))
        print(f"\r  {cases[-1] + 1}/{args.num_cases} images", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    return {name: torch.cat(images) for name, images in drawn.items()}


def followed(images: Tensor) -> tuple[Share, Share]:
    """How many images show their class, and how many the next case's."""
    if images.shape[-1] < READ_AT:
        images = F.interpolate(images, (READ_AT, READ_AT), mode="bicubic").clamp(0, 1)
    names = []
    for pixels in (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        objects = read_picture(pixels)  # the largest one first
        names.append(f"{objects[0].color} {objects[0].shape}" if objects else None)
    wanted = [CLASS_NAMES[case % len(CLASS_NAMES)] for case in range(len(images))]
    others = wanted[1:] + wanted[:1]
    return tuple(share(name == one for name, one in zip(names, some, strict=True)) for some in (wanted, others))


def true_images(side: int, cases: range, grounds: list[str]) -> Tensor:
    """Held-out images of one object, (n, 3, side, side) in [0, 1]."""
    scenes = [sample_scene(0, case, split="test", num_objects=1, grounds=grounds) for case in cases]
    return torch.stack([torch.from_numpy(render(scene, side)).permute(2, 0, 1) / 255 for scene in scenes])


class Features:
    """The vectors of a CLIP's image tower, (n, d), of length 1."""

    def __init__(self, folder: str):
        self.tower = CLIPVisionModelWithProjection.from_pretrained(folder, subfolder="image_encoder").eval().float()
        self.extractor = AutoImageProcessor.from_pretrained(folder, subfolder="feature_extractor", use_fast=False)

    def __call__(self, images: Tensor) -> Tensor:
        vectors = [self.tower(prepare_pictures(self.extractor, list(some))).image_embeds for some in images.split(64)]
        return F.normalize(torch.cat(vectors), dim=-1)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    drawn, features = draw(args), Features(args.feature_network)
    count, network = args.num_cases, Path(args.feature_network).name
    print(f"{count} cases, seed {args.seed}\n")
    print(
        f"| stage | side | class followed | next case's class | Frechet distance (CLIP of {network}) | true images |"
    )
    print("|---|---|---|---|---|---|")
    rows = []
    for name, images in drawn.items():
        side = images.shape[-1]
        target, others = (
            features(true_images(side, range(start, start + count), args.grounds)) for start in (0, count)
        )
        right, wrong = followed(images)
        distance, floor = frechet_distance(features(images), target), frechet_distance(others, target)
        print(f"| {name} | {side} | {right} | {wrong} | {distance:.4f} | {floor:.4f} |", flush=True)
        rows.append(
            {"stage": name, "side": side, "followed": right.value, "standard_error": right.standard_error,
             "count": count, "next_case": wrong.value, "frechet": distance, "frechet_true": floor}
        )  # fmt: skip
    if args.grid:
        largest = max(images.shape[-1] for images in drawn.values())
        shown = [F.interpolate(images[: len(CLASS_NAMES)], (largest, largest)) for images in drawn.values()]
        picture_grid(2 * torch.cat(shown) - 1, columns=16).save(args.grid)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
