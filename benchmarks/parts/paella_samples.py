"""Pictures of Paella for many prompts, in batches, and its table as plain numbers."""

import math
import sys

import numpy as np

from diffusers_ext.evaluation.prompt_following import case_generators
from diffusers_ext.pipelines.paella.pipeline_paella import PaellaPipeline


def sample_pictures(
    pipe: PaellaPipeline, prompts: list[str], seed: int, batch_size: int, device: str, **options: object
) -> list[np.ndarray]:
    """uint8 pictures `(H, W, 3)`, one a prompt."""
    pictures: list[np.ndarray] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        generators = case_generators(seed, range(start, start + len(batch)), device)
        images = pipe(batch, generator=generators, output_type="np", **options).images
        pictures += list((images * 255).round().astype(np.uint8))
        print(f"\r  {len(pictures)}/{len(prompts)} pictures", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 40 + "\r", end="", file=sys.stderr)
    return pictures


def as_dict(row: object) -> dict:
    """A `Following` as plain numbers, shares with their standard errors."""
    plain = {"label": row.label, "across_seeds": row.across_seeds}
    for name in ("shape_and_color", "everything", "chance", "chance_everything"):
        one = getattr(row, name)
        if one is not None:
            plain[name] = {"value": one.value, "standard_error": one.standard_error, "count": one.count}
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in plain.items()}
