"""Controls of equal KL: what any direction would do that costs the same drift.

    random      a random unit row in whitened coordinates, unprojected
    shuffled    the atom's own whitened row with its coordinates permuted: the same sizes at the wrong places; unprojected

and, with documents (offline/evaluation/document_controls.py), what the atoms' own recipe makes of

    random-documents    documents drawn at random
    supervised          documents with the behaviour's label: what labels would have bought

The strength of each is set so that the measured KL is that of the atom at its chosen coefficient, along the same answers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from atoms.mix import Mix
from atoms.package import Package
from atoms.projection import Projection
from atoms.space import Direction
from offline.calibrate import DriftMeter, fisher_norm

_KL_TOLERANCE = 0.03
_MAX_STEPS = 12


def random_row(size: int, seed: int) -> Tensor:
    """A random unit row (D,): uniform on the sphere of whitened coordinates."""
    row = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return row / row.norm()


def shuffled_row(row: Tensor, seed: int) -> Tensor:
    """`row` (D,) with its coordinates in random order."""
    return row[torch.randperm(len(row), generator=torch.Generator().manual_seed(seed))]


def atom_row(package: Package, projection: Projection, atom: str) -> Tensor:
    """The row (D,) that is unprojected to an atom, or to its part on the kept components."""
    direction = package.bank.direction(Mix.of({atom: 1.0}))
    return projection.row_of(direction, package.manifest.conventions.unprojection_exponent)


def projection_of(package: Package) -> Projection:
    return Projection.from_tensors(package.base_adapter.space, package.projection_tensors)


def control_direction(
    projection: Projection, meter: DriftMeter, direction: Direction, sign: float, target: float
) -> tuple[Direction, float]:
    """`direction`, times `sign`, at the strength that costs `target` nats a token; and its KL.

    Starts from the block-diagonal Fisher and the square root of what is measured; once the target lies between two
    strengths, goes on between them on a log-log scale, until within 3%. Comes back as near as it got after 12 steps: look
    at the KL.
    """
    scale = math.sqrt(2 * target / max(fisher_norm(projection, direction), 1e-30))
    below: tuple[float, float] | None = None  # the strongest strength known to cost too little, and its KL
    above: tuple[float, float] | None = None
    for _ in range(_MAX_STEPS):
        scaled = {key: value * sign * scale for key, value in direction.items()}
        kl = meter.kl(scaled)
        if abs(kl / target - 1) <= _KL_TOLERANCE:
            break
        if kl < target:
            below = (scale, max(kl, 1e-9))
        else:
            above = (scale, kl)
        scale = _between(below, above, target) if below and above else scale * _bounded_root(target / max(kl, 1e-9))
    return scaled, kl


def _bounded_root(ratio: float) -> float:
    return min(4.0, max(0.25, math.sqrt(ratio)))


def _between(below: tuple[float, float], above: tuple[float, float], target: float) -> float:
    """The strength at which a power law through both points costs `target`, kept off the ends so that each step shrinks."""
    share = math.log(target / below[1]) / math.log(above[1] / below[1])
    return below[0] * (above[0] / below[0]) ** min(0.9, max(0.1, share))
