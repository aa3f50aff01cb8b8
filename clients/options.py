"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

PackageArgument = Annotated[Path, typer.Argument(metavar="PKG", help="Directory of a package.", show_default=False)]
PackageOption = Annotated[Path, typer.Option("--package", help="Directory of a package.", show_default=False)]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Directory or hub id of the base model; default: the one the package names."),
]
MixOption = Annotated[
    list[str] | None, typer.Option("--mix", help='Atoms with coefficients, such as "bulleted-list=2,code=-1".')
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is at the output path.")]

DEFAULT_SERVER = "http://127.0.0.1:8000"
ServerOption = Annotated[
    str, typer.Option("--server", envvar="ATOMSTEER_SERVER", help="URL of the server.", show_default=True)
]
KeyOption = Annotated[
    str | None,
    typer.Option("--key", envvar=["ATOMSTEER_ADMIN_KEY", "ATOMSTEER_API_KEY"], help="Its key; changes need an admin key.",
                 show_default=False),
]  # fmt: skip
JSONOption = Annotated[bool, typer.Option("--json", help="The server's answer as JSON.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", show_default=False)]


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in names(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as -2,2") from error


def refuse_given(context: typer.Context, parameters: Sequence[str], reason: str) -> None:
    """Raises typer.BadParameter if one of `parameters` stands on the command line, where it would change nothing."""
    asked = (parameter for parameter in context.command.params if parameter.name in parameters)
    given = [parameter.opts[0] for parameter in asked if _on_command_line(context, str(parameter.name))]
    if given:
        raise typer.BadParameter(f"{', '.join(given)} would change nothing: {reason}")


def _on_command_line(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"  # typer brings a click of its own: by name, not identity


def quiet_libraries() -> None:
    """Keeps transformers' own bars and notices out of our output; errors still raise."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
