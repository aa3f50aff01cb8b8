"""Drift in nats and orientation, on the tiny model, against their definitions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from atoms.mix import Mix
from atoms.model import merge_adapter
from atoms.package import Package
from atoms.steered import SteeredModel
from offline import calibrate
from offline.calibrate import Calibrated, DriftMeter, orient, solve_strength
from offline.corpus import EncodedDocument, make_batches
from offline.gradients import label_logits
from offline.progress import Progress

DOCUMENTS = [
    EncodedDocument(0, (1, 30, 31, 32), (40, 41, 42)),
    EncodedDocument(1, (1, 33), (43, 44)),
    EncodedDocument(2, (1, 34, 35, 36, 37, 38), (45, 46, 47, 48)),
]


@pytest.fixture
def meter(tiny_model: PreTrainedModel, tiny_package: Package) -> Iterator[DriftMeter]:
    merge_adapter(tiny_model, tiny_package.base_adapter)
    steered = SteeredModel(tiny_model, tiny_package.base_adapter.space, 1)
    yield DriftMeter(steered, tiny_package.base_adapter, "linear", make_batches(DOCUMENTS, 64, torch.device("cpu")))
    steered.close()


@pytest.fixture
def directions(tiny_package: Package) -> list[dict[str, Tensor]]:
    return [tiny_package.bank.direction(Mix.of({atom: 1.0})) for atom in tiny_package.bank.ids]


@torch.inference_mode()
def log_probs(meter: DriftMeter, direction: dict[str, Tensor] | None, coefficient: float) -> Tensor:
    """(n, V) over all label positions, one document at a time."""
    meter.steered.set_slot(0, None if direction is None else meter.delta(direction, coefficient))
    parts = []
    for document in DOCUMENTS:
        with meter.steered.rows([0]):
            parts.append(label_logits(meter.steered.model, make_batches([document], 64, torch.device("cpu"))[0]))
    return torch.cat(parts).log_softmax(-1)


def drift_matrix(meter: DriftMeter, directions: list[dict[str, Tensor]]) -> Tensor:
    with Progress(quiet=True).task("drift", 1, "prompts") as task:
        return meter.drift_matrix(directions, task)


def test_kl_is_from_unsteered_to_steered_a_token(meter: DriftMeter, directions: list[dict[str, Tensor]]) -> None:
    base, steered = log_probs(meter, None, 0.0), log_probs(meter, directions[0], 2.0)
    expected = float((base.exp() * (base - steered)).sum(1).mean())
    assert expected > 1e-3
    assert meter.kl(directions[0], 2.0) == pytest.approx(expected, rel=1e-3)
    assert meter.kl(directions[0], 0.0) == pytest.approx(0.0, abs=1e-6)


def test_batches_of_few_logits_do_not_change_the_kl(
    meter: DriftMeter, directions: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    five_labels = 4 * 5 * int(meter.steered.model.config.vocab_size)
    assert len(meter.batches) == 1
    monkeypatch.setattr(calibrate, "_LOGITS_BYTES", five_labels)  # the documents have 4, 3 and 2
    monkeypatch.setattr(calibrate, "_KL_ROWS", 2)
    split = DriftMeter(meter.steered, meter.base, meter.composition, meter.batches)
    assert [len(batch.labels) for batch in split.batches] == [4, 5]
    assert split.kl(directions[0], 2.0) == pytest.approx(meter.kl(directions[0], 2.0), rel=1e-5)


def test_the_drift_matrix_is_the_mean_covariance_of_logit_changes(
    meter: DriftMeter, directions: list[dict[str, Tensor]]
) -> None:
    p = log_probs(meter, None, 0.0).exp()
    step = 0.05
    changes = [(log_probs(meter, d, step) - log_probs(meter, d, -step)) / (2 * step) for d in directions]
    centred = [change - (p * change).sum(1, keepdim=True) for change in changes]
    expected = torch.tensor([[float((p * x * y).sum(1).mean()) for y in centred] for x in centred])
    got = drift_matrix(meter, directions)
    assert torch.allclose(got, got.T)
    assert torch.linalg.eigvalsh(got.double()).min() > -1e-6
    error = float((got - expected).norm() / expected.norm())
    assert error < 0.1, (
        f"the drift matrix is {error:.0%} from the local Fisher: a token mean, a factor 2, or too long a step"
    )


def test_memory_chunks_do_not_change_the_matrix(
    meter: DriftMeter, directions: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where a chunk holds less than a document."""
    whole, sizes = drift_matrix(meter, directions), []
    log_probs = meter._log_probs
    monkeypatch.setattr(meter, "_log_probs", lambda *of: sizes.append(len(of[0].labels)) or log_probs(*of))
    a_label = len(directions) * int(meter.steered.model.config.vocab_size) * 4
    for labels in (1, 3):
        monkeypatch.setattr(calibrate, "_DELTA_LOGITS_BYTES", labels * a_label)
        assert torch.allclose(drift_matrix(meter, directions), whole, rtol=1e-3, atol=1e-6)
        assert max(sizes) == labels


