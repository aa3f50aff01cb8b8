"""Mixes in slots, each composed once, and the batched layer that gives every row the mix of its slot: steering on CPUs.

A slot holds what its mix adds to the base adapter's factors, rank r of each; the base's own are one for all. So a row
costs the same whatever the number of atoms, of the package or of the mix. Several versions of a package may have mixes in
slots, as long as they share the base adapter. Knows tensors and atoms; nothing of vLLM.

    J    atoms in a bank         S   slots       r   rank (the largest of a group)       n   steered rows of the batch
    P    adapted linears that one fused module computes (q, k, v: P = 3)
    A_p, B_p      factors of the base adapter     a_p = Σ_j c_j A_pj, b_p = Σ_j c_j B_pj    those of a row's mix
    h_p = A_p x   u_p = a_p x                     v_p = h_p ("linear")  or  h_p + u_p ("parameter")
    y_p += s_p (B_p u_p + b_p v_p)                the ΔW of `atoms.adapter`, times x

Rows of one mix, a prompt's tokens above all, are multiplied as one matrix. A row alone is a sum over the rows of its
slot's factors, which torch's `embedding_bag` takes from the slots where they lie, at the speed of memory: a batched
product would need them copied beside each other first. Mixes are composed by such sums too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from atoms.adapter import Adapter, AtomBank, Composition
from atoms.mix import Mix
from atoms.space import LoRAModule

_TOGETHER = 8
"""Rows of one mix from which a matrix product is faster than a sum for each."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Sum i is over `rows[starts[i] : starts[i + 1]]` of some table."""

    rows: Tensor  # (k,) int64
    starts: Tensor  # (sums + 1,) int64

    @classmethod
    def of_blocks(cls, blocks: Tensor, height: int) -> Sums:
        """Sum i is over rows [blocks[i] · height, (blocks[i] + 1) · height)."""
        rows = (blocks[:, None] * height + torch.arange(height)).flatten()
        return cls(rows, torch.arange(0, len(rows) + 1, height))

    def __call__(self, table: Tensor, weights: Tensor) -> Tensor:
        """(sums, width) of `table` (·, width), each of its `rows` times its number in `weights` (k,), of the same dtype."""
        result: Tensor = torch.embedding_bag(table, self.rows, self.starts, False, 0, False, weights, True)[0]
        return result


@dataclass(frozen=True, slots=True)
class SteeredRows:
    """Which rows of the next forward passes are steered, and how: first those alone with their mix, then groups of one.

    `index` (n,) says where in the batch (t rows) they are, and `back` (t,) where in `index` a row is, n for one that is
    not; both are None where they are the batch's first n rows in order.
    """

    count: int
    index: Tensor | None
    back: Tensor | None
    alone: Tensor  # (m,) the slots of the first m
    groups: tuple[tuple[int, int, int], ...]  # start, end and slot of the others
    _sums: dict[int, Sums] = field(default_factory=dict)

    @classmethod
    def of(cls, slots: np.ndarray, steered: np.ndarray) -> SteeredRows:
        """Row i of `slots` (t,) uses the slot there if it is one of `steered` (n,), ascending, at least one."""
        used = slots[steered]
        found, first, which, sizes = np.unique(used, return_index=True, return_inverse=True, return_counts=True)
        together = sizes >= _TOGETHER
        order = np.argsort(np.where(together[which], first[which], -1), kind="stable")
        alone = used[~together[which]]
        groups, start = [], len(alone)
        for group in np.flatnonzero(together)[np.argsort(first[together])]:
            groups.append((start, start + int(sizes[group]), int(found[group])))
            start += int(sizes[group])
        index, back = steered[order], np.full(len(slots), len(order))
        back[index] = np.arange(len(index))
        moved = not np.array_equal(index, np.arange(len(index)))
        return cls(
            count=len(index),
            index=torch.from_numpy(index) if moved else None,
            back=torch.from_numpy(back) if moved else None,
            alone=torch.from_numpy(alone),
            groups=tuple(groups),
        )

    def sums(self, height: int) -> Sums:
        """Those over the slots of the rows alone, in a table that has `height` rows a slot."""
        if height not in self._sums:
            self._sums[height] = Sums.of_blocks(self.alone, height)
        return self._sums[height]


