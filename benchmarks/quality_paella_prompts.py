"""How many prompts does a Paella checkpoint follow? Samples `scenes` prompts and lets the verifier read the pictures.

    python benchmarks/quality_paella_prompts.py checkpoints/paella-scenes-64 --num_prompts 256 --seeds 0 1 2

Half of the prompts ask for one object, half for two, each with its size and place. Every picture has a generator of
its own, seeded by (seed, number of the prompt): the batch size changes nothing. "Chance" are the same pictures against
the prompts of other pictures. "Tokenizer alone" are true pictures of held-out scenes, encoded and decoded: what a
perfect token predictor would reach. Standard errors are binomial, over all pictures of a row.
"""

import argparse
import itertools
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder is read; nothing is looked up

import diffusers
import numpy as np
import torch
import transformers
from parts.paella_samples import as_dict, sample_pictures
from parts.pages import wrap
from PIL import Image, ImageDraw, ImageFont

from diffusers_ext.data.scenes import balanced_prompts, full_caption, parse_caption, render, sample_scene
from diffusers_ext.data.scenes_verifier import check, read_picture
from diffusers_ext.evaluation.prompt_following import (
    Check,
    judge,
    judge_by_chance,
    markdown_table,
    summarize_by_objects,
)
from diffusers_ext.models.token_codec import decode_indices, encode_indices
from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline
from diffusers_ext.schedulers.scheduling_discrete_renoising import DiscreteRenoisingScheduler

