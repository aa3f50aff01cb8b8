"""Whitening, coding and unprojection as pure tensor functions. Knows matrices, not models or documents.

Symbols, for one LoRA matrix with gradient G (o, i) = δᵀx
    Q_S, Q_A   eigenvectors of the output-gradient and activation covariances (the EKFAC eigenbasis)
    λ_oi       Fisher per token in that basis, from sampled labels
    ε          damping × mean λ of the matrix (or damping itself)
    kept       the k components (o, i) of largest λ
and over all matrices
    x = (Λ+ε)^{-1/2} Qᵀ g           the whitened row, (D,), D = Σ k
    x̃ = unit(W unit(x − μ))         centred, leading components whitened (W), unit length
    D, a                            dictionary (K, D) of unit atoms d, and codes (N, K)
    v = −Q (Λ+ε)^p W^{−2p} d        unprojection; p = −½ is the natural step, p = +½ the paper's direction
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from atoms.space import Direction, LoRASpace

_PART = 32
"""Rows that are solved together: their working sets, of like size, are padded to the largest."""


@dataclass(frozen=True)
class MatrixBasis:
    """Kept eigencomponents of one LoRA matrix: component c is (q_out[:, out_index[c]], q_in[:, in_index[c]]).

    q_out (o, m_o) and q_in (i, m_i) hold only the columns that some kept component uses; eigenvalues (k,); ε a float.
    """

    q_out: Tensor
    q_in: Tensor
    out_index: Tensor
    in_index: Tensor
    eigenvalues: Tensor
    epsilon: float

    @classmethod
    def of(
        cls, q_out: Tensor, q_in: Tensor, eigenvalues: Tensor, components: int, damping: float, *, relative: bool = True
    ) -> MatrixBasis:
        """Keeps the `components` largest of the (o, i) grid `eigenvalues`; negatives are clamped to 0 first.

        `relative`: ε is `damping` times the grid's mean, else `damping` itself.
        """
        grid = eigenvalues.clamp_min(0)
        k = min(components, grid.numel())
        order = torch.argsort(grid.reshape(-1), descending=True, stable=True)[:k]
        out_kept, out_index = torch.unique(order // grid.shape[1], return_inverse=True)
        in_kept, in_index = torch.unique(order % grid.shape[1], return_inverse=True)
        epsilon = max(damping * (float(grid.mean()) if relative else 1.0), torch.finfo(torch.float32).tiny)
        return cls(q_out[:, out_kept].float(), q_in[:, in_kept].float(), out_index, in_index,
                   grid.reshape(-1)[order].float(), epsilon)  # fmt: skip

    @property
    def k(self) -> int:
        return self.eigenvalues.numel()

    def power(self, exponent: float) -> Tensor:
        """(Λ+ε)^exponent on the kept components, (k,)."""
        return (self.eigenvalues + self.epsilon) ** exponent

    def project(self, gradient: Tensor) -> Tensor:
        """Whitened components (…, k) of gradients (…, o, i).

        For rank-r LoRA the gradient of a document is r·d numbers, fewer than its rotated tokens, so G comes first.
        """
        rotated = self.q_out.T @ gradient @ self.q_in  # (…, m_o, m_i)
        return rotated[..., self.out_index, self.in_index] * self.power(-0.5)

    def unproject(self, row: Tensor, exponent: float) -> Tensor:
        """−Q (Λ+ε)^p d for this matrix, (o, i)."""
        core = row.new_zeros((self.q_out.shape[1], self.q_in.shape[1]))
        core[self.out_index, self.in_index] = -row * self.power(exponent)
        return self.q_out @ core @ self.q_in.T


@dataclass(frozen=True)
class Projection:
    """The kept eigenbasis of every LoRA matrix, in the coordinate order of `space`."""

    space: LoRASpace
    bases: Mapping[str, MatrixBasis]

    @property
    def dim(self) -> int:
        """D, the length of a whitened row."""
        return sum(self.bases[tensor.key].k for tensor in self.space.tensors)

    def slices(self) -> Iterator[tuple[str, slice]]:
        """(tensor key, its slice of a row) in coordinate order."""
        start = 0
        for tensor in self.space.tensors:
            stop = start + self.bases[tensor.key].k
            yield tensor.key, slice(start, stop)
            start = stop

    def project(self, gradient: Direction) -> Tensor:
        """Whitened row (D,) of a full gradient: (Λ+ε)^{-1/2} Qᵀ g."""
        self.space.check(gradient, "gradient")
        return torch.cat(
            [self.bases[tensor.key].project(gradient[tensor.key].float()) for tensor in self.space.tensors]
        )

    def unproject(self, row: Tensor, exponent: float) -> dict[str, Tensor]:
        """v = −Q (Λ+ε)^p d of one row (D,), per tensor."""
        return {key: self.bases[key].unproject(row[part], exponent) for key, part in self.slices()}

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat form for safetensors; `from_tensors` reads it back."""
        tensors = {}
        for key, basis in self.bases.items():
            tensors[f"{key}.q_out"], tensors[f"{key}.q_in"] = basis.q_out, basis.q_in
            tensors[f"{key}.index"] = torch.stack([basis.out_index, basis.in_index])
            tensors[f"{key}.eigenvalues"] = basis.eigenvalues
            tensors[f"{key}.epsilon"] = torch.tensor(basis.epsilon, dtype=torch.float64)
        return tensors

    @classmethod
    def from_tensors(cls, space: LoRASpace, tensors: Mapping[str, Tensor]) -> Projection:
        """Raises KeyError if `tensors` lacks a matrix of `space`."""
        bases = {}
        for tensor in space.tensors:
            key = tensor.key
            out_index, in_index = tensors[f"{key}.index"]
            bases[key] = MatrixBasis(tensors[f"{key}.q_out"], tensors[f"{key}.q_in"], out_index, in_index,
                                     tensors[f"{key}.eigenvalues"], float(tensors[f"{key}.epsilon"]))  # fmt: skip
        return cls(space, bases)


