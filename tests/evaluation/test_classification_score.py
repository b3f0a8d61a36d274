"""The classification accuracy score on pictures of four flat colours: right labels teach it, wrong ones do not."""

import pytest
import torch

from diffusers_ext.evaluation.classification_score import classification_score, train_classifier

COLORS = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.9], [0.8, 0.8, 0.1]])
SMALL = {"steps": 30, "batch_size": 16, "widths": (8, 16)}


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    noise = 0.1 * torch.randn(count, 3, 16, 16, generator=draw)
    return (COLORS[labels][:, :, None, None] + noise).clamp(0, 1), labels


def test_samples_of_the_right_class_teach_it():
    images, labels = pictures(64, 0)
    losses = []
    network = train_classifier(images, labels, 4, on_step=lambda step, loss: losses.append(loss), **SMALL)
    assert len(losses) == 30 and losses[-1] < losses[0] / 2
    score = classification_score(network, *pictures(40, 1))
    assert score.top_1.value > 0.9 and score.top_5.value == 1.0
    assert [one.count for one in score.by_class] == [10] * 4
    assert sum(one.successes for one in score.by_class) == score.top_1.successes


def test_a_class_under_the_name_of_another_is_wrong_there():
    images, labels = pictures(64, 0)
    network = train_classifier(images, torch.where(labels == 3, 2, labels), 4, **SMALL)
    score = classification_score(network, *pictures(40, 1))
    assert score.by_class[3].value == 0.0 and score.by_class[0].value > 0.9


def test_it_is_a_function_of_its_seed_and_leaves_the_global_one():
    images, labels = pictures(16, 0)
    before = torch.get_rng_state()
    one, again, other = (
        train_classifier(images, labels, 4, seed=seed, steps=2, batch_size=8, widths=(8,)).state_dict()
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(before, torch.get_rng_state())


def test_bad_input():
    images, labels = pictures(4, 0)
    for given, match in [
        ((images, labels[:3], 4), r"`labels` \(3,\)"),
        ((images, labels, 3), "`labels` go from 0 to 3: they must lie between 0 and 2"),
    ]:
        with pytest.raises(ValueError, match=match):
            train_classifier(*given, steps=1)
