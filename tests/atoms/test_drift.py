"""Predicted drift: the quadratic form over the reaches that measured curves give."""

from __future__ import annotations

import math

import pytest
import torch

from atoms.drift import DriftModel, KLCurve, Reach
from atoms.mix import Mix

PARABOLA: KLCurve = [(-2.0, 0.2), (-1.0, 0.05), (0.0, 0.0), (1.0, 0.05), (2.0, 0.2)]
SKEWED: KLCurve = [(-2.0, 0.12), (-1.0, 0.04), (0.0, 0.0), (1.0, 0.06), (2.0, 0.5)]
M = torch.tensor([[0.1, 0.02, 9.0], [0.02, 0.1, 9.0], [9.0, 9.0, 9.0]])


def model(first: KLCurve, second: KLCurve) -> DriftModel:
    return DriftModel.of(M, {"a-1": first, "a-2": second, "a-3": PARABOLA})


def test_parabolas_give_the_quadratic_form_of_the_mixed_atoms_only() -> None:
    drift = model(PARABOLA, PARABOLA)
    assert drift.kl(Mix()) == 0.0
    assert drift.kl(Mix.of({"a-1": 1})) == pytest.approx(0.05)
    assert drift.kl(Mix.of({"a-1": 0.3, "a-2": -1.7})) == pytest.approx(
        0.5 * (0.009 + 0.289 - 2 * 0.51 * 0.02), rel=1e-5
    )
    assert drift.kl(Mix.of({"a-1": 1, "a-2": 5})) == pytest.approx(0.5 * (0.1 + 2.5 + 2 * 5 * 0.02)), "beyond the curve"


def test_one_atom_costs_what_was_measured_on_either_side() -> None:
    drift = model(SKEWED, PARABOLA)
    for coefficient, kl in SKEWED:
        assert drift.kl(Mix.of({"a-1": coefficient})) == pytest.approx(kl, rel=1e-5)


def test_a_cross_term_is_of_reaches_and_has_the_sign_of_the_coefficients() -> None:
    drift = model(SKEWED, PARABOLA)
    reach = math.sqrt(2 * 0.5 / 0.1)
    assert drift.kl(Mix.of({"a-1": 2, "a-2": -1})) == pytest.approx(0.5 + 0.05 - reach * 0.02, rel=1e-5)


def test_reaches_are_linear_between_points_and_go_on_along_the_last_piece() -> None:
    reach = Reach.of([(-1.0, 0.05), (1.0, 0.05), (2.0, 0.45)], 0.1)
    assert [reach.at(c) for c in (-3, -0.5, 0, 0.25, 1, 1.5, 2, 3)] == pytest.approx([-3, -0.5, 0, 0.25, 1, 2, 3, 5])


@pytest.mark.parametrize(("curve", "diagonal"), [([], 0.1), ([(0.0, 0.0)], 0.1), (SKEWED, 0.0), ([(1.0, 0.05)], 0.1)])
def test_what_was_not_measured_is_taken_as_quadratic(curve: KLCurve, diagonal: float) -> None:
    reach = Reach.of(curve, diagonal)
    assert reach.at(-2.5) == pytest.approx(-2.5) and reach.at(0) == 0


def test_a_prediction_is_never_negative() -> None:
    indefinite = torch.tensor([[0.1, 0.2, 0], [0.2, 0.1, 0], [0, 0, 0.1]])  # no covariance, but M is rounded
    assert (
        DriftModel.of(indefinite, {"a-1": PARABOLA, "a-2": PARABOLA, "a-3": PARABOLA}).kl(Mix.of({"a-1": 1, "a-2": -1}))
        == 0.0
    )
