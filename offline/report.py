"""`report.html`: the package for people. One file without anything from outside, made from the package alone.

Training text is hostile: the template escapes every value, figures are built from escaped parts (offline/plots.py), and a
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

import torch
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from atoms.manifest import AtomCard, Manifest
from atoms.package import REPORT, Package
from atoms.projection import RowWhitening
from atoms.storage import write_bytes
from offline.evaluation.statistics import wilson_interval
from offline.layout import plane
from offline.plots import Figure, Scale, element, histogram
from offline.select import FOUND_AGAIN

_EXEMPLARS, _MORE = 3, 7
_MAP_ATOMS = 400
"""The layout compares all pairs, so a large dictionary shows its kept atoms and the largest of the rest."""
_MAP_WIDTH, _HALF_LETTER = 860, 3.9
"""Pixels; a letter of a label is taken to be about 7.8 wide."""
_MOST_BARS, _MOST_PAIRED = 600, 48
"""Bars of one figure, and atoms of the figure of pairs: more could not be told apart, and would make the page large."""
_SERIES = 3
_NAMED_EFFECT = 0.1
"""Besides the atom's own detector, the plot shows detectors whose rate changes by at least this much."""


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
        map=_map(manifest.atoms, projection),
        cards=[
            _card(card if behind else card.without_prose, float(drift[row, row]), behind.get(card.id, []))
            for row, card in enumerate(manifest.atoms)
        ],
        spectrum=_spectrum(projection),
        common=_common(manifest.record.get("mean_row") or {}),
        sparsity=_sparsity(projection),
        together=_together(manifest.atoms, drift),
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


def _map(cards: Sequence[AtomCard], projection: Mapping[str, Tensor]) -> dict[str, Any]:
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
        figure.text(centre, baseline, _short(cards[n]), "middle", f"label {'first' if rank < 5 else 'second'}")
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
        half = _HALF_LETTER * len(_short(cards[n]))
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
    label = _short(card)
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


def _short(card: AtomCard, words: int = 2) -> str:
    """The alias, else the first keywords (real words before signs), else the id."""
    letters = [word for word in card.keywords if word.isalpha() and len(word) > 1]
    return _clip(card.alias or ", ".join((letters or card.keywords)[:words]) or card.id, 32)