@dataclass(frozen=True, slots=True)
class FusedPart:
    """One adapted linear within a fused module: its columns of the module's output."""

    module: LoRAModule
    columns: slice


class SlottedLinear:
    """Adds the steering of every row to the output of one (fused) linear. `dtype` is the model's."""

    def __init__(
        self, base: Adapter, parts: Sequence[FusedPart], composition: Composition, dtype: torch.dtype, slots: int
    ) -> None:
        self._parts = parts
        self._rank, self._columns = max(part.module.rank for part in parts), [part.columns for part in parts]
        self._parameter = composition == "parameter"
        own = [self._padded(part, base.tensors[part.module.key_a], base.tensors[part.module.key_b]) for part in parts]
        self._base_a = torch.cat([a for a, _ in own]).T.to(dtype).contiguous()  # (d_in, P·r)
        self._base_b = [b.to(dtype).contiguous() for _, b in own]  # (r, d_out)
        shapes = [(slots, *factors.shape) for factors in (self._base_a, *self._base_b)]
        self._tables = [torch.empty(shape, dtype=dtype) for shape in shapes]  # memory is taken when it is written
        self._flat = [table.view(-1, table.shape[2]) for table in self._tables]

    def stack(self, bank: AtomBank) -> list[Tensor]:
        """What `compose` needs of a bank on the same base: (J, d_in, P·r), and (J, r, d_out) of each part, in float32."""
        own = [self._padded(part, bank.a[part.module.name], bank.b[part.module.name]) for part in self._parts]
        stacks = [torch.cat([a for a, _ in own], dim=1).transpose(1, 2), *(b for _, b in own)]
        return [factors.contiguous() for factors in stacks]

    def compose(self, slots: Tensor, stacks: Sequence[Tensor], mixes: Sums, coefficients: Tensor) -> None:
        """Slot `slots[i]` gets mix i: the sum over atoms of `stacks`, the rows of `mixes`, with `coefficients` (float32)."""
        for stack, table in zip(stacks, self._tables, strict=True):
            composed = mixes(stack.flatten(1), coefficients)
            table.flatten(1).index_copy_(0, slots, composed.to(table.dtype))

    def _padded(self, part: FusedPart, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A (…, r, d_in) and s·Bᵀ (…, r, d_out) of a part, in float32; a lower rank is padded with zeros to r."""
        pad = (0, 0, 0, self._rank - part.module.rank)
        b = b.transpose(-1, -2).float() * part.module.scaling
        return torch.nn.functional.pad(a.float(), pad), torch.nn.functional.pad(b, pad)

    def add(self, x: Tensor, y: Tensor, rows: SteeredRows) -> None:
        """Adds to `y` (t, d_out) in place; `x` (t, d_in). Rows that are not steered stay bit-equal."""
        x = x[: rows.count] if rows.index is None else x.index_select(0, rows.index)
        u, v = self._products(x, rows)
        for place, columns in enumerate(self._columns):
            ranks = slice(place * self._rank, (place + 1) * self._rank)
            delta = self._delta(u[:, ranks], v[:, ranks], place, rows)
            if rows.back is not None:
                delta = _spread(delta, rows.back)
            y[: len(delta), columns].add_(delta)

    def _products(self, x: Tensor, rows: SteeredRows) -> tuple[Tensor, Tensor]:
        """u and v of the module's docstring, (n, P·r) each."""
        h, table, alone = x @ self._base_a, self._tables[0], len(rows.alone)
        u = rows.sums(x.shape[1])(self._flat[0], x[:alone].flatten()) if alone else h[:0]
        if rows.groups:
            u = torch.cat([u, *(x[start:end] @ table[slot] for start, end, slot in rows.groups)])
        return u, h + u if self._parameter else h

    def _delta(self, u: Tensor, v: Tensor, place: int, rows: SteeredRows) -> Tensor:
        """What steering adds to the part at `place`, (n, d_out); `u` and `v` (n, r) are its own."""
        base, table, alone = self._base_b[place], self._tables[1 + place], len(rows.alone)
        sums = rows.sums(self._rank)(self._flat[1 + place], v[:alone].flatten()) if alone else None
        if sums is not None and not rows.groups:
            return sums.addmm_(u, base)
        delta = u @ base
        if sums is not None:
            delta[:alone].add_(sums)
        for start, end, slot in rows.groups:
            delta[start:end].addmm_(v[start:end], table[slot])
        return delta


@dataclass(frozen=True, eq=False, slots=True)
class SlotBank:
    """A bank as mixes are composed from it. `place` is an atom's row in each of `stacks`, which are those of the linears."""

    place: Mapping[str, int]
    stacks: Sequence[list[Tensor]]


class MixSlots:
    """The mix of each slot, in all of `linears`; and the rows of the batch that is about to run. A mix is composed when
    rows first use it, with others that are new."""

    def __init__(self, slots: int) -> None:
        self.linears: list[SlottedLinear] = []
        self.rows: SteeredRows | None = None
        self._mixes: list[tuple[SlotBank, list[tuple[int, float]]] | None] = [None] * slots
        self._steers = np.zeros(slots, dtype=bool)
        self._composed = np.zeros(slots, dtype=bool)

    def stack(self, bank: AtomBank) -> SlotBank:
        """`bank` for `set`. Reads nothing that serving changes, so it may be called from another thread."""
        place = {atom: row for row, atom in enumerate(bank.ids)}
        return SlotBank(place, [linear.stack(bank) for linear in self.linears])

    def set(self, slot: int, mix: Mix, bank: SlotBank) -> None:
        """Loads `mix` of `bank` into `slot`. Raises KeyError for an atom outside the bank."""
        self._mixes[slot] = (bank, [(bank.place[atom], value) for atom, value in mix])
        self._steers[slot], self._composed[slot] = bool(mix), False

    def clear(self, slot: int) -> None:
        """Leaves no mix in `slot`: rows that use it are unsteered."""
        self._mixes[slot] = None
        self._steers[slot] = self._composed[slot] = False

    def forget(self, bank: SlotBank) -> None:
        """Clears the slots that hold a mix of `bank`."""
        for slot, held in enumerate(self._mixes):
            if held is not None and held[0] is bank:
                self.clear(slot)

    def select(self, slots: Sequence[int] | np.ndarray) -> None:
        """Row i of the following forward passes uses slot `slots[i]`; -1 is unsteered."""
        chosen = np.asarray(slots, dtype=np.int64)
        rows = np.flatnonzero((chosen >= 0) & self._steers[chosen])
        if not len(rows):
            self.rows = None
            return
        used = np.unique(chosen[rows])
        self._compose(used[~self._composed[used]])
        self.rows = SteeredRows.of(chosen, rows)

    def _compose(self, slots: np.ndarray) -> None:
        """All that come from one bank together."""
        together: dict[SlotBank, list[int]] = {}
        for slot in slots.tolist():
            held = self._mixes[slot]
            assert held is not None
            together.setdefault(held[0], []).append(slot)
        for bank, places in together.items():
            mixes = [held[1] for held in (self._mixes[slot] for slot in places) if held is not None]
            starts = torch.tensor([0, *np.cumsum([len(mix) for mix in mixes])])
            sums = Sums(torch.tensor([place for mix in mixes for place, _ in mix]), starts)
            coefficients = torch.tensor([value for mix in mixes for _, value in mix])
            for linear, stacks in zip(self.linears, bank.stacks, strict=True):
                linear.compose(torch.tensor(places), stacks, sums, coefficients)
        self._composed[slots] = True


def _spread(delta: Tensor, back: Tensor) -> Tensor:
    """Row i is `delta[back[i]]`, and -0.0, which changes no bit of what it is added to, for back[i] = len(delta)."""
    return torch.cat([delta, delta.new_full((1, delta.shape[1]), -0.0)]).index_select(0, back)
