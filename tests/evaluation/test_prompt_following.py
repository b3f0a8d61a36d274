import math

import numpy as np
import pytest

from diffusers_ext.evaluation.prompt_following import (
    Check,
    Share,
    judge,
    judge_by_chance,
    markdown_table,
    share,
    shuffle_within_groups,
    summarize,
    summarize_by_objects,
)


def same_letters(found: str, wanted: list[str]) -> tuple[bool, bool]:
    """A judge for strings: the right letters in any order, and in this order."""
    return sorted(found) == sorted(wanted), list(found) == wanted


def test_share_counts_and_its_error_matches_the_spread_of_repeated_draws():
    assert share([True, False, True, True]).value == 0.75
    rng = np.random.default_rng(0)
    for probability in (0.1, 0.5, 0.9):
        shares = [share(rng.random(400) < probability) for _ in range(600)]
        spread = np.std([one.value for one in shares])
        assert np.mean([one.standard_error for one in shares]) == pytest.approx(spread, rel=0.1)


def test_error_of_a_unanimous_share_is_not_zero_and_falls_with_the_count():
    assert 0.01 < Share(64, 64).standard_error < 0.04
    assert Share(640, 640).standard_error < Share(64, 64).standard_error / 5


def test_share_of_nothing_is_no_number():
    assert math.isnan(share([]).value) and math.isnan(share([]).standard_error)
    assert str(share([])) == "-"


def test_judge_pairs_pictures_with_prompts():
    checks = judge(["ab", "ba", "c"], [["a", "b"], ["a", "b"], ["d"]], check=same_letters, seed=7)
    assert checks == [Check(7, 2, True, True), Check(7, 2, True, False), Check(7, 1, False, False)]


@pytest.mark.parametrize("judging", [judge, judge_by_chance])
def test_lists_of_unequal_length_are_refused(judging):
    with pytest.raises(ValueError, match="`found` holds 1 pictures, `wanted` 2 prompts"):
        judging(["a"], [["a"], ["b"]], check=same_letters)


def test_shuffle_is_a_permutation_within_groups_without_fixed_points():
    groups = [1, 2, 1, 1, 2, 2, 1, 3]
    partner = shuffle_within_groups(groups, seed=0)
    assert sorted(partner) == list(range(8))
    assert all(groups[i] == groups[j] for i, j in enumerate(partner))
    assert [i for i, j in enumerate(partner) if i == j] == [7]  # alone in its group
    assert list(partner) == list(shuffle_within_groups(groups, seed=0))
    assert list(partner) != list(shuffle_within_groups(groups, seed=1))


def test_chance_of_perfect_pictures_is_the_chance_of_equal_prompts():
    rng = np.random.default_rng(0)
    letters = ["abcde"[i] for i in rng.integers(5, size=4000)]
    wanted = [[letter] for letter in letters]
    assert summarize(judge(letters, wanted, check=same_letters)).shape_and_color.value == 1.0
    chance = summarize(judge_by_chance(letters, wanted, check=same_letters)).shape_and_color
    assert chance.value == pytest.approx(0.2, abs=4 * chance.standard_error)


def test_rows_by_number_of_objects_and_the_spread_over_seeds():
    checks = [Check(0, 1, True, True), Check(0, 2, True, False), Check(1, 1, True, True), Check(1, 2, False, False)]
    flags = [(0, 1, False), (0, 2, False), (1, 1, True), (1, 2, False)]
    chance = [Check(seed, number, named, False) for seed, number, named in flags]
    one, two, everyone = summarize_by_objects(checks, chance)
    assert [one.label, two.label, everyone.label] == ["1 object", "2 objects", "all"]
    assert (one.shape_and_color, one.everything, one.chance) == (Share(2, 2), Share(2, 2), Share(1, 2))
    assert (two.shape_and_color, two.everything, two.chance_everything) == (Share(1, 2), Share(0, 2), Share(0, 2))
    assert everyone.shape_and_color == Share(3, 4)
    assert two.across_seeds == pytest.approx(math.sqrt(0.5))  # 1 and 0, sample standard deviation
    assert math.isnan(summarize(checks[:2]).across_seeds)


def test_table_has_one_line_a_row_and_says_what_was_not_measured():
    rows = summarize_by_objects([Check(0, 1, True, True), Check(0, 2, False, False)])
    lines = markdown_table([("12 steps", row) for row in rows]).splitlines()
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| 12 steps | 1 object | 1 | 100.0 ± ")
    assert lines[2].endswith("| - | - | - |")
