"""The batched layer against the weight delta of `atoms.adapter`, one row at a time."""

from __future__ import annotations

import pytest
import torch

from atoms.adapter import Adapter, AtomBank
from atoms.mix import Mix
from atoms.space import LoRAModule, LoRASpace
from server.vllm.slots import FusedPart, MixSlots, SlottedLinear

Q = LoRAModule("attn.q_proj", 12, 8, 3, 0.7)
V = LoRAModule("attn.v_proj", 12, 4, 2, 1.5)  # another rank and scaling in the same fused module
PARTS = [FusedPart(Q, slice(0, 8)), FusedPart(V, slice(11, 15))]  # columns 8 to 10 are of a linear without an adapter
MIXES = [Mix.of({"a-1": 1.5}), Mix(), Mix.of({"a-0": -2.0, "a-1": 0.5, "a-2": 3.0}), Mix.of({"a-2": -1.0}), Mix()]
BATCHES = {  # the mix of each row
    "mixed": [0, 1, 2, 3, 4],
    "all steered": [2, 0, 3],
    "one of two": [1, 2],
    "twice the same": [3, 0, 3],
    "a prompt": [2] * 20,
    "a prompt after answers": [0, 3, *[2] * 9],
    "a prompt between answers": [3, 1, *[0] * 10, 2, 1],
    "prompts, one of them unsteered": [*[3] * 8, *[1] * 6, *[2] * 11, 0],
    "a mix in two places": [*[0] * 5, 2, *[0] * 5],
}


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


def steering(bank: AtomBank, composition, slots: int, dtype=torch.float32) -> tuple[MixSlots, SlottedLinear]:
    """Slots that hold the first of MIXES, and the one linear that uses them."""
    table = MixSlots(slots)
    table.linears.append(SlottedLinear(bank.base, PARTS, composition, dtype, slots))
    stacked = table.stack(bank)
    for slot, mix in enumerate(MIXES[:slots]):
        table.set(slot, mix, stacked)
    return table, table.linears[0]


def added(table: MixSlots, linear: SlottedLinear, x: torch.Tensor, y: torch.Tensor, slots: list[int]) -> torch.Tensor:
    table.select(slots)
    result = y.clone()
    if table.rows is not None:
        linear.add(x, result, table.rows)
    return result


