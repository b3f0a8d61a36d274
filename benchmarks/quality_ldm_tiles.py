"""A picture far larger than what a small model was trained on, in tiles: seams and memory.

    python benchmarks/quality_ldm_tiles.py runs/ldm-scenes-64-semantic --size 1024 --output tiles.png

A semantic pipeline draws a mosaic of held-out label maps, each as large as a training picture: in tiles that overlap
by half (arXiv 2112.10752, section 4.3.2), in tiles that only touch, and, if the memory allows (`--whole`), in one
piece. Every way starts from the same noise. A seam shows as a larger step from one pixel to the next where a tile
begins or ends than elsewhere: "at borders / elsewhere" is the ratio of the mean absolute steps across those lines and
across all others between two latent pixels (every fourth line; the first stage draws larger steps there, with tiles or
without), on the map's ground away from objects, so that no outline counts. Peak memory is that of a process of its
own, above what it needed after loading.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder is read; nothing is looked up

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from diffusers_ext.data.scenes import sample_scene, semantic_map
from diffusers_ext.pipelines.ldm.pipeline_ldm_semantic import LDMSemanticPipeline
from diffusers_ext.pipelines.ldm.tiling import TileGrid

CLEARANCE = 3  # pixels around objects that do not count
MEBIBYTE = 2**20


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="folder of a semantic pipeline that learnt `scenes`")
    parser.add_argument("--size", type=int, default=1024, help="side of the picture")
    parser.add_argument("--tile_size", type=int, default=128, help="side of a tile")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--eta", type=float, default=1.0, help="of DDIM: 1 draws what noise it took away, 0 none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole", action="store_true", help="also without tiles")
    parser.add_argument("--output", help="PNG of the picture from overlapping tiles")
    args = parser.parse_args(arguments)
    if not (Path(args.checkpoint) / "model_index.json").is_file():
        parser.error(f"{args.checkpoint!r} is no pipeline folder: it holds no model_index.json")
    if not 1 <= args.tile_size <= args.size or args.tile_size % 2:
        parser.error(f"--tile_size must be even and at most --size ({args.size}), received {args.tile_size}")
    return args


def mosaic(size: int, side: int) -> np.ndarray:
    """A label map (size, size) of held-out scenes' maps of `side` pixels each."""
    count = -(-size // side)
    rows = [
        np.concatenate(
            [semantic_map(sample_scene(0, count * i + j, split="test"), side) for j in range(count)], axis=1
        )
        for i in range(count)
    ]
    return np.concatenate(rows)[:size, :size]


def border_ratio(picture: np.ndarray, labels: np.ndarray, tile: int, stride: int, factor: int = 1) -> float:
    """Mean absolute step across the lines where tiles begin or end, over that across the other lines.

    Args:
        picture: uint8 (h, w, 3).
        labels: (h, w), 0 on the ground: only there, away from objects, steps count.
        factor: pixels a latent pixel; only lines between two of those count.
    """
    values = picture.astype(np.float32)
    ground = ndimage.binary_erosion(labels == 0, iterations=CLEARANCE, border_value=1)
    sums, counts = np.zeros(2), np.zeros(2)
    for axis in range(2):
        length = picture.shape[axis]
        grid = TileGrid((length, length), (tile, tile), (stride, stride))
        lines = {start for start in grid.starts[0]} | {start + grid.tile_size[0] for start in grid.starts[0]}
        counted = np.arange(1, length) % factor == 0
        at_border = np.array([line in lines for line in range(1, length)])
        steps = np.abs(np.diff(values, axis=axis)).mean(axis=2)
        clear = ground.take(range(1, length), axis) & ground.take(range(length - 1), axis)
        for kind, chosen in enumerate((~at_border, at_border)):
            where = np.flatnonzero(chosen & counted)
            inside = clear.take(where, axis)
            sums[kind] += steps.take(where, axis)[inside].sum()
            counts[kind] += inside.sum()
    elsewhere, borders = sums / np.maximum(counts, 1)
    return float(borders / elsewhere)


def draw(args: argparse.Namespace, options: dict[str, int]) -> tuple[np.ndarray, float, int, np.ndarray, int]:
    """Samples in this process: picture, seconds, bytes above what was needed before, label map, pixels a latent."""
    pipe = LDMSemanticPipeline.from_pretrained(args.checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    side = pipe.unet.config["sample_size"] * pipe.vae_scale_factor
    generator = torch.Generator().manual_seed(args.seed)
    labels = torch.from_numpy(mosaic(args.size, side)).long()
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    picture = pipe(
        labels, num_inference_steps=args.num_inference_steps, eta=args.eta, generator=generator, output_type="np",
        **options,
    ).images[0]  # fmt: skip
    seconds = time.perf_counter() - started
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return (picture * 255).round().astype(np.uint8), seconds, 1024 * kibibytes, labels.numpy(), pipe.vae_scale_factor


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    half = {"tile_size": args.tile_size, "tile_stride": args.tile_size // 2}
    ways: dict[str, dict[str, int]] = {
        "tiles that overlap by half": half,
        "tiles that touch": {"tile_size": args.tile_size, "tile_stride": args.tile_size},
    }
    if args.whole:
        ways["in one piece"] = {}
    context = multiprocessing.get_context("spawn")  # each way's memory is a process's own
    print(f"{args.size} x {args.size} pixels, tiles of {args.tile_size}, {args.num_inference_steps} steps\n")
    print("| way | at borders / elsewhere | peak memory | seconds |\n|---|---|---|---|")
    for name, options in ways.items():
        with ProcessPoolExecutor(1, mp_context=context) as process:
            picture, seconds, peak, labels, factor = process.submit(draw, args, options).result()
        stride = options.get("tile_stride", half["tile_stride"])
        ratio = border_ratio(picture, labels, args.tile_size, stride, factor)
        print(f"| {name} | {ratio:.2f} | {peak / MEBIBYTE:.0f} MiB | {seconds:.0f} |", flush=True)
        if args.output and options == half:
            Image.fromarray(picture).save(args.output)


if __name__ == "__main__":
    main()
