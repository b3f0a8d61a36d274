"""The weight that rises in cycles, by hand."""

import pytest

from diffusers_ext.training_utils.schedules import CyclicalAnnealing


@pytest.mark.parametrize(
    ("annealing", "expected"),
    [
        (CyclicalAnnealing(30, num_cycles=3), [0, 0, 0, 0, 0, 0, 0.4, 0.8, 1, 1] * 3),  # a rise of 2.5 steps
        (CyclicalAnnealing(8, 2.0, 1, 0.25, 0.5), [0, 0, 0, 0.5, 1.0, 1.5, 2.0, 2.0]),
        (CyclicalAnnealing(4, 1.0, 2, 0.5, 0.0), [0, 1, 0, 1]),
        (CyclicalAnnealing(4, 1.0, 1, 0.0, 1.0), [0, 0.25, 0.5, 0.75]),
        # cycles of 3.5 steps begin at 0 and 3; 1.75 steps at 0, then a rise of 1.75 steps
        (CyclicalAnnealing(7, 1.0, 2, 0.5, 0.5), [0, 0, 0, 0, 0, 0, 1 / 1.75]),
    ],
)
def test_cycles_by_hand(annealing, expected):
    assert [annealing(step) for step in range(annealing.num_steps)] == pytest.approx(expected)
    assert annealing(annealing.num_steps) == annealing(10 * annealing.num_steps) == annealing.peak


def test_without_a_peak_it_stays_at_zero():
    assert not any(CyclicalAnnealing(20, peak=0.0)(step) for step in range(30))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_cycles": 0}, "`num_cycles` is 0 and `num_steps` 20"),
        ({"num_steps": 3}, "`num_cycles` is 10 and `num_steps` 3: at least one cycle, and one step in each"),
        ({"peak": -1.0}, r"`peak` is -1\.0: it must be >= 0"),
        ({"zero_fraction": -0.1}, r"`zero_fraction` is -0\.1"),
        ({"zero_fraction": 0.8, "rise_fraction": 0.3}, r"`rise_fraction` 0\.3: both must be >= 0, and at most 1"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        CyclicalAnnealing(**{"num_steps": 20, **options})
