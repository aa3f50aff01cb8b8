"""Steering as coefficients over a shared bank: what replaces per-adapter weights on CPUs.

All rows of a batch multiply the same matrices, whatever their mixes; a slot holds J numbers instead of weights. So the
cost depends neither on how many mixes are in flight nor on how many atoms each has, and a new mix costs nothing.
Knows tensors and atoms; nothing of vLLM.

    J     atoms in the bank         r   rank (the largest of a group)     n   steered rows of the batch
    P     adapted linears that one fused module computes (q, k, v: P = 3)
    c     (n, J) coefficients       x   (n, d_in) their inputs
    h_pj  = x A_pjᵀ, (n, r), with A_p0 the base adapter's A and A_pj that of atom j

    u = Σ_j c_j h_pj         v = h_p0 ("linear")  or  h_p0 + u ("parameter")
    y_p += s_p (B_p0 u + Σ_j c_j B_pj v)          the ΔW of `atoms.adapter`, times x
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atoms.adapter import AtomBank, Composition
from atoms.mix import Mix
from atoms.space import LoRAModule

_ROWS = 16
"""Rows of a typical decode step, for which oneDNN chooses the packed layout; other counts work too."""


@dataclass(frozen=True, slots=True)
class SteeredRows:
    """Which rows of the next forward passes are steered, and how. `index` (n,) is None where all of them are."""

    coefficients: Tensor  # (n, J) float32
    index: Tensor | None


class CoefficientTable:
    """One row of coefficients a slot, and the rows of the batch that is about to run."""

    def __init__(self, atoms: Sequence[str], slots: int) -> None:
        self._column = {atom: column for column, atom in enumerate(atoms)}
        self._table = torch.zeros(slots, len(atoms))
        self.rows: SteeredRows | None = None

    def set(self, slot: int, mix: Mix) -> None:
        """Loads `mix` into `slot`. Raises KeyError for an atom outside the bank."""
        row = self._table[slot].zero_()
        for atom, value in mix:
            row[self._column[atom]] = value

    def select(self, slots: Sequence[int]) -> None:
        """Row i of the following forward passes uses slot `slots[i]`; -1 is unsteered."""
        chosen = torch.tensor(slots, dtype=torch.long)
        steered = (chosen >= 0).nonzero().squeeze(1)
        if not len(steered):
            self.rows = None
        elif len(steered) == len(chosen):
            self.rows = SteeredRows(self._table[chosen], None)
        else:
            self.rows = SteeredRows(self._table[chosen[steered]], steered)


@dataclass(frozen=True, slots=True)
class FusedPart:
    """One adapted linear within a fused module: its columns of the module's output."""

    module: LoRAModule
    columns: slice


class BankedLinear:
    """Adds the steering of every row to the output of one (fused) linear. `dtype` is the model's."""

    def __init__(
        self, bank: AtomBank, parts: Sequence[FusedPart], composition: Composition, dtype: torch.dtype
    ) -> None:
        rank = max(part.module.rank for part in parts)
        self._shape = (1 + len(bank.ids), len(parts), rank)  # (1 + J, P, r)
        self._columns = [part.columns for part in parts]
        self._parameter = composition == "parameter"
        stacks = [_stacked(bank, part.module, rank) for part in parts]
        down = torch.stack([a for a, _ in stacks], dim=1)  # (1 + J, P, r, d_in)
        self._down = packed_product(down.flatten(0, 2), dtype)
        self._up = [packed_product(b.flatten(0, 1).T, dtype) for _, b in stacks]

    def add(self, x: Tensor, y: Tensor, rows: SteeredRows) -> None:
        """Adds to `y` (t, d_out) in place; `x` (t, d_in). Rows that are not steered stay bit-equal."""
        c = rows.coefficients
        count = len(c)
        (bases, places, rank) = self._shape
        inputs = x[:count] if rows.index is None else x.index_select(0, rows.index)
        h = self._down(inputs).float().view(count, bases, places * rank)
        u = torch.bmm(c.unsqueeze(1), h[:, 1:]).squeeze(1)
        v = h[:, 0] + u if self._parameter else h[:, 0]
        z = h.new_empty(places, count, bases, rank)
        z[:, :, 0] = u.view(count, places, rank).transpose(0, 1)
        torch.mul(c[:, :, None], v.view(count, places, 1, rank).transpose(0, 1), out=z[:, :, 1:])
        for columns, up, part in zip(self._columns, self._up, z.to(y.dtype).flatten(2), strict=True):
            if rows.index is None:
                y[:count, columns] += up(part)
            else:
                y[:, columns].index_add_(0, rows.index, up(part))


def packed_product(weight: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """x -> x weightᵀ for `weight` (out, in) in `dtype`, summed in float32. Packed once for oneDNN where torch has that: the
    plain kernel takes three to four times as long at the few rows of a decode step."""
    weight = weight.to(dtype).contiguous()
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return lambda x: x @ weight.T
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _stacked(bank: AtomBank, module: LoRAModule, rank: int) -> tuple[Tensor, Tensor]:
    """A (1 + J, rank, d_in) and s·Bᵀ (1 + J, rank, d_out), the base first; ranks below `rank` are padded with zeros."""
    a0, b0 = bank.base.tensors[module.key_a], bank.base.tensors[module.key_b]
    a = torch.cat([a0.unsqueeze(0), bank.a[module.name]])
    b = torch.cat([b0.unsqueeze(0), bank.b[module.name]]).transpose(1, 2) * module.scaling
    pad = (0, 0, 0, rank - module.rank)
    return torch.nn.functional.pad(a, pad), torch.nn.functional.pad(b, pad)
