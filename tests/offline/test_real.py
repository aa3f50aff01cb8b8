"""The real package on the real model: predicted against measured drift, and our steering against stock PEFT."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atoms.adapter import Composition, compose
from atoms.mix import Mix
from atoms.model import encode_prompt
from atoms.package import Package
from atoms.steered import SteeredModel
from offline.calibrate import DriftMeter
from offline.corpus import EncodedDocument, make_batches
from offline.progress import Progress

COMPOSITIONS: tuple[Composition, ...] = ("linear", "parameter")


@pytest.fixture(scope="module")
def ids(smol_tokenizer: PreTrainedTokenizerBase) -> Tensor:
    return torch.tensor([encode_prompt(smol_tokenizer, [{"role": "user", "content": "Is the sea salty?"}])])


@pytest.fixture(scope="module")
def mix(real_package: Package) -> Mix:
    """All atoms at once, of both signs: bilinear cross terms show."""
    return Mix.of({atom: (2.0, -1.5, 1.0)[n % 3] for n, atom in enumerate(real_package.bank.ids)})


@torch.inference_mode()
def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def ours(steered: SteeredModel, package: Package, mix: Mix, composition: Composition, ids: Tensor) -> Tensor:
    steered.set_slot(0, package.bank.compose(mix, composition))
    with steered.rows([0]):
        return logits(steered.model, ids)


def check_equal(got: Tensor, expected: Tensor, unsteered: Tensor) -> None:
    effect = float((expected - unsteered).abs().max())
    assert effect > 0.1, "the steering does nothing, so equality would prove nothing"
    assert float((got - expected).abs().max()) < 1e-4 * max(1.0, float(expected.abs().max())), (
        f"effect of the mix: {effect:.2f}"
    )


@pytest.fixture(scope="module")
def unsteered(merged_smol: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of the model before any hook was on it."""
    return logits(merged_smol, ids)


@pytest.fixture
def live(merged_smol: PreTrainedModel, real_package: Package) -> Iterator[SteeredModel]:
    model = SteeredModel(merged_smol, real_package.base_adapter.space, slots=2)
    yield model
    model.close()


def test_an_empty_mix_is_bit_equal_to_no_steering(
    unsteered: Tensor, live: SteeredModel, real_package: Package, mix: Mix, ids: Tensor
) -> None:
    ours(live, real_package, mix, "linear", ids)  # the slot is dirty before
    assert torch.equal(ours(live, real_package, Mix(), "linear", ids), unsteered), "the empty mix runs extra arithmetic"
    assert torch.equal(logits(live.model, ids), unsteered), "hooks act outside `rows`"


def test_rows_of_one_batch_are_steered_apart(
    live: SteeredModel, real_package: Package, mix: Mix, ids: Tensor, unsteered: Tensor
) -> None:
    alone = ours(live, real_package, mix, "linear", ids)
    live.set_slot(1, None)
    for slots in ([0, 1], [1, 0]):  # a slice of the slots, and an index into them
        with live.rows(slots):
            together = logits(live.model, ids.repeat(2, 1))
        scale = float(unsteered.abs().max())
        assert float((together[slots.index(1)] - unsteered[0]).abs().max()) < 1e-4 * scale, (
            "an unsteered row was steered"
        )
        assert float((together[slots.index(0)] - alone[0]).abs().max()) < 1e-4 * scale, (
            "a steered row depends on its batch"
        )


def test_every_atom_is_a_stock_peft_adapter_on_merged_weights(
    live: SteeredModel, merged_smol: PreTrainedModel, real_package: Package, load_smol: Callable[[], PreTrainedModel],
    ids: Tensor, unsteered: Tensor,
) -> None:  # fmt: skip
    mine = [ours(live, real_package, Mix.of({atom: 1.0}), "linear", ids) for atom in real_package.bank.ids]
    model = load_smol()
    model.load_state_dict(merged_smol.state_dict())
    for atom, expected in zip(real_package.bank.ids, mine, strict=True):
        peft_model = PeftModel.from_pretrained(model, real_package.path / "atoms" / atom)
        got = logits(peft_model, ids)
        model = peft_model.unload()
        check_equal(got, expected, unsteered)


@pytest.mark.parametrize(("onto", "composition"), [*itertools.product(("raw", "merged"), COMPOSITIONS)])
def test_an_exported_mix_in_stock_peft_equals_our_mix(
    onto: str, composition: Composition, live: SteeredModel, merged_smol: PreTrainedModel, smol_model: PreTrainedModel,
    real_package: Package, mix: Mix, ids: Tensor, unsteered: Tensor, tmp_path: Path,
) -> None:  # fmt: skip
    expected = ours(live, real_package, mix, composition, ids)
    live.close()
    conventions = real_package.manifest.conventions.model_copy(update={"composition": composition})
    package = Package(real_package.path, real_package.manifest.model_copy(update={"conventions": conventions}))
    package.export(mix, tmp_path / "adapter", onto=onto)
    host = smol_model if onto == "raw" else merged_smol
    peft_model = PeftModel.from_pretrained(host, tmp_path / "adapter")
    try:
        check_equal(logits(peft_model, ids), expected, unsteered)
    finally:
        peft_model.unload()


