"""Whether sampling became slower: this checkout against another one, in alternating processes.

    git worktree add --detach ../before 2a37a55
    python benchmarks/speed_against.py --root ../before

Every process samples from the bundled checkpoints of this checkout: Paella in 8 steps, latent diffusion on text and
Versatile Diffusion in 20. A figure is the CPU time of one call, the shortest of a few after one that warms up, on one
thread. A pair is a process of either checkout, one right after the other; its ratio hardly sees what else the machine
does. The table gives the medians over the pairs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = {  # name -> checkpoint, steps
    "Paella, 8 steps": ("paella-scenes-64", 8),
    "Latent Diffusion on text, 20 steps": ("ldm-text-scenes-64", 20),
    "Versatile Diffusion, text to image, 20 steps": ("versatile-scenes-64", 20),
}


def seconds_of_calls(repeats: int) -> dict[str, float]:
    """CPU seconds of a call by name, with the `diffusers_ext` that this process imports."""
    import torch
    from diffusers import DiffusionPipeline

    import diffusers_ext  # noqa: F401  # its pipelines become known to diffusers

    torch.set_num_threads(1)
    seconds = {}
    for name, (checkpoint, steps) in RUNS.items():
        pipe = DiffusionPipeline.from_pretrained(ROOT / "checkpoints" / checkpoint)
        pipe.set_progress_bar_config(disable=True)
        times = []
        for _ in range(1 + repeats):
            start = time.process_time()
            pipe("a large green ring", num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
            times.append(time.process_time() - start)
        seconds[name] = min(times[1:])
    return seconds


def measured(root: Path, repeats: int) -> dict[str, float]:
    """The same in a process of its own that imports the package of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, "--only_measure", "--repeats", str(repeats)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{root} does not sample:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="the checkout to compare with")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=3, help="calls of a process, of which the shortest counts")
    parser.add_argument("--only_measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_measure:
        return print(json.dumps(seconds_of_calls(args.repeats)))
    if args.root is None:
        parser.error("--root is needed: the checkout to compare with")
    pairs = []
    for pair in range(args.pairs):
        order = (args.root.resolve(), ROOT) if pair % 2 == 0 else (ROOT, args.root.resolve())
        found = {root: measured(root, args.repeats) for root in order}
        pairs.append((found[args.root.resolve()], found[ROOT]))
        seconds = [(round(pairs[-1][0][name], 3), round(pairs[-1][1][name], 3)) for name in RUNS]
        print(f"pair {pair + 1}: {seconds}", file=sys.stderr, flush=True)
    print(f"| call | {args.root.name}, CPU s | here, CPU s | ratio | of {args.pairs} pairs, lowest to highest |")
    print("|---|---|---|---|---|")
    for name in RUNS:
        before, after = ([side[name] for side in sides] for sides in zip(*pairs, strict=True))
        ratios = sorted(new / old for old, new in zip(before, after, strict=True))
        middle = [statistics.median(values) for values in (before, after, ratios)]
        print(
            f"| {name} | {middle[0]:.3f} | {middle[1]:.3f} | {middle[2]:.3f} | {ratios[0]:.3f} to {ratios[-1]:.3f} |"
        )


if __name__ == "__main__":
    main()
