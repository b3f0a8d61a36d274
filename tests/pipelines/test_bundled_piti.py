"""checkpoints/piti-scenes: the prior and its three conditions do what their card says, on a handful of cases."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines.tiny_paella import quiet, seeded

from diffusers_ext import GlidePipeline, NormalizedCFGScheduler, PITIPipeline
from diffusers_ext.data.scenes import metres_and_normals, sample_scene, semantic_map, sketch
from diffusers_ext.data.scenes_verifier import read_picture

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "piti-scenes"
SCENES = [sample_scene(0, i, split="test", num_objects=1, grounds=("plain",)) for i in range(8)]


def shapes(images):
    """Of the largest object of each image."""
    found = [read_picture(np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC))) for image in images]
    return [objects[0].shape if objects else None for objects in found]


def test_the_prior_draws_shapes_of_its_texts():
    pipe = quiet(GlidePipeline.from_pretrained(CHECKPOINT, dtype=torch.float32))
    prompts = [f"a large red {item}" for item in ("circle", "square", "star", "ring")]
    images = pipe(prompts, num_inference_steps=20, generator=seeded(*range(4))).images
    assert sum(one == prompt.split()[-1] for one, prompt in zip(shapes(images), prompts, strict=True)) >= 2


@pytest.mark.parametrize("condition", ["label_map", "sketch", "geometry"])
def test_shapes_follow_the_condition(condition):
    pipe = quiet(PITIPipeline.from_prior(CHECKPOINT, CHECKPOINT, subfolder=condition, dtype=torch.float32))
    side = pipe.encoder.config["sample_size"]
    if condition == "geometry":
        metres, normals = zip(*(metres_and_normals(scene, side) for scene in SCENES), strict=True)
        given = {"normals": np.stack(normals).transpose(0, 3, 1, 2), "depth": np.stack(metres)}
    elif condition == "sketch":
        given = {"sketch": np.stack([sketch(scene, side) for scene in SCENES])}
    else:
        given = {"label_map": np.stack([semantic_map(scene, side) for scene in SCENES])}
    images = pipe(**given, num_inference_steps=20, generator=seeded(*range(8))).images
    assert images[0].size == ((64, 64) if condition == "label_map" else (32, 32))  # only label maps have an upsampler
    wanted = [scene.objects[0].shape for scene in SCENES]
    assert sum(one == other for one, other in zip(shapes(images), wanted, strict=True)) >= 5


def test_its_indexes_name_normalised_guidance():
    for condition in ("label_map", "sketch", "geometry"):
        index = json.loads((CHECKPOINT / condition / "model_index.json").read_text())
        assert index["scheduler"] == ["diffusers_ext", NormalizedCFGScheduler.__name__]
        assert "unet" in index and not (CHECKPOINT / condition / "unet").exists()  # the prior's
