"""Do a cascade's images show the class that was asked for, at every size, and how near do they come to true ones?

    python benchmarks/quality_cascaded.py runs/cascaded-scenes-16 runs/cascaded-scenes-16-32 runs/cascaded-scenes-32-64

One folder is a whole cascade, several are its stages in order; they learnt the 48 classes of `scenes`. A row a stage:

- images whose largest object is of the class, read by the verifier of `scenes` (small ones are enlarged for it, and
  true images of 16, 32 and 64 pixels are all read right), and the same images judged by the next case's class
- the Frechet distance to held-out true images of that size, over vectors of `--feature_network`, and that of other
  true images, which is what a perfect cascade would reach. It is no FID, and comparable only within a table.
- precision and recall on the same vectors (k = 3, arXiv 1904.06991)

Case k has the class k modulo 48 and a generator of its own.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # folders are read; nothing is looked up

import diffusers
import torch
import transformers
from parts.cascade_judge import Judge, add_options, check_options, class_of, draw, followed, load_cascade, one_or_each
from torch.nn import functional as F

from diffusers_ext.data.scenes import CLASS_NAMES
from diffusers_ext.evaluation.frechet import frechet_distance
from diffusers_ext.evaluation.image_quality import picture_grid


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoints", nargs="+", help="a cascade, or its stages in order")
    add_options(parser)
    parser.add_argument("--noise_level", type=float, nargs="+", help="one, or one an upscaler; default: their own")
    parser.add_argument("--conditioning_mode", choices=("truncated", "non_truncated", "none"))
    parser.add_argument("--grid", help="PNG: 48 classes of every stage")
    args = parser.parse_args(arguments)
    check_options(parser, args, args.checkpoints)
    return args


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipe = load_cascade(args.checkpoints, args.device)
    drawn = draw(pipe, args, noise_level=one_or_each(args.noise_level), conditioning_mode=args.conditioning_mode)
    count, judge = args.num_cases, Judge(args.feature_network, args.num_cases, args.grounds)
    print(f"{count} cases, seed {args.seed}\n")
    columns = ["stage", "side", "class followed", "next case's class", f"Frechet distance ({judge.name})"]
    columns += ["true images", "precision, recall"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    rows = []
    for name, images in drawn.items():
        side = images.shape[-1]
        found = judge(name, images, [class_of(case) for case in range(count)])
        wrong = followed(images, [class_of(case + 1) for case in range(count)])
        floor = frechet_distance(judge.true("held_out", side, count), judge.true("held_out", side))
        precision, recall = found.manifold["held_out"]
        print(
            f"| {name} | {side} | {found.followed} | {wrong} | {found.frechet['held_out']:.4f} | {floor:.4f}"
            f" | {precision:.2f}, {recall:.2f} |",
            flush=True,
        )
        rows.append(found.plain() | {"next_case": wrong.value, "frechet_true": floor})
    if args.grid:
        largest = max(images.shape[-1] for images in drawn.values())
        shown = [F.interpolate(images[: len(CLASS_NAMES)], (largest, largest)) for images in drawn.values()]
        picture_grid(2 * torch.cat(shown) - 1, columns=16).save(args.grid)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
