"""`atomsteer experiment`: the experiments of a running server. Options and output only; the server does the work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atoms.errors import ConfigError
from atoms.mix import mix_text
from clients.options import DEFAULT_SERVER, JSONOption, KeyOption, NameArgument, ServerOption

if TYPE_CHECKING:
    from clients.server_api import ServerAPI

app = typer.Typer(no_args_is_help=True, help="Run A/B experiments on mixes on a running server.")

SpecOption = Annotated[
    Path | None, typer.Option("--file", help="The whole spec as JSON; then no other option describes it.")
]
_NOT_OF_THE_SPEC = ("name", "file", "start_now", "server", "key", "as_json")
"""Parameters of `create` that may stand beside ``--file``."""


@app.command("create")
def create(
    context: typer.Context,
    name: NameArgument,
    arm: Annotated[
        list[str] | None,
        typer.Option("--arm", help='"NAME=atom=coefficient,…", "NAME=" (unsteered) or "NAME=@preset"; repeat.'),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight", help="\"NAME=2\": an arm's part of the units beside the others', 1 if not said; repeat."
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", help='What clients report: "NAME[:proportion|mean][:increase|decrease][:zero]"; repeat.'
        ),
    ] = None,
    primary: Annotated[str | None, typer.Option(help="The metric that decides; default: the first --metric.")] = None,
    control: Annotated[
        str | None, typer.Option(help="The arm to compare with; default: holdout, else the first.")
    ] = None,
    holdout: Annotated[float, typer.Option(help="Share of units that get the server's default mix.")] = 0.0,
    coverage: Annotated[float, typer.Option(help="Share of units that take part.")] = 1.0,
    unit: Annotated[str, typer.Option(help="user, metadata:KEY or header:NAME.")] = "user",
    missing_unit: Annotated[
        str, typer.Option(help="A request without a unit: error, or outside (the control's mix, not recorded).")
    ] = "error",
    seed: Annotated[str | None, typer.Option(help="Of the assignment; default: the name.")] = None,
    guardrail: Annotated[
        list[str] | None,
        typer.Option("--guardrail", help='"METRIC<LIMIT", or "METRIC<+LIMIT" above the control; repeat.'),
    ] = None,
    max_kl: Annotated[float | None, typer.Option(help="Most predicted KL of an arm, nats a token.")] = None,
    alpha: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.05,
    horizon: Annotated[int, typer.Option(help="Units that you expect to need; see plan.")] = 2000,
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    file: SpecOption = None,
    start_now: Annotated[bool, typer.Option("--start", help="Start it at once.")] = False,
    server: ServerOption = DEFAULT_SERVER,
    key: KeyOption = None,
    as_json: JSONOption = False,
) -> None:
    """Create an experiment as a draft."""
    from clients.experiment_spec import arms, guardrails, metrics, read_spec
    from clients.server_api import ServerAPI

    if file is not None:
        _refuse_beside_file(context)
        spec = {"name": name} | read_spec(file)
        if spec["name"] != name:
            raise ConfigError(
                f"{file} is the spec of {str(spec['name'])[:64]!r}, not of {name!r}; make the names agree, or leave it out"
            )
    else:
        spec = {
            "name": name, "description": description, "arms": arms(arm or [], weight or []),
            "metrics": metrics(metric or []), "guardrails": guardrails(guardrail or []), "primary": primary,
            "control": control, "holdout": holdout, "coverage": coverage, "unit": unit, "missing_unit": missing_unit,
            "seed": seed, "max_kl": max_kl, "alpha": alpha, "horizon": horizon,
        }  # fmt: skip
    with ServerAPI(server, key) as api:
        experiment = api.call("POST", "experiments", spec)
        if start_now:
            experiment = _started(api, name)
    _show(experiment, as_json)


@app.command("list")
def list_experiments(server: ServerOption = DEFAULT_SERVER, key: KeyOption = None, as_json: JSONOption = False) -> None:
    """Show the experiments of the server, newest first."""
    from rich.table import Table

    from clients.server_api import ServerAPI
    from clients.tables import print_json, print_table

    with ServerAPI(server, key) as api:
        answer = api.call("GET", "experiments")
    if as_json:
        return print_json(answer)
    table = Table(title=f"{len(answer['data'])} experiments of {server}")
    for heading in ("name", "status", "arms", "coverage", "primary metric", "description"):
        table.add_column(heading, overflow="fold")
    for found in answer["data"]:
        table.add_row(found["name"], found["status"], " ".join(arm["name"] for arm in found["arms"]),
                      f"{found['coverage']:.0%}", found["primary"] or "", found["description"])  # fmt: skip
    print_table(table)


@app.command("status")
def status(
    name: NameArgument, server: ServerOption = DEFAULT_SERVER, key: KeyOption = None, as_json: JSONOption = False
) -> None:
    """Show one experiment: its arms, shares and state."""
    from clients.server_api import ServerAPI, path_part

    with ServerAPI(server, key) as api:
        _show(api.call("GET", f"experiments/{path_part(name)}"), as_json)


@app.command("report")
def report(
    name: NameArgument,
    html: Annotated[Path | None, typer.Option("--html", help="Also write a self-contained page with plots.")] = None,
    looks: Annotated[
        int | None, typer.Option(help="Times since the start to tell the primary metric at; default: 20 with --html.")
    ] = None,
    server: ServerOption = DEFAULT_SERVER,
    key: KeyOption = None,
    as_json: JSONOption = False,
) -> None:
    """Show what an experiment has found so far. Looking costs nothing: the intervals hold however often one looks."""
    from clients.experiment_tables import guardrail_table, headline, metric_table
    from clients.server_api import PATIENCE, ServerAPI, path_part
    from clients.tables import print_json, print_table

    if looks is not None and html is None and not as_json:
        raise typer.BadParameter("--looks are shown by --html and --json; give one of them")
    looks = (20 if html else 0) if looks is None else looks
    with ServerAPI(server, key) as api:
        found = api.call("GET", f"experiments/{path_part(name)}/report", seconds=PATIENCE, looks=looks)
    if html is not None:
        from atoms.storage import write_bytes
        from clients.experiment_page import render_page

        write_bytes(html, render_page(found).encode())
    if as_json:
        return print_json(found)
    print("\n".join(headline(found)))
    for metric in found["metrics"]:
        print_table(metric_table(metric))
    if found["guardrails"]:
        print_table(guardrail_table(found["guardrails"]))
    if html is not None:
        print(html)


@app.command("start")
def start(
    name: NameArgument, server: ServerOption = DEFAULT_SERVER, key: KeyOption = None, as_json: JSONOption = False
) -> None:
    """Start a draft. From then on its arms cannot be changed."""
    _post(name, "start", {}, server, key, as_json)


@app.command("ramp")
def ramp(
    name: NameArgument,
    coverage: Annotated[float, typer.Argument(help="Share of units that take part from now on.")],
    server: ServerOption = DEFAULT_SERVER,
    key: KeyOption = None,
    as_json: JSONOption = False,
) -> None:
    """Change the share of units that take part. Nobody changes arms."""
    _post(name, "ramp", {"coverage": coverage}, server, key, as_json)


@app.command("stop")
def stop(
    name: NameArgument,
    reason: Annotated[str, typer.Option(help="For the history.")] = "stopped by an operator",
    server: ServerOption = DEFAULT_SERVER,
    key: KeyOption = None,
    as_json: JSONOption = False,
) -> None:
    """Stop an experiment. Requests that still name it get the control's mix."""
    _post(name, "stop", {"reason": reason}, server, key, as_json)


