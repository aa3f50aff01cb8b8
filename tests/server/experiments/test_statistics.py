"""The intervals' promises, held to simulations of people who look after every unit, and to another implementation's numbers.

Simulated: a horizon of `HORIZON` units, alternating or randomised over two arms, looked at after every unit from
`MIN_UNITS` an arm on. A look after every unit is the worst that watching can do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from server.experiments.statistics import (
    MIN_UNITS,
    Moments,
    detectable_effect,
    difference,
    mean,
    required_units,
    rho,
    sample_ratio,
    width,
)

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

Draw = Callable[[np.random.Generator, tuple[int, int]], NDArray[np.float64]]
VALUES: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.normal(3.0, 2.0, shape),
    "half": lambda rng, shape: (rng.random(shape) < 0.5).astype(float),
    "rare": lambda rng, shape: (rng.random(shape) < 0.02).astype(float),
    "skewed": lambda rng, shape: rng.lognormal(0.0, 1.0, shape),
}


def running(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """n, mean and variance after each column of (experiments, n) values."""
    n = np.arange(1, values.shape[1] + 1)
    means = np.cumsum(values, axis=1) / n
    variances = (np.cumsum(values**2, axis=1) - n * means**2) / np.maximum(n - 1, 1)
    return n, means, np.maximum(variances, 0)


def looks(
    draw: Draw, effect: float, proportion: bool, *, horizon: int = HORIZON, comparisons: int = 1, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Estimates and half widths, (experiments, looks): after each pair of units, by the module's own formula."""
    rng = np.random.default_rng(seed)
    shape = (EXPERIMENTS, horizon // 2)
    (n, m0, v0), (_, m1, v1) = running(draw(rng, shape)), running(draw(rng, shape) + effect)
    if proportion:
        floor = (n + 1) / (n + 2) ** 2
        v0, v1 = np.maximum(v0, floor), np.maximum(v1, floor)
    half = width(2 * n, ALPHA / comparisons, horizon) * np.sqrt((v0 + v1) / n)
    return (m1 - m0)[:, MIN_UNITS - 1 :], half[:, MIN_UNITS - 1 :]


def test_the_simulation_uses_the_formula_that_is_shipped() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=200), rng.normal(0.1, 2, size=200)
    (_, m0, v0), (_, m1, v1) = running(a[None]), running(b[None])
    shipped = difference(Moments(200, m0[0, -1], v0[0, -1]), Moments(200, m1[0, -1], v1[0, -1]), ALPHA, HORIZON)
    half = width(400, ALPHA, HORIZON) * math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 200)
    assert shipped.value == pytest.approx(b.mean() - a.mean())
    assert (shipped.low, shipped.high) == pytest.approx((shipped.value - half, shipped.value + half))


@pytest.mark.parametrize("name", VALUES)
def test_whoever_looks_after_every_unit_is_fooled_in_at_most_6_of_100_tests_without_effect(name: str) -> None:
    estimates, half = looks(VALUES[name], 0.0, proportion=name in ("half", "rare"))
    fooled = (np.abs(estimates) > half).any(axis=1).mean()
    assert fooled <= FALSE_ALARMS, f"{fooled:.1%} of {EXPERIMENTS} A/A tests on {name} values were called"


def test_the_usual_interval_would_not_do() -> None:
    """The simulation can tell: a 95% interval for one look is broken by most of those who look all the time."""
    estimates, half = looks(VALUES["normal"], 0.0, proportion=False)
    n = 2 * np.arange(MIN_UNITS, HORIZON // 2 + 1)
    usual = half / width(n, ALPHA, HORIZON) * 1.96
    assert (np.abs(estimates) > usual).any(axis=1).mean() > 0.25


@pytest.mark.parametrize("name", ["normal", "skewed"])
def test_all_intervals_of_an_experiment_hold_the_true_difference(name: str) -> None:
    estimates, half = looks(VALUES[name], 0.4, proportion=False, seed=2)
    covered = (np.abs(estimates - 0.4) <= half).all(axis=1).mean()
    assert covered >= 0.94


def test_several_arms_share_the_level() -> None:
    """Five arms without effect against one control: any false alarm counts."""
    rng = np.random.default_rng(3)
    shape = (EXPERIMENTS, 200)
    n, m0, v0 = running(rng.normal(size=shape))
    wrong = np.zeros(EXPERIMENTS, dtype=bool)
    for _ in range(5):
        _, m, v = running(rng.normal(size=shape))
        half = width(2 * n, ALPHA / 5, 400) * np.sqrt((v0 + v) / n)
        wrong |= (np.abs(m - m0) > half)[:, MIN_UNITS - 1 :].any(axis=1)
    assert wrong.mean() <= FALSE_ALARMS


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


@pytest.mark.parametrize(("power", "comparisons"), [(0.8, 1), (0.9, 1), (0.8, 3)])
def test_the_planned_number_of_units_gives_the_promised_power(power: float, comparisons: int) -> None:
    deviation, effect = 2.0, 0.45
    units = required_units(effect, deviation, alpha=ALPHA, power=power, shares=(0.5, 0.5), comparisons=comparisons)
    estimates, half = looks(
        lambda rng, shape: rng.normal(0, deviation, shape),
        effect,
        False,
        horizon=units,
        comparisons=comparisons,
        seed=5,
    )
    at_the_end = (estimates[:, -1] > half[:, -1]).mean()
    on_the_way = (estimates > half).any(axis=1).mean()
    assert at_the_end == pytest.approx(power, abs=0.03)
    assert power - 0.02 <= on_the_way <= power + 0.12


def test_plan_and_detectable_effect_agree() -> None:
    units = required_units(0.3, 1.0, alpha=ALPHA, power=0.8, shares=(0.25, 0.25), comparisons=3)
    arm = Moments(units // 4, 0.0, 1.0)
    found = detectable_effect(arm, arm, alpha=ALPHA, power=0.8, horizon=units // 2, comparisons=3)
    assert found == pytest.approx(0.3, rel=0.01)


def test_numbers_of_growthbooks_engine() -> None:
    """gbstats 0.8.0, SequentialTwoSidedTTest on SampleMeanStatistic, sequential_tuning_parameter as the horizon."""
    for n0, mean0, var0, n1, mean1, var1, horizon, low, high, p in GBSTATS:
        found = difference(Moments(n0, mean0, var0), Moments(n1, mean1, var1), ALPHA, horizon)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
        assert found.p_value == pytest.approx(p, rel=1e-9)


def test_the_p_value_and_the_interval_say_the_same() -> None:
    for shift in np.linspace(0, 1, 41):
        found = difference(Moments(100, 0.0, 1.0), Moments(100, shift, 1.0), ALPHA, HORIZON)
        assert found.low is not None and found.p_value is not None
        assert (found.p_value < ALPHA) == (found.low > 0)


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
    fair, off = sample_ratio({"a": 510, "b": 490}, shares), sample_ratio({"a": 600, "b": 400}, shares)
    assert fair is not None and fair > 0.5
    assert off is not None and off < 1e-9
    uneven = sample_ratio({"b": 102, "a": 898}, {"a": 0.9, "b": 0.1})
    assert uneven is not None and uneven > 0.5
