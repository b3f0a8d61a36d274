"""How fast and how large is a cascade? Against the plain form of the paper, and stage by stage against all at once.

    python benchmarks/speed_cascaded.py sampling search     # CPU: stages of 16, 32 and 64 pixels
    python benchmarks/speed_cascaded.py memory              # CPU: ADM's widths, 3.4 GiB of weights on the disk
    python benchmarks/speed_cascaded.py --device cuda       # the upsampler of 64 to 256 pixels, eager and compiled

- `sampling`: `CascadedDiffusionPipeline` against `plain/cascaded.py`, the equations of the paper written down, around
  the same networks and with the same draws. `difference` is the largest one of a value in [-1, 1].
- `search`: a sweep over s. A truncated run for each level, against all levels in one truncated pass, and against the
  non-truncated form with z_0 drawn once.
- `memory`: peak memory of the process above what the imports took, of a run of three stages: ADM's base of 64 pixels
  and two upsamplers, at the released widths. All stages in memory, or each read in its turn (`stage_by_stage=True`).
  Every number is that of a process of its own.
- `upsampler`: a call of ADM's upsampler (311,795,910 parameters and the level's embedding), eager and as one compiled
  graph, against the plain form.

Both sides of a row take turns, first the one, then the other; a ratio is the median over the rounds of the ratio of
their CPU seconds (seconds on a GPU), which hardly sees what else the machine does. All weights are random.
"""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from parts.measuring import forget_peak, peak_on_device, process_bytes
from parts.measuring import race as take_turns
from plain import cascaded as plain
from torch import Tensor

from diffusers_ext import (
    CascadedBasePipeline,
    CascadedDiffusionPipeline,
    CascadedUNet,
    CascadedUpscalePipeline,
    TruncatedConditioningScheduler,
)
from diffusers_ext.pipelines.cascaded.search import TruncationSearch
from diffusers_ext.schedulers.scheduling_respaced import adm_scheduler

PARTS = ("sampling", "search", "memory", "upsampler")
STAGES = ("base", "upscale_1", "upscale_2")
# ADM's, openai/guided-diffusion@22e0df8:README.md
ADM_BASE = {
    "block_out_channels": (192, 384, 576, 768), "layers_per_block": 3, "attention_levels": (False, True, True, True),
    "num_head_channels": 64,
}  # fmt: skip
ADM_UPSAMPLER = {
    "block_out_channels": (192, 192, 384, 384, 768, 768), "layers_per_block": 2,
    "attention_levels": (False, False, False, True, True, True), "num_heads": 4,
}  # fmt: skip


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)}; default: sampling, search or upsampler")
    parser.add_argument("--side", type=int, default=16, help="of the base's images; each stage above doubles it")
    parser.add_argument("--width", type=int, default=64, help="of the networks' first level, a multiple of 32")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="of every stage; of the upsampler 5")
    parser.add_argument("--levels", type=int, nargs="+", default=[101, 251, 501, 751], help="s of the search")
    parser.add_argument("--rounds", type=int, default=5, help="each round times both sides of a row once")
    parser.add_argument("--memory_side", type=int, default=32, help="of the base's images in the part `memory`")
    parser.add_argument("--memory_steps", type=int, default=1, help="of each stage there")
    parser.add_argument("--folder", help="where `memory` finds or writes its stages; default: a temporary one")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--compile", action="store_true", help="the upsampler compiled on a CPU too; minutes")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes: whether it runs")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--measure_memory", choices=("stage_by_stage", "resident"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if unknown := [part for part in args.parts if part not in PARTS]:
        parser.error(f"parts are {', '.join(PARTS)}, received {' '.join(unknown)}")
    args.on_cpu = args.device == "cpu"
    args.parts = args.parts or (["sampling", "search"] if args.on_cpu else ["upsampler"])
    args.dtype = args.dtype or ("float32" if args.on_cpu else "bfloat16")
    if args.smoke:
        args.side, args.memory_side, args.width, args.steps = 8, 8, 32, 2
        args.batch_size, args.rounds, args.levels = 1, 1, [251, 501]
    for name, multiple in (("side", 8), ("memory_side", 8), ("width", 32), ("batch_size", 1), ("steps", 1),
                           ("rounds", 1), ("memory_steps", 1), ("threads", 1)):  # fmt: skip
        value = getattr(args, name)
        if value < multiple or value % multiple:
            parser.error(f"--{name} must be a positive multiple of {multiple}, received {value}")
    return args


