"""The map of the dictionary keeps distances."""

from __future__ import annotations

import pytest
import torch

from offline.mds import plane


def test_points_of_a_plane_keep_their_distances() -> None:
    """Unit vectors on a circle lie in a plane, where no distance has to give."""
    angles = torch.tensor([0.0, 0.4, 1.0, 2.0, 3.5, 5.0], dtype=torch.float64)
    atoms = torch.stack([angles.cos(), angles.sin(), *torch.zeros(3, 6)], dim=1)
    positions, fidelity = plane(atoms.float())
    assert torch.allclose(torch.cdist(positions, positions), torch.cdist(atoms, atoms), atol=1e-4)
    assert fidelity == pytest.approx(1)


def test_the_stress_is_no_higher_than_scikit_learns() -> None:
    from sklearn.manifold import smacof

    atoms = torch.nn.functional.normalize(torch.randn(40, 12, generator=torch.Generator().manual_seed(0)), dim=1)
    distances = torch.cdist(atoms.double(), atoms.double())
    positions, fidelity = plane(atoms)
    ours = float((torch.cdist(positions, positions) - distances).square().sum() / 2)
    _, theirs = smacof(
        distances.numpy(), n_components=2, n_init=1, max_iter=300, random_state=0, normalized_stress=False
    )
    assert ours <= 1.05 * theirs
    assert 0.3 < fidelity < 1


@pytest.mark.parametrize("count", [1, 2])
def test_very_few_atoms_have_a_map(count: int) -> None:
    positions, fidelity = plane(torch.eye(4)[:count])
    assert positions.shape == (count, 2) and torch.isfinite(positions).all() and fidelity == 1


def test_equal_atoms_lie_on_one_point() -> None:
    positions, fidelity = plane(torch.ones(3, 5))
    assert float(positions.abs().max()) < 1e-3 and fidelity == 0


def test_the_map_is_the_same_every_time() -> None:
    atoms = torch.nn.functional.normalize(torch.randn(20, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    assert torch.equal(plane(atoms)[0], plane(atoms)[0])
