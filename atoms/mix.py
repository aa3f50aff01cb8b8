"""A mix: which atoms, how strongly. Canonical, frozen and hashable, so that equal mixes compare and hash equal.

Knows atom ids as opaque strings. Names (aliases), ranges and budgets are resolved elsewhere (`atoms.package`,
`server.steering`); weights are composed in `atoms.adapter`.

A coefficient c_j is in units of calibrated drift: an atom at ±1 changes the next-token distribution by 0.05 nats a token
on average. What a mix of several costs is predicted in `atoms.drift`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from atoms.errors import CoefficientError, MixError

DECODE_SUFFIX = "-decode"
"""Ends the digest of a mix that does not steer the prompt."""
COEFFICIENT_STEP = 1e-4
"""Coefficients are rounded to this step before they are composed or hashed."""
MAX_COEFFICIENT = 1e3
"""Largest |coefficient| that can be written at all; the tested range of an atom is far smaller."""


@dataclass(frozen=True, slots=True)
class Mix:
    """Sparse map atom id -> coefficient, as (id, coefficient in steps of 1e-4) pairs sorted by id, without zeros."""

    steps: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, coefficients: Mapping[str, float]) -> Mix:
        """Rounds to 1e-4 and drops zeros. Raises CoefficientError for NaN, infinities and |c| above `MAX_COEFFICIENT`."""
        steps = []
        for atom, value in sorted(coefficients.items()):
            if not abs(value) <= MAX_COEFFICIENT:  # also NaN, infinities, and integers too large for a float
                raise CoefficientError(
                    f"coefficient {value!r} of atom {atom!r} is not a finite number within ±{MAX_COEFFICIENT:g}; "
                    "usual values lie within ±3",
                    param=f"steering.atoms.{atom}",
                )
            rounded = round(value / COEFFICIENT_STEP)
            if rounded:
                steps.append((atom, rounded))
        return cls(tuple(steps))

    def __iter__(self) -> Iterator[tuple[str, float]]:
        """(id, coefficient) pairs, sorted by id."""
        return ((atom, _to_float(steps)) for atom, steps in self.steps)

    def __bool__(self) -> bool:
        return bool(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def as_dict(self) -> dict[str, float]:
        return dict(self)

    def scaled(self, factor: float) -> Mix:
        """All coefficients multiplied by `factor`, each rounded towards zero."""
        scaled = ((atom, math.trunc(steps * factor)) for atom, steps in self.steps)
        return Mix(tuple((atom, steps) for atom, steps in scaled if steps))

    def digest(self, fingerprint: str, composition: str, content_hashes: Mapping[str, str]) -> str:
        """``m-`` and 16 hex: the identity of this mix for caches.

        Covers the package fingerprint, the composition, each atom's content hash and the canonical coefficients.
        """
        body = [fingerprint, composition, [[content_hashes[atom], steps] for atom, steps in self.steps]]
        return "m-" + hashlib.sha256(json.dumps(body).encode()).hexdigest()[:16]


def digest_in_phase(digest: str, mix: Mix, phase: str) -> str:
    """The identity for caches of `mix` (whose own is `digest`) in `phase`; no mix is the same in both."""
    return digest + DECODE_SUFFIX if mix and phase == "decode" else digest


def _to_float(steps: int) -> float:
    return round(steps * COEFFICIENT_STEP, 4)


def parse_mix(entries: str | Sequence[str]) -> dict[str, float]:
    """Reads ``"bulleted-list=2,code=-1"`` (or several such texts) into name -> coefficient; names are not resolved here.

    Raises MixError for an entry that is not ``name=number``, a number that is not finite, or a name that occurs twice.
    """
    parsed: dict[str, float] = {}
    for text in [entries] if isinstance(entries, str) else entries:
        for entry in filter(None, (part.strip() for part in text.split(","))):
            name, separator, number = entry.rpartition("=")
            try:
                value = float(number)
            except ValueError:
                separator = ""
            if not separator or not name.strip():
                raise MixError(f"{entry!r} is not of the form name=coefficient, such as bulleted-list=2")
            if not math.isfinite(value):
                raise MixError(f"{entry!r} has no finite coefficient; give a number such as 2")
            if name.strip() in parsed:
                raise MixError(f"atom {name.strip()!r} occurs twice in the mix; give it one coefficient")
            parsed[name.strip()] = value
    return parsed


def mix_text(coefficients: Mapping[str, float], separator: str = ",") -> str:
    """``a=2,b=-1``, as `parse_mix` reads it; "unsteered" for none."""
    return separator.join(f"{name}={value:g}" for name, value in coefficients.items()) or "unsteered"
