"""LPIPS against the package of its authors, from weights alone, and the late start of the adversarial terms."""

import lpips
import pytest
import torch

from diffusers_ext.losses.adversarial import delayed_factor
from diffusers_ext.losses.perceptual import LPIPSDistance


@pytest.fixture(scope="module")
def package():
    torch.manual_seed(0)
    return lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)


@torch.no_grad()
def test_equal_to_the_package(package):
    image, target = torch.rand(2, 2, 3, 40, 56) * 2 - 1
    distance = LPIPSDistance.from_state_dict(package.state_dict())
    torch.testing.assert_close(distance(image, target), package(image, target).flatten(), atol=1e-6, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in distance.parameters())


@torch.no_grad()
def test_dropout_acts_in_training_mode_only_and_is_off_by_default(package):
    image, target = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    off, on = (LPIPSDistance.from_state_dict(package.state_dict(), use_dropout=use) for use in (False, True))
    expected = off(image, target)
    torch.testing.assert_close(off.train()(image, target), expected)
    torch.testing.assert_close(on(image, target), expected)
    assert not torch.allclose(on.train()(image, target), expected, rtol=1e-3)


def test_weights_are_taken_strictly(package):
    weights = package.state_dict()
    weights.pop("lin3.model.1.weight")
    weights["net.slice1.9.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing \['heads\.3\.weight'\], unknown \['slices\.0\.9\.weight'\]"):
        LPIPSDistance.from_state_dict(weights)
    with pytest.raises(ValueError, match=r"unknown \['classifier\.weight'\]"):
        LPIPSDistance.from_state_dict({**package.state_dict(), "classifier.weight": torch.zeros(1)})


def test_adversarial_terms_start_at_their_step():
    assert [delayed_factor(step, 3) for step in (0, 2, 3, 4)] == [0.0, 0.0, 1.0, 1.0]
    assert delayed_factor(0, 0, factor=0.7) == 0.7
