"""Presets in the database: named mixes with versions. A version never changes and is never removed; deleting a preset is
a version that says so, and making it anew goes on counting.

Coefficients are kept by atom id, whose weights cannot change: on a package without one of its atoms a preset is shown
and refused, never silently something else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, RowMapping, func, select
from sqlalchemy.exc import IntegrityError

from atoms.mix import Mix
from server.errors import CollisionError, ConflictError, PresetNotFoundError
from server.store.database import Database, insert_into
from server.store.tables import presets, revisions


@dataclass(frozen=True, slots=True)
class Preset:
    """One version of a named mix. `created_at` is in Unix seconds."""

    name: str
    version: int
    mix: Mix
    description: str
    package_version: str
    created_at: float


class PresetStore:
    """The presets of one package (`scope`)."""

    def __init__(self, database: Database, scope: str) -> None:
        self._database = database
        self._scope = scope

    def current(self, connection: Connection) -> dict[str, Preset]:
        """The presets in force, by name in order."""
        latest = (
            select(presets.c.name, func.max(presets.c.version).label("version"))
            .where(presets.c.scope == self._scope)
            .group_by(presets.c.name)
            .subquery()
        )
        query = (
            select(presets)
            .join(latest, (presets.c.name == latest.c.name) & (presets.c.version == latest.c.version))
            .where(presets.c.scope == self._scope, presets.c.deleted.is_(False))
            .order_by(presets.c.name)
        )
        return {row["name"]: _preset(row) for row in connection.execute(query).mappings()}

    def versions(self, name: str) -> list[Preset]:
        """All versions that ever held, oldest first. Raises PresetNotFoundError."""
        query = select(presets).where(presets.c.scope == self._scope, presets.c.name == name)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(presets.c.version)).mappings().all()
        if not rows:
            raise PresetNotFoundError(f"preset {name[:64]!r} has never been in the database", "preset")
        return [_preset(row) for row in rows if not row["deleted"]]

    def put(
        self, name: str, mix: Mix, description: str, package_version: str, *, expected: int | None = None
    ) -> Preset:
        """Creates or replaces a preset. `expected` is the version that the caller means to replace, 0 for none.

        Raises ConflictError if that is not the version in force, or if somebody else was faster.
        """
        with self._database.write() as connection:
            return self.put_in(connection, name, mix, description, package_version, expected=expected)

    def put_in(
        self,
        connection: Connection,
        name: str,
        mix: Mix,
        description: str,
        package_version: str,
        *,
        expected: int | None = None,
    ) -> Preset:
        """`put` within the caller's transaction, which an error must end."""
        now = time.time()
        version = 1 + self._latest(connection, name, expected)
        try:
            connection.execute(presets.insert(), {
                "scope": self._scope, "name": name, "version": version, "atoms": json.dumps(mix.as_dict()),
                "description": description, "package_version": package_version, "created_at": now, "deleted": False,
            })  # fmt: skip
        except IntegrityError as error:
            raise CollisionError(f"preset {name!r} was changed at the same moment; look at it and try again") from error
        bump_revision(connection, self._scope)
        return Preset(name, version, mix, description, package_version, now)

    def delete(self, name: str) -> None:
        """Raises PresetNotFoundError, ConflictError."""
        try:
            with self._database.write() as connection:
                current = self.current(connection).get(name)
                if current is None:
                    raise PresetNotFoundError(f"preset {name[:64]!r} is not in the database", "preset")
                connection.execute(presets.insert(), {
                    "scope": self._scope, "name": name, "version": current.version + 1, "atoms": "{}", "description": "",
                    "package_version": current.package_version, "created_at": time.time(), "deleted": True,
                })  # fmt: skip
                bump_revision(connection, self._scope)
        except IntegrityError as error:
            raise CollisionError(f"preset {name!r} was changed at the same moment; look at it and try again") from error

    def _latest(self, connection: Connection, name: str, expected: int | None) -> int:
        """The highest version of `name`, 0 for none."""
        query = select(presets.c.version, presets.c.deleted).where(
            presets.c.scope == self._scope, presets.c.name == name
        )
        row = connection.execute(query.order_by(presets.c.version.desc()).limit(1)).first()
        in_force = 0 if row is None or row.deleted else row.version
        if expected is not None and expected != in_force:
            now = f"it is at version {in_force}" if in_force else "there is none"
            raise ConflictError(
                f"preset {name!r} was expected at version {expected} and {now}; look at it and try again"
            )
        return 0 if row is None else row.version


def bump_revision(connection: Connection, scope: str) -> None:
    """Tells other replicas, at their next look, that presets or experiments have changed."""
    insert = insert_into(connection, revisions).values(scope=scope, number=1)
    connection.execute(insert.on_conflict_do_update(index_elements=["scope"], set_={"number": revisions.c.number + 1}))


def _preset(row: RowMapping | Mapping[str, Any]) -> Preset:
    mix = Mix.of(json.loads(row["atoms"]))
    return Preset(row["name"], row["version"], mix, row["description"], row["package_version"], row["created_at"])
