"""What one server knows of its database: a snapshot that requests read without waiting, and the threads that keep it.

Presets and experiments are looked up in memory. A change made here is seen here at once, and on other replicas within
`REFRESH_SECONDS`. While the database is away the last snapshot goes on serving, observations wait in memory, and what
needs the database is refused. The same thread stops experiments whose guardrails are broken.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import select

from server.errors import ConflictError, ExperimentNotFoundError, NoStoreError, StoreUnavailableError
from server.experiments.recording import Recorder
from server.experiments.report import check_guardrails
from server.experiments.spec import Experiment
from server.experiments.store import ExperimentStore
from server.presets import Preset, PresetStore
from server.store.database import Database
from server.store.tables import revisions

REFRESH_SECONDS = 2.0
GUARDRAIL_SECONDS = 10.0
_log = logging.getLogger("atomsteer.state")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Presets and experiments, by name, as they were at one moment."""

    presets: Mapping[str, Preset] = field(default_factory=dict)
    experiments: Mapping[str, Experiment] = field(default_factory=dict)


def required(state: State | None) -> State:
    """`state`, for what cannot be done without. Raises NoStoreError."""
    if state is None:
        raise NoStoreError("this server runs without a database; start it with --database URL")
    return state


class State:
    """The database of one server, whose package is called `scope`."""

    def __init__(self, database: Database, scope: str) -> None:
        self.database = database
        self.presets = PresetStore(database, scope)
        self.experiments = ExperimentStore(database, scope)
        self.snapshot = Snapshot()
        self._scope = scope
        self._revision = -1
        self._refreshing = threading.Lock()
        self._stop = threading.Event()
        self.refresh()
        self.recorder = Recorder(database)
        self._thread = threading.Thread(target=self._watch, name="atomsteer-watch", daemon=True)
        self._thread.start()

    def refresh(self) -> None:
        """Reads presets and experiments if anybody has changed them. Raises StoreUnavailableError."""
        with self._refreshing, self.database.read() as connection:
            query = select(revisions.c.number).where(revisions.c.scope == self._scope)
            revision = connection.scalar(query) or 0
            if revision != self._revision:
                self.snapshot = Snapshot(self.presets.current(connection), self.experiments.all(connection))
                self._revision = revision

    def guard(self) -> None:
        """Stops running experiments whose guardrails are broken. Raises StoreUnavailableError."""
        for experiment in list(self.snapshot.experiments.values()):
            if experiment.status == "running" and experiment.spec.guardrails:
                try:
                    self._guard(experiment)
                except StoreUnavailableError:
                    raise
                except Exception:  # the others must not go unguarded
                    _log.exception("the guardrails of experiment %r could not be checked", experiment.name)

    def _guard(self, experiment: Experiment) -> None:
        with self.database.read() as connection:
            broken = next((check for check in check_guardrails(connection, experiment) if check.broken), None)
        if broken is not None:
            self._stop_experiment(experiment, f"guardrail: {broken}")

    def close(self) -> None:
        """Stops the threads, writes what waits, closes the connections."""
        self._stop.set()
        self._thread.join()
        self.recorder.close()
        self.database.close()

    def _stop_experiment(self, experiment: Experiment, reason: str) -> None:
        try:
            self.experiments.stop(experiment.name, reason)
        except (ConflictError, ExperimentNotFoundError):
            return  # another replica was faster
        _log.warning("experiment %r was stopped: %s", experiment.name, reason)
        self.refresh()

    def _watch(self) -> None:
        away = False
        checked = time.monotonic()
        while not self._stop.wait(REFRESH_SECONDS):
            try:
                self.refresh()
                if time.monotonic() - checked >= GUARDRAIL_SECONDS:
                    self.guard()
                    checked = time.monotonic()
                away = False
            except StoreUnavailableError as error:
                if not away:
                    _log.error("presets and experiments are served as last seen: %s", error)
                away = True
            except Exception:
                _log.exception("presets and experiments could not be read")
