"""The database behind a server: SQLite in a file, or PostgreSQL by URL. Connections, transactions and their errors.

Knows no table. A transaction that has ended without an error is on disk: SQLite runs in WAL mode with
``synchronous=FULL``, PostgreSQL with its own default, ``synchronous_commit=on``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from sqlalchemy import Connection, Engine, Table, create_engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import ConnectionPoolEntry

from atoms.errors import ConfigError
from server.errors import DeadlockError, StoreUnavailableError

WAIT_SECONDS = 5
"""How long a statement waits for another process's lock, or for a connection, before the database counts as away."""
_WRITES, _FILE = "atomsteer_writes", "atomsteer_file"
_log = logging.getLogger("atomsteer.store")


class Database:
    """Transactions on one database. Threads may share an instance."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def at(cls, url: str) -> Database:
        """A database that is not connected to yet. Raises ConfigError for a URL of another kind."""
        parsed = _parse(url)
        if parsed.get_backend_name() == "sqlite":
            return cls(_sqlite_engine(parsed))
        return cls(_postgresql_engine(parsed))

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @property
    def name(self) -> str:
        """For messages: the URL without its password."""
        return self.engine.url.render_as_string(hide_password=True)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that changes nothing. Raises StoreUnavailableError."""
        with self._transaction(writes=False) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is durable once the block has been left, and undone if the block raises.

        Raises StoreUnavailableError where the database is locked, full, read-only or away, and DeadlockError: nothing was
        written then.
        """
        with self._transaction(writes=True) as connection:
            yield connection

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[Connection]:
        try:
            with self.engine.connect().execution_options(**{_WRITES: writes}) as connection, connection.begin():
                yield connection
        except (DBAPIError, PoolTimeoutError) as error:
            if isinstance(error, DBAPIError) and not _is_outage(error):
                raise
            if type(getattr(error, "orig", None)).__name__ == _DEADLOCK:
                raise DeadlockError(f"{self.name}: {_cause(error)}") from error
            _log.error("the database cannot be used: %s", _cause(error))
            raise StoreUnavailableError(f"{self.name} cannot be used: {_cause(error)}") from error


def insert_into(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that can say ``on_conflict_do_nothing`` and ``on_conflict_do_update``, which both databases know."""
    return (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(table)


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = None
    if parsed is None or parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(
            "the database's URL is of no kind that can be used; write sqlite:////absolute/path.db, "
            "sqlite:///relative.db or postgresql://user:password@host/name"
        )
    if parsed.get_backend_name() == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if not parsed.database or parsed.database == ":memory:" or parsed.database.startswith("file:"):
        raise ConfigError("the database must be a file, or nothing survives the process; write sqlite:///path.db")
    return parsed


def _sqlite_engine(url: URL) -> Engine:
    path = Path(url.database or "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"directory {path.parent} of the database cannot be made ({error.strerror}); choose another --database"
        ) from error
    engine = create_engine(url, connect_args={"timeout": WAIT_SECONDS}, pool_timeout=WAIT_SECONDS)
    event.listen(engine, "connect", partial(_set_up_sqlite, path))
    event.listen(engine, "begin", partial(_begin_sqlite, path))
    return engine


def _set_up_sqlite(path: Path, connection, record: ConnectionPoolEntry) -> None:  # type: ignore[no-untyped-def]
    connection.isolation_level = None  # the driver must not begin transactions of its own
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")
    record.info[_FILE] = _identity(path)  # a new one is made by the first pragma


def _begin_sqlite(path: Path, connection: Connection) -> None:
    """A writer takes the lock at once: one that began by reading could not wait for it later. It is refused where its file
    was removed or replaced: SQLite would write on into what nobody can open again."""
    writes = connection.get_execution_options().get(_WRITES, True)
    if writes and connection.info[_FILE] != _identity(path):
        raise StoreUnavailableError(
            f"{path} was removed or replaced while it was open; put it back, or restart the server"
        )
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file at `path`; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _postgresql_engine(url: URL) -> Engine:
    patience = {"connect_timeout": WAIT_SECONDS}
    try:
        engine = create_engine(url, connect_args=patience, pool_pre_ping=True, pool_timeout=WAIT_SECONDS)
    except (NoSuchModuleError, ImportError, SQLAlchemyError) as error:
        raise ConfigError(
            f"PostgreSQL needs the driver psycopg ({error}); pip install 'atomsteer[postgresql]'"
        ) from error
    event.listen(engine, "connect", _set_up_postgresql)
    return engine


def _set_up_postgresql(connection, _record: ConnectionPoolEntry) -> None:  # type: ignore[no-untyped-def]
    connection.execute(f"SET lock_timeout = '{WAIT_SECONDS}s'")
    connection.commit()


def _is_outage(error: DBAPIError) -> bool:
    """Whether the database, and not the statement, is at fault."""
    kind = type(error.orig).__name__
    return (
        error.connection_invalidated
        or kind in _OUTAGES
        or type(error).__name__ in ("OperationalError", "InterfaceError")
    )


_DEADLOCK = "DeadlockDetected"
_OUTAGES = frozenset({"ReadOnlySqlTransaction", "InsufficientPrivilege", "AdminShutdown", "DiskFull"})


def _cause(error: SQLAlchemyError) -> str:
    """The driver's own words, on one line, without the statement and its values."""
    return " ".join(str(getattr(error, "orig", None) or error).split())[:300]
