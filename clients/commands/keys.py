"""`atomsteer keys`: files of keys for `atomsteer serve --api-key-file` and `--admin-key-file`. A running server notices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Make, list and delete keys of a server. Files hold hashes, never keys.")

FileOption = Annotated[Path, typer.Option("--file", metavar="FILE", help="The key file.", show_default=False)]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is; logs show it.", show_default=False)]


@app.command()
def create(
    name: NameArgument,
    file: FileOption,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="Generation requests a minute; default: the server's.")
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Prompt and generated tokens a minute; default: the server's.")
    ] = None,
    max_concurrent_requests: Annotated[
        int | None, typer.Option(help="Generation requests at once; default: the server's.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of a key of this name.")] = False,
) -> None:
    """Make a key, add its hash to FILE (made if need be), and print the key: it cannot be shown again."""
    from server.keys import create_key
    from server.limits import Quota

    quota = Quota(requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute,
                  max_concurrent_requests=max_concurrent_requests)  # fmt: skip
    print(create_key(file, name, quota, replace=replace))


@app.command("list")
def list_keys(file: FileOption) -> None:
    """Show the names in FILE, when each key was made, and its limits."""
    from rich.table import Table

    from clients.tables import print_table
    from server.keys import read_keys

    entries = read_keys(file)
    table = Table(title=f"{len(entries)} keys in {file}")
    for heading in ("name", "created", "requests a minute", "tokens a minute", "requests at once"):
        table.add_column(heading)
    for entry in entries:
        limits = (entry.requests_per_minute, entry.tokens_per_minute, entry.max_concurrent_requests)
        table.add_row(entry.name, entry.created or "", *("" if limit is None else str(limit) for limit in limits))
    print_table(table)


@app.command()
def delete(name: NameArgument, file: FileOption) -> None:
    """Take a key out of FILE. Servers refuse it within a second."""
    from server.keys import delete_key

    delete_key(file, name)
    print(f"{name} is deleted")
