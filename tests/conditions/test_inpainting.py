"""What an inpainting model sees, pixel by pixel."""

import torch

from diffusers_ext.conditions.inpainting import composite, continue_pixels, latent_mask, masked_image

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


def test_pixels_go_on_into_the_hole_as_the_nearest_known_ones():
    unknown = torch.stack([MASK[0, 0] > 0, torch.arange(64).reshape(8, 8) % 8 > 4])
    continued = continue_pixels(IMAGE, unknown)
    places = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    for image, found, hole in zip(IMAGE, continued, unknown, strict=True):
        assert torch.equal(found[:, ~hole], image[:, ~hole])
        distances = torch.cdist(places, places[~hole.flatten()])
        for place in hole.flatten().nonzero()[:, 0].tolist():
            nearest = distances[place] == distances[place].min()  # several may be as near
            colours = image[:, ~hole].T[nearest]
            assert (colours == found.flatten(1)[:, place]).all(dim=1).any()
    padded = torch.nn.functional.pad(IMAGE[..., :5], (0, 3, 0, 0), mode="replicate")  # as around a picture on a canvas
    assert torch.equal(continue_pixels(IMAGE, unknown[1:]), padded)
    assert torch.equal(continue_pixels(IMAGE[:1], unknown)[1], padded[0])


def test_composite_keeps_what_was_known():
    predicted = torch.randn(2, 3, 8, 8) * 3
    result = composite(IMAGE, MASK, predicted)
    hole = MASK.bool().expand_as(IMAGE)
    torch.testing.assert_close(result[~hole], (IMAGE[~hole] + 1) / 2)
    torch.testing.assert_close(result[hole], ((predicted[hole] + 1) / 2).clamp(0, 1))
