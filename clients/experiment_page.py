"""An experiment's report as one HTML page: self-contained, without scripts, plots as inline SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from clients.experiment_tables import headline, metric_rows, moment, number
from offline.svg import Figure, Scale

_COLOURS = ("#2f6fdf", "#d9822b", "#1a7f4b", "#8e44ad", "#c0392b", "#16a2b8", "#7f6a1a", "#555f6e")
_WIDTH, _LEFT, _RIGHT = 760, 150, 740
_NAME = 20
"""Letters of an arm's name beside its line."""


def render_page(report: dict[str, Any]) -> str:
    """The page of a report as ``GET /v1/experiments/{name}/report`` gives it; `looks` in it become a plot over time."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(number=number, moment=moment)
    template = resources.files("clients") / "templates" / "experiment.html.j2"
    lines = headline(report)
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        experiment=report["experiment"],
        units=report["units"],
        lines=[line for line in lines if not line.startswith("ALARM")],
        alarms=[line for line in lines if line.startswith("ALARM")],
        metrics=[metric | {"plot": _forest(metric), "rows": metric_rows(metric)} for metric in report["metrics"]],
        timeline=_timeline(report.get("looks", [])),
        guardrails=report["guardrails"],
        history=report["history"],
    )


def _forest(metric: dict[str, Any]) -> Markup | None:
    """Differences to the control with their intervals, one line an arm; None where no interval is known yet."""
    found = [difference for difference in metric["differences"] if difference["low"] is not None]
    if not found:
        return None
    height = 34 * len(found) + 40
    figure = Figure(_WIDTH, height, f"Differences of {metric['name']} to the control with intervals")
    x = Scale(*_span(found), _LEFT, _RIGHT)
    figure.rule(x(0), 8, x(0), height - 24, "zero")
    for place, difference in enumerate(found):
        y, colour = 24 + 34 * place, _colour(place)
        left, middle, right = (f"{x(difference[key]):.1f}" for key in ("low", "difference", "high"))
        figure.text(0, y + 4, difference["arm"][:_NAME])
        figure.add("line", x1=left, x2=right, y1=y, y2=y, stroke=colour, stroke_width=3)
        figure.add("circle", cx=middle, cy=y, r=5, fill=colour)
    for tick in x.ticks():
        figure.text(x(tick), height - 8, f"{tick:.4g}", "middle")
    return figure.render()


def _timeline(looks: Sequence[dict[str, Any]]) -> Markup | None:
    """The primary metric's differences and intervals against the number of units; None before two looks show any."""
    known = list(_known(looks))
    units = sorted({look for look, _ in known})
    if len(units) < 2:
        return None
    figure = Figure(_WIDTH, 280, "Differences to the control against units, with intervals")
    x, y = Scale(units[0], units[-1], _LEFT, _RIGHT), Scale(*_span([found for _, found in known]), 250, 20)
    figure.rule(_LEFT, y(0), _RIGHT, y(0), "zero")
    for place, arm in enumerate(found["arm"] for found in looks[-1]["differences"]):
        mine = [(x(look), found) for look, found in known if found["arm"] == arm]
        if len(mine) < 2:
            continue
        upper, middle, lower = (
            [f"{at:.1f},{y(found[key]):.1f}" for at, found in mine] for key in ("high", "difference", "low")
        )
        figure.add("polygon", points=" ".join([*upper, *reversed(lower)]), fill=_colour(place), opacity=0.15)
        figure.add("polyline", points=" ".join(middle), fill="none", stroke=_colour(place), stroke_width=2)
        figure.add("text", arm[:_NAME], x=0, y=30 + 20 * place, style=f"fill:{_colour(place)}")
    figure.text(_LEFT - 6, 24, number(y.high), "end")
    figure.text(_LEFT - 6, 254, number(y.low), "end")
    figure.text(_LEFT, 272, f"{units[0]} units")
    figure.text(_RIGHT, 272, f"{units[-1]} units", "end")
    return figure.render()


def _known(looks: Sequence[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(units, difference) of every look at which a difference has an interval."""
    for look in looks:
        yield from ((look["units"], found) for found in look["differences"] if found["low"] is not None)


def _colour(place: int) -> str:
    return _COLOURS[place % len(_COLOURS)]


def _span(found: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """The range of a plot: all intervals and 0, with room."""
    low = min(0.0, *(difference["low"] for difference in found))
    high = max(0.0, *(difference["high"] for difference in found))
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room
