"""Connections, transactions and migrations, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import inspect, text
from sqlalchemy.exc import IntegrityError

from atoms.errors import ConfigError
from server.errors import StoreUnavailableError, error_body
from server.store import database as database_module
from server.store.database import Database
from server.store.schema import open_database, upgrade
from server.store.tables import metadata, revisions


@pytest.mark.parametrize(
    "url", ["", "nonsense", "mysql://x/y", "sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory"]
)
def test_urls_that_are_of_no_use(url: str) -> None:
    with pytest.raises(ConfigError, match="database"):
        Database.at(url)


def test_the_tables_are_what_the_migrations_make(database_url: str) -> None:
    """Column by column and index by index, so that a table changed without a migration is found."""
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    database = open_database(database_url)
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert [change for change in compare_metadata(context, metadata) if "comment" not in str(change[0])] == []
        assert set(inspect(connection).get_table_names()) == {*metadata.tables, "alembic_version"}
    database.close()


def test_upgrading_twice_or_at_the_same_time_runs_each_step_once(tmp_path: Path, new_postgresql: str) -> None:
    for url in (f"sqlite:///{tmp_path}/a.db", new_postgresql):
        done: list[tuple[str | None, str]] = []

        def run(url: str = url) -> None:
            database = Database.at(url)
            done.append(upgrade(database))
            database.close()

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(done, key=str) == [("0002", "0002")] * 3 + [(None, "0002")]


def test_a_postgresql_without_tables_is_refused_with_the_command(new_postgresql: str) -> None:
    with pytest.raises(ConfigError, match="atomsteer db upgrade"):
        open_database(new_postgresql)


def test_tables_of_a_newer_version_are_refused(database_url: str) -> None:
    database = open_database(database_url)
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(ConfigError, match="newer atomsteer"):
        open_database(database_url)


def test_sqlite_syncs_every_commit(tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{tmp_path}/new/directory/a.db")
    with database.read() as connection:
        found = [connection.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous", "foreign_keys")]
    assert found == ["wal", 2, 1]
    database.close()


def test_postgresql_syncs_every_commit(new_postgresql: str) -> None:
    database = Database.at(new_postgresql)
    with database.read() as connection:
        assert connection.scalar(text("SHOW synchronous_commit")) == "on"
    database.close()


def test_a_block_that_raises_leaves_nothing(database_url: str) -> None:
    database = open_database(database_url)
    with pytest.raises(ZeroDivisionError):
        with database.write() as connection:
            connection.execute(revisions.insert(), {"scope": "s", "number": 1})
            raise ZeroDivisionError
    with database.read() as connection:
        assert connection.execute(revisions.select()).all() == []
    with pytest.raises(IntegrityError):
        with database.write() as connection:
            connection.execute(revisions.insert(), {"scope": None, "number": 1})
    database.close()


def test_a_locked_file_is_an_outage_and_tells_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "WAIT_SECONDS", 0.1)
    database = open_database(f"sqlite:///{tmp_path}/a.db")
    holder = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailableError, match="locked") as caught:
        with database.write():
            pass
    assert "a.db" not in error_body(caught.value)["error"]["message"]
    with database.read() as connection:  # readers do not wait for writers
        assert connection.execute(revisions.select()).all() == []
    holder.execute("ROLLBACK")
    holder.close()
    with database.write():
        pass
    database.close()


def test_a_server_that_is_away_is_an_outage_without_its_password(unused_tcp_port_factory: Callable[[], int]) -> None:
    url = f"postgresql://user:sesame@127.0.0.1:{unused_tcp_port_factory()}/x"
    with pytest.raises(ConfigError, match="cannot be opened") as caught:
        open_database(url)
    assert "sesame" not in str(caught.value)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        Database.at(f"sqlite:///{tmp_path}/file/a.db")


def test_tables_of_an_earlier_version(tmp_path: Path, new_postgresql: str) -> None:
    """SQLite is brought up to date as it is opened; PostgreSQL is refused until an operator upgrades it. Rows stay."""
    from alembic import command

    from server.store.schema import _config

    for url in (f"sqlite:///{tmp_path}/a.db", new_postgresql):
        database = Database.at(url)
        with database.write() as connection:
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "0001")
            connection.execute(revisions.insert(), {"scope": "demo", "number": 7})
        if not database.is_sqlite:
            with pytest.raises(ConfigError, match="of revision 0001.*atomsteer db upgrade"):
                open_database(url)
            assert upgrade(database) == ("0001", "0002")
        opened = open_database(url)
        with opened.read() as connection:
            assert connection.execute(revisions.select()).all() == [("demo", 7)]
            assert "unit_sums" in inspect(connection).get_table_names()
        opened.close()
        database.close()
