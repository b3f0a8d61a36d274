"""What the paper of Cascaded Diffusion says about its parts, measured again on stages trained on `scenes`.

    python benchmarks/claims_cascaded.py fidelity STAGES                       # over s: generated, true small images
    python benchmarks/claims_cascaded.py truncation STAGES                     # over s: stopped early, noised again
    python benchmarks/claims_cascaded.py augmentation STAGES --against FIXED   # one network for all s, or for one s
    python benchmarks/claims_cascaded.py blur STAGES --against BLUR NONE       # kinds of augmentation of a stage
    python benchmarks/claims_cascaded.py ladder STAGES --against A B           # what each step of a recipe is worth
    python benchmarks/claims_cascaded.py single STAGES --against SINGLE        # one network that computes as much
    python benchmarks/claims_cascaded.py unconditional STAGES --against STAGE  # a last stage that knows no class
    python benchmarks/claims_cascaded.py cas STAGES                            # a classifier that saw samples alone

STAGES are the folders of a cascade's stages in order, or the one folder of a whole cascade. `--stage` is the one that
is varied and judged, by default the last that is given; `--against` are folders that take its place (`single`: base
stages that draw the large images at once). docs/cascaded_diffusion.md has the commands that train all of them.

A row holds the share of images that show their class (`scenes`' verifier), the Frechet distance over vectors of
`--feature_network`, and precision and recall (k = 3) on the same vectors, against held-out true images and against
images of the training set. The last row is that of other true images. Case k has the class k modulo 48 and a
generator of its own, which is the same for all rows. `cas` prints how often a small ResNet that was trained on the
samples (n of them, `--num_cases`) is right about held-out true images, beside one that was trained on n true images.

`fidelity`, `augmentation`, `blur` and `ladder` enlarge true held-out images, made small by area, with `--from_true`;
`fidelity` does both.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # folders are read; nothing is looked up

import diffusers
import torch
import transformers
from parts.cascade_judge import (
    Judge,
    Verdict,
    add_options,
    check_options,
    class_of,
    draw,
    load_cascade,
    one_or_each,
    pictures,
    scenes_of_classes,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffusers_ext import CascadedBasePipeline, CascadedDiffusionPipeline, CascadedUpscalePipeline
from diffusers_ext.data.scenes import CLASS_NAMES, COLORS, SHAPES
from diffusers_ext.degradations.resizing import resize_batch
from diffusers_ext.evaluation.classification_score import ClassificationScore, classification_score, train_classifier
from diffusers_ext.pipelines.cascaded.search import TruncationSearch

SWEEPS = ("fidelity", "truncation", "unconditional")
VARIANTS = ("augmentation", "blur", "ladder")
CLAIMS = (*SWEEPS, *VARIANTS, "single", "cas")
LEVELS = (0, 51, 101, 251, 501, 751)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("stages", nargs="+", help="a cascade, or its stages in order")
    parser.add_argument("--against", nargs="+", default=[], help="folders of single stages to compare with")
    parser.add_argument("--stage", help="the one that is varied and judged; default: the last")
    parser.add_argument("--levels", type=float, nargs="+", default=list(LEVELS), help="s of the sweeps; 0 is clean")
    parser.add_argument("--noise_level", type=float, nargs="+", help="one, or one an upscaler; default: their own")
    parser.add_argument("--conditioning_mode", choices=("truncated", "non_truncated"), help="of all but the sweeps")
    parser.add_argument("--from_true", action="store_true", help="enlarge true small images")
    parser.add_argument("--classifier_steps", type=int, default=600, help="of each classifier's training (cas)")
    add_options(parser)
    args = parser.parse_args(arguments)
    check_options(parser, args, [*args.stages, *args.against])
    needs = args.claim in (*VARIANTS, "single", "unconditional")
    if needs != bool(args.against):
        parser.error(
            f"--against is needed for {args.claim}: folders of stages to compare with"
            if needs
            else f"--against goes with {', '.join((*VARIANTS, 'single', 'unconditional'))}, not with {args.claim}"
        )
    if args.claim == "unconditional" and len(args.against) > 1:
        parser.error(f"--against is one folder for unconditional, received {len(args.against)}")
    return args


# --- stages


def load_stage(folder: str, name: str, device: str) -> Any:
    """A stage to put in the place of another.

    Raises:
        SystemExit: If it is of another kind.
    """
    kind: Any = CascadedBasePipeline if name == "base" else CascadedUpscalePipeline
    found = kind.load_config(folder)["_class_name"]
    if found != kind.__name__:
        raise SystemExit(f"--against: {folder!r} holds a {found}; for {name} it must be a {kind.__name__}.")
    stage = kind.from_pretrained(folder, dtype=torch.float32).to(device)
    stage.set_progress_bar_config(disable=True)
    return stage


def varied_stage(pipe: CascadedDiffusionPipeline, args: argparse.Namespace) -> str:
    """The name of the stage that is varied and judged.

    Raises:
        SystemExit: If the cascade lacks it, or it has no stage before it and the claim needs one.
    """
    name = args.stage or pipe.stage_names[-1]
    if name not in pipe.stage_names:
        raise SystemExit(f"--stage is {name!r}, but the stages that were given are {', '.join(pipe.stage_names)}.")
    if name == "base" and (args.claim in SWEEPS or args.from_true):
        raise SystemExit(f"--stage is 'base', which takes no small image: {args.claim} needs an upscaler.")
    return name


def with_stage(pipe: CascadedDiffusionPipeline, name: str, stage: Any) -> CascadedDiffusionPipeline:
    """The cascade up to a stage, with this one in its place."""
    names = pipe.stage_names[: pipe.stage_names.index(name) + 1]
    changed = CascadedDiffusionPipeline(**{one: getattr(pipe, one) for one in names} | {name: stage})
    changed.set_progress_bar_config(disable=True)
    return changed


def wanted(args: argparse.Namespace) -> list[int]:
    return [class_of(case) for case in range(args.num_cases)]


def small_true_images(stage: Any, args: argparse.Namespace) -> Tensor:
    """Held-out images of the cases' classes, made as small as the stage takes them: (n, 3, h, w) in [0, 1]."""
    side, small = stage.unet.config["sample_size"], stage.config["low_res_size"]
    return resize_batch(pictures(scenes_of_classes(args.num_cases, args.grounds), side), small, small, "area")


