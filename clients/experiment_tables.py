"""Experiments and their metrics as tables for the terminal."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from clients.preset import mix_text

_LEAST_WIDTH = 120
"""Columns of a table where the output is no terminal, or a narrow one: cells that fold everywhere cannot be read."""


def print_table(table: Table) -> None:
    """Prints it; names and descriptions are an operator's text and no markup."""
    Console(width=max(Console().width, _LEAST_WIDTH), markup=False).print(table)


def print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))


def arm_table(experiment: dict[str, Any]) -> Table:
    """One row an arm."""
    reason = f" ({experiment['stop_reason']})" if experiment["stop_reason"] else ""
    table = Table(
        title=f"{experiment['name']}: {experiment['status']}{reason}",
        caption=f"units from {experiment['unit']}, coverage {experiment['coverage']:.0%}, "
        f"primary metric {experiment['primary'] or 'none'}, package version {experiment['package_version']}",
    )
    for heading in ("arm", "share", "mix", "preset", "predicted KL"):
        table.add_column(heading, overflow="fold")
    for arm in experiment["arms"]:
        control = " (control)" if arm["name"] == experiment["control"] else ""
        preset = f"{arm['preset']} v{arm['preset_version']}" if arm["preset_version"] else arm["preset"] or ""
        table.add_row(f"{arm['name']}{control}", f"{arm['share']:.1%}", mix_text(arm["atoms"]), preset,
                      f"{arm['predicted_kl']:.3f}")  # fmt: skip
    return table


def metric_table(metric: dict[str, Any]) -> Table:
    """One row an arm: its mean, and its difference to the control, each with its interval."""
    marks = [
        mark
        for mark, holds in (("primary", metric["primary"]), ("recorded by the server", metric["automatic"]))
        if holds
    ]
    title = metric["name"] + (f" ({', '.join(marks)})" if marks else "")
    goal = f"{metric['kind']}, the goal is to {metric['goal']} it" if metric["goal"] else metric["kind"]
    table = Table(title=title, caption=goal)
    for heading in ("arm", "units", "mean", "difference to control", "p", "verdict", "detectable"):
        table.add_column(heading, overflow="fold")
    differences = {found["arm"]: found for found in metric["differences"]}
    for arm in metric["arms"]:
        found = differences.get(arm["arm"])
        row = [arm["arm"], str(arm["units"]), interval(arm["mean"], arm["low"], arm["high"])]
        if found is None:
            row += ["control", "", "", ""]
        else:
            row += [interval(found["difference"], found["low"], found["high"], signed=True), number(found["p_value"]),
                    found["verdict"], number(found["detectable"])]  # fmt: skip
        table.add_row(*row)
    return table


def guardrail_table(checks: list[dict[str, Any]]) -> Table:
    """One row a guardrail and arm."""
    table = Table(title="guardrails")
    for heading in ("metric", "arm", "limit", "seen", "surely above", ""):
        table.add_column(heading, overflow="fold")
    for check in checks:
        limit = number(check["limit"]) + (" above the control" if check["relative_to_control"] else "")
        table.add_row(check["metric"], check["arm"], limit, number(check["value"]), number(check["low"]),
                      "broken" if check["broken"] else "holds")  # fmt: skip
    return table


def interval(value: float | None, low: float | None, high: float | None, *, signed: bool = False) -> str:
    """``0.5 [0.4, 0.6]``; the value alone where there is no interval."""
    if value is None:
        return "no data"
    return number(value, signed=signed) + ("" if low is None else f" [{number(low)}, {number(high)}]")


def number(value: float | None, *, signed: bool = False) -> str:
    """Four digits at most."""
    return "" if value is None else f"{value:+.4g}" if signed else f"{value:.4g}"
