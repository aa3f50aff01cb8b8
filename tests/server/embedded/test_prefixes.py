"""Prefixes are found under their own mix alone, give back exactly what was kept, and stay within their bound."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from atoms.mix import Mix
from server.embedded.kv import prompt_cache
from server.embedded.prefixes import PrefixCache

STEERED = Mix.of({"a": 1.0})


def tokens(count: int, start: int = 0) -> tuple[int, ...]:
    return tuple(range(start, start + count))


def computed(ids: tuple[int, ...], rows: int = 1, width: int | None = None) -> Cache:
    """Keys that say which token they are of, right-aligned in the last row; other columns hold NaN."""
    states = torch.full((rows, 1, width or len(ids), 2), torch.nan)
    states[-1, 0, -len(ids) :] = torch.tensor(ids).float()[:, None]
    cache = prompt_cache()
    for layer in range(2):
        cache.update(states + layer, -states - layer, layer)
    return cache


def test_the_longest_common_beginning_is_given_back() -> None:
    cache = PrefixCache(1000)
    cache.keep(Mix(), tokens(100), computed(tokens(100), rows=3, width=120), row=2)
    cache.keep(Mix(), tokens(80) + tokens(40, 500), computed(tokens(80) + tokens(40, 500)), row=0)
    found = cache.find(Mix(), (*tokens(90), 7, 8), whole=False)
    assert found is not None and found.length == 90
    layers = found.as_cache().layers
    for layer in range(2):
        assert layers[layer].keys[0, 0, :, 0].tolist() == [token + layer for token in tokens(90)]
        assert layers[layer].values[0, 0, :, 0].tolist() == [-token - layer for token in tokens(90)]


def test_a_prefix_is_its_mix_s_own() -> None:
    cache = PrefixCache(1000)
    cache.keep(STEERED, tokens(100), computed(tokens(100)), 0)
    assert cache.find(Mix(), tokens(100), whole=True) is None
    assert cache.find(Mix.of({"a": 1.0001}), tokens(100), whole=True) is None
    assert cache.find(STEERED, tokens(100), whole=True) is not None


def test_the_last_token_is_left_to_be_computed_unless_the_whole_is_wanted() -> None:
    cache = PrefixCache(1000)
    cache.keep(Mix(), tokens(100), computed(tokens(100)), 0)
    for whole, length in ((True, 100), (False, 99)):
        found = cache.find(Mix(), tokens(100), whole=whole)
        assert found is not None and found.length == length


def test_short_prefixes_are_not_worth_it() -> None:
    cache = PrefixCache(1000)
    cache.keep(Mix(), tokens(63), computed(tokens(63)), 0)
    cache.keep(Mix(), tokens(100), computed(tokens(100)), 0)
    assert cache.tokens == 100
    assert cache.find(Mix(), (*tokens(63), *tokens(50, 900)), whole=False) is None


def test_what_was_used_least_lately_leaves_first_and_the_bound_holds() -> None:
    cache = PrefixCache(300)
    for start in (0, 1000, 2000):
        cache.keep(Mix(), tokens(100, start), computed(tokens(100, start)), 0)
    assert cache.find(Mix(), tokens(100), whole=True) is not None
    cache.keep(Mix(), tokens(90, 3000), computed(tokens(90, 3000)), 0)
    assert cache.tokens == 290
    assert cache.find(Mix(), tokens(100), whole=True) is not None
    assert cache.find(Mix(), tokens(100, 1000), whole=True) is None
    cache.keep(Mix(), tokens(301, 9000), computed(tokens(301, 9000)), 0)
    assert cache.tokens == 290, "a prompt above the bound must not push the others out"


def test_a_longer_prompt_takes_the_place_of_its_beginning_and_a_known_one_is_not_kept_twice() -> None:
    cache = PrefixCache(1000)
    for count in (100, 150, 120):
        cache.keep(Mix(), tokens(count), computed(tokens(count)), 0)
    assert cache.tokens == 150
    cache.clear()
    assert cache.tokens == 0 and cache.find(Mix(), tokens(150), whole=True) is None


def test_nothing_is_kept_without_room() -> None:
    cache = PrefixCache(0)
    cache.keep(Mix(), tokens(100), computed(tokens(100)), 0)
    assert cache.tokens == 0


def test_going_on_from_a_prefix_does_not_write_to_it() -> None:
    cache = PrefixCache(1000)
    cache.keep(Mix(), tokens(100), computed(tokens(100)), 0)
    for _ in range(2):
        found = cache.find(Mix(), tokens(100), whole=True)
        assert found is not None
        going_on = found.as_cache()
        going_on.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)
        assert going_on.layers[0].keys.shape[2] == 101
