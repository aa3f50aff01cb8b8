"""Statistics of yes/no outcomes on the same prompts: rates, paired differences, tests. Knows counts, not answers.

Of n prompts, `before` and `after` say whether a detector fired without and with steering. The table of pairs is

                 after      not after
    before       both       lost
    not before   gained     neither
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

Interval = tuple[float, float]
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class PairedTable:
    """Counts of prompts by outcome without and with steering."""

    both: int
    lost: int
    gained: int
    neither: int

    @classmethod
    def of(cls, before: Sequence[bool], after: Sequence[bool]) -> PairedTable:
        """Raises ValueError if the two differ in length."""
        pairs = list(zip(before, after, strict=True))
        return cls(*(sum(pair == cell for pair in pairs)
                     for cell in ((True, True), (True, False), (False, True), (False, False))))  # fmt: skip

    @property
    def n(self) -> int:
        return self.both + self.lost + self.gained + self.neither

    @property
    def difference(self) -> float:
        """Rate after minus rate before."""
        return (self.gained - self.lost) / self.n


def wilson_interval(count: int, n: int) -> Interval:
    """95% score interval of a proportion (Wilson 1927)."""
    low, high = proportion_confint(count, n, alpha=ALPHA, method="wilson")
    return float(low), float(high)


def paired_interval(table: PairedTable) -> Interval:
    """95% interval of the paired difference after − before: Newcombe 1998, method 10.

    Squares and adds the Wilson limits of the two rates, with a correlation φ whose numerator is lowered by n/2 when
    positive. statsmodels has it only for independent samples.
    """
    n = table.n
    after, before = table.both + table.gained, table.both + table.lost
    (low_a, high_a), (low_b, high_b) = wilson_interval(after, n), wilson_interval(before, n)
    a, b = after / n, before / n
    phi = _correlation(table)

    def radius(first: float, second: float) -> float:
        return math.sqrt(max(0.0, first * first - 2 * phi * first * second + second * second))

    return table.difference - radius(a - low_a, high_b - b), table.difference + radius(high_a - a, b - low_b)


def mcnemar_p(table: PairedTable) -> float:
    """Two-sided exact p that the rate did not change (McNemar 1947): a sign test on the prompts that changed."""
    counts = [[table.both, table.lost], [table.gained, table.neither]]
    return min(1.0, float(mcnemar(counts, exact=True).pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Family-wise adjusted p-values (Holm 1979), in the same order."""
    if not p_values:
        return []
    return [float(p) for p in multipletests(list(p_values), alpha=ALPHA, method="holm")[1]]


def _correlation(table: PairedTable) -> float:
    margins = (table.both + table.lost) * (table.gained + table.neither)
    margins *= (table.both + table.gained) * (table.lost + table.neither)
    if margins == 0:
        return 0.0
    product: float = table.both * table.neither - table.lost * table.gained
    if product > 0:
        product = max(product - table.n / 2, 0)
    return product / math.sqrt(margins)
