"""Figures and the map: scales put values where they belong, ticks are round, and the map keeps distances."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch

from offline.layout import plane
from offline.plots import Figure, Scale, element, histogram


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


def test_points_of_a_plane_keep_their_distances() -> None:
    """Unit vectors on a circle lie in a plane, where no distance has to give."""
    angles = torch.tensor([0.0, 0.4, 1.0, 2.0, 3.5, 5.0], dtype=torch.float64)
    atoms = torch.stack([angles.cos(), angles.sin(), *torch.zeros(3, 6)], dim=1)
    positions, fidelity = plane(atoms.float())
    assert torch.allclose(torch.cdist(positions, positions), torch.cdist(atoms, atoms), atol=1e-4)
    assert fidelity == pytest.approx(1)


def test_the_stress_is_no_higher_than_scikit_learns() -> None:
    from sklearn.manifold import smacof

    atoms = torch.nn.functional.normalize(torch.randn(40, 12, generator=torch.Generator().manual_seed(0)), dim=1)
    distances = torch.cdist(atoms.double(), atoms.double())
    positions, fidelity = plane(atoms)
    ours = float((torch.cdist(positions, positions) - distances).square().sum() / 2)
    _, theirs = smacof(
        distances.numpy(), n_components=2, n_init=1, max_iter=300, random_state=0, normalized_stress=False
    )
    assert ours <= 1.05 * theirs
    assert 0.3 < fidelity < 1


@pytest.mark.parametrize("count", [1, 2])
def test_very_few_atoms_have_a_map(count: int) -> None:
    positions, fidelity = plane(torch.eye(4)[:count])
    assert positions.shape == (count, 2) and torch.isfinite(positions).all() and fidelity == 1


def test_equal_atoms_lie_on_one_point() -> None:
    positions, fidelity = plane(torch.ones(3, 5))
    assert float(positions.abs().max()) < 1e-3 and fidelity == 0


def test_the_map_is_the_same_every_time() -> None:
    atoms = torch.nn.functional.normalize(torch.randn(20, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    assert torch.equal(plane(atoms)[0], plane(atoms)[0])
