"""Which arm a unit gets: a pure function of the experiment's seed, its arms' shares and the unit's name.

So every replica gives the same answer without asking another, and so can a client. The hash and the ranges are
GrowthBook's version 2 (its SDK specification, "hash" and "getBucketRanges"): each arm owns a segment of [0, 1) as long
as its share, of which the first `coverage` part takes part. A ramp moves the ends of ranges and no beginning, so it
brings units in or sends them out and never moves one from arm to arm.

Symbols: n is the unit's place, 0 <= n < 1, in steps of 1e-4.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

_OFFSET, _PRIME, _32_BITS = 0x811C9DC5, 0x01000193, 0xFFFFFFFF
_PLACES = 10_000
_ALL_PLACES = tuple(n / _PLACES for n in range(_PLACES))

Range = tuple[float, float]
"""Half open: from the first number, up to but without the second."""


def fnv1a32(text: str) -> int:
    """The 32-bit FNV-1a hash of `text` in UTF-8 (Fowler, Noll and Vo)."""
    value = _OFFSET
    for byte in text.encode():
        value = ((value ^ byte) * _PRIME) & _32_BITS
    return value


def place(seed: str, unit: str) -> float:
    """n of `unit`. The second hash is what makes places under two seeds independent."""
    return fnv1a32(str(fnv1a32(seed + unit))) % _PLACES / _PLACES


def ranges(shares: Sequence[float], coverage: float) -> list[Range]:
    """The arms' ranges, in the order of `shares`, which add up to 1; `coverage` in [0, 1]."""
    starts = [0.0, *accumulate(shares)]
    return [(start, start + coverage * share) for start, share in zip(starts, shares)]


def choose(n: float, arms: Sequence[Range]) -> int | None:
    """The index of the range that holds n; None for a unit that does not take part."""
    return next((index for index, (start, end) in enumerate(arms) if start <= n < end), None)


def shares_of_places(arms: Sequence[Range]) -> list[float]:
    """The part of the places that take part which falls to each range; all 0 if none does. Ranges of a few places differ in
    length from the shares that they were made of."""
    counts = [bisect_left(_ALL_PLACES, end) - bisect_left(_ALL_PLACES, start) for start, end in arms]
    return [count / max(1, sum(counts)) for count in counts]
