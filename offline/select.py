"""Which atoms are worth keeping: support, coherence against chance (offline/coherence.py), stability (offline/stability.py),
and what is new beside those that are taken already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atoms.manifest import Coherence
from offline.coherence import NULL_SETS, LengthMatchedSets, coherence_z
from offline.config import SelectConfig
from offline.dictionary import Codes
from offline.rows import RowStore

_LEAST_DOCUMENTS = 6


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
        sets = null.draw(members, NULL_SETS)
        raw, raw_z, raw_null = coherence_z(store.sketches, members, signs, sets)
        whitened, whitened_z, _ = coherence_z(store.whitened_rows, members, signs, sets)
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
