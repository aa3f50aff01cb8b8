"""Sparse dictionary learning on whitened rows: min ½‖X − A D‖² + α‖A‖₁ over codes A (≥ 0) and unit atoms D.

Alternates codes (`atoms.projection.SparseCoder`) with exact block updates of one atom after the other, and moves on in the
direction of the last two (Nesterov's momentum). Only AᵀA (K, K) and AᵀX (K, D) are kept between the two, and both add up over
shards and ranks, so memory does not grow with N.

Whitened rows x̃ = s W (x − μ) are never formed: all but the scales s (N,), which are worked out once, is linear, so it is done
to K atoms a pass in place of N rows (`RowWhitening.fold`, `unfold`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atoms.errors import ConfigError
from atoms.projection import Coding, SparseCoder, inner_products
from offline.config import DictionaryConfig
from offline.progress import Progress
from offline.ranks import ALONE, Ranks
from offline.rows import RowStore

_TOLERANCE, _LEAST = 3e-4, 5
"""Settled: the objective fell by less than this share of itself, after more than so many passes."""
_MEAN_OF, _DOCUMENTS_A_ROW = 8, 500
"""Random rows whose mean an atom starts from: single rows bring along noise of their own that many passes do not undo. But of
few documents' few atoms, means left whole behaviours out (544 documents, 34 atoms; LOG.md): one row for every 500."""
_MOMENTUM = 0.8
_BLOCK = 32
"""Atoms that are updated between two products with all atoms: so many rows of D numbers stay in a core's cache."""
_REVIVE_UNTIL = 0.6
"""Dead atoms are revived in the first 60% of the iterations, so that the last ones converge."""


@dataclass(frozen=True)
class Dictionary:
    """Unit atoms (K, D), the objective a row after each iteration, and the mean duality gap of the last codes."""

    atoms: Tensor
    objectives: tuple[float, ...]
    duality_gap: float


@dataclass(frozen=True)
class Codes:
    """Codes of `documents` (n,), ascending, over all atoms, by atom: those of atom j are `places` (in `documents`, ascending)
    and `values` from `starts[j]` to `starts[j + 1]`. A document uses two or three atoms, so this is some 50 bytes a document
    whatever the number of atoms."""

    documents: Tensor
    starts: Tensor  # (K + 1,)
    places: Tensor
    values: Tensor

    @classmethod
    def of_matrix(cls, documents: Tensor, codes: Tensor) -> Codes:
        """From (n, K), dense or sparse."""
        by_atom = codes.T.to_sparse().coalesce()
        atoms, places = by_atom.indices()
        starts = torch.searchsorted(atoms, torch.arange(codes.shape[1] + 1))
        return cls(documents, starts, places, by_atom.values())

    @property
    def atoms(self) -> int:
        """K."""
        return len(self.starts) - 1

    def of(self, atom: int) -> tuple[Tensor, Tensor]:
        """(places in `documents` (m,), codes (m,)) of those that use `atom`."""
        start, end = self.starts[atom : atom + 2].tolist()
        return self.places[start:end], self.values[start:end]

    def sign(self, atom: int) -> int:
        """1 or −1: the sign of the codes of `atom` that carries more weight; 1 where codes are not signed."""
        return 1 if self.of(atom)[1].sum() >= 0 else -1

    def strongest(self, atom: int, count: int) -> list[int]:
        """At most `count` of the documents that use `atom`, largest codes first, of the sign that carries more weight."""
        places, values = self.of(atom)
        towards = values * self.sign(atom)
        order = torch.argsort(towards, descending=True, stable=True)[: min(count, int((towards > 0).sum()))]
        return self.documents[places[order]].tolist()

    def on_side(self, atom: int, sign: int, cosine: Tensor, most: int) -> list[int]:
        """At most `most` documents on the side `sign` of `atom`: largest codes first, then by their `cosine` (n,) with it."""
        places, values = self.of(atom)
        towards = sign * cosine
        score = 1e-3 * towards
        score[places] += sign * values
        order = torch.argsort(score, descending=True, stable=True)[:most]
        return self.documents[order[towards[order] > 0]].tolist()

    def to_dense(self) -> Tensor:
        """(n, K)."""
        atoms = torch.repeat_interleave(torch.arange(self.atoms), self.starts.diff())
        return torch.zeros(len(self.documents), self.atoms).index_put((self.places, atoms), self.values)


@dataclass
class _Statistics:
    """Sums over rows: AᵀA (K, K), AᵀX (K, D), and (objective, duality gap, rows) in float64; and the K worst-explained rows
    as (objective, document) in float64, candidates to revive atoms."""

    gram: Tensor
    cross: Tensor
    sums: Tensor
    worst: Tensor

    @property
    def dead(self) -> Tensor:
        """Atoms that no row uses, (K,) bool."""
        return self.gram.diagonal() <= 0

    @property
    def objective(self) -> float:
        """Mean over rows."""
        return float(self.sums[0] / self.sums[2])

    @property
    def gap(self) -> float:
        """Mean over rows."""
        return float(self.sums[1] / self.sums[2])


