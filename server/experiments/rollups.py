"""Sums of the metrics that guardrails watch, kept up to date as records are written.

    response, outcome, erasure  ->  Change  ->  the unit's count and total  ->  its mean, before and after
                                            ->  the arm's units, Σ mean, Σ mean²

So a check reads a row an arm and metric, however many exposures there are. The sums are part of the transaction that
writes the records. What a value is belongs to `measures`, which computes the same moments from the records themselves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, delete, select

from server.experiments.measures import ArmMoments, moments_from_sums
from server.experiments.spec import Experiment
from server.experiments.statistics import Moments
from server.store.database import insert_into
from server.store.tables import arm_sums, unit_sums

EXPOSED = ""
"""In place of a metric: counts the arm's exposed units. No metric has an empty name."""
_KEYS_A_QUERY = 5_000


@dataclass(frozen=True, slots=True)
class Change:
    """`count` values of a unit that add up to `total` came; both are negative for values that went."""

    experiment_id: int
    metric: str
    unit: str
    arm: str
    count: int
    total: float


_Key = tuple[int, str, str, str]  # experiment, metric, unit, arm


def add(connection: Connection, changes: Iterable[Change]) -> None:
    """Adds changes to the sums. Two transactions that change the same units wait for each other, in one order."""
    merged: dict[_Key, tuple[int, float]] = {}
    for change in changes:
        key = (change.experiment_id, change.metric, change.unit, change.arm)
        count, total = merged.get(key, (0, 0.0))
        merged[key] = count + change.count, total + change.total
    keys = sorted(merged)
    if not keys:
        return
    before = _locked(connection, keys)
    steps: dict[tuple[int, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    rows = []
    for key in keys:
        experiment_id, metric, unit, arm = key
        old, new = before[key[:3]], merged[key]
        new = (old[0] + new[0], old[1] + new[1]) if old[0] + new[0] else (0, 0.0)
        rows.append({"e": experiment_id, "m": metric, "u": unit, "count": new[0], "sum": new[1]})
        step = steps[experiment_id, metric, arm]
        for sign, (count, total) in ((-1, old), (1, new)):
            if count:
                step[0] += sign
                step[1] += sign * total / count
                step[2] += sign * (total / count) ** 2
    connection.execute(_SET_UNIT, rows)
    _add_to_arms(connection, steps)


def forget(connection: Connection, unit: str, experiment_ids: Iterable[int]) -> None:
    """Takes a unit out of the sums."""
    ours = unit_sums.c.experiment_id.in_(list(experiment_ids)) & (unit_sums.c.unit == unit)
    found = connection.execute(select(unit_sums).where(ours).with_for_update()).all()
    add(connection, [Change(row.experiment_id, row.metric, unit, row.arm, -row.n, -row.total) for row in found])
    connection.execute(delete(unit_sums).where(ours))


def moments(connection: Connection, experiment: Experiment, metrics: Iterable[str]) -> dict[str, ArmMoments]:
    """Metric -> arm -> moments over units, of metrics that a guardrail of the experiment watches."""
    sums: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in connection.execute(select(arm_sums).where(arm_sums.c.experiment_id == experiment.id)):
        sums[row.metric][row.arm] = row
    exposed = {arm: row.units for arm, row in sums[EXPOSED].items()}
    return {metric: _of_arms(experiment, metric, sums[metric], exposed) for metric in metrics}


def _of_arms(experiment: Experiment, metric: str, sums: Mapping[str, Any], exposed: Mapping[str, int]) -> ArmMoments:
    silent = exposed if experiment.counts_silence(metric) else {}
    found: dict[str, Moments] = {}
    for arm in sums.keys() | silent.keys():
        row = sums.get(arm)
        n, total, squares = (row.units, row.total, row.squares) if row is not None else (0, 0.0, 0.0)
        if n := max(n, silent.get(arm, 0)):
            found[arm] = moments_from_sums(n, total, squares)
    return found


def _locked(connection: Connection, keys: list[_Key]) -> dict[tuple[int, str, str], tuple[int, float]]:
    """Count and total of each key's unit as they are, and not to be changed by others before this transaction ends."""
    insert = insert_into(connection, unit_sums).on_conflict_do_nothing()
    found: dict[tuple[int, str, str], tuple[int, float]] = {}
    while missing := [key for key in keys if key[:3] not in found]:  # again if a unit was forgotten in between
        connection.execute(insert, [
            {"experiment_id": e, "metric": m, "unit": u, "arm": a, "n": 0, "total": 0.0} for e, m, u, a in missing
        ])  # fmt: skip
        units: dict[tuple[int, str], list[str]] = defaultdict(list)
        for experiment_id, metric, unit, _ in missing:
            units[experiment_id, metric].append(unit)
        for (experiment_id, metric), names in units.items():
            for start in range(0, len(names), _KEYS_A_QUERY):
                some = unit_sums.c.unit.in_(names[start : start + _KEYS_A_QUERY])
                query = select(unit_sums.c.unit, unit_sums.c.n, unit_sums.c.total).where(
                    unit_sums.c.experiment_id == experiment_id, unit_sums.c.metric == metric, some
                )
                for unit, count, total in connection.execute(query.order_by(unit_sums.c.unit).with_for_update()):
                    found[experiment_id, metric, unit] = count, total
    return found


def _add_to_arms(connection: Connection, steps: Mapping[tuple[int, str, str], list[float]]) -> None:
    insert = insert_into(connection, arm_sums)
    added = insert.on_conflict_do_update(
        index_elements=["experiment_id", "metric", "arm"],
        set_={name: arm_sums.c[name] + insert.excluded[name] for name in ("units", "total", "squares")},
    )
    connection.execute(added, [
        {"experiment_id": e, "metric": m, "arm": a, "units": int(units), "total": total, "squares": squares}
        for (e, m, a), (units, total, squares) in sorted(steps.items())
    ])  # fmt: skip


_SET_UNIT = (
    unit_sums.update()
    .where(unit_sums.c.experiment_id == bindparam("e"), unit_sums.c.metric == bindparam("m"),
           unit_sums.c.unit == bindparam("u"))
    .values(n=bindparam("count"), total=bindparam("sum"))
)  # fmt: skip
