"""What do the bundled checkpoints draw, and how much of it is right? One page of all families: `make demo`.

    python benchmarks/quality_demo.py --out demo.png

Each row of the page is a checkpoint and what it does, with the settings that its documents name. Prompts and pictures
are the first held-out ones of `scenes`, and sample k is drawn from a seed of its own, (0, k): nothing is chosen by
hand, and all that is drawn is shown and counted. The verifier of `scenes` (plain image processing, no network) reads
the samples. "Everything" asks for shapes, colours, sizes, places and the number of objects; of PITI's conditions,
which say no colour, for shapes whose boxes overlap the given ones by half or more.

Eight samples a row tell little: the pages of the families in docs/ hold the counts over hundreds, and the commands
that print them. A new family is one more entry of `ROWS`.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # folders are read; nothing is looked up

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline
from parts.pages import Cell, draw_page
from parts.piti_scenes import condition_of, condition_picture, held_out_scenes, recalled, shapes_right
from PIL import Image

from diffusers_ext import PaellaImageVariationPipeline, PITIPipeline
from diffusers_ext.data.scenes import (
    CLASS_NAMES,
    GROUNDS,
    WantedObject,
    balanced_prompts,
    full_caption,
    label,
    parse_caption,
    render,
    sample_scene,
)
from diffusers_ext.data.scenes_verifier import check, check_caption, read_picture
from diffusers_ext.evaluation.prompt_following import case_generators

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
SIDE, LOW_SIDE = 64, 16


@dataclass(frozen=True)
class Cases:
    """How many samples, and of how many objects each: 1 and 2 by turns where `num_objects` is None."""

    count: int
    num_objects: int | None

    def prompts(self) -> tuple[list[str], list[tuple[WantedObject, ...]]]:
        cases = balanced_prompts(2 * self.count, seed=0)
        fitting = [case for case in cases if self.num_objects in (None, len(case[1]))]
        prompts, wanted = zip(*fitting[: self.count], strict=True)
        return list(prompts), list(wanted)

    def pictures(self) -> tuple[list[Image.Image], list[tuple[WantedObject, ...]]]:
        scenes = [
            sample_scene(0, i, split="test", num_objects=self.num_objects or 1 + i % 2, grounds=GROUNDS[:1])
            for i in range(self.count)
        ]
        pictures = [Image.fromarray(render(scene, SIDE)) for scene in scenes]
        return pictures, [parse_caption(full_caption(scene)) for scene in scenes]

    @property
    def generators(self) -> list[torch.Generator]:
        return case_generators(0, range(self.count))


def judge_pictures(
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
    wanted: Sequence[Sequence[WantedObject]],
    given: Sequence[Image.Image] | None = None,
) -> list[Cell]:
    sources = given or [None] * len(pictures)
    return [
        Cell(picture, text, *check(read_picture(np.asarray(picture)), objects), source)
        for picture, text, objects, source in zip(pictures, texts, wanted, sources, strict=True)
    ]


def text_to_image(pipe: Any, cases: Cases, **options: Any) -> list[Cell]:
    prompts, wanted = cases.prompts()
    return judge_pictures(pipe(prompts, generator=cases.generators, **options).images, prompts, wanted)


def class_to_image(pipe: Any, cases: Cases, **options: Any) -> list[Cell]:
    """The classes of the held-out pictures."""
    scenes = [sample_scene(0, i, split="test", num_objects=1, grounds=GROUNDS[:1]) for i in range(cases.count)]
    names = [CLASS_NAMES[label(scene)] for scene in scenes]
    drawn = pipe(names, generator=cases.generators, **options).images
    return judge_pictures(drawn, names, [parse_caption(f"a {name}") for name in names])


def condition_to_image(pipe: Any, cases: Cases, **options: Any) -> list[Cell]:
    """Maps, sketches or geometry of held-out pictures, none of which says a colour.

    What is right are shapes, and everything where each object also fills its box.
    """
    kind, side = pipe.config["condition_type"], pipe.encoder.config["sample_size"]
    scenes = held_out_scenes("plain+one", cases.count)
    some = [condition_of(kind, scene, side) for scene in scenes]
    given = {name: np.stack([one[name] for one in some]) for name in some[0]}
    drawn = pipe(**given, generator=cases.generators, **options).images
    cells = []
    for picture, scene, condition in zip(drawn, scenes, some, strict=True):
        found = read_picture(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
        shape = shapes_right(found, scene)
        placed = shape and all(recalled(found, item.shape, item.box) for item in scene.objects)
        text = " and ".join(f"{item.size} {item.shape}" for item in scene.objects)
        cells.append(Cell(picture, text, shape, placed, condition_picture(kind, condition, pipe.label_palette)))
    return cells


def super_resolution(pipe: Any, cases: Cases, **options: Any) -> list[Cell]:
    true, wanted = cases.pictures()
    small = [picture.resize((LOW_SIDE, LOW_SIDE), Image.Resampling.BICUBIC) for picture in true]
    drawn = pipe(image=small, generator=cases.generators, **options).images
    return judge_pictures(drawn, [f"{LOW_SIDE} to {SIDE} pixels"] * cases.count, wanted, small)


def variations(pipe: Any, cases: Cases, **options: Any) -> list[Cell]:
    true, wanted = cases.pictures()
    drawn = pipe(image=true, generator=cases.generators, **options).images
    return judge_pictures(drawn, ["variation of the small one"] * cases.count, wanted, true)


def captions(pipe: Any, cases: Cases, **options: Any) -> list[Cell]:
    true, wanted = cases.pictures()
    texts = pipe(image=true, data_type="text", temperature=0, generator=cases.generators, **options).texts
    return [
        Cell(picture, text, *check_caption(text, objects))
        for picture, text, objects in zip(true, texts, wanted, strict=True)
    ]


def load(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)


def load_paella_variations(folder: Path) -> Any:
    pipe = PaellaImageVariationPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.load_lora_weights(folder, subfolder="image_adapter")
    return pipe


def load_piti(condition: str) -> Callable[[Path], Any]:
    return lambda folder: PITIPipeline.from_prior(folder, folder, subfolder=condition, dtype=torch.float32)


@dataclass(frozen=True)
class Row:
    """A row of the page.

    Args:
        title: What is done, and by which family.
        checkpoint: Folder in `checkpoints/`.
        sample: Makes the cells: `sample(pipe, cases, **options)`.
        options: Of the pipeline's call.
        num_objects: Of each case; None: 1 and 2 by turns.
        load: Makes the pipeline from its folder.
    """

    title: str
    checkpoint: str
    sample: Callable[..., list[Cell]]
    options: dict[str, Any] = field(default_factory=dict)
    num_objects: int | None = None
    load: Callable[[Path], Any] = load


LDM = {"num_inference_steps": 25, "eta": 1.0}
VERSATILE = {"num_inference_steps": 20, "eta": 1.0}
CASCADE = {"num_inference_steps": [25, 10, 10]}  # of each stage
PITI = {"num_inference_steps": 20}
ROWS = (
    Row("Latent Diffusion: text to image", "ldm-text-scenes-64", text_to_image, LDM),
    Row("Versatile Diffusion: text to image", "versatile-scenes-64", text_to_image, VERSATILE),
    Row("Paella: text to image, one object", "paella-scenes-64", text_to_image, {"num_inference_steps": 8}, 1),
    Row("Cascaded Diffusion: class to image", "cascaded-scenes-64", class_to_image, CASCADE, 1),
    Row("PITI: label map to image", "piti-scenes", condition_to_image, PITI, 1, load_piti("label_map")),
    Row("PITI: sketch to image", "piti-scenes", condition_to_image, PITI, 1, load_piti("sketch")),
    Row("PITI: normals and depth to image", "piti-scenes", condition_to_image, PITI, 1, load_piti("geometry")),
    Row("Latent Diffusion: super-resolution", "ldm-super-resolution-scenes-64", super_resolution, LDM),
    Row("Versatile Diffusion: captions of pictures", "versatile-scenes-64", captions, VERSATILE),
    Row("Versatile Diffusion: variations of pictures", "versatile-scenes-64", variations, VERSATILE),
    Row(
        "Paella: variations of pictures, one object",
        "paella-scenes-64",
        variations,
        num_objects=1,
        load=load_paella_variations,
    ),
)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--num_samples", type=int, default=8, help="of each row")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the page, a PNG")
    args = parser.parse_args(arguments)
    if args.num_samples < 1:
        parser.error(f"--num_samples must be at least 1, received {args.num_samples}")
    return args


def main(arguments: list[str] | None = None) -> None:
    args, started = parse_args(arguments), time.perf_counter()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    print("| what | checkpoint | drawn | everything right | shape and colour right | seconds |")
    print("|---|---|---|---|---|---|")
    rows = []
    for row in ROWS:
        clock = time.perf_counter()
        pipe = row.load(CHECKPOINTS / row.checkpoint)
        pipe.set_progress_bar_config(disable=True)
        cells = row.sample(pipe, Cases(args.num_samples, row.num_objects), **row.options)
        everything, named = (sum(getattr(cell, name) for cell in cells) for name in ("everything", "shape_and_color"))
        seconds = time.perf_counter() - clock
        print(
            f"| {row.title} | {row.checkpoint} | {len(cells)} | {everything} | {named} | {seconds:.1f} |", flush=True
        )
        rows.append((f"{row.title} ({everything} of {len(cells)} right)", cells))
    footer = "make demo: all samples are shown and counted; sample k of a row is drawn from the seed (0, k)"
    draw_page("Drawn by the bundled checkpoints of diffusers_ext", rows, footer).save(args.out, optimize=True)
    print(f"\n{args.out}: {sum(len(cells) for _, cells in rows)} samples in {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
