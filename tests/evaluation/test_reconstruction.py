"""The figures of an autoencoder: named, independent of the batches, the Frechet distance against torchmetrics."""

import pytest
import torch
from torch import nn

from diffusers_ext.evaluation.frechet import frechet_distance
from diffusers_ext.evaluation.image_quality import psnr
from diffusers_ext.evaluation.reconstruction import reconstruction_figures


class FlatFeatures(nn.Module):
    """Pictures of 2x2 pixels as vectors."""

    name = "flat"
    num_features = 12

    def embed(self, image):
        return image.flatten(1)

    forward = embed


class MeanDistance:
    name = "mean-distance"

    def __call__(self, image, target):
        return (image - target).abs().flatten(1).mean(1)


@pytest.mark.parametrize("count", [40, 7])  # 7: fewer pictures than features
def test_frechet_distance_is_that_of_torchmetrics(count):
    fid = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance(FlatFeatures(), normalize=True)
    real, made = torch.rand(count, 3, 2, 2), 0.5 * torch.rand(count, 3, 2, 2) + 0.2
    fid.update(real.double(), real=True)
    fid.update(made.double(), real=False)
    expected = fid.compute().item()
    assert frechet_distance(made.flatten(1), real.flatten(1)) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_frechet_distance_by_hand():
    features = torch.tensor([[-1.0], [1.0]])  # mean 0, unbiased variance 2
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(features + 3, features) == pytest.approx(9)
    assert frechet_distance(2 * features, features) == pytest.approx((8**0.5 - 2**0.5) ** 2)


def test_wrong_features_are_refused():
    with pytest.raises(ValueError, match="at least 2 pictures a side, got 1 and 3"):
        frechet_distance(torch.zeros(1, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"\(n, d\) with one d, got \(3, 5\) and \(3, 4\)"):
        frechet_distance(torch.zeros(3, 5), torch.zeros(3, 4))


def test_figures_are_over_all_pictures_and_named_after_the_networks():
    originals = torch.rand(10, 3, 2, 2)
    figures = [
        reconstruction_figures(
            originals.split(size), lambda image: 0.9 * image, distance=MeanDistance(), features=FlatFeatures()
        )
        for size in (10, 4)
    ]
    assert figures[0].keys() == {"psnr", "mean-distance", "rfid-flat", "pictures"}
    assert figures[0] == pytest.approx(figures[1], rel=1e-5) and figures[0]["pictures"] == 10
    assert figures[0]["psnr"] == pytest.approx(psnr(0.9 * originals, originals))
    assert reconstruction_figures([originals], torch.clone).keys() == {"psnr", "pictures"}
    with pytest.raises(ValueError, match="`batches` holds no picture"):
        reconstruction_figures([], torch.clone)
