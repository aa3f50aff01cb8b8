"""Fits what rows are standardised with: their mean, and the leading principal components that hide the rest.

    X        centred unit rows (N, D);  v_i = share of Σ‖x‖² along component i
    f_i      √(ρ / (v_i + ρ)): a component that carries much more than the ridge ρ is whitened, one with much less is left alone
    ρ        `ridge`, but at least 10 / N: N documents have a mean share of 1 / N each, and what is not far above that is
             chance, which whitening would only blow up

The components come from subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4): a few passes over the shards,
each adding up XᵀXQ (D, r), so that memory does not grow with N.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from atoms.projection import RowWhitening
from atoms.space import natural_key
from offline.config import WhiteningConfig
from offline.progress import Progress, Task
from offline.ranks import ALONE, Ranks
from offline.rows import RowStore

_PASSES = 6
_OVERSAMPLING = 16
_ABOVE_CHANCE = 10.0
_NEGLIGIBLE = 0.05
"""Components whose factor is within 5% of 1 are left out."""


def fit_whitening(store: RowStore, config: WhiteningConfig, progress: Progress, ranks: Ranks = ALONE) -> RowWhitening:
    """The mean (zero with `centred` off) and the leading components of all rows of `store`; deterministic."""
    passes = config.centred + (_PASSES + 1 if config.ridge else 0)
    if not passes:
        return RowWhitening.centring(torch.zeros(store.width))
    with progress.task("whitening", passes, "passes") as bar:
        mean = torch.zeros(store.width)
        if config.centred:
            mean = _mean(store, ranks)
            bar.advance()
        centring = RowWhitening.centring(mean)
        return _shrinking(store, centring, config, bar, ranks) if config.ridge else centring


def common_direction(store: RowStore, parts: Iterable[tuple[str, slice]]) -> dict[str, object]:
    """What the removed mean row μ is to the rows x: the fine-tune's direction that all documents share.

    parts: (tensor key, its slice of a row), as `Projection.slices` gives. `share` ‖μ‖² / mean ‖x‖²; `median_cosine` of a row
    with it; `by_layer`, [the layer's number, its share of ‖μ‖²], "none" for what is in no layer.
    Empty if no mean was removed.
    """
    mean = store.whitening.mean
    if not mean.any():
        return {}
    unit, cosines, squares = torch.nn.functional.normalize(mean, dim=0), [], 0.0
    for rows in store.stored_shards():
        norms = rows.norm(dim=1)
        squares += float(norms.double().square().sum())
        cosines.append((rows @ unit) / norms.clamp_min(torch.finfo(norms.dtype).tiny))
    layers: dict[str, float] = {}
    for key, part in parts:
        number = re.search(r"\.(\d+)\.", key)
        layer = number[1] if number else "none"
        layers[layer] = layers.get(layer, 0.0) + float(unit[part].square().sum())
    return {
        "share": float(mean.double().square().sum()) * len(store) / squares,
        "median_cosine": float(torch.cat(cosines).median()),
        "by_layer": [[layer, round(layers[layer], 6)] for layer in sorted(layers, key=natural_key)],
    }


def _shrinking(
    store: RowStore, centring: RowWhitening, config: WhiteningConfig, bar: Task, ranks: Ranks
) -> RowWhitening:
    components, shares = _leading(store, centring, config.components, bar, ranks)
    ridge = max(config.ridge, _ABOVE_CHANCE / len(store))
    factors = (ridge / (shares + ridge)).sqrt()
    shrunk = factors < 1 - _NEGLIGIBLE
    return replace(centring, components=components[:, shrunk].contiguous(), factors=factors[shrunk])


def _leading(store: RowStore, centring: RowWhitening, count: int, bar: Task, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """(components (D, r), shares of variance (r,)), largest first."""
    count = min(count, len(store) - 1, store.width)
    width = min(count + _OVERSAMPLING, store.width)
    basis = torch.randn(store.width, width, generator=torch.Generator().manual_seed(0))
    for _ in range(_PASSES):
        basis = torch.linalg.qr(basis).Q
        product = torch.zeros_like(basis)
        for rows in _blocks(store, centring, ranks):
            product += rows.T @ (rows @ basis)
        ranks.add(product)
        basis = product
        bar.advance()
    basis = torch.linalg.qr(basis).Q
    gram = torch.zeros(width, width, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for rows in _blocks(store, centring, ranks):
        projected = (rows @ basis).double()
        gram += projected.T @ projected
        total += rows.double().square().sum()
    ranks.add(gram, total)
    bar.advance()
    values, vectors = torch.linalg.eigh(gram)
    order = torch.argsort(values, descending=True)[:count]
    return basis @ vectors[:, order].float(), (values[order] / total).float()


def _blocks(store: RowStore, centring: RowWhitening, ranks: Ranks) -> Iterator[Tensor]:
    for rows in store.stored_shards(ranks):
        yield centring.apply(rows)[0]


def _mean(store: RowStore, ranks: Ranks) -> Tensor:
    """μ (D,) of the stored rows, summed in float64: the fine-tune's common direction."""
    total = torch.zeros(store.width, dtype=torch.float64)
    for rows in store.stored_shards(ranks):
        total += rows.double().sum(0)
    ranks.add(total)
    return (total / len(store)).float()
