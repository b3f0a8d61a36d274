"""What the Paella paper says about sampling, measured again on a small checkpoint: one command each.

    python benchmarks/claims_paella.py guidance     # guidance scale 0 to 8
    python benchmarks/claims_paella.py typical      # locally typical filtering off, and on with several masses
    python benchmarks/claims_paella.py steps        # 1 to 24 steps
    python benchmarks/claims_paella.py renoising    # to initial, previous or fresh tokens, at random or by confidence
    python benchmarks/claims_paella.py batch        # seconds against the batch size
    python benchmarks/claims_paella.py grid         # seconds against the number of tokens

The first four print shares of `scenes` prompts followed, judged by the verifier over `--num_prompts` balanced prompts
(half with one object, half with two) and all `--seeds`, with binomial standard errors. The last two print seconds and
fit a line: how far from it the measured times lie says whether the paper's "linear" holds. `--plot` draws the figure.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder is read; nothing is looked up

import diffusers
import numpy as np
import torch
import transformers
from parts.paella_samples import as_dict, sample_pictures

from diffusers_ext.data.scenes import balanced_prompts
from diffusers_ext.data.scenes_verifier import check, read_picture
from diffusers_ext.evaluation.prompt_following import judge, judge_by_chance, markdown_table, summarize_by_objects
from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline
from diffusers_ext.schedulers.scheduling_discrete_renoising import DiscreteRenoisingScheduler

GUIDANCE_SCALES = (0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
MASSES = (0.1, 0.2, 0.5, 0.8, 0.95)
STEPS = (1, 2, 4, 8, 12, 24)
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
GRIDS = (8, 16, 24, 32, 48, 64)
FOLLOWING = ("guidance", "typical", "steps", "renoising")
TIMING = ("batch", "grid")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("study", choices=FOLLOWING + TIMING)
    parser.add_argument("--checkpoint", default="checkpoints/paella-scenes-64", help="pipeline folder")
    parser.add_argument("--num_prompts", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_inference_steps", type=int, default=12, help="where the steps are not what is studied")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="of each timing; the median counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", help="PNG of the figure")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(arguments)
    for name in ("num_prompts", "num_inference_steps", "batch_size", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, received {getattr(args, name)}")
    if not (Path(args.checkpoint) / "model_index.json").is_file():
        parser.error(f"{args.checkpoint!r} is no pipeline folder: it holds no model_index.json")
    return args


def settings(
    study: str, num_inference_steps: int
) -> Iterator[tuple[str, float | str, dict[str, Any], dict[str, Any]]]:
    """(label, position on the axis, changes of the scheduler's config, arguments of the call) of every setting."""
    call: dict[str, Any] = {"num_inference_steps": num_inference_steps}
    if study == "guidance":
        for scale in GUIDANCE_SCALES:
            yield f"guidance {scale:g}", scale, {}, {**call, "guidance_scale": scale}
    elif study == "typical":
        yield "no filter", "off", {"typical_filtering": False}, call
        for mass in MASSES:
            yield f"mass {mass:g}", f"{mass:g}", {"typical_filtering": True, "typical_mass": mass}, call
    elif study == "steps":
        for steps in STEPS:
            yield f"{steps} step{'s' if steps > 1 else ''}", float(steps), {}, {"num_inference_steps": steps}
    else:
        for mode, words in (("start", "initial"), ("prev", "previous"), ("rand", "fresh")):
            for positions in ("random", "confidence"):
                label = f"{words} tokens, {'at random' if positions == 'random' else 'by confidence'}"
                yield label, label, {"renoise_mode": mode, "renoise_positions": positions}, call


def measure_following(pipe: PaellaPipeline, args: argparse.Namespace) -> tuple[list, list[dict]]:
    """Rows of the table, and the same as plain numbers."""
    prompts, wanted = zip(*balanced_prompts(args.num_prompts, seed=0), strict=True)
    base, rows, figures = pipe.scheduler.config, [], []
    for label, position, changes, call in settings(args.study, args.num_inference_steps):
        pipe.scheduler = DiscreteRenoisingScheduler.from_config(base, **changes)
        checks, chance = [], []
        for seed in args.seeds:
            print(f"{label}, seed {seed}", file=sys.stderr)
            pictures = sample_pictures(pipe, list(prompts), seed, args.batch_size, args.device, **call)
            found = [read_picture(picture) for picture in pictures]
            checks += judge(found, wanted, check=check, seed=seed)
            chance += judge_by_chance(found, wanted, check=check, seed=seed)
        followed = summarize_by_objects(checks, chance)
        rows += [(label, row) for row in followed]
        figures.append({"label": label, "position": position, "rows": [as_dict(row) for row in followed]})
    return rows, figures


def measure_time(pipe: PaellaPipeline, args: argparse.Namespace) -> list[dict]:
    """Median seconds of a whole call, tokens decoded, for every batch size or grid."""
    side = pipe.config.default_sample_size
    cases = [(size, side) for size in BATCH_SIZES] if args.study == "batch" else [(1, grid) for grid in GRIDS]
    figures = []
    for batch_size, grid in cases:
        times = []
        for round_ in range(args.rounds + 1):
            generators = [torch.Generator(args.device).manual_seed(i) for i in range(batch_size)]
            started = time.perf_counter()
            pipe(
                ["a large red circle in the center"] * batch_size,
                height=grid * pipe.vae_scale_factor,
                width=grid * pipe.vae_scale_factor,
                num_inference_steps=args.num_inference_steps,
                generator=generators,
                output_type="np",
            )
            if round_ > 0:  # the first one warms up
                times.append(time.perf_counter() - started)
        position = batch_size if args.study == "batch" else grid * grid
        label = f"batch {batch_size}" if args.study == "batch" else f"{grid}x{grid} tokens"
        figures.append({"label": label, "position": position, "seconds": statistics.median(times)})
        print(f"{label}: {figures[-1]['seconds']:.3f} s", file=sys.stderr)
    return figures


def fit_line(figures: list[dict]) -> tuple[float, float, float]:
    """Slope, offset and the largest deviation of a measured time from the line, relative to that time."""
    x, y = (np.array([figure[name] for figure in figures], dtype=float) for name in ("position", "seconds"))
    # weighted by 1 / y: relative errors count, or the largest case would be all that is fitted
    slope, offset = np.polyfit(x, y, 1, w=1 / y)
    return float(slope), float(offset), float(np.abs((slope * x + offset) / y - 1).max())


def print_times(figures: list[dict], study: str) -> None:
    slope, offset, deviation = fit_line(figures)
    unit = "image" if study == "batch" else "token"
    print(f"| case | seconds | milliseconds a{'n' if unit == 'image' else ''} {unit} | line |\n|---|---|---|---|")
    for figure in figures:
        each = 1000 * figure["seconds"] / figure["position"]
        line = slope * figure["position"] + offset
        print(f"| {figure['label']} | {figure['seconds']:.3f} | {each:.3g} | {line:.3f} |")
    print(f"\nseconds = {offset:.3f} + {slope:.3g} x {unit}s; largest deviation {100 * deviation:.0f} %")


def draw_plot(figures: list[dict], study: str, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    positions = [one["position"] for one in figures]
    if study in TIMING:
        slope, offset, _ = fit_line(figures)
        axes.plot(positions, [one["seconds"] for one in figures], "o", label="measured")
        axes.plot(positions, [slope * position + offset for position in positions], label="fitted line")
        axes.set(xlabel="images in a batch" if study == "batch" else "tokens of an image", ylabel="seconds")
    else:
        words = isinstance(positions[0], str)
        x = list(range(len(positions))) if words else positions
        for group in range(2):
            rows = [one["rows"][group]["shape_and_color"] for one in figures]
            values, errors = ([100 * row[key] for row in rows] for key in ("value", "standard_error"))
            label = figures[0]["rows"][group]["label"]
            axes.errorbar(x, values, yerr=errors, fmt="o-" if not words else "o", capsize=3, label=label)
        if words:
            axes.set_xticks(
                x,
                positions,
                rotation=30 if study == "renoising" else 0,
                ha="right" if study == "renoising" else "center",
            )
        axes.set(xlabel={"guidance": "guidance scale", "typical": "typical mass", "steps": "steps"}.get(study, ""))
        axes.set(ylabel="shape and colour right, %", ylim=(0, 101))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipe = PaellaPipeline.from_pretrained(args.checkpoint, dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if args.study in TIMING:
        figures = measure_time(pipe, args)
        print(f"{Path(args.checkpoint).name}: {args.num_inference_steps} steps, {torch.get_num_threads()} threads\n")
        print_times(figures, args.study)
    else:
        rows, figures = measure_following(pipe, args)
        seeds = ", ".join(map(str, args.seeds))
        print(f"{Path(args.checkpoint).name}: {args.num_prompts} prompts, seeds {seeds}\n")
        print(markdown_table(rows))
    if args.plot:
        draw_plot(figures, args.study, args.plot)
        print(f"\nFigure: {args.plot}")
    if args.json:
        Path(args.json).write_text(json.dumps({"study": args.study, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
