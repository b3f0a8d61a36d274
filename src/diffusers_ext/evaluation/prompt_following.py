"""Shares of samples that show what their prompt asks for, with standard errors and the level of chance.

The judge that reads a picture and the parser that reads a prompt are the caller's: here are only counting, pairing and
error bars, so that the same figures can be computed for any data set with a verifier.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Check:
    """What the judge says about one picture.

    Args:
        seed: The run that the picture belongs to.
        num_objects: How many objects its prompt asks for.
        shape_and_color: Whether each wanted object is there in its shape and colour.
        everything: Whether size, number and place are right as well.
    """

    seed: int
    num_objects: int
    shape_and_color: bool
    everything: bool


@dataclass(frozen=True)
class Share:
    """A share of `count` independent trials."""

    successes: int
    count: int

    @property
    def value(self) -> float:
        """In [0, 1]; NaN without trials."""
        return self.successes / self.count if self.count else math.nan

    @property
    def standard_error(self) -> float:
        """Binomial, of the estimate (k + 2) / (n + 4): never 0, also where all trials went one way.

        Source: Agresti and Coull, The American Statistician 52 (1998).
        """
        if not self.count:
            return math.nan
        center = (self.successes + 2) / (self.count + 4)
        return math.sqrt(center * (1 - center) / (self.count + 4))

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.standard_error:.1f} %" if self.count else "-"


@dataclass(frozen=True)
class Following:
    """How well one group of pictures follows its prompts.

    Args:
        label: Name of the group.
        shape_and_color, everything: Shares over the pictures of all seeds.
        chance: `shape_and_color` of the same pictures against other prompts; None where it was not measured.
        chance_everything: The same for `everything`.
        across_seeds: Standard deviation of the seeds' own values of `shape_and_color`; NaN below two seeds. Far above
            the binomial standard error, it says that seeds differ by more than the luck of the draw.
    """

    label: str
    shape_and_color: Share
    everything: Share
    chance: Share | None
    chance_everything: Share | None
    across_seeds: float


def case_generators(seed: int, numbers: Iterable[int], device: str = "cpu") -> list[torch.Generator]:
    """A generator for each case, so that the batch size changes nothing.

    Seeds are uniform in law and apart for every (seed, number): `SeedSequence` hashes the pair.
    """
    seeds = [int(np.random.SeedSequence((seed, number)).generate_state(1)[0]) for number in numbers]
    return [torch.Generator(device).manual_seed(one) for one in seeds]


def share(successes: Iterable[bool]) -> Share:
    """Counts successes."""
    flags = [bool(success) for success in successes]
    return Share(sum(flags), len(flags))


def judge(
    found: Sequence[Any],
    wanted: Sequence[Sequence[Any]],
    *,
    check: Callable[[Any, Any], tuple[bool, bool]],
    seed: int = 0,
) -> list[Check]:
    """Checks each picture against its prompt.

    Args:
        found: What was read in each picture.
        wanted: What each prompt asks for, one entry an object.
        check: `check(found, wanted) -> (shape_and_color, everything)`.
        seed: Stored in the results.

    Raises:
        ValueError: if the two lists differ in length.
    """
    if len(found) != len(wanted):
        raise ValueError(f"`found` holds {len(found)} pictures, `wanted` {len(wanted)} prompts; they must pair up.")
    results = [check(one_found, one_wanted) for one_found, one_wanted in zip(found, wanted, strict=True)]
    return [
        Check(seed, len(one_wanted), bool(named), bool(everything))
        for one_wanted, (named, everything) in zip(wanted, results, strict=True)
    ]


def shuffle_within_groups(groups: Sequence[Any], *, seed: int = 0) -> np.ndarray:
    """A permutation of 0..n-1 that keeps every index in its group and moves every one that has company.

    Pictures of one object are paired with other prompts for one object, so that chance is measured at equal
    difficulty.

    Args:
        groups: The group of each index.
        seed: Of the permutation.
    """
    rng = np.random.default_rng(seed)
    partner = np.arange(len(groups))
    for group in sorted(set(groups), key=repr):
        members = rng.permutation([i for i, other in enumerate(groups) if other == group])
        partner[members] = np.roll(members, 1)  # one cycle through the shuffled members: no fixed point
    return partner


def judge_by_chance(
    found: Sequence[Any],
    wanted: Sequence[Sequence[Any]],
    *,
    check: Callable[[Any, Any], tuple[bool, bool]],
    seed: int = 0,
) -> list[Check]:
    """The same pictures against prompts that they were not drawn for (same number of objects, shuffled)."""
    if len(found) != len(wanted):
        raise ValueError(f"`found` holds {len(found)} pictures, `wanted` {len(wanted)} prompts; they must pair up.")
    partner = shuffle_within_groups([len(one_wanted) for one_wanted in wanted], seed=seed)
    return judge(found, [wanted[int(i)] for i in partner], check=check, seed=seed)


def summarize(checks: Sequence[Check], chance: Sequence[Check] | None = None, *, label: str = "all") -> Following:
    """Shares over all given checks, whatever their seeds and numbers of objects."""
    seeds = sorted({one.seed for one in checks})
    per_seed = [share(one.shape_and_color for one in checks if one.seed == seed).value for seed in seeds]
    return Following(
        label=label,
        shape_and_color=share(one.shape_and_color for one in checks),
        everything=share(one.everything for one in checks),
        chance=None if chance is None else share(one.shape_and_color for one in chance),
        chance_everything=None if chance is None else share(one.everything for one in chance),
        across_seeds=float(np.std(per_seed, ddof=1)) if len(per_seed) > 1 else math.nan,
    )


def summarize_by_objects(checks: Sequence[Check], chance: Sequence[Check] | None = None) -> list[Following]:
    """One row for each number of objects, then one for all."""
    rows = []
    for number in sorted({one.num_objects for one in checks}):
        picked = [one for one in checks if one.num_objects == number]
        picked_chance = None if chance is None else [one for one in chance if one.num_objects == number]
        label = "1 object" if number == 1 else f"{number} objects"
        rows.append(summarize(picked, picked_chance, label=label))
    return [*rows, summarize(checks, chance)]


def markdown_table(rows: Sequence[tuple[str, Following]]) -> str:
    """A table with one line per (setting, group)."""
    lines = [
        "| setting | prompts | pictures | shape and colour right | everything right | chance: shape and colour"
        " | chance: everything | spread over seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for setting, row in rows:
        cells = [row.chance if row.chance is not None else "-", row.chance_everything or "-"]
        spread = "-" if math.isnan(row.across_seeds) else f"{100 * row.across_seeds:.1f} %"
        lines.append(
            f"| {setting} | {row.label} | {row.shape_and_color.count} | {row.shape_and_color} | {row.everything}"
            f" | {cells[0]} | {cells[1]} | {spread} |"
        )
    return "\n".join(lines)
