"""Precision and recall against figures by hand, and on sets of which one covers the other."""

import pytest
import torch

from diffusers_ext.evaluation.precision_recall import precision_recall


def test_by_hand_on_a_line():
    # with k = 1: balls of the real ones reach 1, 1 and 8; those of the samples 0.5, 0.5 and 19.5
    real = torch.tensor([[0.0], [1.0], [9.0]])
    samples = torch.tensor([[0.0], [0.5], [20.0]])
    found = precision_recall(samples, real, num_neighbors=1)
    assert found.precision == pytest.approx(2 / 3)  # 20 is 11 away from 9
    assert found.recall == 1.0  # 9 is 11 away from 20, within its 19.5
    assert precision_recall(real, samples, num_neighbors=1) == (1.0, pytest.approx(2 / 3))


def test_neighbours_are_other_vectors():
    """A set within itself is whole, and a far one is empty: the distance of a vector to itself does not count."""
    real = torch.randn(1500, 6, generator=torch.Generator().manual_seed(0))  # more than one block
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real + 100, real) == (0.0, 0.0)


def test_a_part_is_precise_and_lacks_recall_and_noise_is_the_other_way_round():
    draw = torch.Generator().manual_seed(0)
    real = torch.randn(400, 4, generator=draw)
    narrow, wide = 0.1 * torch.randn(400, 4, generator=draw), 4 * torch.randn(400, 4, generator=draw)
    other = precision_recall(torch.randn(400, 4, generator=draw), real)
    assert min(other) > 0.7
    found = precision_recall(narrow, real)
    assert found.precision > 0.95 and found.recall < 0.1
    found = precision_recall(wide, real)
    assert found.precision < 0.2 and found.recall > 0.9


def test_bad_input():
    vectors = torch.randn(5, 3)
    for features, target, options, match in [
        (vectors, torch.randn(5, 4), {}, r"one d, got \(5, 3\) and \(5, 4\)"),
        (vectors[:3], vectors, {}, "`num_neighbors` is 3, with 3 samples and 5 real images"),
        (vectors, vectors, {"num_neighbors": 0}, "must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=match):
            precision_recall(features, target, **options)
