"""An experiment's report as one HTML page: self-contained, without scripts, plots as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from clients.experiment_tables import interval, number

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ experiment.name }} · atomsteer</title><style>
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); --good: #1a7f4b;
  --bad: #c0392b; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); } th { font-weight: 600; }
.alarm { border-left: 4px solid var(--bad); padding: .4rem .8rem; } .better { color: var(--good); }
.worse { color: var(--bad); } .quiet { opacity: .75; } svg { width: 100%; height: auto; max-height: 24rem; }
svg text { fill: currentColor; font-size: 12px; } .axis { stroke: var(--line); } .zero { stroke: currentColor; opacity: .5; }
</style></head><body>
<h1>{{ experiment.name }}</h1>
{% for line in lines %}<p{% if loop.first %} class="quiet"{% endif %}>{{ line }}</p>
{% endfor %}
{% for alarm in alarms %}<p class="alarm" role="alert">{{ alarm }}</p>
{% endfor %}
<h2>Arms</h2>
<div class="scroll"><table><thead><tr><th>arm<th>share<th>units<th>mix<th>predicted KL, nats a token</tr></thead><tbody>
{% for arm in experiment.arms %}<tr><td>{{ arm.name }}{% if arm.name == experiment.control %} (control){% endif %}
<td>{{ "%.1f%%" % (arm.share * 100) }}<td>{{ units[arm.name] }}
<td>{% for atom, value in arm.atoms.items() %}{{ atom }} {{ "%+g" % value }} {% else %}unsteered{% endfor %}
{%- if arm.preset %}(preset {{ arm.preset }}){% endif %}<td>{{ "%.3f" % arm.predicted_kl }}</tr>
{% endfor %}</tbody></table></div>
{% for metric in metrics %}
<h2>{{ metric.name }}{% if metric.primary %} · primary{% endif %}</h2>
<p class="quiet">{{ metric.kind }}{% if metric.goal %}, to {{ metric.goal }}{% endif %}
{%- if metric.automatic %}, recorded by the server{% endif %}</p>
{% if metric.plot %}{{ metric.plot }}{% endif %}
{% if metric.primary and timeline %}{{ timeline }}{% endif %}
<div class="scroll"><table><thead><tr><th>arm<th>units<th>mean<th>difference to {{ experiment.control }}<th>p<th>verdict
<th>detectable
</tr></thead><tbody>
{% for row in metric.rows %}<tr><td>{{ row.arm }}<td>{{ row.units }}<td>{{ row.mean }}<td>{{ row.difference }}
<td>{{ row.p }}<td class="{{ row.verdict }}">{{ row.verdict }}<td>{{ row.detectable }}</tr>
{% endfor %}</tbody></table></div>
{% endfor %}
{% if guardrails %}<h2>Guardrails</h2>
<div class="scroll"><table><thead><tr><th>metric<th>arm<th>limit<th>seen<th>surely above<th></tr></thead><tbody>
{% for check in guardrails %}<tr><td>{{ check.metric }}<td>{{ check.arm }}
<td>{{ check.limit }}{% if check.relative_to_control %} above the control{% endif %}
<td>{{ number(check.value) }}<td>{{ number(check.low) }}<td>{{ "broken" if check.broken else "holds" }}</tr>
{% endfor %}</tbody></table></div>{% endif %}
<h2>History</h2>
<ul>{% for event in history %}<li>{{ moment(event.at) }}: {{ event.kind }}
{%- for name, value in event.detail.items() %}, {{ name }} {{ value }}{% endfor %}</li>
{% endfor %}</ul>
<p class="quiet">Intervals are always valid: with probability {{ "%g" % (100 * (1 - experiment.alpha)) }}% all differences of
one metric that are ever shown have the truth in their intervals, so looking often costs nothing. The interval of a single
mean of skewed values, such as revenue, misses it more often. Metrics are not corrected for each other; the primary one
decides.</p>
</body></html>
"""
_COLOURS = ("#2f6fdf", "#d9822b", "#1a7f4b", "#8e44ad", "#c0392b", "#16a2b8", "#7f6a1a", "#555f6e")
_WIDTH, _LEFT, _RIGHT = 760, 150, 20


