"""Does every task of Latent Diffusion do what it says? One table over small checkpoints that learnt `scenes`.

    python benchmarks/quality_ldm_tasks.py runs/ldm-scenes-64-* --num_cases 256 --seeds 0

Each folder is a pipeline; its class says which task it is, and what is measured:

- text: prompts followed (half with one object, half with two), read by the verifier of `scenes`: in shape and colour,
  and in everything, which adds sizes, places and the number of objects
- class: pictures whose largest object is what the class names
- layout: boxes that hold their object: one of its shape and colour whose own box overlaps by half or more
- semantic: mean intersection over union of the map that the verifier reads
- super_resolution: PSNR, SSIM and sharpness (mean gradient, relative to the true pictures) beside bicubic enlargement,
  and beside a network that was trained to predict pixels (`--regression`, from benchmarks/quality_ldm_regression.py)
- inpainting: PSNR inside the holes beside filling with the known part's mean colour
- unconditional: pictures that hold one or two objects, all of named shapes

"Without" is what the condition is worth: the same pictures judged by another case's wish, or (super-resolution,
inpainting) what the simple method reaches. Cases are held-out scenes, on plain grounds for text, class, layout and
inpainting as in their training. Every sample has a generator of its own.
`--guidance_scales 1 2 3 4 5` adds a row a scale for the text and class tasks.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # folders are read; nothing is looked up

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from parts.ldm_task_checks import TASKS, Bench, Row

from diffusers_ext.evaluation.image_quality import picture_grid
from diffusers_ext.evaluation.prompt_following import Share


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoints", nargs="+", help="pipeline folders")
    parser.add_argument("--num_cases", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num_inference_steps", type=int, default=25, help="of the checkpoint's scheduler")
    parser.add_argument("--eta", type=float, default=1.0, help="of DDIM: 1 draws what noise it took away, 0 none")
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[], help="for the text and class tasks")
    parser.add_argument("--regression", help="folder of benchmarks/quality_ldm_regression.py")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--grid_dir", help="folder for one PNG a task")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(arguments)
    for name, least in (("num_cases", 2), ("batch_size", 1), ("num_inference_steps", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, received {getattr(args, name)}")
    for folder in args.checkpoints:
        if not (Path(folder) / "model_index.json").is_file():
            parser.error(f"{folder!r} is no pipeline folder: it holds no model_index.json")
    return args


def show(value: Share | float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, Share) else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def as_plain(row: Row) -> dict[str, Any]:
    """A row as plain numbers, shares with their standard errors."""
    plain: dict[str, Any] = {"task": row.task, "measured": row.measured}
    for name in ("value", "without"):
        one = getattr(row, name)
        if isinstance(one, Share):
            one = {"value": one.value, "standard_error": one.standard_error, "count": one.count}
        plain[name] = one
    return plain


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    order, rows = list(TASKS), []
    kinds = {folder: DiffusionPipeline.load_config(folder)["_class_name"] for folder in args.checkpoints}
    for folder in sorted(kinds, key=lambda folder: order.index(kinds[folder])):
        print(folder, file=sys.stderr)
        bench = Bench(folder, args)
        found = TASKS[kinds[folder]](bench)
        rows += found
        if args.grid_dir:
            Path(args.grid_dir).mkdir(parents=True, exist_ok=True)
            columns = len(bench.grid)
            shown = torch.stack([part[: 64 // columns] for part in bench.grid], dim=1).flatten(0, 1)
            picture_grid(shown, 8 if columns == 1 else 4 * columns).save(Path(args.grid_dir) / f"{found[0].task}.png")
    print(f"{args.num_cases} cases, seeds {', '.join(map(str, args.seeds))}, {args.num_inference_steps} steps\n")
    print("| task | measured | value | without |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.task} | {row.measured} | {show(row.value)} | {show(row.without)} |")
    if args.json:
        Path(args.json).write_text(json.dumps([as_plain(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