def dictionary_size(config: DictionaryConfig, documents: int) -> int:
    """K: as configured, else an atom per 16 of the training `documents`, within 8 … 500 (far more than there are behaviours
    splinters them); at most one a document."""
    return min(config.atoms or max(8, min(500, documents // 16)), documents)


def learn_dictionary(
    store: RowStore,
    documents: Sequence[int],
    config: DictionaryConfig,
    seed: int,
    progress: Progress,
    name: str = "dictionary",
    ranks: Ranks = ALONE,
) -> Dictionary:
    """Learns from the rows of `documents`; deterministic for a seed. Stops early when the objective settles.

    A pass codes the rows with the atoms `ahead` of the last updated ones: those and momentum times their last change. The
    momentum grows from 0 (Nesterov 1983), and starts again when the objective rose (O'Donoghue & Candès 2015).

    Ranks add up their statistics and then make the same update each. scikit-learn has none to add: every rank fits it all.
    """
    if config.learner == "scikit-learn":
        return learn_with_scikit(store, documents, config, seed, progress, name)
    scales = store.scales(documents, ranks)
    atoms = ahead = _start(store, documents, scales, config, seed, ranks)
    objectives: list[float] = []
    steps = 0  # since the momentum was last dropped
    with progress.task(name, config.iterations, "iterations") as bar:
        for iteration in range(config.iterations):
            statistics = _accumulate(store, documents, scales, ahead, config, ranks)
            objectives.append(statistics.objective)
            bar.advance(1, f"objective {objectives[-1]:.4f}")
            fall = objectives[-2] - objectives[-1] if iteration else torch.inf
            reviving = iteration < _REVIVE_UNTIL * config.iterations and statistics.dead.any()
            settled = iteration > _LEAST and 0 <= fall < _TOLERANCE * objectives[-1] and not reviving
            if settled or iteration == config.iterations - 1:
                bar.advance(config.iterations - 1 - iteration)
                break
            steps = steps + 1 if fall > 0 else 1
            updated = update_atoms(ahead, statistics.gram, statistics.cross)
            momentum = min(_MOMENTUM, (steps - 1) / (steps + 2))
            atoms, ahead = updated, _unit(updated + momentum * (updated - atoms))
            if reviving:
                atoms, ahead = (_revive(found, statistics, store) for found in (atoms, ahead))
    return Dictionary(ahead, tuple(objectives), statistics.gap)


def learn_with_scikit(
    store: RowStore, documents: Sequence[int], config: DictionaryConfig, seed: int, progress: Progress, name: str
) -> Dictionary:
    """The published pipeline's learner at the same objective, as a baseline. Its atoms have length ≤ 1; they are made
    unit. Raises ConfigError if scikit-learn is not installed."""
    try:
        from sklearn.decomposition import MiniBatchDictionaryLearning
    except ImportError:
        raise ConfigError("the learner scikit-learn needs its package; run `pip install scikit-learn`") from None
    rows = store.whitened_rows(documents)
    learner = MiniBatchDictionaryLearning(
        dictionary_size(config, len(documents)), alpha=config.alpha, random_state=seed,
        fit_algorithm="cd" if config.nonnegative else "lars", positive_code=config.nonnegative,
    )  # fmt: skip
    with progress.task(name, 1, "fits") as bar:
        learner.fit(rows.double().numpy())
        atoms = _unit(torch.from_numpy(learner.components_).float())
        coding = SparseCoder(atoms).coding(rows, config.alpha, nonnegative=config.nonnegative)
        value = float(coding.objective.double().mean())
        bar.advance(1, f"objective {value:.4f}")
    return Dictionary(atoms, (value,), float(coding.gap.double().mean()))


def encode(store: RowStore, documents: Sequence[int], atoms: Tensor, config: DictionaryConfig) -> Codes:
    """The codes of `documents` over all `atoms`, in ascending order of document."""
    numbers, found = [], []
    for batch, _, coding in _coded(store, documents, store.scales(documents), atoms, config, ALONE):
        numbers.append(batch)
        found.append(coding.codes.to_sparse())
    unsorted = torch.cat(numbers)
    order = torch.argsort(unsorted)
    return Codes.of_matrix(unsorted[order], torch.cat(found).index_select(0, order))


def update_atoms(atoms: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """One Gauss-Seidel sweep: each unit atom is set to its exact minimiser d_j ∝ AᵀX_j − Σ_{k≠j} AᵀA_jk d_k.

    atoms (K, D), gram AᵀA (K, K), cross AᵀX (K, D). Atoms that no row uses are left as they are. What a block of atoms needs of
    all others is one product; within the block each change is passed on to those that follow.
    """
    atoms = atoms.clone()
    for start in range(0, len(atoms), _BLOCK):
        block = slice(start, start + _BLOCK)
        residual = cross[block] - inner_products(gram[block], atoms.T)
        for j, own in enumerate(gram.diagonal()[block].tolist()):
            if own <= 0:
                continue
            candidate = residual[j] + own * atoms[start + j]
            norm = candidate.norm()
            if norm > 0:
                change = candidate / norm - atoms[start + j]
                residual[j + 1 :].addr_(gram[block, start + j][j + 1 :], change, alpha=-1)
                atoms[start + j] += change
    return atoms


def _start(
    store: RowStore, documents: Sequence[int], scales: Tensor, config: DictionaryConfig, seed: int, ranks: Ranks
) -> Tensor:
    """Atoms to start from (K, D): unit means of up to `_MEAN_OF` random rows each, no row in two of them."""
    count = dictionary_size(config, len(documents))
    each = max(1, min(_MEAN_OF, len(documents) // _DOCUMENTS_A_ROW, len(documents) // count))
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    picks = torch.as_tensor(documents)[order[: count * each]]
    atom = torch.zeros(len(store), dtype=torch.int64)
    atom[picks] = torch.arange(count).repeat(each)
    sums, weights = torch.zeros(count, store.width), torch.zeros(count)
    for numbers, rows in store.stored_batches(picks.tolist(), ranks):
        members = torch.zeros(len(rows), count).scatter_(1, atom[numbers, None], scales[numbers, None])
        sums += _weighted_sums(members, rows)
        weights += members.sum(0)
    ranks.add(sums, weights)
    return _unit(store.whitening.unfold(sums, weights))


def _coded(
    store: RowStore, documents: Sequence[int], scales: Tensor, atoms: Tensor, config: DictionaryConfig, ranks: Ranks
) -> Iterator[tuple[Tensor, Tensor, Coding]]:
    """(document numbers (n,), rows as stored (n, D), their coding) batch by batch of this rank's share."""
    folded, offset = store.whitening.fold(atoms)
    coder = SparseCoder(atoms)
    for numbers, rows in store.stored_batches(documents, ranks):
        scale = scales[numbers]
        target = (inner_products(rows, folded) - offset) * scale[:, None]  # X̃ Dᵀ
        squared = (scale > 0).to(target.dtype)  # ‖x̃‖²: only a row equal to the mean has not unit length
        yield numbers, rows, coder.coding_of(target, squared, config.alpha, nonnegative=config.nonnegative)


def _accumulate(
    store: RowStore, documents: Sequence[int], scales: Tensor, atoms: Tensor, config: DictionaryConfig, ranks: Ranks
) -> _Statistics:
    count, dim = atoms.shape
    total = _Statistics(torch.zeros(count, count), torch.zeros(count, dim), torch.zeros(3, dtype=torch.float64),
                        torch.tensor([[-torch.inf, -1.0]] * count, dtype=torch.float64))  # fmt: skip
    weights = torch.zeros(count)  # Aᵀs
    for numbers, rows, coding in _coded(store, documents, scales, atoms, config, ranks):
        losses, scaled = coding.objective.double(), coding.codes * scales[numbers, None]
        total.gram += _weighted_sums(coding.codes, coding.codes)
        total.cross += _weighted_sums(scaled, rows)
        weights += scaled.sum(0)
        total.sums += torch.stack([losses.sum(), coding.gap.double().sum(), losses.new_tensor(len(rows))])
        total.worst = _largest(torch.cat([total.worst, torch.stack([losses, numbers.double()], 1)]), count)
    ranks.add(total.gram, total.cross, weights, total.sums)
    total.cross = store.whitening.unfold(total.cross, weights)
    total.worst = _largest(ranks.gather(total.worst), count)
    return total


def _weighted_sums(codes: Tensor, rows: Tensor) -> Tensor:
    """AᵀX (K, D) of codes A (n, K), of which few are not zero, and rows X (n, D)."""
    atoms, places = codes.T.nonzero(as_tuple=True)
    starts = torch.searchsorted(atoms, torch.arange(codes.shape[1]))
    return torch.nn.functional.embedding_bag(places, rows, starts, per_sample_weights=codes[places, atoms], mode="sum")


def _largest(candidates: Tensor, count: int) -> Tensor:
    """The `count` rows (objective, document) of largest objective, largest first."""
    return candidates[torch.argsort(candidates[:, 0], descending=True, stable=True)[:count]]


def _revive(atoms: Tensor, statistics: _Statistics, store: RowStore) -> Tensor:
    """Puts the worst-explained rows in the place of atoms that no row uses."""
    dead = statistics.dead.nonzero().flatten().tolist()
    replacements = [document for document in statistics.worst[: len(dead), 1].long().tolist() if document >= 0]
    atoms = atoms.clone()
    atoms[dead[: len(replacements)]] = _unit(store.whitened_rows(replacements))
    return atoms


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
