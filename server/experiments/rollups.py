"""Sums of the metrics that guardrails watch, kept up to date as records are written.

    response, outcome, erasure  ->  Change  ->  the unit's count and total  ->  its mean, before and after
                                            ->  the arm's units, Σ mean, Σ mean²

So a check reads a row an arm and metric, however many exposures there are. The sums are part of the transaction that
writes the records. What a value is belongs to `measures`, which computes the same moments from the records themselves.

Sums in floating point keep about 16 digits of the largest value that they ever held. Where one goes beside which what stays
is small, an outlier that is corrected or forgotten, the arm's sums are therefore added up anew from its units.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, delete, func, select

from server.experiments.measures import ArmMoments, moments_from_sums
from server.experiments.spec import Experiment
from server.experiments.statistics import Moments
from server.store.database import insert_into
from server.store.tables import arm_sums, unit_sums

EXPOSED = ""
"""In place of a metric: counts the arm's exposed units. No metric has an empty name."""
_KEYS_A_QUERY = 5_000
_DWARFS = 1e3
"""An arm's sums are added up anew when the squares that went are more than this many times those that stay. Rare: one unit
must have outweighed all others together."""


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
_Arm = tuple[int, str, str]  # experiment, metric, arm


@dataclass(slots=True)
class _Step:
    """What is added to an arm's sums, and how much of its squares goes."""

    units: int = 0
    total: float = 0.0
    squares: float = 0.0
    removed: float = 0.0

    def take(self, count: int, total: float) -> None:
        """A unit's values as they were."""
        if count:
            self.units -= 1
            self.total -= total / count
            self.squares -= (total / count) ** 2
            self.removed += (total / count) ** 2

    def give(self, count: int, total: float) -> None:
        """A unit's values as they are from now on."""
        if count:
            self.units += 1
            self.total += total / count
            self.squares += (total / count) ** 2


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
    steps: dict[_Arm, _Step] = defaultdict(_Step)
    rows = []
    for key in keys:
        experiment_id, metric, unit, arm = key
        old, new = before[key[:3]], merged[key]
        new = (old[0] + new[0], old[1] + new[1]) if old[0] + new[0] else (0, 0.0)
        rows.append({"e": experiment_id, "m": metric, "u": unit, "count": new[0], "sum": new[1]})
        step = steps[experiment_id, metric, arm]
        step.take(*old)
        step.give(*new)
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


def _add_to_arms(connection: Connection, steps: Mapping[_Arm, _Step]) -> None:
    insert = insert_into(connection, arm_sums)
    added = insert.on_conflict_do_update(
        index_elements=["experiment_id", "metric", "arm"],
        set_={name: arm_sums.c[name] + insert.excluded[name] for name in ("units", "total", "squares")},
    ).returning(*arm_sums.primary_key, arm_sums.c.squares)
    rows = connection.execute(added, [
        {"experiment_id": e, "metric": m, "arm": a, "units": step.units, "total": step.total, "squares": step.squares}
        for (e, m, a), step in sorted(steps.items())
    ]).all()  # fmt: skip
    for *key, left in rows:
        if steps[tuple(key)].removed > _DWARFS * max(left, 0.0):
            _add_up(connection, tuple(key))


def _add_up(connection: Connection, arm: _Arm) -> None:
    """An arm's sums anew, from its units. The caller has changed the arm's row: who changes units of it as well waits for
    that, and what they add comes on top."""
    value = unit_sums.c.total / unit_sums.c.n
    where = (
        unit_sums.c.experiment_id == arm[0],
        unit_sums.c.metric == arm[1],
        unit_sums.c.arm == arm[2],
        unit_sums.c.n > 0,
    )
    query = select(func.count(), func.coalesce(func.sum(value), 0.0), func.coalesce(func.sum(value * value), 0.0))
    units, total, squares = connection.execute(query.where(*where)).one()
    ours = (arm_sums.c.experiment_id == arm[0], arm_sums.c.metric == arm[1], arm_sums.c.arm == arm[2])
    connection.execute(arm_sums.update().where(*ours).values(units=units, total=total, squares=squares))


_SET_UNIT = (
    unit_sums.update()
    .where(unit_sums.c.experiment_id == bindparam("e"), unit_sums.c.metric == bindparam("m"),
           unit_sums.c.unit == bindparam("u"))
    .values(n=bindparam("count"), total=bindparam("sum"))
)  # fmt: skip
