"""A model whose batch rows each carry their own weight delta, applied as y += (x Aᵀ) Bᵀ beside the merged weight.

Knows torch modules and deltas; nothing of requests or key/value caches. Calibration and the embedded engine steer
through this one class.

Slots hold deltas; `rows(...)` says which slot each batch row of the next forward passes uses. A forward in which no row
is steered runs the model's own kernels and nothing else, so it is bit-equal to the model without hooks.

Linears that get the same input (q, k and v of a layer) have their A one below the other, so that one product serves
them. A *packed* delta is one vector of all matrices: `PackedBank` keeps atoms in that form, where a mix is one weighted
sum instead of several small ones for every linear.

A decode step reads every slot's matrices once, and is bound by that: so A lies as (2r, d_in), the way it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from atoms.adapter import AtomBank, Composition, Delta, compose
from atoms.errors import AdapterError
from atoms.mix import Mix
from atoms.model import find_linear
from atoms.space import LoRAModule, LoRASpace

_SAME_INPUT = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "gate_proj": "mlp",
    "up_proj": "mlp",
}
"""Linears that transformers' models give one tensor. A name missing here, or wrong, costs time and nothing else."""


Group = tuple[LoRAModule, ...]
"""Linears that share an input. A of a group is (R, d_in), R the sum of their 2r; s·Bᵀ of a linear is (2r, d_out)."""