@dataclass(frozen=True)
class RowWhitening:
    """What turns stored rows into the dictionary's: x̃ = unit(W unit(x − μ)), W = 1 − V diag(1 − f) Vᵀ.

    mean μ (D,); V (D, r) the leading principal components of the centred unit rows; f (r,) = √(ρ / (v + ρ)) for a share v of
    their variance and a ridge ρ. The eigenbasis whitens each matrix alone; what all documents share across matrices (how
    sure the model is, how long an answer) still fills the leading components and hides what they differ in.
    """

    mean: Tensor
    components: Tensor
    factors: Tensor

    @classmethod
    def centring(cls, mean: Tensor) -> RowWhitening:
        """Removes the mean and nothing else."""
        return cls(mean, mean.new_zeros(len(mean), 0), mean.new_zeros(0))

    def apply(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """x̃ (N, D), and n (N,) = ‖x − μ‖ of whitened rows; a row equal to the mean stays zero."""
        unit, norms = _unit(rows - self.mean)
        if self.factors.numel():
            unit = _unit(self.scale(unit, self.factors))[0]
        return unit, norms

    def scale(self, rows: Tensor, factors: Tensor) -> Tensor:
        """rows (…, D) with their leading components times `factors` (r,), the rest as it is."""
        return rows + (rows @ self.components * (factors - 1)) @ self.components.T

    def undo(self, atom: Tensor, exponent: float) -> Tensor:
        """W^{−2p} d: an atom (D,) in the coordinates of stored rows, ready for `Projection.unproject` with the same p.

        W whitens as Λ^{−½} does, so Λ^p has W^{−2p} beside it: p = +½ gives gradients, p = −½ the natural step.
        """
        return self.scale(atom, self.factors ** (-2 * exponent))

    def to_tensors(self) -> dict[str, Tensor]:
        """For safetensors; `from_tensors` reads it back."""
        return {"mean_row": self.mean, "leading_components": self.components, "leading_factors": self.factors}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> RowWhitening:
        """Raises KeyError if `tensors` lacks the mean. Packages of before the leading components have none of them."""
        plain = cls.centring(tensors["mean_row"])
        return cls(plain.mean, tensors.get("leading_components", plain.components),
                   tensors.get("leading_factors", plain.factors))  # fmt: skip


@dataclass(frozen=True)
class Coding:
    """Codes (N, K) of rows, and the objective and the duality gap of each row, (N,)."""

    codes: Tensor
    objective: Tensor
    gap: Tensor


class SparseCoder:
    """Codes rows in one dictionary (K, D), whose Gram matrix is worked out once for any number of blocks.

    Few atoms take part in a row, so each row is solved on a *working set*: the atoms that correlate with it by more than α.
    Atoms whose correlation with what is left exceeds α join, until there are none; the codes are then optimal over all K.
    """

    def __init__(self, dictionary: Tensor) -> None:
        self.dictionary = dictionary
        self._gram = dictionary @ dictionary.T  # (K, K)

    def codes(
        self, rows: Tensor, alpha: float, *, nonnegative: bool, iterations: int = 500, tolerance: float = 1e-6
    ) -> Tensor:
        """Codes (N, K) that minimise ½‖X − A D‖² + α‖A‖₁, rows (N, D). A code changes by less than `tolerance` at the end."""
        return self._solve(rows @ self.dictionary.T, alpha, nonnegative, iterations, tolerance)[0]

    def coding(
        self, rows: Tensor, alpha: float, *, nonnegative: bool, iterations: int = 500, tolerance: float = 1e-6
    ) -> Coding:
        """Codes with their objective and duality gap, for one product with the dictionary in all."""
        target = rows @ self.dictionary.T
        codes, correlation = self._solve(target, alpha, nonnegative, iterations, tolerance)
        squared, fitted = rows.square().sum(1), (codes * target).sum(1)  # ‖x‖², x·Da
        residual = squared - fitted - (codes * correlation).sum(1)  # ‖x − Da‖²
        value = 0.5 * residual + alpha * codes.abs().sum(1)
        scale = _dual_scale(correlation, alpha, nonnegative)
        return Coding(codes, value, value - scale * (squared - fitted) + 0.5 * scale.square() * residual)

    def _solve(
        self, target: Tensor, alpha: float, nonnegative: bool, iterations: int, tolerance: float
    ) -> tuple[Tensor, Tensor]:
        """(codes, correlation of the residual with every atom), both (N, K). `target` is X Dᵀ."""
        codes, correlation = torch.zeros_like(target), target.clone()
        working = torch.zeros_like(target, dtype=torch.bool)
        pending = torch.arange(len(target))
        while True:
            strength = correlation[pending] if nonnegative else correlation[pending].abs()
            joining = (strength > alpha + tolerance) & ~working[pending]
            pending, joining = pending[joining.any(1)], joining[joining.any(1)]
            if not len(pending):
                return codes, correlation
            working[pending] |= joining
            pending = pending[torch.argsort(working[pending].sum(1), stable=True)]  # parts of like size
            for part in pending.split(_PART):
                columns = working[part].float().topk(int(working[part].sum(1).max()), dim=1).indices
                gram = self._gram[columns[:, :, None], columns[:, None, :]]  # (n, s, s)
                solved = _fista(gram, target[part].gather(1, columns), codes[part].gather(1, columns), alpha,
                                nonnegative, iterations, tolerance)  # fmt: skip
                codes[part] = codes[part].scatter(1, columns, solved)
                working[part] = working[part].scatter(1, columns, True)
            correlation[pending] = target[pending] - torch.sparse.mm(codes[pending].to_sparse(), self._gram)


def sparse_codes(rows: Tensor, dictionary: Tensor, alpha: float, *, nonnegative: bool) -> Tensor:
    """`SparseCoder.codes` of a single block."""
    return SparseCoder(dictionary).codes(rows, alpha, nonnegative=nonnegative)


def objective(rows: Tensor, codes: Tensor, dictionary: Tensor, alpha: float) -> Tensor:
    """½‖x − a D‖² + α‖a‖₁ per row, (N,)."""
    residual = rows - codes @ dictionary
    return 0.5 * residual.square().sum(1) + alpha * codes.abs().sum(1)


def duality_gap(rows: Tensor, codes: Tensor, dictionary: Tensor, alpha: float, *, nonnegative: bool) -> Tensor:
    """Primal minus dual value per row, (N,), ≥ 0: how far the codes can be from optimal at this dictionary."""
    residual = rows - codes @ dictionary
    correlation = residual @ dictionary.T
    scale = _dual_scale(correlation, alpha, nonnegative)[:, None]
    dual = 0.5 * rows.square().sum(1) - 0.5 * (rows - scale * residual).square().sum(1)
    return objective(rows, codes, dictionary, alpha) - dual


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows (N, D) at unit length, and their lengths (N,)."""
    norms = rows.norm(dim=1)
    return rows / norms.clamp_min(torch.finfo(rows.dtype).tiny)[:, None], norms


def _dual_scale(correlation: Tensor, alpha: float, nonnegative: bool) -> Tensor:
    """(N,) factors ≤ 1 that make residuals feasible for the dual, from their correlations (N, K) with the atoms."""
    worst = (correlation if nonnegative else correlation.abs()).max(dim=1).values
    return (alpha / worst.clamp_min(1e-12)).clamp_max(1.0)


def _fista(
    gram: Tensor, target: Tensor, codes: Tensor, alpha: float, nonnegative: bool, iterations: int, tolerance: float
) -> Tensor:
    """Codes (n, s) that minimise ½ a G a − a·t + α‖a‖₁ for each row's own Gram matrix G (n, s, s) and target (n, s).

    Beck & Teboulle 2009, with the adaptive restart of O'Donoghue & Candès 2015, from `codes` on. The step is one over the
    largest row sum of |G|, which bounds the largest eigenvalue.
    """
    step = 1.0 / gram.abs().sum(2).amax(1, keepdim=True).clamp_min(1e-12)
    momentum, t = codes, 1.0
    for _ in range(iterations):
        gradient = torch.bmm(momentum[:, None], gram)[:, 0] - target
        updated = _shrink(momentum - step * gradient, step * alpha, nonnegative)
        change = updated - codes
        if float(((momentum - updated) * change).sum()) > 0:  # the objective went up: restart the momentum
            t = 1.0
        t_next = (1 + (1 + 4 * t * t) ** 0.5) / 2
        momentum, codes, t = updated + (t - 1) / t_next * change, updated, t_next
        if float(change.abs().max()) < tolerance:
            break
    return codes


def _shrink(values: Tensor, threshold: Tensor, nonnegative: bool) -> Tensor:
    if nonnegative:
        return (values - threshold).clamp_min(0)
    return values.sign() * (values.abs() - threshold).clamp_min(0)
