"""The sums that guardrails read, against the same moments computed from all records."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import func, select, text

from server.experiments import rollups
from server.experiments.measures import metric_moments
from server.experiments.recording import Choice, FinishedResponse, Outcome, Recorder
from server.experiments.spec import MEASURED_KL, Assignment, Experiment, ExperimentSpec
from server.experiments.statistics import Moments
from server.state import State
from server.steering import Steering
from server.store.tables import arm_sums, unit_sums

WATCHED = ("error", "latency_seconds", "first_token_seconds", "tokens", "truncated", "detector:one-word", "measured_kl",
           "thumbs", "spent")  # fmt: skip
TEXTS = ("Word.", "Two words here.", "", "a\nb\nc")


@pytest.fixture
def guarded(state: State, package: Any, config: Any, spec: dict[str, Any]) -> Experiment:
    """A running experiment that watches nine metrics."""
    rails = [{"metric": metric, "max": 1e9} for metric in WATCHED]
    parsed = ExperimentSpec.model_validate(spec | {"guardrails": rails}).completed()
    arms = Steering.of(package, config).freeze(parsed)
    draft = state.experiments.create(parsed, arms, "1.0")
    started = state.experiments.start(draft, arms, "1.0")
    state.refresh()
    return started


class User:
    """Random traffic of one thread, much of it about the same few units."""

    def __init__(self, recorder: Recorder, experiment: Experiment, seed: int) -> None:
        self._rng = random.Random(seed)
        self._recorder, self._experiment, self._seed = recorder, experiment, seed
        self._answered: list[str] = []

    def act(self, steps: int) -> None:
        for step in range(steps):
            self._answer(step)
            rng = self._rng
            if rng.random() < 0.5:
                metric = rng.choice(("thumbs", "spent"))
                wanted = {rng.choice(self._answered), rng.choice(self._answered), "unknown"}
                self._recorder.report(self._experiment.id, [Outcome(r, metric, rng.random()) for r in wanted])
            if rng.random() < 0.05:
                self._recorder.erase(f"u{rng.randrange(40)}")
        self._recorder.erase("nobody at all").result(30)

    def _answer(self, step: int) -> None:
        rng = self._rng
        n = rng.randrange(40)
        assignment = Assignment(self._experiment.id, f"u{n}", ("plain", "listed", "nice")[n % 3])
        answer = f"r{self._seed}-{step}" if rng.random() < 0.9 or not self._answered else rng.choice(self._answered)
        self._recorder.exposed(assignment)
        choices = [
            Choice(rng.choice(TEXTS), rng.randrange(9), rng.choice(("stop", "length"))) for _ in range(rng.randrange(3))
        ]
        status = 200 if choices else 500
        first = rng.random() if choices else None
        self._recorder.finished(assignment, FinishedResponse(answer, choices, rng.random() * 1000, first, status))
        if rng.random() < 0.3:
            self._recorder.measured(assignment, answer, rng.random())
        self._answered.append(answer)


def assert_sums_hold(state: State, experiment: Experiment) -> None:
    with state.database.read() as connection:
        summed = rollups.moments(connection, experiment, WATCHED)
        scanned = metric_moments(connection, experiment, WATCHED)
    for metric in WATCHED:
        assert summed[metric].keys() >= scanned[metric].keys(), metric
        for arm, found in summed[metric].items():
            expected = scanned[metric].get(arm, Moments(0, 0.0, 0.0))
            assert found.n == expected.n, (metric, arm)
            assert (found.mean, found.variance) == pytest.approx((expected.mean, expected.variance), rel=1e-6, abs=1e-6)


def test_sums_equal_scans_whatever_happens(state: State, guarded: Experiment) -> None:
    """Repeated responses, replaced outcomes, several choices, failures, units that are forgotten and come back."""
    user = User(state.recorder, guarded, 0)
    for _ in range(4):
        user.act(60)
        assert_sums_hold(state, guarded)
    with state.database.read() as connection:
        assert connection.scalar(select(func.count()).select_from(unit_sums)) > 100, "nothing was summed"


def test_sums_of_two_replicas_that_write_at_once(
    state: State, guarded: Experiment, state_of: Callable[[str], State], database_url: str
) -> None:
    replica = state_of(database_url)
    users = [User(state.recorder, guarded, 1), User(replica.recorder, guarded, 2)]
    threads = [threading.Thread(target=user.act, args=(150,)) for user in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert_sums_hold(state, guarded)


def test_a_deadlock_of_two_replicas_is_no_outage(
    state: State,
    guarded: Experiment,
    state_of: Callable[[str], State],
    database_url: str,
    wait_for: Callable[..., bool],
) -> None:
    """One writes a value and forgets another unit; the other has that unit's sum and wants the arm's, which the first has."""
    if state.database.is_sqlite:
        pytest.skip("SQLite has one writer at a time")
    recorder = state.recorder
    one, other = (Assignment(guarded.id, unit, "plain") for unit in ("one", "other"))
    for assignment in (one, other):
        recorder.exposed(assignment)
        recorder.finished(assignment, FinishedResponse(assignment.unit, [Choice("x", 1, "stop")], 1.0))
        recorder.measured(assignment, assignment.unit, 0.5)
    recorder.erase("nobody at all").result(30)
    with state_of(database_url).database.write() as connection:
        its_sum = select(unit_sums).where(unit_sums.c.unit == "other", unit_sums.c.metric == MEASURED_KL)
        assert connection.execute(its_sum.with_for_update()).one()
        recorder.measured(one, "one", 0.7)
        erased = recorder.erase("other")  # in one transaction with what has waited for company
        waiting = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        assert wait_for(lambda: connection.scalar(waiting))
        connection.execute(arm_sums.update().where(arm_sums.c.metric == MEASURED_KL).values(total=arm_sums.c.total))
    assert erased.result(30) == 3
    assert_sums_hold(state, guarded)
    with state.database.read() as connection:
        found = metric_moments(connection, guarded, [MEASURED_KL])[MEASURED_KL]
    assert found == {"plain": Moments(1, 0.7, 0.0)}


OUTLIER = 1e9


def answer_and_report(state: State, experiment: Experiment, values: dict[str, float]) -> None:
    """Every unit's one response, and its `spent`."""
    for n, (unit, value) in enumerate(values.items()):
        assignment = Assignment(experiment.id, unit, ("plain", "listed")[n % 2])
        state.recorder.exposed(assignment)
        state.recorder.finished(assignment, FinishedResponse(f"r-{unit}", [Choice("x", 1, "stop")], 1.0))
        state.recorder.report(experiment.id, [Outcome(f"r-{unit}", "spent", value)])
    state.recorder.erase("nobody at all").result(30)


