"""The report's figures but for its map: of a card, and of the whole dictionary. Made of escaped parts (offline/svg.py)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from atoms.manifest import AtomCard
from offline.evaluation.statistics import wilson_interval
from offline.svg import Figure, Scale, element, histogram

_MOST_BARS, _MOST_PAIRED = 600, 48
"""Bars of one figure, and atoms of the figure of pairs: more could not be told apart, and would make the page large."""
_SERIES = 3
_NAMED_EFFECT = 0.1
"""Besides the atom's own detector, the plot shows detectors whose rate changes by at least this much."""


def null_strip(card: AtomCard) -> Markup | None:
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


def drift_curve(card: AtomCard, drift: float) -> Markup:
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


def dose_response(card: AtomCard) -> Markup | None:
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
            bottom, top = interval(rate, n)
            figure.rule(x(c) + shift, y(bottom), x(c) + shift, y(top), f"whisker s{number}")
            told = element("title", f"{name} {rate:.0%} [{bottom:.0%}, {top:.0%}] of {n} at {c:g}, {mine[0].decoding}")
            figure.add("circle", told, cx=f"{x(c) + shift:.1f}", cy=f"{y(rate):.1f}", r=3.8, class_=f"mark s{number}")
        width = 300 // len(shown)
        figure.text(40 + width * number, 15, clip(name, width // 6), "start", f"name s{number}")
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


def spectrum(projection: Mapping[str, Tensor]) -> list[dict[str, Any]]:
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


def mean_row_by_layer(mean_row: Mapping[str, Any]) -> dict[str, Any] | None:
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


def sparsity(projection: Mapping[str, Tensor]) -> dict[str, Any] | None:
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


def together(cards: Sequence[AtomCard], drift: Tensor) -> dict[str, Any]:
    """The drift matrix as correlations M_jk / √(M_jj M_kk), a cell a pair; of many atoms the most coherent ones."""
    order = sorted(range(len(cards)), key=lambda n: -cards[n].coherence.raw)[:_MOST_PAIRED]
    left_out = len(cards) - len(order)
    cards, drift = [cards[n] for n in order], drift[order][:, order]
    size = drift.diagonal().clamp_min(1e-12).sqrt()
    correlation = (drift / size[:, None] / size[None, :]).clamp(-1, 1)
    names = [short_name(card) for card in cards]
    left, cell = 150, max(14, min(30, 600 // max(1, len(cards))))
    figure = Figure(left + cell * len(cards) + 10, cell * len(cards) + 10, f"Drift correlations of {len(cards)} atoms")
    for j, name in enumerate(names):
        figure.text(left - 6, 5 + cell * (j + 0.5) + 4, clip(name, 22), "end", "tick")
        for k in range(len(names)):
            value = float(correlation[j, k])
            told = element("title", f"{name} with {names[k]}: {value:+.2f}")
            figure.add("rect", told, x=left + cell * k, y=5 + cell * j, width=cell, height=cell,
                       class_=f"cell {'plus' if value >= 0 else 'minus'}", style=f"--t:{100 * abs(value):.0f}")  # fmt: skip
    return {"svg": figure.render(widest=1.4), "left_out": left_out}


def short_name(card: AtomCard, words: int = 2) -> str:
    """The alias, else the first keywords (real words before signs), else the id."""
    letters = [word for word in card.keywords if word.isalpha() and len(word) > 1]
    return clip(card.alias or ", ".join((letters or card.keywords)[:words]) or card.id, 32)


def clip(text: str, longest: int) -> str:
    """`text`, or its beginning and an ellipsis: at most `longest` letters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def interval(rate: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a rate of `n` answers."""
    return wilson_interval(round(rate * n), n)
