"""Learning-rate multipliers and the average of weights, by hand."""

import pytest
import torch
from torch import nn

from diffusers_ext.training_utils.schedules import Cycles, WarmupDecay, ldm_ema


def test_cosine_and_linear_by_hand():
    cosine = WarmupDecay(10, start=0.0, peak=1.0, end=0.2, length=30)
    assert [cosine(step) for step in (0, 5, 10, 20, 30, 99)] == pytest.approx([0, 0.5, 1, 0.6, 0.2, 0.2])
    linear = WarmupDecay(10, start=0.0, peak=1.0, end=0.2, length=40, shape="linear")
    assert [linear(step) for step in (5, 10, 20, 40, 99)] == pytest.approx([0.5, 0.8, 0.6, 0.2, 0.2])
    assert WarmupDecay(0, 0.0, 1.0, 0.5, 10)(0) == 1.0


def test_cycles_follow_each_other():
    first, second = WarmupDecay(2, 0.0, 1.0, 0.5, 10), WarmupDecay(1, 0.0, 0.4, 0.1, 5)
    cycles = Cycles([first, second])
    assert [cycles(step) for step in (0, 10)] == [first(0), first(10)]
    assert [cycles(step) for step in (11, 15, 99)] == [second(1), second(5), second(89)]


def test_drives_an_optimizer():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, WarmupDecay(2, 0.5, 1.0, 0.0, 4))
    rates = []
    for _ in range(5):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1.0, 1.5, 2.0, 1.0, 0.0])


def test_average_counts_its_updates_from_one():
    parameter = nn.Parameter(torch.zeros(2))
    ema = ldm_ema([parameter], decay=0.3)
    expected = torch.zeros(2)
    for n in range(1, 6):
        with torch.no_grad():
            parameter.fill_(float(n))
        ema.step([parameter])
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        torch.testing.assert_close(ema.shadow_params[0], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": 10}, r"`warmup_steps` is 10 and `length` 10: the rise must be shorter"),
        ({"shape": "square"}, r"`shape` is 'square': it must be 'cosine' or 'linear'"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        WarmupDecay(**{"warmup_steps": 1, "start": 0.0, "peak": 1.0, "end": 0.0, "length": 10, **options})
