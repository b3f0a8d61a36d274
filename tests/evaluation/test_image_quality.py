"""Picture figures against hand-computed values, and the grid's layout."""

import pytest
import torch

from diffusers_ext.evaluation.image_quality import gradient_length, laplacian_variance, picture_grid, psnr


def test_psnr_by_hand_is_the_mean_of_the_samples_values():
    target = torch.zeros(2, 3, 4, 4)
    image = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])
    # peak-to-peak range 2: 10 log10(4 / 0.2^2) = 20 dB, 10 log10(4 / 0.02^2) = 40 dB
    assert psnr(image, target) == pytest.approx(30.0, abs=1e-3)
    assert psnr(target, target) == pytest.approx(126.02, abs=0.01)


def test_psnr_of_unlike_shapes_is_refused():
    with pytest.raises(ValueError, match=r"differ in shape: \(2, 3, 4, 4\) and \(1, 3, 4, 4\)"):
        psnr(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))


def test_grid_places_pictures_row_by_row_on_white():
    images = torch.full((3, 3, 4, 6), -1.0)
    images[1, 0] = 1.0  # red
    images[2, 2] = 7.0  # blue, clamped
    grid = picture_grid(images, columns=2)
    assert grid.size == (2 * (6 + 2) + 2, 2 * (4 + 2) + 2)
    assert [grid.getpixel(place) for place in ((2, 2), (10, 2), (2, 8))] == [(0, 0, 0), (255, 0, 0), (0, 0, 255)]
    assert grid.getpixel((0, 0)) == grid.getpixel((10, 8)) == (255, 255, 255)  # border, and the empty place


def test_sharpness_by_hand_and_in_order():
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1.0
    # of 7 columns of differences one holds a step of 1
    assert gradient_length(edge) == pytest.approx(1 / 7)
    # of 6 inner columns one has a Laplacian of 1 and one of -1: 12 of 36 values, mean 0
    assert laplacian_variance(edge) == pytest.approx(12 / 35)
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(picture, 3, 1, 1)
    for sharpness in (gradient_length, laplacian_variance):
        assert sharpness(picture) > 2 * sharpness(blurred)
        assert sharpness(2 * picture) > sharpness(picture) and sharpness(torch.ones(1, 3, 4, 4)) == 0
