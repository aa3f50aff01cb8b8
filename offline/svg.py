"""Small SVG figures of pages: scales, axes, marks. Knows coordinates and style classes, nothing of atoms.

Colours and fonts are CSS of the page (offline/templates/report.css; an experiment's page has its own), so a figure follows
light and dark. Every text and attribute is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

_TICK_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_GAP = 4.0
"""Pixels between an axis and its tick labels."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values low … high to pixels start … stop; `log` for positive values on a logarithmic axis."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        position = math.log(max(value, self.low)) if self.log else value
        return self.start + (position - low) / ((high - low) or 1.0) * (self.stop - self.start)

    def ticks(self, count: int = 4) -> list[float]:
        """About `count` round values within the scale; powers of ten on a logarithmic one."""
        if self.log:
            low, high = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            stride = max(1, math.ceil((high - low + 1) / max(count, 1)))
            return [10.0**e for e in range(low, high + 1, stride)]
        span = (self.high - self.low) or 1.0
        magnitude = 10.0 ** math.floor(math.log10(span / count))
        step = next(s * magnitude for s in _TICK_STEPS if span / (s * magnitude) <= count + 0.5)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass
class Figure:
    """An SVG under construction. `label` is what a screen reader says. Coordinates are pixels, y downwards."""

    width: float
    height: float
    label: str
    parts: list[Markup] = field(default_factory=list)

    def add(self, tag: str, content: str | Markup = "", **attributes: object) -> None:
        """One element. Attribute names: ``class_`` -> class, ``text_anchor`` -> text-anchor."""
        self.parts.append(element(tag, content, **attributes))

    def text(self, x: float, y: float, content: str, anchor: str = "start", class_: str = "tick") -> None:
        self.add("text", content, x=_px(x), y=_px(y), text_anchor=anchor, class_=class_)

    def rule(self, x1: float, y1: float, x2: float, y2: float, class_: str = "grid") -> None:
        self.add("line", x1=_px(x1), y1=_px(y1), x2=_px(x2), y2=_px(y2), class_=class_)

    def line(self, points: Iterable[tuple[float, float]], class_: str, style: str = "") -> None:
        """A polyline; `style` may set CSS variables that the class uses."""
        joined = " ".join(f"{_px(x)},{_px(y)}" for x, y in points)
        self.add("polyline", points=joined, class_=class_, **({"style": style} if style else {}))

    def bar(self, left: float, width: float, y: Scale, value: float, told: str, class_: str = "bar") -> None:
        """A bar from 0 to `value`, which tells `told` when it is pointed at. `left`, `width` in pixels, of which there may be
        hundreds in a figure."""
        self.add("rect", element("title", told), x=f"{left:.2f}", y=_px(y(value)), width=f"{width:.2f}",
                 height=_px(y(0) - y(value)), class_=class_)  # fmt: skip

    def axes(
        self, x: Scale, y: Scale, *, x_ticks: Sequence[float] | None = None, x_label: str = "", y_label: str = "",
        percent: bool = False, y_count: int = 3,
    ) -> None:  # fmt: skip
        """Horizontal grid lines with labels on the left, tick labels below, and the axes' names."""
        for value in y.ticks(y_count):
            self.rule(x.start, y(value), x.stop, y(value))
            self.text(x.start - _GAP, y(value) + 3.5, f"{value:.0%}" if percent else _number(value), "end")
        for value in x.ticks() if x_ticks is None else x_ticks:
            self.text(x(value), y.start + 13, _number(value), "middle")
        if x_label:
            self.text((x.start + x.stop) / 2, y.start + 27, x_label, "middle", "axis")
        if y_label:
            self.text(x.start - _GAP, y.stop - 7, y_label, "start", "axis")

    def render(self, widest: float | None = None) -> Markup:
        """The SVG, as wide as its place on the page; with `widest`, at most so many times its own size."""
        limit = {"style": f"max-width: {_px(widest * self.width)}px"} if widest else {}
        return element("svg", Markup("").join(self.parts), viewBox=f"0 0 {_px(self.width)} {_px(self.height)}", role="img",
                       aria_label=self.label, preserveAspectRatio="xMidYMid meet", **limit)  # fmt: skip


def element(tag: str, content: str | Markup = "", **attributes: object) -> Markup:
    """``<tag …>content</tag>``; content that is no Markup, and all attributes, are escaped."""
    names = (name.rstrip("_").replace("_", "-") if name != "viewBox" else name for name in attributes)
    given = Markup("").join(Markup(' {}="{}"').format(n, v) for n, v in zip(names, attributes.values(), strict=True))
    return Markup("<{}{}>{}</{}>").format(tag, given, escape(content), tag)


def histogram(counts: Sequence[int], label: str, x_label: str, y_label: str) -> Markup:
    """Bars of `counts` over 0, 1, 2 …"""
    figure = Figure(420, 190, label)
    x, y = Scale(-0.5, len(counts) - 0.5, 46, 414), Scale(0, max([*counts, 1]), 152, 22)
    stride = max(1, math.ceil(len(counts) / 10))
    figure.axes(x, y, x_ticks=range(0, len(counts), stride), x_label=x_label, y_label=y_label)
    width = (x(1) - x(0)) * 0.8
    for value, count in enumerate(counts):
        figure.bar(x(value) - width / 2, width, y, count, f"{value}: {count}")
    return figure.render()


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _number(value: float) -> str:
    """Short: 0.05, 12, 3k, 1e-6."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 1e4:
        return f"{value / 1000:g}k"
    return f"{round(value, 6):g}".replace("-", "−")
