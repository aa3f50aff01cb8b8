"""Whether atoms are found again: in a dictionary of another seed, and in dictionaries of half of the documents each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FOUND_AGAIN = 0.8
"""|cosine| above which an atom counts as found again in another dictionary."""


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
