"""How likely are held-out images under a base and an upscaler? The terms of the bound, in bits a dimension.

    python benchmarks/quality_cascaded_likelihood.py runs/cascaded-scenes-16 runs/cascaded-scenes-16-32 --levels 0 101

Ho et al., arXiv 2106.15282, section 3: with z_0 the image x_0 made small, and s the level where the base stops,

    -log p(x_0) <= L_T(z_0) + sum over t > s of KL(q(z_{t-1} | z_t, z_0) || p(z_{t-1} | z_t)) + L(x_0 | z_s)

where L(x_0 | z_s) is the upscaler's own bound, from its L_T to the likelihood of 8-bit levels at its first step. At
s = 0 the sum ends with that likelihood of z_0. Everything is divided by the number of dimensions of x_0. Variances are
those that the stages sample with: learned in a range (hybrid loss), or fixed. Predicted clean images are clamped where
the sampler clamps them. Held-out images of `scenes`, one object each; x_0 is drawn at the upscaler's size, and z_0 is
made of it by area, in 8 bits.

All T terms of a sum need T passes of the network for each image; `--num_timesteps n` draws one timestep in each of n
equal parts of the schedule instead, which is right in the mean. Errors are standard errors over the images.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # folders are read; nothing is looked up

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor
from parts.cascade_judge import pictures, true_scenes
from torch import Generator, Tensor

from diffusers_ext import CascadedDiffusionPipeline
from diffusers_ext.data.scenes import label
from diffusers_ext.degradations.resizing import resize_batch, round_to_8_bits
from diffusers_ext.evaluation.prompt_following import case_generators
from diffusers_ext.losses.diffusion import VariationalLoss
from diffusers_ext.pipelines.cascaded.denoising import StageCondition
from diffusers_ext.schedulers.gaussian import scheduler_attribute, scheduler_setting

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned_range")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("base", help="folder of a base stage")
    parser.add_argument("upscaler", help="folder of the stage above")
    parser.add_argument("--levels", type=int, nargs="+", help="s, whole; default: the upscaler's own")
    parser.add_argument("--num_cases", type=int, default=48)
    parser.add_argument("--num_timesteps", type=int, default=100, help="of each sum; 0: all")
    parser.add_argument("--grounds", nargs="+", default=["plain"])
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(arguments)
    for name, least in (("num_cases", 2), ("batch_size", 1), ("num_timesteps", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, received {getattr(args, name)}")
    for folder in (args.base, args.upscaler):
        if not (Path(folder) / "model_index.json").is_file():
            parser.error(f"{folder!r} is no pipeline folder: it holds no model_index.json")
    return args


@dataclass(frozen=True)
class Bound:
    """The terms for each image (n,), in bits a dimension of the large image."""

    prior: Tensor
    base: Tensor
    upscaler: Tensor

    @property
    def total(self) -> Tensor:
        return self.prior + self.base + self.upscaler


def variance_half(stage: Any, timesteps: Tensor, noise: Tensor) -> Tensor:
    """The second half of an output that lies where the fixed variance of a sampler does: -1 is beta~, 1 is beta."""
    kind = scheduler_setting(stage.scheduler, "variance_type", "fixed_small")
    half = torch.full_like(noise, -1.0)
    if kind.startswith("fixed_large"):
        half[timesteps > 0] = 1.0  # the first step has beta~ of the second, as in ADM
    return half


def check_stage(stage: Any, name: str) -> None:
    """Refuses what the bound is not written for.

    Raises:
        SystemExit: Naming the stage, its setting and what is allowed.
    """
    for setting, usual, allowed in (
        ("variance_type", "fixed_small", VARIANCES),
        ("prediction_type", "epsilon", ("epsilon",)),
    ):
        value = scheduler_setting(stage.scheduler, setting, usual)
        if value not in allowed:
            raise SystemExit(
                f"{name}: its scheduler's `{setting}` is {value!r}; the bound needs {', '.join(allowed)}."
            )


def drawn_timesteps(first: int, last: int, count: int, generators: list[Generator]) -> list[tuple[Tensor, int]]:
    """(timesteps (n,), how many each stands for), from `first` to `last` - 1; `count` 0: all.

    Draws a number for each part of the schedule that is longer than 1.
    """
    parts = last - first if count == 0 else min(count, last - first)
    edges = [first + (last - first) * part // max(parts, 1) for part in range(parts + 1)]
    found = []
    for start, end in zip(edges, edges[1:], strict=False):
        rows = [
            torch.randint(start, end, (), generator=one) if end - start > 1 else torch.tensor(start)
            for one in generators
        ]
        found.append((torch.stack(rows), end - start))
    return found


@torch.no_grad()
def stage_terms(
    stage: Any,
    clean: Tensor,
    condition: StageCondition,
    generators: list[Generator],
    *,
    first: int = 0,
    num_timesteps: int = 0,
) -> tuple[Tensor, Tensor]:
    """L_T, and the sum of the terms from timestep `first` on: (n,) each, in bits a dimension of `clean`.

    Args:
        clean: Images (n, 3, h, w) in [-1, 1], on 8-bit levels.
        condition: Of the stage, for these images.
        generators: One an image.
        first: The first timestep that counts.
        num_timesteps: Of the sum; 0: all.

    Draws of each generator: the timesteps, then for each the noise.
    """
    loss = VariationalLoss(scheduler_attribute(stage.scheduler, "betas")).to(clean.device)
    clip = bool(scheduler_setting(stage.scheduler, "clip_sample", False))
    total = torch.zeros(len(clean), device=clean.device)
    for timesteps, count in drawn_timesteps(first, loss.num_timesteps, num_timesteps, generators):
        timesteps = timesteps.to(clean.device)
        noise = randn_tensor(clean.shape, generator=generators, device=clean.device)
        noisy = scheduler_attribute(stage.scheduler, "add_noise")(clean, noise, timesteps)
        (_, labels, low_res, level), _ = condition.branches(noisy)
        output = stage.unet(noisy, timesteps, labels, low_res, level, return_dict=False)[0]
        if output.shape[1] == clean.shape[1]:
            output = torch.cat([output, variance_half(stage, timesteps, output)], dim=1)
        total += count * loss.bound_term(output, clean, noisy, timesteps, clip_sample=clip)
    return loss.prior(clean), total


def two_stage_bound(
    base: Any,
    upscaler: Any,
    large: Tensor,
    labels: list[int],
    level: int,
    generators: list[Generator],
    num_timesteps: int = 0,
) -> Bound:
    """The bound of images (n, 3, h, w) in [-1, 1] whose base stops at `level`."""
    side = upscaler.config["low_res_size"]
    small = round_to_8_bits(resize_batch(large, side, side, "area"))
    share = small[0].numel() / large[0].numel()

    def known(stage: Any) -> list[int] | None:
        return None if stage.num_classes is None else labels

    device, count = large.device, num_timesteps
    condition = base.encode_labels(known(base), device=device)
    prior, kept = stage_terms(base, small, condition, generators, first=level, num_timesteps=count)
    condition = upscaler.encode_low_res(small, known(upscaler), level=level, generator=generators, device=device)
    own_prior, own = stage_terms(upscaler, large, condition, generators, num_timesteps=count)
    return Bound(prior * share, kept * share, own_prior + own)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    diffusers.utils.logging.disable_progress_bar()
    pipe = CascadedDiffusionPipeline.from_stages([args.base, args.upscaler]).to(args.device)
    base, upscaler = pipe.base, pipe.upscale_1
    for stage, name in ((base, args.base), (upscaler, args.upscaler)):
        stage.check_components()
        check_stage(stage, name)
    levels = [int(upscaler.resolve_noise_level(level)) for level in args.levels or [None]]
    for level in levels:
        base.check_stop_level(level)
    side = upscaler.unet.config["sample_size"]
    if upscaler.config["low_res_size"] != base.unet.config["sample_size"]:
        raise SystemExit(
            f"{args.upscaler} takes images of {upscaler.config['low_res_size']} pixels, {args.base} makes"
            f" {base.unet.config['sample_size']}."
        )
    print(f"{args.num_cases} held-out images of {side} pixels, {args.num_timesteps or 'all'} timesteps of each sum\n")
    print("| s | L_T(z_0) | sum of KL above s | L(x_0 given z_s) | bound, bits a dimension |\n|---|---|---|---|---|")
    rows = []
    for level in levels:
        found: list[Bound] = []
        for start in range(0, args.num_cases, args.batch_size):
            cases = range(start, min(start + args.batch_size, args.num_cases))
            scenes = true_scenes(cases, args.grounds)
            large = 2 * pictures(scenes, side).to(args.device) - 1
            generators = case_generators(args.seed, cases, args.device)
            labels = [label(scene) for scene in scenes]
            found.append(two_stage_bound(base, upscaler, large, labels, level, generators, args.num_timesteps))
            print(f"\r  s = {level}: {cases[-1] + 1}/{args.num_cases} images", end="", file=sys.stderr, flush=True)
        row: dict[str, Any] = {"level": level}
        for name in ("prior", "base", "upscaler", "total"):
            values = torch.cat([getattr(one, name) for one in found]).double()
            row[name], row[f"{name}_error"] = float(values.mean()), float(values.std() / len(values) ** 0.5)
        rows.append(row)
        cells = [f"{row[name]:.4f} ± {row[f'{name}_error']:.4f}" for name in ("base", "upscaler", "total")]
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
        print(f"| {level} | {row['prior']:.2e} | {' | '.join(cells)} |", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
