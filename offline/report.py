"""`report.html`: the package for people, self-contained, without scripts or anything from outside."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from atoms.manifest import AtomCard, Manifest

_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); --accent: #2f6fdf; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }
article { border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; }
h2 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; } dl { display: grid; grid-template-columns: auto 1fr;
gap: 0 .8rem; margin: .6rem 0; } dt { opacity: .7; } dd { margin: 0; } code { font-size: .9em; }
blockquote { margin: .5rem 0; padding-left: .7rem; border-left: 3px solid var(--line); white-space: pre-wrap;
overflow-wrap: anywhere; font-size: .9em; max-height: 7em; overflow: auto; }
svg { width: 100%; height: 7rem; } polyline { fill: none; stroke: var(--accent); stroke-width: 2; }
circle { fill: var(--accent); } line { stroke: var(--line); } text { fill: currentColor; font-size: 9px; opacity: .8; }
"""
_EXEMPLARS = 3


def render_report(manifest: Manifest, evidence: Sequence[Mapping[str, Any]]) -> str:
    """One HTML page. `evidence` may be empty: exemplars are then left out."""
    documents = {line["atom"]: line["documents"] for line in evidence}
    cards = "\n".join(_card(card, documents.get(card.id, [])) for card in manifest.atoms)
    record = manifest.record
    title = html.escape(f"{manifest.name} {manifest.version}")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · atomsteer</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<p>{len(manifest.atoms)} atoms of <code>{html.escape(manifest.base_model.id)}</code>,
found in {record.get("documents", "?")} documents
({record.get("tokens", "?")} tokens) by a dictionary of {record.get("dictionary_atoms", "?")}. Coefficient ±1 is
{manifest.conventions.unit_nats} nats a token of drift. Names and measured effects are in the manifest
(<code>atomsteer inspect</code>).</p>
<section class="cards">{cards}</section></body></html>
"""


def _card(card: AtomCard, documents: Sequence[Mapping[str, Any]]) -> str:
    coherence, orientation = card.coherence, card.orientation
    facts = {
        "keywords": ", ".join(card.keywords) or "none",
        "documents": str(card.n_documents),
        "coherence": f"{coherence.raw:.3f} raw (z {coherence.raw_z:.1f}), "
        f"{coherence.whitened:.3f} whitened (z {coherence.whitened_z:.1f})",
        "stability": "not measured" if card.stability is None else f"{card.stability:.2f}",
        "held-out loss": f"{orientation.loss_unsteered:.3f} → {orientation.loss_at_plus_one:.3f} at +1 "
        f"({orientation.n_documents} documents)",
        "tested range": f"{card.tested_range[0]:g} … {card.tested_range[1]:g}",
    }
    rows = "".join(f"<dt>{key}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items())
    quotes = "".join(
        f"<blockquote>{html.escape(d['prompt'])}\n→ {html.escape(d['response'])}</blockquote>"
        for d in documents[:_EXEMPLARS]
    )
    return f"<article><h2><code>{card.id}</code></h2><dl>{rows}</dl>{_curve(card)}{quotes}</article>"


def _curve(card: AtomCard, width: int = 260, height: int = 90) -> str:
    """KL against coefficient as inline SVG."""
    points = sorted(card.kl_curve)
    low, high, top = points[0][0], points[-1][0], max(kl for _, kl in points) or 1.0

    def place(c: float, kl: float) -> tuple[float, float]:
        return 20 + (c - low) / (high - low) * (width - 40), height - 14 - kl / top * (height - 28)

    placed = [place(c, kl) for c, kl in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in placed)
    labels = "".join(f'<text x="{x:.1f}" y="{height - 2}" text-anchor="middle">{c:g}</text>'
                     for (c, _), (x, _) in zip(points, placed, strict=True))  # fmt: skip
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="KL against coefficient">'
        f'<line x1="10" x2="{width - 10}" y1="{height - 14}" y2="{height - 14}"/><polyline points="{line}"/>{dots}{labels}'
        f'<text x="12" y="10">KL up to {top:.2f} nats a token</text></svg>'
    )
