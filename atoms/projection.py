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

_PART = 256
"""Rows that are solved together: their working sets, of like size, are padded to the largest."""
_JOINING = 8
"""Atoms that join a row's working set at a time: most of the others that correlate with it stand for the same."""
_SYSTEMS = 20
"""Linear systems that may be solved for a row's signs before FISTA takes it over."""
_ITERATIONS, _TOLERANCE = 500, 1e-6
"""A code changes by less than this in the last iteration."""
_PRODUCT_ROWS = 32
"""Fewer rows than this are left to MKL: oneDNN rearranges the other matrix on every call, whatever the rows."""


def inner_products(rows: Tensor, others: Tensor) -> Tensor:
    """rows othersᵀ (…, m) of (…, D) and (m, D).

    On CPUs torch gives float32 products to MKL, which on CPUs of other makers than its own keeps to AVX2; oneDNN, which torch
    brings as well, uses what the CPU has. The operator is the one that torch's compiler emits; it has no gradient.
    """
    plain = rows.device.type == "cpu" and rows.dtype == others.dtype == torch.float32
    sizeable = rows.dim() == 2 and len(rows) >= _PRODUCT_ROWS and others.numel() > 0  # oneDNN takes no empty matrix
    if plain and sizeable and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.ops.mkldnn._linear_pointwise(rows, others, None, "none", [], "")
    return rows @ others.T


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

    def rotate(self, gradient: Tensor) -> Tensor:
        """Components Qᵀ g (…, k) of gradients (…, o, i).

        For rank-r LoRA the gradient of a document is r·d numbers, fewer than its rotated tokens, so G comes first.
        """
        rotated = self.q_out.T @ gradient @ self.q_in  # (…, m_o, m_i)
        return rotated[..., self.out_index, self.in_index]

    def project(self, gradient: Tensor) -> Tensor:
        """Whitened components (…, k) of gradients (…, o, i)."""
        return self.rotate(gradient) * self.power(-0.5)

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

    def row_of(self, direction: Direction, exponent: float) -> Tensor:
        """−(Λ+ε)^{−p} Qᵀ v (D,): the row that is unprojected to `direction`, or to its part on the kept components."""
        self.space.check(direction, "direction")
        bases = [(self.bases[tensor.key], direction[tensor.key].float()) for tensor in self.space.tensors]
        return torch.cat([-basis.rotate(value) * basis.power(-exponent) for basis, value in bases])

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
        leading = inner_products(rows, self.components.T)
        return rows + inner_products(leading * (factors - 1), self.components)

    def scales(self, rows: Tensor) -> Tensor:
        """s (N,) with x̃ = s W (x − μ), 0 for a row equal to the mean. V is orthonormal: ‖W y‖² = ‖y‖² − Σ (1 − f²) (v·y)²."""
        centred = rows - self.mean
        squared = torch.linalg.vecdot(centred, centred)
        if self.factors.numel():
            squared -= inner_products(centred, self.components.T).square() @ (1 - self.factors.square())
        return torch.where(squared > 0, squared.clamp_min(torch.finfo(rows.dtype).tiny).rsqrt(), 0)

    def fold(self, atoms: Tensor) -> tuple[Tensor, Tensor]:
        """(D W (K, D), D W μ (K,)) of atoms D (K, D): X̃ Dᵀ = diag(s) (X (D W)ᵀ − (D W μ)ᵀ), so that K atoms are whitened in
        place of N rows."""
        folded = self.scale(atoms, self.factors)
        return folded, folded @ self.mean

    def unfold(self, sums: Tensor, weights: Tensor) -> Tensor:
        """AᵀX̃ = (Aᵀ diag(s) X − (Aᵀs) μᵀ) W (K, D) from the sums Aᵀ diag(s) X (K, D) over stored rows, and Aᵀs (K,)."""
        return self.scale(sums - weights[:, None] * self.mean, self.factors)

    def undo(self, atom: Tensor, exponent: float) -> Tensor:
        """W^{−2p} d: an atom (D,) in the coordinates of stored rows, ready for `Projection.unproject` with the same p.

        W whitens as Λ^{−½} does, so Λ^p has W^{−2p} beside it: p = +½ gives gradients, p = −½ the natural step.
        """
        return self.scale(atom, self.factors ** (-2 * exponent))

    def gradients(self, atoms: Tensor) -> Tensor:
        """The unit gradients (K, D) that atoms stand for: how they are compared."""
        return torch.nn.functional.normalize(self.undo(atoms, 0.5), dim=1)

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
    Atoms whose correlation with what is left exceeds α join, the strongest few at a time, until there are none; the codes are
    then optimal over all K.
    """

    def __init__(self, dictionary: Tensor) -> None:
        self.dictionary = dictionary
        self._gram = inner_products(dictionary, dictionary)  # (K, K)

    def codes(self, rows: Tensor, alpha: float, *, nonnegative: bool) -> Tensor:
        """Codes (N, K) that minimise ½‖X − A D‖² + α‖A‖₁, rows (N, D)."""
        return self._solve(inner_products(rows, self.dictionary), alpha, nonnegative)[0]

    def coding(self, rows: Tensor, alpha: float, *, nonnegative: bool) -> Coding:
        """Codes with their objective and duality gap, for one product with the dictionary in all."""
        target = inner_products(rows, self.dictionary)
        return self.coding_of(target, rows.square().sum(1), alpha, nonnegative=nonnegative)

    def coding_of(self, target: Tensor, squared: Tensor, alpha: float, *, nonnegative: bool) -> Coding:
        """The same from the rows' correlations with the atoms X Dᵀ (N, K) and ‖x‖² (N,) alone."""
        codes, correlation = self._solve(target, alpha, nonnegative)
        fitted = (codes * target).sum(1)  # x·Da
        residual = squared - fitted - (codes * correlation).sum(1)  # ‖x − Da‖²
        value = 0.5 * residual + alpha * codes.abs().sum(1)
        scale = _dual_scale(correlation, alpha, nonnegative)
        return Coding(codes, value, value - scale * (squared - fitted) + 0.5 * scale.square() * residual)

    def _solve(self, target: Tensor, alpha: float, nonnegative: bool) -> tuple[Tensor, Tensor]:
        """(codes, correlation of the residual with every atom), both (N, K). `target` is X Dᵀ."""
        codes, correlation = torch.zeros_like(target), target.clone()
        working = torch.zeros_like(target, dtype=torch.bool)
        while True:
            strength = (correlation if nonnegative else correlation.abs()).masked_fill(working, 0)
            joining = strength > alpha + _TOLERANCE
            counts = joining.sum(1)
            pending = counts.nonzero().flatten()
            if not len(pending):
                return codes, correlation
            crowded = (counts > _JOINING).nonzero().flatten()
            joining[crowded] = _strongest(strength[crowded], min(_JOINING, len(self._gram)))
            working |= joining
            pending = pending[torch.argsort(working[pending].sum(1), stable=True)]  # parts of like size
            for part in pending.split(_PART):
                columns, used = _columns(working[part])
                gram = torch.take(self._gram, columns[:, :, None] * len(self._gram) + columns[:, None, :])  # (n, s, s)
                solved = _lasso(gram, target[part].gather(1, columns), used, alpha, nonnegative)
                codes.view(-1)[(part[:, None] * len(self._gram) + columns)[used]] = solved[used]
                fit = torch.nn.functional.embedding_bag(columns, self._gram, per_sample_weights=solved, mode="sum")
                correlation[part] = target[part] - fit


