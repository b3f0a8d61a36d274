"""Unconditional latent diffusion: known regions, guidance by gradients, and the scale of existing repositories."""

import json
import logging as python_logging

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging
from pipelines.tiny_ldm import count_runs, quiet, seeded, tiny_first_stage, tiny_ldm, tiny_mask, tiny_picture
from pipelines.tiny_paella import tiny_image_encoder
from torch.nn import functional as F

from diffusers_ext import LDMUnconditionalPipeline
from diffusers_ext.losses.perceptual import LPIPSDistance
from diffusers_ext.pipelines.ldm.picture_guidance import low_resolution_guidance
from diffusers_ext.schedulers.gaussian import ldm_scheduler

WEAK = ldm_scheduler(0.0005, 0.009).config


@pytest.fixture(scope="module")
def pipe():
    return tiny_ldm("unconditional", scheduler=DDIMScheduler.from_config(WEAK))


def sample(pipe, *, steps=4, seed=0, output_type="latent", **call):
    return pipe(num_inference_steps=steps, generator=seeded(seed), output_type=output_type, **call).images


def known_pixels(picture) -> torch.Tensor:
    """In [-1, 1], with the left half going on into the right one, which `tiny_mask` says is drawn."""
    pixels = np.pad(np.array(picture)[:, :8], ((0, 0), (0, 8), (0, 0)), mode="edge")
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler],
)
def test_the_known_part_stays_and_the_rest_is_drawn(scheduler):
    pipe = tiny_ldm("unconditional", scheduler=scheduler.from_config(WEAK))
    picture, mask = tiny_picture(1), tiny_mask()
    latents = sample(pipe, image=picture, mask_image=mask)
    known = 0.5 * pipe.vqvae.encode(known_pixels(picture)).latent_dist.mode()
    torch.testing.assert_close(latents[..., :2], known[..., :2])
    free = sample(pipe)
    assert (latents[..., 2:] - known[..., 2:]).abs().max() > 0.1  # drawn
    assert (latents[..., 2:] - free[..., 2:]).abs().max() > 1e-4  # seeing the known part


def test_before_a_step_the_known_part_has_the_steps_noise_level(pipe):
    """Like the original's sampler: noised picture in, whatever the step before made of it."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append((args[0].clone(), int(args[1]))))
    generator = torch.Generator().manual_seed(0)
    pipe(64, image=tiny_picture(1), mask_image=tiny_mask(), num_inference_steps=2, generator=generator)
    hook.remove()
    known = 0.5 * pipe.vqvae.encode(known_pixels(tiny_picture(1))).latent_dist.mean
    for latents, timestep in seen:
        abar = pipe.scheduler.alphas_cumprod[timestep]
        left = latents[..., :2] - abar.sqrt() * known[..., :2]
        torch.testing.assert_close(left.mean(), torch.tensor(0.0), atol=0.05, rtol=0)
        torch.testing.assert_close(left.std(), (1 - abar).sqrt(), atol=0.03, rtol=0.03)


def test_one_generator_a_picture_also_with_a_known_part(pipe):
    call = {"image": tiny_picture(1), "mask_image": tiny_mask(), "eta": 1.0, "num_inference_steps": 2}
    both = pipe(batch_size=2, generator=seeded(3, 4), output_type="latent", **call).images
    single = pipe(generator=seeded(4), output_type="latent", **call).images
    torch.testing.assert_close(both[1:], single)


def test_overlay_puts_the_pixels_back(pipe):
    picture, mask = tiny_picture(1), tiny_mask()
    call = {"image": picture, "mask_image": mask, "output_type": "np"}
    (plain,), (overlaid,) = sample(pipe, **call), sample(pipe, **call, apply_overlay=True)
    np.testing.assert_allclose(overlaid[:, :8], np.array(picture)[:, :8] / 255, atol=1e-6)
    np.testing.assert_allclose(overlaid[:, 8:], plain[:, 8:], atol=1e-6)
    assert np.abs(plain[:, :8] - overlaid[:, :8]).max() > 0.05  # decoded, so not the same
    tiled = sample(pipe, **call, tile_size=8, apply_overlay=True)
    np.testing.assert_allclose(tiled[0, :, :8], overlaid[:, :8], atol=1e-6)


SCHEDULERS = {
    "DDIM": (DDIMScheduler, {}),
    "PNDM": (PNDMScheduler, {"skip_prk_steps": True}),
    "DPM-Solver++": (DPMSolverMultistepScheduler, {}),
    "Euler": (EulerDiscreteScheduler, {}),
    "UniPC": (UniPCMultistepScheduler, {}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_small_picture_guides(name):
    """The sample, shrunk, comes closer to the small picture, as far as a random decoder lets it."""
    cls, options = SCHEDULERS[name]
    pipe = tiny_ldm("unconditional", scheduler=cls.from_config(WEAK, **options))
    guidance = low_resolution_guidance(tiny_picture(2, 4, 4))
    distances = [
        float(guidance(2 * sample(pipe, output_type="pt", guidance_fn=guidance, guidance_fn_scale=scale) - 1))
        for scale in (0.0, 10.0)
    ]
    assert distances[1] < 0.95 * distances[0]


def test_a_guidance_scale_of_zero_changes_nothing(pipe):
    free = sample(pipe)
    guided = sample(pipe, guidance_fn=low_resolution_guidance(tiny_picture(2, 4, 4)), guidance_fn_scale=0.0)
    torch.testing.assert_close(guided, free, atol=1e-5, rtol=1e-5)


def narrow_lpips(width=8) -> LPIPSDistance:
    """LPIPS on the features of a narrow network of VGG's shape, random as it is."""
    weights, index, channels = {}, 0, 3
    for level, count in enumerate((2, 2, 3, 3, 3)):
        index += level > 0  # the pooling
        for _ in range(count):
            weights[f"net.slice{level + 1}.{index}.weight"] = (
                torch.randn(width, channels, 3, 3) * (2 / (9 * channels)) ** 0.5
            )
            weights[f"net.slice{level + 1}.{index}.bias"] = torch.zeros(width)
            index, channels = index + 2, width
        weights[f"lin{level}.model.1.weight"] = torch.ones(1, width, 1, 1)
    return LPIPSDistance.from_state_dict(weights)