RIGHT, NAMED, WRONG = (30, 150, 60), (225, 150, 20), (200, 40, 40)
LEGEND = ((RIGHT, "everything right"), (NAMED, "shape and colour right"), (WRONG, "not followed"))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", help="pipeline folder")
    parser.add_argument("--num_prompts", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[12])
    parser.add_argument(
        "--guidance_scale", type=float, nargs="+", help="several: each is tried; default: the pipeline's"
    )
    parser.add_argument(
        "--typical_mass", type=float, nargs="+", help="several: each is tried; default: the scheduler's"
    )
    parser.add_argument(
        "--temperature", type=float, nargs=2, metavar=("FIRST", "LAST"), help="default: the scheduler's"
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--num_true_pictures",
        type=int,
        help="for the tokenizer's rows; default: as many as prompts; 0 leaves them out",
    )
    parser.add_argument("--grid", help="PNG of the first setting's pictures, first seed, at most 64")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(arguments)
    for name in ("num_prompts", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, received {getattr(args, name)}")
    if args.num_true_pictures is None:
        args.num_true_pictures = args.num_prompts
    if not (Path(args.checkpoint) / "model_index.json").is_file():
        parser.error(f"{args.checkpoint!r} is no pipeline folder: it holds no model_index.json")
    return args


@torch.no_grad()
def check_tokenizer(pipe: PaellaPipeline, number: int, batch_size: int) -> list[Check]:
    """Encodes, decodes and reads true pictures of held-out scenes, one and two objects by turns."""
    side = pipe.config.default_sample_size * pipe.vae_scale_factor
    scenes = [sample_scene(0, i, split="test", num_objects=1 + i % 2) for i in range(number)]
    true = np.stack([render(scene, side) for scene in scenes])
    found = []
    for start in range(0, number, batch_size):
        images = torch.from_numpy(true[start : start + batch_size]).permute(0, 3, 1, 2) / 127.5 - 1
        indices = encode_indices(pipe.vqvae, images.to(pipe.device, pipe.vqvae.dtype))
        decoded = decode_indices(pipe.vqvae, indices).float().cpu().clamp(-1, 1)
        pixels = ((decoded + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        found += [read_picture(picture) for picture in pixels]
    return judge(found, [parse_caption(full_caption(scene)) for scene in scenes], check=check)


def draw_grid(pictures: list[np.ndarray], prompts: list[str], checks: list[Check]) -> Image.Image:
    """Pictures with their prompts below and a frame that says how they were judged."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    scale = max(1, round(192 / pictures[0].shape[0]))
    height, width = pictures[0].shape[0] * scale, pictures[0].shape[1] * scale
    font = ImageFont.load_default(size=13)
    lines = [wrap(prompt, font, width) for prompt in prompts]
    caption_height = 17 * max(len(one) for one in lines) + 8
    cell_width, cell_height = width + 16, height + caption_height + 12
    sheet = Image.new("RGB", (columns * cell_width + 8, rows * cell_height + 34), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption, one) in enumerate(zip(pictures, lines, checks, strict=True)):
        x, y = 12 + i % columns * cell_width, 10 + i // columns * cell_height
        frame = RIGHT if one.everything else NAMED if one.shape_and_color else WRONG
        draw.rectangle((x - 4, y - 4, x + width + 3, y + height + 3), fill=frame)
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (x, y))
        for number, line in enumerate(caption):
            draw.text((x, y + height + 6 + 17 * number), line, fill="black", font=font)
    x, y = 12, rows * cell_height + 10
    for color, meaning in LEGEND:
        draw.rectangle((x, y + 2, x + 12, y + 14), fill=color)
        draw.text((x + 18, y), meaning, fill="black", font=font)
        x += 36 + int(font.getlength(meaning))
    return sheet


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    started = time.perf_counter()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipe = PaellaPipeline.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype)).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    prompts, wanted = zip(*balanced_prompts(args.num_prompts, seed=0), strict=True)

    guidance_scales = args.guidance_scale or [pipe.config.default_guidance_scale]
    masses = args.typical_mass or [pipe.scheduler.config.typical_mass]
    temperature = tuple(args.temperature or pipe.scheduler.config.temperature)
    base = pipe.scheduler.config
    rows, settings, headlines, grid_saved = [], [], [], not args.grid
    for steps, guidance_scale, mass in itertools.product(args.steps, guidance_scales, masses):
        # a mass that the caller names is meant to be used, also where the checkpoint does not filter
        changed = {"typical_mass": mass, "typical_filtering": True} if args.typical_mass else {}
        pipe.scheduler = DiscreteRenoisingScheduler.from_config(base, **changed)
        setting = f"{steps} steps"
        setting += f", guidance {guidance_scale:g}" if len(guidance_scales) > 1 else ""
        setting += f", mass {mass:g}" if len(masses) > 1 else ""
        checks, chance, seconds = [], [], 0.0
        for seed in args.seeds:
            clock = time.perf_counter()
            pictures = sample_pictures(
                pipe,
                list(prompts),
                seed,
                args.batch_size,
                args.device,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                temperature=temperature,
            )
            seconds += time.perf_counter() - clock
            found = [read_picture(picture) for picture in pictures]
            judged = judge(found, wanted, check=check, seed=seed)
            checks += judged
            chance += judge_by_chance(found, wanted, check=check, seed=seed)
            if not grid_saved:
                shown = min(len(pictures), 64)
                draw_grid(pictures[:shown], list(prompts[:shown]), judged[:shown]).save(args.grid)
                grid_saved = True
        followed = summarize_by_objects(checks, chance)
        rows += [(setting, row) for row in followed]
        headlines.append(followed[-1])
        settings.append(
            {
                "steps": steps,
                "guidance_scale": guidance_scale,
                "typical_mass": mass,
                "typical_filtering": pipe.scheduler.config.typical_filtering,
                "temperature": list(temperature),
                "sampling_seconds": seconds,
                "pictures": len(checks),
                "rows": [as_dict(row) for row in followed],
            }
        )
    if args.num_true_pictures:
        true = check_tokenizer(pipe, args.num_true_pictures, args.batch_size)
        tokenizer_rows = summarize_by_objects(true)
        rows += [("tokenizer alone", row) for row in tokenizer_rows]

    first = settings[0]
    filtering = f"typical mass {'/'.join(f'{mass:g}' for mass in masses)}"
    print(
        f"{Path(args.checkpoint).name}: {args.num_prompts} prompts, seed {', '.join(map(str, args.seeds))}, guidance"
        f" {'/'.join(f'{scale:g}' for scale in guidance_scales)},"
        f" {filtering if first['typical_filtering'] else 'no typical filtering'}, temperature {temperature[0]:g} to"
        f" {temperature[1]:g}, {args.dtype} on {args.device}\n"
    )
    print(markdown_table(rows))
    print()
    for entry in settings:
        rate = entry["pictures"] / entry["sampling_seconds"]
        mass = f", mass {entry['typical_mass']:g}" if entry["typical_filtering"] else ""
        print(
            f"{entry['steps']} steps, guidance {entry['guidance_scale']:g}{mass}:"
            f" {entry['pictures']} pictures in {entry['sampling_seconds']:.1f} s ({rate:.1f} a second)"
        )
    wall = time.perf_counter() - started
    print(
        f"Prompts followed at {first['steps']} steps: shape and colour {headlines[0].shape_and_color}, everything"
        f" {headlines[0].everything} ({first['pictures']} pictures, seed {', '.join(map(str, args.seeds))})."
        f" Wall time {wall:.1f} s."
    )
    if args.grid:
        print(f"Pictures: {args.grid}")
    if args.json:
        figures = {
            "checkpoint": Path(args.checkpoint).name,
            "num_prompts": args.num_prompts,
            "seeds": args.seeds,
            "settings": settings,
            "tokenizer": [as_dict(row) for row in tokenizer_rows] if args.num_true_pictures else None,
            "wall_seconds": wall,
        }
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
