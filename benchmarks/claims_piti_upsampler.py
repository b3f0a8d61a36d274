"""What makes PITI's upsampler sharp? A ladder of runs, on true small images and on those of the base stage.

    python benchmarks/claims_piti_upsampler.py runs/upsampler-plain runs/upsampler-bsr runs/upsampler-l0 \\
        runs/upsampler-perceptual runs/upsampler-wgan runs/upsampler-log \\
        --feature_model checkpoints/versatile-scenes-64

The paper (arXiv 2205.12952, section 3.4): plain diffusion upsampling stays over-smooth even with strong degradation,
hence the perceptual and the adversarial term. Each folder is a `PITIPipeline` with its upsampler, all of one condition
and one base stage; a row each, and one of bilinear enlargement. Input: held-out scenes made smaller ("true"), and what
the base stage of the first folder draws of their conditions ("base").

- sharpness: mean length of the brightness's gradient, and variance of its Laplacian, each over that of the true images
- PSNR, perceptual distance: to the true images (on "base" they contain the base stage's own errors)
- Frechet distance: to the true images, over the vectors of the named network
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from parts.piti_scenes import check_folder, condition_of, held_out_scenes, true_pictures
from torch import Tensor

from diffusers_ext import PITIPipeline
from diffusers_ext.degradations.resizing import resize, round_to_8_bits
from diffusers_ext.evaluation.frechet import frechet_distance
from diffusers_ext.evaluation.image_quality import gradient_length, laplacian_variance, psnr
from diffusers_ext.evaluation.prompt_following import case_generators
from diffusers_ext.losses.perceptual import CLIPDistance
from diffusers_ext.pipelines.glide.base import upsample
from diffusers_ext.pipelines.piti.pipeline_piti import truncate_to_8_bits

COLUMNS = ("gradient", "Laplacian", "PSNR", "perceptual", "Frechet")


class Ladder:
    """Held-out scenes, their conditions, and small images of both kinds.

    Args:
        first: The pipeline whose base stage draws.
        args: The options.
    """

    def __init__(self, first: Any, args: argparse.Namespace):
        self.args = args
        scenes = held_out_scenes(args.scenes, args.num_cases)
        side, low = first.upscale_unet.config["sample_size"], first.unet.config["sample_size"]
        self.described = described(first)
        self.true = 2 * true_pictures(scenes, side) - 1  # (n, 3, H, W) in [-1, 1]
        kind = first.config["condition_type"]
        maps = [condition_of(kind, scene, first.encoder.config["sample_size"]) for scene in scenes]
        read = [first.read_conditions(**{name: one[None] for name, one in given.items()}) for given in maps]
        self.conditions = torch.cat(read)
        small = torch.stack([resize(image, low, low, "area") for image in self.true])
        self.inputs = {"true": round_to_8_bits(small), "base": self.draw_base(first, maps)}

    def draw_base(self, first: Any, maps: list[dict[str, Any]]) -> Tensor:
        """What the base stage makes of the conditions, as it hands it on."""
        parts = {name: part for name, part in first.components.items() if not name.startswith("upscale_")}
        names = ("condition_type", "label_palette", "label_names", "default_guidance_scale")
        base = PITIPipeline(**parts, **{name: first.config[name] for name in names})
        base.set_progress_bar_config(disable=True)
        drawn = []
        for cases in self.batches():
            given = {name: torch.stack([torch.as_tensor(maps[k][name]) for k in cases]) for name in maps[0]}
            generator = case_generators(self.args.seed, cases, self.args.device)
            steps = self.args.num_inference_steps
            images = base(**given, num_inference_steps=steps, generator=generator, output_type="pt").images
            drawn.append(2 * images.float().cpu() - 1)
        return truncate_to_8_bits(torch.cat(drawn))

    def batches(self) -> list[range]:
        """Numbers of the cases of each batch."""
        count, size = self.args.num_cases, self.args.batch_size
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def enlarge(self, pipe: Any, low: Tensor) -> Tensor:
        """Large images (n, 3, H, W) in [-1, 1] of the small ones, by the pipeline's upsampler."""
        drawn = []
        for cases in self.batches():
            embeds = pipe.encode_conditions(self.conditions[cases.start : cases.stop], pipe.upscale_encoder)
            images = pipe.run_upsampler(
                low[cases.start : cases.stop].to(embeds.device),
                embeds,
                num_inference_steps=self.args.upscale_num_inference_steps,
                generator=case_generators(self.args.seed, cases, self.args.device),
            )
            drawn.append(images.float().cpu().clamp(-1, 1))
        return torch.cat(drawn)


