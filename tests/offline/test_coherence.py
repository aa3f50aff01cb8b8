"""Coherence of documents, and the sets by chance that it is held against."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from offline.coherence import LengthMatchedSets, coherence


def test_coherence_is_the_mean_pairwise_cosine_sign_aligned() -> None:
    unit = torch.nn.functional.normalize(torch.randn(7, 12, generator=torch.Generator().manual_seed(0)))
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0])
    pairs = [signs[i] * signs[j] * (unit[i] @ unit[j]) for i in range(7) for j in range(7) if i != j]
    assert coherence(unit, signs) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)
    assert coherence(torch.ones(4, 1), torch.ones(4)) == pytest.approx(1.0)


def test_random_sets_match_lengths_without_repeats_and_are_reproducible() -> None:
    lengths = list(range(100))
    documents = list(range(0, 100, 2))
    sets = LengthMatchedSets(documents, lengths, seed=0)
    members = [0, 2, 4, 96, 98]
    drawn = sets.draw(members, 30)
    assert drawn == LengthMatchedSets(documents, lengths, seed=0).draw(members, 30)
    assert len({tuple(one) for one in drawn}) > 20
    for one in drawn:
        assert set(one) <= set(documents) and len(set(one)) == len(one)
        assert Counter(length > 50 for length in one) == {False: 3, True: 2}, (
            "a random set has other lengths than the atom's"
        )


def test_equal_lengths_still_give_sets() -> None:
    assert len(LengthMatchedSets([0, 1, 2], [5, 5, 5], seed=0).draw([0, 1], 4)) == 4
