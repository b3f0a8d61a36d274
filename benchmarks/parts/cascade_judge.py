"""What the benchmarks of cascades share: cases of `scenes`, their samples, and a judge of the images.

Case k has the class k modulo 48 and a generator of its own.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusers_ext import CascadedDiffusionPipeline
from diffusers_ext.data.scenes import CLASS_NAMES, GROUNDS, Scene, label, render, sample_scene
from diffusers_ext.data.scenes_verifier import read_picture
from diffusers_ext.evaluation.frechet import frechet_distance
from diffusers_ext.evaluation.picture_features import clip_features, pixel_features
from diffusers_ext.evaluation.precision_recall import PrecisionRecall, precision_recall
from diffusers_ext.evaluation.prompt_following import Share, case_generators, share

READ_AT = 64  # pixels a side at least, for the verifier


def add_options(parser: argparse.ArgumentParser, num_cases: int = 192) -> None:
    parser.add_argument("--num_cases", type=int, default=num_cases)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_inference_steps", type=int, nargs="+", help="one, or one a stage; default 50")
    parser.add_argument("--guidance_scale", type=float, nargs="+", help="one, or one a stage; default: their own")
    parser.add_argument("--feature_network", default="checkpoints/paella-scenes-64", help="folder with a CLIP")
    parser.add_argument("--grounds", nargs="+", default=["plain"], help="of the true images")
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="file for the figures")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace, folders: Sequence[str]) -> None:
    """Ends with a message for counts below what is needed, and folders without a pipeline."""
    for name, least in (("num_cases", 4), ("batch_size", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, received {getattr(args, name)}")
    if unknown := [ground for ground in args.grounds if ground not in GROUNDS]:
        parser.error(f"--grounds must name some of {', '.join(GROUNDS)}, received {' '.join(unknown)}")
    for folder in [*folders, args.feature_network]:
        if not (Path(folder) / "model_index.json").is_file():
            parser.error(f"{folder!r} is no pipeline folder: it holds no model_index.json")


def one_or_each(values: list | None, default: Any = None) -> Any:
    """A command-line list as the pipeline takes it."""
    if not values:
        return default
    return values[0] if len(values) == 1 else values


def load_cascade(folders: Sequence[str], device: str = "cpu") -> CascadedDiffusionPipeline:
    """A whole cascade of one folder, or one of several stages in order, in float32 and without progress bars."""
    whole = CascadedDiffusionPipeline.load_config(folders[0])["_class_name"] == CascadedDiffusionPipeline.__name__
    if whole and len(folders) == 1:
        pipe = CascadedDiffusionPipeline.from_pretrained(folders[0], dtype=torch.float32)
    else:
        pipe = CascadedDiffusionPipeline.from_stages(folders)
    for name in pipe.stage_names:
        getattr(pipe, name).set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def class_of(case: int) -> int:
    return case % len(CLASS_NAMES)


def draw(
    pipe: CascadedDiffusionPipeline, args: argparse.Namespace, image: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """Images (n, 3, h, w) in [0, 1] by stage.

    Args:
        image: Small images (n, 3, h', w') in [0, 1] to start from.
        options: Of the pipeline's call, beside those of the command line.
    """
    call = {
        "num_inference_steps": one_or_each(args.num_inference_steps, 50),
        "guidance_scale": one_or_each(args.guidance_scale),
    }
    first = "base" if image is None else options.get("start_stage", pipe.stage_names[-1])
    stages = [getattr(pipe, name) for name in pipe.stage_names[pipe.stage_names.index(first) :]]
    knows_classes = any(stage.num_classes is not None for stage in stages)
    drawn: dict[str, list[Tensor]] = {}
    for start in range(0, args.num_cases, args.batch_size):
        cases = range(start, min(start + args.batch_size, args.num_cases))
        found = pipe(
            [class_of(case) for case in cases] if knows_classes else None,
            image=None if image is None else image[cases.start : cases.stop],
            generator=case_generators(args.seed, cases, args.device),
            num_images_per_prompt=1 if knows_classes or image is not None else len(cases),
            output_type="pt",
            return_intermediates=True,
            **call | options,
        ).intermediates
        for name, images in found.items():
            drawn.setdefault(name, []).append(images.float().cpu().clamp(0, 1))
        print(f"\r  {cases[-1] + 1}/{args.num_cases} images", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    return {name: torch.cat(images) for name, images in drawn.items()}


# --- true images


def true_scenes(cases: range, grounds: Sequence[str], split: str = "test") -> list[Scene]:
    """Scenes of one object, held out unless `split` says otherwise."""
    return [sample_scene(0, case, split=split, num_objects=1, grounds=grounds) for case in cases]


def pictures(scenes: Sequence[Scene], side: int) -> Tensor:
    """(n, 3, side, side) in [0, 1]."""
    return torch.stack([torch.from_numpy(render(scene, side)).permute(2, 0, 1) / 255 for scene in scenes])


def scenes_of_classes(count: int, grounds: Sequence[str], split: str = "test") -> list[Scene]:
    """The first scene of class k modulo 48 that is not taken yet, for each case k."""
    waiting: dict[int, list[Scene]] = {}
    found, number = [], 0
    for case in range(count):
        while not waiting.get(class_of(case)):
            (scene,) = true_scenes(range(number, number + 1), grounds, split)
            waiting.setdefault(label(scene), []).append(scene)
            number += 1
        found.append(waiting[class_of(case)].pop(0))
    return found


def read_classes(images: Tensor) -> list[int | None]:
    """The class of the largest object of each image (n, 3, h, w) in [0, 1]; None where there is none.

    Small images are enlarged for the verifier. True ones of 16, 32 and 64 pixels are all read right.
    """
    if images.shape[-1] < READ_AT:
        images = F.interpolate(images, (READ_AT, READ_AT), mode="bicubic").clamp(0, 1)
    names = []
    for pixels in (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        objects = read_picture(pixels)  # the largest one first
        names.append(f"{objects[0].color} {objects[0].shape}" if objects else None)
    return [CLASS_NAMES.index(name) if name in CLASS_NAMES else None for name in names]


def followed(images: Tensor, wanted: Sequence[int]) -> Share:
    """How many images show their class."""
    return share(found == one for found, one in zip(read_classes(images), wanted, strict=True))


# --- the judge


@dataclass(frozen=True)
class Verdict:
    """What the judge says about a set of images.

    Args:
        label: What they are of.
        followed: How many show their class.
        frechet: Distance to held-out true images and to images of the training set, by those words.
        manifold: Precision and recall against the same two.
    """

    label: str
    side: int
    followed: Share
    frechet: dict[str, float]
    manifold: dict[str, PrecisionRecall]

    def plain(self) -> dict[str, Any]:
        """For JSON: one flat row."""
        row = {"case": self.label, "side": self.side, "followed": self.followed.value}
        row |= {"standard_error": self.followed.standard_error, "count": self.followed.count}
        for split in self.frechet:
            found = self.manifold[split]
            row |= {f"frechet_{split}": self.frechet[split], f"precision_{split}": found.precision}
            row[f"recall_{split}"] = found.recall
        return row


SPLITS = {"held_out": "test", "train": "train"}  # word -> split of `scenes`


@dataclass
class Judge:
    """Reads the classes of images, and compares the images with true ones of their size.

    Args:
        network: Folder with a CLIP, or "pixels" for the pixels at 8 x 8.
        count: How many true images of each split.
        grounds: Of the true images.
    """

    network: str
    count: int
    grounds: Sequence[str]
    _true: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.features = pixel_features if self.network == "pixels" else clip_features(self.network)
        self.name = "pixels" if self.network == "pixels" else f"CLIP of {Path(self.network).name}"

    def vectors(self, images: Tensor) -> Tensor:
        return torch.cat([self.features(some) for some in images.split(64)])

    def true(self, split: str, side: int, start: int = 0) -> Tensor:
        """Vectors of true images, by a word of `SPLITS`."""
        key = (f"{split} {start}", side)
        if key not in self._true:
            scenes = true_scenes(range(start, start + self.count), self.grounds, SPLITS[split])
            self._true[key] = self.vectors(pictures(scenes, side))
        return self._true[key]

    def __call__(self, name: str, images: Tensor, wanted: Sequence[int]) -> Verdict:
        side, vectors = images.shape[-1], self.vectors(images)
        return Verdict(
            name,
            side,
            followed(images, wanted),
            {split: frechet_distance(vectors, self.true(split, side)) for split in SPLITS},
            {split: precision_recall(vectors, self.true(split, side)) for split in SPLITS},
        )

    def true_row(self, side: int) -> Verdict:
        """Other true images as samples: what a perfect cascade would reach."""
        scenes = true_scenes(range(self.count, 2 * self.count), self.grounds)
        return self("true images", pictures(scenes, side), [label(scene) for scene in scenes])

    def heading(self, case: str = "case") -> str:
        columns = [case, "side", "class followed", f"Frechet distance ({self.name}) to held-out, training images"]
        columns += ["precision, recall on held-out images", "on training images"]
        return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"

    @staticmethod
    def line(found: Verdict) -> str:
        frechet = ", ".join(f"{value:.4f}" for value in found.frechet.values())
        manifold = " | ".join(f"{one.precision:.2f}, {one.recall:.2f}" for one in found.manifold.values())
        return f"| {found.label} | {found.side} | {found.followed} | {frechet} | {manifold} |"