def render_page(report: dict[str, Any]) -> str:
    """The page of a report as ``GET /v1/experiments/{name}/report`` gives it; `looks` in it become a plot over time."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(number=number, moment=moment)
    lines = headline(report)
    return environment.from_string(_PAGE).render(
        experiment=report["experiment"],
        units=report["units"],
        lines=[line for line in lines if not line.startswith("ALARM")],
        alarms=[line for line in lines if line.startswith("ALARM")],
        metrics=[metric | {"plot": _forest(metric), "rows": _rows(metric)} for metric in report["metrics"]],
        timeline=_timeline(report.get("looks", [])),
        guardrails=report["guardrails"],
        history=report["history"],
    )


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


def _rows(metric: dict[str, Any]) -> list[dict[str, str]]:
    differences = {found["arm"]: found for found in metric["differences"]}
    rows = []
    for arm in metric["arms"]:
        found = differences.get(arm["arm"])
        rows.append({
            "arm": arm["arm"],
            "units": arm["units"],
            "mean": interval(arm["mean"], arm["low"], arm["high"]),
            "difference": interval(found["difference"], found["low"], found["high"], signed=True) if found else "",
            "p": number(found["p_value"]) if found else "",
            "verdict": found["verdict"] if found else "control",
            "detectable": number(found["detectable"]) if found else "",
        })  # fmt: skip
    return rows


def _forest(metric: dict[str, Any]) -> Markup | None:
    """Differences to the control with their intervals, one line an arm; None where no interval is known yet."""
    found = [difference for difference in metric["differences"] if difference["low"] is not None]
    if not found:
        return None
    low, high = _span([value for d in found for value in (d["low"], d["high"])])
    height, parts = 34 * len(found) + 40, []
    for place, difference in enumerate(found):
        y, colour = 24 + 34 * place, _COLOURS[place % len(_COLOURS)]
        left, middle, right = (_x(difference[key], low, high) for key in ("low", "difference", "high"))
        parts.append(
            Markup(
                '<text x="0" y="{}">{}</text><line x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}" stroke="{}" stroke-width="3"/>'
                '<circle cx="{:.1f}" cy="{}" r="5" fill="{}"/>'
            ).format(y + 4, difference["arm"][:20], left, right, y, y, colour, middle, y, colour)
        )
    zero = _x(0.0, low, high)
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">'
        '<line class="zero" x1="{:.1f}" x2="{:.1f}" y1="8" y2="{}"/>{}{}</svg>'
    ).format(_WIDTH, height, f"Differences of {metric['name']} to the control with intervals", zero, zero, height - 24,
             Markup("").join(parts), _scale(low, high, height - 8))  # fmt: skip


def _timeline(looks: Sequence[dict[str, Any]]) -> Markup | None:
    """The primary metric's differences and intervals against the number of units; None before two looks show any."""
    arms = [found["arm"] for found in looks[-1]["differences"]] if looks else []
    known = [(look["units"], d) for look in looks for d in look["differences"] if d["low"] is not None]
    series = {arm: [(units, d) for units, d in known if d["arm"] == arm] for arm in arms}
    points = [point for found in series.values() for point in found]
    if len({units for units, _ in points}) < 2:
        return None
    low, high = _span([value for _, d in points for value in (d["low"], d["high"])])
    first, last = min(units for units, _ in points), max(units for units, _ in points)

    def x(units: float) -> float:
        return _LEFT + (units - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return 250 - (value - low) / (high - low) * 230

    parts = []
    for place, (arm, found) in enumerate(series.items()):
        if len(found) < 2:
            continue
        colour = _COLOURS[place % len(_COLOURS)]
        upper = [f"{x(units):.1f},{y(d['high']):.1f}" for units, d in found]
        lower = [f"{x(units):.1f},{y(d['low']):.1f}" for units, d in reversed(found)]
        line = " ".join(f"{x(units):.1f},{y(d['difference']):.1f}" for units, d in found)
        parts.append(
            Markup(
                '<polygon points="{}" fill="{}" opacity="0.15"/>'
                '<polyline points="{}" fill="none" stroke="{}" stroke-width="2"/>'
                '<text x="0" y="{}" style="fill:{}">{}</text>'
            ).format(" ".join([*upper, *lower]), colour, line, colour, 30 + 20 * place, colour, arm[:20])
        )
    labels = Markup('<text x="{}" y="24" text-anchor="end">{}</text><text x="{}" y="254" text-anchor="end">{}</text>'
                    '<text x="{}" y="272">{} units</text><text x="{}" y="272" text-anchor="end">{} units</text>').format(
        _LEFT - 6, number(high), _LEFT - 6, number(low), _LEFT, first, _WIDTH - _RIGHT, last)  # fmt: skip
    return Markup(
        '<svg viewBox="0 0 {} 280" role="img" aria-label="Differences to the control against units, with intervals">'
        '<line class="zero" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>{}{}</svg>'
    ).format(_WIDTH, _LEFT, _WIDTH - _RIGHT, y(0.0), y(0.0), Markup("").join(parts), labels)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The range of a plot: all values and 0, with room."""
    low, high = min(*values, 0.0), max(*values, 0.0)
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room


def _x(value: float, low: float, high: float) -> float:
    return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)


def _scale(low: float, high: float, y: int) -> Markup:
    """Numbers below a plot, at round values."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= 1 if (high - low) / step < 5 else 2 if (high - low) / step < 10 else 5
    ticks = [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Markup("").join(
        Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(_x(tick, low, high), y, f"{tick:.4g}")
        for tick in ticks
    )