def _strongest(strength: Tensor, count: int) -> Tensor:
    """Which entries of each row are among its `count` largest, (n, K) bool."""
    return torch.zeros_like(strength, dtype=torch.bool).scatter_(1, strength.topk(count, dim=1).indices, True)


def _columns(working: Tensor) -> tuple[Tensor, Tensor]:
    """(columns (n, s) of the atoms that each row of `working` (n, K) marks, which of them are no padding (n, s))."""
    sizes = working.sum(1)
    atoms = working.nonzero()[:, 1]
    used = torch.arange(int(sizes.max())) < sizes[:, None]
    columns = torch.zeros(used.shape, dtype=torch.int64)
    columns[used] = atoms
    return columns, used


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


def _lasso(gram: Tensor, target: Tensor, used: Tensor, alpha: float, nonnegative: bool) -> Tensor:
    """Codes (n, s) that minimise ½ a G a − a·t + α‖a‖₁ for each row's own Gram matrix G (n, s, s) and target (n, s), 0 where
    not `used` (n, s).

    Primal-dual active sets (Hintermüller, Ito & Kunisch 2002): with the codes' signs σ given, a is the solution of a linear
    system, and its optimality conditions give the next σ; nearly always three or four of them end it, exactly. Rows where
    they do not, as with atoms that are equal, are left to `_fista`.
    """
    codes, rows = torch.zeros_like(target), torch.arange(len(target))
    signs = _signs(target, used, alpha, nonnegative)
    for _ in range(_SYSTEMS):
        active = signs.abs()
        system = gram * active[:, :, None] * active[:, None, :] + torch.diag_embed(1 - active)
        solved = torch.linalg.solve_ex(system, active * target - alpha * signs)[0]
        left = target - torch.bmm(gram, solved[:, :, None])[:, :, 0]
        following = _signs(solved + left, used, alpha, nonnegative)
        solves = (left - alpha * signs).abs() * active < _TOLERANCE  # False as well where it is no number
        codes[rows] = solved
        pending = ((following != signs) | ~solves).any(1).nonzero().flatten()
        if not len(pending):
            return codes
        rows, gram, target, used, signs = (part[pending] for part in (rows, gram, target, used, following))
    codes[rows] = _fista(gram * (used[:, :, None] & used[:, None, :]), target * used, alpha, nonnegative)
    return codes


def _signs(values: Tensor, used: Tensor, alpha: float, nonnegative: bool) -> Tensor:
    """1 above α, −1 below −α (unless `nonnegative`), else 0; 0 where not `used`."""
    above = ((values > alpha) & used).to(values.dtype)
    return above if nonnegative else above - ((values < -alpha) & used).to(values.dtype)


def _fista(gram: Tensor, target: Tensor, alpha: float, nonnegative: bool) -> Tensor:
    """Codes (n, s) as in `_lasso`, for any G.

    Beck & Teboulle 2009, with the adaptive restart of O'Donoghue & Candès 2015. The step is one over the
    largest row sum of |G|, which bounds the largest eigenvalue.
    """
    step = 1.0 / gram.abs().sum(2).amax(1, keepdim=True).clamp_min(1e-12)
    codes = momentum = torch.zeros_like(target)
    t = 1.0
    for _ in range(_ITERATIONS):
        gradient = torch.bmm(momentum[:, None], gram)[:, 0] - target
        updated = _shrink(momentum - step * gradient, step * alpha, nonnegative)
        change = updated - codes
        if float(((momentum - updated) * change).sum()) > 0:  # the objective went up: restart the momentum
            t = 1.0
        t_next = (1 + (1 + 4 * t * t) ** 0.5) / 2
        momentum, codes, t = updated + (t - 1) / t_next * change, updated, t_next
        if float(change.abs().max()) < _TOLERANCE:
            break
    return codes


def _shrink(values: Tensor, threshold: Tensor, nonnegative: bool) -> Tensor:
    if nonnegative:
        return (values - threshold).clamp_min(0)
    return values.sign() * (values.abs() - threshold).clamp_min(0)
