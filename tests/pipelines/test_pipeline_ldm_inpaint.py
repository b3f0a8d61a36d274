"""Inpainting with a network that was trained for it."""

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines.tiny_ldm import count_runs, seeded, tiny_ldm, tiny_mask, tiny_picture

from diffusers_ext.conditions.inpainting import composite
from diffusers_ext.pipelines.ldm.first_stage import encode_masked_image

PICTURE, MASK = tiny_picture(1), tiny_mask()


@pytest.fixture(scope="module")
def pipe():
    return tiny_ldm("inpaint")


def sample(pipe, image=PICTURE, mask=MASK, *, seed=0, output_type="latent", **call):
    return pipe(image, mask, num_inference_steps=2, generator=seeded(seed), output_type=output_type, **call).images


def tensors():
    pixels = torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)[None] / 127.5 - 1
    return pixels, torch.from_numpy(np.array(MASK) == 255)[None, None].float()


@pytest.mark.parametrize("first_stage", ["kl", "vq"])
def test_the_network_sees_latents_masked_picture_and_mask(first_stage):
    pipe = tiny_ldm("inpaint", first_stage=first_stage)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    sample(pipe, guidance_scale=3.0)
    assert seen[0].shape == (2, 7, 4, 4) and not seen[0][0, 3:].any()
    torch.testing.assert_close(seen[0][1:, 3:], encode_masked_image(pipe.vqvae, *tensors()))
    other = np.array(PICTURE)
    other[:, 8:] = 0
    assert torch.equal(sample(pipe, Image.fromarray(other)), sample(pipe))  # the hole's content is not looked at


def test_known_pixels_are_untouched_and_the_hole_is_the_prediction(pipe):
    (result,) = sample(pipe, output_type="pil")
    known = np.array(MASK) == 0
    np.testing.assert_array_equal(np.array(result)[known], np.array(PICTURE)[known])
    decoded = pipe.vqvae.decode(sample(pipe) / 0.5).sample
    expected = composite(*tensors(), decoded)
    torch.testing.assert_close(sample(pipe, output_type="pt"), expected, atol=1e-6, rtol=0)
    assert np.abs(np.array(result)[~known].astype(int) - np.array(PICTURE)[~known]).max() > 20


def test_several_pictures_masks_and_results(pipe):
    pictures, masks = [PICTURE, tiny_picture(2)], [MASK, np.array(MASK).T == 255]
    call = {"num_inference_steps": 2, "num_images_per_prompt": 2, "output_type": "pt"}
    both = pipe(pictures, masks, generator=seeded(0, 1, 2, 3), **call).images
    alone = sample(pipe, pictures[1], masks[1], seed=3, output_type="pt")
    torch.testing.assert_close(both[3:], alone, atol=1e-5, rtol=0)
    shared = pipe(pictures, MASK, generator=seeded(0, 1, 2, 3), **call).images
    torch.testing.assert_close(shared[:2], both[:2], atol=1e-5, rtol=0)


def test_all_may_be_filled(pipe):
    assert sample(pipe, PICTURE, np.ones((16, 16), bool)).shape == (1, 3, 4, 4)


BAD = [
    (
        PICTURE,
        tiny_mask(8, 16),
        ValueError,
        r"`mask_image` is 16x8 pixels, `image` is 16x16\. Resize it with",
    ),
    (
        PICTURE,
        np.full((16, 16), 0.5),
        ValueError,
        r"`mask_image` must be binary, .* 1 other value\(s\), 0\.5",
    ),
    (PICTURE, np.zeros((16, 16), bool), ValueError, r"nothing to draw: `mask_image` is black"),
    (PICTURE, [MASK, MASK], ValueError, r"`mask_image` holds 2 for 1 pictures"),
    (
        tiny_picture(0, 18, 16),
        tiny_mask(18, 16),
        ValueError,
        r"`image\.height` must be a multiple of 8.*18, nearest",
    ),
    (None, MASK, TypeError, r"`image` must be a PIL picture.*received NoneType"),
    (PICTURE, None, TypeError, r"`mask_image` must be a PIL picture.*received NoneType"),
]


@pytest.mark.parametrize(("image", "mask", "error", "message"), BAD)
def test_bad_input_is_refused_before_any_network_runs(pipe, image, mask, error, message):
    runs = count_runs(pipe)
    with pytest.raises(error, match=message):
        sample(pipe, image, mask)
    assert not runs
