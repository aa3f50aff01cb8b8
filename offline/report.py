"""`report.html`: the package for people. One file without anything from outside, made from the package alone.

Training text is hostile: the template escapes every value, figures are built from escaped parts (offline/svg.py), and a
content security policy in the page allows no script but the page's own, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import statistics
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from atoms.manifest import AtomCard, Manifest
from atoms.package import REPORT, Package
from atoms.storage import write_bytes
from offline.report_figures import (
    dose_response,
    drift_curve,
    interval,
    mean_row_by_layer,
    null_strip,
    short_name,
    sparsity,
    spectrum,
    together,
)
from offline.report_map import atom_map
from offline.stability import FOUND_AGAIN

_EXEMPLARS, _MORE = 3, 7


def write_report(package: Package, out: Path | None = None, *, documents: bool = True) -> Path:
    """Makes the report of `package` as it is now and writes it to `out` (default: into the package). Raises StorageError."""
    target = out or package.path / REPORT
    evidence = package.evidence() if documents else []
    text = render_report(package.manifest, evidence, package.projection_tensors, package.drift)
    write_bytes(target, text.encode())
    return target


def render_report(
    manifest: Manifest, evidence: Sequence[Mapping[str, Any]], projection: Mapping[str, Tensor], drift: Tensor
) -> str:
    """The page. `evidence` (lines of evidence.jsonl) may be empty: exemplars are then left out.

    `projection` holds the tensors of projection.safetensors, `drift` is M (J, J).
    """
    behind = {line["atom"]: line["documents"] for line in evidence}
    script = _template("report.js")
    page = Environment(loader=FunctionLoader(_template), autoescape=True, undefined=StrictUndefined)
    return page.get_template("report.html.j2").render(
        manifest=manifest,
        tiles=_tiles(manifest),
        map=atom_map(manifest.atoms, projection),
        cards=[
            _card(card if behind else card.without_prose, float(drift[row, row]), behind.get(card.id, []))
            for row, card in enumerate(manifest.atoms)
        ],
        spectrum=spectrum(projection),
        common=mean_row_by_layer(manifest.record.get("mean_row") or {}),
        sparsity=sparsity(projection),
        together=together(manifest.atoms, drift),
        stages=_stages(manifest.record.get("timings", {})),
        record=_record(manifest),
        has_documents=bool(behind),
        style=Markup(_template("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _template(name: str) -> str:
    return (resources.files("offline") / "templates" / name).read_text(encoding="utf-8")


def _tiles(manifest: Manifest) -> list[dict[str, str]]:
    record, cards = manifest.record, manifest.atoms
    stable = [card.stability for card in cards if card.stability is not None]
    halves = [card.stability_halves for card in cards if card.stability_halves is not None]
    named = sum(card.alias is not None for card in cards)
    return [
        {"name": "atoms", "value": str(len(cards)), "note": f"of {record.get('dictionary_atoms', '?')} in the dictionary"},
        {"name": "named", "value": str(named), "note": ""},
        {"name": "documents", "value": _count(record.get("documents")), "note": f"{_count(record.get('tokens'))} tokens"},
        {"name": "median coherence", "value": f"{statistics.median(c.coherence.raw for c in cards):.2f}", "note": "raw"},
        {"name": "median stability", "value": f"{statistics.median(stable):.2f}" if stable else "–", "note": "across seeds"},
        *([{"name": "found in both halves", "value": f"{sum(c > FOUND_AGAIN for c in halves) / len(halves):.0%}",
            "note": f"cosine above {FOUND_AGAIN:g}"}] if halves else []),
    ]  # fmt: skip


def _card(card: AtomCard, drift: float, documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that the template shows of one atom. `drift` is M_jj, twice the predicted KL at ±1."""
    orientation, coherence = card.orientation, card.coherence
    effects = [{"detector": e.detector, "coefficient": e.coefficient, "before": e.rate_unsteered, "after": e.rate, "n": e.n,
                "decoding": e.decoding, "prompts": e.prompts or "", "degenerate": e.degenerate, "kl": e.kl,
                "random": e.rate_random,
                **dict(zip(("low", "high"), interval(e.rate, e.n), strict=True))}
               for e in sorted(card.effects, key=lambda e: (-abs(e.change), e.detector, e.coefficient))]  # fmt: skip
    best = card.largest_effect
    return {
        "id": card.id,
        "name": card.name,
        "title": short_name(card, 3),
        "keywords": card.keywords,
        "description": card.description if card.described_by else "",
        "described_by": card.described_by,
        "documents": card.n_documents,
        "raw": coherence.raw,
        "raw_z": coherence.raw_z,
        "whitened": coherence.whitened,
        "whitened_z": coherence.whitened_z,
        "stability": _cosine(card.stability),
        "halves": _cosine(card.stability_halves),
        "loss_before": orientation.loss_unsteered,
        "loss_after": orientation.loss_at_plus_one,
        "loss_change": orientation.loss_at_plus_one - orientation.loss_unsteered,
        "held_out": orientation.n_documents,
        "tested": _span(card.tested_range),
        "sound": _sound(card),
        "gain": abs(best.change) if best else 0.0,
        "effect": str(best) if best else "not measured",
        "effects": effects,
        "null_svg": null_strip(card),
        "curve_svg": drift_curve(card, drift),
        "response_svg": dose_response(card),
        "exemplars": documents[:_EXEMPLARS],
        "more": documents[_EXEMPLARS : _EXEMPLARS + _MORE],
    }


def _stages(timings: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    longest = max((cost["seconds"] for cost in timings.values()), default=1.0) or 1.0
    return [{"name": name, "seconds": cost["seconds"], "peak": f"{cost['peak_mib']:,}", "share": cost["seconds"] / longest}
            for name, cost in timings.items()]  # fmt: skip


def _record(manifest: Manifest) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, rows) of the facts, configuration and versions."""
    record = {key: value for key, value in manifest.record.items() if key != "timings"}
    config, versions = record.pop("config", {}), record.pop("versions", {})
    identity = {"base model": manifest.base_model.id, "revision": manifest.base_model.revision,
                "base adapter": manifest.adapter_hash, **_flat(manifest.conventions.model_dump())}  # fmt: skip
    parts = {
        "Identity and conventions": identity,
        "Counts": _flat(record),
        "Settings": _flat(config),
        "Versions": versions,
    }
    return [
        (name, [(key.replace("_", " "), _text(value)) for key, value in rows.items()]) for name, rows in parts.items()
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in settings.items():
        rows |= _flat(value, f"{prefix}{key} › ") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return rows


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "?"


def _span(span: tuple[float, float]) -> str:
    return f"{span[0]:g} … {span[1]:g}".replace("-", "−")


def _sound(card: AtomCard) -> str:
    if card.sound_range is None:
        return "not measured"
    return _span(card.sound_range) if any(card.sound_range) else "none of the measured coefficients"


def _cosine(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"
