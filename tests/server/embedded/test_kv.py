"""The column cache against a list of plain tensors, through joins, leaves, growth and shifts."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from server.embedded.kv import ColumnCache, prompt_cache

HEADS, SIZE, LAYERS = 2, 4, 2
CPU = torch.device("cpu")


def _prefilled(states: Tensor) -> Cache:
    cache = prompt_cache()
    for layer in range(LAYERS):
        cache.update(states + layer, -states - layer, layer)
    return cache


def _step(cache: ColumnCache, rows: list[Tensor]) -> None:
    """Appends a random column to every row, and compares what attention would see with the oracle's `rows`."""
    column = torch.randn(len(rows), HEADS, 1, SIZE)
    cache.reserve_column()
    mask = cache.attention_mask(CPU)
    for layer in range(LAYERS):
        keys, values = cache.update(column + layer, -column - layer, layer)
        assert keys.shape == (len(rows), HEADS, mask.shape[1], SIZE)
        for index, row in enumerate(rows):
            expected = torch.cat([row, column[index]], dim=1) + layer
            assert torch.equal(keys[index][:, mask[index]], expected)
            assert torch.equal(values[index][:, mask[index]], -expected)
            assert not keys[index][:, ~mask[index]].isnan().any()
    assert cache.position_ids(CPU).squeeze(1).tolist() == [row.shape[1] for row in rows]
    cache.advance()
    rows[:] = [torch.cat([row, column[index]], dim=1) for index, row in enumerate(rows)]


@pytest.mark.parametrize("seed", range(3))
def test_random_joins_and_leaves_equal_a_list_of_tensors(seed: int) -> None:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    cache, rows = ColumnCache(slots=5, max_length=300), []
    for _ in range(350):
        if len(rows) < 5 and chance.random() < 0.1:
            length = chance.choice([1, 3, 40, 150, 280])
            states = torch.randn(2, HEADS, length + 3, SIZE)
            cache.append(_prefilled(states), 1, length)
            rows.append(states[1, :, -length:])
        for index in reversed(range(len(rows))):
            if rows[index].shape[1] >= 299 or chance.random() < 0.02:
                cache.remove(index)
                rows[index] = rows[-1]
                rows.pop()
        if rows:
            _step(cache, rows)
    assert cache.capacity[1] <= 300 + 75


@pytest.mark.parametrize("lengths", [(20, 5), (5, 20), (5, 5, 20)], ids=["as padding", "widened", "widened twice"])
def test_what_a_former_row_left_is_never_in_the_window(lengths: tuple[int, ...]) -> None:
    """0 · NaN is NaN: a masked column must hold zeros, not the NaN of a row that overflowed."""
    cache = ColumnCache(slots=4, max_length=100)
    rows = [torch.ones(HEADS, lengths[0], SIZE)]
    cache.append(_prefilled(rows[0][None]), 0, lengths[0])
    for _ in range(2):
        cache.append(_prefilled(torch.full((1, HEADS, 30, SIZE), torch.nan)), 0, 30)
    for index in (2, 1):
        cache.remove(index)
    for length in lengths[1:]:
        rows.append(torch.ones(HEADS, length, SIZE))
        cache.append(_prefilled(rows[-1][None]), 0, length)
        _step(cache, rows)


def test_memory_grows_with_use() -> None:
    cache = ColumnCache(slots=16, max_length=100_000)
    cache.append(_prefilled(torch.ones(1, HEADS, 10, SIZE)), 0, 10)
    assert cache.capacity == (1, 256)
    cache.append(_prefilled(torch.ones(1, HEADS, 300, SIZE)), 0, 300)
    assert cache.capacity == (2, 512)
    cache.clear()
    assert cache.capacity == (0, 0)
