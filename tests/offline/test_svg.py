"""Figures: scales put values where they belong, ticks are round, text is escaped."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from offline.svg import Figure, Scale, element, histogram


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (Scale(0, 1, 0, 100), [0, 0.25, 0.5, 0.75, 1]),
        (Scale(-3, 3, 0, 100), [-2, 0, 2]),
        (Scale(0, 0.07, 0, 100), [0, 0.02, 0.04, 0.06]),
        (Scale(0, 640, 0, 100), [0, 200, 400, 600]),
        (Scale(1e-6, 1e-2, 0, 100, log=True), [1e-6, 1e-4, 1e-2]),
        (Scale(5, 5, 0, 100), [5]),
    ],
    ids=["unit", "signed", "small", "counts", "log", "one value"],
)
def test_ticks_are_round_and_within_the_scale(scale: Scale, expected: list[float]) -> None:
    assert scale.ticks() == pytest.approx(expected)


def test_a_scale_is_linear_or_logarithmic() -> None:
    assert [Scale(-1, 1, 10, 30)(v) for v in (-1, 0, 1)] == [10, 20, 30]
    log = Scale(1e-4, 1, 100, 0, log=True)
    assert [log(v) for v in (1e-4, 1e-2, 1, 1e-9)] == pytest.approx([100, 50, 0, 100])


def test_bars_stand_on_the_axis_at_the_height_of_their_count() -> None:
    svg = ElementTree.fromstring(str(histogram([2, 8, 4], "counts", "value", "documents")))
    bars = list(svg.iter("rect"))
    heights = [float(bar.get("height", "")) for bar in bars]
    assert [h / heights[1] for h in heights] == pytest.approx([0.25, 1, 0.5], abs=0.01)
    assert {float(bar.get("y", "")) + h for bar, h in zip(bars, heights, strict=True)} == {152}
    assert [bar.findtext("title") for bar in bars] == ["0: 2", "1: 8", "2: 4"]


def test_text_and_attributes_are_escaped_once() -> None:
    figure = Figure(10, 10, 'a"<b>&')
    figure.text(1, 2, "<script>&amp;")
    figure.add("circle", element("title", "x & y"), style='"onload="1')
    svg = ElementTree.fromstring(str(figure.render()))
    assert svg.get("aria-label") == 'a"<b>&'
    assert svg.findtext("text") == "<script>&amp;"
    assert svg.findtext("circle/title") == "x & y"
    assert [e.tag for e in svg] == ["text", "circle"]
