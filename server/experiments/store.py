"""Experiments in the database: what they are, the states they go through, and who changed what when.

    draft  --start-->  running  --ramp-->  running  --stop-->  stopped

Every change is one conditional statement, so of two operators, or two replicas that both see a guardrail broken, one
succeeds. Knows no request and no statistics.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, select, update
from sqlalchemy.exc import IntegrityError

from server.errors import CollisionError, ConflictError, ExperimentNotFoundError
from server.experiments.spec import Arm, Experiment, ExperimentSpec
from server.presets import Preset, bump_revision
from server.store.database import Database
from server.store.tables import events, experiments

Event = dict[str, Any]
"""``{"at", "kind", "detail"}``."""


class ExperimentStore:
    """The experiments of one package (`scope`)."""

    def __init__(self, database: Database, scope: str) -> None:
        self._database = database
        self._scope = scope

    def all(self, connection: Connection) -> dict[str, Experiment]:
        """By name, newest first."""
        query = select(experiments).where(experiments.c.scope == self._scope).order_by(experiments.c.id.desc())
        found = [_experiment(row) for row in connection.execute(query).mappings()]
        return {experiment.name: experiment for experiment in found}

    def get(self, name: str) -> Experiment:
        """Raises ExperimentNotFoundError."""
        with self._database.read() as connection:
            return self._get(connection, name)

    def create(self, spec: ExperimentSpec, arms: Sequence[Arm], package_version: str) -> Experiment:
        """A draft. Raises ConflictError if the name is taken."""
        row = self._row(spec, arms, package_version) | {"status": "draft", "created_at": time.time()}
        try:
            with self._database.write() as connection:
                connection.execute(experiments.insert(), row)
                created = self._get(connection, spec.name)
                self._note(connection, created, "created", {})
        except IntegrityError as error:
            raise ConflictError(f"an experiment {spec.name!r} exists already; choose another name", "name") from error
        return created

    def replace(self, spec: ExperimentSpec, arms: Sequence[Arm], package_version: str) -> Experiment:
        """Another spec for a draft. Raises ExperimentNotFoundError, ConflictError for one that was started."""
        with self._database.write() as connection:
            self._change(connection, spec.name, "draft", self._row(spec, arms, package_version))
            return self._noted(connection, spec.name, "replaced", {})

    def start(self, draft: Experiment, arms: Sequence[Arm], package_version: str) -> Experiment:
        """Freezes `arms`, which are those of `draft`. Raises ExperimentNotFoundError, ConflictError unless it is a draft,
        CollisionError if that has another spec meanwhile."""
        values = {
            "status": "running",
            "started_at": time.time(),
            "arms": _dump(arms),
            "package_version": package_version,
        }
        with self._database.write() as connection:
            self._change(connection, draft.name, "draft", values)
            started = self._noted(connection, draft.name, "started", {"package_version": package_version})
            if started.spec != draft.spec:  # nothing of this transaction is kept
                raise CollisionError(f"experiment {draft.name!r} was replaced while it was started; start it again")
            return started

    def ramp(self, name: str, coverage: float) -> Experiment:
        """Raises ExperimentNotFoundError, ConflictError unless it runs."""
        with self._database.write() as connection:
            self._change(connection, name, "running", {"coverage": coverage})
            return self._noted(connection, name, "ramped", {"coverage": coverage})

    def stop(self, name: str, reason: str) -> Experiment:
        """Raises ExperimentNotFoundError, ConflictError unless it runs."""
        values = {"status": "stopped", "stopped_at": time.time(), "stop_reason": reason}
        with self._database.write() as connection:
            self._change(connection, name, "running", values)
            return self._noted(connection, name, "stopped", {"reason": reason})

    def promote(self, experiment: Experiment, arm: str, put: Callable[[Connection], Preset]) -> Preset:
        """Has `put` store the preset that `arm` becomes, and notes it in the history, both or neither. Raises
        ExperimentNotFoundError for an experiment that has been deleted meanwhile, and what `put` does."""
        with self._database.write() as connection:
            self._keep(connection, experiment)
            preset = put(connection)
            detail = {"arm": arm, "preset": preset.name, "version": preset.version}
            self._note(connection, experiment, "promoted", detail)
            return preset

    def delete(self, name: str) -> None:
        """With all that was observed. Raises ExperimentNotFoundError, ConflictError for one that runs."""
        with self._database.write() as connection:
            found = self._get(connection, name)
            gone = connection.execute(
                delete(experiments).where(experiments.c.id == found.id, experiments.c.status != "running")
            )
            if not gone.rowcount:
                raise ConflictError(f"experiment {name!r} is running; stop it first")
            bump_revision(connection, self._scope)

    def history(self, connection: Connection, experiment: Experiment) -> list[Event]:
        """What was done to an experiment, oldest first."""
        query = select(events).where(events.c.experiment_id == experiment.id).order_by(events.c.id)
        return [{"at": row["at"], "kind": row["kind"], "detail": json.loads(row["detail"])}
                for row in connection.execute(query).mappings()]  # fmt: skip

    def _get(self, connection: Connection, name: str) -> Experiment:
        query = select(experiments).where(experiments.c.scope == self._scope, experiments.c.name == name)
        row = connection.execute(query).mappings().first()
        if row is None:
            raise _not_found(name)
        return _experiment(row)

    def _keep(self, connection: Connection, experiment: Experiment) -> None:
        """Nobody deletes the experiment before this transaction ends. Raises ExperimentNotFoundError where somebody has."""
        query = select(experiments.c.id).where(experiments.c.id == experiment.id)
        if connection.scalar(query.with_for_update(read=True, key_share=True)) is None:
            raise _not_found(experiment.name)

    def _change(self, connection: Connection, name: str, status: str, values: dict[str, Any]) -> None:
        """Changes the experiment if it is in `status`."""
        where = (experiments.c.scope == self._scope, experiments.c.name == name, experiments.c.status == status)
        if not connection.execute(update(experiments).where(*where).values(values)).rowcount:
            found = self._get(connection, name)
            raise ConflictError(f"experiment {name!r} is {found.status}; this can be done to one that is {status}")

    def _noted(self, connection: Connection, name: str, kind: str, detail: dict[str, Any]) -> Experiment:
        found = self._get(connection, name)
        self._note(connection, found, kind, detail)
        return found

    def _note(self, connection: Connection, experiment: Experiment, kind: str, detail: dict[str, Any]) -> None:
        row = {"experiment_id": experiment.id, "at": time.time(), "kind": kind, "detail": json.dumps(detail)}
        connection.execute(events.insert(), row)
        bump_revision(connection, self._scope)

    def _row(self, spec: ExperimentSpec, arms: Sequence[Arm], package_version: str) -> dict[str, Any]:
        return {
            "scope": self._scope,
            "name": spec.name,
            "spec": spec.model_dump_json(),
            "arms": _dump(arms),
            "package_version": package_version,
            "coverage": spec.coverage,
        }


def _not_found(name: str) -> ExperimentNotFoundError:
    return ExperimentNotFoundError(f"experiment {name[:64]!r} does not exist", "experiment")


def _dump(arms: Sequence[Arm]) -> str:
    return json.dumps([arm.to_json() for arm in arms])


def _experiment(row: RowMapping) -> Experiment:
    return Experiment(
        id=row["id"],
        status=row["status"],
        spec=ExperimentSpec.model_validate_json(row["spec"]),
        arms=tuple(Arm.from_json(arm) for arm in json.loads(row["arms"])),
        package_version=row["package_version"],
        coverage=row["coverage"],
        created_at=row["created_at"],
        started_at=row["started_at"],
        stopped_at=row["stopped_at"],
        stop_reason=row["stop_reason"],
    )
