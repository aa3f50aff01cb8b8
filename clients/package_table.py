"""A package as a table for the terminal."""

from __future__ import annotations

from rich.table import Table

from atoms.manifest import AtomCard
from atoms.package import Package


def package_table(package: Package) -> Table:
    """One row an atom: identity, evidence, and the detector that it moves most."""
    manifest = package.manifest
    table = Table(title=f"{manifest.name} {manifest.version} · {manifest.base_model.id} · {len(manifest.atoms)} atoms",
                  caption="coefficient ±1 = "
                  f"{manifest.conventions.unit_nats} nats a token; files verified")  # fmt: skip
    left = {"id", "alias", "range", "effect", "keywords"}
    for heading in ("id", "alias", "docs", "coherence", "z", "stability", "in halves", "held-out loss at +1", "range",
                    "effect", "keywords"):  # fmt: skip
        table.add_column(heading, justify="left" if heading in left else "right", overflow="fold")
    for card in manifest.atoms:
        change = card.orientation.loss_at_plus_one - card.orientation.loss_unsteered
        table.add_row(
            card.id, card.alias or "", str(card.n_documents), f"{card.coherence.raw:.3f}", f"{card.coherence.raw_z:.1f}",
            _cosine(card.stability), _cosine(card.stability_halves), f"{change:+.3f}", _range(card), _effect(card),
            " ".join(card.keywords),
        )  # fmt: skip
    return table


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _range(card: AtomCard) -> str:
    low, high = card.sound_range or card.tested_range
    return f"{low:g} … {high:g}"


def _effect(card: AtomCard) -> str:
    """The largest change of a detector's rate, with its coefficient."""
    return str(card.largest_effect or "not measured")
