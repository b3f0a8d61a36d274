"""How fast and how large is Versatile Diffusion here? Against diffusers' deprecated pipelines, with equal weights.

    python benchmarks/speed_versatile.py                 # CPU: a quarter of the widths, 256 x 256 pictures
    python benchmarks/speed_versatile.py --device cuda   # the released sizes, 512 x 512, eager and compiled
    python benchmarks/speed_versatile.py --smoke         # whether it runs; its figures mean nothing

A repository in diffusers' format with random weights is written to a temporary folder and read by the shipped
converter: both sides hold the same numbers. diffusers makes pictures only, from a text, a picture or both. Its index
cannot be loaded as it is (it names a folder that has moved), so the text U-Net is loaded by hand and passed in; its
dual contexts fail on an argument that their blocks do not know (0.42.1), which is taken out here. Its pipeline of a
flow is measured, and for memory also `VersatileDiffusionPipeline`, which holds all flows.

Times: both sides take turns in one process, files in the page cache; the shortest of the rounds counts, which other
work on the machine disturbs least. Memory: the peak of a process of its own that loads one flow and makes one picture
in two steps, above what it held after its imports, weights included. They are read in half precision
(`--memory_dtype`): in the precision of the file both sides map it, and weights that no layer touches take no memory.
diffusers' pipeline for image variation reads nothing but its own flow either. `difference` is that of the results: of
the predicted noise, relative to the largest value, or of a pixel in [0, 1]; for dual contexts with diffusers' own null
context, which divides its grey by 255 once too often and is no picture that a caller could pass.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder is read; nothing is looked up

import diffusers
import numpy as np
import torch
import transformers
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from diffusers.pipelines.deprecated.versatile_diffusion import (
    VersatileDiffusionDualGuidedPipeline,
    VersatileDiffusionImageVariationPipeline,
    VersatileDiffusionPipeline,
    VersatileDiffusionTextToImagePipeline,
)
from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import UNetFlatConditionModel
from parts.measuring import process_bytes, race
from parts.versatile_repository import convert_repository, write_repository
from PIL import Image
from torch import Tensor

from diffusers_ext.pipelines.versatile.pipeline_versatile import VersatilePipeline

FLOWS = {
    "text-to-image": (VersatileDiffusionTextToImagePipeline, ["text-to-image"]),
    "image-to-image": (VersatileDiffusionImageVariationPipeline, ["image-to-image"]),
    "dual": (VersatileDiffusionDualGuidedPipeline, ["text-to-image", "image-to-image"]),
}
CONTEXTS = {"text-to-image": ["text"], "image-to-image": ["image"], "dual": ["text", "image"]}
LENGTHS = {"text": 77, "image": 257}  # CLIP's tokens
PROMPT, SCALE, RATIO = "a large red circle on the left", 7.5, 0.6
CPU = {"width": 80, "resolution": 256, "steps": 5, "clip_layers": 12, "dtype": "float32"}
ACCELERATOR = {"width": 320, "resolution": 512, "steps": 50, "clip_layers": 24, "dtype": "bfloat16"}
SMOKE = {"width": 16, "resolution": 64, "steps": 2, "clip_layers": 1, "rounds": 1}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--width", type=int, help="of the U-Nets' first level, a multiple of 16; 320 as released")
    parser.add_argument("--resolution", type=int, help="side of the pictures, a multiple of 64")
    parser.add_argument("--clip_layers", type=int, help="of the picture encoder; the text encoder has half of them")
    parser.add_argument("--steps", type=int, help="of a sampling call")
    parser.add_argument("--rounds", type=int, default=5, help="each round times both sides once")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=list(FLOWS))
    parser.add_argument("--compile", action="store_true", help="also on a CPU; minutes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--memory_dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--measure_memory", nargs=3, help=argparse.SUPPRESS)  # side, flow, folder: in its own process
    args = parser.parse_args(arguments)
    defaults = CPU if args.device == "cpu" else ACCELERATOR
    for name, value in ({**defaults, **SMOKE} if args.smoke else defaults).items():
        if getattr(args, name) is None or (args.smoke and name in SMOKE):
            setattr(args, name, value)
    for name, multiple in (("width", 16), ("resolution", 64), ("clip_layers", 1), ("steps", 1), ("rounds", 1)):
        if getattr(args, name) < 1 or getattr(args, name) % multiple:
            parser.error(f"--{name} must be a positive multiple of {multiple}, received {getattr(args, name)}")
    return args


def repair_dual_contexts() -> None:
    """Lets diffusers' blocks for dual contexts ignore the mask, always None, that its U-Net hands them."""
    forward = DualTransformer2DModel.forward

    def without_mask(self, *words, encoder_attention_mask=None, **options):
        return forward(self, *words, **options)

    DualTransformer2DModel.forward = without_mask