@pytest.mark.parametrize("composition", ["linear", "parameter"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_every_row_gets_its_own_mix(bank: AtomBank, composition, batch: list[int]) -> None:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(len(batch), 12, generator=generator), torch.randn(len(batch), 15, generator=generator)
    table, linear = steering(bank, composition, slots=5)

    got = added(table, linear, x, y, [index if index != 4 else -1 for index in batch])

    assert torch.allclose(got, expected(bank, composition, x, y, [MIXES[index] for index in batch]), atol=1e-4)
    for row, index in enumerate(batch):
        assert torch.equal(got[row], y[row]) == (not MIXES[index]), "an unsteered row changed, or a steered one did not"
    assert torch.equal(got[:, 8:11], y[:, 8:11])


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_company_changes_no_more_than_rounding(bank: AtomBank, batch: list[int]) -> None:
    x, y = torch.randn(len(batch), 12, generator=torch.Generator().manual_seed(7)), torch.zeros(len(batch), 15)
    table, linear = steering(bank, "linear", slots=5)
    together = added(table, linear, x, y, batch)
    for row, slot in enumerate(batch):
        assert torch.allclose(added(table, linear, x[row : row + 1], y[:1], [slot])[0], together[row], atol=1e-4)


def test_a_batch_without_steering_has_nothing_to_do(bank: AtomBank) -> None:
    table, _ = steering(bank, "linear", slots=2)
    table.select([-1, 1, -1])
    assert table.rows is None


def test_a_slot_forgets_the_mix_before(bank: AtomBank) -> None:
    table, linear = steering(bank, "linear", slots=1)
    stacked = table.stack(bank)
    x, y = torch.randn(9, 12, generator=torch.Generator().manual_seed(8)), torch.zeros(9, 15)
    for mix in (MIXES[2], MIXES[3], Mix(), MIXES[0]):
        table.set(0, mix, stacked)
        for rows in (9, 1):  # together and alone
            want = expected(bank, "linear", x[:rows], y[:rows], [mix] * rows)
            assert torch.allclose(added(table, linear, x[:rows], y[:rows], [0] * rows), want, atol=1e-4)


def test_rows_beyond_the_plan_are_padding_and_stay(bank: AtomBank) -> None:
    table, linear = steering(bank, "linear", slots=1)
    y = added(table, linear, torch.randn(3, 12), torch.zeros(3, 15), [0])
    assert y[0].any() and not y[1:].any()


def test_an_atom_outside_the_bank_is_an_error(bank: AtomBank) -> None:
    table = MixSlots(slots=1)
    with pytest.raises(KeyError):
        table.set(0, Mix.of({"a-9": 1.0}), table.stack(bank))


def test_mixes_of_two_banks_on_one_base_in_one_batch(bank: AtomBank) -> None:
    """The other bank has an atom more, one less, and another order; then it is let go of."""
    generator = torch.Generator().manual_seed(11)
    new = {"a-9": {tensor.key: torch.randn(tensor.shape, generator=generator) for tensor in bank.base.space.tensors},
           "a-1": bank.direction(Mix.of({"a-1": -1.0})), "a-0": bank.direction(Mix.of({"a-0": 1.0}))}  # fmt: skip
    other = AtomBank.of(bank.base, new)
    table, linear = steering(bank, "parameter", slots=5)
    stacked, mix = table.stack(other), Mix.of({"a-9": 0.5, "a-1": 2.0})
    table.set(1, mix, stacked)
    table.set(3, Mix.of({"a-1": 1.5}), stacked)
    x, y = torch.randn(5, 12, generator=generator), torch.randn(5, 15, generator=generator)

    got = added(table, linear, x, y, [0, 1, 2, 3, -1])

    for row, (source, of) in enumerate(
        [(bank, MIXES[0]), (other, mix), (bank, MIXES[2]), (other, Mix.of({"a-1": 1.5}))]
    ):
        want = expected(source, "parameter", x[row : row + 1], y[row : row + 1], [of])[0]
        assert torch.allclose(got[row], want, atol=1e-4)
    assert torch.equal(got[4], y[4])
    table.forget(stacked)
    assert torch.allclose(
        added(table, linear, x, y, [0, -1, 2, -1, -1])[0],
        expected(bank, "parameter", x[:1], y[:1], [MIXES[0]])[0],
        atol=1e-4,
    )
    assert all(held is None or held[0] is not stacked for held in table._mixes), "its tensors stay in memory"


@pytest.mark.parametrize("composition", ["linear", "parameter"])
@pytest.mark.parametrize("rows", [5, 40], ids=["alone", "together"])
def test_bfloat16_is_as_exact_as_a_lora_adapter_in_bfloat16(bank: AtomBank, composition, rows: int) -> None:
    x = torch.randn(rows, 12, generator=torch.Generator().manual_seed(6)).bfloat16()
    table, linear = steering(bank, composition, slots=3, dtype=torch.bfloat16)
    got = added(table, linear, x, torch.zeros(rows, 15, dtype=torch.bfloat16), [2] * rows).float()
    exact = expected(bank, composition, x.float(), torch.zeros(rows, 15), [MIXES[2]] * rows)
    usual = torch.zeros(rows, 15)
    delta = bank.compose(MIXES[2], composition)
    assert delta is not None
    for part in PARTS:
        factors = delta[part.module.name]
        h = x @ factors.lora_A.bfloat16().T
        usual[:, part.columns] = factors.scaling * (h @ factors.lora_B.bfloat16().T).float()
    assert (got - exact).norm() < 2 * (usual - exact).norm()
