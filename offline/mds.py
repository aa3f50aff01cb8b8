"""A map of the dictionary: points in the plane whose distances follow those between atoms. Knows unit vectors only.

Metric multidimensional scaling by majorisation (SMACOF; de Leeuw 1977), started from classical scaling, so it is
deterministic. The stress is minimised over the raw distances √(2 − 2 cos) of unit vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ITERATIONS = 300
_TOLERANCE = 1e-7


def plane(atoms: Tensor) -> tuple[Tensor, float]:
    """((n, 2) float64 positions of unit vectors (n, D), rank correlation of the pairs' distances there and in truth).

    The correlation says how far the map may be trusted; it is 1 for fewer than three atoms, 0 where all distances agree.
    """
    from scipy.stats import spearmanr

    unit = torch.nn.functional.normalize(atoms.double(), dim=1)
    distances = (2 - 2 * (unit @ unit.T).clamp(-1, 1)).sqrt()
    positions = _majorise(_classical(distances), distances)
    if len(atoms) < 3:
        return positions, 1.0
    rows, columns = torch.triu_indices(len(atoms), len(atoms), 1)
    pairs = [torch.cdist(positions, positions)[rows, columns], distances[rows, columns]]
    if any(bool((values == values[0]).all()) for values in pairs):
        return positions, 0.0
    return positions, float(spearmanr(*(values.numpy() for values in pairs)).statistic)


def _classical(distances: Tensor) -> Tensor:
    """Torgerson's solution: the two leading eigenvectors of the doubly centred squared distances, (n, 2)."""
    squares = distances.square()
    centred = -0.5 * (squares - squares.mean(0) - squares.mean(1, keepdim=True) + squares.mean())
    values, vectors = torch.linalg.eigh(centred)
    pivots = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # reruns agree on the signs
    scaled = (vectors * pivots * values.clamp_min(0).sqrt()).flip(1)[:, :2]
    return torch.nn.functional.pad(scaled, (0, 2 - scaled.shape[1]))


def _majorise(positions: Tensor, distances: Tensor) -> Tensor:
    """Guttman transforms until the stress settles."""
    before = float("inf")
    for _ in range(_ITERATIONS):
        current = torch.cdist(positions, positions)
        stress = float((current - distances).square().sum())
        if before - stress <= _TOLERANCE * max(stress, 1e-12):
            break
        before = stress
        ratio = torch.where(current > 1e-12, distances / current.clamp_min(1e-12), torch.zeros_like(current))
        laplacian = torch.diag(ratio.sum(1)) - ratio
        positions = laplacian @ positions / len(positions)
    return positions
