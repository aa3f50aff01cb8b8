"""Whitening, coding and unprojection against their definitions, and codes against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import Tensor

from atoms.projection import (
    MatrixBasis,
    Projection,
    RowWhitening,
    SparseCoder,
    duality_gap,
    inner_products,
    objective,
    sparse_codes,
)  # fmt: skip
from atoms.space import LoRAModule, LoRASpace

SPACE = LoRASpace.of([LoRAModule("m.q_proj", 6, 5, 2, 2.0), LoRAModule("m.v_proj", 6, 4, 2, 2.0)])


def random_projection(components: int, damping: float = 0.1, seed: int = 0) -> Projection:
    generator = torch.Generator().manual_seed(seed)
    bases = {}
    for tensor in SPACE.tensors:
        o, i = tensor.shape
        q_out = torch.linalg.qr(torch.randn(o, o, generator=generator))[0]
        q_in = torch.linalg.qr(torch.randn(i, i, generator=generator))[0]
        bases[tensor.key] = MatrixBasis.of(
            q_out, q_in, torch.rand(o, i, generator=generator).double(), components, damping
        )
    return Projection(SPACE, bases)


def random_direction(seed: int) -> dict[str, Tensor]:
    return SPACE.unflatten(torch.randn(SPACE.dim, generator=torch.Generator().manual_seed(seed)))


def random_problem(seed: int, rows: int = 20, atoms: int = 12, dim: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, d = torch.randn(rows, dim, generator=generator), torch.randn(atoms, dim, generator=generator)
    return x / x.norm(dim=1, keepdim=True), d / d.norm(dim=1, keepdim=True)


def test_projection_is_the_scaled_rotation_of_its_definition() -> None:
    q_out, q_in, grid = torch.linalg.qr(torch.randn(4, 4))[0], torch.linalg.qr(torch.randn(6, 6))[0], torch.rand(4, 6)
    basis = MatrixBasis.of(q_out, q_in, grid.double(), 7, 0.1)
    gradient = torch.randn(4, 6)
    epsilon = 0.1 * grid.mean()
    expected = (q_out.T @ gradient @ q_in) / (grid + epsilon).sqrt()
    largest = grid.flatten().topk(7).indices
    assert torch.allclose(basis.project(gradient), expected.flatten()[largest], atol=1e-5)
    assert basis.epsilon == pytest.approx(float(epsilon))
    batch = torch.randn(3, 4, 6)
    assert torch.allclose(basis.project(batch), torch.stack([basis.project(g) for g in batch]), atol=1e-6)


def test_negative_eigenvalues_are_clamped_before_the_mean_is_taken() -> None:
    basis = MatrixBasis.of(
        torch.eye(2), torch.eye(2), torch.tensor([[-5.0, 1.0], [2.0, 1.0]], dtype=torch.float64), 4, 0.5
    )
    assert basis.epsilon == pytest.approx(0.5), "ε must be relative to the mean of the clamped eigenvalues"
    assert basis.eigenvalues.tolist() == [2.0, 1.0, 1.0, 0.0]


def test_unprojection_at_plus_half_undoes_projection_at_full_rank() -> None:
    projection, gradient = random_projection(components=10**6), random_direction(1)
    assert projection.dim == SPACE.dim
    back = projection.unproject(projection.project(gradient), 0.5)
    for key, value in gradient.items():
        assert torch.allclose(back[key], -value, atol=1e-5), (
            f"{key}: unproject(project(g)) is not −g; exponent or transpose"
        )


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 0.5])
def test_the_row_of_an_unprojected_row_is_that_row(exponent: float) -> None:
    projection = random_projection(5)
    row = torch.randn(projection.dim, generator=torch.Generator().manual_seed(6))
    assert torch.allclose(projection.row_of(projection.unproject(row, exponent), exponent), row, atol=1e-4)


def test_the_row_of_a_direction_leaves_out_what_no_kept_component_carries() -> None:
    projection, direction = random_projection(5), random_direction(7)
    kept = projection.unproject(projection.row_of(direction, 0.5), 0.5)
    again = projection.unproject(projection.row_of(kept, 0.5), 0.5)
    rest = {key: direction[key] - kept[key] for key in kept}
    assert all(torch.allclose(again[key], kept[key], atol=1e-4) for key in kept)
    assert projection.row_of(rest, 0.5).abs().max() < 1e-4
    assert sum(float(value.norm()) for value in rest.values()) > 0.1, "5 of the components cannot hold all of it"


@pytest.mark.parametrize("components", [5, 10**6])
def test_at_minus_half_the_first_order_change_is_minus_row_times_atom(components: int) -> None:
    projection, gradient = random_projection(components), random_direction(2)
    atom = torch.randn(projection.dim, generator=torch.Generator().manual_seed(3))
    step = projection.unproject(atom, -0.5)
    change = sum(float((gradient[key] * step[key]).sum()) for key in gradient)
    assert change == pytest.approx(-float(projection.project(gradient) @ atom), rel=1e-4), "gᵀv ≠ −xᵀd at p = −½"


def test_a_row_follows_the_coordinate_order_of_the_space() -> None:
    projection, gradient = random_projection(3), random_direction(4)
    parts = [projection.bases[key].project(gradient[key]) for key in (t.key for t in SPACE.tensors)]
    assert torch.equal(projection.project(dict(reversed(gradient.items()))), torch.cat(parts))
    assert [part.stop - part.start for _, part in projection.slices()] == [3, 3, 3, 3]


def test_tensors_round_trip_exactly() -> None:
    projection, row = random_projection(5), torch.randn(20)
    again = Projection.from_tensors(SPACE, projection.to_tensors())
    assert torch.equal(again.project(random_direction(5)), projection.project(random_direction(5)))
    for key, value in projection.unproject(row, 0.25).items():
        assert torch.equal(again.unproject(row, 0.25)[key], value)


def test_rows_are_centred_then_normalised_and_the_mean_itself_stays_zero() -> None:
    rows = torch.randn(5, 4)
    rows[2] = 1.0
    unit, norms = RowWhitening.centring(torch.ones(4)).apply(rows)
    assert torch.allclose(unit[[0, 1, 3, 4]].norm(dim=1), torch.ones(4))
    assert torch.equal(unit[2], torch.zeros(4)) and norms[2] == 0
    assert torch.allclose(unit[0] * norms[0] + 1, rows[0], atol=1e-6)


def test_leading_components_are_scaled_and_the_rest_is_left_alone() -> None:
    components = torch.linalg.qr(torch.randn(6, 2)).Q
    whitening = RowWhitening(torch.zeros(6), components, torch.tensor([0.1, 0.5]))
    row = torch.randn(6)
    scaled = whitening.scale(row[None], whitening.factors)[0]
    assert torch.allclose(components.T @ scaled, torch.tensor([0.1, 0.5]) * (components.T @ row), atol=1e-6)
    rest = torch.eye(6) - components @ components.T
    assert torch.allclose(rest @ scaled, rest @ row, atol=1e-6)
    assert torch.allclose(whitening.undo(scaled, 0.5), row, atol=1e-5), "p = ½ does not undo the whitening"
    assert torch.allclose(whitening.undo(row, -0.5), scaled, atol=1e-6), "p = −½ does not whiten once more"
    assert torch.allclose(whitening.undo(row, 0.0), row, atol=1e-6)
    unit = whitening.apply(torch.randn(3, 6))[0]
    assert torch.allclose(unit.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("components", [0, 3])
def test_whitening_atoms_in_place_of_rows_is_the_same(components: int) -> None:
    """Scales, X̃ Dᵀ and AᵀX̃ from stored rows against the whitened rows themselves, in float64; a row may equal the mean."""
    generator = torch.Generator().manual_seed(5)
    rows, atoms = 9 * torch.randn(50, 20, generator=generator) + 3, torch.randn(7, 20, generator=generator)
    rows[4] = mean = torch.full((20,), 3.0)
    v = torch.linalg.qr(torch.randn(20, components, generator=generator)).Q
    whitening = RowWhitening(mean, v, torch.tensor([0.1, 0.3, 0.7])[:components])
    v, factors = v.double(), whitening.factors.double()
    whitened = (rows - mean).double() @ (torch.eye(20) - v * (1 - factors) @ v.T).double()
    whitened = torch.nn.functional.normalize(whitened, dim=1)
    assert torch.allclose(whitening.apply(rows)[0].double(), whitened, atol=1e-5)

    scales = whitening.scales(rows)
    folded, offset = whitening.fold(atoms)
    assert scales[4] == 0 and (scales > 0).sum() == 49
    products = (rows @ folded.T - offset) * scales[:, None]
    assert torch.allclose(products.double(), whitened @ atoms.double().T, atol=1e-5)

    codes = torch.rand(50, 7, generator=generator)
    scaled = codes * scales[:, None]
    assert torch.allclose(
        whitening.unfold(scaled.T @ rows, scaled.sum(0)).double(), codes.double().T @ whitened, atol=1e-4
    )


@pytest.mark.parametrize("shape", [(1, 8, 5), (33, 8, 5), (40, 8, 1), (40, 0, 5), (40, 8, 0), (0, 8, 5)])
def test_inner_products_of_any_shape(shape: tuple[int, int, int]) -> None:
    n, dim, m = shape
    generator = torch.Generator().manual_seed(6)
    rows, others = torch.randn(n, dim, generator=generator), torch.randn(dim, m, generator=generator).T
    expected = (rows.double() @ others.double().T).float()
    torch.testing.assert_close(inner_products(rows, others), expected)
    assert torch.equal(RowWhitening.centring(torch.zeros(dim)).fold(rows)[0], rows)


def test_row_whitening_reads_back_and_old_packages_have_only_a_mean() -> None:
    whitening = RowWhitening(torch.randn(6), torch.linalg.qr(torch.randn(6, 2)).Q, torch.tensor([0.1, 0.5]))
    rows = torch.randn(4, 6)
    assert torch.equal(RowWhitening.from_tensors(whitening.to_tensors()).apply(rows)[0], whitening.apply(rows)[0])
    old = RowWhitening.from_tensors({"mean_row": whitening.mean})
    assert torch.equal(old.apply(rows)[0], RowWhitening.centring(whitening.mean).apply(rows)[0])


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_codes_reach_scikit_learns_lasso(nonnegative: bool, alpha: float) -> None:
    rows, atoms = random_problem(0)
    codes = sparse_codes(rows, atoms, alpha, nonnegative=nonnegative)
    lasso = Lasso(alpha=alpha / rows.shape[1], positive=nonnegative, fit_intercept=False, tol=1e-10, max_iter=100_000)
    fits = [lasso.fit(atoms.double().numpy().T, row).coef_ for row in rows.double().numpy()]
    oracle = torch.tensor(np.stack(fits), dtype=torch.float32)
    ours, best = objective(rows, codes, atoms, alpha), objective(rows, oracle, atoms, alpha)
    assert torch.all(ours <= best + 1e-5), f"worse than coordinate descent by {float((ours - best).max()):.2e}"
    assert not nonnegative or (codes >= 0).all()
    gap = duality_gap(rows, codes, atoms, alpha, nonnegative=nonnegative)
    assert gap.min() > -1e-6 and gap.max() < 1e-4
    assert torch.all(ours - best <= gap + 1e-6), "the gap must bound the distance to the optimum"


@pytest.mark.parametrize("nonnegative", [True, False])
def test_codes_are_optimal_where_atoms_are_equal_or_more_than_dimensions(nonnegative: bool) -> None:
    """Then the linear systems of active sets are singular, and another solver finishes."""
    rows, atoms = random_problem(3)
    atoms = torch.cat([atoms, atoms, -atoms[:2], rows[:3]])
    codes = sparse_codes(rows, atoms, 0.02, nonnegative=nonnegative)
    assert duality_gap(rows, codes, atoms, 0.02, nonnegative=nonnegative).max() < 1e-4


@pytest.mark.parametrize("nonnegative", [True, False])
def test_the_duality_gap_of_bad_codes_is_positive_and_bounds_their_error(nonnegative: bool) -> None:
    rows, atoms = random_problem(1)
    best = objective(rows, sparse_codes(rows, atoms, 0.1, nonnegative=nonnegative), atoms, 0.1)
    bad = torch.rand(len(rows), len(atoms))
    gap = duality_gap(rows, bad, atoms, 0.1, nonnegative=nonnegative)
    assert torch.all(gap >= objective(rows, bad, atoms, 0.1) - best - 1e-5)


def test_the_coding_from_correlations_alone_has_the_objective_and_the_gap() -> None:
    rows, atoms = random_problem(4)
    coding = SparseCoder(atoms).coding_of(rows @ atoms.T, rows.square().sum(1), 0.1, nonnegative=True)
    assert torch.equal(coding.codes, sparse_codes(rows, atoms, 0.1, nonnegative=True))
    assert torch.allclose(coding.objective, objective(rows, coding.codes, atoms, 0.1), atol=1e-5)
    assert torch.allclose(coding.gap, duality_gap(rows, coding.codes, atoms, 0.1, nonnegative=True), atol=1e-5)


def test_alpha_above_every_correlation_gives_no_codes() -> None:
    rows, atoms = random_problem(2)
    assert not sparse_codes(rows, atoms, 1.01, nonnegative=True).any()
