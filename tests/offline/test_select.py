"""Selection statistics against their definitions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from atoms.manifest import Coherence
from atoms.projection import RowWhitening
from atoms.storage import write_tensors
from offline.config import SelectConfig
from offline.dictionary import Codes
from offline.rows import RowStore, shard_path
from offline.select import Candidate, candidates, least_support, select


@pytest.fixture
def grouped(tmp_path: Path) -> tuple[RowStore, Codes]:
    """60 documents; the first 10 share a direction. Codes: atom 0 marks them, atom 1 marks 10 random ones, atom 2 one."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 32, generator=generator)
    rows[:10] += 3 * torch.randn(32, generator=generator)
    unit = torch.nn.functional.normalize(rows)
    write_tensors(shard_path(tmp_path, 0), {"document": torch.arange(60), "row": rows, "sketch": unit.half()})
    codes = torch.zeros(60, 3)
    codes[:10, 0] = torch.linspace(1, 0.1, 10)
    codes[20:60:4, 1] = 0.5
    codes[33, 2] = 1.0
    return RowStore(tmp_path, RowWhitening.centring(rows.mean(0))), Codes.of_matrix(torch.arange(60), codes)


def test_an_atom_needs_half_the_documents_of_the_mean_atom_unless_said_otherwise() -> None:
    codes = torch.zeros(60, 3)
    codes[:40, 0] = codes[40:, 1] = codes[:3, 2] = 1.0  # 63 documents in three atoms
    assert least_support(Codes.of_matrix(torch.arange(60), codes), SelectConfig()) == 10
    assert least_support(Codes.of_matrix(torch.arange(60), codes), SelectConfig(min_documents=2)) == 2
    few = Codes.of_matrix(torch.arange(4), torch.eye(4))
    assert least_support(few, SelectConfig()) == 6, "fewer than six documents say nothing"


def test_a_coherent_group_stands_out_and_a_random_one_does_not(grouped: tuple[RowStore, Codes]) -> None:
    store, codes = grouped
    found = candidates(store, codes, [5 + n % 7 for n in range(60)], SelectConfig(top_documents=8), 0)
    assert [c.atom for c in found] == [0, 1], "an atom with fewer than min_documents went on"
    group, chance = found
    assert group.documents == tuple(range(8)) and group.n_documents == 10
    assert group.coherence.raw_z > 4 and group.coherence.whitened_z > 4
    assert abs(chance.coherence.raw_z) < 3


def candidate(atom: int, raw: float, z: float = 9.0) -> Candidate:
    return Candidate(atom, 10, (0, 1), (1.0, 1.0), Coherence(raw=raw, raw_z=z, whitened=raw, whitened_z=z))


def test_selection_takes_the_best_skips_duplicates_and_chance() -> None:
    atoms = torch.eye(5)
    atoms[2] = torch.nn.functional.normalize(atoms[0] + 0.1 * atoms[2], dim=0)
    found = [candidate(0, 0.5), candidate(1, 0.4), candidate(2, 0.45), candidate(3, 0.9, z=1.0), candidate(4, 0.3)]
    chosen = select(found, atoms, torch.ones(5), SelectConfig(keep=2, min_z=3.0, max_cosine=0.8))
    assert [c.atom for c in chosen] == [0, 1]


def test_selection_passes_over_what_is_hardly_new_or_hardly_found_again() -> None:
    """By coherence × stability × (1 − cosine with one that is taken): 0.5; then 0.45 · 0.3, 0.4 · 0.9, 0.45 · 0.5."""
    atoms = torch.eye(4)
    atoms[1] = torch.nn.functional.normalize(0.7 * atoms[0] + (1 - 0.7**2) ** 0.5 * atoms[1], dim=0)
    found = [candidate(0, 0.5), candidate(1, 0.45), candidate(2, 0.4), candidate(3, 0.45)]
    stabilities, config = torch.tensor([1.0, 1.0, 0.9, 0.5]), SelectConfig(keep=2)
    assert [c.atom for c in select(found, atoms, stabilities, config)] == [0, 2]
    plain = dataclasses.replace(config, distinct=False)
    assert [c.atom for c in select(found, atoms, stabilities, plain)] == [0, 1]


def test_selection_drops_atoms_that_another_seed_does_not_find() -> None:
    found = [candidate(0, 0.5), candidate(1, 0.4)]
    chosen = select(found, torch.eye(2), torch.tensor([0.2, 0.9]), SelectConfig(min_stability=0.5))
    assert [c.atom for c in chosen] == [1]
