"""What PITI's paper says, measured again on small checkpoints that learnt `scenes`: one command each.

    python benchmarks/claims_piti.py guidance --checkpoint runs/piti-scenes-32-label_map-joint --plot guidance.png
    python benchmarks/claims_piti.py stages --models encoder-only=runs/a joint=runs/b joint-only=runs/c scratch=runs/d
    python benchmarks/claims_piti.py few --staged 50=runs/a 1000=runs/b all=runs/c --scratch 50=runs/d 1000=runs/e
    python benchmarks/claims_piti.py probe --models encoder-only=runs/a joint=runs/b

- guidance: plain against normalised guidance (section 3.3) over scales; the paper's w is the scale less 1. How much
  wider the guided noise is than the conditional one, beside the paper's formula for independent branches; how far mean
  and standard deviation of the noisy image leave those of guidance 1 on the way; saturated colour values of the result
  (the true pictures' share stands below); and how far pictures follow their conditions.
- stages: good pictures that do not align, then aligned? Each model's fidelity, clear objects whatever was asked, and
  the Frechet distance to other true pictures over vectors of `--feature_network` (no FID).
- few: the same fidelity over the number of pairs, started from the prior or from nothing. "all" stands last.
- probe: how exactly a ridge regression reads the centre of a lone object from the encoder's output, fitted on the
  training split and measured on held-out scenes: the vector of the whole, the tokens' mean, and all tokens. The paper
  blames missing places in the prior's space for missed small objects.

"Fidelity" is the first figure of benchmarks/quality_piti.py: mean intersection over union without the ground for label
maps, all shapes right for sketches and geometry.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # folders are read; nothing is looked up

import diffusers
import numpy as np
import torch
import transformers
from parts.piti_guidance import RecordedGuidance, saturated
from parts.piti_scenes import (
    FIDELITY,
    Sampler,
    add_sampling_options,
    as_number,
    as_plain,
    check_sampling_options,
    clip_distance,
    fidelity,
    held_out_scenes,
    show,
    shuffled_fidelity,
    true_pictures,
)
from torch import Tensor

from diffusers_ext.data.scenes import Scene
from diffusers_ext.evaluation.prompt_following import Share

GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
RULES = {"plain": 0.0, "normalised": 1.0}
RIDGE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the number of samples


def named_folder(word: str) -> tuple[str, str]:
    """`name=folder`."""
    name, sign, folder = word.partition("=")
    if not (name and sign and folder):
        raise argparse.ArgumentTypeError(f"{word!r} is no name=folder")
    return name, folder


def counted_folder(word: str) -> tuple[str, str]:
    """`50=folder` or `all=folder`."""
    name, folder = named_folder(word)
    if name != "all" and not (name.isdecimal() and int(name) > 0):
        raise argparse.ArgumentTypeError(f"{word!r} begins with no number of pairs: 50=folder, or all=folder")
    return name, folder


def named_folder_of_one(folder: str) -> list[tuple[str, str]]:
    """A folder, named after itself."""
    return [(Path(folder).name, folder)]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    studies = parser.add_subparsers(dest="study", required=True)
    made = {name: studies.add_parser(name, allow_abbrev=False) for name in ("guidance", "stages", "few", "probe")}
    made["guidance"].add_argument("--checkpoint", type=named_folder_of_one, required=True, dest="models")
    made["guidance"].add_argument("--guidance_scales", type=float, nargs="+", default=list(GUIDANCE_SCALES))
    for study in ("stages", "probe"):
        made[study].add_argument("--models", type=named_folder, nargs="+", required=True, help="name=folder ...")
    for start in ("staged", "scratch"):
        made["few"].add_argument(
            f"--{start}", type=counted_folder, nargs="+", default=[], help="number of pairs=folder, or all=folder"
        )
    made["stages"].add_argument("--feature_network", default="checkpoints/paella-scenes-64", help="folder with a CLIP")
    made["probe"].add_argument("--num_train", type=int, default=2048, help="scenes that the regression is fitted on")
    for study in ("guidance", "few"):
        made[study].add_argument("--plot", help="PNG of the figure")
    for study in ("stages", "few"):
        made[study].add_argument("--guidance_scale", type=float, help="default: the checkpoints' own")
    for one in made.values():
        add_sampling_options(one)
    args = parser.parse_args(arguments)
    if args.study == "few":
        args.models = args.staged + args.scratch
        if not args.models:
            parser.error("few needs --staged or --scratch")
    if args.study == "probe" and args.num_train < 8:
        parser.error(f"--num_train must be at least 8, received {args.num_train}")
    check_sampling_options(made[args.study], args, [folder for _, folder in args.models])
    return args


# ---------------------------------------------------------------------------------------------------------------------
# guidance


def study_guidance(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a scale and rule: figures of the pictures, and the trajectory."""
    (name, folder), *_ = args.models
    sampler, scenes = Sampler(folder, args), held_out_scenes(args.scenes, args.num_cases)
    held, rows = sampler.pipe.scheduler, []
    for scale in [1.0, *(scale for scale in args.guidance_scales if scale != 1)]:
        for rule, share in RULES.items() if scale != 1 else [("none", 0.0)]:
            print(f"guidance {scale:g}, {rule}", file=sys.stderr)
            sampler.pipe.scheduler = RecordedGuidance(held, guidance_rescale=share)
            pictures = sampler.draw(scenes, scale)
            figures = fidelity(sampler.kind, pictures, scenes)
            rows.append(
                {"scale": scale, "rule": rule, "saturated": saturated(pictures), "condition": sampler.kind,
                 "figures": figures, "trajectory": sampler.pipe.scheduler.trajectory()}
            )  # fmt: skip
    for row in rows:
        row["drift"] = drift(row["trajectory"], rows[0]["trajectory"])
    measured = FIDELITY[sampler.kind]
    print(f"{name}: {args.num_cases} cases of {args.scenes}, seed {args.seed}\n")
    print(
        "| guidance | w | rule | std of the noise, guided / conditional | by the paper's formula | mean shift |"
        f" drift of the image's mean | of its std | saturated | {measured} | objects of named shapes |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        steps = row["trajectory"]
        noise = [
            f"{np.mean([step[key] for step in steps]):.3f}" if key in steps[0] else "-"
            for key in ("std_ratio", "std_ratio_predicted", "mean_shift")
        ]
        print(
            f"| {row['scale']:g} | {row['scale'] - 1:g} | {row['rule']} | {' | '.join(noise)}"
            f" | {row['drift']['mean']:+.3f} | {row['drift']['std']:+.3f} | {100 * row['saturated']:.1f} %"
            f" | {show(row['figures'][measured])} | {show(row['figures']['objects of named shapes'])} |"
        )
    true = saturated(true_pictures(scenes, pictures.shape[-1]))
    print(f"\nDrift: the largest one on the way. Saturated values of the true pictures: {100 * true:.1f} %")
    return rows


def drift(steps: Sequence[dict[str, float]], start: Sequence[dict[str, float]]) -> dict[str, float]:
    """The largest deviation on the way of the noisy image's mean and standard deviation from another run's."""
    found = {}
    for name in ("mean", "std"):
        deviations = [one[f"sample_{name}"] - other[f"sample_{name}"] for one, other in zip(steps, start, strict=True)]
        found[name] = max(deviations, key=abs)
    return found


def plot_guidance(rows: list[dict[str, Any]], path: str) -> None:
    figure, (noise, image, followed) = _axes(3)
    guided = [row for row in rows if row["rule"] == "plain"]
    for number, row in enumerate(guided):
        steps = row["trajectory"]
        for key, line, label in (("std_ratio", "-", f"{row['scale']:g}"), ("std_ratio_predicted", ":", None)):
            noise.plot([step[key] for step in steps], line, color=f"C{number}", label=label)
    noise.set(xlabel="step", ylabel="std, guided / conditional", title="noise: measured, and dotted the formula")
    if guided:
        noise.legend(title="guidance")
    measured = FIDELITY[rows[0]["condition"]]
    for rule in RULES:
        some = [row for row in rows if row["rule"] in (rule, "none")]
        scales = [row["scale"] for row in some]
        image.plot(scales, [100 * row["saturated"] for row in some], "o-", label=rule)
        followed.plot(scales, [as_number(row["figures"][measured]) for row in some], "o-", label=rule)
    image.set(xlabel="guidance scale", ylabel="saturated values, %", title="image")
    followed.set(xlabel="guidance scale", ylabel=measured, title="fidelity", ylim=(0, 1.01))
    image.legend()
    _save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# stages, few


def study_models(args: argparse.Namespace, models: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """A row a model: its figures, those of shuffled conditions, and the pictures' Frechet distance if asked for."""
    scenes, rows = held_out_scenes(args.scenes, 2 * args.num_cases), []
    scenes, others = scenes[: args.num_cases], scenes[args.num_cases :]
    distance = clip_distance(args.feature_network) if args.study == "stages" else None
    for name, folder in models:
        print(name, file=sys.stderr)
        sampler = Sampler(folder, args)
        pictures = sampler.draw(scenes, args.guidance_scale)
        row = {"name": name, "condition": sampler.kind, "figures": fidelity(sampler.kind, pictures, scenes),
               "shuffled": shuffled_fidelity(sampler.kind, pictures, scenes)}  # fmt: skip
        if distance is not None:
            target = true_pictures(others, pictures.shape[-1])
            row["frechet"] = distance(pictures, target)
            row["frechet_true"] = distance(true_pictures(scenes, pictures.shape[-1]), target)
        rows.append(row)
    return rows


def study_stages(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = study_models(args, args.models)
    network = Path(args.feature_network).name
    print(f"{args.num_cases} cases of {args.scenes}, seed {args.seed}\n")
    print(
        "| model | condition | fidelity | shuffled | recall, large | recall, small | objects of named shapes"
        f" | Frechet distance (CLIP of {network}) | true pictures |\n|---|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        figures, measured = row["figures"], FIDELITY[row["condition"]]
        shown = [figures[measured], row["shuffled"][measured], figures["recall, large objects"],
                 figures["recall, small objects"], figures["objects of named shapes"]]  # fmt: skip
        print(
            f"| {row['name']} | {row['condition']} | {' | '.join(map(show, shown))} | {row['frechet']:.4f}"
            f" | {row['frechet_true']:.4f} |"
        )
    return rows


def study_few(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for start in ("staged", "scratch"):
        found = study_models(args, getattr(args, start))
        rows += [{"start": start, "pairs": row.pop("name"), **row} for row in found]
    rows.sort(key=lambda row: (_place(row["pairs"]), row["start"] == "scratch"))
    print(f"{args.num_cases} cases of {args.scenes}, seed {args.seed}\n")
    print("| pairs | start | condition | measured | value | shuffled | objects of named shapes |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        measured = FIDELITY[row["condition"]]
        print(
            f"| {row['pairs']} | {_START[row['start']]} | {row['condition']} | {measured}"
            f" | {show(row['figures'][measured])} | {show(row['shuffled'][measured])}"
            f" | {show(row['figures']['objects of named shapes'])} |"
        )
    return rows


_START = {"staged": "from the prior", "scratch": "from nothing"}


def _place(pairs: str) -> float:
    return float("inf") if pairs == "all" else int(pairs)


def plot_few(rows: list[dict[str, Any]], path: str) -> None:
    figure, (axes,) = _axes(1)
    counts = sorted({row["pairs"] for row in rows}, key=_place)
    for start, label in _START.items():
        some = [row for row in rows if row["start"] == start]
        values = [row["figures"][FIDELITY[row["condition"]]] for row in some]
        errors = [one.standard_error if isinstance(one, Share) else 0.0 for one in values]
        places = [counts.index(row["pairs"]) for row in some]
        axes.errorbar(places, [as_number(one) for one in values], yerr=errors, fmt="o-", capsize=3, label=label)
    axes.set_xticks(range(len(counts)), counts)
    axes.set(xlabel="pairs", ylabel=FIDELITY[rows[0]["condition"]], ylim=(0, 1.01))
    axes.legend()
    _save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# probe


def study_probe(args: argparse.Namespace) -> list[dict[str, Any]]:
    train = held_out_scenes(args.scenes, args.num_train, split="train", num_objects=1)
    test = held_out_scenes(args.scenes, args.num_cases, num_objects=1)
    target, wanted = (torch.tensor([scene.objects[0].center for scene in some]).double() for some in (train, test))
    rows = []
    for name, folder in args.models:
        print(name, file=sys.stderr)
        sampler = Sampler(folder, args)
        seen, unseen = (encode(sampler, some) for some in (train, test))
        for feature in seen:
            error, explained = probe(seen[feature], target, unseen[feature], wanted)
            rows.append({"name": name, "condition": sampler.kind, "read from": feature,
                         "width": seen[feature].shape[1], "error": error, "explained": explained})  # fmt: skip
    nothing = float((wanted - target.mean(0)).norm(dim=1).mean())
    print(f"fitted on {args.num_train} scenes, measured on {args.num_cases} of {args.scenes}\n")
    print("| model | condition | read from | numbers | distance from the centre, % of the side | explained |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['name']} | {row['condition']} | {row['read from']} | {row['width']} | {100 * row['error']:.2f}"
            f" | {row['explained']:.3f} |"
        )
    print(f"\nThe mean place of all, whatever the picture: {100 * nothing:.2f} %")
    return rows


@torch.no_grad()
def encode(sampler: Sampler, scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """What the encoder makes of scenes, by name: vectors (n, d) in float64."""
    found = []
    for start in range(0, len(scenes), sampler.args.batch_size):
        some = sampler.conditions(scenes[start : start + sampler.args.batch_size])
        given = {name: np.stack([one[name] for one in some]) for name in some[0]}
        found.append(sampler.pipe.encode_conditions(sampler.pipe.read_conditions(**given)).double().cpu())
    states = torch.cat(found)  # (n, l + 1, d)
    return {
        "the vector": states[:, -1],
        "the tokens' mean": states[:, :-1].mean(1),
        "all tokens": states[:, :-1].flatten(1),
    }


def probe(seen: Tensor, target: Tensor, unseen: Tensor, wanted: Tensor) -> tuple[float, float]:
    """A ridge regression from vectors (n, d) to points (n, 2), whose penalty is chosen on a quarter of `seen`.

    Returns:
        The mean distance on `unseen`, and the share of the variance that is explained there.
    """
    kept = 3 * len(seen) // 4
    tried = _ridge(seen[:kept], target[:kept], seen[kept:], RIDGE_PENALTIES)
    errors = [float((guess - target[kept:]).square().sum()) for guess in tried]
    (guess,) = _ridge(seen, target, unseen, [RIDGE_PENALTIES[int(np.argmin(errors))]])
    left = (guess - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    return float((guess - wanted).norm(dim=1).mean()), float(1 - left)


def _ridge(seen: Tensor, target: Tensor, unseen: Tensor, penalties: Sequence[float]) -> list[Tensor]:
    """A guess (n', 2) for each penalty. Solved in the samples or in the numbers, whichever are fewer."""
    mean, std = seen.mean(0), seen.std(0).clamp_min(1e-8)
    inputs, others, rest = (seen - mean) / std, (unseen - mean) / std, target - target.mean(0)
    wide = inputs.shape[1] > len(inputs)
    products = inputs @ inputs.T if wide else inputs.T @ inputs
    identity, guesses = torch.eye(len(products), dtype=inputs.dtype), []
    for penalty in penalties:
        solved = torch.linalg.solve(products + penalty * len(inputs) * identity, rest if wide else inputs.T @ rest)
        guesses.append(others @ (inputs.T @ solved if wide else solved) + target.mean(0))
    return guesses


def _axes(count: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(5.2 * count, 4.0), layout="constrained", squeeze=False)
    for one in axes[0]:
        one.grid(alpha=0.3)
    return figure, axes[0]


def _save(figure: Any, path: str) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(f"\nFigure: {path}")


STUDIES = {"guidance": study_guidance, "stages": study_stages, "few": study_few, "probe": study_probe}
PLOTS = {"guidance": plot_guidance, "few": plot_few}


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    rows = STUDIES[args.study](args)
    if getattr(args, "plot", None):
        PLOTS[args.study](rows, args.plot)
    if args.json:
        keys = ("figures", "shuffled")
        plain = [{key: as_plain(one) if key in keys else one for key, one in row.items()} for row in rows]
        Path(args.json).write_text(json.dumps({"study": args.study, "rows": plain}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
