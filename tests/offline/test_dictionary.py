"""The dictionary: monotone, unit, deterministic, without dead atoms, and as good as scikit-learn's at the same objective."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.decomposition import MiniBatchDictionaryLearning
from torch import Tensor

import offline.dictionary as dictionary_module
import offline.rows as rows_module
from atoms.projection import objective, sparse_codes
from atoms.storage import write_tensors
from offline.config import DictionaryConfig, WhiteningConfig
from offline.dictionary import dictionary_size, encode, learn_dictionary, update_atoms
from offline.progress import Progress
from offline.ranks import ALONE
from offline.rows import RowStore, shard_path
from offline.whitening import fit_whitening

ALPHA = 0.1
QUIET = Progress(quiet=True)


def planted_rows(documents: int = 120, atoms: int = 8, dim: int = 24) -> Tensor:
    """Each row is one of `atoms` random directions, twice as strong as its noise."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(atoms, dim, generator=generator))
    noise = torch.nn.functional.normalize(torch.randn(documents, dim, generator=generator))
    return truth[torch.arange(documents) % atoms] + 0.5 * noise


@pytest.fixture
def store(tmp_path: Path) -> RowStore:
    """The rows in three shards, in mixed order."""
    rows = planted_rows()
    for shard in range(3):
        documents = torch.arange(shard, len(rows), 3).flip(0)
        write_tensors(shard_path(tmp_path, shard), {"document": documents, "row": rows[documents]})
    store = RowStore(tmp_path)
    return replace(store, fitted=fit_whitening(store, WhiteningConfig(ridge=0), QUIET))


def learn(store: RowStore, seed: int = 0, **settings: object):
    config = DictionaryConfig(**({"atoms": 8, "alpha": ALPHA, "iterations": 40} | settings))
    return learn_dictionary(store, range(len(store)), config, seed, QUIET)


@pytest.mark.parametrize("nonnegative", [True, False])
def test_the_objective_falls_atoms_are_unit_and_codes_near_optimal(store: RowStore, nonnegative: bool) -> None:
    learned = learn(store, nonnegative=nonnegative)
    steps = [after - before for before, after in zip(learned.objectives, learned.objectives[1:])]
    assert max(steps) < 1e-5, "an update raised the objective"
    assert learned.objectives[-1] < 0.95 * learned.objectives[0]
    assert torch.allclose(learned.atoms.norm(dim=1), torch.ones(len(learned.atoms)), atol=1e-5)
    assert -1e-6 < learned.duality_gap < 1e-4


def test_the_same_seed_gives_the_same_atoms_and_another_others(store: RowStore) -> None:
    assert torch.equal(learn(store).atoms, learn(store).atoms)
    assert not torch.equal(learn(store).atoms, learn(store, seed=1).atoms)


def test_the_reported_objective_is_that_of_the_returned_atoms(store: RowStore) -> None:
    learned = learn(store)
    rows = store.whitened_rows(range(len(store)))
    codes = sparse_codes(rows, learned.atoms, ALPHA, nonnegative=True)
    assert learned.objectives[-1] == pytest.approx(float(objective(rows, codes, learned.atoms, ALPHA).mean()), rel=1e-5)


def test_scikit_learn_is_not_better_at_the_same_objective(store: RowStore) -> None:
    rows = store.whitened_rows(range(len(store)))
    oracle = MiniBatchDictionaryLearning(8, alpha=ALPHA, positive_code=True, fit_algorithm="cd", batch_size=len(rows),
                                         max_iter=100, random_state=0)  # fmt: skip
    atoms = torch.tensor(oracle.fit(rows.double().numpy()).components_, dtype=torch.float32)
    atoms = torch.nn.functional.normalize(atoms)
    theirs = float(objective(rows, sparse_codes(rows, atoms, ALPHA, nonnegative=True), atoms, ALPHA).mean())
    ours = min(learn(store, seed=seed).objectives[-1] for seed in range(3))
    assert ours <= 1.02 * theirs, (
        f"ours {ours:.4f}, scikit-learn {theirs:.4f}: a worse local minimum, or too few iterations"
    )


def test_dead_atoms_are_revived(store: RowStore) -> None:
    learned = learn(store, atoms=8, alpha=0.3)
    codes = encode(store, range(len(store)), learned.atoms, DictionaryConfig(atoms=8, alpha=0.3))
    assert all(len(codes.of(atom)[0]) for atom in range(8)), "an atom that no row uses was left in the dictionary"


def test_one_update_never_raises_the_objective_and_leaves_unused_atoms() -> None:
    rows = torch.nn.functional.normalize(planted_rows())
    atoms = torch.nn.functional.normalize(torch.randn(9, rows.shape[1], generator=torch.Generator().manual_seed(1)))
    codes = sparse_codes(rows, atoms, ALPHA, nonnegative=True)
    codes[:, 4] = 0
    updated = update_atoms(atoms, codes.T @ codes, codes.T @ rows)
    before, after = (objective(rows, codes, a, ALPHA).sum() for a in (atoms, updated))
    assert after < before
    assert torch.equal(updated[4], atoms[4])


