"""What an inpainting model sees, pixel by pixel."""

import torch

from diffusers_ext.conditions.inpainting import composite, latent_mask, masked_image

IMAGE = torch.rand(2, 3, 8, 8) * 2 - 1
MASK = torch.zeros(2, 1, 8, 8)
MASK[:, :, 2:5, 4:] = 1.0


def test_hole_is_black_and_the_rest_untouched():
    hole = MASK.bool().expand_as(IMAGE)
    for mask in (MASK, MASK.bool()):
        masked = masked_image(IMAGE, mask)
        assert masked[hole].eq(-1).all()
        torch.testing.assert_close(masked[~hole], IMAGE[~hole])


def test_mask_is_signed_and_resized_by_the_nearest_pixel():
    small = latent_mask(MASK, (4, 4))
    assert small.shape == (2, 1, 4, 4) and set(small.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(small[0, 0], 2 * MASK[0, 0, ::2, ::2] - 1)
    assert torch.equal(latent_mask(MASK.bool(), [8, 8]), 2 * MASK - 1)


def test_composite_keeps_what_was_known():
    predicted = torch.randn(2, 3, 8, 8) * 3
    result = composite(IMAGE, MASK, predicted)
    hole = MASK.bool().expand_as(IMAGE)
    torch.testing.assert_close(result[~hole], (IMAGE[~hole] + 1) / 2)
    torch.testing.assert_close(result[hole], ((predicted[hole] + 1) / 2).clamp(0, 1))
