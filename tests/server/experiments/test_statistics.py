"""The intervals' promises, held to simulations of people who look after every unit, and to another implementation's numbers.

The simulation is `bench.always_valid`: a horizon of `HORIZON` units that fall to arms by the shipped hash, looked at after
every unit from `MIN_UNITS` an arm on. A look after every unit is the worst that watching can do. ``make test`` runs six rows
of its table, ``ATOMSTEER_TEST_SIMULATIONS=all`` all thirty.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

from atoms.package import Package
from clients.experiment_spec import Plan
from server.config import ServeConfig
from server.experiments.assignment import choose, place, ranges
from server.experiments.report import _metric
from server.experiments.spec import Experiment, ExperimentSpec
from server.experiments.statistics import (
    MIN_UNITS,
    Moments,
    detectable_effect,
    difference,
    mean,
    required_units,
    rho,
    sample_ratio,
    steadied,
    width,
)
from server.steering import Steering

ALPHA = 0.05
HORIZON = 2000
EXPERIMENTS = 2000
FALSE_ALARMS = 0.06
GBSTATS = [
    (100, 1.0, 4.0, 120, 1.5, 3.0, 2000, -0.4607656832552425, 1.4607656832552425, 0.5584648863281257),
    (5000, 0.3, 0.21, 4800, 0.33, 0.2211, 5000, 0.0012842112712721128, 0.058715788728727944, 0.03344021404090499),
    (40, 10.0, 25.0, 45, 11.0, 30.0, 500, -2.9237727597537924, 4.923772759753792, 1.0),
]
"""n, mean and variance of control and arm; horizon; interval; p-value."""

Values = NDArray[np.float64]
ROWS = [
    ("normal", "6 arms"), ("skewed (log-normal)", "10% control"), ("revenue (90% zero)", "10% treated"), ("rate 50%", "2 arms"),
    ("rate 10%", "10% control"), ("rate 2%", "3 arms"),
]  # fmt: skip
"""Of `bench.always_valid`: each kind of values, each way of sharing units but the most harmless."""
ALL = os.environ.get("ATOMSTEER_TEST_SIMULATIONS") == "all"


def _bench() -> ModuleType:
    """bench/always_valid.py: a script, and no part of any package."""
    path = Path(__file__).parents[3] / "bench" / "always_valid.py"
    spec = importlib.util.spec_from_file_location("always_valid", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = _bench()


def running(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """n, mean and variance after each column of (experiments, n) values."""
    n = np.arange(1, values.shape[1] + 1)
    means = np.cumsum(values, axis=1) / n
    variances = (np.cumsum(values**2, axis=1) - n * means**2) / np.maximum(n - 1, 1)
    return n, means, np.maximum(variances, 0)


@pytest.mark.parametrize(("values", "how"), list(itertools.product(bench.VALUES, bench.SHARES)) if ALL else ROWS)
def test_whoever_looks_after_every_unit_is_fooled_in_at_most_6_of_100_tests_without_effect(
    values: str, how: str
) -> None:
    """And the intervals of all looks hold the difference, and those of means hold it from above, where guardrails are."""
    kind = bench.VALUES[values]
    found = bench.Simulation(kind, bench.SHARES[how], EXPERIMENTS, HORIZON).run()
    assert found["called"] <= FALSE_ALARMS, f"{found['called']:.1%} of {EXPERIMENTS} A/A tests were called"
    assert found["missed"] <= FALSE_ALARMS and found["end missed"].max() <= FALSE_ALARMS
    assert found["means called high"].max() <= FALSE_ALARMS
    if kind.proportion or values == "normal":
        assert found["means missed"].max() <= FALSE_ALARMS
    assert found["ratio alarm"] <= FALSE_ALARMS


@pytest.mark.parametrize("effect", [0.05, 0.3])
def test_intervals_hold_a_difference_that_is_there(effect: float) -> None:
    found = bench.Simulation(bench.VALUES["rate 10%"], (0.2, 0.4, 0.4), EXPERIMENTS, 1000, effect, seed=2).run()
    assert found["missed"] <= FALSE_ALARMS and found["means missed"].max() <= FALSE_ALARMS


def test_the_simulation_is_of_what_servers_do(package: Package, config: ServeConfig) -> None:
    """Its assignment is the hash's, and its intervals are those of a report, for arms of unequal shares."""
    shares = (0.2, 0.5, 0.3)
    rng = np.random.default_rng(1)
    places = bench.hashed(range(7, 9), 300)
    assert [[round(place(f"e{seed}", f"u{n}") * 10_000) for n in range(300)] for seed in (7, 8)] == places.tolist()
    starts = np.array([start for start, _ in ranges(shares, 1.0)])
    arms = np.searchsorted(starts, places / 10_000, side="right") - 1
    assert [choose(n / 10_000, ranges(shares, 1.0)) for n in places[0]] == arms[0].tolist()
    for kind, values in (("mean", rng.normal(1, 2, (2, 300))), ("proportion", (rng.random((2, 300)) < 0.1) * 1.0)):
        looks = bench.Looks.of(values, arms, 3, kind == "proportion")
        spec = ExperimentSpec.model_validate({
            "name": "e7", "horizon": 300, "metrics": [{"name": "value", "kind": kind}],
            "arms": [{"name": f"a{k}", "atoms": {}, "weight": share} for k, share in enumerate(shares)],
        }).completed()  # fmt: skip
        frozen = tuple(Steering.of(package, config).freeze(spec))
        experiment = Experiment(1, "running", spec, frozen, "1", 1.0, 0.0)
        ours = [values[0][arms[0] == k] for k in range(3)]
        moments = {f"a{k}": Moments(len(v), v.mean(), v.var(ddof=1)) for k, v in enumerate(ours)}
        reported = _metric(experiment, "value", moments)
        estimate, half, _ = looks.differences(300, shares)
        for k, found in enumerate(reported["differences"]):
            expected = (estimate[0, -1, k] - half[0, -1, k], estimate[0, -1, k] + half[0, -1, k])
            assert (found["low"], found["high"]) == pytest.approx(expected), kind
        low, high, _ = looks.means(300, shares)
        for k, found in enumerate(reported["arms"]):
            assert (found["low"], found["high"]) == pytest.approx((low[0, -1, k], high[0, -1, k])), kind


