"""How much faster does Paella train from cached tokens and vectors than by computing them at every step?

    python benchmarks/speed_paella_cache.py
    python benchmarks/speed_paella_cache.py --train_batch_size 16 --train_data_dir data/photographs

Trains the same few steps with and without `--cache_dir`, by turns in one process, with the tokenizer, the CLIP and the
sizes of the bundled checkpoint; words that this script does not know go to both trainings. Samples a second are the
median over the log's windows but the first of each run. "Equal" compares all weights after the last step, bit by bit.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # folders are read; nothing is looked up

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "checkpoints" / "paella-scenes-64"
SIZES = ("block_out_channels", "down_layers_per_block", "up_layers_per_block", "time_embed_dim", "layer_scale_init")
CONDITIONS = {
    "text": ("--condition", "text"),
    "text, tower trained": ("--condition", "text", "--train_text_encoder"),
    "image": ("--condition", "image"),
    "class": ("--condition", "class", "--num_labels", "48"),
}


def parse_args(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--conditions", nargs="+", choices=list(CONDITIONS), default=list(CONDITIONS)[:3])
    parser.add_argument("--rounds", type=int, default=2, help="trainings of each kind, by turns")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of a training")
    parser.add_argument("--window", type=int, default=4, help="steps between two readings of the clock")
    parser.add_argument("--num_samples", type=int, default=512, help="pictures")
    parser.add_argument("--mixed_precision", default="bf16", choices=("no", "fp16", "bf16"), help="of both trainings")
    parser.add_argument("--json", help="file for the figures")
    args, more = parser.parse_known_args(arguments)
    if args.rounds < 1 or args.window < 1 or args.steps < 2 * args.window:
        parser.error(
            f"--rounds {args.rounds} --steps {args.steps} --window {args.window}: at least one round and two windows"
        )
    return args, more


def as_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


def train_words(args: argparse.Namespace, condition: str, more: list[str]) -> list[str]:
    """The training's command line without its folders."""
    unet = json.loads((CHECKPOINT / "unet" / "config.json").read_text(encoding="utf-8"))
    words = [
        "--resolution", "64", "--center_crop", "--max_train_samples", str(args.num_samples),
        "--pretrained_vqvae_name_or_path", str(CHECKPOINT / "vqvae"),
        "--pretrained_clip_name_or_path", str(CHECKPOINT),
        *(word for name in SIZES for word in (f"--{name}", *map(str, as_list(unet[name])))),
        "--train_batch_size", "64", "--max_train_steps", str(args.steps), "--logging_steps", str(args.window),
        "--num_inference_steps", "1", "--mixed_precision", args.mixed_precision, *CONDITIONS[condition], *more,
    ]  # fmt: skip
    own_data = {"--dataset_name", "--train_data_dir"} & {word.split("=")[0] for word in more}
    return words if own_data else ["--dataset_name", "scenes", *words]


def train(words: list[str], output_dir: Path) -> tuple[list[float], float]:
    """Runs the recipe; returns the samples a second of each window but the first, and all seconds together."""
    import train_paella

    started = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        train_paella.main([*words, "--output_dir", str(output_dir)])
    AcceleratorState._reset_state(reset_partial_state=True)
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [line["samples_per_second"] for line in lines if "samples_per_second" in line]
    return rates[1:], time.perf_counter() - started


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name} {key}": value
        for path in sorted(folder.glob("*/*.safetensors"))
        if not path.parent.name.startswith("checkpoint-")
        for key, value in load_file(path).items()
    }


def measure(args: argparse.Namespace, condition: str, more: list[str]) -> dict[str, float | bool | str]:
    with tempfile.TemporaryDirectory() as folder:
        words, cache = train_words(args, condition, more), Path(folder, "cache")
        _, first = train([*words, "--cache_dir", str(cache)], Path(folder, "write"))
        rates: dict[str, list[float]] = {"plain": [], "cached": []}
        seconds = []
        for turn in range(args.rounds):
            for kind, extra in (("plain", []), ("cached", ["--cache_dir", str(cache)])):
                found, whole = train([*words, *extra], Path(folder, f"{kind}-{turn}"))
                rates[kind] += found
                seconds += [whole] if kind == "cached" else []
        plain, cached = weights(Path(folder, "plain-0")), weights(Path(folder, "cached-0"))
        equal = plain.keys() == cached.keys() and all(torch.equal(plain[key], cached[key]) for key in plain)
        size = sum(path.stat().st_size for path in cache.iterdir())
    on_the_fly, from_cache = statistics.median(rates["plain"]), statistics.median(rates["cached"])
    return {
        "condition": condition,
        "on_the_fly": on_the_fly,
        "cached": from_cache,
        "ratio": from_cache / on_the_fly,
        "equal": equal,
        "write_seconds": max(0.0, first - statistics.median(seconds)),
        "bytes_per_sample": size / args.num_samples,
    }


def main(arguments: list[str] | None = None) -> None:
    args, more = parse_args(arguments)
    sys.path.insert(0, str(ROOT / "training"))
    print(
        f"{torch.get_num_threads()} threads, {args.num_samples} pictures, {args.steps} steps, {args.rounds} rounds\n"
    )
    print("| condition | on the fly, samples/s | cached, samples/s | ratio | equal | writing, s | bytes a sample |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for condition in args.conditions:
        row = measure(args, condition, more)
        rows.append(row)
        print(
            f"| {condition} | {row['on_the_fly']:.1f} | {row['cached']:.1f} | {row['ratio']:.2f} | "
            f"{'yes' if row['equal'] else 'no'} | {row['write_seconds']:.1f} | {row['bytes_per_sample']:.0f} |",
            flush=True,
        )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
