"""How fast is latent diffusion here? Against the same network on pixels, and against diffusers' own pipelines.

    python benchmarks/speed_ldm.py                 # CPU: 64 x 64 pictures, about a tenth of the paper's widths
    python benchmarks/speed_ldm.py --device cuda   # 256 x 256 pictures, the widths of the paper's unconditional models
    python benchmarks/speed_ldm.py --smoke         # whether it runs; its figures mean nothing

The first table repeats the paper's comparison (arXiv 2112.10752, table 6: LDM-4 trains and samples at least 2.7 times
as many pictures a second as LDM-1): one U-Net of the same configuration, hence of equal parameters, on pixels and on
the latents of a KL autoencoder of factor 4. A training step is encoding, noising, forward, backward and AdamW;
sampling is DDIM with the decoder. The second table holds our pipelines against `LDMTextToImagePipeline` and
`LDMSuperResolutionPipeline` with the very same networks; `difference` is the largest one of a pixel in [0, 1]. On a
GPU it also shows the peak of memory that a call adds to the weights, and a third table the same calls with the U-Net
as one compiled graph (`--compile`: on a CPU too).

Both sides of a row take turns; times are the shortest of the rounds, which other work on the machine disturbs least.
All weights are random.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    LDMSuperResolutionPipeline,
    LDMTextToImagePipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from parts.measuring import peak_on_device
from parts.measuring import race as take_turns
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from diffusers_ext.losses.diffusion import noise_error
from diffusers_ext.pipelines.ldm.first_stage import encode_first_stage, latent_scale
from diffusers_ext.pipelines.ldm.pipeline_ldm_text import LDMTextPipeline
from diffusers_ext.pipelines.ldm.pipeline_ldm_unconditional import LDMUnconditionalPipeline
from diffusers_ext.pipelines.ldm.pipeline_ldm_upscale import LDMUpscalePipeline
from diffusers_ext.schedulers.gaussian import ldm_scheduler

PROMPTS = ["a large red circle on the left", "a small blue star"]
CPU = {"resolution": 64, "channels": 32, "first_stage_channels": 32, "context": 128, "batch_size": 4, "steps": 10}
ACCELERATOR = {
    "resolution": 256, "channels": 224, "first_stage_channels": 128, "context": 1280, "batch_size": 8, "steps": 50
}  # fmt: skip
SMOKE = {"resolution": 32, "channels": 32, "first_stage_channels": 8, "context": 16, "batch_size": 1, "steps": 2,
         "rounds": 1}  # fmt: skip


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--resolution", type=int, help="side of the pictures, a multiple of 32")
    parser.add_argument("--channels", type=int, help="of the U-Net's first level, a multiple of 32")
    parser.add_argument("--channel_mult", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--attention_levels", type=int, nargs="+", default=[1, 2, 3], help="0 is the finest")
    parser.add_argument("--first_stage_channels", type=int, help="of the autoencoder's first level, a multiple of 8")
    parser.add_argument("--context", type=int, help="width of the text encoder, a multiple of 8")
    parser.add_argument("--text_layers", type=int, default=4, help="of the text encoder; 32 in the released model")
    parser.add_argument("--batch_size", type=int, help="pictures at a time, in training and sampling")
    parser.add_argument("--steps", type=int, help="of sampling")
    parser.add_argument("--rounds", type=int, default=7, help="each round times both sides of a row once")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of autocast")
    parser.add_argument("--compile", action="store_true", help="also on a CPU; minutes")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(arguments)
    defaults = CPU if args.device == "cpu" else ACCELERATOR
    for name, value in (SMOKE if args.smoke else defaults).items():
        if getattr(args, name) is None or args.smoke:
            setattr(args, name, value)
    for name, multiple in (("resolution", 32), ("channels", 32), ("first_stage_channels", 8), ("context", 8),
                           ("batch_size", 1), ("steps", 1), ("rounds", 1), ("text_layers", 1)):  # fmt: skip
        value = getattr(args, name)
        if value < 1 or value % multiple:
            parser.error(f"--{name} must be a positive multiple of {multiple}, received {value}")
    return args


def build_unet(args: argparse.Namespace, in_channels: int = 3, *, context: bool = False) -> Any:
    attends = [level in args.attention_levels for level in range(len(args.channel_mult))]
    kind, down, up = UNet2DModel, "AttnDownBlock2D", "AttnUpBlock2D"
    options: dict[str, Any] = {"attention_head_dim": 32}
    if context:
        kind, down, up = UNet2DConditionModel, "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
        options = {"attention_head_dim": 8, "cross_attention_dim": args.context}
    unet = kind(
        sample_size=args.resolution,
        in_channels=in_channels,
        out_channels=3,
        block_out_channels=tuple(args.channels * mult for mult in args.channel_mult),
        down_block_types=tuple(down if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple(up if attend else "UpBlock2D" for attend in attends[::-1]),
        layers_per_block=2,
        **options,
    )
    return unet.to(args.device)


def build_first_stage(args: argparse.Namespace, kind: type = AutoencoderKL, levels: int = 3) -> Any:
    """kl-f4 or vq-f4 of the paper, narrower if asked for; factor 8 with four levels."""
    width = args.first_stage_channels
    vqvae = kind(
        block_out_channels=tuple(width * mult for mult in (1, 2, 4, 4)[:levels]),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2,
        latent_channels=3,
        norm_num_groups=min(32, width),
        scaling_factor=1.0,
        **({"num_vq_embeddings": 8192} if kind is VQModel else {}),
    )
    return vqvae.eval().requires_grad_(False).to(args.device)


def build_text_encoder(args: argparse.Namespace) -> tuple[LDMBertModel, PreTrainedTokenizerFast]:
    """As wide as asked for, of 77 tokens like the released one; one token a word of the prompts."""
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=77, pad_token="[PAD]", unk_token="[UNK]"
    )
    config = LDMBertConfig(
        vocab_size=len(tokenizer), encoder_layers=args.text_layers, encoder_ffn_dim=4 * args.context,
        d_model=args.context, dropout=0.0,
    )  # fmt: skip
    return LDMBertModel(config).eval().to(args.device), tokenizer


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def autocast(args: argparse.Namespace) -> torch.autocast:
    dtype = getattr(torch, args.dtype)
    return torch.autocast(torch.device(args.device).type, dtype, enabled=dtype != torch.float32)


def under_autocast(function: Callable[[], object], args: argparse.Namespace) -> None:
    with autocast(args):
        function()


def race(first: Callable[[], object], second: Callable[[], object], args: argparse.Namespace) -> tuple[float, float]:
    """The shortest time of both in seconds."""
    within = partial(autocast, args)
    first_times, second_times = take_turns(first, second, rounds=args.rounds, device=args.device, within=within)
    return min(first_times), min(second_times)


def training_step(unet: Any, vqvae: Any, images: Tensor) -> Callable[[], None]:
    """One step on a batch of pictures, or on their latents if there is a first stage."""
    scheduler, optimizer = ldm_scheduler(), torch.optim.AdamW(unet.parameters(), lr=1e-5)

    def step() -> None:
        clean = images
        if vqvae is not None:
            with torch.no_grad():
                clean = encode_first_stage(vqvae, images, sample=True) * latent_scale(vqvae)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(1000, (len(images),), device=images.device)
        prediction = unet(scheduler.add_noise(clean, noise, timesteps), timesteps, return_dict=False)[0]
        noise_error(prediction, noise).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def row(case: str, found: list[str], ratio: float, difference: str) -> dict:
    return {
        "case": case, "first": found[0], "second": found[1], "ratio": ratio, "difference": difference
    }  # fmt: skip


def pixels_against_latents(args: argparse.Namespace) -> list[dict]:
    torch.manual_seed(0)
    on_pixels, on_latents, vqvae = build_unet(args), build_unet(args), build_first_stage(args)
    counts = [sum(parameter.numel() for parameter in unet.parameters()) for unet in (on_pixels, on_latents)]
    assert counts[0] == counts[1]
    images = 2 * torch.rand(args.batch_size, 3, args.resolution, args.resolution, device=args.device) - 1
    plain = quiet(DDIMPipeline(on_pixels, DDIMScheduler.from_config(ldm_scheduler().config)))
    latent = quiet(LDMUnconditionalPipeline(vqvae, on_latents, ldm_scheduler()))
    call = {"batch_size": args.batch_size, "num_inference_steps": args.steps, "output_type": "np"}
    size = {"height": args.resolution, "width": args.resolution}
    cases = {
        "training": (training_step(on_pixels, None, images), training_step(on_latents, vqvae, images)),
        f"sampling, {args.steps} steps": (lambda: plain(**call), lambda: latent(**call, **size)),
    }
    rows = []
    for name, (first, second) in cases.items():
        seconds = race(first, second, args)
        rates = [args.batch_size / value for value in seconds]
        found = [f"{rate:.3g}/s" for rate in rates]
        rows.append(row(name, found, rates[1] / rates[0], f"{counts[0]:,} parameters"))
        print(f"  {name}: {rows[-1]['ratio']:.2f}", file=sys.stderr, flush=True)
    return rows


def ours_against_stock(args: argparse.Namespace) -> dict[str, list[dict]]:
    """Two tables: diffusers and ours, and ours with the U-Net compiled."""
    torch.manual_seed(0)
    bert, tokenizer = build_text_encoder(args)
    text = (build_first_stage(args, levels=4), bert, tokenizer, build_unet(args, context=True).eval(), ldm_scheduler())
    side = args.resolution // 8
    call = {"prompt": PROMPTS, "height": args.resolution, "width": args.resolution, "guidance_scale": 5.0,
            "latents": torch.randn(len(PROMPTS), 3, side, side, device=args.device)}  # fmt: skip
    small = np.random.default_rng(0).random((1, args.resolution // 4, args.resolution // 4, 3), dtype=np.float32)
    picture = torch.from_numpy(small).permute(0, 3, 1, 2).to(args.device)
    upscale = (build_first_stage(args, VQModel), build_unet(args, 6).eval(), ldm_scheduler())
    stock, ours = quiet(LDMTextToImagePipeline(*text)), quiet(LDMTextPipeline(*text))
    stock_upscale, our_upscale = quiet(LDMSuperResolutionPipeline(*upscale)), quiet(LDMUpscalePipeline(*upscale))
    common = {"num_inference_steps": args.steps, "output_type": "np"}

    def generator() -> torch.Generator:
        return torch.Generator(args.device).manual_seed(1)

    cases = {
        f"text to image, guided, {args.steps} steps": (
            lambda: stock(**call, **common).images,
            lambda: ours(**call, **common).images,
        ),
        f"super-resolution, {args.steps} steps": (
            lambda: stock_upscale(2 * picture - 1, generator=generator(), **common).images,
            lambda: our_upscale(picture, generator=generator(), **common).images,
        ),
    }
    rows = compare(cases, args)
    if args.device != "cpu":
        for name, pair in cases.items():
            peaks = [peak_on_device(partial(under_autocast, function, args)) for function in pair]
            found = [f"{peak / 2**20:.0f} MiB" for peak in peaks]
            rows.append(row(f"{name}: peak memory above the weights", found, peaks[1] / peaks[0], "-"))
    tables = {"stock and ours": rows}
    if args.compile or args.device != "cpu":
        eager = {name: pair[1] for name, pair in cases.items()}
        compiled_text, compiled_upscale = quiet(LDMTextPipeline(*text)), quiet(LDMUpscalePipeline(*upscale))
        for pipe in (compiled_text, compiled_upscale):
            pipe.unet = torch.compile(pipe.unet, fullgraph=True)
        compiled = (
            lambda: compiled_text(**call, **common).images,
            lambda: compiled_upscale(picture, generator=generator(), **common).images,
        )
        tables["eager and compiled"] = compare(
            {name: (eager[name], function) for name, function in zip(eager, compiled, strict=True)}, args
        )
    return tables


def compare(cases: dict[str, tuple[Callable, Callable]], args: argparse.Namespace) -> list[dict]:
    rows = []
    for name, (first, second) in cases.items():
        with autocast(args):
            difference = float(np.abs(first() - second()).max())
        seconds = race(first, second, args)
        found = [f"{1000 * value:.0f} ms" for value in seconds]
        rows.append(row(name, found, seconds[1] / seconds[0], f"{difference:.1e}"))
        print(f"  {name}: {rows[-1]['ratio']:.2f}", file=sys.stderr, flush=True)
    return rows


def report(first: str, second: str, ratio: str, rows: list[dict]) -> None:
    print(f"\n| case | {first} | {second} | {ratio} | difference |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['case']} | {row['first']} | {row['second']} | {row['ratio']:.2f}"
              f" | {row['difference']} |", flush=True)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    torch.set_num_threads(args.threads)
    print(
        f"{args.resolution} x {args.resolution} pictures, batch {args.batch_size}, {args.dtype} on {args.device},"
        f" torch {torch.__version__}, Python {platform.python_version()}"
    )
    tables = {"pixels and latents": pixels_against_latents(args), **ours_against_stock(args)}
    report("pixels", "latents", "latents / pixels", tables["pixels and latents"])
    report("diffusers", "ours", "ours / diffusers", tables["stock and ours"])
    if "eager and compiled" in tables:
        report("eager", "compiled", "compiled / eager", tables["eager and compiled"])
    if args.json:
        Path(args.json).write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
