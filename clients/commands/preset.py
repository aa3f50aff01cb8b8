"""`atomsteer preset`: the presets of a running server. Options and output only; the server does the work."""

from __future__ import annotations

from typing import Annotated

import typer

from atoms.mix import mix_text
from clients.options import DEFAULT_SERVER, JSONOption, KeyOption, NameArgument, ServerOption

app = typer.Typer(no_args_is_help=True, help="List and change the presets of a running server.")


@app.command("list")
def list_presets(server: ServerOption = DEFAULT_SERVER, key: KeyOption = None, as_json: JSONOption = False) -> None:
    """Show the presets of the server."""
    from rich.table import Table

    from clients.server_api import ServerAPI
    from clients.tables import print_json, print_table

    with ServerAPI(server, key) as api:
        answer = api.call("GET", "presets")
    if as_json:
        return print_json(answer)
    table = Table(title=f"{len(answer['data'])} presets of {server}")
    for heading in ("name", "version", "mix", "predicted KL", "description"):
        table.add_column(heading, overflow="fold")
    for preset in answer["data"]:
        version = "fixed" if preset["fixed"] else str(preset["version"])
        kl = "not usable" if preset["predicted_kl"] is None else f"{preset['predicted_kl']:.3f}"
        table.add_row(preset["name"], version, mix_text(preset["atoms"]), kl, preset["description"])
    print_table(table)


@app.command("set")
def set_preset(
    name: NameArgument,
    mix: Annotated[
        list[str], typer.Option("--mix", help='Atoms with coefficients, such as "bulleted-list=2,code=-1".')
    ],
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    if_version: Annotated[int | None, typer.Option(help="Replace this version only; 0: only if there is none.")] = None,
    server: ServerOption = DEFAULT_SERVER,
    key: KeyOption = None,
) -> None:
    """Create a preset, or replace it by a new version."""
    from atoms.mix import parse_mix
    from clients.server_api import ServerAPI, path_part

    body = {"atoms": parse_mix(mix), "description": description, "if_version": if_version}
    with ServerAPI(server, key) as api:
        preset = api.call("PUT", f"presets/{path_part(name)}", body)
    print(f"{preset['name']} is at version {preset['version']}: {mix_text(preset['atoms'])}")


@app.command("delete")
def delete_preset(name: NameArgument, server: ServerOption = DEFAULT_SERVER, key: KeyOption = None) -> None:
    """Delete a preset. Its versions stay on record."""
    from clients.server_api import ServerAPI, path_part

    with ServerAPI(server, key) as api:
        api.call("DELETE", f"presets/{path_part(name)}")
    print(f"{name} is deleted")