# --- stages with random weights


def build_unet(side: int, upscales: bool, options: dict[str, Any]) -> CascadedUNet:
    """No layer is zero, so that every input counts."""
    unet = CascadedUNet(
        sample_size=side,
        out_channels=6,
        num_class_embeds=1000,
        low_res_channels=3 if upscales else 0,
        aug_cond_type="timestep" if upscales else None,
        **options,
    )
    with torch.no_grad():
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.01)
    return unet.eval().requires_grad_(False)


def build_stage(index: int, base_side: int, options: dict[str, Any]) -> Any:
    """A stage of a cascade, 0 the base."""
    side, scheduler = base_side * 2**index, adm_scheduler("cosine", variance_type="learned_range")
    unet = build_unet(side, index > 0, options)
    if index == 0:
        return CascadedBasePipeline(unet, scheduler)
    noise = TruncatedConditioningScheduler(adm_scheduler("cosine"))
    return CascadedUpscalePipeline(
        unet, scheduler, noise, low_res_size=side // 2, augmentation="truncated", default_noise_level=251
    )


def small_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "block_out_channels": (args.width, 2 * args.width),
        "layers_per_block": 1,
        "attention_levels": (False, True),
        "num_head_channels": 32,
    }


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    for name in getattr(pipe, "stage_names", []):
        if getattr(pipe, name) is not None:
            getattr(pipe, name).set_progress_bar_config(disable=True)
    return pipe


# --- times


def race(case: str, first: Callable[[], object], second: Callable[[], object], args: argparse.Namespace) -> dict:
    """Medians of both sides, and of the ratio of a round."""
    times = take_turns(first, second, rounds=args.rounds, device=args.device, cpu_time=True)
    ratios = sorted(two / one for one, two in zip(*times, strict=True))
    row = {
        "case": case,
        "first": statistics.median(times[0]),
        "second": statistics.median(times[1]),
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
    }
    print(f"  {case}: {row['ratio']:.3f}", file=sys.stderr, flush=True)
    return row


