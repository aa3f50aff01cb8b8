"""Every statistic against another implementation, published values, or its definition."""

from __future__ import annotations

import itertools
import math

import pytest
from scipy.stats import binomtest, multinomial

from offline.evaluation.statistics import PairedTable, holm, mcnemar_p, paired_interval, wilson_interval


@pytest.mark.parametrize(("count", "n"), [(0, 10), (1, 10), (37, 104), (104, 104), (0, 1)])
def test_the_rate_interval_is_wilsons(count: int, n: int) -> None:
    reference = binomtest(count, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(count, n) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_the_table_counts_pairs() -> None:
    before = [True, True, False, False, False, True]
    after = [True, False, True, True, False, True]
    table = PairedTable.of(before, after)
    assert (table.both, table.lost, table.gained, table.neither, table.n) == (2, 1, 2, 1, 6)
    assert table.difference == pytest.approx(sum(after) / 6 - sum(before) / 6)
    with pytest.raises(ValueError):
        PairedTable.of(before, after[:-1])


@pytest.mark.parametrize(
    ("both", "other_only", "this_only", "neither", "low", "high"),
    [
        (14, 0, 5, 22, 0.011, 0.226),  # Altman et al., Statistics with Confidence (2000), table 6.2
        (1, 7, 1, 12, -0.507, -0.026),  # Bentur et al. 2009, in Fagerland et al. 2014
    ],
)
def test_the_paired_interval_has_the_published_values(
    both: int, other_only: int, this_only: int, neither: int, low: float, high: float
) -> None:
    table = PairedTable(both=both, lost=other_only, gained=this_only, neither=neither)
    assert paired_interval(table) == pytest.approx((low, high), abs=6e-4)


def test_the_paired_interval_of_swapped_conditions_is_mirrored() -> None:
    table = PairedTable(both=11, lost=2, gained=23, neither=40)
    low, high = paired_interval(table)
    mirrored = paired_interval(PairedTable(both=11, lost=23, gained=2, neither=40))
    assert mirrored == pytest.approx((-high, -low))
    assert low < table.difference < high


@pytest.mark.parametrize("cell", range(4))
def test_the_paired_interval_exists_at_the_corners(cell: int) -> None:
    """All prompts in one cell: a Wald interval would have no width there."""
    table = PairedTable(*(30 if place == cell else 0 for place in range(4)))
    low, high = paired_interval(table)
    assert -1 - 1e-9 <= low <= table.difference <= high <= 1 + 1e-9 and high - low > 0.05


@pytest.mark.parametrize("cells", [(0.1, 0.1, 0.4, 0.4), (0.4, 0.05, 0.15, 0.4), (0.02, 0.02, 0.06, 0.9)])
def test_the_paired_interval_covers_the_truth_nineteen_times_in_twenty(cells: tuple[float, ...]) -> None:
    """Exact coverage for n = 14: the probability of all tables whose interval holds the true difference."""
    n, truth = 14, cells[2] - cells[1]
    covered = 0.0
    for both, lost, gained in itertools.product(range(n + 1), repeat=3):
        if both + lost + gained <= n:
            table = PairedTable(both, lost, gained, n - both - lost - gained)
            low, high = paired_interval(table)
            if low <= truth <= high:
                counts = [table.both, table.lost, table.gained, table.neither]
                covered += float(multinomial.pmf(counts, n, cells))
    assert 0.92 < covered < 0.9999  # rare outcomes make it conservative


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 9), (3, 3), (4, 15), (60, 1)])
def test_mcnemar_is_the_sign_test_on_changes(lost: int, gained: int) -> None:
    expected = 1.0 if lost + gained == 0 else binomtest(lost, lost + gained).pvalue
    assert mcnemar_p(PairedTable(7, lost, gained, 11)) == pytest.approx(expected)


def test_holm_steps_down() -> None:
    p_values = [0.01, 0.04, 0.03, 0.005, 0.5]
    order = sorted(range(5), key=lambda i: p_values[i])
    expected, worst = [0.0] * 5, 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (5 - rank) * p_values[i]))
        expected[i] = worst
    assert holm(p_values) == pytest.approx(expected)
    assert holm([]) == []
    assert math.isclose(holm([0.2])[0], 0.2)
