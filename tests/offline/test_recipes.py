"""The published pipeline's choices, as settings beside ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atoms.errors import ConfigError
from atoms.mix import Mix
from offline.config import RECIPES, DictionaryConfig, DiscoverConfig, WhiteningConfig, recipe_settings
from offline.curvature import Eigenfactors, kronecker_eigenvalues
from offline.dictionary import learn_dictionary
from offline.pipeline import Run, discover
from offline.progress import Progress
from offline.rows import RowStore
from offline.whitening import fit_whitening

QUIET = Progress(quiet=True)


def with_recipe(config: DiscoverConfig, name: str) -> DiscoverConfig:
    parts = {part: dataclasses.replace(getattr(config, part), **recipe_settings(name, part)) for part in RECIPES[name]}
    return dataclasses.replace(config, **parts)


def test_the_recipes_are_default_and_paper() -> None:
    assert recipe_settings("default", "curvature") == {}
    assert recipe_settings("paper", "dictionary")["nonnegative"] is False
    with pytest.raises(ConfigError, match="recipe is 'best'; it must be default or paper"):
        recipe_settings("best", "curvature")


def test_kronecker_eigenvalues_are_exact_for_independent_factors() -> None:
    """E[δδᵀ ⊗ xxᵀ] = E[δδᵀ] ⊗ E[xxᵀ] where δ and x are independent: its diagonal in the eigenbasis is their product."""
    factors = Eigenfactors(torch.eye(2), torch.eye(3), torch.tensor([3.0, 1.0]), torch.tensor([5.0, 2.0, 0.0]))
    expected = torch.tensor([[15.0, 6.0, 0.0], [5.0, 2.0, 0.0]], dtype=torch.float64)
    assert torch.equal(kronecker_eigenvalues({"m": factors})["m"], expected)


def test_the_paper_recipe_runs_to_its_atoms(tiny_config: Callable[..., DiscoverConfig], tmp_path: Path) -> None:
    """Uncentred unit rows, one absolute ε everywhere, eigenvalues without a second pass, and unit atoms of both signs."""
    run = Run(with_recipe(tiny_config(tmp_path / "package"), "paper"), QUIET)
    adapter = run.adapter()
    projection = run.projection(adapter)
    assert {basis.epsilon for basis in projection.bases.values()} == {1e-6}
    assert "eigenvalues" not in run.progress.costs, "the paper's eigenvalues need no second pass"
    store = run.rows(projection)
    assert torch.equal(store.whitening.mean, torch.zeros(projection.dim)) and not len(store.whitening.factors)
    raw = load_file(store.shards[0])
    assert torch.allclose(
        store.whitened_rows(raw["document"].tolist()), torch.nn.functional.normalize(raw["row"], dim=1), atol=1e-6
    )
    learned = run.dictionary(store)
    dictionary = learned.dictionary
    assert torch.allclose(dictionary.atoms.norm(dim=1), torch.ones(len(dictionary.atoms)), atol=1e-5)
    selection = run.select(store, dataclasses.replace(learned, second=dictionary.atoms))
    assert any(code < 0 for candidate in selection.chosen for code in candidate.codes), "codes have no sign"


def test_the_paper_recipe_ends_in_a_package_that_steers(
    tiny_config: Callable[..., DiscoverConfig], tmp_path: Path
) -> None:
    package = discover(with_recipe(tiny_config(tmp_path / "package"), "paper"), QUIET)
    conventions, recorded = package.manifest.conventions, package.manifest.record["config"]
    assert conventions.path is None and conventions.unprojection_exponent == 0.5
    assert (recorded["dictionary"]["learner"], recorded["curvature"]["eigenvalues"]) == ("scikit-learn", "kronecker")
    assert len(package.manifest.atoms) == 4
    for card in package.manifest.atoms:
        assert package.bank.compose(Mix.of({card.id: 1.0}), package.composition)
        costs = [package.predicted_kl(Mix.of({card.id: c})) for c in (-1.0, 1.0)]
        assert sum(costs) / 2 == pytest.approx(0.05, rel=0.1), "calibrated as any atom"


def test_our_learner_reaches_an_objective_no_higher_than_scikit_learn(
    tiny_package, tiny_config: Callable[..., DiscoverConfig]
) -> None:
    store = RowStore(tiny_package.path.with_name("package.work") / "rows")
    store = dataclasses.replace(store, fitted=fit_whitening(store, WhiteningConfig(), QUIET))
    documents = range(len(store))
    for nonnegative in (True, False):
        config = DictionaryConfig(atoms=6, alpha=0.1, nonnegative=nonnegative, iterations=40)
        ours = learn_dictionary(store, documents, config, 0, QUIET)
        theirs = learn_dictionary(store, documents, dataclasses.replace(config, learner="scikit-learn"), 0, QUIET)
        assert ours.objectives[-1] <= theirs.objectives[-1] * 1.01
