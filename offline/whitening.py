"""Fits what rows are standardised with: their mean, and the leading principal components that hide the rest.

    X        centred unit rows (N, D);  v_i = share of Σ‖x‖² along component i
    f_i      √(ρ / (v_i + ρ)): a component that carries much more than the ridge ρ is whitened, one with much less is left alone
    ρ        `ridge`, but at least 10 / N: N documents have a mean share of 1 / N each, and what is not far above that is
             chance, which whitening would only blow up

The components come from subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4): a few passes over the shards,
each adding up XᵀXQ (D, r), so that memory does not grow with N.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from atoms.projection import RowWhitening
from offline.config import WhiteningConfig
from offline.rows import RowStore

_PASSES = 6
_OVERSAMPLING = 16
_ABOVE_CHANCE = 10.0
_NEGLIGIBLE = 0.05
"""Components whose factor is within 5% of 1 are left out."""


def fit_whitening(store: RowStore, config: WhiteningConfig) -> RowWhitening:
    """The mean (zero with `centred` off) and the leading components of all rows of `store`; deterministic."""
    centring = RowWhitening.centring(_mean(store) if config.centred else torch.zeros(_width(store)))
    if not config.ridge:
        return centring
    components, shares = _leading(store, centring, config.components)
    ridge = max(config.ridge, _ABOVE_CHANCE / len(store))
    factors = (ridge / (shares + ridge)).sqrt()
    shrunk = factors < 1 - _NEGLIGIBLE
    return replace(centring, components=components[:, shrunk].contiguous(), factors=factors[shrunk])


def _leading(store: RowStore, centring: RowWhitening, count: int) -> tuple[Tensor, Tensor]:
    """(components (D, r), shares of variance (r,)), largest first."""
    count = min(count, len(store) - 1, len(centring.mean))
    width = min(count + _OVERSAMPLING, len(centring.mean))
    basis = torch.randn(len(centring.mean), width, generator=torch.Generator().manual_seed(0))
    for _ in range(_PASSES):
        basis = torch.linalg.qr(basis).Q
        basis = torch.stack([rows.T @ (rows @ basis) for rows in _blocks(store, centring)]).sum(0)
    basis = torch.linalg.qr(basis).Q
    gram = torch.zeros(width, width, dtype=torch.float64)
    total = 0.0
    for rows in _blocks(store, centring):
        projected = (rows @ basis).double()
        gram += projected.T @ projected
        total += float(rows.double().square().sum())
    values, vectors = torch.linalg.eigh(gram)
    order = torch.argsort(values, descending=True)[:count]
    return basis @ vectors[:, order].float(), (values[order] / total).float()


def _blocks(store: RowStore, centring: RowWhitening) -> Iterator[Tensor]:
    for rows in store.stored():
        yield centring.apply(rows)[0]


def _mean(store: RowStore) -> Tensor:
    """μ (D,) of the stored rows, summed in float64: the fine-tune's common direction."""
    total = torch.stack([rows.double().sum(0) for rows in store.stored()]).sum(0)
    return (total / len(store)).float()


def _width(store: RowStore) -> int:
    return next(store.stored()).shape[1]
