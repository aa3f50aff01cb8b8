"""What is observed, on its way to the database, off the request path.

A host calls two things: `Recorder.exposed` once a request is answered under its arm, `Recorder.finished` once the response is
complete, before its last byte is sent, or has come to no end: who stops an answer may have an opinion of it. Both return
at once. Detectors run on the writer's thread. Outcomes that clients report are acknowledged when they are durable.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from sqlalchemy import Connection, Table, delete, select

from server.errors import DeadlockError
from server.experiments import rollups
from server.experiments.measures import EXPRESSIONS, marks, response_values
from server.experiments.rollups import Change
from server.experiments.spec import MEASURED_KL, Assignment
from server.store.database import Database, insert_into
from server.store.tables import RESPONSE, experiments, exposures, losses, outcomes, responses
from server.store.writer import Writer

_log = logging.getLogger("atomsteer.experiments")
_IDS_A_QUERY = 5_000
_DEADLOCKS = 3
"""In a row, before the database counts as away."""
_EXPOSURE_WAITS = 0.1
_RESPONSE_WAITS = 0.01
"""Seconds. An exposure is written with its response, or when that takes long; responses that end in one step of the
engine together."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer of a response; `tokens` were generated for it. `prompt` is what it answers: the last message of the
    user, or the text to continue; empty where it is not known."""

    text: str
    tokens: int
    finish_reason: str
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class FinishedResponse:
    """A response that is complete, or came to no end and has no choices: `status` is then that of the failure, or `HUNG_UP`.
    Times are seconds since the request came."""

    response_id: str
    choices: Sequence[Choice]
    seconds: float
    first_token_seconds: float | None = None
    status: int = 200


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a client says of a response."""

    response_id: str
    metric: str
    value: float


@dataclass(frozen=True, slots=True)
class _Exposure:
    assignment: Assignment
    at: float


@dataclass(slots=True)
class _Response:
    """Its rows are made once, however often they must be written, and the texts dropped with that."""

    assignment: Assignment
    at: float
    response: FinishedResponse | None
    _rows: list[dict[str, Any]] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        if self.response is not None:
            self._rows, self.response = list(_response_rows(self.assignment, self.at, self.response)), None
        return self._rows


@dataclass(frozen=True, slots=True)
class _Outcomes:
    experiment_id: int
    at: float
    outcomes: Sequence[Outcome]


@dataclass(frozen=True, slots=True)
class _Erasure:
    unit: str


_Record = _Exposure | _Response | _Outcomes | _Erasure