@pytest.mark.parametrize("way", ["corrected", "forgotten", "both at once"])
def test_an_outlier_that_goes_leaves_no_error_behind(state: State, guarded: Experiment, way: str) -> None:
    """1e18 and the squares of sixty small values do not fit into one double."""
    answer_and_report(state, guarded, {f"u{n}": n % 3 for n in range(120)} | {"odd": OUTLIER, "too": OUTLIER})
    if way != "forgotten":
        state.recorder.report(guarded.id, [Outcome("r-odd", "spent", 1.0), Outcome("r-too", "spent", 1.0)]).result(30)
    if way != "corrected":
        state.recorder.erase("odd").result(30)
        state.recorder.erase("too").result(30)
    assert_sums_hold(state, guarded)


def test_sums_that_have_lost_digits_stop_nothing(state: State, package: Any, config: Any, spec: dict[str, Any]) -> None:
    """A variance of 0 where there is one makes an interval of no width, which is surely above any limit."""
    rails = {"guardrails": [{"metric": "spent", "max": 0.9}], "horizon": 200}
    parsed = ExperimentSpec.model_validate(spec | rails).completed()
    arms = Steering.of(package, config).freeze(parsed)
    started = state.experiments.start(state.experiments.create(parsed, arms, "1.0"), arms, "1.0")
    state.refresh()
    answer_and_report(state, started, {f"u{n}": n // 2 % 3 for n in range(120)})
    with state.database.write() as connection:
        connection.execute(arm_sums.update().where(arm_sums.c.metric == "spent").values(squares=0.0))
    state.guard()
    assert state.experiments.get("tone").status == "running"
    answer_and_report(state, started, {f"u{n}": 2.0 for n in range(120)})
    state.guard()
    assert state.experiments.get("tone").status == "stopped", "what is broken for sure is stopped as before"


def test_nothing_is_summed_for_an_experiment_without_guardrails(
    state: State, package: Any, config: Any, spec: dict[str, Any]
) -> None:
    parsed = ExperimentSpec.model_validate(spec).completed()
    arms = Steering.of(package, config).freeze(parsed)
    draft = state.experiments.create(parsed, arms, "1.0")
    User(state.recorder, state.experiments.start(draft, arms, "1.0"), 3).act(20)
    with state.database.read() as connection:
        assert connection.execute(select(unit_sums)).all() == connection.execute(select(arm_sums)).all() == []