def _card(card: AtomCard, drift: float, documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that the template shows of one atom. `drift` is M_jj, twice the predicted KL at ±1."""
    orientation, coherence = card.orientation, card.coherence
    effects = [{"detector": e.detector, "coefficient": e.coefficient, "before": e.rate_unsteered, "after": e.rate, "n": e.n,
                "decoding": e.decoding, "prompts": e.prompts or "", "degenerate": e.degenerate, "kl": e.kl,
                "random": e.rate_random,
                **dict(zip(("low", "high"), _interval(e.rate, e.n), strict=True))}
               for e in sorted(card.effects, key=lambda e: (-abs(e.change), e.detector, e.coefficient))]  # fmt: skip
    best = card.largest_effect
    return {
        "id": card.id,
        "name": card.name,
        "title": _short(card, 3),
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
        "range": _sound(card),
        "tested": _span(card.tested_range),
        "sound": _sound(card),
        "gain": abs(best.change) if best else 0.0,
        "effect": str(best) if best else "not measured",
        "effects": effects,
        "null_svg": _null(card),
        "curve_svg": _curve(card, drift),
        "response_svg": _response(card),
        "exemplars": documents[:_EXEMPLARS],
        "more": documents[_EXEMPLARS : _EXEMPLARS + _MORE],
    }


def _null(card: AtomCard) -> Markup | None:
    """A strip: the null's mean ± 2 standard deviations, and the atom's raw coherence."""
    if card.coherence.raw_null is None:
        return None
    mean, deviation = card.coherence.raw_null
    low, high, value = mean - 2 * deviation, mean + 2 * deviation, card.coherence.raw
    figure = Figure(340, 46, f"Raw coherence {value:.3f}; random sets {mean:.3f}, standard deviation {deviation:.3f}")
    x = Scale(min(0.0, low, value), max(1.05 * value, high, 0.1), 8, 332)
    figure.rule(x.start, 24, x.stop, 24, "zero")
    figure.add("rect", x=f"{x(low):.1f}", y=17, width=f"{max(1.5, x(high) - x(low)):.1f}", height=14, class_="null")
    figure.rule(x(mean), 15, x(mean), 33, "nullmean")
    figure.add("circle", cx=f"{x(value):.1f}", cy=24, r=5, class_="dot")
    figure.text(x(mean), 11, f"random {mean:.3f}", "start" if x(mean) < 60 else "middle")
    if abs(x(value) - x(mean)) > 90:
        figure.text(min(x(value) + 32, 336), 11, f"atom {value:.3f}", "end")
    for tick in x.ticks(4):
        figure.text(x(tick), 44, f"{tick:g}", "middle")
    return figure.render()


def _curve(card: AtomCard, drift: float) -> Markup:
    """Measured KL against the coefficient, beside the parabola ½ M c²."""
    points = sorted(card.kl_curve)
    low, high, top = points[0][0], points[-1][0], max(kl for _, kl in points) or 1.0
    figure = Figure(
        340, 158, "KL in nats a token by coefficient: " + ", ".join(f"{kl:.3f} at {c:g}" for c, kl in points)
    )
    edge = 0.04 * (high - low)
    x, y = Scale(low - edge, high + edge, 40, 330), Scale(0, max(top, 0.5 * drift * max(low**2, high**2)), 122, 20)
    figure.axes(x, y, x_ticks=[c for c, _ in points], x_label="coefficient", y_label="nats a token")
    steps = [low + (high - low) * i / 40 for i in range(41)]
    figure.line([(x(c), y(0.5 * drift * c * c)) for c in steps], "predicted")
    figure.line([(x(c), y(kl)) for c, kl in points], "measured")
    for c, kl in points:
        figure.add("circle", element("title", f"{kl:.4f} nats a token at {c:g}"), cx=f"{x(c):.1f}", cy=f"{y(kl):.1f}", r=3.5,
                   class_="dot")  # fmt: skip
    figure.text(330, 13, "dashed: ½ M c²", "end")
    return figure.render()


def _response(card: AtomCard) -> Markup | None:
    """Rates by coefficient with Wilson intervals, a line a detector and kind of prompts, of those that the atom moves most."""
    if not card.effects:
        return None
    shown = _shown_series(card)
    coefficients = sorted({0.0, *(e.coefficient for e in card.effects)})
    span = max(1.0, *(abs(c) for c in coefficients))
    low, high = (0.0 if coefficients[0] == 0 else -span), (0.0 if coefficients[-1] == 0 else span)
    figure = Figure(340, 164, f"Rates of {', '.join(shown)} by coefficient")
    x, y = Scale(low - 0.15 * span, high + 0.15 * span, 40, 330), Scale(0, 1, 128, 30)
    _shade_unsound(figure, card, x, y, coefficients)
    figure.axes(x, y, x_ticks=coefficients, x_label="coefficient", percent=True, y_count=4)
    for number, name in enumerate(shown):
        mine = [e for e in card.effects if e.series == name]
        unsteered = (0.0, mine[0].rate_unsteered, mine[0].n)
        rates = sorted([unsteered, *((e.coefficient, e.rate, e.n) for e in mine)])
        shift = (number - (len(shown) - 1) / 2) * 4  # side by side, so that no interval hides another
        figure.line([(x(c) + shift, y(rate)) for c, rate, _ in rates], f"series s{number}")
        for c, rate, n in rates:
            bottom, top = _interval(rate, n)
            figure.rule(x(c) + shift, y(bottom), x(c) + shift, y(top), f"whisker s{number}")
            told = element("title", f"{name} {rate:.0%} [{bottom:.0%}, {top:.0%}] of {n} at {c:g}, {mine[0].decoding}")
            figure.add("circle", told, cx=f"{x(c) + shift:.1f}", cy=f"{y(rate):.1f}", r=3.8, class_=f"mark s{number}")
        width = 300 // len(shown)
        figure.text(40 + width * number, 15, _clip(name, width // 6), "start", f"name s{number}")
    return figure.render()


def _shown_series(card: AtomCard) -> list[str]:
    """Those of the detector which the atom is named after, and those that change most."""
    largest: dict[str, float] = {}
    for effect in card.effects:
        largest[effect.series] = max(largest.get(effect.series, 0.0), abs(effect.change))
    own = {effect.series for effect in card.effects if effect.detector == card.alias}
    ranked = sorted(largest, key=lambda name: (name not in own, -largest[name], name))
    return [name for n, name in enumerate(ranked[:_SERIES]) if n == 0 or largest[name] >= _NAMED_EFFECT]


def _shade_unsound(figure: Figure, card: AtomCard, x: Scale, y: Scale, coefficients: Sequence[float]) -> None:
    if card.sound_range is None:
        return
    low, high = card.sound_range
    below, above = [c for c in coefficients if c < low], [c for c in coefficients if c > high]
    bands = [(x.low, (max(below) + low) / 2)] if below else []
    bands += [((min(above) + high) / 2, x.high)] if above else []
    for start, stop in bands:
        figure.add("rect", element("title", "answers broke here"), x=f"{x(start):.1f}", y=f"{y.stop:.1f}",
                       width=f"{x(stop) - x(start):.1f}", height=f"{y.start - y.stop:.1f}", class_="unsound")  # fmt: skip
        figure.text((x(start) + x(stop)) / 2, y.stop + 11, "unsound", "middle", "unsoundtext")


def _spectrum(projection: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """One panel a kind of matrix (such as ``q_proj A``): kept eigenvalues by rank, a line a layer."""
    groups: dict[str, list[str]] = {}
    for name in projection:
        if name.endswith(".eigenvalues"):
            key = name.removesuffix(".eigenvalues")
            module, side = key.rsplit(".", 2)[-2:]
            groups.setdefault(f"{module} {side.removeprefix('lora_')}", []).append(key)
    return [
        {"name": name, "matrices": len(keys), "svg": _panel(name, keys, projection)} for name, keys in groups.items()
    ]


def _panel(name: str, keys: Sequence[str], projection: Mapping[str, Tensor]) -> Markup:
    curves = [projection[f"{key}.eigenvalues"] for key in keys]
    epsilon = statistics.median(float(projection[f"{key}.epsilon"]) for key in keys)
    positive = torch.cat(curves).clamp_min(torch.finfo(torch.float32).tiny)
    figure = Figure(420, 200, f"Fisher eigenvalues of {name}")
    longest = max(len(curve) for curve in curves)
    x = Scale(1, max(longest, 2), 46, 414, log=True)
    y = Scale(
        min(float(positive.quantile(0.01)), epsilon) * 0.7, max(float(positive.max()), epsilon) * 1.4, 162, 22, log=True
    )
    figure.axes(x, y, x_ticks=[v for v in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if v <= longest],
                x_label="component, by size", y_label=f"λ of {name}", y_count=4)  # fmt: skip
    for layer, curve in enumerate(curves):
        ranks = sorted({round(longest ** (i / 15)) for i in range(16)} & set(range(1, len(curve) + 1)))
        depth = 100 * layer / max(1, len(curves) - 1)
        figure.line([(x(r), y(float(curve[r - 1]))) for r in ranks], "layer", f"--t:{depth:.0f}")
    figure.rule(x.start, y(epsilon), x.stop, y(epsilon), "epsilon")
    return figure.render()


def _common(mean_row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The direction that all documents share, a bar a layer; None if none was taken off, or the package does not record it."""
    if not mean_row:
        return None
    layers = mean_row["by_layer"]
    figure = Figure(420, 200, f"Common direction by layer, of {len(layers)}")
    x, y = Scale(-0.5, len(layers) - 0.5, 46, 414), Scale(0, max(share for _, share in layers), 162, 22)
    figure.axes(x, y, x_ticks=[], x_label="layer", percent=True, y_label="share of its squared length")
    width, stride = 0.8 * (x(1) - x(0)), -(-len(layers) // 10)
    for place, (layer, share) in enumerate(layers):
        figure.bar(x(place) - width / 2, width, y, share, f"layer {layer}: {share:.1%}")
        if place % stride == 0:
            figure.text(x(place), y.start + 13, layer, "middle")
    return {"svg": figure.render(), "share": mean_row["share"], "cosine": mean_row["median_cosine"]}


def _sparsity(projection: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Plots of codes a document and documents an atom; None if the package does not record them."""
    if "codes_per_document" not in projection:
        return None
    codes, support = projection["codes_per_document"].tolist(), projection["documents_per_atom"].tolist()
    total = sum(codes)
    return {
        "codes_svg": histogram(codes, "Documents by number of atoms", "atoms a document", "documents"),
        "support_svg": _support(support, set(projection["dictionary_index"].tolist())),
        "mean": sum(n * count for n, count in enumerate(codes)) / max(total, 1),
        "none": codes[0],
        "documents": total,
    }


def _support(support: Sequence[int], kept: set[int]) -> Markup:
    order = sorted(range(len(support)), key=lambda j: (-support[j], j))
    figure = Figure(420, 190, f"Documents of {len(support)} atoms, {max(support, default=0)} at most")
    x, y = Scale(0, len(order), 46, 414), Scale(0, max([*support, 1]), 152, 22)
    figure.axes(
        x, y, x_ticks=[t for t in x.ticks(5) if t == int(t)], x_label="atoms, largest first", y_label="documents"
    )
    width = x(1) - x(0)
    stride = -(-len(order) // _MOST_BARS)  # of a large dictionary every so many-th atom, in its place
    for place, j in list(enumerate(order))[::stride]:
        told, class_ = f"atom {j}: {support[j]} documents", "bar" if j in kept else "bar rest"
        figure.bar(x(place), 0.85 * stride * width, y, support[j], told, class_)
    return figure.render()


def _together(cards: Sequence[AtomCard], drift: Tensor) -> dict[str, Any]:
    """The drift matrix as correlations M_jk / √(M_jj M_kk), a cell a pair; of many atoms the most coherent ones."""
    order = sorted(range(len(cards)), key=lambda n: -cards[n].coherence.raw)[:_MOST_PAIRED]
    left_out = len(cards) - len(order)
    cards, drift = [cards[n] for n in order], drift[order][:, order]
    size = drift.diagonal().clamp_min(1e-12).sqrt()
    correlation = (drift / size[:, None] / size[None, :]).clamp(-1, 1)
    names = [_short(card) for card in cards]
    left, cell = 150, max(14, min(30, 600 // max(1, len(cards))))
    figure = Figure(left + cell * len(cards) + 10, cell * len(cards) + 10, f"Drift correlations of {len(cards)} atoms")
    for j, name in enumerate(names):
        figure.text(left - 6, 5 + cell * (j + 0.5) + 4, _clip(name, 22), "end", "tick")
        for k in range(len(names)):
            value = float(correlation[j, k])
            told = element("title", f"{name} with {names[k]}: {value:+.2f}")
            figure.add("rect", told, x=left + cell * k, y=5 + cell * j, width=cell, height=cell,
                       class_=f"cell {'plus' if value >= 0 else 'minus'}", style=f"--t:{100 * abs(value):.0f}")  # fmt: skip
    return {"svg": figure.render(widest=1.4), "left_out": left_out}


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


def _clip(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


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


def _interval(rate: float, n: int) -> tuple[float, float]:
    return wilson_interval(round(rate * n), n)
