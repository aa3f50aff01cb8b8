"""What may be concluded, however often one looks.

Intervals are asymptotic confidence sequences of Robbins' normal mixture (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas,
"Time-uniform central limit theory and asymptotic confidence sequences", 2023, eq. 9 for the interval, eq. 155 for the
p-value, eq. 161 for rho): the truth lies in *all* intervals ever shown with probability 1 - alpha, so an experiment may
be watched and stopped at any time. They are what GrowthBook's sequential engine computes; its package does not install
beside numpy 2, hence the few lines below, which the tests compare with its numbers and hold to simulations.

Two things differ from theirs, because few skewed values that happen to lie low happen to vary little too, and would call
what is not there (`bench.always_valid` has the numbers): in a difference the variance of a smaller arm is steadied by the
larger's, and the mean of a proportion has the interval of a score, whose standard error is that of the rate in question and
not of what was seen.

Symbols: n units, mean m, variance v of one unit's value; N units of both arms; H the horizon, at which intervals are
tightest; s the standard error of an estimate; k comparisons with the control, each at level alpha / k (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import chisquare, norm

MIN_UNITS = 30
"""Units of an arm below which no interval is given: the sequences rest on a central limit theorem."""
SAMPLE_RATIO_ALARM = 0.001
"""A sample-ratio mismatch is reported below this p-value."""
_MIN_EXPECTED, _ENOUGH = 5, 1000


@dataclass(frozen=True, slots=True)
class Moments:
    """n units, the mean and the variance (n - 1) of their values."""

    n: int
    mean: float
    variance: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its always-valid interval and p-value against 0. Without an interval, too few units are there."""

    value: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None


def mean(moments: Moments, alpha: float, horizon: int, *, proportion: bool = False) -> Estimate:
    """One arm's mean."""
    if moments.n < MIN_UNITS:
        return Estimate(moments.mean)
    error = math.sqrt(_variance(moments, proportion) / moments.n)
    found = _estimate(moments.mean, error, moments.n, alpha, horizon)
    if not proportion:
        return found
    low, high = score_interval(moments.mean, moments.n, width(moments.n, alpha, horizon))
    return replace(found, low=float(low), high=float(high))


def difference(
    control: Moments, arm: Moments, alpha: float, horizon: int, *, comparisons: int = 1, proportion: bool = False
) -> Estimate:
    """Arm minus control, at level alpha / comparisons. The p-value is that of all comparisons: below alpha exactly where the
    interval leaves out 0."""
    value = arm.mean - control.mean
    if min(control.n, arm.n) < MIN_UNITS:
        return Estimate(value)
    error = _error_of_difference(control, arm, proportion)
    found = _estimate(value, error, control.n + arm.n, alpha / comparisons, horizon)
    return replace(found, p_value=min(1.0, comparisons * (found.p_value or 0.0)))


def width(n: ArrayLike, alpha: float, horizon: float) -> NDArray[np.float64]:
    """Half the interval after n units, in standard errors: sqrt(2 (n rho² + 1) / (n rho²) · ln(sqrt(n rho² + 1) / alpha))."""
    x = np.asarray(n, dtype=np.float64) * rho(alpha, horizon) ** 2  # n rho²
    return np.sqrt(2 * (x + 1) / x * np.log(np.sqrt(x + 1) / alpha))