def report(rows: list[dict], first: str, second: str, unit: str) -> None:
    print(f"\n| case | {first}, {unit} | {second}, {unit} | ratio | lowest to highest | difference |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        difference = f"{row['difference']:.1e}" if "difference" in row else "-"
        spread = f"{row['lowest']:.3f} to {row['highest']:.3f}" if "lowest" in row else "-"
        print(f"| {row['case']} | {row['first']:.3f} | {row['second']:.3f} | {row['ratio']:.3f} | {spread}"
              f" | {difference} |", flush=True)  # fmt: skip


# --- the parts


def plain_network(unet: Any) -> plain.Network:
    def run(x: Tensor, t: Tensor, labels: Tensor, low: Tensor | None = None, level: Tensor | None = None) -> Tensor:
        return unet(x, t, labels, low, level, return_dict=False)[0]

    return run


def sampling(args: argparse.Namespace) -> list[dict]:
    torch.manual_seed(0)
    stages = [build_stage(index, args.side, small_options(args)) for index in range(3)]
    pipe = quiet(CascadedDiffusionPipeline(**dict(zip(STAGES, stages, strict=True)))).to(args.device)
    labels, levels = list(range(args.batch_size)), [251, 101]
    betas = stages[0].scheduler.betas
    processes = []
    for stage in stages:
        stage.scheduler.set_timesteps(args.steps)
        processes.append(plain.Process(betas, stage.scheduler.timesteps.tolist()))
    sides = [args.side * 2**index for index in range(3)]
    networks = [plain_network(stage.unet) for stage in stages]

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def run_plain() -> Tensor:
        classes = torch.tensor(labels, device=args.device)
        return plain.sample(networks, processes, betas, sides, classes, levels, generator())

    def run_ours() -> Tensor:
        return pipe(
            labels,
            num_inference_steps=args.steps,
            noise_level=levels,
            conditioning_mode="non_truncated",
            generator=generator(),
            output_type="latent",
        ).images

    size = "+".join(str(side) for side in sides)
    row = race(f"{size} pixels, batch {args.batch_size}, {args.steps} steps a stage", run_plain, run_ours, args)
    return [row | {"difference": float((run_plain() - run_ours()).abs().max())}]


def search(args: argparse.Namespace) -> list[dict]:
    torch.manual_seed(0)
    stages = [build_stage(index, args.side, small_options(args)) for index in range(2)]
    pipe = quiet(CascadedDiffusionPipeline(base=stages[0], upscale_1=stages[1])).to(args.device)

    def sweep(levels: list[list[int]], mode: str) -> Callable[[], object]:
        """Each list of levels is a run of its own; z_0 is kept over a call, not beyond."""

        def run() -> None:
            options = {"num_inference_steps": args.steps, "batch_size": args.batch_size}
            finder = TruncationSearch(pipe, list(range(args.batch_size)), **options)
            for some in levels:
                finder.run(some, lambda images: float(images.mean()), conditioning_modes=[mode])

        return run

    again = sweep([[level] for level in args.levels], "truncated")
    count = len(args.levels)
    return [
        race(f"{count} levels, truncated in one pass", again, sweep([args.levels], "truncated"), args),
        race(f"{count} levels, non-truncated with z_0 kept", again, sweep([args.levels], "non_truncated"), args),
    ]


def memory(args: argparse.Namespace) -> list[dict]:
    """Writes the stages one after another, and measures both forms in processes of their own."""
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("Only Linux tells a process its peak of memory (/proc/self/status).")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(args.folder or temporary)
        size = 0
        for index, name in enumerate(STAGES):
            if not (root / name / "model_index.json").is_file():
                released = ADM_BASE if index == 0 else ADM_UPSAMPLER
                options = small_options(args) if args.smoke else released
                build_stage(index, args.memory_side, options).save_pretrained(root / name)
            size += sum(path.stat().st_size for path in (root / name).rglob("*.safetensors"))
        words = ["--memory_side", str(args.memory_side), "--memory_steps", str(args.memory_steps)]
        words += ["--folder", str(root), "--threads", str(args.threads)]
        found = {}
        for form in ("resident", "stage_by_stage"):
            command = [sys.executable, __file__, "memory", "--measure_memory", form, *words]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"The run that measures memory failed:\n{done.stderr}")
            found[form] = json.loads(done.stdout.splitlines()[-1]) / 2**30
    ratio = found["stage_by_stage"] / found["resident"]
    case = f"three stages, {size / 2**30:.2f} GiB of weights, peak above the imports"
    print(f"  {case}: {ratio:.3f}", file=sys.stderr, flush=True)
    return [{"case": case, "first": found["resident"], "second": found["stage_by_stage"], "ratio": ratio}]


def measure_memory(args: argparse.Namespace) -> int:
    """Peak of this process above what it has after its imports, of reading the stages and drawing one image."""
    folders = [str(Path(args.folder) / name) for name in STAGES]
    gc.collect()
    forget_peak()
    before = process_bytes("VmRSS")
    pipe = quiet(
        CascadedDiffusionPipeline.from_stages(folders, stage_by_stage=args.measure_memory == "stage_by_stage")
    )
    pipe(0, num_inference_steps=args.memory_steps, generator=torch.Generator().manual_seed(0), output_type="latent")
    return process_bytes("VmHWM") - before


