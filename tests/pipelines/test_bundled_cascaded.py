"""checkpoints/cascaded-scenes-64: the bundled cascade does what its card says, on a handful of cases."""

import json
from pathlib import Path

import numpy as np
import torch
from pipelines.tiny_paella import quiet, seeded

from diffusers_ext import CascadedDiffusionPipeline, TruncatedConditioningScheduler
from diffusers_ext.data.scenes_verifier import read_picture

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "cascaded-scenes-64"
NAMES = ["red circle", "blue square", "green triangle", "yellow ring", "cyan cross", "pink circle"]


def test_images_show_their_class_and_stages_their_sizes():
    pipe = quiet(CascadedDiffusionPipeline.from_pretrained(CHECKPOINT, dtype=torch.float32, stage_by_stage=True))
    result = pipe(
        NAMES,
        num_inference_steps=20,
        generator=seeded(*range(len(NAMES))),
        output_type="np",
        return_intermediates=True,
    )
    assert [images.shape[1:3] for images in result.intermediates.values()] == [(16, 16), (32, 32), (64, 64)]
    found = [read_picture((image * 255).round().astype(np.uint8)) for image in result.images]
    names = [f"{objects[0].color} {objects[0].shape}" if objects else None for objects in found]
    assert sum(name == one for name, one in zip(names, NAMES, strict=True)) >= 4


def test_its_indexes_name_the_scheduler_that_stops():
    for stage, component in (("base", "scheduler"), ("upscale_1", "conditioning_scheduler")):
        index = json.loads((CHECKPOINT / stage / "model_index.json").read_text())
        assert index[component] == ["diffusers_ext", TruncatedConditioningScheduler.__name__]
