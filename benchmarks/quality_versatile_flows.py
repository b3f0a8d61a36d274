"""Does every flow of Versatile Diffusion do what it says? One table over a small checkpoint that learnt `scenes`.

    python benchmarks/quality_versatile_flows.py checkpoints/versatile-scenes-64 --num_cases 256 --seeds 0 1 2

- text-to-image: prompts followed, half of them with one object, half with two, as the verifier of `scenes` reads them
- image-to-image, image-to-text: held-out pictures, one and two objects by turns. A variation keeps the shapes and
  colours; a caption names all objects in their shapes and colours, no other, and fits the grammar of the data set
- text-to-text: prompts varied; the meaning is kept where shapes and colours are. "In other words" are those of them
  that are not the prompt again
- dual: a text of one object and a picture of one object, of another shape and another colour, in the same size and
  place. Read is the largest object of the sample. "Crossed" takes its colour from one context and its shape from the
  other, either way round; beside it how often both come from the text, both from the picture, and each from any of
  the two. A row for every mixing, share of the text and focus of the picture: all are shown, none is chosen afterwards
- autoencoders alone: true pictures and true captions, encoded and decoded: what a perfect network would reach

"Everything" adds number, sizes and places where they are named. "Shuffled context" judges the same samples by the
context of another case with as many objects. Errors are binomial, over the samples of all seeds. Every sample has a
generator of its own, seeded by (seed, number of the case); layer mixing draws its layers once a batch, so that its
samples are not quite independent. Pictures: benchmarks/quality_versatile_figures.py.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts.versatile_bench import Bench, add_options, check_options, dual_cases

from diffusers_ext.data.scenes import WantedObject, balanced_prompts, full_caption, parse_caption
from diffusers_ext.data.scenes_verifier import check, check_caption, read_picture
from diffusers_ext.evaluation.prompt_following import (
    Check,
    Share,
    judge,
    judge_by_chance,
    share,
    shuffle_within_groups,
    summarize_by_objects,
)
from diffusers_ext.pipelines.versatile.optimus_text import sentence_ids, word_piece_window

NEEDS = {"dual": ["text-to-image", "image-to-image"]}  # flows of the network, where it is not the one of that name
# Where the colour and the shape of an object come from, and what is counted of it.
CROSSED = ("colour of the text, shape of the picture", "colour of the picture, shape of the text")
PLAIN = ("both of the text", "both of the picture")
WAYS = {
    "crossed: colour of one context, shape of the other": CROSSED,
    **{name: (name,) for name in (*CROSSED, *PLAIN)},
    "each of any of the two": (*CROSSED, *PLAIN),
}


@dataclass(frozen=True)
class Row:
    """A line of the table: the share of the samples, and the same under a shuffled context."""

    flow: str
    measured: str
    value: Share
    shuffled: Share | None = None
    across_seeds: float = math.nan  # standard deviation of the seeds' own shares


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_options(parser)
    parser.add_argument("--flows", nargs="+", choices=FLOWS, help="default: all that the checkpoint has")
    parser.add_argument("--num_cases", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--text_ratios", type=float, nargs="+", default=[0.3, 0.5, 0.7], help="of dual contexts")
    parser.add_argument("--mixings", nargs="+", choices=("attention", "layer"), default=["attention", "layer"])
    parser.add_argument(
        "--focus", type=float, nargs="+", default=[0.5], help="of the picture in dual contexts: 0 meaning, 1 style"
    )
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(arguments)
    check_options(parser, args, num_cases=4)  # two of each number of objects, so that contexts can be shuffled
    for name, allowed in (("text_ratios", lambda x: 0 < x < 1), ("focus", lambda x: 0 <= x <= 1)):
        if wrong := [value for value in getattr(args, name) if not allowed(value)]:
            parser.error(f"--{name} must lie between 0 and 1, received {wrong[0]:g}")
    return args


def flow_rows(
    flow: str, bench: Bench, draw: Callable[[int], list], wanted: Sequence[Sequence[WantedObject]]
) -> tuple[list[Row], dict[int, list]]:
    """Rows by number of objects and for all, and the samples of each seed."""
    makes_texts = flow.endswith("-to-text")
    checks: list[Check] = []
    shuffled: list[Check] = []
    samples = {seed: draw(seed) for seed in bench.args.seeds}
    for seed, drawn in samples.items():
        found = drawn if makes_texts else [read_picture(picture) for picture in drawn]
        judgement: Any = check_caption if makes_texts else check
        checks += judge(found, wanted, check=judgement, seed=seed)
        shuffled += judge_by_chance(found, wanted, check=judgement, seed=seed)
    rows = []
    for one in summarize_by_objects(checks, shuffled):
        rows += [
            Row(flow, f"{one.label}: shape and colour", one.shape_and_color, one.chance, one.across_seeds),
            Row(flow, f"{one.label}: everything", one.everything, one.chance_everything),
        ]
    return rows, samples


def text_to_image(bench: Bench) -> list[Row]:
    prompts, wanted = zip(*balanced_prompts(bench.args.num_cases, seed=0), strict=True)
    return flow_rows("text-to-image", bench, lambda seed: bench.sample(seed, prompt=prompts), wanted)[0]


def image_to_image(bench: Bench) -> list[Row]:
    scenes = bench.scenes(bench.args.num_cases)
    pictures = bench.render(scenes)
    wanted = [[WantedObject(item.shape, item.color, item.size) for item in scene.objects] for scene in scenes]
    return flow_rows("image-to-image", bench, lambda seed: bench.sample(seed, image=pictures), wanted)[0]


def image_to_text(bench: Bench) -> list[Row]:
    scenes = bench.scenes(bench.args.num_cases)
    pictures = bench.render(scenes)
    wanted = [parse_caption(full_caption(scene)) for scene in scenes]
    draw = lambda seed: bench.sample(seed, "text", image=pictures)  # noqa: E731 # as short as its name
    return flow_rows("image-to-text", bench, draw, wanted)[0]


def text_to_text(bench: Bench) -> list[Row]:
    prompts, wanted = zip(*balanced_prompts(bench.args.num_cases, seed=0), strict=True)
    draw = lambda seed: bench.sample(seed, "text", prompt=prompts)  # noqa: E731
    rows, samples = flow_rows("text-to-text", bench, draw, wanted)
    kept = [
        text != prompt and check_caption(text, asked)[0]
        for texts in samples.values()
        for text, prompt, asked in zip(texts, prompts, wanted, strict=True)
    ]
    return [*rows, Row("text-to-text", "all: shape and colour, in other words", share(kept))]


def origin(shape: str, color: str, text: WantedObject, picture: WantedObject) -> str:
    """Which contexts an object took its colour and its shape from; empty if one of them comes from neither."""
    pairs = ((text, picture), (picture, text), (text, text), (picture, picture))  # whose colour, whose shape
    names = {(one.color, other.shape): name for (one, other), name in zip(pairs, (*CROSSED, *PLAIN), strict=True)}
    return names.get((color, shape), "")


def dual(bench: Bench) -> list[Row]:
    texts, scenes, pairs = dual_cases(bench, bench.args.num_cases)
    pictures, rows = bench.render(scenes), []
    for mixing, ratio, focus in itertools.product(bench.args.mixings, bench.args.text_ratios, bench.args.focus):
        setting = f"dual, {mixing}, text {ratio:g}" + ("" if focus == 0.5 else f", focus {focus:g}")
        options = {"text_ratio": ratio, "mixing": mixing, "focus": focus}
        right: list[str] = []
        shuffled: list[str] = []
        for seed in bench.args.seeds:
            drawn = bench.sample(seed, prompt=texts, image=pictures, **options)
            found = [next(((one.shape or "", one.color) for one in read_picture(p)), ("", "")) for p in drawn]
            partner = shuffle_within_groups([1] * len(pairs), seed=seed)
            right += [origin(*one, *pair) for one, pair in zip(found, pairs, strict=True)]
            shuffled += [origin(*one, *pairs[int(i)]) for one, i in zip(found, partner, strict=True)]
        for measured, accepted in WAYS.items():
            value, by_chance = (share(one in accepted for one in some) for some in (right, shuffled))
            rows.append(Row(setting, measured, value, by_chance))
    return rows


@torch.no_grad()
def autoencoders(bench: Bench) -> list[Row]:
    scenes = bench.scenes(bench.args.num_cases)
    wanted, rows, pipe = [parse_caption(full_caption(scene)) for scene in scenes], [], bench.pipe
    if pipe.vae is not None:
        found = []
        for start in range(0, len(scenes), bench.args.batch_size):
            arrays = np.stack([np.asarray(one) for one in bench.render(scenes[start : start + bench.args.batch_size])])
            pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2).to(bench.args.device) / 127.5 - 1
            latents = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
            decoded = pipe.decode_latents(latents).permute(0, 2, 3, 1).cpu().numpy()
            found += [read_picture(picture) for picture in (decoded * 255).round().astype(np.uint8)]
        checks = judge(found, wanted, check=check)
        rows.append(Row("image autoencoder alone", "shape and colour", share(c.shape_and_color for c in checks)))
    if pipe.optimus is not None and pipe.encoder_tokenizer is not None:
        sentences = [full_caption(scene) for scene in scenes]
        window = word_piece_window(pipe.encoder_tokenizer, pipe.optimus)
        ids = sentence_ids(pipe.encoder_tokenizer, sentences, max_word_pieces=window).to(bench.args.device)
        texts = pipe.decode_texts(pipe.optimus.encode(ids).mean, temperature=0, max_text_length=bench.longest)
        checks = judge(texts, wanted, check=check_caption)
        rows.append(Row("text autoencoder alone", "shape and colour", share(c.shape_and_color for c in checks)))
        rows.append(Row("text autoencoder alone", "everything", share(c.everything for c in checks)))
    return rows


FLOWS: dict[str, Callable[[Bench], list[Row]]] = {
    "text-to-image": text_to_image,
    "image-to-image": image_to_image,
    "image-to-text": image_to_text,
    "text-to-text": text_to_text,
    "dual": dual,
}


def as_dict(row: Row) -> dict[str, Any]:
    plain: dict[str, Any] = {"flow": row.flow, "measured": row.measured}
    for name in ("value", "shuffled"):
        one = getattr(row, name)
        if one is not None:
            plain[name] = {"value": one.value, "standard_error": one.standard_error, "count": one.count}
    return plain | ({} if math.isnan(row.across_seeds) else {"across_seeds": row.across_seeds})


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    started, bench = time.perf_counter(), Bench(args)
    flows = bench.available(list(FLOWS), NEEDS)
    if missing := [name for name in args.flows or () if name not in flows]:
        sys.exit(f"--flows names {', '.join(missing)}; the checkpoint has {', '.join(flows)}")
    scale = bench.pipe.config.default_guidance_scale if args.guidance_scale is None else args.guidance_scale
    print(
        f"{Path(args.checkpoint).name}: {args.num_cases} cases a flow, seed {', '.join(map(str, args.seeds))},"
        f" {args.num_inference_steps} steps, guidance {scale:g}, temperature of words {args.temperature:g}\n"
    )
    print("| flow | measured | samples | value | shuffled context | spread over seeds |")
    print("|---|---|---|---|---|---|")
    figures: list[dict[str, Any]] = []
    for measure in (*(FLOWS[name] for name in args.flows or flows), autoencoders):
        for row in measure(bench):
            spread = "-" if math.isnan(row.across_seeds) else f"{100 * row.across_seeds:.1f} %"
            value, shuffled = row.value, row.shuffled or "-"
            print(f"| {row.flow} | {row.measured} | {value.count} | {value} | {shuffled} | {spread} |", flush=True)
            figures.append(as_dict(row))
    print(f"\nWall time {time.perf_counter() - started:.0f} s.")
    if args.json:
        table = {"checkpoint": Path(args.checkpoint).name, "seeds": args.seeds, "rows": figures}
        Path(args.json).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
