"""Whether an experiment's intervals keep their promises: simulated experiments that are looked at after every unit.

    python -m bench.always_valid [--experiments 2000] [--horizon 2000] [--only WORD]

One experiment: `--horizon` units arrive one by one, fall to arms by the hash that servers use, and bring a value each.
After every unit every arm that has 30 is compared with the control, by the shipped formula at the shipped level and
horizon, and every arm's mean gets its interval. In A/A tests no arm differs; `called` are the experiments in which some
look said otherwise, which is promised for alpha of them at most. `missed` are those in which some interval did not hold
the truth: of all differences at all looks (alpha), of one difference at the last look, of one arm's mean at all looks
(alpha), and of those the ones in which it lay above the truth, which is what breaks a guardrail; for all but the first the
worst arm is shown. A/B tests have as many units as `atomsteer experiment plan` says.
The sample ratio, which is no sequential test, is called if its p-value was below 0.001 after some unit.

`tests/server/experiments/test_statistics.py` holds some rows to bounds, and this formula to the one that reports use.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from clients.experiment_spec import Plan
from server.experiments.assignment import ranges
from server.experiments.statistics import MIN_UNITS, SAMPLE_RATIO_ALARM, score_interval, steadied, width

ALPHA = 0.05
_AT_ONCE = 250
"""Experiments simulated in one array: (experiments, units, arms) doubles."""

Floats = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int]], Floats]


def rate(p: float) -> Draw:
    return lambda rng, shape: (rng.random(shape) < p).astype(np.float64)


def revenue(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Of 10% of units, log-normal; nothing of the others."""
    return np.where(rng.random(shape) < 0.1, rng.lognormal(0.0, 1.0, shape), 0.0)


@dataclass(frozen=True)
class Values:
    """What units bring: draws, their true mean, and whether the metric is a proportion."""

    draw: Draw
    mean: float
    proportion: bool = False


VALUES = {
    "normal": Values(lambda rng, shape: rng.normal(3.0, 2.0, shape), 3.0),
    "skewed (log-normal)": Values(lambda rng, shape: rng.lognormal(0.0, 1.0, shape), math.exp(0.5)),
    "revenue (90% zero)": Values(revenue, 0.1 * math.exp(0.5)),
    "rate 50%": Values(rate(0.5), 0.5, proportion=True),
    "rate 10%": Values(rate(0.1), 0.1, proportion=True),
    "rate 2%": Values(rate(0.02), 0.02, proportion=True),
}
SHARES = {
    "2 arms": (0.5, 0.5),
    "3 arms": (1 / 3, 1 / 3, 1 / 3),
    "6 arms": (1 / 6,) * 6,
    "10% control": (0.1, 0.45, 0.45),
    "10% treated": (0.9, 0.1),
}


def hashed(seeds: range, units: int) -> NDArray[np.int64]:
    """Places in [0, 10,000) of ``u0``, ``u1``, … under experiments called ``e{seed}``, (seeds, units):
    `assignment.place` for arrays."""

    def fnv(value: NDArray[np.uint32], text: NDArray[np.bytes_]) -> NDArray[np.uint32]:
        for byte in text.view(np.uint8).reshape(*text.shape, text.dtype.itemsize).transpose(-1, *range(text.ndim)):
            value = np.where(byte == 0, value, (value ^ byte) * np.uint32(0x01000193))  # short texts end in zero bytes
        return value

    start = np.full((len(seeds), 1), 0x811C9DC5, dtype=np.uint32)
    by_seed = fnv(start, np.array([[f"e{seed}"] for seed in seeds], dtype=np.bytes_))
    first = fnv(np.repeat(by_seed, units, axis=1), np.array([f"u{n}" for n in range(units)], dtype=np.bytes_)[None])
    return (fnv(np.full(first.shape, 0x811C9DC5, dtype=np.uint32), first.astype(np.bytes_)) % 10_000).astype(np.int64)


@dataclass(frozen=True)
class Looks:
    """After every unit, (experiments, units, arms): how many units an arm has, the mean and the variance of their values."""

    n: Floats
    mean: Floats
    variance: Floats
    proportion: bool

    @classmethod
    def of(cls, values: Floats, arms: NDArray[np.int64], count: int, proportion: bool) -> Looks:
        """From the value and the arm of every unit, both (experiments, units)."""
        ours = arms[..., None] == np.arange(count)
        n = np.cumsum(ours, axis=1, dtype=np.float64)
        total, squares = (np.cumsum(ours * power[..., None], axis=1) for power in (values, values**2))
        mean = total / np.maximum(n, 1)
        variance = np.maximum((squares - n * mean**2) / np.maximum(n - 1, 1), 0.0)
        return cls(n, mean, variance, proportion)

    def differences(self, horizon: int, shares: tuple[float, ...]) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """Estimates, half widths and which of them are shown, (experiments, units, arms but the control)."""
        n = np.maximum(self.n, 1)
        variance = np.maximum(self.variance, (n + 1) / (n + 2) ** 2) if self.proportion else self.variance
        (nc, na), (vc, va) = ((x[..., :1], x[..., 1:]) for x in (n, variance))
        control, treated = steadied(nc, vc, na, va) / nc, steadied(na, va, nc, vc) / na
        parts = [round(horizon * (shares[0] + share)) for share in shares[1:]]
        level = ALPHA / len(parts)
        widths = np.stack([width((nc + na)[..., k], level, part) for k, part in enumerate(parts)], axis=-1)
        shown = (self.n[..., :1] >= MIN_UNITS) & (self.n[..., 1:] >= MIN_UNITS)
        return self.mean[..., 1:] - self.mean[..., :1], widths * np.sqrt(control + treated), shown

    def means(self, horizon: int, shares: tuple[float, ...]) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """Lower ends, upper ends and which of them are shown, (experiments, units, arms)."""
        n = np.maximum(self.n, 1)
        widths = np.stack([width(n[..., k], ALPHA, round(horizon * share)) for k, share in enumerate(shares)], axis=-1)
        if self.proportion:
            low, high = score_interval(self.mean, n, widths)
        else:
            half = widths * np.sqrt(self.variance / n)
            low, high = self.mean - half, self.mean + half
        return low, high, self.n >= MIN_UNITS

    def ratio_alarms(self, shares: tuple[float, ...]) -> NDArray[np.bool_]:
        """Whether units fall to the arms as if by other shares, (experiments, units)."""
        expected = self.n.sum(axis=-1, keepdims=True) * np.array(shares)
        statistic = ((self.n - expected) ** 2 / expected).sum(axis=-1)
        return np.asarray((expected.min(axis=-1) >= 5) & (statistic > chi2.isf(SAMPLE_RATIO_ALARM, len(shares) - 1)))


