"""Keys and values of prompts computed lately, so that a prompt that begins alike need not be read again.

Knows tokens, mixes and transformers' cache; nothing of requests or rows. What a prompt's keys and values are depends on
the mix that it was read with, so a prefix is found under that mix alone. A prompt that is read unsteered, whatever steers
its answer, is kept under the empty mix, which all those requests share.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from atoms.mix import Mix
from server.embedded.kv import prompt_cache

_WORTHWHILE = 64
"""Tokens below which reading again, together with other requests, is cheaper than going alone."""


@dataclass(frozen=True, slots=True)
class KnownPrefix:
    """The first `length` columns of kept keys and values, (H, T, D) each, by layer."""

    layers: tuple[tuple[Tensor, Tensor], ...]
    length: int

    def as_cache(self) -> Cache:
        """A prefilled cache of one row; the kept tensors are not written to."""
        cache = prompt_cache()
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys[None, :, : self.length], values[None, :, : self.length], index)
        return cache


class PrefixCache:
    """Keeps up to `max_tokens` columns in all, those used least lately leaving first. 0 keeps nothing. Not thread-safe."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._known: OrderedDict[tuple[Mix, tuple[int, ...]], KnownPrefix] = OrderedDict()
        self.tokens = 0

    def find(self, mix: Mix, tokens: tuple[int, ...], *, whole: bool) -> KnownPrefix | None:
        """The longest kept beginning of `tokens` under `mix`, if it is worth using. Unless `whole` it leaves the last
        token, whose logits the caller needs."""
        most = len(tokens) if whole else len(tokens) - 1
        best, length = None, _WORTHWHILE - 1
        for key in self._known:
            if key[0] == mix and (common := min(_common(key[1], tokens), most)) > length:
                best, length = key, common
        if best is None:
            return None
        self._known.move_to_end(best)
        return KnownPrefix(self._known[best].layers, length)

    def keep(self, mix: Mix, tokens: tuple[int, ...], computed: Cache, row: int) -> None:
        """Copies the last len(tokens) columns of row `row` of `computed`, unless they are kept already."""
        if not _WORTHWHILE <= len(tokens) <= self._max_tokens:
            return
        for key in list(self._known):
            if key[0] == mix and _common(key[1], tokens) == min(len(key[1]), len(tokens)):
                if len(key[1]) >= len(tokens):
                    return
                self._drop(key)  # what begins the new one is in it
        sources: list[DynamicLayer] = computed.layers  # type: ignore[assignment]
        layers = tuple((_copied(source.keys, row, tokens), _copied(source.values, row, tokens)) for source in sources)
        self._known[mix, tokens] = KnownPrefix(layers, len(tokens))
        self.tokens += len(tokens)
        while self.tokens > self._max_tokens:
            self._drop(next(iter(self._known)))

    def clear(self) -> None:
        self._known.clear()
        self.tokens = 0

    def _drop(self, key: tuple[Mix, tuple[int, ...]]) -> None:
        self.tokens -= self._known.pop(key).length


def _copied(states: Tensor | None, row: int, tokens: tuple[int, ...]) -> Tensor:
    assert states is not None
    return states[row, :, -len(tokens) :].clone()


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(place for place in range(shorter) if one[place] != other[place])
