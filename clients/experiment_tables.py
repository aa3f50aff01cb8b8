"""Experiments and their metrics in words and tables."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from atoms.mix import mix_text


def headline(report: dict[str, Any]) -> list[str]:
    """What a reader must know first, a sentence a line; alarms begin with ALARM."""
    experiment, units = report["experiment"], report["units"]
    state = experiment["status"] + (f": {experiment['stop_reason']}" if experiment["stop_reason"] else "")
    lines = [f"{experiment['name']}, {state}. As of {moment(report['at'])}.",
             f"{sum(units.values())} units: " + ", ".join(f"{arm} {count}" for arm, count in units.items()) + "."]  # fmt: skip
    for metric in report["metrics"]:
        if metric["primary"]:
            lines += [f"{metric['name']}: {found['arm']} {_sentence(found)}" for found in metric["differences"]]
    if report["sample_ratio"]["alarm"]:
        lines.append(f"ALARM: units do not fall to the arms as their shares say (p = {report['sample_ratio']['p_value']:.2g}). "
                     "Something loses or adds units of one arm: do not trust the differences.")  # fmt: skip
    if report["lost_records"]:
        lines.append(f"ALARM: {report['lost_records']} records were dropped because the database did not keep up.")
    lines += [f"ALARM: the guardrail on {check['metric']} is broken by arm {check['arm']}."
              for check in report["guardrails"] if check["broken"]]  # fmt: skip
    return lines


def moment(seconds: float) -> str:
    """A time in UTC, to the second."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _sentence(found: dict[str, Any]) -> str:
    against = f"{interval(found['difference'], found['low'], found['high'], signed=True)} against {found['control']}"
    return f"is {found['verdict']}: {against}." if found["low"] is not None else f"has {found['verdict']}."


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
    for row in metric_rows(metric):
        table.add_row(*row.values())
    return table


def metric_rows(metric: dict[str, Any]) -> list[dict[str, str]]:
    """What is shown of each arm, by column."""
    differences = {found["arm"]: found for found in metric["differences"]}
    rows = []
    for arm in metric["arms"]:
        found = differences.get(arm["arm"])
        rows.append({
            "arm": arm["arm"],
            "units": str(arm["units"]),
            "mean": interval(arm["mean"], arm["low"], arm["high"]),
            "difference": interval(found["difference"], found["low"], found["high"], signed=True) if found else "control",
            "p": number(found["p_value"]) if found else "",
            "verdict": found["verdict"] if found else "",
            "detectable": number(found["detectable"]) if found else "",
        })  # fmt: skip
    return rows


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