@dataclass(frozen=True)
class Simulation:
    """`experiments` experiments of `units` units, the horizon, over arms with `shares`, the control first. In every other
    arm values have `effect` more in the mean. `seed` is of the values; units fall to arms by their names."""

    values: Values
    shares: tuple[float, ...]
    experiments: int
    units: int
    effect: float = 0.0
    seed: int = 0

    def run(self) -> dict[str, Floats]:
        """The share of experiments, of every arm where there are several entries:

        called        some difference was called at some look
        missed        some difference's interval at some look did not hold the truth
        means missed  the same of the arm's mean, (arms); `means called high`: whose interval lay above the truth, which is
                      what breaks a guardrail
        end missed    the difference's interval at the last look did not hold the truth, (arms but the control)
        found         the difference was called at the last look, (arms but the control)
        found early   the same at any look
        ratio alarm   the sample ratio was called at some look
        """
        blocks = [self._block(range(start, min(start + _AT_ONCE, self.experiments)))
                  for start in range(0, self.experiments, _AT_ONCE)]  # fmt: skip
        return {name: np.concatenate([block[name] for block in blocks]).mean(axis=0) for name in blocks[0]}

    def _block(self, seeds: range) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, seeds.start))
        starts = np.array([start for start, _ in ranges(self.shares, 1.0)])
        arms = np.searchsorted(starts, hashed(seeds, self.units) / 10_000, side="right") - 1
        looks = Looks.of(self._draw(rng, arms), arms, len(self.shares), self.values.proportion)
        estimate, half, shown = looks.differences(self.units, self.shares)
        called, missed = (shown & (np.abs(estimate - truth) > half) for truth in (0.0, self.effect))
        low, high, shown = looks.means(self.units, self.shares)
        truth = self.values.mean + self.effect * (np.arange(len(self.shares)) > 0)
        return {
            "called": called.any(axis=(1, 2)), "missed": missed.any(axis=(1, 2)),
            "means missed": (shown & ((low > truth) | (high < truth))).any(axis=1),
            "means called high": (shown & (low > truth)).any(axis=1), "end missed": missed[:, -1],
            "found": called[:, -1], "found early": called.any(axis=1),
            "ratio alarm": looks.ratio_alarms(self.shares).any(axis=1),
        }  # fmt: skip

    def _draw(self, rng: np.random.Generator, arms: NDArray[np.int64]) -> Floats:
        shape = (arms.shape[0], arms.shape[1])
        if self.values.proportion:
            return (rng.random(shape) < self.values.mean + self.effect * (arms > 0)).astype(np.float64)
        return self.values.draw(rng, shape) + self.effect * (arms > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=2000)
    parser.add_argument("--horizon", type=int, default=2000)
    parser.add_argument("--only", default="", help="rows whose names hold this")
    args = parser.parse_args()
    print(f"{args.experiments} experiments of {args.horizon} units each, a look after every unit, alpha {ALPHA}")
    headings = ("called", "missed", "at last", "means", "too high", "ratio")
    print(f"{'A/A':<33}" + "".join(f"{heading:>10}" for heading in headings))
    for (name, values), (how, shares) in itertools.product(VALUES.items(), SHARES.items()):
        if args.only in (label := f"{name}, {how}"):
            found = Simulation(values, shares, args.experiments, args.horizon).run()
            shown = ("called", "missed", "end missed", "means missed", "means called high", "ratio alarm")
            print(f"{label:<33}" + "".join(f"{100 * found[column].max():9.2f}%" for column in shown), flush=True)
    print(f"{'A/B, planned for power 0.8':<33}  units   found at the end, at any look   missed at any look")
    for label, plan, values, effect in planned():
        if args.only in label:
            units = plan.units(effect)
            found = Simulation(values, plan.shares, args.experiments, units, effect, seed=1).run()
            row = " ".join(f"{100 * found[name].mean():14.1f}%" for name in ("found", "found early", "missed"))
            print(f"{label:<33} {units:6} {row}", flush=True)


def planned() -> Iterator[tuple[str, Plan, Values, float]]:
    """Experiments with an effect: a name, the plan, the values without the effect, the effect."""
    for how, shares in SHARES.items():
        if how in ("2 arms", "3 arms", "10% control"):
            for p, effect in ((0.1, 0.05), (0.1, 0.3), (0.5, 0.1)):
                yield (
                    f"rate {p:.0%} + {effect:.0%}, {how}",
                    Plan(shares, 0.8, ALPHA, rate=p),
                    VALUES[f"rate {p:.0%}"],
                    effect,
                )
            yield f"normal + 0.2 sd, {how}", Plan(shares, 0.8, ALPHA, deviation=2.0), VALUES["normal"], 0.4


if __name__ == "__main__":
    main()
