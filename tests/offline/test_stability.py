"""Whether atoms are found again, and the halves in which they are looked for."""

from __future__ import annotations

import torch

from offline.stability import split_halves, stability


def test_stability_finds_a_permuted_and_flipped_dictionary() -> None:
    atoms = torch.linalg.qr(torch.randn(12, 12))[0][:5]
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(stability(atoms, -atoms[order]), torch.ones(5), atol=1e-5)
    assert stability(atoms, atoms[:3]).gt(0.5).sum() == 3, "the assignment must be one-to-one"


def test_halves_share_no_document_and_leave_none_out() -> None:
    documents = list(range(3, 60, 2))
    first, second = split_halves(documents, seed=4)
    assert (len(first), len(second)) == (14, 15) and sorted(first + second) == documents
    assert first == sorted(first) and (first, second) == split_halves(documents, seed=4)
    assert first != split_halves(documents, seed=5)[0]