def test_codes_come_in_order_of_documents_and_only_for_those_asked(store: RowStore) -> None:
    atoms = learn(store).atoms
    config = DictionaryConfig(atoms=8, alpha=ALPHA)
    codes = encode(store, [70, 3, 41, 8], atoms, config)
    assert codes.documents.tolist() == [3, 8, 41, 70]
    expected = sparse_codes(store.whitened_rows([3, 8, 41, 70]), atoms, ALPHA, nonnegative=True)
    assert torch.allclose(codes.to_dense(), expected, atol=1e-4)
    for atom in range(codes.atoms):
        places, values = codes.of(atom)
        assert places.tolist() == expected[:, atom].nonzero().flatten().tolist()
        assert torch.allclose(values, expected[places, atom], atol=1e-4)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_a_pass_equals_the_plain_computation_on_whitened_rows(
    store: RowStore, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches over the bounds of shards, some documents only, whitening of atoms: against float64 on whitened rows."""
    monkeypatch.setattr(rows_module, "BATCH_DOCUMENTS", 25)
    store = replace(store, fitted=fit_whitening(store, WhiteningConfig(ridge=ridge), QUIET))
    documents = [d for d in range(len(store)) if d % 4]
    rows, atoms = store.whitened_rows(documents).double(), torch.nn.functional.normalize(planted_rows()[:9])
    found = dictionary_module._accumulate(store, documents, store.scales(documents), atoms, DictionaryConfig(), ALONE)
    codes = sparse_codes(rows, atoms.double(), ALPHA, nonnegative=True)
    losses = objective(rows, codes, atoms.double(), ALPHA)
    assert bool(len(store.whitening.factors)) == bool(ridge)
    assert torch.allclose(found.gram.double(), codes.T @ codes, atol=1e-4)
    assert torch.allclose(found.cross.double(), codes.T @ rows, atol=1e-4)
    assert found.objective == pytest.approx(float(losses.mean()), rel=1e-5) and found.sums[2] == len(documents)
    assert found.worst[:, 1].tolist() == [documents[int(i)] for i in losses.argsort(descending=True)[:9]]


def test_atoms_start_from_means_of_a_few_rows_each(store: RowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dictionary_module, "_DOCUMENTS_A_ROW", 14)  # 112 documents: eight rows
    config, documents = DictionaryConfig(atoms=9), list(range(7, 119))
    start = dictionary_module._start(store, documents, store.scales(documents), config, 3, ALONE)
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(3))[: 9 * 8].view(8, 9)
    rows = store.whitened_rows([documents[int(i)] for i in order.flatten()]).view(8, 9, -1)
    assert torch.allclose(start, torch.nn.functional.normalize(rows.mean(0), dim=1), atol=1e-5)
    few = dictionary_module._start(store, documents[:12], store.scales(documents), config, 3, ALONE)
    single = store.whitened_rows(documents[:12]) @ few.T
    assert torch.allclose(single.max(0).values, torch.ones(9), atol=1e-5), "few documents: rows themselves"
    assert len(set(single.argmax(0).tolist())) == 9


def test_settled_atoms_are_those_that_an_update_would_hardly_change(store: RowStore) -> None:
    """Momentum changes how atoms get there, not where: what an update alone gains there is below what counts as settled."""
    learned, everyone = learn(store), range(len(store))
    scales = store.scales(everyone)
    settled = dictionary_module._accumulate(store, everyone, scales, learned.atoms, DictionaryConfig(), ALONE)
    updated = update_atoms(learned.atoms, settled.gram, settled.cross)
    after = dictionary_module._accumulate(store, everyone, scales, updated, DictionaryConfig(), ALONE)
    assert len(learned.objectives) < 40 and learned.objectives[-1] == pytest.approx(settled.objective, rel=1e-6)
    assert 0 <= settled.objective - after.objective < 1e-3 * settled.objective


def test_batches_hold_each_document_asked_for_once(store: RowStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "BATCH_DOCUMENTS", 7)
    wanted = [0, 5, *range(40, 70), 119]
    batches = [(numbers, rows.clone()) for numbers, rows in store.stored_batches(wanted)]
    assert [len(numbers) for numbers, _ in batches] == [7, 7, 7, 7, 5]
    numbers, rows = (torch.cat(part) for part in zip(*batches, strict=True))
    assert sorted(numbers.tolist()) == wanted
    assert torch.equal(rows, store.stored_rows(numbers.tolist()))


def test_the_default_size_follows_the_corpus() -> None:
    assert [dictionary_size(DictionaryConfig(), n) for n in (1, 100, 1600, 10**6)] == [1, 8, 100, 500]
    assert [dictionary_size(DictionaryConfig(atoms=50), n) for n in (30, 100)] == [30, 50]