@dataclass
class Recorder:
    """Writes the observations of experiments."""

    database: Database
    capacity: int = 50_000
    lost: int = 0
    """Records that this server has dropped: the queue was full, or they could not be stored."""
    _lost: Counter[int] = field(default_factory=Counter)
    _lost_lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self._writer: Writer[_Record] = Writer(self._commit, capacity=self.capacity, dropped=self._dropped)

    @property
    def waiting(self) -> int:
        """Rows that are not written yet."""
        return self._writer.waiting

    def exposed(self, assignment: Assignment | None) -> None:
        """A request is being answered under an arm; None for one that takes no part."""
        if assignment is not None:
            self._offer(assignment, _Exposure(assignment, time.time()), _EXPOSURE_WAITS)

    def finished(self, assignment: Assignment | None, response: FinishedResponse) -> None:
        """A response has ended, well or not; None for one that takes no part."""
        if assignment is not None:
            self._offer(assignment, _Response(assignment, time.time(), response), _RESPONSE_WAITS)

    def measured(self, assignment: Assignment, response_id: str, kl: float) -> None:
        """A response's drift has been measured, in nats a token. Returns at once; of a response that has been forgotten
        meanwhile nothing is stored."""
        outcome = Outcome(response_id, MEASURED_KL, kl)
        self._offer(assignment, _Outcomes(assignment.experiment_id, time.time(), [outcome]), _RESPONSE_WAITS)

    def report(self, experiment_id: int, reported: Sequence[Outcome]) -> Future[set[str]]:
        """Stores outcomes; the future gives the response ids that are not known. Those outcomes are not stored.

        A metric's value for a response replaces an earlier one, so that reporting twice counts once. Raises
        StoreOverloadedError; the future may end with StoreUnavailableError.
        """
        return self._writer.submit(_Outcomes(experiment_id, time.time(), reported), len(reported))

    def erase(self, unit: str) -> Future[int]:
        """Deletes all that is known of a unit, in all experiments of the database, those of other packages too: who is to be
        forgotten is a person, and knows of no packages. The future counts the rows."""
        return self._writer.submit(_Erasure(unit))

    def close(self) -> None:
        """Writes what waits."""
        self._writer.close()

    def _offer(self, assignment: Assignment, record: _Record, patience: float) -> None:
        if not self._writer.offer(record, patience):
            self._count_lost(assignment.experiment_id)

    def _dropped(self, record: _Record) -> None:
        if isinstance(record, _Exposure | _Response):
            self._count_lost(record.assignment.experiment_id)
        elif isinstance(record, _Outcomes):
            self._count_lost(record.experiment_id)

    def _count_lost(self, experiment_id: int) -> None:
        with self._lost_lock:
            self.lost += 1
            self._lost[experiment_id] += 1

    def _commit(self, records: Sequence[_Record]) -> list[Any]:
        """One transaction. What is forgotten is locked after what is written, so those of two replicas may wait for each
        other: the one that the database undoes then is no outage, and is tried again."""
        for _ in range(_DEADLOCKS):
            try:
                return self._try(records)
            except DeadlockError as error:
                _log.info("records are written again: %s", error)
        return self._try(records)

    def _try(self, records: Sequence[_Record]) -> list[Any]:
        """Observations first, so that an outcome finds the response that was queued before it."""
        response_rows = [row for record in records if isinstance(record, _Response) for row in record.rows()]
        exposure_rows = [_exposure_row(record) for record in records if isinstance(record, _Exposure)]
        with self._lost_lock:
            lost, self._lost = self._lost, Counter()
        try:
            with self.database.write() as connection:
                reports = [record for record in records if isinstance(record, _Outcomes)]
                ids = {row["experiment_id"] for row in [*response_rows, *exposure_rows]} | lost.keys()
                watched = _watched_metrics(connection, ids | {record.experiment_id for record in reports})
                changes = _insert_exposures(connection, exposure_rows, watched)
                changes += _insert_responses(connection, response_rows, watched)
                unknown, reported = _store_outcomes(connection, reports, watched)
                rollups.add(connection, changes + reported)
                losses_rows = [
                    {"experiment_id": key, "at": time.time(), "count": n} for key, n in lost.items() if key in watched
                ]
                if losses_rows:
                    connection.execute(losses.insert(), losses_rows)
                answers = iter(unknown)
                return [self._answer(connection, record, answers) for record in records]
        except Exception:
            with self._lost_lock:
                self._lost += lost
            raise

    def _answer(self, connection: Connection, record: _Record, unknown: Iterator[set[str]]) -> Any:
        if isinstance(record, _Outcomes):
            return next(unknown)
        return self._erase(connection, record.unit) if isinstance(record, _Erasure) else None

    def _erase(self, connection: Connection, unit: str) -> int:
        every = connection.execute(select(experiments.c.id)).scalars().all()  # the tables' indexes begin with it
        rollups.forget(connection, unit, every)
        return sum(
            connection.execute(delete(table).where(table.c.experiment_id.in_(every), table.c.unit == unit)).rowcount
            for table in (exposures, responses, outcomes)
        )


_Watched = Mapping[int, frozenset[str]]
"""Experiment -> the metrics that its guardrails watch."""


def _watched_metrics(connection: Connection, ids: set[int]) -> _Watched:
    """Of those of `ids` whose experiments have not been deleted meanwhile, and will not be in this transaction."""
    if not ids:
        return {}
    query = select(experiments.c.id, experiments.c.spec).where(experiments.c.id.in_(ids))
    found = connection.execute(query.with_for_update(read=True, key_share=True)).all()
    return {key: frozenset(rail["metric"] for rail in json.loads(spec)["guardrails"]) for key, spec in found}


def _insert_exposures(connection: Connection, rows: list[dict[str, Any]], watched: _Watched) -> list[Change]:
    known = {(row["experiment_id"], row["unit"]): row for row in rows if row["experiment_id"] in watched}
    new = _insert_new(connection, exposures, list(known.values()))
    return [Change(key[0], rollups.EXPOSED, key[1], known[key]["arm"], 1, 0.0) for key in new if watched[key[0]]]


def _insert_responses(connection: Connection, rows: list[dict[str, Any]], watched: _Watched) -> list[Change]:
    new = set(_insert_new(connection, responses, [row for row in rows if row["experiment_id"] in watched]))
    changes = []
    for experiment_id, watched_metrics in watched.items():
        names = sorted(watched_metrics & EXPRESSIONS.keys())
        ids = sorted({key[1] for key in new if key[0] == experiment_id})
        if not names or not ids:
            continue
        for key, unit, arm, values in response_values(connection, experiment_id, names, ids):
            if key in new:
                changes += [Change(experiment_id, name, unit, arm, 1, value) for name, value in values.items()]
    return changes


def _exposure_row(record: _Exposure) -> dict[str, Any]:
    assigned = record.assignment
    return {"experiment_id": assigned.experiment_id, "unit": assigned.unit, "arm": assigned.arm, "at": record.at}