def test_a_perceptual_gradient_guides(pipe):
    lpips = narrow_lpips()
    target = 2 * torch.rand(1, 3, 16, 16) - 1

    def distance(pixels):
        with torch.no_grad():
            return float(lpips(2 * pixels - 1, target))

    free, guided = (
        sample(pipe, output_type="pt", guidance_fn=lambda x: lpips(x, target).flatten(), guidance_fn_scale=scale)
        for scale in (0.0, 20.0)
    )
    assert distance(guided) < 0.97 * distance(free)


def test_a_clip_gradient_guides(pipe):
    clip, wanted = tiny_image_encoder(), F.normalize(torch.randn(1, 12), dim=1)

    def similarity(pictures):
        return (F.normalize(clip(pictures).image_embeds, dim=1) * wanted).sum(dim=1)

    with torch.no_grad():
        free, guided = (
            similarity(
                2 * sample(pipe, output_type="pt", guidance_fn=lambda x: -similarity(x), guidance_fn_scale=scale) - 1
            )
            for scale in (0.0, 10.0)
        )
    assert guided > free + 0.01


def test_guidance_reaches_through_tiles_and_every_sample_by_itself(pipe):
    guidance = low_resolution_guidance(tiny_picture(2, 4, 4))
    call = {"guidance_fn": guidance, "guidance_fn_scale": 0.1, "num_inference_steps": 2, "output_type": "latent"}
    both = pipe(batch_size=2, generator=seeded(3, 4), **call).images
    torch.testing.assert_close(both[1:], pipe(generator=seeded(4), **call).images, atol=1e-4, rtol=1e-4)
    whole = pipe(generator=seeded(4), tile_size=16, **call).images
    torch.testing.assert_close(whole, both[1:], atol=1e-4, rtol=1e-4)
    tiled = [
        pipe(generator=seeded(4), tile_size=8, **call | {"guidance_fn_scale": scale}).images for scale in (0.0, 0.1)
    ]
    assert (tiled[0] - tiled[1]).abs().max() > 1e-3
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())


