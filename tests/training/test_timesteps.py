"""Which noise levels a step trains."""

import pytest
import torch

from diffusers_ext.training_utils.timesteps import HISTORY, LossSecondMomentTimesteps, UniformTimesteps


class OneProcess:
    num_processes = 1


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


@pytest.fixture
def known() -> LossSecondMomentTimesteps:
    """Losses of the level k were k + 1."""
    sampler = LossSecondMomentTimesteps(4)
    for _ in range(HISTORY):
        sampler.observe(torch.arange(4), torch.arange(1.0, 5.0), 1.0, OneProcess())
    sampler.refresh()
    return sampler


def test_all_levels_are_alike_until_each_is_known():
    sampler = LossSecondMomentTimesteps(4)
    for _ in range(2 * HISTORY):
        sampler.observe(torch.arange(3), torch.tensor([1.0, 5.0, 9.0]), 1.0, OneProcess())
    sampler.refresh()
    assert sampler.probabilities.tolist() == [0.25] * 4
    _, weights = sampler.draw(generators(8), torch.device("cpu"))
    assert weights.tolist() == [1.0] * 8


def test_large_losses_are_drawn_more_often_and_weigh_less(known):
    torch.testing.assert_close(known.probabilities, 0.999 * torch.arange(1.0, 5.0) / 10 + 0.001 / 4)
    timesteps, weights = known.draw(generators(4000), torch.device("cpu"))
    torch.testing.assert_close(torch.bincount(timesteps) / 4000, known.probabilities, atol=0.03, rtol=0)
    torch.testing.assert_close(weights, 1 / (4 * known.probabilities[timesteps]))
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0), atol=0.05, rtol=0)  # the mean loss stays


def test_a_draw_depends_on_its_own_generator(known):
    whole, _ = known.draw(generators(6), torch.device("cpu"))
    parts = [known.draw([g], torch.device("cpu"))[0] for g in generators(6)]
    assert whole.tolist() == torch.cat(parts).tolist()


def test_only_the_last_losses_of_a_level_are_remembered(known):
    known.observe(torch.full((HISTORY + 3,), 2), torch.arange(HISTORY + 3.0), 1.0, OneProcess())
    assert sorted(known.losses[2].tolist()) == list(range(3, HISTORY + 3))
    assert known.losses[1].tolist() == [2.0] * HISTORY


def test_a_process_without_samples_of_its_own_tells_nothing(known):
    before = known.losses.clone()
    known.observe(torch.tensor([0, 1]), torch.tensor([99.0, 99.0]), 0.0, OneProcess())
    assert torch.equal(known.losses, before) and known.counts.tolist() == [HISTORY] * 4


def test_a_checkpoint_holds_what_is_remembered(known):
    again = LossSecondMomentTimesteps(4)
    again.load_state_dict(known.state_dict())
    again.refresh()
    assert torch.equal(again.probabilities, known.probabilities)


def test_a_validation_draws_all_levels_alike(known):
    known.eval()
    timesteps, weights = known.draw(generators(8), torch.device("cpu"))
    expected, _ = UniformTimesteps(4).draw(generators(8), torch.device("cpu"))
    assert timesteps.tolist() == expected.tolist() and weights.tolist() == [1.0] * 8
