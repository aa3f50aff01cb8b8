"""The `atomsteer` command. Its subcommands are in `commands/`.

Only typer is imported here and there; each command imports what it needs, so `--help` answers at once. Errors that
atomsteer raises on purpose are printed without a traceback, and the exit status is 2.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from clients.commands import (
    database,
    discovery,
    experiment,
    generation,
    keys,
    measuring,
    packages,
    preset,
    serving,
)


class Commands(TyperGroup):
    """Says what Ctrl-C leaves. Typer would turn it into a bare exit before `main` could."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("interrupted; what was finished is kept", file=sys.stderr)
            raise SystemExit(130) from None


app = typer.Typer(
    name="atomsteer",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Finds a model's behaviours as atoms and serves any mix of them, per request, through an OpenAI-compatible API.",
)

for group in (discovery, packages, serving, generation, measuring):
    app.add_typer(group.app)  # without a name: its commands are atomsteer's own
app.add_typer(experiment.app, name="experiment")
app.add_typer(preset.app, name="preset")
app.add_typer(database.app, name="db")
app.add_typer(keys.app, name="keys")


def main() -> None:
    """Entry point of the console script."""
    from atoms.errors import AtomsteerError

    try:
        app()
    except AtomsteerError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@app.callback(invoke_without_command=True)
def version_option(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"atomsteer {installed('atomsteer')}")
        raise typer.Exit


if __name__ == "__main__":
    main()
