"""The sticky hash against GrowthBook's published vectors, and what ranges promise."""

from __future__ import annotations

import random

import pytest
from scipy.stats import chisquare

from server.experiments.assignment import choose, fnv1a32, place, ranges, shares_of_places


@pytest.mark.parametrize(
    ("text", "value"), [("", 0x811C9DC5), ("a", 0xE40C292C), ("foobar", 0xBF9CF968), ("chongo was here!\n", 0xD49930D5)]
)
def test_fnv1a_is_the_published_function(text: str, value: int) -> None:
    assert fnv1a32(text) == value


@pytest.mark.parametrize(
    ("seed", "unit", "n"),
    [
        ("seed", "a", 0.0505), ("seed", "b", 0.2696), ("foo", "ab", 0.2575), ("foo", "def", 0.2019),
        ("89123klj", "8952klfjas09ujkasdf", 0.124), ("90850943850283058242805", "123", 0.7516),
        ("()**(%$##$%#$#", '___)((*":&', 0.0128),
    ],
)  # fmt: skip
def test_places_are_those_of_growthbooks_own_test_cases(seed: str, unit: str, n: float) -> None:
    assert place(seed, unit) == n


def test_ranges_are_those_of_growthbooks_own_test_cases() -> None:
    assert ranges([0.5, 0.5], 1) == [(0.0, 0.5), (0.5, 1.0)]
    assert ranges([0.5, 0.5], 0.5) == [(0.0, 0.25), (0.5, 0.75)]
    assert ranges([0.4, 0.6], 1) == [(0.0, 0.4), (0.4, 1.0)]
    assert ranges([0.4, 0.6], 0) == [(0.0, 0.0), (0.4, 0.4)]


def test_a_ramp_moves_nobody_from_arm_to_arm() -> None:
    rng = random.Random(0)
    units = [f"user-{n}" for n in range(5000)]
    shares = [0.2, 0.5, 0.3]
    coverages = [rng.random() for _ in range(20)] + [1.0]
    seen: dict[str, set[int]] = {unit: set() for unit in units}
    for coverage in coverages:
        arms = ranges(shares, coverage)
        for unit in units:
            arm = choose(place("e", unit), arms)
            if arm is not None:
                seen[unit].add(arm)
    assert all(len(arms) == 1 for arms in seen.values()), "a unit had two arms, or none at full coverage"


def test_more_coverage_sends_nobody_out() -> None:
    inside: set[int] = set()
    for coverage in (0.05, 0.1, 0.4, 0.41, 1.0):
        arms = ranges([0.3, 0.7], coverage)
        now = {n for n in range(3000) if choose(place("e", str(n)), arms) is not None}
        assert inside <= now
        assert len(now) / 3000 == pytest.approx(coverage, abs=0.03)
        inside = now


def test_units_fall_to_arms_by_their_shares_and_independently_of_other_experiments() -> None:
    shares = [0.1, 0.2, 0.7]
    arms = ranges(shares, 1.0)
    table = [[0] * 3 for _ in range(3)]
    for n in range(30_000):
        first, second = (choose(place(seed, f"u{n}"), arms) for seed in ("one", "two"))
        assert first is not None and second is not None
        table[first][second] += 1
    observed = [count for row in table for count in row]
    expected = [30_000 * a * b for a in shares for b in shares]
    assert chisquare(observed, expected).pvalue > 1e-4


def test_shares_of_places_are_counted() -> None:
    for shares, coverage in (
        ([1 / 3] * 3, 0.001),
        ([0.1, 0.2, 0.7], 0.37),
        ([1 / 7, 2 / 7, 4 / 7], 1.0),
        ([0.5, 0.5], 1e-9),
    ):
        arms = ranges(shares, coverage)
        held = [choose(step / 10_000, arms) for step in range(10_000)]
        counts = [held.count(arm) for arm in range(len(arms))]
        assert shares_of_places(arms) == [count / sum(counts) for count in counts]
    assert shares_of_places(ranges([1 / 3] * 3, 0.001)) == [0.4, 0.3, 0.3]
    assert shares_of_places([(0.00001, 0.00002)]) == [0.0]


def test_every_place_belongs_to_one_arm_at_full_coverage() -> None:
    for shares in ([1 / 3] * 3, [0.1] * 10, [1 / 7, 2 / 7, 4 / 7]):
        arms = ranges(shares, 1.0)
        for step in range(10_000):
            held = [start <= step / 10_000 < end for start, end in arms]
            assert sum(held) == 1, f"place {step / 10_000} belongs to {sum(held)} arms of {shares}"
