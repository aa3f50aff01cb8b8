"""The report's map: the dictionary in the plane, kept atoms as links to their cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from atoms.manifest import AtomCard
from atoms.projection import RowWhitening
from offline.mds import plane
from offline.report_figures import short_name
from offline.svg import Figure, Scale, element

_MAP_ATOMS = 400
"""The layout compares all pairs, so a large dictionary shows its kept atoms and the largest of the rest."""
_MAP_WIDTH, _HALF_LETTER = 860, 3.9
"""Pixels; a letter of a label is taken to be about 7.8 wide."""


def atom_map(cards: Sequence[AtomCard], projection: Mapping[str, Tensor]) -> dict[str, Any]:
    """The figure and what its caption says. Kept atoms are links to their cards, drawn over the others."""
    dictionary, kept = projection["dictionary"], projection["dictionary_index"].tolist()
    gradients = RowWhitening.from_tensors(projection).gradients(dictionary)
    support = projection.get("documents_per_atom", torch.zeros(len(dictionary)))
    shown = set(kept)
    rest = [j for j in torch.argsort(support, descending=True, stable=True).tolist() if j not in shown]
    others = rest[: max(0, _MAP_ATOMS - len(kept))]
    positions, fidelity = plane(gradients[kept + others])
    figure = Figure(_MAP_WIDTH, 470, f"Map of {len(kept) + len(others)} atoms")
    x, y = _frame(positions)
    largest = max([card.n_documents for card in cards] + [int(support[j]) for j in others])
    top = max(card.coherence.raw for card in cards)
    for (px, py), j in zip(positions.tolist()[len(kept) :], others, strict=True):
        note = element("title", f"dictionary atom {j}, not kept: {int(support[j])} documents")
        figure.add("circle", note, cx=f"{x(px):.1f}", cy=f"{y(py):.1f}", r=f"{_radius(float(support[j]), largest):.1f}",
                   class_="other")  # fmt: skip
    circles = [(x(px), y(py), _radius(card.n_documents, largest))
               for card, (px, py) in zip(cards, positions.tolist(), strict=False)]  # fmt: skip
    labels = _place_labels(cards, circles)
    large_first = sorted(range(len(cards)), key=lambda n: -cards[n].n_documents)  # small ones stay reachable over them
    for n in large_first:
        figure.parts.append(_node(cards[n], circles[n], top, n in labels))
    for rank, (n, (centre, baseline)) in enumerate(labels.items()):
        figure.text(centre, baseline, short_name(cards[n]), "middle", f"label {'first' if rank < 5 else 'second'}")
    return {"svg": figure.render(), "top": top, "others": len(others), "left_out": len(rest) - len(others),
            "fidelity": fidelity}  # fmt: skip


def _frame(positions: Tensor) -> tuple[Scale, Scale]:
    """Scales of one unit on both axes, centred, with room for circles and labels at the edge."""
    low, high = positions.min(0).values.tolist(), positions.max(0).values.tolist()
    width, height = _MAP_WIDTH - 180, 380
    unit = max((high[0] - low[0]) / width, (high[1] - low[1]) / height, 1e-9)
    across, up = ((a + b) / 2 for a, b in zip(low, high, strict=True))
    x = Scale(across - width * unit / 2, across + width * unit / 2, 90, 90 + width)
    return x, Scale(up - height * unit / 2, up + height * unit / 2, 45 + height, 45)


def _place_labels(
    cards: Sequence[AtomCard], circles: Sequence[tuple[float, float, float]]
) -> dict[int, tuple[float, float]]:
    """(middle, baseline) of the labels that fit without covering a circle or another label, most coherent atoms first.

    circles: (x, y, radius) of every card. The other labels show on hover and focus.
    """
    taken = [(cx - r, cy - r, cx + r, cy + r) for cx, cy, r in circles]
    labels: dict[int, tuple[float, float]] = {}
    for n in sorted(range(len(cards)), key=lambda n: -cards[n].coherence.raw):
        cx, cy, r = circles[n]
        half = _HALF_LETTER * len(short_name(cards[n]))
        beside = r + 6 + half
        for centre, baseline in ((cx, cy - r - 6), (cx, cy + r + 15), (cx - beside, cy + 4), (cx + beside, cy + 4)):
            box = (centre - half, baseline - 11, centre + half, baseline + 3)
            if all(box[2] < t[0] or t[2] < box[0] or box[3] < t[1] or t[3] < box[1] for t in taken):
                taken.append(box)
                labels[n] = (centre, baseline)
                break
    return labels


def _node(card: AtomCard, circle: tuple[float, float, float], top: float, labelled: bool) -> Markup:
    """A circle that links to the card, with its label for hover and focus unless it is `labelled` already."""
    cx, cy, radius = circle
    label = short_name(card)
    told = f"{label}: {card.n_documents} documents, coherence {card.coherence.raw:.2f}"
    share = 100 * max(card.coherence.raw, 0) / max(top, 1e-9)
    inside = element("title", told) + element("circle", cx=f"{cx:.1f}", cy=f"{cy:.1f}", r=f"{radius:.1f}", class_="atom",
                                              style=f"--t:{share:.0f}")  # fmt: skip
    if not labelled:
        inside += element(
            "text", label, x=f"{cx:.1f}", y=f"{cy - radius - 6:.1f}", text_anchor="middle", class_="label quiet"
        )
    return element("a", inside, href=f"#{card.id}", aria_label=told)


def _radius(documents: float, largest: int) -> float:
    return 5 + 21 * (documents / max(largest, 1)) ** 0.5