def test_vq_latents_of_existing_repositories_are_not_scaled(tmp_path, caplog):
    """Their config lacks the scale, and the class's default is that of another model."""
    pipe = tiny_ldm("unconditional", first_stage="vq")
    expected = sample(pipe, output_type="pt")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index = {k: v for k, v in index.items() if k in ("vqvae", "unet", "scheduler")} | {"_class_name": "LDMPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    config = json.loads((tmp_path / "vqvae" / "config.json").read_text())
    del config["scaling_factor"]
    (tmp_path / "vqvae" / "config.json").write_text(json.dumps(config))
    logging.enable_propagation()
    with caplog.at_level(python_logging.WARNING):
        loaded = quiet(LDMUnconditionalPipeline.from_pretrained(tmp_path))
    assert loaded.vqvae.config["scaling_factor"] == 0.18215 and loaded.latent_scale == 1.0
    assert "scaling_factor is 0.18215, the default of diffusers' VQModel" in caplog.text
    torch.testing.assert_close(sample(loaded, output_type="pt"), expected)
    meant = quiet(LDMUnconditionalPipeline.from_pretrained(tmp_path, latent_scale=0.18215))
    caplog.clear()
    meant.save_pretrained(tmp_path / "meant")
    again = LDMUnconditionalPipeline.from_pretrained(tmp_path / "meant")
    logging.disable_propagation()
    assert meant.latent_scale == again.latent_scale == 0.18215 and "scaling_factor" not in caplog.text
    kl = tiny_ldm("unconditional", vqvae=tiny_first_stage(scaling_factor=0.18215))
    assert kl.latent_scale == 0.18215  # the KL autoencoder of the text model has it


PICTURE, MASK = tiny_picture(1), tiny_mask()
BAD = [
    ({"guidance_scale": 3.0}, TypeError, "unexpected keyword argument 'guidance_scale'"),  # there is no condition
    ({"batch_size": 0}, ValueError, r"`batch_size` must be at least 1"),
    ({"image": PICTURE}, ValueError, r"`image` was given without `mask_image`"),
    ({"mask_image": MASK}, ValueError, r"`mask_image` was given without `image`"),
    ({"image": PICTURE, "mask_image": tiny_mask(16, 8)}, ValueError, r"`mask_image` is 8x16 pixels, `image` is 16x16"),
    (
        {"image": PICTURE, "mask_image": np.full((16, 16), 100, np.uint8)},
        ValueError,
        r"`mask_image` must be binary.*received 1 other value\(s\), 100 at x=0, y=0",
    ),
    ({"image": PICTURE, "mask_image": np.zeros((16, 16))}, ValueError, r"nothing to draw: `mask_image` is black"),
    ({"image": [PICTURE] * 3, "mask_image": MASK}, ValueError, r"`image` holds 3 for 1 samples"),
    ({"image": PICTURE, "mask_image": [MASK] * 3}, ValueError, r"`mask_image` holds 3 for 1 samples"),
    ({"image": PICTURE, "mask_image": MASK, "height": 32}, ValueError, r"`height` is 32, but that of `image` is 16"),
    (
        {"image": tiny_picture(0, 20, 16), "mask_image": tiny_mask(20, 16)},
        ValueError,
        r"`image\.height` must be a multiple of 8.*received 20, nearest valid: 16 or 24",
    ),
    ({"height": 17}, ValueError, r"multiple of 8 pixels \(first stage 4 x network 2\).*17, nearest valid: 16 or 24"),
    ({"tile_size": 12}, ValueError, r"`tile_size` must be a multiple of 8.*received 12, nearest valid: 8 or 16"),
    ({"apply_overlay": True}, ValueError, r"puts pixels of `image` back, but there is no `image`"),
    (
        {"apply_overlay": True, "image": PICTURE, "mask_image": MASK},
        ValueError,
        r"puts pixels back; `output_type='latent'` has none",
    ),
    ({"guidance_fn": 3}, TypeError, r"`guidance_fn` must be a function of pictures, received int"),
    ({"guidance_fn": len, "guidance_fn_scale": "1"}, TypeError, r"`guidance_fn_scale` must be a number, received '1'"),
    ({"guidance_fn": len, "guidance_fn_scale": np.inf}, ValueError, r"`guidance_fn_scale` must be finite"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_refused_before_any_network_runs(pipe, call, error, message):
    runs = count_runs(pipe)
    with pytest.raises(error, match=message):
        sample(pipe, **call)
    assert not runs


def test_guidance_needs_to_know_the_noise():
    pipe = tiny_ldm("unconditional", scheduler=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match=r"is a FlowMatchEulerDiscreteScheduler, which has no `alphas_cumprod`"):
        sample(pipe, guidance_fn=low_resolution_guidance(tiny_picture(2, 4, 4)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x, r"must return a loss for each of the 1 pictures, shape \(1,\), or their sum; received a tensor"),
        (lambda x: 3.0, r"must return a loss.*received float"),
        (lambda x: x.detach().sum(), r"does not depend on the pictures, or was computed without gradients"),
        (lambda x: torch.ones((), requires_grad=True) * 2, r"does not depend on the pictures"),
    ],
)
def test_functions_that_cannot_guide(pipe, function, message):
    with pytest.raises(ValueError, match=message):
        sample(pipe, guidance_fn=function)


def test_guidance_by_gradients_is_refused_in_inference_mode():
    pipe = tiny_ldm("unconditional")
    with torch.inference_mode(), pytest.raises(ValueError, match=r"`guidance_fn` needs gradients, .*inference_mode"):
        pipe(guidance_fn=lambda pictures: pictures.square().sum(), num_inference_steps=2)
