"""Coherence of an atom: the mean pairwise cosine of the gradients of its top documents, sign-aligned,

    (‖Σ σ_i ĝ_i‖² − Σ ‖ĝ_i‖²) / (n (n − 1))      for unit vectors ĝ_i (sketches have unit length on average),

raw (from sketches, see offline/rows.py) and whitened. Its z-score is against random sets of documents whose response
lengths fall into the same bins, because length alone makes gradients alike.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NULL_SETS = 64
"""Random sets of documents that an atom's coherence is compared with."""
_LEAST_DEVIATION = 1e-6
"""Of sets that are all the same, rounding is left."""
_POOL_BLOCK = 128
"""Vectors of random sets that are read at once: what their sums need does not grow with the corpus."""
_LENGTH_BINS = 8


def coherence(unit: Tensor, signs: Tensor) -> float:
    """Mean pairwise cosine of sign-aligned unit vectors (n, S), by the identity in the module docstring."""
    n = len(unit)
    total = (unit * signs[:, None]).sum(0)
    return float((total.square().sum() - unit.square().sum()) / (n * (n - 1)))


class LengthMatchedSets:
    """Draws random sets of documents whose lengths fall into the same quantile bins as a given set's."""

    def __init__(self, documents: Sequence[int], lengths: Sequence[int], seed: int) -> None:
        values = torch.tensor([float(lengths[d]) for d in documents])
        edges = torch.quantile(values, torch.linspace(0, 1, _LENGTH_BINS + 1)[1:-1]) if len(values) > 1 else values[:0]
        bins = torch.bucketize(values, edges)
        self._bin = dict(zip(documents, bins.tolist(), strict=True))
        self._members = {b: [d for d in documents if self._bin[d] == b] for b in set(bins.tolist())}
        self._seed = seed

    def draw(self, members: Sequence[int], sets: int) -> list[list[int]]:
        """`sets` random sets, each with as many documents of every bin as `members` has, without repeats. The time does not
        grow with the corpus."""
        generator = random.Random(self._seed)
        wanted = sorted(Counter(self._bin[d] for d in members).items())
        return [[d for b, count in wanted for d in generator.sample(self._members[b], count)] for _ in range(sets)]


def coherence_z(
    load: Callable[[Sequence[int]], Tensor], members: Sequence[int], signs: Tensor, sets: Sequence[Sequence[int]]
) -> tuple[float, float, tuple[float, float]]:
    """(coherence, z against that of the random `sets`, their mean and standard deviation).

    `load` gives unit vectors (n, S) of documents.
    """
    value = coherence(load(members), signs)
    pool = sorted({document for one in sets for document in one})
    membership = torch.tensor([[float(document in one) for document in pool] for one in map(set, sets)])
    summed, squares = torch.zeros(()), torch.zeros(len(sets))
    for start in range(0, len(pool), _POOL_BLOCK):
        vectors, within = load(pool[start : start + _POOL_BLOCK]), membership[:, start : start + _POOL_BLOCK]
        summed = summed + within @ vectors
        squares += within @ vectors.square().sum(1)
    sizes = membership.sum(1)
    values = (summed.square().sum(1) - squares) / (sizes * (sizes - 1))
    mean, deviation = float(values.mean()), float(values.std())
    z = (value - mean) / deviation if deviation > _LEAST_DEVIATION else 0.0
    return value, z, (mean, deviation)
