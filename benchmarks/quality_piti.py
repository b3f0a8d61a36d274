"""Do PITI's pictures follow their label maps, sketches, or normals and depth? One table over checkpoints of `scenes`.

    python benchmarks/quality_piti.py runs/piti-scenes-32-label_map-joint runs/piti-scenes-32-sketch-joint

Each folder is a `PITIPipeline`; its config says what it draws from. Measured over held-out scenes, read back by the
verifier of `scenes` (pictures below 64 pixels are enlarged for it):

- label maps: mean intersection over union of the given map and the one read from the picture, without the ground
- all shapes right: the largest objects, as many as the scene has, are of its shapes
- recall of large and of small objects: one of the shape stands there, its box overlaps by half or more
- objects of named shapes: all that is drawn is clear, whatever the condition asks for

"Shuffled" judges the same pictures by the next case's condition, "true" judges the true pictures at the same size:
the level of chance, and what a perfect checkpoint would reach. Case k has a generator of its own, so that the batch
size changes nothing. `--stage base` leaves out the upsampler.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # folders are read; nothing is looked up

import diffusers
import torch
from parts.piti_scenes import (
    Sampler,
    add_sampling_options,
    as_plain,
    check_sampling_options,
    fidelity,
    held_out_scenes,
    show,
    shuffled_fidelity,
    true_pictures,
)
from torch.nn import functional as F

from diffusers_ext.evaluation.image_quality import picture_grid


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoints", nargs="+", help="folders of PITIPipelines")
    add_sampling_options(parser)
    parser.add_argument("--guidance_scale", type=float, help="default: the checkpoint's own")
    parser.add_argument("--grid", help="PNG: the first 16 cases of each folder, pictures above true ones")
    args = parser.parse_args(arguments)
    check_sampling_options(parser, args, args.checkpoints)
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    diffusers.utils.logging.disable_progress_bar()
    scenes, rows, shown = held_out_scenes(args.scenes, args.num_cases), [], []
    for folder in args.checkpoints:
        print(folder, file=sys.stderr)
        sampler = Sampler(folder, args)
        drawn = sampler.draw(scenes, args.guidance_scale)
        side = drawn.shape[-1]
        true = true_pictures(scenes, side)
        values, shuffled = fidelity(sampler.kind, drawn, scenes), shuffled_fidelity(sampler.kind, drawn, scenes)
        rows.append(
            {"checkpoint": Path(folder).name, "condition": sampler.kind, "side": side, "figures": values,
             "shuffled": shuffled, "true": fidelity(sampler.kind, true, scenes)}
        )  # fmt: skip
        shown += [drawn[:16], true[:16]]
    print(f"{args.num_cases} cases of {args.scenes}, seed {args.seed}\n")
    print("| checkpoint | condition | side | measured | value | shuffled | true |\n|---|---|---|---|---|---|---|")
    for row in rows:
        start = f"| {row['checkpoint']} | {row['condition']} | {row['side']}"
        for name, value in row["figures"].items():
            print(f"{start} | {name} | {show(value)} | {show(row['shuffled'][name])} | {show(row['true'][name])} |")
    if args.grid:
        largest = max(images.shape[-1] for images in shown)
        sheet = torch.cat([F.interpolate(images, (largest, largest)) for images in shown])
        picture_grid(2 * sheet - 1, columns=min(16, args.num_cases)).save(args.grid)
    if args.json:
        plain = [{key: as_plain(one) if isinstance(one, dict) else one for key, one in row.items()} for row in rows]
        Path(args.json).write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
