"""checkpoints/versatile-scenes-64: the bundled network does what its card says, on a handful of cases."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from pipelines.tiny_paella import quiet, seeded

from diffusers_ext.data.scenes import parse_caption, render, sample_scene
from diffusers_ext.data.scenes_verifier import read_picture
from diffusers_ext.pipelines.versatile.pipeline_versatile import VersatilePipeline

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "versatile-scenes-64"
PROMPTS = ["a large red circle", "a large blue square", "a large green triangle", "a large yellow ring"]
STEPS = {"num_inference_steps": 12}


@pytest.fixture(scope="module")
def pipe() -> VersatilePipeline:
    return quiet(VersatilePipeline.from_pretrained(CHECKPOINT, dtype=torch.float32))


def named(items) -> set[tuple[str, str]]:
    return {(item.shape, item.color) for item in items}


def test_pictures_show_what_is_asked_for(pipe):
    pictures = pipe(PROMPTS, generator=seeded(0, 1, 2, 3), output_type="np", **STEPS).images
    found = [named(read_picture((picture * 255).round().astype("uint8"))) for picture in pictures]
    assert sum(one == named(parse_caption(prompt)) for one, prompt in zip(found, PROMPTS, strict=True)) >= 3


def test_captions_name_what_is_there(pipe):
    scenes = [sample_scene(0, i, split="test", num_objects=1, grounds=("plain",)) for i in range(6)]
    pictures = [Image.fromarray(render(scene, 64)) for scene in scenes]
    texts = pipe(image=pictures, data_type="text", temperature=0, generator=seeded(*range(6)), **STEPS).texts
    said = []
    for text in texts:
        try:
            said.append(named(parse_caption(text)))
        except ValueError:
            said.append(set())
    assert sum(one == named(scene.objects) for one, scene in zip(said, scenes, strict=True)) >= 4
