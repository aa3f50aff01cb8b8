"""What is observed, on its way to the database, off the request path.

A host calls two things: `Recorder.exposed` once it knows a request's arm, `Recorder.finished` once the response is
complete, before its last byte is sent. Both return at once. Detectors run on the writer's thread. Outcomes that clients
report are acknowledged when they are durable.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from sqlalchemy import Connection, delete, select

from server.experiments.measures import marks
from server.experiments.spec import Assignment
from server.store.database import Database, insert_into
from server.store.tables import RESPONSE, experiments, exposures, losses, outcomes, responses
from server.store.writer import Writer

_log = logging.getLogger("atomsteer.experiments")
_IDS_A_QUERY = 5_000


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
    """A response that is complete, or failed with `status` and has no choices. Times are seconds since the request came."""

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


@dataclass(frozen=True, slots=True)
class _Response:
    assignment: Assignment
    at: float
    response: FinishedResponse


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
    """Writes the observations of one package's (`scope`) experiments."""

    database: Database
    scope: str
    capacity: int = 20_000
    lost: int = 0
    """Records that this server has dropped."""
    _lost: Counter[int] = field(default_factory=Counter)
    _lost_lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self._writer: Writer[_Record] = Writer(self._commit, capacity=self.capacity)

    @property
    def waiting(self) -> int:
        """Records that are not written yet."""
        return self._writer.waiting

    def exposed(self, assignment: Assignment | None) -> None:
        """A request is about to be answered under an arm; None for one that takes no part."""
        if assignment is not None:
            self._offer(assignment, _Exposure(assignment, time.time()))

    def finished(self, assignment: Assignment | None, response: FinishedResponse) -> None:
        """A response has ended, well or not; None for one that takes no part."""
        if assignment is not None:
            self._offer(assignment, _Response(assignment, time.time(), response))

    def report(self, experiment_id: int, reported: Sequence[Outcome]) -> Future[set[str]]:
        """Stores outcomes; the future gives the response ids that are not known. Those outcomes are not stored.

        A metric's value for a response replaces an earlier one, so that reporting twice counts once. Raises
        StoreOverloadedError; the future may end with StoreUnavailableError.
        """
        return self._writer.submit(_Outcomes(experiment_id, time.time(), reported))

    def erase(self, unit: str) -> Future[int]:
        """Deletes all that is known of a unit, in all of the package's experiments; the future counts the rows."""
        return self._writer.submit(_Erasure(unit))

    def close(self) -> None:
        """Writes what waits."""
        self._writer.close()

    def _offer(self, assignment: Assignment, record: _Record) -> None:
        if not self._writer.offer(record):
            with self._lost_lock:
                self.lost += 1
                self._lost[assignment.experiment_id] += 1

    def _commit(self, records: Sequence[_Record]) -> list[Any]:
        """One transaction. Observations first, so that an outcome finds the response that was queued before it."""
        response_rows = [row for record in records if isinstance(record, _Response) for row in _response_rows(record)]
        exposure_rows = [_exposure_row(record) for record in records if isinstance(record, _Exposure)]
        with self._lost_lock:
            lost, self._lost = self._lost, Counter()
        try:
            with self.database.write() as connection:
                known = self._existing({row["experiment_id"] for row in [*response_rows, *exposure_rows]} | lost.keys(),
                                       connection)  # fmt: skip
                _insert_new(connection, exposures, [row for row in exposure_rows if row["experiment_id"] in known])
                _insert_new(connection, responses, [row for row in response_rows if row["experiment_id"] in known])
                losses_rows = [
                    {"experiment_id": key, "at": time.time(), "count": n} for key, n in lost.items() if key in known
                ]
                if losses_rows:
                    connection.execute(losses.insert(), losses_rows)
                return [self._answer(connection, record) for record in records]
        except Exception:
            with self._lost_lock:
                self._lost += lost
            raise

    def _answer(self, connection: Connection, record: _Record) -> Any:
        if isinstance(record, _Outcomes):
            return _store_outcomes(connection, record)
        return self._erase(connection, record.unit) if isinstance(record, _Erasure) else None

    def _erase(self, connection: Connection, unit: str) -> int:
        ours = select(experiments.c.id).where(experiments.c.scope == self.scope)
        return sum(
            connection.execute(delete(table).where(table.c.experiment_id.in_(ours), table.c.unit == unit)).rowcount
            for table in (exposures, responses, outcomes)
        )

    def _existing(self, ids: set[int], connection: Connection) -> set[int]:
        """Those of `ids` whose experiments have not been deleted meanwhile, and will not be in this transaction."""
        query = select(experiments.c.id).where(experiments.c.id.in_(ids)).with_for_update(read=True, key_share=True)
        return set(connection.execute(query).scalars()) if ids else set()


def _exposure_row(record: _Exposure) -> dict[str, Any]:
    assigned = record.assignment
    return {"experiment_id": assigned.experiment_id, "unit": assigned.unit, "arm": assigned.arm, "at": record.at}


def _response_rows(record: _Response) -> Iterable[dict[str, Any]]:
    assigned, response = record.assignment, record.response
    common = {
        "experiment_id": assigned.experiment_id, "response_id": response.response_id[:RESPONSE], "unit": assigned.unit,
        "arm": assigned.arm, "at": record.at, "status": response.status, "seconds": response.seconds,
        "first_token_seconds": response.first_token_seconds,
    }  # fmt: skip
    if not response.choices:
        yield common | {"choice": 0, "finish_reason": None, "tokens": None, "characters": None, "marks": ""}
    for place, choice in enumerate(response.choices):
        yield common | {
            "choice": place, "finish_reason": choice.finish_reason, "tokens": choice.tokens,
            "characters": len(choice.text), "marks": marks(choice.text, choice.prompt),
        }  # fmt: skip


def _insert_new(connection: Connection, table: Any, rows: list[dict[str, Any]]) -> None:
    if rows:  # in one order everywhere: replicas that insert the same rows must not wait for each other
        ordered = sorted(rows, key=lambda row: [row[column.name] for column in table.primary_key])
        connection.execute(insert_into(connection, table).on_conflict_do_nothing(), ordered)


def _store_outcomes(connection: Connection, record: _Outcomes) -> set[str]:
    """The ids of unknown responses."""
    wanted = list(dict.fromkeys(outcome.response_id for outcome in record.outcomes))
    known: dict[str, tuple[str, str]] = {}
    for start in range(0, len(wanted), _IDS_A_QUERY):
        query = select(responses.c.response_id, responses.c.unit, responses.c.arm).where(
            responses.c.experiment_id == record.experiment_id,
            responses.c.response_id.in_(wanted[start : start + _IDS_A_QUERY]),
            responses.c.choice == 0,
        )
        known |= {response_id: (unit, arm) for response_id, unit, arm in connection.execute(query)}
    rows = {}
    for outcome in record.outcomes:
        if outcome.response_id in known:
            unit, arm = known[outcome.response_id]
            rows[outcome.response_id, outcome.metric] = {
                "experiment_id": record.experiment_id, "response_id": outcome.response_id, "metric": outcome.metric,
                "unit": unit, "arm": arm, "value": outcome.value, "at": record.at,
            }  # fmt: skip
    if rows:
        insert = insert_into(connection, outcomes)
        replaced = insert.on_conflict_do_update(
            index_elements=["experiment_id", "response_id", "metric"],
            set_={"value": insert.excluded.value, "at": insert.excluded.at},
        )
        connection.execute(replaced, [rows[key] for key in sorted(rows)])
    return set(wanted) - known.keys()
