"""How fast is PITI here? Against the released sampler's form, and over samplers on a checkpoint.

    python benchmarks/speed_piti.py                 # CPU: the released networks at half their widths
    python benchmarks/speed_piti.py --device cuda   # the released sizes, eager and compiled
    python benchmarks/speed_piti.py --checkpoint runs/piti-scenes-32-label_map-joint
    python benchmarks/speed_piti.py --smoke         # whether it runs; its figures mean nothing

The first table holds `PITIPipeline` against `plain/piti.py`, the released code's form: its encoder runs in every step,
ours once a call. Both guide in one doubled batch; networks, noise and steps are the same, and `difference` is the
largest one of a pixel in [0, 1]. On a GPU, or with `--compile`, a second table shows the same call with the U-Net as
one compiled graph. Both sides of a row take turns; times are the shortest of the rounds, on a CPU its own seconds,
which other work on the machine disturbs least. All weights are random.

With `--checkpoint`, another table holds samplers on that checkpoint's base stage instead: ancestral sampling in 250
steps, as the authors do, against DPM-Solver++ in 20 to 30, without and with fresh noise in each step. It says how far
the pictures follow their conditions (see benchmarks/quality_piti.py), and seconds a picture.
"""

import argparse
import copy
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder is read; nothing is looked up

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from parts.measuring import now, race
from parts.piti_scenes import FIDELITY, Sampler, as_plain, check_folder, fidelity, held_out_scenes, show
from plain import piti as plain

from diffusers_ext import PITIEncoder, PITIPipeline
from diffusers_ext.schedulers.adapter import SchedulerAdapter
from diffusers_ext.schedulers.gaussian import scheduler_chain
from diffusers_ext.schedulers.scheduling_respaced import adm_scheduler

