"""Keys and values of all running rows on shared columns, as a transformers cache.

Knows transformers' cache interface; nothing of requests, mixes or sampling. Rows are right-aligned: row i of length L_i
occupies columns [end - L_i, end), so a decode step appends one column for all rows at once, and the distance between
two columns is the distance between two tokens. Stock mask code therefore works unchanged, sliding windows included.

    columns      0 ......... start ......................... end ........ capacity
    row 0                    k k k k k k k k k k k k k k k k |
    row 1                    0 0 0 0 0 0 0 0 k k k k k k k k |  <- the next step writes here

Symbols
    n   active rows, always 0..n-1         W = end - start   the window, the longest row's length
    H   key/value heads                    D   head dimension

Invariant: within the window every column of an active row holds a token's keys and values, or zeros. A masked column
has weight 0, but 0 · NaN is NaN, so what a former row left behind must not stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

_INITIAL_COLUMNS = 256


def prompt_cache() -> Cache:
    """An empty cache for prefilling: full keys and values in every layer, sliding-window layers too."""
    return Cache(layer_class_to_replicate=DynamicLayer)


@dataclass
class _Window:
    """Columns [start, end) that hold the running rows; one object for all layers."""

    start: int = 0
    end: int = 0


class _ColumnLayer(CacheLayerMixin):
    """One layer's buffers: keys and values (rows, H, capacity, D)."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, window: _Window, like: CacheLayerMixin) -> None:
        """No rows and no columns yet; heads, sizes, dtype and device as in the layer `like`."""
        super().__init__()
        self.window = window
        assert like.keys is not None
        assert like.values is not None
        self.lazy_initialization(like.keys, like.values)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros((0, states.shape[1], 0, states.shape[3])) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Writes one column, states (n, H, 1, D), and returns views of the window with it, (n, H, W + 1, D)."""
        n, start, end = key_states.shape[0], self.window.start, self.window.end
        self.keys[:n, :, end] = key_states[:, :, 0]
        self.values[:n, :, end] = value_states[:, :, 0]
        return self.keys[:n, :, start : end + 1], self.values[:n, :, start : end + 1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.window.end - self.window.start

    def get_max_length(self) -> int:
        return -1

    def resize(self, rows: int, columns: int, end: int, n: int) -> None:
        """New buffers (rows, H, columns, D), with the window of the first `n` rows moved so that it ends at `end`."""
        old = slice(self.window.start, self.window.end)
        new = slice(end - self.get_seq_length(), end)
        for name in ("keys", "values"):
            source = getattr(self, name)
            target = source.new_zeros((rows, source.shape[1], columns, source.shape[3]))
            target[:n, :, new] = source[:n, :, old]
            setattr(self, name, target)


class ColumnCache(Cache):
    """Column cache of up to `slots` rows of up to `max_length` tokens. Memory grows with what is used.

    Not thread-safe. A decode step is `reserve_column()`, the model's forward pass with `attention_mask()` and
    `position_ids()`, then `advance()`.
    """

    def __init__(self, slots: int, max_length: int) -> None:
        super().__init__(layers=[])
        self.layers: list[_ColumnLayer] = []  # type: ignore[assignment]  # made when the first row joins
        self.lengths: list[int] = []
        self._slots = slots
        self._max_columns = max_length + max(64, max_length // 4)  # slack, so that shifting is amortised
        self._window = _Window()
        self._rows = 0
        self._columns = 0

    @property
    def capacity(self) -> tuple[int, int]:
        """Allocated (rows, columns)."""
        return self._rows, self._columns

    def append(self, prefilled: Cache, row: int, length: int) -> None:
        """Adds a row at the end: the last `length` columns of row `row` of a prefilled cache."""
        sources: list[DynamicLayer] = prefilled.layers  # type: ignore[assignment]
        if not self.layers:
            self.layers.extend(_ColumnLayer(self._window, source) for source in sources)
        index = len(self.lengths)
        if index >= self._rows or length > self._window.end:
            self._relocate(rows=index + 1, window=max(length, self._width))
        self._widen(length)
        start, end = self._window.start, self._window.end
        for layer, source in zip(self.layers, sources, strict=True):
            for buffer, states in ((layer.keys, source.keys), (layer.values, source.values)):
                buffer[index, :, start : end - length] = 0
                assert states is not None
                buffer[index, :, end - length : end] = states[row, :, -length:]
        self.lengths.append(length)

    def remove(self, index: int) -> None:
        """Drops row `index`; the last row moves into its place, and the window shrinks to the longest row left."""
        last = len(self.lengths) - 1
        if index != last:
            window = slice(self._window.start, self._window.end)
            for layer in self.layers:
                layer.keys[index, :, window] = layer.keys[last, :, window]
                layer.values[index, :, window] = layer.values[last, :, window]
        self.lengths[index] = self.lengths[last]
        self.lengths.pop()
        if self.lengths:
            self._window.start = self._window.end - max(self.lengths)
        else:
            self._window.start = self._window.end = 0

    def clear(self) -> None:
        """Forgets all rows and frees the buffers."""
        self.layers.clear()
        self.lengths.clear()
        self._window.start = self._window.end = 0
        self._rows = self._columns = 0

    def reserve_column(self) -> None:
        """Makes room for one more column: moves the window left, or doubles the columns if it fills them."""
        if self._window.end == self._columns:
            self._relocate(rows=len(self.lengths), window=self._width)

    def advance(self) -> None:
        """Counts the column that a forward pass has written."""
        self._window.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def position_ids(self, device: torch.device) -> Tensor:
        """(n, 1) position of each row's next token."""
        return torch.tensor(self.lengths, device=device).unsqueeze(1)

    def attention_mask(self, device: torch.device) -> Tensor:
        """(n, W + 1) bool: the columns that belong to each row, the next one included."""
        columns = torch.arange(self._width + 1, device=device)
        first = self._width - torch.tensor(self.lengths, device=device)
        return columns >= first.unsqueeze(1)

    @property
    def _width(self) -> int:
        return self._window.end - self._window.start

    def _widen(self, length: int) -> None:
        """Moves `start` left to fit a row of `length`, and empties the columns that the others gain as padding."""
        start = min(self._window.start, self._window.end - length)
        if start < self._window.start and self.lengths:
            gained = slice(start, self._window.start)
            for layer in self.layers:
                layer.keys[: len(self.lengths), :, gained] = 0
                layer.values[: len(self.lengths), :, gained] = 0
        self._window.start = start

    def _relocate(self, rows: int, window: int) -> None:
        """Buffers of at least `rows` rows whose window ends at column `window`, with a quarter of the columns free."""
        columns = max(self._columns, min(_INITIAL_COLUMNS, self._max_columns))
        while columns < self._max_columns and columns - window < columns // 4:
            columns = min(2 * columns, self._max_columns)
        capacity = self._rows if rows <= self._rows else min(max(2 * self._rows, rows), self._slots)
        if self.lengths or (capacity, columns) != self.capacity:
            for layer in self.layers:
                layer.resize(capacity, columns, window, len(self.lengths))
        self._window.start, self._window.end = window - self._width, window
        self._rows, self._columns = capacity, columns
