"""Colours, repeated words and the start from a picture; the original's numbers are parity cases (vd/...)."""

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler

from diffusers_ext.pipelines.versatile.color_matching import (
    adjust_colors,
    match_color_distribution,
    match_color_statistics,
)
from diffusers_ext.pipelines.versatile.conditions import mask_to_token_weights
from diffusers_ext.pipelines.versatile.denoising import versatile_scheduler
from diffusers_ext.pipelines.versatile.repeated_words import merge_repeated_words
from diffusers_ext.schedulers.gaussian import start_level


def test_statistics_of_the_reference():
    images, reference = 0.4 + 0.1 * torch.rand(2, 3, 8, 8), 0.4 + 0.2 * torch.rand(1, 3, 5, 9)
    matched = match_color_statistics(images, reference)
    for name in ("mean", "std"):
        wanted = getattr(reference, name)((2, 3)).expand(2, 3)
        torch.testing.assert_close(getattr(matched, name)((2, 3)), wanted)
    flat = match_color_statistics(torch.full((1, 3, 4, 4), 0.9), reference)  # nothing to spread
    torch.testing.assert_close(flat, reference.mean((2, 3), keepdim=True).expand(1, 3, 4, 4))


def test_distribution_of_the_reference():
    rng = np.random.default_rng(0)
    image = rng.integers(100, 140, (40, 40, 3), dtype=np.uint8)
    reference = np.where(rng.random((50, 30, 3)) < 0.5, 20, 220).astype(np.uint8)  # two values: no affine map does it
    matched = match_color_distribution(image, reference, keep=0)
    near = (np.abs(matched.astype(int) - 20) < 15) | (np.abs(matched.astype(int) - 220) < 15)
    simple = match_color_distribution(image, reference, keep=0, histogram=False)
    near_simple = (np.abs(simple.astype(int) - 20) < 15) | (np.abs(simple.astype(int) - 220) < 15)
    assert near.mean() > 0.9 > near_simple.mean()
    assert np.array_equal(match_color_distribution(image, reference, keep=1), image)
    flat = np.full((4, 4, 3), 77, dtype=np.uint8)
    assert match_color_distribution(flat, reference, keep=1).mean() == 77
    both = adjust_colors(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8), "histogram")
    assert both.shape == (2, 3, 8, 8) and 0 <= both.min() and both.max() <= 1
    with pytest.raises(ValueError, match=r"`keep` is 1\.5: it is the share of the unchanged picture"):
        match_color_distribution(image, reference, keep=1.5)


@pytest.mark.parametrize(
    ("text", "merged"),
    [
        ("", ""),
        ("a cat", "a cat"),
        ("cat cat cat cat", "cat"),
        ("a big dog a big dog a big dog runs", "a big dog runs"),
        ("no, no, no!", "no, no!"),  # the last is followed by another mark
        ("((x)) ((x))", "(x)"),  # of brackets and dots as well
        ("one two two one two two", "one two"),  # short runs first
        ("a b a b c a b a b c", "a b c"),
        ("  spaces   between ", "spaces between"),
        ("... wait", ".. wait"),
    ],
)
def test_repeated_words(text, merged):
    assert merge_repeated_words(text) == merged
    assert merge_repeated_words(merged) == merged


def test_mask_to_token_weights():
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1  # the left half
    weights = mask_to_token_weights(mask, image_size=8, patch_size=4)
    assert weights.shape == (1, 5, 1)
    assert weights[0, 0] == 0.5 and weights[0, 1] == weights[0, 3] > 0.9 and weights[0, 2] == weights[0, 4] < 0.1
    assert mask_to_token_weights(torch.ones(2, 1, 1, 1), 8, 4).eq(1).all()


def test_start_level_lies_one_step_above_the_first():
    scheduler = versatile_scheduler()
    scheduler.set_timesteps(50)
    level, left = start_level(scheduler.timesteps, 0.6)
    assert int(level) == 601 and left[0] == 581 and len(left) == 30 and left[-1] == 1
    level, left = start_level(scheduler.timesteps, 0.01)
    assert level is None and len(left) == 0
    level, left = start_level(scheduler.timesteps, 0.9999999999999999)  # ten times 0.1
    assert int(level) == 981 and left[0] == 961


def test_start_level_never_parts_the_timesteps_of_one_step():
    scheduler = HeunDiscreteScheduler.from_config(versatile_scheduler().config)
    for steps in (5, 6):
        scheduler.set_timesteps(steps)  # t0, t1 t1, t2 t2 ...: a step and its correction
        level, left = start_level(scheduler.timesteps, 0.5, scheduler.order)
        every = scheduler.timesteps[:: scheduler.order]
        count = steps // 2
        assert torch.equal(left[::2], every[-count:]) and len(left) == 2 * count - 1
        assert level == every[-count - 1]


def test_the_schedule_is_that_of_the_released_models():
    config = versatile_scheduler().config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert not config.clip_sample and not config.set_alpha_to_one and config.steps_offset == 1
