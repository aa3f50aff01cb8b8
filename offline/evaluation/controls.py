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
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from atoms.mix import Mix
from atoms.package import Package
from atoms.projection import Projection
from atoms.space import Direction
from atoms.storage import write_tensors
from offline.calibrate import DriftMeter, fisher_norm, solve_strength
from offline.evaluation.results import RANDOM, SHUFFLED, drawn

_KL_TOLERANCE = 0.03
_MAX_TRIALS = 12
EQUAL_KL = 0.15
"""A control whose KL is further from the atom's than this share is none."""


@dataclass(frozen=True)
class Control:
    """The way that a control goes: `sign` times `direction`, of no particular strength."""

    name: str
    direction: Direction
    sign: float = 1.0


def row_controls(package: Package, projection: Projection, atom: str, draws: int, seed: int) -> list[Control]:
    """The controls of `atom` (an id) that are made of whitened rows: shuffled, and `draws` random ones."""
    rows = {SHUFFLED: shuffled_row(atom_row(package, projection, atom), seed)}
    rows |= {drawn(RANDOM, n + 1): random_row(projection.dim, seed + n) for n in range(draws)}
    exponent = package.manifest.conventions.unprojection_exponent
    return [Control(name, projection.unproject(row, exponent)) for name, row in rows.items()]


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


def kept_control(
    file: Path, projection: Projection, meter: DriftMeter, control: Control, target: float
) -> tuple[Direction, float]:
    """`control_direction` of an earlier run, or a new one that is kept in `file`: its weights must not change, or its answers
    would."""
    if not file.exists():
        direction, kl = control_direction(projection, meter, control, target)
        write_tensors(file, direction, {"kl": repr(kl)})
    with safe_open(file, framework="pt") as kept:
        return {key: kept.get_tensor(key) for key in kept.keys()}, float(kept.metadata()["kl"])  # noqa: SIM118


def control_direction(
    projection: Projection, meter: DriftMeter, control: Control, target: float
) -> tuple[Direction, float]:
    """`control` at the strength that costs `target` nats a token within 3%, or as near as 12 trials get: look at the KL, which
    comes with it."""
    start = math.sqrt(2 * target / max(fisher_norm(projection, control.direction), 1e-30))
    towards = {key: value * control.sign for key, value in control.direction.items()}
    scale, kl = solve_strength(lambda scale: meter.kl(towards, scale), target, start, _KL_TOLERANCE, _MAX_TRIALS)
    return {key: value * scale for key, value in towards.items()}, kl