# --- the claims: each yields (case, images)


def sweep(pipe: CascadedDiffusionPipeline, name: str, args: argparse.Namespace) -> Iterator[tuple[str, Tensor]]:
    """Images at every s. The stages before are run once for all of them."""
    stage, steps = getattr(pipe, name), one_or_each(args.num_inference_steps, 50)
    scales = one_or_each(args.guidance_scale)
    index = pipe.stage_names.index(name)
    search = TruncationSearch(
        pipe,
        wanted(args),
        stage=name,
        num_inference_steps=steps,
        guidance_scale=scales[index] if isinstance(scales, list) else scales,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    forms = {
        "fidelity": ("non_truncated", "true"),
        "truncation": ("truncated", "non_truncated"),
        "unconditional": ("non_truncated", "true"),
    }[args.claim]
    for form in forms:
        words = {"truncated": "truncated", "non_truncated": "generated", "true": "true small images"}[form]
        if args.claim == "truncation" and form == "non_truncated":
            words = "non-truncated"
        image = small_true_images(stage, args) if form == "true" else None
        mode = "truncated" if form == "truncated" else "non_truncated"
        kept: list[Tensor] = []
        points = search.run(
            args.levels, lambda images, kept=kept: kept.append(images) or 0.0, conditioning_modes=[mode], image=image
        )
        for point, images in zip(points, kept, strict=True):
            yield f"{words}, s = {point.noise_level:g}", images


def variants(pipe: CascadedDiffusionPipeline, name: str, args: argparse.Namespace) -> Iterator[tuple[str, Tensor]]:
    """Images of the stage, and of those in its place."""
    stages = {"given": getattr(pipe, name)} | {
        Path(folder).name: load_stage(folder, name, args.device) for folder in args.against
    }
    cases: list[tuple[str, Any]] = [(label, one_or_each(args.noise_level)) for label in stages]
    if args.claim == "augmentation":
        fixed = {label: stage.config.get("truncation_level") for label, stage in stages.items() if label != "given"}
        if lacking := [label for label, level in fixed.items() if level is None]:
            raise SystemExit(f"--against: {', '.join(lacking)} was not trained at one level (--truncation_level).")
        cases = [case for label, level in fixed.items() for case in (("given", level), (label, level))]
    for label, level in cases:
        changed = with_stage(pipe, name, stages[label])
        options: dict[str, Any] = {"noise_level": level}
        if args.claim == "augmentation":
            uppers = [one for one in changed.stage_names if one != "base"]
            options["noise_level"] = [level if one == name else None for one in uppers]
        elif isinstance(level, list):
            options["noise_level"] = level[: len(changed.stage_names) - 1]
        image = None
        if args.from_true:
            image, options["start_stage"] = small_true_images(stages[label], args), name
        elif args.conditioning_mode:
            options["conditioning_mode"] = args.conditioning_mode
        words = f"{label}, s = {level:g}" if args.claim == "augmentation" else label
        yield words, draw(changed, args, image, **options)[name]


def single(pipe: CascadedDiffusionPipeline, name: str, args: argparse.Namespace) -> Iterator[tuple[str, Tensor]]:
    """Images of the cascade, and of single networks that may compute as much."""
    steps = one_or_each(args.num_inference_steps, 50)
    each = dict(zip(pipe.stage_names, steps if isinstance(steps, list) else [steps] * 9, strict=False))
    costs = flops_of_a_step(pipe, args)
    total = sum(each[one] * costs[one] for one in pipe.stage_names)
    print("| network | FLOPs of a step (an image, guidance included) | steps | FLOPs of an image |\n|---|---|---|---|")
    for one in pipe.stage_names:
        print(f"| {one} | {costs[one]:.4g} | {each[one]} | {each[one] * costs[one]:.4g} |")
    chosen = {}
    for folder in args.against:
        alone = CascadedDiffusionPipeline(base=load_stage(folder, "base", args.device))
        alone.set_progress_bar_config(disable=True)
        cost = flops_of_a_step(alone, args)["base"]
        count = max(1, min(round(total / cost), int(alone.base.scheduler.config["num_train_timesteps"])))
        chosen[Path(folder).name] = (alone, count)
        print(f"| {Path(folder).name} | {cost:.4g} | {count} | {count * cost:.4g} |")
    print(flush=True)
    options: dict[str, Any] = {"noise_level": one_or_each(args.noise_level)}
    yield (
        f"cascade, {'+'.join(str(each[one]) for one in pipe.stage_names)} steps",
        draw(pipe, args, conditioning_mode=args.conditioning_mode, **options)[name],
    )
    for label, (alone, count) in chosen.items():
        scale = None if args.guidance_scale is None else args.guidance_scale[0]
        images = draw(alone, args, num_inference_steps=count, guidance_scale=scale)["base"]
        yield f"{label}, {count} steps", images


def flops_of_a_step(pipe: CascadedDiffusionPipeline, args: argparse.Namespace) -> dict[str, int]:
    """What a sampling step of each stage computes for one image, by torch's counter."""
    found: dict[str, int] = {}
    scales = one_or_each(args.guidance_scale)
    image: Any = None
    for index, name in enumerate(pipe.stage_names):
        stage = getattr(pipe, name)
        options: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent", "generator": torch.Generator()}
        options["guidance_scale"] = scales[index] if isinstance(scales, list) else scales
        if stage.num_classes is not None:
            options["class_labels"] = 0
        if name != "base":
            options |= {"image": image, "noise_level": stage.resolve_noise_level(None)}
        counter = FlopCounterMode(display=False)
        with counter:
            image = stage(**options).images
        image = image.clamp(-1, 1) / 2 + 0.5
        found[name] = counter.get_total_flops()
    return found


# --- the classifier


def accuracy_score(pipe: CascadedDiffusionPipeline, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Prints what classifiers of samples and of true images know about held-out ones."""
    options: dict[str, Any] = {"noise_level": one_or_each(args.noise_level), "stop_stage": name}
    samples = draw(pipe, args, conditioning_mode=args.conditioning_mode, **options)[name]
    side, labels = samples.shape[-1], torch.tensor(wanted(args))
    tests = pictures(scenes_of_classes(max(args.num_cases, 480), args.grounds), side)
    truth = torch.tensor([class_of(case) for case in range(len(tests))])
    sets = {
        "samples": samples,
        "true images": pictures(scenes_of_classes(args.num_cases, args.grounds, "train"), side),
    }
    print(f"{args.classifier_steps} steps; tested on {len(tests)} held-out true images of {side} pixels\n")
    print("| trained on | images | top-1 | top-5 |\n|---|---|---|---|")
    figures, scores = {}, {}
    for words, images in sets.items():
        network = train_classifier(
            images, labels, len(CLASS_NAMES), steps=args.classifier_steps, seed=args.seed, on_step=told(words, args)
        )
        scores[words] = score = classification_score(network, tests, truth)
        print(f"| {words} | {len(images)} | {score.top_1} | {score.top_5} |", flush=True)
        figures[words] = {"top_1": score.top_1.value, "top_5": score.top_5.value, "count": score.top_1.count}
        figures[words]["by_class"] = dict(zip(CLASS_NAMES, (one.value for one in score.by_class), strict=True))
    print(f"\nTop-1 of each class, trained on samples ({len(tests) // len(CLASS_NAMES)} images each):\n")
    print(by_class_table(scores["samples"]))
    return figures


def told(words: str, args: argparse.Namespace) -> Any:
    def tell(step: int, loss: float) -> None:
        if step % 50 == 0 or step + 1 == args.classifier_steps:
            print(f"\r  {words}: step {step + 1}, loss {loss:.3f}  ", end="", file=sys.stderr, flush=True)

    return tell


def by_class_table(score: ClassificationScore) -> str:
    """Shapes by colours."""
    colors = list(COLORS)
    lines = [f"| | {' | '.join(colors)} |", f"|{'---|' * (len(colors) + 1)}"]
    for shape in SHAPES:
        shares = [score.by_class[CLASS_NAMES.index(f"{color} {shape}")] for color in colors]
        lines.append(f"| {shape} | {' | '.join(f'{100 * one.value:.0f} %' for one in shares)} |")
    return "\n".join(lines)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipe = load_cascade(args.stages, args.device)
    name = varied_stage(pipe, args)
    if args.claim == "unconditional":
        pipe = with_stage(pipe, name, load_stage(args.against[0], name, args.device))
    elif pipe.stage_names[-1] != name:
        pipe = with_stage(pipe, name, getattr(pipe, name))
    print(f"{args.claim}: {args.num_cases} cases, seed {args.seed}, judged at {name}\n")
    if args.claim == "cas":
        figures: Any = accuracy_score(pipe, name, args)
    else:
        judge = Judge(args.feature_network, args.num_cases, args.grounds)
        cases = sweep if args.claim in SWEEPS else variants if args.claim in VARIANTS else single
        found: list[Verdict] = []
        for label, images in cases(pipe, name, args):
            if not found:
                print(judge.heading())
            found.append(judge(label, images, wanted(args)))
            print(judge.line(found[-1]), flush=True)
        found.append(judge.true_row(found[0].side))
        print(judge.line(found[-1]))
        figures = [verdict.plain() for verdict in found]
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
