"""Controls of equal KL: what any direction would do that costs the same drift.

    random      a random unit row in whitened coordinates
    shuffled    the atom's own whitened row with its coordinates permuted: the same sizes at the wrong places
    supervised  the mean gradient of the documents with the behaviour's label: what labels would have bought
                (offline/evaluation/supervised.py)

Each is a whitened row that goes through the atoms' own unprojection; then its strength is set so that the measured KL is
that of the atom at its chosen coefficient, along the same answers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from atoms.package import Package
from atoms.projection import Projection, RowWhitening
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


def atom_row(package: Package, atom: str) -> Tensor:
    """The row (D,) that an atom was unprojected from, before its orientation."""
    tensors = package.projection_tensors
    row = tensors["dictionary"][int(tensors["dictionary_index"][package.index[atom]])]
    return RowWhitening.from_tensors(tensors).undo(row, package.manifest.conventions.unprojection_exponent)


def projection_of(package: Package) -> Projection:
    return Projection.from_tensors(package.base_adapter.space, package.projection_tensors)


def control_direction(
    package: Package, projection: Projection, meter: DriftMeter, row: Tensor, sign: float, target: float
) -> tuple[Direction, float]:
    """The direction of whitened `row`, times `sign`, at the strength that costs `target` nats a token; and its KL.

    Starts from the block-diagonal Fisher and the square root of what is measured; once the target lies between two
    strengths, goes on between them on a log-log scale, until within 3%. Comes back as near as it got after 12 steps: look
    at the KL.
    """
    exponent = package.manifest.conventions.unprojection_exponent
    unit = projection.unproject(row, exponent)
    scale = math.sqrt(2 * target / max(fisher_norm(projection, row, exponent), 1e-30))
    below: tuple[float, float] | None = None  # the strongest strength known to cost too little, and its KL
    above: tuple[float, float] | None = None
    for _ in range(_MAX_STEPS):
        scaled = {key: value * sign * scale for key, value in unit.items()}
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
