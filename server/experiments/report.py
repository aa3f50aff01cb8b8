"""The state of an experiment in numbers: units, metrics with intervals, guardrails, alarms. Plain data, ready for JSON.

Intervals may be looked at at any time (see `statistics`). The arms' comparisons of one metric share its alpha; metrics
are not corrected for each other, which is why one of them is primary and decides.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, func, select

from server.experiments import rollups
from server.experiments.assignment import shares_of_places
from server.experiments.measures import PROPORTIONS, ArmMoments, exposed, metric_moments
from server.experiments.spec import AUTOMATIC, MEASURED_KL, Experiment, GuardrailSpec
from server.experiments.statistics import (
    MIN_UNITS,
    SAMPLE_RATIO_ALARM,
    Estimate,
    Moments,
    detectable_effect,
    difference,
    mean,
    sample_ratio,
)
from server.limits import DriftBudget
from server.store.tables import events, losses

POWER = 0.8
"""Of the detectable effects that a report states."""
_NONE = Moments(0, 0.0, 0.0)
_MEASURED_PART = DriftBudget().share


def report(connection: Connection, experiment: Experiment, *, looks: int = 0) -> dict[str, Any]:
    """All that is known now. `looks` > 0 adds the primary metric's differences at that many times since the start."""
    units = exposed(connection, experiment)
    own = [metric.name for metric in experiment.spec.metrics]
    moments = metric_moments(connection, experiment, [*own, *AUTOMATIC])
    p_value = sample_ratio(units, _expected_shares(connection, experiment, sum(units.values())))
    result = {
        "object": "experiment.report",
        "experiment": experiment_json(experiment),
        "at": time.time(),
        "units": units,
        "sample_ratio": {"p_value": p_value, "alarm": p_value is not None and p_value < SAMPLE_RATIO_ALARM},
        "lost_records": connection.scalar(
            select(func.coalesce(func.sum(losses.c.count), 0)).where(losses.c.experiment_id == experiment.id)
        ),
        "metrics": [_metric(experiment, name, moments[name]) for name in _ordered(experiment, moments)],
        "guardrails": [asdict(check) for check in check_guardrails(connection, experiment)],
    }
    return result | ({"looks": _looks(connection, experiment, looks)} if looks else {})


def _expected_shares(connection: Connection, experiment: Experiment, units: int) -> dict[str, float]:
    """Arm -> the share that it should have of the `units` that were exposed so far: of those that came while a coverage held,
    by the places that the arm had then."""
    query = select(events.c.at, events.c.detail).where(
        events.c.experiment_id == experiment.id, events.c.kind == "ramped"
    )
    coverage, before = experiment.spec.coverage, 0
    expected = [0.0] * len(experiment.arms)
    for ramp in [*connection.execute(query.order_by(events.c.id)), None]:
        until = sum(exposed(connection, experiment, ramp.at).values()) if ramp else units
        for place, share in enumerate(shares_of_places(experiment.ranges_at(coverage))):
            expected[place] += share * (until - before)
        if ramp:
            coverage, before = json.loads(ramp.detail)["coverage"], until
    total = sum(expected) or 1.0
    return {arm.name: count / total for arm, count in zip(experiment.arms, expected)}


def experiment_json(experiment: Experiment) -> dict[str, Any]:
    """An experiment as it is sent."""
    spec = experiment.spec.model_dump(mode="json", exclude={"arms", "coverage"})
    ranges = {arm.name: list(range_) for arm, range_ in zip(experiment.arms, experiment.ranges)}
    return {
        "object": "experiment",
        **spec,
        "status": experiment.status,
        "coverage": experiment.coverage,
        "package_version": experiment.package_version,
        "created_at": experiment.created_at,
        "started_at": experiment.started_at,
        "stopped_at": experiment.stopped_at,
        "stop_reason": experiment.stop_reason,
        "arms": [arm.to_json() | {"range": ranges[arm.name]} for arm in experiment.arms],
    }


@dataclass(frozen=True, slots=True)
class GuardrailCheck:
    """One guardrail on one arm: the mean of `metric`, or its difference to the control, against its limit."""

    metric: str
    arm: str
    limit: float
    relative_to_control: bool
    value: float | None
    low: float | None
    broken: bool

    def __str__(self) -> str:
        what = f"{self.metric} of arm {self.arm!r} is {self.value:.4g}" + (
            " more than the control's" if self.relative_to_control else "")  # fmt: skip
        return f"{what} (surely above {self.low:.4g}); the guardrail is {self.limit:g}"


def check_guardrails(connection: Connection, experiment: Experiment) -> list[GuardrailCheck]:
    """Every guardrail on every arm but the control. All together raise a false alarm with probability alpha at most.

    Of a metric whose kept sums say that a guardrail is broken, the records have the last word: nothing is stopped for an
    error of sums.
    """
    rails = experiment.spec.guardrails
    if not rails:
        return []
    moments = rollups.moments(connection, experiment, {rail.metric for rail in rails})
    checks = _checks(experiment, moments)
    if suspected := {check.metric for check in checks if check.broken}:
        checks = _checks(experiment, moments | metric_moments(connection, experiment, suspected))
    return checks


def _checks(experiment: Experiment, moments: Mapping[str, ArmMoments]) -> list[GuardrailCheck]:
    rails = experiment.spec.guardrails
    treated = [arm.name for arm in experiment.arms if arm is not experiment.control]
    checks = len(rails) * len(treated)
    return [_check(experiment, rail, arm, moments[rail.metric], checks) for rail in rails for arm in treated]