@pytest.fixture
def lowering(meter: DriftMeter, tiny_package: Package) -> Calibrated:
    """A direction whose +1 lowers the loss on DOCUMENTS: against the gradient."""
    space = tiny_package.base_adapter.space
    generator = torch.Generator().manual_seed(0)
    candidates = [space.unflatten(torch.randn(space.dim, generator=generator) * 0.02) for _ in range(8)]
    losses = [mean_loss(meter, direction) for direction in candidates]
    best = candidates[losses.index(min(losses))]
    assert min(losses) < mean_loss(meter, None)
    return Calibrated(best, {-1.0: 0.04, 0.0: 0.0, 1.0: 0.06})


def mean_loss(meter: DriftMeter, direction: dict[str, Tensor] | None) -> float:
    labels = torch.tensor([token for document in DOCUMENTS for token in document.response_ids])
    losses = -log_probs(meter, direction, 1.0)[torch.arange(len(labels)), labels]
    return float(torch.stack([part.mean() for part in losses.split([len(d.response_ids) for d in DOCUMENTS])]).mean())


def test_an_atom_that_lowers_the_loss_stays_and_its_evidence_is_the_loss(
    meter: DriftMeter, lowering: Calibrated
) -> None:
    oriented = orient(meter, lowering, DOCUMENTS, 64)
    assert oriented is not None
    kept, evidence = oriented
    assert kept is lowering
    assert evidence.loss_unsteered == pytest.approx(mean_loss(meter, None), rel=1e-4)
    assert evidence.loss_at_plus_one == pytest.approx(mean_loss(meter, dict(lowering.direction)), rel=1e-4)
    assert evidence.n_documents == 3


def test_an_atom_of_the_wrong_sign_is_flipped_with_its_curve(meter: DriftMeter, lowering: Calibrated) -> None:
    wrong = Calibrated({k: -v for k, v in lowering.direction.items()}, {-1.0: 0.06, 0.0: 0.0, 1.0: 0.04})
    assert mean_loss(meter, dict(wrong.direction)) >= mean_loss(meter, None), (
        "both signs lower the loss: choose another"
    )
    oriented = orient(meter, wrong, DOCUMENTS, 64)
    assert oriented is not None
    flipped, evidence = oriented
    assert all(torch.equal(flipped.direction[key], lowering.direction[key]) for key in lowering.direction)
    assert list(flipped.curve.items()) == [(-1.0, 0.04), (0.0, 0.0), (1.0, 0.06)]
    assert evidence.loss_at_plus_one < evidence.loss_unsteered


def test_an_atom_that_does_nothing_is_dropped(meter: DriftMeter, lowering: Calibrated) -> None:
    nothing = Calibrated({key: torch.zeros_like(value) for key, value in lowering.direction.items()}, lowering.curve)
    assert orient(meter, nothing, DOCUMENTS, 64) is None


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("start", [1e-3, 1.0, 300.0])
def test_the_strength_of_a_target_is_found_whatever_the_power_law(power: float, start: float) -> None:
    tried = []

    def kl(strength: float) -> float:
        tried.append(strength)
        return 0.3 * strength**power

    strength, found = solve_strength(kl, 0.05, start, 0.03, 40)
    assert found == pytest.approx(0.05, rel=0.03) and found == 0.3 * strength**power and strength == tried[-1]


def test_a_strength_that_cannot_be_found_is_the_last_that_was_tried() -> None:
    tried = []

    def saturated(strength: float) -> float:
        tried.append(strength)
        return min(0.01, strength)

    assert solve_strength(saturated, 0.05, 0.005, 0.03, 6) == (tried[-1], 0.01)
    assert len(tried) == 6 and tried == sorted(tried)
