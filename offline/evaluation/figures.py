"""Figures of evaluations and sweeps, as PNG and SVG. matplotlib is an extra and is imported only here, when asked for."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoms.errors import ConfigError
from atoms.storage import write_bytes
from offline.evaluation.measures import Rate
from offline.evaluation.results import (
    ATOM,
    RANDOM,
    RANDOM_DOCUMENTS,
    SHUFFLED,
    SUPERVISED,
    UNSTEERED,
    Evaluation,
    GoalResult,
)
from offline.evaluation.sweep import SweepRow, moving

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {
    ATOM: "#1f5fa8", RANDOM: "#8a8a8a", RANDOM_DOCUMENTS: "#6c4ba0", SHUFFLED: "#b58900", SUPERVISED: "#2a7f4f",
    UNSTEERED: "#333333",
}  # fmt: skip
_LINES = ("#1f5fa8", "#c0392b", "#2a7f4f", "#b58900", "#6c4ba0", "#00808a", "#8a5a2b", "#8a8a8a")
_MOST_LINES = len(_LINES)
"""As many as can be told apart in one figure."""


def require_matplotlib() -> None:
    """Raises ConfigError if figures cannot be drawn: to be called before hours of work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "figures need matplotlib; install it with `pip install 'atomsteer[plots]'`, or pass --no-plots"
        )


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes STEM.png and STEM.svg. Raises StorageError."""
    written = []
    for suffix, options in ((".png", {"dpi": 150}), (".svg", {"metadata": {"Date": None}})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix[1:], bbox_inches="tight", **options)  # type: ignore[arg-type]
        written.append(stem.with_name(stem.name + suffix))
        write_bytes(written[-1], buffer.getvalue())
    return written


def dose_response(evaluation: Evaluation) -> Figure | None:
    """A panel a goal: the detector's rate against the coefficient, 95% intervals, and the controls at the chosen one.

    None if no goal has a choice.
    """
    goals = [goal for goal in evaluation.goals if goal.choice]
    if not goals:
        return None
    columns = min(2, len(goals))
    figure, axes = _panels(-(-len(goals) // columns), columns, width=5.2, height=3.1)
    for axis, goal in zip(axes, goals, strict=False):
        _dose_panel(axis, goal)
    _finish(figure, axes, len(goals))
    return figure


def effects(evaluation: Evaluation) -> Figure | None:
    """Change of every goal's rate against unsteered with its 95% interval: the atom, and controls of the same KL."""
    goals = [goal for goal in evaluation.goals if goal.choice]
    if not goals:
        return None
    shown = [(goal, c) for goal in goals for c in goal.conditions if c.to_unsteered]
    figure, (axis,) = _panels(1, 1, width=7.5, height=0.6 + 0.24 * len(shown))
    labels = []
    for place, (goal, condition) in enumerate(shown):
        change = condition.to_unsteered
        assert change is not None
        colour = _COLOURS[condition.kind]
        axis.plot([100 * change.low, 100 * change.high], [-place, -place], color=colour, lw=2)
        axis.plot(100 * change.difference, -place, "o", color=colour, ms=5)
        labels.append(f"{goal.goal}: {condition.name}" if condition.name == ATOM else condition.name)
    axis.axvline(0, color="#333333", lw=0.8)
    axis.set_yticks([-place for place in range(len(shown))], labels)
    axis.set_xlabel("change of the rate against unsteered, points (95% interval)")
    axis.grid(axis="x", alpha=0.25)
    return figure