def figures_of(images: Tensor, true: Tensor, distance: CLIPDistance) -> dict[str, float]:
    """The columns of a row, of images and true ones (n, 3, H, W) in [-1, 1]."""
    return {
        "gradient": gradient_length(images) / gradient_length(true),
        "Laplacian": laplacian_variance(images) / laplacian_variance(true),
        "PSNR": psnr(images, true),
        "perceptual": float(distance(images, true).mean()),
        "Frechet": frechet_distance(distance.embed(images), distance.embed(true)),
    }


def described(pipe: Any) -> str:
    """What must be the same for all rows."""
    low, side = (unet.config["sample_size"] for unet in (pipe.unet, pipe.upscale_unet))
    return f"{pipe.config['condition_type']} at {pipe.encoder.config['sample_size']} pixels to {low}, then {side}"


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with a message at what the command cannot measure."""
    for name, least in (("num_cases", 2), ("batch_size", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, received {getattr(args, name)}")
    for folder in args.folders:
        check_folder(parser, folder)


def load(parser: argparse.ArgumentParser, folder: str, device: str) -> Any:
    """A pipeline with its upsampler."""
    pipe: Any = PITIPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    if not pipe.upscales:
        parser.error(f"{folder!r} has no upsampler: train one with train_piti.py --stage upsampler")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def show(rows: Sequence[dict[str, Any]], network: str) -> None:
    """Prints the table."""
    print(f"| upsampler | small images | {' | '.join(COLUMNS[:3])} | perceptual ({network}) | Frechet ({network}) |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for row in rows:
        numbers = " | ".join(f"{row[name]:.3f}" for name in COLUMNS)
        print(f"| {row['upsampler']} | {row['input']} | {numbers} |")


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folders", nargs="+", help="PITI pipelines with upsamplers, the plain one first")
    parser.add_argument("--feature_model", required=True, help="folder with a CLIP image tower, or pipeline with one")
    parser.add_argument("--num_cases", type=int, default=256, help="held-out scenes")
    parser.add_argument("--scenes", default="plain+one", help="grounds, and `one` or `two` objects: as in training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_inference_steps", type=int, help="of the small image; default: the checkpoint's")
    parser.add_argument("--upscale_num_inference_steps", type=int, help="of the large image")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(arguments)
    check(parser, args)
    distance = CLIPDistance(args.feature_model, "--feature_model")
    ladder, rows = None, []
    for folder in args.folders:
        pipe = load(parser, folder, args.device)
        ladder = ladder or Ladder(pipe, args)
        if described(pipe) != ladder.described:
            parser.error(f"{folder!r} draws {described(pipe)}, the first one {ladder.described}")
        for name, low in ladder.inputs.items():
            row = {"upsampler": Path(folder).name, "input": name}
            rows.append(row | figures_of(ladder.enlarge(pipe, low), ladder.true, distance))
    assert ladder is not None
    for name, low in ladder.inputs.items():
        row = {"upsampler": "bilinear enlargement", "input": name}
        rows.append(row | figures_of(upsample(low, tuple(ladder.true.shape[-2:])), ladder.true, distance))
    show(rows, distance.name)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