def _response_rows(assigned: Assignment, at: float, response: FinishedResponse) -> Iterable[dict[str, Any]]:
    common = {
        "experiment_id": assigned.experiment_id, "response_id": response.response_id[:RESPONSE], "unit": assigned.unit,
        "arm": assigned.arm, "at": at, "status": response.status, "seconds": response.seconds,
        "first_token_seconds": response.first_token_seconds,
    }  # fmt: skip
    if not response.choices:
        yield common | {"choice": 0, "finish_reason": None, "tokens": None, "characters": None, "marks": ""}
    for place, choice in enumerate(response.choices):
        yield common | {
            "choice": place, "finish_reason": choice.finish_reason, "tokens": choice.tokens,
            "characters": len(choice.text), "marks": marks(choice.text, choice.prompt),
        }  # fmt: skip


def _insert_new(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """The keys of the rows that were not there yet."""
    if not rows:
        return []
    keys = list(table.primary_key)
    # in one order everywhere: replicas that insert the same rows must not wait for each other
    ordered = sorted(rows, key=lambda row: [row[column.name] for column in keys])
    insert = insert_into(connection, table).on_conflict_do_nothing().returning(*keys)
    return [tuple(row) for row in connection.execute(insert, ordered)]


def _store_outcomes(
    connection: Connection, records: Sequence[_Outcomes], watched: _Watched
) -> tuple[list[set[str]], list[Change]]:
    """The ids of unknown responses, for each record, and what has changed of metrics that guardrails watch."""
    known: dict[tuple[int, str], tuple[str, str]] = {}
    for experiment_id in {record.experiment_id for record in records}:
        wanted = {o.response_id for record in records if record.experiment_id == experiment_id for o in record.outcomes}
        known |= _answered(connection, experiment_id, sorted(wanted))
    rows: dict[tuple[int, str, str], dict[str, Any]] = {}
    unknown = []
    for record in records:
        unknown.append({o.response_id for o in record.outcomes if (record.experiment_id, o.response_id) not in known})
        for outcome in record.outcomes:
            if (found := known.get((record.experiment_id, outcome.response_id))) is not None:
                rows[record.experiment_id, outcome.response_id, outcome.metric] = {
                    "experiment_id": record.experiment_id, "response_id": outcome.response_id, "metric": outcome.metric,
                    "unit": found[0], "arm": found[1], "value": outcome.value, "at": record.at,
                }  # fmt: skip
    new = set(_insert_new(connection, outcomes, list(rows.values())))
    before = _replace(connection, {key: row for key, row in rows.items() if key not in new})
    changes = [
        Change(row["experiment_id"], row["metric"], row["unit"], row["arm"], int(key in new),
               row["value"] - before.get(key, 0.0))
        for key, row in rows.items() if row["metric"] in watched.get(row["experiment_id"], ())
    ]  # fmt: skip
    return unknown, changes


def _answered(
    connection: Connection, experiment_id: int, response_ids: Sequence[str]
) -> dict[tuple[int, str], tuple[str, str]]:
    """Experiment and response -> unit and arm, of those of `response_ids` that are known."""
    found = {}
    for start in range(0, len(response_ids), _IDS_A_QUERY):
        query = select(responses.c.response_id, responses.c.unit, responses.c.arm).where(
            responses.c.experiment_id == experiment_id,
            responses.c.response_id.in_(response_ids[start : start + _IDS_A_QUERY]),
            responses.c.choice == 0,
        )
        for response_id, unit, arm in connection.execute(query):
            found[experiment_id, response_id] = unit, arm
    return found


def _replace(
    connection: Connection, rows: Mapping[tuple[int, str, str], dict[str, Any]]
) -> dict[tuple[int, str, str], float]:
    """Gives outcomes that are there already their new values, and returns the old ones."""
    before = {}
    keys = sorted(rows)
    for start in range(0, len(keys), _IDS_A_QUERY):
        some = keys[start : start + _IDS_A_QUERY]
        query = select(outcomes.c.experiment_id, outcomes.c.response_id, outcomes.c.metric, outcomes.c.value).where(
            outcomes.c.experiment_id.in_({key[0] for key in some}), outcomes.c.response_id.in_({key[1] for key in some})
        )
        for *key, value in connection.execute(query.order_by(*outcomes.primary_key).with_for_update()):
            before[tuple(key)] = value
    if keys:
        insert = insert_into(connection, outcomes)
        replaced = insert.on_conflict_do_update(
            index_elements=["experiment_id", "response_id", "metric"],
            set_={"value": insert.excluded.value, "at": insert.excluded.at},
        )
        connection.execute(replaced, [rows[key] for key in keys])
    return {key: before[key] for key in keys if key in before}
