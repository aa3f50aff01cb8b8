"""Brings a database to this version's tables, and refuses one that is not there.

A SQLite file belongs to one host and is brought up to date when a server opens it. A PostgreSQL database is shared by
replicas of perhaps two versions, so an operator decides when: ``atomsteer db upgrade``.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from atoms.errors import ConfigError
from server.errors import StoreUnavailableError
from server.store.database import Database

_LOCK = 0x61746F6D  # any number that only atomsteer takes


def open_database(url: str) -> Database:
    """A database with this version's tables. Raises ConfigError: a URL of another kind, no connection, other tables."""
    database = Database.at(url)
    try:
        if database.is_sqlite:
            upgrade(database)
        else:
            _check(database)
    except StoreUnavailableError as error:
        database.close()
        raise ConfigError(f"the database cannot be opened: {error}; give another --database, or none") from error
    except BaseException:
        database.close()
        raise
    return database


def upgrade(database: Database) -> tuple[str | None, str]:
    """Runs the missing steps in one transaction; of several processes one does, the others wait.

    Returns the revisions before and after. Raises StoreUnavailableError, ConfigError for tables of a newer version.
    """
    config = _config()
    with database.write() as connection:
        if not database.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        before = _revision(connection)
        _refuse_unknown(database, before)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        return before, _head()


def _check(database: Database) -> None:
    with database.read() as connection:
        found = _revision(connection)
    _refuse_unknown(database, found)
    if found != _head():
        raise ConfigError(
            f"the tables of {database.name} are {'missing' if found is None else f'of revision {found}'} and this version "
            f"needs revision {_head()}; run: atomsteer db upgrade --database URL"
        )


def _refuse_unknown(database: Database, revision: str | None) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if revision is not None and revision not in known:
        raise ConfigError(
            f"the tables of {database.name} are of revision {revision}, which a newer atomsteer made; use that version"
        )


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _head() -> str:
    return ScriptDirectory.from_config(_config()).get_current_head() or ""


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config