def upsampler(args: argparse.Namespace) -> dict[str, list[dict]]:
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    options = small_options(args) if args.smoke else ADM_UPSAMPLER
    side, steps = (args.side if args.smoke else 64), min(args.steps, 5)
    scale = 2 if args.smoke else 4
    scheduler = adm_scheduler("linear", variance_type="learned_range")
    noise = TruncatedConditioningScheduler(adm_scheduler("linear"))
    unet = build_unet(side * scale, True, options).to(args.device, dtype)
    pipe = quiet(CascadedUpscalePipeline(unet, scheduler, noise, low_res_size=side, augmentation="truncated"))
    pipe.to(args.device)
    image = torch.rand(args.batch_size, 3, side, side, generator=torch.Generator().manual_seed(1))
    labels = list(range(args.batch_size))
    scheduler.set_timesteps(steps)
    process = plain.Process(scheduler.betas, scheduler.timesteps.tolist())

    def run_plain() -> Tensor:
        generator = torch.Generator(args.device).manual_seed(0)
        x = torch.randn((args.batch_size, 3, side * scale, side * scale), generator=generator, device=args.device)
        small = (2 * image - 1).to(args.device, dtype)
        condition = (torch.tensor(labels, device=args.device), small, torch.zeros(len(labels), device=args.device))
        return plain.sample_stage(plain_network(unet), process, x.to(dtype), generator, *condition)

    def ours(pipe: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            generator = torch.Generator(args.device).manual_seed(0)
            return pipe(
                image, labels, num_inference_steps=steps, noise_level=0, generator=generator, output_type="latent"
            ).images

        return run

    case = f"{side} to {side * scale} pixels, batch {args.batch_size}, {steps} steps, {args.dtype}"
    run_eager = ours(pipe)
    row = race(case, run_plain, run_eager, args)
    tables = {"plain and ours": [row | {"difference": float((run_plain() - run_eager()).abs().max())}]}
    if not args.on_cpu:
        peaks = [peak_on_device(function) / 2**30 for function in (run_plain, run_eager)]
        found = {"first": peaks[0], "second": peaks[1], "ratio": peaks[1] / peaks[0]}
        tables["peak memory above the weights"] = [{"case": case} | found]
    if args.compile or not args.on_cpu:
        compiled = quiet(CascadedUpscalePipeline(**pipe.components, low_res_size=side, augmentation="truncated"))
        compiled.unet = torch.compile(unet, fullgraph=True)
        run_compiled = ours(compiled)
        row = race(f"{case}, compiled", run_eager, run_compiled, args)
        difference = float((run_eager() - run_compiled()).abs().max())
        tables["eager and compiled"] = [row | {"difference": difference}]
    return tables


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.measure_memory:
        return print(json.dumps(measure_memory(args)))
    print(f"{args.device}, torch {torch.__version__}, Python {platform.python_version()}, {args.threads} threads")
    unit, tables = "CPU s" if args.on_cpu else "s", {}
    if "sampling" in args.parts:
        tables["plain and ours, a cascade"] = sampling(args)
        report(tables["plain and ours, a cascade"], "plain", "ours", unit)
    if "search" in args.parts:
        tables["search"] = search(args)
        report(tables["search"], "a truncated run a level", "this", unit)
    if "memory" in args.parts:
        tables["memory"] = memory(args)
        report(tables["memory"], "all stages", "stage by stage", "GiB")
    if "upsampler" in args.parts:
        for name, rows in upsampler(args).items():
            tables[f"upsampler: {name}"] = rows
            first, second = ("eager", "compiled") if "compiled" in name else ("plain", "ours")
            report(rows, first, second, "GiB" if "memory" in name else unit)
    if args.json:
        Path(args.json).write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
