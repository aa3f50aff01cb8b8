"""The coefficient layer against the weight delta of `atoms.adapter`, one row at a time."""

from __future__ import annotations

import pytest
import torch

from atoms.adapter import Adapter, AtomBank
from atoms.mix import Mix
from atoms.space import LoRAModule, LoRASpace
from server.vllm.coefficients import BankedLinear, CoefficientTable, FusedPart

Q = LoRAModule("attn.q_proj", 12, 8, 3, 0.7)
V = LoRAModule("attn.v_proj", 12, 4, 2, 1.5)  # another rank and scaling in the same fused module
PARTS = [FusedPart(Q, slice(0, 8)), FusedPart(V, slice(11, 15))]  # columns 8 to 10 are of a linear without an adapter
MIXES = [Mix.of({"a-1": 1.5}), Mix(), Mix.of({"a-0": -2.0, "a-1": 0.5, "a-2": 3.0}), Mix.of({"a-2": -1.0}), Mix()]


@pytest.fixture
def bank() -> AtomBank:
    generator = torch.Generator().manual_seed(3)
    space = LoRASpace.of([Q, V])

    def direction() -> dict[str, torch.Tensor]:
        return {tensor.key: torch.randn(tensor.shape, generator=generator) for tensor in space.tensors}

    return AtomBank.of(Adapter(space, direction(), {}), {f"a-{index}": direction() for index in range(3)})


def expected(bank: AtomBank, composition, x: torch.Tensor, y: torch.Tensor, mixes) -> torch.Tensor:
    result = y.clone()
    for row, mix in enumerate(mixes):
        delta = bank.compose(mix, composition) or {}
        for part in PARTS:
            if factors := delta.get(part.module.name):
                result[row, part.columns] += factors.scaling * (factors.lora_B @ (factors.lora_A @ x[row]))
    return result


@pytest.mark.parametrize("composition", ["linear", "parameter"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [2, 0, 3], [1, 2]], ids=["mixed", "all steered", "one of two"])
def test_every_row_gets_its_own_mix(bank: AtomBank, composition, order: list[int]) -> None:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(len(order), 12, generator=generator), torch.randn(len(order), 15, generator=generator)
    table = CoefficientTable(bank.ids, slots=5)
    for slot, mix in enumerate(MIXES):
        table.set(slot, mix)
    table.select([index if MIXES[index] else -1 for index in order])
    want = expected(bank, composition, x, y, [MIXES[index] for index in order])

    got = y.clone()
    assert table.rows is not None
    BankedLinear(bank, PARTS, composition, torch.float32).add(x, got, table.rows)

    assert torch.allclose(got, want, atol=1e-5)
    for row, index in enumerate(order):
        assert torch.equal(got[row], y[row]) == (not MIXES[index]), "an unsteered row changed, or a steered one did not"
    assert torch.equal(got[:, 8:11], y[:, 8:11])


def test_a_batch_without_steering_has_nothing_to_do(bank: AtomBank) -> None:
    table = CoefficientTable(bank.ids, slots=2)
    table.set(0, MIXES[0])
    table.select([-1, -1])
    assert table.rows is None


def test_a_slot_forgets_the_mix_before(bank: AtomBank) -> None:
    table = CoefficientTable(bank.ids, slots=1)
    table.set(0, MIXES[2])
    table.set(0, MIXES[3])
    table.select([0])
    assert table.rows is not None and table.rows.coefficients.tolist() == [[0.0, 0.0, -1.0]]


def test_rows_beyond_the_plan_are_padding_and_stay(bank: AtomBank) -> None:
    table = CoefficientTable(bank.ids, slots=1)
    table.set(0, MIXES[0])
    table.select([0])
    assert table.rows is not None
    x, y = torch.randn(3, 12), torch.zeros(3, 15)
    BankedLinear(bank, PARTS, "linear", torch.float32).add(x, y, table.rows)
    assert y[0].any() and not y[1:].any()


def test_an_atom_outside_the_bank_is_an_error(bank: AtomBank) -> None:
    with pytest.raises(KeyError):
        CoefficientTable(bank.ids, slots=1).set(0, Mix.of({"a-9": 1.0}))


def test_bfloat16_rows_come_as_close_as_bfloat16_products_do(bank: AtomBank) -> None:
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(1, 12, generator=generator).bfloat16()
    table = CoefficientTable(bank.ids, slots=1)
    table.set(0, MIXES[2])
    table.select([0])
    assert table.rows is not None
    y = torch.zeros(1, 15, dtype=torch.bfloat16)
    BankedLinear(bank, PARTS, "parameter", torch.bfloat16).add(x, y, table.rows)
    exact = expected(bank, "parameter", x.float(), torch.zeros(1, 15), [MIXES[2]])
    assert (y.float() - exact).abs().max() < 2**-7 * exact.abs().max()
