"""Class-conditional latent diffusion."""

import numpy as np
import pytest
import torch
from pipelines.tiny_ldm import CLASSES, CONTEXT_DIM, count_runs, seeded, tiny_ldm

from diffusers_ext import LDMClassEmbedder


@pytest.fixture(scope="module")
def pipe():
    return tiny_ldm("class")


def sample(pipe, *args, seed=0, output_type="latent", **call):
    return pipe(*args, num_inference_steps=2, generator=seeded(seed), output_type=output_type, **call).images


def test_names_numbers_and_tensors_mean_the_same(pipe):
    expected = sample(pipe, "star")
    for label in (2, [2], np.array([2]), torch.tensor(2), ["star"]):
        assert torch.equal(sample(pipe, label), expected)
    assert (sample(pipe, "circle") - expected).abs().max() > 1e-4
    assert pipe.get_label_ids(["star", 0]) == [2, 0]


def test_several_classes_and_pictures(pipe):
    call = {"num_images_per_prompt": 2, "num_inference_steps": 2, "output_type": "latent"}
    both = pipe(["circle", 2], generator=seeded(0, 1, 2, 3), **call).images
    torch.testing.assert_close(both[3:], sample(pipe, "star", seed=3), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[:1], sample(pipe, "circle", seed=0), atol=1e-5, rtol=1e-5)


def test_what_the_network_is_told(pipe):
    """The null class first, then the class; at a scale of 1 the class alone."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    sample(pipe, "star", guidance_scale=3.0)
    sample(pipe, "star", guidance_scale=1.0)
    hook.remove()
    table = pipe.class_embedder.embedding.weight
    assert torch.equal(seen[0], table[[3, 2]][:, None]) and torch.equal(seen[2], table[[2]][:, None])


def test_the_null_class_can_be_drawn(pipe):
    guided, plain = (sample(pipe, 3, guidance_scale=scale) for scale in (5.0, 1.0))
    torch.testing.assert_close(guided, plain, atol=1e-4, rtol=0)


def test_a_model_without_null_class_samples_without_guidance_only():
    embedder = LDMClassEmbedder(len(CLASSES), CONTEXT_DIM)
    pipe = tiny_ldm("class", class_embedder=embedder)
    sample(pipe, "star")
    assert pipe.guidance_scale == 1.0
    with pytest.raises(ValueError, match=r"is 2\.0, but the network was trained without a null class \(class"):
        sample(pipe, "star", guidance_scale=2.0)


def test_a_wider_embedder_is_refused():
    with pytest.raises(ValueError, match=r"`unet` attends to vectors of width 16, the condition has 8"):
        sample(tiny_ldm("class", class_embedder=LDMClassEmbedder(4, 8, null_class=3)), "star")


BAD = [
    ("stra", ValueError, r"`class_labels` is 'stra', which is no class of this model; did you mean 'star'\?"),
    ("zebra", ValueError, r"`class_labels` is 'zebra'.*known are circle, square, star\."),
    (4, ValueError, r"`class_labels` is 4: this model knows the classes 0 to 3"),
    (-1, ValueError, r"`class_labels` is -1"),
    (1.5, TypeError, r"`class_labels` must be the name of a class or its number, received 1\.5"),
    ([], ValueError, r"`class_labels` is empty"),
    (None, TypeError, r"received None"),
]


@pytest.mark.parametrize(("labels", "error", "message"), BAD, ids=str)
def test_bad_labels_are_refused_before_any_network_runs(pipe, labels, error, message):
    runs = count_runs(pipe)
    with pytest.raises(error, match=message):
        sample(pipe, labels)
    assert not runs


def test_names_need_a_list_of_names():
    pipe = tiny_ldm("class", class_names=None)
    sample(pipe, 2)
    with pytest.raises(ValueError, match=r"is 'star', but the pipeline has no `class_names`: name a class by"):
        sample(pipe, "star")