def sweep_lines(rows: Sequence[SweepRow], atom: str) -> Figure:
    """Dose-response of one atom alone: the detectors' rates, and below them KL and degenerate answers."""
    points = sorted(
        (row for row in rows if not row.mix or set(row.mix) == {atom}), key=lambda row: row.mix.get(atom, 0.0)
    )
    x = [row.mix.get(atom, 0.0) for row in points]
    figure, (top, bottom) = _panels(2, 1, width=6.4, height=2.9)
    for colour, name in zip(_LINES, moving(points, _MOST_LINES), strict=False):
        _curve(top, x, [row.rates[name] for row in points], colour, name)
    top.set_title(f"{atom}: detectors", fontsize=10, loc="left")
    top.legend(fontsize=8, frameon=False)
    _percent(top)
    bottom.plot(x, [row.kl for row in points], "o-", color=_LINES[0], ms=4, label="KL measured")
    bottom.plot(x, [row.predicted_kl for row in points], "--", color=_LINES[0], label="KL predicted")
    bottom.set_ylabel("nats a token")
    bottom.set_xlabel("coefficient")
    share = bottom.twinx()
    share.plot(x, [100 * row.form.degenerate for row in points], "s:", color=_LINES[1], ms=4, label="degenerate")
    share.set_ylabel("degenerate answers, %")
    share.set_ylim(-3, 103)
    handles = [*bottom.get_legend_handles_labels()[0], *share.get_legend_handles_labels()[0]]
    bottom.legend(handles=handles, fontsize=8, frameon=False, loc="upper center")
    return figure


def sweep_heatmap(rows: Sequence[SweepRow], atoms: tuple[str, str], detector: str) -> Figure:
    """A detector's rate over the coefficients of two atoms; the cells show the measured KL. Missing cells are blank."""
    cells = {tuple(row.mix.get(atom, 0.0) for atom in atoms): row for row in rows if set(row.mix) <= set(atoms)}
    xs, ys = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
    blank = float("nan")
    shares = [[100 * cells[x, y].rates[detector].share if (x, y) in cells else blank for x in xs] for y in ys]
    figure, (axis,) = _panels(1, 1, width=1.6 + 0.85 * len(xs), height=1.2 + 0.6 * len(ys))
    image = axis.imshow(shares, origin="lower", cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    axis.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
    axis.set_xlabel(atoms[0])
    axis.set_ylabel(atoms[1])
    axis.set_title(f"{detector}, % of answers (measured KL below)", fontsize=10, loc="left")
    for (x, y), row in cells.items():
        share = 100 * row.rates[detector].share
        axis.text(xs.index(x), ys.index(y), f"{share:.0f}\n{row.kl:.2f}", ha="center", va="center", fontsize=8,
                  color="white" if share > 55 else "#222222")  # fmt: skip
    figure.colorbar(image, ax=axis)
    return figure


def _dose_panel(axis: Axes, result: GoalResult) -> None:
    choice, unsteered, atom = result.choice, result.condition(UNSTEERED), result.condition(ATOM)
    assert choice is not None and unsteered is not None and atom is not None
    rates = {0.0: unsteered.rate, choice.coefficient: atom.rate} | {p.coefficient: p.rate for p in result.curve}
    x = sorted(rates)
    _curve(axis, x, [rates[c] for c in x], _COLOURS[ATOM], choice.name)
    controls = [c for c in result.conditions if c.is_control]
    for place, control in enumerate(controls, 1):
        _point(axis, choice.coefficient + 0.12 * place, control.rate, _COLOURS[control.kind], control.name)
    axis.axvline(choice.coefficient, color="#999999", lw=0.8, ls=":")
    axis.set_title(
        f"{result.goal} ({result.goal.kind} prompts, n = {atom.rate.n}, KL {atom.kl:.2f})", fontsize=9, loc="left"
    )
    axis.set_xlabel("coefficient")
    axis.legend(fontsize=7, frameon=False)
    _percent(axis)


def _curve(axis: Axes, x: Sequence[float], rates: Sequence[Rate], colour: str, label: str) -> None:
    axis.fill_between(x, [100 * r.low for r in rates], [100 * r.high for r in rates], color=colour, alpha=0.15, lw=0)
    axis.plot(x, [100 * r.share for r in rates], "o-", color=colour, ms=4, label=label)


def _point(axis: Axes, x: float, rate: Rate, colour: str, label: str) -> None:
    axis.plot([x, x], [100 * rate.low, 100 * rate.high], color=colour, lw=1.5)
    axis.plot(x, 100 * rate.share, "D", color=colour, ms=5, label=label)


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def _finish(figure: Figure, axes: Sequence[Axes], used: int) -> None:
    for axis in axes[used:]:
        figure.delaxes(axis)


def _percent(axis: Axes) -> None:
    axis.set_ylim(-3, 103)
    axis.set_ylabel("% of answers")
    axis.grid(alpha=0.25)