def score_interval(p: ArrayLike, n: ArrayLike, widths: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The rates q from which a mean p of n values in [0, 1] is at most `widths` standard errors sqrt(q (1 - q) / n) away."""
    p, n, z = np.asarray(p, dtype=np.float64), np.asarray(n, dtype=np.float64), np.asarray(widths, dtype=np.float64)
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return np.maximum(middle - half, 0.0), np.minimum(middle + half, 1.0)


def rho(alpha: float, horizon: float) -> float:
    """The mixture's scale that makes the interval tightest after `horizon` units (eq. 161)."""
    a = -2 * math.log(alpha)
    return math.sqrt((a + math.log(a + 1)) / horizon)


def required_units(
    effect: float, deviation: float, *, alpha: float, power: float, shares: tuple[float, float], comparisons: int = 1
) -> int:
    """Units of all arms that show a difference of `effect` with probability `power` at the latest when all are in.

    `deviation` is the standard deviation of one unit's value (sqrt(p (1 - p)) for a proportion p), `shares` those of the
    control and the arm among all units. The horizon must be the two arms' part of the result: looking on the way
    finds the effect earlier, at no cost. effect = (width + z) s, and width is constant where the horizon is n.
    """
    level = alpha / comparisons
    spread = deviation * math.sqrt(sum(1 / share for share in shares))  # s · sqrt(units)
    reach = float(width(1.0, level, 1.0)) + norm.ppf(power)
    return math.ceil((reach * spread / abs(effect)) ** 2)


def detectable_effect(
    control: Moments,
    arm: Moments,
    *,
    alpha: float,
    power: float,
    horizon: int,
    comparisons: int = 1,
    proportion: bool = False,
) -> float | None:
    """The smallest difference that units as many and as varied as these show with probability `power`."""
    if min(control.n, arm.n) < MIN_UNITS:
        return None
    error = _error_of_difference(control, arm, proportion)
    return float(width(control.n + arm.n, alpha / comparisons, horizon) + norm.ppf(power)) * error


def sample_ratio(counts: Mapping[str, int], shares: Mapping[str, float]) -> float | None:
    """p-value of a chi-squared test that units fell to the arms as their shares say; an arm may have none.

    None before the smallest arm expects `_MIN_EXPECTED` units, below which the test raises false alarms, or all arms
    together have `_ENOUGH`: where an arm is that small, one that gets far more than its share must still be seen. None
    as well where all units must fall to one arm.
    """
    total = sum(counts.values())
    possible = {arm: share for arm, share in shares.items() if share}
    if any(counts[arm] for arm in counts.keys() - possible.keys()):
        return 0.0
    if len(possible) < 2 or (total < _ENOUGH and total * min(possible.values()) < _MIN_EXPECTED):
        return None
    return float(chisquare([counts[arm] for arm in possible], [total * share for share in possible.values()]).pvalue)


def _estimate(value: float, error: float, n: int, alpha: float, horizon: int) -> Estimate:
    half = float(width(n, alpha, horizon)) * error
    return Estimate(value, value - half, value + half, _p_value(value, error, n, alpha, horizon))


def _p_value(value: float, error: float, n: int, alpha: float, horizon: int) -> float:
    """Below alpha exactly where the interval leaves out 0. 1 / e, where e is the mixture's e-value (eq. 155)."""
    if error == 0:
        return 0.0 if value else 1.0
    x = n * rho(alpha, horizon) ** 2
    log_e = (value / error) ** 2 * x / (2 * (x + 1)) - 0.5 * math.log(x + 1)
    return math.exp(min(0.0, -log_e))


def steadied(n: ArrayLike, variance: ArrayLike, other_n: ArrayLike, other_variance: ArrayLike) -> NDArray[np.float64]:
    """An arm's variance as it counts in a difference: the smaller the arm is beside the other, the nearer to the other's
    where that is larger. Of equal arms, or beside a smaller one, it is the arm's own."""
    own = np.asarray(variance, dtype=np.float64)
    lacking = np.maximum(0.0, 1 - np.asarray(n, dtype=np.float64) / np.asarray(other_n, dtype=np.float64))
    return own + lacking * np.maximum(0.0, np.asarray(other_variance, dtype=np.float64) - own)


def _error_of_difference(control: Moments, arm: Moments, proportion: bool) -> float:
    """s."""
    of_control, of_arm = _variance(control, proportion), _variance(arm, proportion)
    return math.sqrt(
        steadied(control.n, of_control, arm.n, of_arm) / control.n
        + steadied(arm.n, of_arm, control.n, of_control) / arm.n
    )


def _variance(moments: Moments, proportion: bool) -> float:
    """Of a proportion at least what one success in n + 2 has: none seen yet does not mean that there are none."""
    if not proportion:
        return moments.variance
    return max(moments.variance, (moments.n + 1) / (moments.n + 2) ** 2)
