"""PEFT files: what is read as PEFT reads it, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from atoms.adapter import (
    Adapter,
    AtomBank,
    adapter_delta,
    compose,
    compose_on_raw_base,
    read_adapter,
    read_delta,
    refuse_zero_b,
    split_linear,
    write_adapter,
)
from atoms.errors import AdapterError, ModelError
from atoms.mix import Mix
from atoms.model import find_linear, merge_adapter
from atoms.space import LoRAModule, LoRASpace
from atoms.steered import SteeredModel
from offline.config import FinetuneConfig
from offline.lora import frozen_lora, new_lora

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[1, 30, 31, 32, 33]])
SavePeft = Callable[..., Path]


@pytest.fixture
def save_peft(tiny_model: PreTrainedModel, tmp_path: Path) -> SavePeft:
    """`save_peft(**LoraConfig fields)`: an adapter that stock PEFT saved, B random. The model is left as it was."""

    def save(**settings: object) -> Path:
        config = LoraConfig(
            **({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings)
        )
        torch.manual_seed(0)
        peft_model = get_peft_model(tiny_model, config)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
        peft_model.save_pretrained(tmp_path / "adapter")
        peft_model.unload()
        return tmp_path / "adapter"

    return save


@pytest.fixture
def edited(save_peft: SavePeft) -> Callable[..., Path]:
    """A saved adapter with entries of its config replaced."""

    def edit(**changes: object) -> Path:
        path = save_peft()
        config = json.loads((path / "adapter_config.json").read_text()) | changes
        (path / "adapter_config.json").write_text(json.dumps(config))
        return path

    return edit


@torch.inference_mode()
def peft_logits(model: PreTrainedModel, path: Path) -> torch.Tensor:
    peft_model = PeftModel.from_pretrained(model, path).eval()
    logits = peft_model(input_ids=IDS).logits
    peft_model.unload()
    return logits


@torch.inference_mode()
def steered_logits(model: PreTrainedModel, space: LoRASpace, delta) -> torch.Tensor:
    steered = SteeredModel(model, space, slots=1)
    steered.set_slot(0, delta)
    with steered.rows([0]):
        logits = model(input_ids=IDS).logits
    steered.close()
    return logits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": SEVEN},
        {"use_rslora": True, "r": 8},
        {"r": 3, "lora_alpha": 7},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 32, "v_proj": 4}},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True},
        {"layers_to_transform": [1]},
        {"target_modules": r".*\.0\.self_attn\.(q|o)_proj"},
    ],
    ids=["plain", "all seven", "rslora", "odd rank", "patterns", "rslora patterns", "one layer", "expression"],
)
def test_adapters_mean_what_they_mean_to_peft(
    settings: dict, save_peft: SavePeft, tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    path = save_peft(**settings)
    adapter = read_adapter(path)
    expected = peft_logits(tiny_model, path)
    with torch.inference_mode():
        plain = tiny_model(input_ids=IDS).logits
    assert float((expected - plain).abs().max()) > 1e-2
    assert torch.allclose(steered_logits(tiny_model, adapter.space, adapter_delta(adapter)), expected, atol=1e-4)
    write_adapter(tmp_path / "again", adapter_delta(adapter), adapter.targets, "tiny")
    again = read_adapter(tmp_path / "again")
    assert again.space == adapter.space, "scaling or rank changes when an adapter is rewritten"
    assert again.content_hash() == adapter.content_hash()
    assert torch.allclose(peft_logits(tiny_model, tmp_path / "again"), expected, atol=1e-4)
    assert frozen_lora(tiny_model, tmp_path / "again", adapter.space) is not None


def test_scaling_survives_rewriting_at_every_rank(tmp_path: Path) -> None:
    """α is stored as scaling · rank and divided by the rank again; in floating point that need not give it back."""
    lost = []
    for rank in (1, 3, 5, 7, 14, 17, 20, 33):
        for scaling in (1 / rank, 16 / rank, 10 / rank**0.5, 32.5 / rank):
            module = LoRAModule("m.q_proj", 1, 1, rank, scaling)
            tensors = {module.key_a: torch.ones(rank, 1), module.key_b: torch.ones(1, rank)}
            write_adapter(tmp_path, adapter_delta(Adapter(LoRASpace.of([module]), tensors, {})), {}, "m")
            if read_adapter(tmp_path).space.modules != (module,):
                lost.append((rank, scaling))
    assert not lost, (
        f"scaling changes in its last digit for (rank, scaling) in {lost[:5]}: the adapter's hash would change"
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_kinds_that_a_weight_delta_cannot_express_are_refused_by_name(
    edited: Callable[..., Path], changes: dict, named: str
) -> None:
    with pytest.raises(AdapterError, match=named):
        read_adapter(edited(**changes))


def test_real_dora_and_saved_modules_are_refused(save_peft: SavePeft) -> None:
    with pytest.raises(AdapterError, match="DoRA"):
        read_adapter(save_peft(use_dora=True))
    with pytest.raises(AdapterError, match="modules_to_save"):
        read_adapter(save_peft(modules_to_save=["lm_head"]))


def test_dora_weights_under_an_innocent_config_are_refused(save_peft: SavePeft) -> None:
    path = save_peft(use_dora=True)
    config = json.loads((path / "adapter_config.json").read_text()) | {"use_dora": False}
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="magnitude"):
        read_adapter(path)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "no object"])
def test_broken_files_are_named(save_peft: SavePeft, file: str, damage: str) -> None:
    path = save_peft()
    target = path / file
    if damage == "missing":
        target.unlink()
    else:
        target.write_bytes(target.read_bytes()[:-20] if damage == "truncated" else b"[]")
    with pytest.raises(AdapterError, match="adapter"):
        read_adapter(path)


def test_half_a_pair_is_refused(save_peft: SavePeft) -> None:
    path = save_peft()
    tensors = load_file(path / "adapter_model.safetensors")
    tensors.pop(next(key for key in tensors if "lora_A" in key))
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="incomplete"):
        read_adapter(path)


def test_a_zero_b_is_refused_with_the_module_named(save_peft: SavePeft) -> None:
    path = save_peft()
    refuse_zero_b(read_adapter(path), path)
    tensors = load_file(path / "adapter_model.safetensors")
    zeroed = {k: torch.zeros_like(v) if "layers.1.self_attn.v_proj.lora_B" in k else v for k, v in tensors.items()}
    save_file(zeroed, path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"1 of 4 modules \(first: model.layers.1.self_attn.v_proj\)"):
        refuse_zero_b(read_adapter(path), path)


def test_missing_target_modules_are_named_beside_those_there_are(tiny_model: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match=r"no linear named c_attn;.*q_proj.*--target-modules"):
        new_lora(tiny_model, FinetuneConfig(target_modules=("q_proj", "c_attn")), 0)


def test_an_adapter_for_another_model_does_not_fit(
    save_peft: SavePeft, tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    adapter = read_adapter(save_peft())
    module = adapter.space.modules[0]
    wider = LoRASpace.of([LoRAModule(module.name, module.d_in * 2, module.d_out, 4, 2.0)])
    foreign = LoRASpace.of([LoRAModule("transformer.h.0.attn.c_attn", 8, 8, 4, 2.0)])
    for space, named in ((wider, module.name), (foreign, "c_attn")):
        other = Adapter(
            space, space.unflatten(torch.ones(space.dim)), {"target_modules": [space.modules[0].name.split(".")[-1]]}
        )
        with pytest.raises(AdapterError, match=named):
            merge_adapter(tiny_model, other)
        write_adapter(tmp_path / named, adapter_delta(other), other.targets, "other")
        with pytest.raises(AdapterError, match="does not fit"):
            frozen_lora(tiny_model, tmp_path / named, space)


def test_a_head_that_is_the_input_embedding_is_not_merged(tiny_model: PreTrainedModel) -> None:
    head = find_linear(tiny_model, "lm_head")
    space = LoRASpace.of([LoRAModule("lm_head", head.in_features, head.out_features, 4, 2.0)])
    adapter = Adapter(space, space.unflatten(torch.ones(space.dim)), {"target_modules": ["lm_head"]})
    merge_adapter(tiny_model, adapter)
    head.weight = tiny_model.get_input_embeddings().weight
    before = head.weight.clone()
    with pytest.raises(AdapterError, match="lm_head shares its weights with the input embedding"):
        merge_adapter(tiny_model, adapter)
    assert torch.equal(head.weight, before)


@pytest.fixture
def bank(save_peft: SavePeft) -> AtomBank:
    base = read_adapter(save_peft(target_modules=SEVEN, lora_alpha=12))
    generator = torch.Generator().manual_seed(3)
    random = {f"a-{n}": base.space.unflatten(torch.randn(base.space.dim, generator=generator) * 0.1) for n in range(3)}
    return AtomBank.of(base, random)


def weight(factors) -> torch.Tensor:
    return factors.scaling * factors.lora_B @ factors.lora_A


def test_compositions_follow_their_formulas_and_agree_on_raw_and_merged_base(bank: AtomBank) -> None:
    direction, base = bank.direction(Mix.of({"a-0": 2.0, "a-2": -0.5})), bank.base
    for module in base.space.modules:
        a0, b0, a, b = (
            *(base.tensors[k] for k in (module.key_a, module.key_b)),
            *(direction[k] for k in (module.key_a, module.key_b)),
        )
        formulas = {"linear": b0 @ a + b @ a0, "parameter": (b0 + b) @ (a0 + a) - b0 @ a0}
        for composition, formula in formulas.items():
            merged = weight(compose(base, direction, composition)[module.name])
            raw = weight(compose_on_raw_base(base, direction, composition)[module.name])
            assert torch.allclose(merged, module.scaling * formula, atol=1e-5), f"{composition}: {module.name}"
            assert torch.allclose(raw, merged + module.scaling * b0 @ a0, atol=1e-5), (
                f"{composition} on the raw base: {module.name}"
            )


def test_linear_mixes_add_up_and_negation_negates(bank: AtomBank) -> None:
    parts = [
        bank.compose(Mix.of(m), "linear")
        for m in ({"a-0": 2.0}, {"a-1": -1.0}, {"a-0": 2.0, "a-1": -1.0}, {"a-0": -2.0, "a-1": 1.0})
    ]
    for name in parts[0]:
        one, other, both, negated = (weight(part[name]) for part in parts)
        assert torch.allclose(one + other, both, atol=1e-5)
        assert torch.allclose(negated, -both, atol=1e-6)


def test_the_direction_of_an_atom_comes_back_from_its_file_exactly(bank: AtomBank, tmp_path: Path) -> None:
    direction = bank.direction(Mix.of({"a-1": 1.0}))
    write_adapter(tmp_path / "atom", compose(bank.base, direction, "linear"), bank.base.targets, "tiny")
    back = split_linear(bank.base, read_delta(tmp_path / "atom"))
    assert all(torch.equal(back[key], value) for key, value in direction.items())


def test_the_empty_mix_composes_to_nothing(bank: AtomBank) -> None:
    assert bank.compose(Mix(), "linear") is None
    assert AtomBank.of(bank.base, {}).ids == ()


def test_a_direction_of_another_space_is_refused_by_atom(bank: AtomBank) -> None:
    with pytest.raises(AdapterError, match="atom a-9"):
        AtomBank.of(bank.base, {"a-9": {}})


def test_merging_adds_the_scaled_product(bank: AtomBank, tiny_model: PreTrainedModel) -> None:
    module = bank.base.space.modules[0]
    before = find_linear(tiny_model, module.name).weight.clone()
    merge_adapter(tiny_model, bank.base)
    change = find_linear(tiny_model, module.name).weight - before
    assert torch.allclose(change, weight(adapter_delta(bank.base)[module.name]), atol=1e-5)