@app.command("promote")
def promote(
    name: NameArgument,
    arm: Annotated[str, typer.Argument(help="The arm whose mix is kept.")],
    preset: Annotated[str, typer.Argument(help="The preset that it becomes.")],
    server: ServerOption = DEFAULT_SERVER,
    key: KeyOption = None,
) -> None:
    """Make an arm's mix a preset."""
    from clients.server_api import ServerAPI, path_part

    with ServerAPI(server, key) as api:
        made = api.call("POST", f"experiments/{path_part(name)}/promote", {"arm": arm, "preset": preset})
    print(f"{made['name']} is at version {made['version']}: {mix_text(made['atoms'])}")


@app.command("delete")
def delete(name: NameArgument, server: ServerOption = DEFAULT_SERVER, key: KeyOption = None) -> None:
    """Delete an experiment that does not run, with all that was observed."""
    from clients.server_api import PATIENCE, ServerAPI, path_part

    with ServerAPI(server, key) as api:
        api.call("DELETE", f"experiments/{path_part(name)}", seconds=PATIENCE)
    print(f"{name} is deleted")


@app.command("export")
def export(
    name: NameArgument,
    out: Annotated[Path, typer.Option("--out", help="Directory of the Parquet files.")] = Path(),
    server: ServerOption = DEFAULT_SERVER,
    key: KeyOption = None,
) -> None:
    """Write exposures, responses and outcomes as Parquet."""
    from atoms.storage import storage_errors
    from clients.server_api import ServerAPI, path_part

    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with ServerAPI(server, key) as api:
        for table in ("exposures", "responses", "outcomes"):
            file = out / f"{name}-{table}.parquet"
            api.download(f"experiments/{path_part(name)}/export", file, table=table)
            print(file)