def test_few_skewed_values_of_a_small_arm_do_not_fool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation can tell: with every arm's own variance one A/A test in ten and more is called."""
    monkeypatch.setattr(bench, "steadied", lambda n, variance, other_n, other_variance: variance)
    simulation = bench.Simulation(bench.VALUES["revenue (90% zero)"], bench.SHARES["10% treated"], 500, HORIZON)
    assert simulation.run()["called"] > 0.1


def test_the_usual_interval_would_not_do() -> None:
    """The simulation can tell: a 95% interval for one look is broken by most of those who look all the time."""
    rng = np.random.default_rng(0)
    (n, m0, v0), (_, m1, v1) = (
        running(rng.normal(size=(500, HORIZON // 2))),
        running(rng.normal(size=(500, HORIZON // 2))),
    )
    off = np.abs(m1 - m0) > 1.96 * np.sqrt((v0 + v1) / n)
    assert off[:, MIN_UNITS:].any(axis=1).mean() > 0.25


def test_units_that_come_back_do_not_fool_either() -> None:
    """Every unit has a level of its own and answers again and again: its mean, which counts once, moves all the time."""
    rng = np.random.default_rng(4)
    units, turns, experiments = 200, 12, 500
    level = rng.normal(size=(experiments, 2, units))
    total = np.zeros_like(level)
    count = np.zeros_like(level)
    fooled = np.zeros(experiments, dtype=bool)
    for turn in range(units * turns):  # one response of a random unit at a time, units joining as the test goes on
        joined = min(units, 2 * MIN_UNITS + turn // turns)
        who = rng.integers(0, joined, size=(experiments, 2))
        rows, arms = np.indices(who.shape)
        total[rows, arms, who] += level[rows, arms, who] + rng.normal(size=who.shape)
        count[rows, arms, who] += 1
        if turn % 10:
            continue
        seen = count > 0
        n = seen.sum(axis=2)
        values = np.where(seen, total / np.maximum(count, 1), 0.0)
        means = values.sum(axis=2) / n
        variances = (np.where(seen, (values - means[..., None]) ** 2, 0).sum(axis=2)) / np.maximum(n - 1, 1)
        half = width(n.sum(axis=1), ALPHA, 2 * units) * np.sqrt((variances / n).sum(axis=1))
        fooled |= (np.abs(means[:, 1] - means[:, 0]) > half) & (n.min(axis=1) >= MIN_UNITS)
    assert fooled.mean() <= FALSE_ALARMS


@pytest.mark.parametrize(("values", "effect", "how", "power"), [
    ("normal", 0.45, "2 arms", 0.8), ("normal", 0.45, "2 arms", 0.9), ("normal", 0.6, "6 arms", 0.8),
    ("rate 10%", 0.3, "3 arms", 0.8), ("rate 50%", 0.2, "10% control", 0.8), ("rate 10%", 0.15, "10% control", 0.8),
])  # fmt: skip
def test_the_planned_number_of_units_gives_the_promised_power(
    values: str, effect: float, how: str, power: float
) -> None:
    kind, shares = bench.VALUES[values], bench.SHARES[how]
    given = {"rate": kind.mean} if kind.proportion else {"deviation": 2.0}
    units = Plan(shares, power, ALPHA, **given).units(effect)
    found = bench.Simulation(kind, shares, EXPERIMENTS, units, effect, seed=5).run()
    at_the_end, by_the_end = found["found"].mean(), found["found early"].mean()
    assert power - 0.05 <= at_the_end <= power + 0.06  # more where a small arm's variance is steadied
    assert power - 0.02 <= by_the_end <= power + 0.12


def test_plan_and_detectable_effect_agree() -> None:
    units = required_units(0.3, 1.0, alpha=ALPHA, power=0.8, shares=(0.25, 0.25), comparisons=3)
    arm = Moments(units // 4, 0.0, 1.0)
    found = detectable_effect(arm, arm, alpha=ALPHA, power=0.8, horizon=units // 2, comparisons=3)
    assert found == pytest.approx(0.3, rel=0.01)


def test_numbers_of_growthbooks_engine() -> None:
    """gbstats 0.8.0, SequentialTwoSidedTTest on SampleMeanStatistic, sequential_tuning_parameter as the horizon."""
    for n0, mean0, var0, n1, mean1, var1, horizon, low, high, p in GBSTATS:
        found = difference(Moments(n0, mean0, var0), Moments(n1, mean1, var1), ALPHA, horizon)
        if (n0 - n1) * (var0 - var1) <= 0:  # the smaller arm varies more: nothing is to be steadied
            assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
            assert found.p_value == pytest.approx(p, rel=1e-9)
        else:
            assert found.low is not None and found.high is not None
            assert found.low < low and found.high > high and found.high - found.low < 1.02 * (high - low)


@pytest.mark.parametrize("comparisons", [1, 2, 5])
def test_the_p_value_and_the_interval_say_the_same(comparisons: int) -> None:
    """However many comparisons share alpha: a p of 0.04 beside an interval that holds 0 would be read as a finding."""
    said = set()
    for shift in np.linspace(0, 1, 401):
        found = difference(Moments(100, 0.0, 1.0), Moments(100, shift, 1.0), ALPHA, HORIZON, comparisons=comparisons)
        assert found.low is not None and found.p_value is not None
        assert (found.p_value < ALPHA) == (found.low > 0) and found.p_value <= 1
        said.add(found.low > 0)
    assert said == {True, False}


def test_few_units_have_no_interval() -> None:
    few, enough = Moments(MIN_UNITS - 1, 1.0, 1.0), Moments(MIN_UNITS, 1.0, 1.0)
    assert mean(few, ALPHA, HORIZON).low is None
    assert mean(enough, ALPHA, HORIZON).low is not None
    assert difference(few, enough, ALPHA, HORIZON).low is None
    assert detectable_effect(few, enough, alpha=ALPHA, power=0.8, horizon=HORIZON) is None


def test_a_proportion_of_which_nothing_was_seen_is_not_surely_zero() -> None:
    nothing = Moments(50, 0.0, 0.0)
    found = mean(nothing, ALPHA, HORIZON, proportion=True)
    assert found.high is not None and found.high > 0.02
    assert mean(nothing, ALPHA, HORIZON).high == 0.0
    all_seen = mean(Moments(50, 1.0, 0.0), ALPHA, HORIZON, proportion=True)
    assert all_seen.high == 1.0 and all_seen.low == pytest.approx(1 - found.high)


def test_variances_are_steadied_only_by_a_larger_arm() -> None:
    assert steadied(100, 1.0, 100, 4.0) == steadied(200, 1.0, 100, 4.0) == 1.0
    assert steadied(25, 1.0, 100, 4.0) == 1 + 0.75 * 3
    assert steadied(25, 9.0, 100, 4.0) == 9.0


def test_equal_values_give_no_evidence() -> None:
    same = Moments(50, 1.0, 0.0)
    assert difference(same, same, ALPHA, HORIZON).p_value == 1.0
    assert difference(same, Moments(50, 2.0, 0.0), ALPHA, HORIZON).p_value == 0.0


def test_the_interval_is_tightest_near_the_horizon() -> None:
    for horizon in (100, 2000, 100_000):
        scales = horizon * np.logspace(-1, 1, 41)
        margins = [width(horizon, ALPHA, scale) for scale in scales]
        assert scales[int(np.argmin(margins))] == pytest.approx(horizon, rel=0.15)
    assert rho(ALPHA, 2000) > rho(ALPHA, 4000)


def test_sample_ratios() -> None:
    shares = {"a": 0.5, "b": 0.5}
    assert sample_ratio({"a": 0, "b": 0}, shares) is None
    assert sample_ratio({"a": 9, "b": 0}, shares) is None, "the arms expect fewer than five units"
    assert sample_ratio({"a": 10, "b": 0}, shares) is not None
    tiny = {"a": 1 - 1e-6, "b": 1e-6}
    assert sample_ratio({"a": 900, "b": 99}, tiny) is None
    assert sample_ratio({"a": 900, "b": 100}, tiny) < 1e-9
    assert sample_ratio({"a": 900, "b": 900, "c": 0}, shares | {"c": 0.0}) == 1.0
    assert sample_ratio({"a": 900, "b": 900, "c": 1}, shares | {"c": 0.0}) == 0.0, "none can fall there"
    assert sample_ratio({"a": 900, "b": 0}, {"a": 1.0, "b": 0.0}) is None
    fair, off = sample_ratio({"a": 510, "b": 490}, shares), sample_ratio({"a": 600, "b": 400}, shares)
    assert fair is not None and fair > 0.5
    assert off is not None and off < 1e-9
    uneven = sample_ratio({"b": 102, "a": 898}, {"a": 0.9, "b": 0.1})
    assert uneven is not None and uneven > 0.5
