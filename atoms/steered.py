"""A model whose batch rows each carry their own weight delta, applied as y += (x Aᵀ) Bᵀ beside the merged weight.

Knows torch modules and deltas; nothing of atoms, packages, requests or key/value caches. Calibration and the embedded
engine steer through this one class.

Slots hold deltas; `rows(...)` says which slot each batch row of the next forward passes uses. A forward in which no row
is steered runs the model's own kernels and nothing else, so it is bit-equal to the model without hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from atoms.adapter import Delta
from atoms.errors import AdapterError
from atoms.model import find_linear
from atoms.space import LoRASpace


class SteeredModel:
    """Hooks on every linear of `space` in `model`, with `slots` preallocated deltas of rank ≤ 2r each.

    Not thread-safe: one thread sets slots and runs the model. `close()` removes the hooks.
    """

    def __init__(self, model: nn.Module, space: LoRASpace, slots: int) -> None:
        self.model = model
        self.slots = slots
        self._steered = [False] * slots
        self._active: slice | Tensor | None = None
        self._a: dict[str, Tensor] = {}
        self._b: dict[str, Tensor] = {}
        self._handles = []
        for module in space.modules:
            linear = find_linear(model, module.name)
            rank, weight = 2 * module.rank, linear.weight
            self._a[module.name] = weight.new_zeros((slots, module.d_in, rank))  # (S, d_in, R), A transposed
            self._b[module.name] = weight.new_zeros((slots, rank, module.d_out))  # (S, R, d_out), B transposed
            self._handles.append(linear.register_forward_hook(self._hook(module.name)))

    def set_slot(self, slot: int, delta: Delta | None) -> None:
        """Loads `delta` (None: unsteered) into `slot`. The scaling is folded into B in fp32, then cast once.

        Raises AdapterError if the delta's modules or ranks do not fit.
        """
        if delta is None:
            if self._steered[slot]:
                for name in self._a:
                    self._a[name][slot].zero_()
                    self._b[name][slot].zero_()
            self._steered[slot] = False
            return
        if delta.keys() != self._a.keys():
            raise AdapterError("the delta's modules are not those of this model's LoRA space")
        for (
            name,
            factors,
        ) in delta.items():  # all before any is written, so that a refused delta leaves the slot as it was
            if factors.lora_A.shape[0] > self._a[name].shape[2]:
                raise AdapterError(
                    f"{name}: the delta has rank {factors.lora_A.shape[0]}; slots hold rank {self._a[name].shape[2]}"
                )
        for name, factors in delta.items():
            rank = factors.lora_A.shape[0]
            a, b = self._a[name][slot], self._b[name][slot]
            a[:, :rank].copy_(factors.lora_A.T)
            b[:rank].copy_((factors.lora_B.float() * factors.scaling).T)
            a[:, rank:].zero_()
            b[rank:].zero_()
        self._steered[slot] = True

    def move_slot(self, source: int, target: int) -> None:
        """Copies slot `source` to `target` (a batch row moved; its delta moves with its keys and values)."""
        for name in self._a:
            self._a[name][target].copy_(self._a[name][source])
            self._b[name][target].copy_(self._b[name][source])
        self._steered[target] = self._steered[source]

    @contextmanager
    def rows(self, slots: Sequence[int]) -> Iterator[None]:
        """Within the block, batch row i of every forward pass uses slot `slots[i]`."""
        self._active = self._plan(slots)
        try:
            yield
        finally:
            self._active = None

    def close(self) -> None:
        """Removes the hooks; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _plan(self, slots: Sequence[int]) -> slice | Tensor | None:
        """None if no row is steered; a slice (views, no copies) for consecutive slots; else an index."""
        if not any(self._steered[slot] for slot in slots):
            return None
        if list(slots) == list(range(slots[0], slots[0] + len(slots))):
            return slice(slots[0], slots[0] + len(slots))
        return torch.tensor(list(slots), device=next(iter(self._a.values())).device)

    def _hook(self, name: str):
        def add_delta(_linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._active is None:
                return None
            a, b = self._a[name][self._active], self._b[name][self._active]
            x = inputs[0]  # (n, t, d_in)
            hidden = torch.bmm(x, a)  # (n, t, R)
            return torch.baddbmm(output, hidden, b)  # (n, t, d_out)

        return add_delta