AUTHORS_SCALE, AUTHORS_STEPS = 1.3, 250
SOLVERS = {"DPM-Solver++": "dpmsolver++", "DPM-Solver++ with noise": "sde-dpmsolver++"}
CPU = {"width": 96, "head_channels": 32, "resolution": 64, "condition_size": 256, "batch_size": 1, "steps": 25}
ACCELERATOR = {
    "width": 192,
    "head_channels": 64,
    "resolution": 64,
    "condition_size": 256,
    "batch_size": 8,
    "steps": 50,
}
SMOKE = {"width": 32, "resolution": 16, "condition_size": 32, "batch_size": 1, "steps": 2, "rounds": 1, "layers": 1,
         "head_channels": 16}  # fmt: skip


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--width", type=int, help="of the U-Net's first level; 192 in the released models")
    parser.add_argument("--resolution", type=int, help="side of the pictures, a multiple of 8")
    parser.add_argument("--condition_size", type=int, help="side of the conditions, a multiple of 16")
    parser.add_argument("--head_channels", type=int, help="width of the U-Net's heads; 64 in the released models")
    parser.add_argument("--layers", type=int, default=3, help="residual blocks of a level")
    parser.add_argument("--batch_size", type=int, help="pictures at a time")
    parser.add_argument("--steps", type=int, help="of sampling")
    parser.add_argument("--rounds", type=int, default=3, help="each round times both sides of a row once")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of autocast")
    parser.add_argument("--compile", action="store_true", help="also on a CPU; minutes")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes")
    parser.add_argument("--checkpoint", help="a PITIPipeline that learnt scenes: the table of samplers instead")
    parser.add_argument("--scenes", default="plain+one", help="for --checkpoint: as in its training")
    parser.add_argument("--num_cases", type=int, default=256, help="for --checkpoint")
    parser.add_argument("--solver_steps", type=int, nargs="+", default=[20, 25, 30], help="for --checkpoint")
    parser.add_argument("--ancestral_steps", type=int, default=AUTHORS_STEPS, help="for --checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(arguments)
    for name, value in (SMOKE if args.smoke else CPU if args.device == "cpu" else ACCELERATOR).items():
        if getattr(args, name) is None or args.smoke:
            setattr(args, name, value)
    for name, multiple in (("width", 32), ("resolution", 8), ("condition_size", 16), ("batch_size", 1), ("steps", 1),
                           ("rounds", 1), ("layers", 1), ("head_channels", 1), ("num_cases", 2)):  # fmt: skip
        value = getattr(args, name)
        if value < 1 or value % (1 if name == "num_cases" else multiple) or value < multiple:
            parser.error(f"--{name} must be a positive multiple of {multiple}, received {value}")
    if args.checkpoint:
        check_folder(parser, args.checkpoint)
    return args


def build(args: argparse.Namespace) -> PITIPipeline:
    """The released base model (label maps) at the asked width: 338 million parameters at 192."""
    torch.manual_seed(0)
    tokens = 8 * args.width // 3 // 16 * 16  # 512 of 192
    unet = UNet2DConditionModel(
        sample_size=args.resolution,
        in_channels=3,
        out_channels=6,
        block_out_channels=tuple(args.width * multiple for multiple in (1, 2, 3, 4)),
        layers_per_block=args.layers,
        down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift",
        cross_attention_dim=tokens,
        attention_head_dim=args.head_channels,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=tokens,
    )
    encoder = PITIEncoder(3, args.condition_size, tokens, num_attention_heads=8)
    scheduler = adm_scheduler("cosine", variance_type="learned_range")
    pipe = PITIPipeline(encoder.eval(), unet.eval(), scheduler).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def autocast(args: argparse.Namespace) -> torch.autocast:
    dtype = getattr(torch, args.dtype)
    return torch.autocast(torch.device(args.device).type, dtype, enabled=dtype != torch.float32)


def compare(case: str, first: Callable[[], np.ndarray], second: Callable[[], np.ndarray], args: Any) -> dict[str, Any]:
    with autocast(args):
        difference = float(np.abs(first() - second()).max())
    times = race(
        first,
        second,
        rounds=args.rounds,
        device=args.device,
        cpu_time=True,
        is_warm=True,
        within=partial(autocast, args),
    )
    seconds = [min(one) for one in times]
    print(f"  {case}: {seconds[1] / seconds[0]:.3f}", file=sys.stderr, flush=True)
    found = [f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms" for value in seconds]
    return {"case": case, "first": found[0], "second": found[1], "ratio": seconds[1] / seconds[0],
            "difference": f"{difference:.1e}"}  # fmt: skip


def against_plain(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Two tables: the released form and ours, and ours with the U-Net compiled."""
    pipe = build(args)
    palette = len(pipe.label_palette)
    generator = torch.Generator().manual_seed(1)
    maps = torch.randint(0, palette, (args.batch_size, 8, 8), generator=generator)
    maps = maps.repeat_interleave(args.condition_size // 8, 1).repeat_interleave(args.condition_size // 8, 2)
    condition = pipe.read_conditions(label_map=maps).to(args.device)
    start = torch.randn(args.batch_size, 3, args.resolution, args.resolution, generator=generator).to(args.device)

    def draws() -> Callable[[], torch.Tensor]:
        steps = torch.Generator(args.device).manual_seed(2)
        return lambda: torch.randn(start.shape, generator=steps, device=args.device)

    def released() -> np.ndarray:
        images = plain.sample(
            pipe.unet, pipe.encoder, condition, start, steps=args.steps, scale=AUTHORS_SCALE, draw=draws()
        )
        return ((images.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).float().cpu().numpy()

    def ours() -> np.ndarray:
        return pipe(
            label_map=maps, latents=start, num_inference_steps=args.steps, guidance_scale=AUTHORS_SCALE,
            generator=torch.Generator(args.device).manual_seed(2), output_type="np",
        ).images  # fmt: skip

    case = f"label map to {args.resolution} pixels, guided, {args.steps} steps"
    tables = {"released form and ours": [compare(case, released, ours, args)]}
    if args.compile or args.device != "cpu":
        eager = pipe.unet
        compiled = torch.compile(eager, fullgraph=True)

        def call(unet: Any) -> np.ndarray:
            pipe.unet = unet
            return ours()

        tables["eager and compiled"] = [compare(case, partial(call, eager), partial(call, compiled), args)]
    return tables


def over_samplers(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Ancestral sampling against DPM-Solver++ on the base stage of a checkpoint."""
    options = {"stage": "base", "num_inference_steps": None, "batch_size": 64, "upscale_num_inference_steps": None}
    sampler = Sampler(args.checkpoint, argparse.Namespace(**vars(args) | options))
    scenes, held = held_out_scenes(args.scenes, args.num_cases), sampler.pipe.scheduler
    runs = [("checkpoint's own, ancestral", held, args.ancestral_steps)]
    for name, algorithm in SOLVERS.items():
        solver: Any = DPMSolverMultistepScheduler.from_config(
            scheduler_chain(held)[-1].config,
            algorithm_type=algorithm,
            # what the ancestral sampler does as well: clean images stay in [-1, 1]
            thresholding=True,
            dynamic_thresholding_ratio=1.0,
            sample_max_value=1.0,
            lambda_min_clipped=-5.1,  # as diffusers advises for the cosine schedule
        )
        if isinstance(held, SchedulerAdapter):  # it guides: whatever it holds
            adapter = copy.deepcopy(held)
            adapter.scheduler, solver = solver, adapter
        runs += [(name, solver, steps) for steps in args.solver_steps]
    rows = []
    for name, scheduler, steps in runs:
        print(f"{name}, {steps} steps", file=sys.stderr)
        sampler.pipe.scheduler = scheduler
        started = now(args.device, cpu_time=True)
        pictures = sampler.draw(scenes, num_inference_steps=steps)
        seconds = (now(args.device, cpu_time=True) - started) / len(scenes)
        figures = fidelity(sampler.kind, pictures, scenes)
        rows.append(
            {"sampler": name, "steps": steps, "seconds": seconds, "condition": sampler.kind,
             "figures": figures}
        )  # fmt: skip
    return rows


def report(first: str, second: str, ratio: str, rows: list[dict]) -> None:
    print(f"\n| case | {first} | {second} | {ratio} | difference |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['case']} | {row['first']} | {row['second']} | {row['ratio']:.3f} | {row['difference']} |")


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.checkpoint:
        rows = over_samplers(args)
        measured = FIDELITY[rows[0]["condition"]]
        print(f"{Path(args.checkpoint).name}: {args.num_cases} cases of {args.scenes}, {args.threads} threads\n")
        seconds = "CPU seconds" if args.device == "cpu" else "seconds"
        print(f"| sampler | steps | {measured} | {seconds} a picture | of the first |\n|---|---|---|---|---|")
        for row in rows:
            print(
                f"| {row['sampler']} | {row['steps']} | {show(row['figures'][measured])} | {row['seconds']:.3f}"
                f" | {row['seconds'] / rows[0]['seconds']:.3f} |"
            )
        tables: Any = {"samplers": [row | {"figures": as_plain(row["figures"])} for row in rows]}
    else:
        print(
            f"U-Net of width {args.width}, conditions of {args.condition_size} pixels, batch {args.batch_size},"
            f" {args.dtype} on {args.device}, torch {torch.__version__}, Python {platform.python_version()}"
        )
        tables = against_plain(args)
        report("released form", "ours", "ours / released form", tables["released form and ours"])
        if "eager and compiled" in tables:
            report("eager", "compiled", "compiled / eager", tables["eager and compiled"])
    if args.json:
        Path(args.json).write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
