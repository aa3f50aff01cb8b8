"""Coordinates: one order for all, exact round trips, natural sorting."""

from __future__ import annotations

import random

import pytest
import torch

from atoms.errors import AdapterError
from atoms.space import LoRAModule, LoRASpace

SIZES = {
    "self_attn.q_proj": (8, 8), "self_attn.k_proj": (8, 4), "self_attn.v_proj": (8, 4), "self_attn.o_proj": (8, 8),
    "mlp.gate_proj": (8, 16), "mlp.up_proj": (8, 16), "mlp.down_proj": (16, 8),
}  # fmt: skip


def space(projections: tuple[str, ...], layers: int = 12, rank: int = 3) -> LoRASpace:
    modules = [
        LoRAModule(f"model.layers.{layer}.{name}", *SIZES[name], rank, 2.0)
        for layer in range(layers)
        for name in projections
    ]
    random.Random(0).shuffle(modules)
    return LoRASpace.of(modules)


@pytest.mark.parametrize(
    "projections", [("self_attn.q_proj", "self_attn.v_proj"), tuple(SIZES)], ids=["q,v", "all seven"]
)
def test_coordinates_round_trip(projections: tuple[str, ...]) -> None:
    made = space(projections)
    vector = torch.arange(made.dim, dtype=torch.float32)
    parts = made.unflatten(vector)
    assert torch.equal(made.flatten(parts), vector)
    shuffled = dict(random.Random(1).sample(list(parts.items()), len(parts)))
    assert torch.equal(made.flatten(shuffled), vector), "the order of a dict leaks into the coordinates"
    assert made.dim == sum(t.numel() for t in parts.values())
    assert LoRASpace.from_json(made.to_json()) == made


def test_layers_sort_as_numbers_and_a_comes_before_b() -> None:
    made = space(("self_attn.q_proj",), layers=12)
    assert [m.name.split(".")[2] for m in made.modules] == [str(i) for i in range(12)]
    assert [t.key.rsplit(".", 1)[1] for t in made.tensors[:4]] == ["lora_A", "lora_B", "lora_A", "lora_B"]


def test_equal_specs_are_equal_and_hash_tensors_sees_value_order_and_scaling() -> None:
    one, same = space(tuple(SIZES)), space(tuple(reversed(SIZES)))
    assert one == same
    tensors = one.unflatten(torch.randn(one.dim))
    changed = {key: value.clone() for key, value in tensors.items()}
    changed[one.tensors[-1].key][0, 0] += 1e-6
    rescaled = LoRASpace.of(LoRAModule(m.name, m.d_in, m.d_out, m.rank, 1.0) for m in one.modules)
    assert len({one.hash_tensors(tensors), one.hash_tensors(changed), rescaled.hash_tensors(tensors)}) == 3


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_direction_that_does_not_fit_is_refused(change: str) -> None:
    made = space(("self_attn.q_proj",), layers=1)
    parts = made.unflatten(torch.zeros(made.dim))
    key = made.tensors[0].key
    if change == "missing":
        del parts[key]
    elif change == "extra":
        parts["other.lora_A"] = torch.zeros(1)
    else:
        parts[key] = parts[key].T
    with pytest.raises(AdapterError, match="other.lora_A" if change == "extra" else "q_proj.lora_A"):
        made.flatten(parts)


def test_a_vector_of_another_length_is_refused() -> None:
    made = space(("self_attn.q_proj",), layers=1)
    with pytest.raises(AdapterError, match=str(made.dim)):
        made.unflatten(torch.zeros(made.dim + 1))


def test_no_modules_and_repeated_modules_are_refused() -> None:
    module = LoRAModule("m", 2, 2, 1, 1.0)
    with pytest.raises(AdapterError, match="no LoRA modules"):
        LoRASpace.of([])
    with pytest.raises(AdapterError, match="'m' occurs twice"):
        LoRASpace.of([module, module])