def test_the_two_compositions_differ_by_the_bilinear_term(live: SteeredModel, real_package: Package, mix: Mix) -> None:
    bank = real_package.bank
    linear, parameter = bank.compose(mix, "linear"), bank.compose(mix, "parameter")
    direction = bank.direction(mix)
    for module in real_package.base_adapter.space.modules[:3]:
        a, b = direction[module.key_a], direction[module.key_b]
        weights = [d[module.name].scaling * d[module.name].lora_B @ d[module.name].lora_A for d in (parameter, linear)]
        assert torch.allclose(weights[0] - weights[1], module.scaling * b @ a, atol=1e-6)


@pytest.fixture(scope="module")
def meters(merged_smol: PreTrainedModel, real_package: Package) -> Callable[[Composition], DriftMeter]:
    """A drift meter on the package's own continuations."""
    from atoms.storage import read_json

    stored = read_json(real_package.path.with_name("package.work") / "calibration" / "continuations.json")
    documents = [EncodedDocument(n, tuple(p), tuple(r)) for n, (p, r) in enumerate(stored)]
    batches = make_batches(documents, 1024, torch.device("cpu"))

    def make(composition: Composition) -> DriftMeter:
        model = SteeredModel(merged_smol, real_package.base_adapter.space, slots=1)
        return DriftMeter(model, real_package.base_adapter, composition, batches)

    return make


def random_mixes(package: Package, count: int) -> list[Mix]:
    """Random signs and proportions, scaled to predictions of 0.02 … 0.1 nats a token."""
    generator = torch.Generator().manual_seed(0)
    mixes = []
    for n in range(count):
        values = torch.randn(len(package.bank.ids), generator=generator).tolist()
        raw = Mix.of(dict(zip(package.bank.ids, values, strict=True)))
        target = 0.02 + 0.08 * n / max(1, count - 1)
        mixes.append(raw.scaled((target / package.predicted_kl(raw)) ** 0.5))
    return mixes


def test_the_drift_model_predicts_the_measured_kl_of_random_mixes(
    meters: Callable[[Composition], DriftMeter], real_package: Package
) -> None:
    """Mixes and their negatives, each on its own: an atom's curve differs between its sides. A factor of 1.5 for nine of ten is
    what is claimed of many mixes (docs/evaluation.md); these are eight."""
    meter, ratios = meters("linear"), {}
    for drawn in random_mixes(real_package, 4):
        for mix in (drawn, drawn.scaled(-1.0)):
            measured = meter.kl_of(real_package.bank.compose(mix, "linear"))
            ratios[str(mix.as_dict())] = measured / real_package.predicted_kl(mix)
    meter.close()
    assert sum(1 / 1.5 < ratio < 1.5 for ratio in ratios.values()) >= 7, ratios
    assert all(1 / 1.9 < ratio < 1.9 for ratio in ratios.values()), ratios
    assert 1 / 1.2 < statistics.median(ratios.values()) < 1.2, ratios


def test_the_stored_curve_and_matrix_are_what_the_meter_measures(
    meters: Callable[[Composition], DriftMeter], real_package: Package
) -> None:
    meter, bank = meters("linear"), real_package.bank
    card = real_package.manifest.atoms[0]
    direction = bank.direction(Mix.of({card.id: 1.0}))
    assert meter.kl(direction, 1.0) == pytest.approx(dict(card.kl_curve)[1.0], rel=1e-3)
    assert meter.kl_of(compose(bank.base, direction, "linear")) == pytest.approx(meter.kl(direction), rel=1e-6)
    with Progress(quiet=True).task("drift", 1, "prompts") as task:
        again = meter.drift_matrix([direction], task)
    assert float(again) == pytest.approx(float(real_package.drift[0, 0]), rel=1e-3)
    meter.close()


def test_calibrated_strength_is_the_unit(real_package: Package) -> None:
    for card in real_package.manifest.atoms:
        curve = dict(card.kl_curve)
        assert (curve[1.0] + curve[-1.0]) / 2 == pytest.approx(0.05, rel=0.06)
        assert curve[3.0] > curve[1.0] > curve[0.0] == 0.0


def test_the_real_base_is_recognised(real_package: Package, smol_model: PreTrainedModel) -> None:
    real_package.check_base(smol_model)
