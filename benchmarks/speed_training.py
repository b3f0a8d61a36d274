"""How long does a training step take here and in another checkout? Paired runs of the smoke presets, as ratios.

    git worktree add --detach OLD 2a37a55
    python benchmarks/speed_training.py --root OLD      # OLD before this checkout: ratios above 1 are slower here

Each pair trains the same preset once there and once here, in fresh processes that take turns, on one thread. What is
measured is CPU time, which other processes of the machine disturb least. `step` is the mean time between two optimizer
steps; `save` is how much longer one takes in which a checkpoint is written; `start` is everything up to the first
step, and `end` from the last one on: checkpoint, validation pictures, result. Each cell has the medians over the pairs
and their ratio; about six minutes for three recipes on a quiet machine, which the last line tells.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRESETS = {
    "paella": "paella-smoke.yaml",
    "ldm": "ldm-smoke.yaml",
    "autoencoder": "autoencoder-smoke.yaml",
    "versatile": "versatile-smoke.yaml",
}
WARM_UP = 3  # steps that are not counted
PARTS = ("step", "save", "start", "end")


def train(root: Path, recipe: str, steps: int, profile: str | None) -> dict[str, float]:
    """Runs a recipe of a checkout in this process, which must have imported nothing of the other one."""
    sys.path[:0] = [str(root / "src"), str(root / "training")]
    os.chdir(root)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    import cProfile
    import importlib

    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch.set_num_threads(1)
    script = importlib.import_module(f"train_{recipe}")
    first: list[torch.optim.Optimizer] = []
    times: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        first[:] = first or [optimizer]  # a discriminator has one of its own
        if optimizer is first[0]:
            times.append(time.process_time())
            if len(times) == WARM_UP and profiler is not None:
                profiler.enable()

    profiler = None if profile is None else cProfile.Profile()
    register_optimizer_step_post_hook(note)
    save_at = steps // 2
    with tempfile.TemporaryDirectory() as folder:
        words = [str(root / "training" / "presets" / PRESETS[recipe]), "--output_dir", f"{folder}/run"]
        words += ["--max_train_steps", str(steps), "--checkpointing_steps", str(save_at), "--logging_steps", "10000"]
        script.main(words)
    ended = time.process_time()
    if profiler is not None:
        profiler.disable()
        profiler.dump_stats(profile)
    lengths = [after - before for before, after in zip(times, times[1:], strict=False)]
    with_save = lengths.pop(save_at - 1)
    step = statistics.mean(lengths[WARM_UP:])
    return {"step": step, "save": with_save - step, "start": times[0], "end": ended - times[-1]}


def measure(root: Path, recipe: str, steps: int) -> dict[str, float]:
    words = [sys.executable, __file__, "--measure", recipe, "--root", str(root), "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the other checkout, that before the change")
    parser.add_argument("--recipes", nargs="+", choices=list(PRESETS), default=["paella", "ldm", "autoencoder"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--profile", help="with --measure: file for cProfile's statistics, from the third step on")
    parser.add_argument("--measure", choices=list(PRESETS), help="only train that recipe of --root, in this process")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(train(args.root.resolve(), args.measure, args.steps, args.profile)))
        return
    began = time.monotonic()
    print("CPU seconds, there -> here, and the ratio of these medians (of the steps also the range of the pairs')\n")
    print(f"| recipe | {' | '.join(PARTS)} |\n|---|{'---|' * len(PARTS)}")
    for recipe in args.recipes:
        pairs = []
        for number in range(args.pairs):
            order = (args.root, ROOT) if number % 2 == 0 else (ROOT, args.root)  # none is always the first
            found = {root: measure(root, recipe, args.steps) for root in order}
            pairs.append((found[args.root], found[ROOT]))
        cells = []
        for part in PARTS:
            there, here = (statistics.median(one[part] for one in side) for side in zip(*pairs, strict=True))
            cells.append(f"{there:.4f} -> {here:.4f}, **{here / there:.3f}**")
        ratios = [after["step"] / before["step"] for before, after in pairs]
        cells[0] += f" ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"| {recipe} | {' | '.join(cells)} |", flush=True)
    print(f"\n{args.pairs} pairs of {args.steps} steps, {(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
