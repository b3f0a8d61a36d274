"""A trained Versatile Diffusion, its cases, and how it is called: for versatile_flows.py and versatile_figures.py.

Cases are held-out scenes. Every sample has a generator of its own, seeded by (seed, number of the case): the batch
size changes nothing.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a folder is read; nothing is looked up

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

from diffusers_ext.data.scenes import COLORS, GROUNDS, SHAPES, Scene, WantedObject, full_caption, render, sample_scene
from diffusers_ext.evaluation.prompt_following import case_generators
from diffusers_ext.pipelines.versatile.optimus_text import MAX_SENTENCE_LENGTH
from diffusers_ext.pipelines.versatile.pipeline_versatile import VersatilePipeline


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the table and the figures have in common."""
    parser.add_argument("checkpoint", help="pipeline folder")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, help="default: the pipeline's")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of DDIM, from 0 to 1")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the words; 0: the most probable ones")
    parser.add_argument(
        "--grounds", nargs="+", choices=GROUNDS, default=["plain"], help="of the pictures that are read"
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="cpu")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace, **least: int) -> None:
    for name, smallest in {"num_inference_steps": 1, "batch_size": 1, **least}.items():
        if getattr(args, name) < smallest:
            parser.error(f"--{name} must be at least {smallest}, received {getattr(args, name)}")
    if not (Path(args.checkpoint) / "model_index.json").is_file():
        parser.error(f"{args.checkpoint!r} is no pipeline folder: it holds no model_index.json")


class Bench:
    """A checkpoint, its cases, and how it is called in batches."""

    def __init__(self, args: argparse.Namespace):
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        self.args = args
        self.pipe: Any = VersatilePipeline.from_pretrained(args.checkpoint, dtype=torch.float32).to(args.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.side = self.pipe.config.default_sample_size * self.pipe.vae_scale_factor

    def available(self, names: Sequence[str], needs: dict[str, list[str]]) -> list[str]:
        """Those whose flows the network has."""
        return [name for name in names if set(needs.get(name, [name])) <= set(self.pipe.unet.flows)]

    def scenes(self, count: int, num_objects: int | None = None) -> list[Scene]:
        """Held-out scenes, of one and two objects by turns unless a number is given."""
        return [
            sample_scene(0, i, split="test", num_objects=num_objects or 1 + i % 2, grounds=self.args.grounds)
            for i in range(count)
        ]

    def render(self, scenes: Sequence[Scene]) -> list[Image.Image]:
        return [Image.fromarray(render(scene, self.side)) for scene in scenes]

    @property
    def longest(self) -> int:
        """Tokens of a text that the text autoencoder can write."""
        return min(MAX_SENTENCE_LENGTH, self.pipe.optimus.longest_sentence)

    def sample(self, seed: int, data_type: str = "image", **options: Any) -> list[Any]:
        """uint8 pictures `(H, W, 3)` or texts, one a case.

        Args:
            options: of the pipeline; `prompt`, `image` and `image_masks` hold one entry a case.
        """
        cases = {name: options.pop(name) for name in ("prompt", "image", "image_masks") if name in options}
        count, drawn = len(next(iter(cases.values()))), []
        if data_type == "text":
            options |= {"temperature": self.args.temperature, "max_text_length": self.longest}
        # texts that the text encoder cannot read to their end are cut, as in the training
        options = {"num_inference_steps": self.args.num_inference_steps, **options}
        for start in range(0, count, self.args.batch_size):
            stop = min(start + self.args.batch_size, count)
            out = self.pipe(
                **{name: list(values[start:stop]) for name, values in cases.items()},
                **options,
                data_type=data_type,
                guidance_scale=self.args.guidance_scale,
                eta=self.args.eta,
                generator=case_generators(seed, range(start, stop), self.args.device),
                output_type="np",
            )
            drawn += out.texts if data_type == "text" else list((out.images * 255).round().astype(np.uint8))
            print(f"\r  {stop}/{count} {data_type}s", end="", file=sys.stderr, flush=True)
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
        return drawn


def dual_cases(bench: Bench, count: int) -> tuple[list[str], list[Scene], list[tuple[WantedObject, WantedObject]]]:
    """A text and a picture that disagree in shape and colour alone, and what each of them shows."""
    texts, scenes, pairs = [], bench.scenes(count, 1), []
    for i, scene in enumerate(scenes):
        item = scene.objects[0]
        shape = SHAPES[(SHAPES.index(item.shape) + 1 + i % (len(SHAPES) - 1)) % len(SHAPES)]
        colors = list(COLORS)
        color = colors[(colors.index(item.color) + 1 + i % (len(colors) - 1)) % len(colors)]
        other = dataclasses.replace(item, shape=shape, color=color)
        texts.append(full_caption(dataclasses.replace(scene, objects=(other,))))
        pairs.append((WantedObject(shape, color), WantedObject(item.shape, item.color)))
    return texts, scenes, pairs