def _check(
    experiment: Experiment, rail: GuardrailSpec, arm: str, moments: Mapping[str, Moments], checks: int
) -> GuardrailCheck:
    alpha, proportion = experiment.spec.alpha / checks, _is_proportion(experiment, rail.metric)
    found = moments.get(arm, _NONE)
    if rail.max is not None:
        limit, estimate = rail.max, mean(found, alpha, _horizon(experiment, rail.metric, arm), proportion=proportion)
    else:
        control = experiment.control.name
        limit = rail.max_increase or 0.0
        horizon = _horizon(experiment, rail.metric, control, arm)
        estimate = difference(moments.get(control, _NONE), found, alpha, horizon, proportion=proportion)
    broken = estimate.low is not None and estimate.low > limit
    value = estimate.value if found.n else None
    return GuardrailCheck(rail.metric, arm, limit, rail.max is None, value, estimate.low, broken)


def _ordered(experiment: Experiment, moments: Mapping[str, ArmMoments]) -> list[str]:
    """The primary metric, the other metrics of clients, the automatic ones by name; those never observed left out."""
    own = [metric.name for metric in experiment.spec.metrics]
    first = [experiment.spec.primary] if experiment.spec.primary else []
    rest = [name for name in sorted(AUTOMATIC) if any(m.mean or m.variance for m in moments[name].values())]
    return list(dict.fromkeys([*first, *own, *rest]))


def _metric(experiment: Experiment, name: str, moments: ArmMoments) -> dict[str, Any]:
    spec, proportion = experiment.spec, _is_proportion(experiment, name)
    goal = None if name in AUTOMATIC else experiment.metric(name).goal
    arms = []
    for arm in experiment.arms:
        found = moments.get(arm.name, _NONE)
        estimate = mean(found, spec.alpha, _horizon(experiment, name, arm.name), proportion=proportion)
        arms.append({"arm": arm.name, "units": found.n, "mean": estimate.value if found.n else None,
                     "low": estimate.low, "high": estimate.high})  # fmt: skip
    differences = [_difference(experiment, name, moments, arm.name, goal)
                   for arm in experiment.arms if arm is not experiment.control]  # fmt: skip
    return {
        "name": name,
        "kind": "proportion" if proportion else "mean",
        "goal": goal,
        "primary": name == spec.primary,
        "automatic": name in AUTOMATIC,
        "arms": arms,
        "differences": differences,
    }


def _difference(experiment: Experiment, metric: str, moments: ArmMoments, arm: str, goal: str | None) -> dict[str, Any]:
    spec, control = experiment.spec, experiment.control.name
    base, found = moments.get(control, _NONE), moments.get(arm, _NONE)
    horizon, comparisons = _horizon(experiment, metric, control, arm), len(experiment.arms) - 1
    proportion = _is_proportion(experiment, metric)
    estimate = difference(base, found, spec.alpha, horizon, comparisons=comparisons, proportion=proportion)
    return {
        "arm": arm,
        "control": control,
        "difference": estimate.value if base.n and found.n else None,
        "low": estimate.low,
        "high": estimate.high,
        "p_value": estimate.p_value,
        "relative": estimate.value / base.mean if base.n and found.n and base.mean else None,
        "verdict": _verdict(estimate, goal),
        "detectable": detectable_effect(base, found, alpha=spec.alpha, power=POWER, horizon=horizon,
                                        comparisons=comparisons, proportion=proportion),
    }  # fmt: skip


def _verdict(estimate: Estimate, goal: str | None) -> str:
    """What the interval says: ``better`` and ``worse`` by the metric's goal, ``higher`` and ``lower`` without one."""
    if estimate.low is None or estimate.high is None:
        return f"fewer than {MIN_UNITS} units"
    if estimate.low <= 0 <= estimate.high:
        return "undecided"
    up = estimate.low > 0
    if goal is None:
        return "higher" if up else "lower"
    return "better" if up == (goal == "increase") else "worse"


def _looks(connection: Connection, experiment: Experiment, count: int) -> list[dict[str, Any]]:
    """The primary metric's differences at `count` times, evenly spaced over the experiment's life so far."""
    name = experiment.spec.primary
    if name is None or experiment.started_at is None:
        return []
    start, end = experiment.started_at, experiment.stopped_at or time.time()
    found = []
    for step in range(1, count + 1):
        until = start + (end - start) * step / count
        moments = metric_moments(connection, experiment, [name], until)[name]
        units = sum(exposed(connection, experiment, until).values())
        found.append({"at": until, "units": units, "differences": _metric(experiment, name, moments)["differences"]})
    return found


def _is_proportion(experiment: Experiment, name: str) -> bool:
    return name in PROPORTIONS if name in AUTOMATIC else experiment.metric(name).kind == "proportion"


def _horizon(experiment: Experiment, metric: str, *arms: str) -> int:
    """The part of the horizon that falls to `arms`; where few responses are measured, of those.

    One that is tightest too early is 17% wider at a hundred times its horizon; one too late, at a hundredth, three times.
    """
    share = sum(arm.share for arm in experiment.arms if arm.name in arms)
    part = _MEASURED_PART if metric == MEASURED_KL else 1.0
    return max(1, round(experiment.spec.horizon * share * part))