def load(side: str, flow: str, folder: str, args: argparse.Namespace) -> Any:
    """A pipeline for one flow: "ours", "diffusers", or "whole" (diffusers' pipeline that holds all flows)."""
    options: dict[str, Any] = {"dtype": getattr(torch, args.dtype)}
    if side == "ours":
        pipe = VersatilePipeline.from_pretrained(f"{folder}/ours", flows=FLOWS[flow][1], **options)
        # the size that pictures are stretched to before they are read, which diffusers leaves out
        pipe.register_to_config(default_sample_size=args.resolution // 8)
    else:
        published = f"{folder}/published"
        kind = VersatileDiffusionPipeline if side == "whole" else FLOWS[flow][0]
        parts = {}
        if kind is not VersatileDiffusionImageVariationPipeline:
            parts["text_unet"] = UNetFlatConditionModel.from_pretrained(published, subfolder="text_unet", **options)
        pipe = kind.from_pretrained(published, **parts, **options)
        if hasattr(pipe, "remove_unused_weights"):
            pipe.remove_unused_weights()  # as its documentation says: the text U-Net has given its transformers
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(args.device)


def picture(args: argparse.Namespace) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((args.resolution, args.resolution), Image.Resampling.BICUBIC)


def sample(side: str, flow: str, pipe: Any, args: argparse.Namespace, steps: int, **contexts: Any) -> np.ndarray:
    """One picture (1, H, W, 3) in [0, 1], from the same noise and, except for dual contexts, with the same null."""
    shape = (1, 4, args.resolution // 8, args.resolution // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {
        "latents": latents.to(args.device, getattr(torch, args.dtype)), "num_inference_steps": steps,
        "guidance_scale": SCALE, "output_type": "np", "height": args.resolution, "width": args.resolution,
    }  # fmt: skip
    if side == "ours":
        given = {"text": {"prompt": PROMPT}, "image": {"image": picture(args), "null_image": "black"}}
        for context in [] if contexts else CONTEXTS[flow]:
            options |= given[context]
        ratio = {"text_ratio": RATIO} if flow == "dual" else {}
        return pipe(**options, **contexts, **ratio).images
    if flow == "text-to-image":
        return (pipe.text_to_image if side == "whole" else pipe)(PROMPT, **options).images
    if flow == "dual":
        call = pipe.dual_guided if side == "whole" else pipe
        return call(PROMPT, picture(args), text_to_image_strength=RATIO, **options).images
    call = pipe.image_variation if side == "whole" else pipe
    return call(picture(args), negative_prompt=Image.new("RGB", picture(args).size), **options).images


@torch.no_grad()
def encode_as_diffusers(pipe: Any, image: Image.Image) -> dict[str, Tensor]:
    """Both contexts of diffusers' dual pipeline, under our names."""
    device = pipe._execution_device
    null_text, text = pipe._encode_text_prompt([PROMPT], device, 1, True).chunk(2)
    null_image, own = pipe._encode_image_prompt([image], device, 1, True).chunk(2)
    texts = {"prompt_embeds": text, "negative_prompt_embeds": null_text}
    return texts | {"image_embeds": own, "negative_image_embeds": null_image}


def row(case: str, found: tuple[str, str], ratio: float, difference: str) -> dict[str, Any]:
    print(f"  {case}: {ratio:.2f}", file=sys.stderr, flush=True)
    shown = {"case": case, "diffusers": found[0], "ours": found[1], "ratio": ratio}
    return shown | {"difference": difference}


def timed(case: str, pair: Sequence[Any], difference: str, args: argparse.Namespace) -> dict[str, Any]:
    times = race(pair[0], pair[1], rounds=args.rounds, device=args.device, within=torch.no_grad)
    seconds = [min(one) for one in times]
    shown = (f"{seconds[0]:.3f} s", f"{seconds[1]:.3f} s")
    return row(case, shown, seconds[1] / seconds[0], difference)


@torch.no_grad()
def network_pair(flow: str, theirs: Any, ours: Any, args: argparse.Namespace) -> tuple[Any, Any]:
    """Both networks on the batch of one guided step, as functions of nothing."""
    draw = torch.Generator().manual_seed(2)
    place = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    latents = torch.randn(2, 4, args.resolution // 8, args.resolution // 8, generator=draw).to(**place)
    width, kinds = ours.unet.config["context_types"]["image"], CONTEXTS[flow]
    tokens = [torch.randn(2, LENGTHS[kind], width, generator=draw).to(**place) for kind in kinds]
    if flow == "dual":
        theirs.set_transformer_params(RATIO, ("text", "image"))
    options = {"context_type": kinds, "context_ratios": [RATIO, 1 - RATIO][: len(kinds)], "return_dict": False}
    timestep, joined = torch.tensor(500, device=args.device), torch.cat(tokens, dim=1)
    return (
        lambda: theirs.image_unet(latents, timestep, encoder_hidden_states=joined, return_dict=False)[0],
        lambda: ours.unet(latents, timestep, tokens, **options)[0],
    )


def flow_rows(flow: str, folder: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    sides = ("diffusers", "ours")
    loading = [(lambda side=side: load(side, flow, folder, args)) for side in sides]
    yield timed(f"{flow}: loading", loading, "-", args)
    theirs, ours = (function() for function in loading)
    pair = network_pair(flow, theirs, ours, args)
    with torch.no_grad():
        outputs = [function().float() for function in pair]
    difference = f"{float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()):.1e}"
    yield timed(f"{flow}: network, one guided step", pair, difference, args)
    given = encode_as_diffusers(theirs, picture(args)) if flow == "dual" else {}
    first = sample("diffusers", flow, theirs, args, args.steps)
    second = sample("ours", flow, ours, args, args.steps, **given)
    calls = [
        (lambda side=side, pipe=pipe: sample(side, flow, pipe, args, args.steps))
        for side, pipe in zip(sides, (theirs, ours), strict=True)
    ]
    yield timed(f"{flow}: sampling, {args.steps} steps", calls, f"{np.abs(first - second).max():.1e}", args)
    if args.compile or args.device != "cpu":
        ours.unet = torch.compile(ours.unet, fullgraph=True)
        second = sample("ours", flow, ours, args, args.steps, **given)
        yield timed(f"{flow}: sampling, ours compiled", calls, f"{np.abs(first - second).max():.1e}", args)


def memory_rows(flow: str, folder: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    peaks = {}
    for side in ("diffusers", "whole", "ours"):
        words = ["--resolution", args.resolution, "--dtype", args.memory_dtype, "--device", args.device]
        command = [sys.executable, __file__, "--measure_memory", side, flow, folder, *map(str, words)]
        answer = subprocess.run([*command, "--threads", str(args.threads)], capture_output=True, text=True)
        if answer.returncode:
            raise RuntimeError(f"measuring the memory of {side}, {flow}, failed:\n{answer.stderr}")
        peaks[side] = int(answer.stdout.split()[-1])
    for side, name in (("diffusers", FLOWS[flow][0].__name__), ("whole", VersatileDiffusionPipeline.__name__)):
        sizes = (f"{peaks[side] / 2**20:.0f} MiB", f"{peaks['ours'] / 2**20:.0f} MiB")
        yield row(f"{flow}: peak memory, {name}", sizes, peaks["ours"] / peaks[side], "-")


def measure_memory(args: argparse.Namespace) -> int:
    """Bytes at the peak of loading one flow and making one picture, above what the imports hold."""
    (side, flow, folder), before = args.measure_memory, process_bytes("VmRSS")
    sample(side, flow, load(side, flow, folder, args), args, steps=2)
    if args.device != "cpu":
        return torch.accelerator.max_memory_allocated()
    return process_bytes("VmHWM") - before


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    torch.set_num_threads(args.threads)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    repair_dual_contexts()
    if args.measure_memory:
        print(measure_memory(args))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_repository(f"{folder}/published", args.width, args.resolution, args.clip_layers, PROMPT)
        pipe = convert_repository(f"{folder}/published", args.width, tokenizer)
        pipe.save_pretrained(f"{folder}/ours")
        count = sum(parameter.numel() for parameter in pipe.unet.parameters())
        del pipe
        print(
            f"VersatileUNet of {count:,} parameters, {args.resolution} x {args.resolution} pictures, {args.dtype} on"
            f" {args.device}, {args.threads} threads, torch {torch.__version__}, Python {platform.python_version()}"
        )
        for flow in args.flows:
            rows += memory_rows(flow, folder, args)
            rows += flow_rows(flow, folder, args)
    print("\n| case | diffusers | ours | ours / diffusers | difference |\n|---|---|---|---|---|")
    for one in rows:
        print(f"| {one['case']} | {one['diffusers']} | {one['ours']} | {one['ratio']:.2f}"
              f" | {one['difference']} |")  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
