"""Slots: every batch row gets its own delta, rows without one stay untouched, and deltas move with their rows."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from transformers import PreTrainedModel

from atoms.adapter import Adapter, AtomBank, Composition, Delta, Factors
from atoms.errors import AdapterError
from atoms.mix import Mix
from atoms.model import find_linear
from atoms.space import LoRAModule, LoRASpace
from atoms.steered import PackedBank, SteeredModel

IDS = torch.tensor([[1, 30, 31, 32], [1, 40, 41, 42], [1, 50, 51, 52]])


@pytest.fixture
def space(tiny_model: PreTrainedModel) -> LoRASpace:
    linears = {name: m for name, m in tiny_model.named_modules() if name.endswith(("q_proj", "down_proj"))}
    return LoRASpace.of(LoRAModule(name, m.in_features, m.out_features, 2, 1.5) for name, m in linears.items())


@pytest.fixture
def steered(tiny_model: PreTrainedModel, space: LoRASpace) -> Iterator[SteeredModel]:
    model = SteeredModel(tiny_model, space, slots=4)
    yield model
    model.close()


def random_delta(space: LoRASpace, seed: int, rank: int = 4) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    return {
        m.name: Factors(torch.randn(rank, m.d_in, generator=generator) * 0.2, torch.randn(m.d_out, rank, generator=generator) * 0.2, 1.5)
        for m in space.modules
    }  # fmt: skip


def random_bank(space: LoRASpace, atoms: int) -> AtomBank:
    generator = torch.Generator().manual_seed(7)

    def direction() -> dict[str, torch.Tensor]:
        return {t.key: torch.randn(t.shape, generator=generator) * 0.1 for t in space.tensors}

    return AtomBank.of(Adapter(space, direction(), {}), {f"a{j}": direction() for j in range(atoms)})


@torch.inference_mode()
def run(steered: SteeredModel, slots: list[int], ids: torch.Tensor = IDS) -> torch.Tensor:
    with steered.rows(slots):
        return steered.model(input_ids=ids).logits


@pytest.fixture
def plain(tiny_model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return tiny_model(input_ids=IDS).logits


def test_a_slot_equals_the_delta_merged_into_the_weights(
    plain: torch.Tensor, steered: SteeredModel, space: LoRASpace, tiny_model: PreTrainedModel
) -> None:
    delta = random_delta(space, 0)
    steered.set_slot(2, delta)
    got = run(steered, [2, 2, 2])
    for name, factors in delta.items():
        find_linear(tiny_model, name).weight += factors.scaling * factors.lora_B @ factors.lora_A
    with torch.inference_mode():
        expected = tiny_model(input_ids=IDS).logits
    assert (expected - plain).abs().max() > 1e-2
    assert torch.allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("slots", [[0, 1, 2], [2, 0, 1], [1, 1, 3]], ids=["consecutive", "permuted", "shared"])
def test_each_row_gets_its_own_slot(
    plain: torch.Tensor, steered: SteeredModel, space: LoRASpace, slots: list[int]
) -> None:
    steered.set_slot(0, random_delta(space, 0))
    steered.set_slot(1, random_delta(space, 1))
    together = run(steered, slots)
    for row, slot in enumerate(slots):
        alone = run(steered, [slot], IDS[row : row + 1])
        assert torch.allclose(together[row], alone[0], atol=1e-5), f"row {row} did not get slot {slot}"
        if slot >= 2:
            assert torch.allclose(together[row], plain[row], atol=1e-5), "a row without a delta was steered"


def test_unsteered_passes_are_bit_equal_also_after_a_slot_was_used(
    plain: torch.Tensor, steered: SteeredModel, space: LoRASpace
) -> None:
    steered.set_slot(0, random_delta(space, 0))
    run(steered, [0, 0, 0])
    steered.set_slot(0, None)
    assert torch.equal(run(steered, [0, 1, 2]), plain)
    with torch.inference_mode():
        assert torch.equal(steered.model(input_ids=IDS).logits, plain)


def test_a_smaller_delta_leaves_nothing_of_a_larger_one(steered: SteeredModel, space: LoRASpace) -> None:
    small = random_delta(space, 1, rank=2)
    steered.set_slot(0, small)
    fresh = run(steered, [0, 0, 0])
    steered.set_slot(0, random_delta(space, 0, rank=4))
    steered.set_slot(0, small)
    assert torch.equal(run(steered, [0, 0, 0]), fresh), "stale columns of the previous delta are still in the slot"


def test_a_delta_moves_with_its_row_and_emptiness_too(
    plain: torch.Tensor, steered: SteeredModel, space: LoRASpace
) -> None:
    steered.set_slot(0, random_delta(space, 0))
    before = run(steered, [0, 0, 0])
    steered.move_slot(0, 3)
    steered.set_slot(0, None)
    assert torch.equal(run(steered, [3, 3, 3]), before)
    steered.move_slot(0, 3)
    assert torch.equal(run(steered, [3, 3, 3]), plain)


@pytest.mark.parametrize("composition", ["linear", "parameter"])
def test_a_packed_mix_equals_the_composed_one(
    composition: Composition, steered: SteeredModel, space: LoRASpace, plain: torch.Tensor
) -> None:
    bank = random_bank(space, atoms=5)
    packed = PackedBank(bank, composition, torch.device("cpu"), torch.float32)
    for mix in (Mix.of({"a1": 1.5}), Mix.of({"a0": -0.7, "a3": 2.0, "a4": 0.01})):
        steered.set_slot(0, bank.compose(mix, composition))
        expected = run(steered, [0, 0, 0])
        steered.set_slot(0, packed.compose(mix))
        assert torch.allclose(run(steered, [0, 0, 0]), expected, atol=1e-5)
        assert not torch.allclose(expected, plain, atol=1e-3)
    assert packed.compose(Mix()) is None


def test_linears_of_one_input_share_a_product_and_others_do_not(tiny_model: PreTrainedModel) -> None:
    """q, k and v of a layer see one tensor; o_proj, of the same parent and size, another."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    linears = {name: m for name, m in tiny_model.named_modules() if name.endswith(names)}
    space = LoRASpace.of(LoRAModule(name, m.in_features, m.out_features, 2, 1.5) for name, m in linears.items())
    products = []
    steered = SteeredModel(tiny_model, space, slots=1)
    delta = random_delta(space, 0)
    steered.set_slot(0, delta)
    with patch("atoms.steered.torch.bmm", side_effect=lambda a, x: products.append(a) or torch.matmul(a, x)):
        got = run(steered, [0, 0, 0])
    assert len(products) == 4 * tiny_model.config.num_hidden_layers
    steered.close()
    for name, factors in delta.items():
        find_linear(tiny_model, name).weight += factors.scaling * factors.lora_B @ factors.lora_A
    with torch.inference_mode():
        assert torch.allclose(got, tiny_model(input_ids=IDS).logits, atol=1e-4)


def test_rows_end_with_the_block_also_on_an_error(plain: torch.Tensor, steered: SteeredModel, space: LoRASpace) -> None:
    steered.set_slot(0, random_delta(space, 0))
    with pytest.raises(RuntimeError, match="stop"), steered.rows([0, 0, 0]):
        raise RuntimeError("stop")
    with torch.inference_mode():
        assert torch.equal(steered.model(input_ids=IDS).logits, plain)


def test_deltas_that_do_not_fit_are_refused(steered: SteeredModel, space: LoRASpace) -> None:
    with pytest.raises(AdapterError, match="rank 5; slots hold rank 4"):
        steered.set_slot(0, random_delta(space, 0, rank=5))
    with pytest.raises(AdapterError, match="modules"):
        steered.set_slot(0, {})


def test_a_space_of_another_model_is_refused(tiny_model: PreTrainedModel) -> None:
    for name, reason in (("model.layers.9.self_attn.q_proj", "no module"), ("model.layers.0.mlp", "not a linear")):
        with pytest.raises(AdapterError, match=reason):
            SteeredModel(tiny_model, LoRASpace.of([LoRAModule(name, 32, 32, 2, 1.0)]), slots=1)
