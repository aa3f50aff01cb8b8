"""Which atoms are worth keeping, and what is said about them: support, coherence against chance, stability, keywords.

Coherence of an atom: mean pairwise cosine of the gradients of its top documents, sign-aligned,
    (‖Σ σ_i ĝ_i‖² − Σ ‖ĝ_i‖²) / (n (n − 1))      for unit vectors ĝ_i (sketches have unit length on average),
raw (from sketches, see offline/rows.py) and whitened. Its z-score is against random sets of documents whose response
lengths fall into the same bins, because length alone makes gradients alike.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atoms.manifest import Coherence
from offline.config import SelectConfig
from offline.corpus import Document
from offline.dictionary import Codes
from offline.rows import RowStore

FOUND_AGAIN = 0.8
"""|cosine| above which an atom counts as found again in another dictionary."""
_NULL_SETS = 64
_LEAST_DOCUMENTS = 6
_POOL_BLOCK = 128
"""Vectors of random sets that are read at once: what their sums need does not grow with the corpus."""
_LENGTH_BINS = 8
_PRIOR_WEIGHT = 200.0
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?|[^\w\s]", re.UNICODE)


@dataclass(frozen=True)
class Candidate:
    """A dictionary atom with its evidence. `documents` are its top training documents, strongest first, with codes."""

    atom: int
    n_documents: int
    documents: tuple[int, ...]
    codes: tuple[float, ...]
    coherence: Coherence


@dataclass(frozen=True)
class Sparsity:
    """How many documents use each atom, (K,) int32, and how many documents use 0, 1, 2 … atoms, int32."""

    documents_per_atom: Tensor
    codes_per_document: Tensor

    @classmethod
    def of(cls, codes: Codes) -> Sparsity:
        """Counts the non-zero codes."""
        per_document = torch.bincount(codes.places, minlength=len(codes.documents))
        return cls(codes.starts.diff().int(), torch.bincount(per_document).int())


def least_support(codes: Codes, config: SelectConfig) -> int:
    """The fewest documents of an atom that goes on: as configured, or half of the dictionary's mean, but at least 6.

    A behaviour that splits leaves splinters of few documents that are more coherent than any whole one.
    """
    return config.min_documents or max(_LEAST_DOCUMENTS, round(len(codes.places) / codes.atoms / 2))


def candidates(
    store: RowStore, codes: Codes, lengths: Sequence[int], config: SelectConfig, seed: int
) -> list[Candidate]:
    """All atoms with enough support, with coherence. lengths: T of every document of the corpus."""
    null = LengthMatchedSets(codes.documents.tolist(), lengths, seed)
    least, found = least_support(codes, config), []
    for atom in range(codes.atoms):
        places, values = codes.of(atom)
        support = len(values)
        if support < least:
            continue
        top = torch.argsort(values.abs(), descending=True, stable=True)[: config.top_documents]
        members, strongest = codes.documents[places[top]].tolist(), values[top]
        signs = strongest.sign() if config.sign_aligned else torch.ones(len(top))
        raw, raw_z, raw_null = _coherence_z(store.sketches, members, signs, null)
        whitened, whitened_z, _ = _coherence_z(store.rows, members, signs, null)
        measured = Coherence(raw=raw, raw_z=raw_z, whitened=whitened, whitened_z=whitened_z, raw_null=raw_null)
        found.append(Candidate(atom, support, tuple(members), tuple(strongest.tolist()), measured))
    return found


def select(found: Sequence[Candidate], gradients: Tensor, stabilities: Tensor, config: SelectConfig) -> list[Candidate]:
    """The best `keep` candidates that are beyond chance (`min_z`) and found again with another seed (`min_stability`), most
    coherent first.

    Taken one after the other by coherence × stability × (1 − m), m the largest |cosine| with the gradient of one that is taken
    already: what holds together, comes again, and is new. Near-duplicates (m > `max_cosine`) are passed over.
    gradients (K, D): unit atoms with the rows' whitening undone. Whitening sets apart what points almost the same way, so atoms
    that split one behaviour are orthogonal in it, yet steer alike. stabilities (K,).
    """
    left = [c for c in found if c.coherence.raw_z >= config.min_z and stabilities[c.atom] >= config.min_stability]
    worth = {c.atom: max(0.0, c.coherence.raw) * (float(stabilities[c.atom]) if config.distinct else 1.0) for c in left}
    nearest, chosen = torch.zeros(len(gradients)), list[Candidate]()
    while left and len(chosen) < config.keep:
        new = 1 - nearest if config.distinct else torch.ones(len(gradients))
        best = max(left, key=lambda c: worth[c.atom] * float(new[c.atom]))
        chosen.append(best)
        nearest = torch.maximum(nearest, (gradients @ gradients[best.atom]).abs())
        left = [c for c in left if c is not best and nearest[c.atom] <= config.max_cosine]
    return sorted(chosen, key=lambda c: -c.coherence.raw)


def coherence(unit: Tensor, signs: Tensor) -> float:
    """Mean pairwise cosine of sign-aligned unit vectors (n, S), by the identity in the module docstring."""
    n = len(unit)
    total = (unit * signs[:, None]).sum(0)
    return float((total.square().sum() - unit.square().sum()) / (n * (n - 1)))


def stability(atoms: Tensor, others: Tensor) -> Tensor:
    """|cosine| of each atom (K, D) with its match among `others` in the best one-to-one assignment, (K,)."""
    from scipy.optimize import linear_sum_assignment

    similarity = (atoms @ others.T).abs()
    rows, columns = linear_sum_assignment(-similarity.numpy())
    result = torch.zeros(len(atoms))
    result[rows] = similarity[rows, columns]
    return result


def can_halve(documents: int, atoms: int) -> bool:
    """Whether either half of so many documents has as many documents as there are atoms to learn from it."""
    return documents // 2 >= atoms


def split_halves(documents: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Two random halves of `documents`, each sorted; of an odd number the second is the larger."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    middle = len(order) // 2
    first, second = (sorted(documents[place] for place in part) for part in (order[:middle], order[middle:]))
    return first, second


def keywords(documents: Sequence[Document], members: Sequence[int], count: int = 6) -> list[str]:
    """Words that mark `members` (row numbers): largest z of the log-odds with an informative Dirichlet prior.

    Monroe, Colaresi & Quinn 2008; the prior is the whole corpus, scaled to 200 words.
    """
    inside, everywhere = Counter[str](), Counter[str]()
    chosen = set(members)
    for document in documents:
        words = [word.lower() for word in _WORD.findall(f"{document.prompt} {document.response}")]
        everywhere.update(words)
        if document.row in chosen:
            inside.update(words)
    total_in, total = sum(inside.values()), sum(everywhere.values())
    scale = _PRIOR_WEIGHT / total

    def z(word: str) -> float:
        prior = everywhere[word] * scale
        a, b = inside[word] + prior, everywhere[word] - inside[word] + prior
        odds_in = math.log(a / (total_in + _PRIOR_WEIGHT - a))
        odds_out = math.log(b / (total - total_in + _PRIOR_WEIGHT - b))
        return (odds_in - odds_out) / math.sqrt(1 / a + 1 / b)

    return sorted((word for word in inside if z(word) > 1.0), key=lambda word: (-z(word), word))[:count]


class LengthMatchedSets:
    """Draws random sets of documents whose lengths fall into the same quantile bins as a given set's."""

    def __init__(self, documents: Sequence[int], lengths: Sequence[int], seed: int) -> None:
        values = torch.tensor([float(lengths[d]) for d in documents])
        edges = torch.quantile(values, torch.linspace(0, 1, _LENGTH_BINS + 1)[1:-1]) if len(values) > 1 else values[:0]
        bins = torch.bucketize(values, edges)
        self._bin = dict(zip(documents, bins.tolist(), strict=True))
        self._members = {b: [d for d in documents if self._bin[d] == b] for b in set(bins.tolist())}
        self._seed = seed

    def draw(self, members: Sequence[int], sets: int) -> list[list[int]]:
        """`sets` random sets, each with as many documents of every bin as `members` has, without repeats."""
        generator = torch.Generator().manual_seed(self._seed)
        wanted = Counter(self._bin[d] for d in members)
        drawn = []
        for _ in range(sets):
            one: list[int] = []
            for b, count in sorted(wanted.items()):
                pool = self._members[b]
                one += [pool[int(i)] for i in torch.randperm(len(pool), generator=generator)[:count]]
            drawn.append(one)
        return drawn


def _coherence_z(
    load: Callable[[Sequence[int]], Tensor], members: Sequence[int], signs: Tensor, null: LengthMatchedSets
) -> tuple[float, float, tuple[float, float]]:
    """(coherence, z against length-matched random sets, their mean and standard deviation).

    `load` gives unit vectors (n, S) of documents.
    """
    value = coherence(load(members), signs)
    sets = null.draw(members, _NULL_SETS)
    pool = sorted({document for one in sets for document in one})
    membership = torch.tensor([[float(document in one) for document in pool] for one in map(set, sets)])
    summed, squares = torch.zeros(()), torch.zeros(len(sets))
    for start in range(0, len(pool), _POOL_BLOCK):
        vectors, within = load(pool[start : start + _POOL_BLOCK]), membership[:, start : start + _POOL_BLOCK]
        summed = summed + within @ vectors
        squares += within @ vectors.square().sum(1)
    sizes = membership.sum(1)
    values = (summed.square().sum(1) - squares) / (sizes * (sizes - 1))
    mean, deviation = float(values.mean()), float(values.std())
    return value, (value - mean) / max(deviation, 1e-9), (mean, deviation)