@dataclass(frozen=True)
class DeltaLayout:
    """How a delta of rank ≤ 2r is packed into N numbers, in two halves: of every linear the first r rows of A and the last
    r of s·Bᵀ, which are all that an atom moves in the linear composition (a and b of [a; A0] and [B0, b]); then the rest.
    """

    groups: tuple[Group, ...]

    @classmethod
    def of(cls, space: LoRASpace) -> DeltaLayout:
        groups: dict[tuple[str, str, int], list[LoRAModule]] = {}
        for module in space.modules:
            parent, _, last = module.name.rpartition(".")
            groups.setdefault((parent, _SAME_INPUT.get(last, last), module.d_in), []).append(module)
        return cls(tuple(tuple(group) for group in groups.values()))

    @cached_property
    def modules(self) -> list[LoRAModule]:
        """All linears, group by group."""
        return [module for group in self.groups for module in group]

    @cached_property
    def size(self) -> int:
        """N."""
        return sum(2 * module.rank * (module.d_in + module.d_out) for module in self.modules)

    def parts(self, matrices: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Views of every linear's A (2r, d_in) and s·Bᵀ (2r, d_out), in the order in which they are packed."""
        ranked = [(module.rank, a, b) for module, (a, b) in zip(self.modules, matrices, strict=True)]
        first = [part for rank, a, b in ranked for part in (a[:rank], b[rank:])]
        return first + [part for rank, a, b in ranked for part in (a[rank:], b[:rank])]

    def split(self, packed: Tensor) -> list[Tensor]:
        """Views of `packed` (N,), shaped as `parts`."""
        shapes = [(module.rank, width) for module in self.modules for width in (module.d_in, module.d_out)] * 2
        pieces = packed.split([rows * columns for rows, columns in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def pack(self, delta: Delta) -> Tensor:
        """(N,) float32 on the CPU; the scaling is folded into B. Raises AdapterError if modules or ranks do not fit."""
        if delta.keys() != {module.name for module in self.modules}:
            raise AdapterError("the delta's modules are not those of this model's LoRA space")
        matrices = []
        for module in self.modules:
            factors = delta[module.name]
            rank = factors.lora_A.shape[0]
            if rank > 2 * module.rank:
                raise AdapterError(f"{module.name}: the delta has rank {rank}; slots hold rank {2 * module.rank}")
            a, b = torch.zeros(2 * module.rank, module.d_in), torch.zeros(2 * module.rank, module.d_out)
            a[:rank] = factors.lora_A
            b[:rank] = (factors.lora_B.float() * factors.scaling).T
            matrices.append((a, b))
        return torch.cat([part.flatten() for part in self.parts(matrices)])


class PackedBank:
    """The atoms of a bank, packed. A mix's delta is affine in its coefficients, whichever composition:
    that of no movement at all, and for each atom what a coefficient of 1 adds; in the linear composition that is nothing
    in the second half, which is then kept once."""

    def __init__(self, bank: AtomBank, composition: Composition, device: torch.device, dtype: torch.dtype) -> None:
        space = bank.base.space
        layout = DeltaLayout.of(space)
        still = {tensor.key: torch.zeros(tensor.shape) for tensor in space.tensors}
        moves = replace(bank.base, tensors=still)  # the base's own factors are counted once, with the origin
        moved = layout.size // 2 if composition == "linear" else layout.size
        self._row = {atom: row for row, atom in enumerate(bank.ids)}
        self._atoms = [
            layout.pack(compose(moves, _direction(bank, row), composition))[:moved].to(device, dtype, copy=True)
            for row in range(len(bank.ids))
        ]  # J times (moved,)
        origin = layout.pack(compose(bank.base, still, composition)).to(device)  # (N,) float32
        self._origin = origin[:moved].clone()
        self._packed = origin  # of the latest mix: memory that is new for each costs more than the sum
        self._moved = self._packed[:moved]

    def compose(self, mix: Mix) -> Tensor | None:
        """(N,) float32, the packed delta of `mix`, which holds until the next call; None for the empty mix.

        Raises KeyError for an unknown id.
        """
        if not mix:
            return None
        source = self._origin
        for row, coefficient in [(self._row[atom], coefficient) for atom, coefficient in mix]:
            torch.add(source, self._atoms[row], alpha=coefficient, out=self._moved)
            source = self._moved
        return self._packed


class SteeredModel:
    """Hooks on every linear of `space` in `model`, with `slots` preallocated deltas of rank ≤ 2r each, in the model's dtype
    or, on a CPU, in float32.

    Not thread-safe: one thread sets slots and runs the model. `close()` removes the hooks. Raises AdapterError if a
    linear is missing, or if linears differ in device or dtype.
    """

    def __init__(self, model: nn.Module, space: LoRASpace, slots: int) -> None:
        self.model = model
        self.slots = slots
        self._layout = DeltaLayout.of(space)
        linears = {module.name: find_linear(model, module.name) for module in space.modules}
        kinds = {(linear.weight.device, linear.weight.dtype) for linear in linears.values()}
        if len(kinds) > 1:
            raise AdapterError(
                f"the adapted linears are of {len(kinds)} devices or dtypes; load the model on one device"
            )
        device, dtype = kinds.pop()
        if device.type == "cpu":  # products of a single row with a bf16 matrix take twice as long there
            dtype = torch.float32
        self._steered = [False] * slots
        self._active: slice | Tensor | None = None
        self._latest: tuple[Tensor, Tensor, Tensor] | None = None  # A of a group, its input, their product
        self._handles = []
        self._blocks: list[Tensor] = []  # of all groups and linears, (S, …) each
        self._matrices: list[tuple[Tensor, Tensor]] = []  # A (S, 2r, d_in) and s·Bᵀ (S, 2r, d_out) of every linear
        for group in self._layout.groups:
            a, row = self._block((slots, sum(2 * module.rank for module in group), group[0].d_in), device, dtype), 0
            for module in group:
                rows = slice(row, row + 2 * module.rank)
                b = self._block((slots, 2 * module.rank, module.d_out), device, dtype)
                self._matrices.append((a[:, rows], b))
                self._handles.append(linears[module.name].register_forward_hook(self._hook(a, rows, b)))
                row = rows.stop

    def set_slot(self, slot: int, delta: Delta | Tensor | None) -> None:
        """Loads `delta` into `slot`: by module, packed (see `DeltaLayout.pack`), or None for unsteered.

        Raises AdapterError if a delta's modules or ranks do not fit; the slot is then as it was.
        """
        if delta is not None:
            packed = delta if isinstance(delta, Tensor) else self._layout.pack(delta)
            target = self._layout.parts([(a[slot], b[slot]) for a, b in self._matrices])
            torch._foreach_copy_(target, self._layout.split(packed))
        elif self._steered[slot]:
            torch._foreach_zero_([block[slot] for block in self._blocks])
        self._steered[slot] = delta is not None

    def move_slot(self, source: int, target: int) -> None:
        """Copies slot `source` to `target` (a batch row moved; its delta moves with its keys and values)."""
        if self._steered[source]:
            torch._foreach_copy_([block[target] for block in self._blocks], [block[source] for block in self._blocks])
            self._steered[target] = True
        else:
            self.set_slot(target, None)

    @contextmanager
    def rows(self, slots: Sequence[int]) -> Iterator[None]:
        """Within the block, batch row i of every forward pass uses slot `slots[i]`."""
        self._active = self._plan(slots)
        try:
            yield
        finally:
            self._active = self._latest = None

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
        return torch.tensor(list(slots), device=self._blocks[0].device)

    def _block(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        self._blocks.append(torch.zeros(shape, device=device, dtype=dtype))
        return self._blocks[-1]

    def _hook(self, a: Tensor, rows: slice, b: Tensor) -> Any:
        """For a linear whose A are `rows` of its group's `a` (S, R, d_in), and whose s·Bᵀ are `b` (S, 2r, d_out)."""

        def add_delta(_linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._active is None:
                return None
            hidden = self._product(inputs[0], a)[:, rows].transpose(1, 2)  # (n, t, 2r)
            return torch.baddbmm(output.to(b.dtype), hidden, b[self._active]).to(output.dtype)  # (n, t, d_out)

        return add_delta

    def _product(self, x: Tensor, a: Tensor) -> Tensor:
        """A xᵀ of a group, (n, R, t): made for the first of its linears, kept until another group or input comes."""
        if self._latest is None or self._latest[0] is not a or self._latest[1] is not x:
            self._latest = a, x, torch.bmm(a[self._active], x.to(a.dtype).transpose(1, 2))
        return self._latest[2]


def _direction(bank: AtomBank, row: int) -> dict[str, Tensor]:
    """Atom `row` of `bank`, per tensor."""
    return {
        key: stacked[module.name][row]
        for module in bank.base.space.modules
        for key, stacked in ((module.key_a, bank.a), (module.key_b, bank.b))
    }
