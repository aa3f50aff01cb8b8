"""`atomsteer db`: the tables of a server's database."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Look after the database of presets and experiments.")


@app.callback()
def commands() -> None:
    """A group even while it has one command."""


@app.command("upgrade")
def upgrade_tables(
    database: Annotated[
        str | None,
        typer.Option("--database", envvar="ATOMSTEER_DATABASE", help="URL; default: the SQLite file of the user's.",
                     show_default=False),
    ] = None,
) -> None:  # fmt: skip
    """Bring the tables to this version's. A PostgreSQL needs it before the first start and after an upgrade that says so;
    SQLite files are upgraded by the server that opens them. Back up first: there is no way down."""
    from server.config import default_database
    from server.store.database import Database
    from server.store.schema import upgrade

    opened = Database.at(database or default_database())
    try:
        before, after = upgrade(opened)
    finally:
        opened.close()
    done = "has been there already" if before == after else f"came from {before or 'nothing'}"
    print(f"{opened.name} is at revision {after}; it {done}")
