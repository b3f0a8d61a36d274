"""Super-resolution with latent diffusion, and equality with diffusers' own pipeline."""

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, LDMSuperResolutionPipeline
from pipelines.tiny_ldm import count_runs, quiet, seeded, tiny_ldm, tiny_picture

from diffusers_ext import LDMUpscalePipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_ldm("upscale", first_stage="vq")


def sample(pipe, image=None, *, seed=0, output_type="latent", **call):
    image = tiny_picture(0, 8, 8) if image is None else image
    return pipe(image, num_inference_steps=2, generator=seeded(seed), output_type=output_type, **call).images


def test_equal_to_the_stock_pipeline_and_loads_what_it_saves(pipe, tmp_path):
    stock = quiet(LDMSuperResolutionPipeline(pipe.vqvae, pipe.unet, pipe.scheduler))
    stock.save_pretrained(tmp_path)
    ours = quiet(LDMUpscalePipeline.from_pretrained(tmp_path))
    picture = tiny_picture(3, 32, 32)  # the stock pipeline takes multiples of 32 only
    call = {"num_inference_steps": 3, "output_type": "np"}  # without eta: the stock pipeline ignores generators there
    results = [run(picture, generator=torch.Generator().manual_seed(5), **call).images for run in (ours, stock)]
    np.testing.assert_allclose(*results, atol=1e-5)


def test_the_small_picture_is_not_scaled_with_the_latents(pipe):
    """As the stock pipeline does with schedulers that scale their input."""
    euler = tiny_ldm("upscale", scheduler=EulerDiscreteScheduler.from_config(pipe.scheduler.config))
    seen = []
    euler.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 3:]))
    sample(euler)
    small = torch.from_numpy(np.array(tiny_picture(0, 8, 8))).permute(2, 0, 1)[None] / 127.5 - 1
    assert len(seen) == 2
    for maps in seen:
        torch.testing.assert_close(maps, small, atol=1e-6, rtol=1e-6)


def test_any_size_several_pictures_and_results(pipe):
    assert sample(pipe, tiny_picture(0, 10, 6), output_type="pt").shape == (1, 3, 40, 24)
    pictures = [tiny_picture(0, 8, 8), tiny_picture(1, 8, 8)]
    both = pipe(
        pictures, num_inference_steps=2, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3), output_type="latent"
    ).images
    torch.testing.assert_close(both[3:], sample(pipe, pictures[1], seed=3), atol=1e-5, rtol=1e-5)
    assert (sample(pipe, pictures[1]) - sample(pipe)).abs().max() > 1e-4


BAD = [
    (
        tiny_picture(0, 8, 9),
        ValueError,
        r"`image\.width` must be a multiple of 2 pixels.*crop.*9, nearest valid: 8 or",
    ),
    (tiny_picture(0, 7, 8), ValueError, r"`image\.height` must be a multiple of 2.*received 7, nearest valid: 6 or 8"),
    ([tiny_picture(0, 8, 8), tiny_picture(0, 8, 6)], ValueError, r"pictures of different sizes: 6x8, 8x8"),
    (2 * torch.rand(1, 3, 8, 8), ValueError, r"`image` must hold floats in \[0, 1\]"),
    ("small.png", TypeError, r"`image` must be a PIL picture.*received str"),
]


@pytest.mark.parametrize(("image", "error", "message"), BAD)
def test_bad_pictures_are_refused_before_any_network_runs(pipe, image, error, message):
    runs = count_runs(pipe)
    with pytest.raises(error, match=message):
        sample(pipe, image)
    assert not runs