@app.command("forget")
def forget(
    unit: Annotated[str, typer.Argument(help="The unit, as requests named it.")],
    server: ServerOption = DEFAULT_SERVER,
    key: KeyOption = None,
) -> None:
    """Delete all that was observed of a unit, in every experiment of the server's database, other packages' too."""
    from clients.server_api import PATIENCE, ServerAPI, path_part

    with ServerAPI(server, key) as api:
        gone = api.call("DELETE", f"units/{path_part(unit)}", seconds=PATIENCE)
    print(f"{gone['rows']} records of {unit} are deleted")


@app.command("plan")
def plan(
    effect: Annotated[float | None, typer.Option(help="The smallest difference to find, in the metric's unit.")] = None,
    units: Annotated[int | None, typer.Option(help="Units that there will be, to learn the effect instead.")] = None,
    rate: Annotated[float | None, typer.Option(help="For a proportion: its value today.")] = None,
    deviation: Annotated[
        float | None, typer.Option(help="For a mean: the standard deviation of a unit's value.")
    ] = None,
    arms: Annotated[int | None, typer.Option(min=2, help="Arms in all, of equal shares; default: 2.")] = None,
    shares: Annotated[
        str | None,
        typer.Option(help='Shares of the arms instead, the control\'s first, such as "0.1,0.45,0.45" or "1,1,2".'),
    ] = None,
    power: Annotated[float, typer.Option(help="Probability of finding the effect.")] = 0.8,
    alpha: Annotated[float, typer.Option(help="Probability of finding one that is not there.")] = 0.05,
) -> None:
    """How many units an experiment needs, or what so many units can find, before it is run. Asks no server."""
    from clients.experiment_spec import Plan, arm_shares

    planned = Plan(arm_shares(arms, shares), power, alpha, rate, deviation)
    if (effect is None) == (units is None):
        raise typer.BadParameter("give --effect to learn how many units are needed, or --units to learn the effect")
    if effect is not None:
        needed = planned.units(effect)
        print(f"{needed} units in all ({planned.smallest(needed)} in the smallest arm) find a difference of {effect:g} with "
              f"probability {power:g}; use --horizon {needed}")  # fmt: skip
    elif units is not None:
        print(f"{units} units in all ({planned.smallest(units)} in the smallest arm) find a difference of "
              f"{planned.effect(units):.4g} or more with probability {power:g}; use --horizon {units}")  # fmt: skip


def _started(api: ServerAPI, name: str) -> dict[str, Any]:
    """Starts what has just been created. Raises ServerAnswerError, which says what is left."""
    from clients.server_api import ServerAnswerError, path_part

    try:
        return api.call("POST", f"experiments/{path_part(name)}/start", {})
    except ServerAnswerError as error:
        raise ServerAnswerError(
            f"{error}; {name!r} is a draft now: start it with `atomsteer experiment start`, or delete it and create it anew",
            error.status,
        ) from error


def _post(name: str, action: str, body: dict[str, Any], server: str, key: str | None, as_json: bool) -> None:
    from clients.server_api import ServerAPI, path_part

    with ServerAPI(server, key) as api:
        _show(api.call("POST", f"experiments/{path_part(name)}/{action}", body), as_json)


def _show(experiment: dict[str, Any], as_json: bool) -> None:
    from clients.experiment_tables import arm_table
    from clients.tables import print_json, print_table

    if as_json:
        return print_json(experiment)
    print_table(arm_table(experiment))


def _refuse_beside_file(context: typer.Context) -> None:
    """Raises typer.BadParameter for an option that the file would silently win over."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name not in _NOT_OF_THE_SPEC and source is not None and source.name != "DEFAULT":
            raise typer.BadParameter(f"--file holds the whole spec; write {parameter.opts[0]} into it")
