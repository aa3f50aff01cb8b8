"""What is measured of every response without a client's doing, and the moments of any metric over units.

A metric's value for a unit is its mean over the unit's responses: units are what was randomised, and the responses of
one unit are not independent. The database adds up; only one row an arm comes back, however many responses there were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sqlalchemy import ColumnElement, Connection, Float, case, cast, func, literal_column, null, select

from atoms.detectors import DETECTORS
from atoms.non_answers import is_degenerate, is_refusal
from server.errors import ClientDisconnectedError, error_kind
from server.experiments.spec import AUTOMATIC, DETECTOR_PREFIX, MEASURED_KL, Experiment
from server.experiments.statistics import Moments
from server.store.tables import exposures, outcomes, responses

ArmMoments = dict[str, Moments]
"""Arm -> moments; arms without any unit are missing."""

HUNG_UP = error_kind(ClientDisconnectedError("")).status
"""The status of a response whose client left before its end."""
_ANSWERED = responses.c.status == 200
_MARKS = {"degenerate": is_degenerate, "refusal": is_refusal}


def marks(response: str, prompt: str) -> str:
    """The names of the detectors that hold for a response, as ``,a,b,``; a detector ``json`` is ``detector:json``."""
    found = [name for name, holds in _MARKS.items() if holds(response)]
    found += [f"{DETECTOR_PREFIX}{name}" for name, detector in DETECTORS.items() if detector.detect(response, prompt)]
    return f",{','.join(found)}," if found else ""


def _share(condition: ColumnElement[bool]) -> ColumnElement[float]:
    """1 or 0 for an answered response, null for one that failed or whose client hung up."""
    return case((_ANSWERED, case((condition, 1.0), else_=0.0)), else_=null())


def _answered(column: ColumnElement[Any]) -> ColumnElement[float]:
    return case((_ANSWERED, cast(column, Float(53))), else_=null())


def _expressions() -> dict[str, ColumnElement[float]]:
    measured = {
        "error": case((responses.c.status >= 500, 1.0), else_=0.0),
        "hung_up": case((responses.c.status == HUNG_UP, 1.0), else_=0.0),
        "latency_seconds": _answered(responses.c.seconds),
        "first_token_seconds": _answered(responses.c.first_token_seconds),
        "tokens": _answered(responses.c.tokens),
        "characters": _answered(responses.c.characters),
        "truncated": _share(responses.c.finish_reason == "length"),
    }
    names = [*_MARKS, *(f"{DETECTOR_PREFIX}{name}" for name in DETECTORS)]
    return measured | {name: _share(responses.c.marks.contains(f",{name},", autoescape=True)) for name in names}


EXPRESSIONS: Mapping[str, ColumnElement[float]] = MappingProxyType(_expressions())
"""Automatic metric -> its value for one response. ``error`` is the share of responses that failed with a 5xx, ``hung_up``
of those whose client left before the end; all others are of answered responses alone. The one that is missing,
``measured_kl``, is stored as outcomes are, when it has been measured."""

PROPORTIONS = frozenset(AUTOMATIC) - {"latency_seconds", "first_token_seconds", "tokens", "characters", MEASURED_KL}


def exposed(connection: Connection, experiment: Experiment, until: float | None = None) -> dict[str, int]:
    """Arm -> units that were exposed, up to the time `until`; arms without any count 0."""
    query = select(exposures.c.arm, func.count()).where(exposures.c.experiment_id == experiment.id)
    if until is not None:
        query = query.where(exposures.c.at <= until)
    found = {row.arm: row[1] for row in connection.execute(query.group_by(exposures.c.arm))}
    return {arm.name: found.get(arm.name, 0) for arm in experiment.arms}


def metric_moments(
    connection: Connection, experiment: Experiment, names: Iterable[str], until: float | None = None
) -> dict[str, ArmMoments]:
    """Metric -> arm -> moments, from the records of all units up to the time `until`."""
    names = list(names)
    found = automatic_moments(connection, experiment, [name for name in names if name in EXPRESSIONS], until)
    if len(found) < len(names):
        found |= outcome_moments(connection, experiment, until)
    return {name: found[name] for name in names}


def response_values(
    connection: Connection, experiment_id: int, names: Sequence[str], response_ids: Sequence[str]
) -> Iterator[tuple[tuple[Any, ...], str, str, dict[str, float]]]:
    """Primary key, unit, arm and the values of the automatic metrics `names`, for each choice of some responses."""
    query = select(*responses.primary_key, responses.c.unit, responses.c.arm, *(EXPRESSIONS[name] for name in names))
    wanted = responses.c.response_id.in_(response_ids)
    for row in connection.execute(query.where(responses.c.experiment_id == experiment_id, wanted)):
        values = zip(names, row[5:], strict=True)
        yield tuple(row[:3]), row.unit, row.arm, {name: float(value) for name, value in values if value is not None}


def automatic_moments(
    connection: Connection, experiment: Experiment, names: list[str], until: float | None = None
) -> dict[str, ArmMoments]:
    """Metric -> arm -> moments of metrics that the rows of responses hold, in one scan."""
    if not names:
        return {}
    units = select(
        responses.c.arm, *(func.avg(EXPRESSIONS[name]).label(f"m{place}") for place, name in enumerate(names))
    ).where(responses.c.experiment_id == experiment.id)
    if until is not None:
        units = units.where(responses.c.at <= until)
    by_unit = units.group_by(responses.c.unit, responses.c.arm).subquery()
    sums: list[ColumnElement[Any]] = []
    for place in range(len(names)):
        sums += _sums(by_unit.c[f"m{place}"])
    rows = connection.execute(select(by_unit.c.arm, *sums).group_by(by_unit.c.arm)).all()
    moments: dict[str, ArmMoments] = {}
    for place, name in enumerate(names):
        found = {row[0]: moments_from_sums(*row[1 + 3 * place : 4 + 3 * place]) for row in rows}
        moments[name] = {arm: value for arm, value in found.items() if value.n}
    return moments


def outcome_moments(
    connection: Connection, experiment: Experiment, until: float | None = None
) -> dict[str, ArmMoments]:
    """Metric -> arm -> moments of the metrics that clients report, and of the measured KL."""
    units = select(outcomes.c.metric, outcomes.c.arm, func.avg(outcomes.c.value).label("value")).where(
        outcomes.c.experiment_id == experiment.id
    )
    if until is not None:
        units = units.where(outcomes.c.at <= until)
    by_unit = units.group_by(outcomes.c.unit, outcomes.c.metric, outcomes.c.arm).subquery()
    query = select(by_unit.c.metric, by_unit.c.arm, *_sums(by_unit.c.value)).group_by(by_unit.c.metric, by_unit.c.arm)
    names = [MEASURED_KL, *(metric.name for metric in experiment.spec.metrics)]
    moments: dict[str, ArmMoments] = {name: {} for name in names}
    counts = exposed(connection, experiment, until)
    for metric, arm, n, total, squares in connection.execute(query):
        zeros = counts[arm] if experiment.counts_silence(metric) else n
        moments[metric][arm] = moments_from_sums(max(n, zeros), total, squares)
    for metric in experiment.spec.metrics:
        if metric.missing == "zero":
            silent = {arm: Moments(n, 0.0, 0.0) for arm, n in counts.items() if n and arm not in moments[metric.name]}
            moments[metric.name] |= silent
    return moments


def _sums(value: ColumnElement[Any]) -> list[ColumnElement[Any]]:
    return [func.count(value), func.coalesce(func.sum(value), literal_column("0.0")),
            func.coalesce(func.sum(value * value), literal_column("0.0"))]  # fmt: skip


def moments_from_sums(n: int, total: float, squares: float) -> Moments:
    """Moments of n values from their sum and sum of squares."""
    if not n:
        return Moments(0, 0.0, 0.0)
    mean = float(total) / n
    variance = max(0.0, (float(squares) - n * mean * mean) / (n - 1)) if n > 1 else 0.0
    return Moments(n, mean, variance)
