"""Linears that vLLM's model computes otherwise than by calling them are refused, without vLLM."""

from __future__ import annotations

import pytest
from torch import nn

from atoms.errors import AdapterError
from server.vllm.modules import refuse_modules, require_modules

ATTENTION = "model.layers.1.self_attn."


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.3.up_proj", f"{ATTENTION}kv_b_proj"])
def test_a_linear_that_vllm_does_not_call_is_refused(name: str) -> None:
    steered = [f"{ATTENTION}q_proj", f"{ATTENTION}kv_a_proj_with_mqa", "model.layers.0.mlp.shared_experts.up_proj"]
    refuse_modules(steered, nn.Module())
    with pytest.raises(AdapterError, match=f"{name} .*cannot be steered inside vLLM; use the embedded engine"):
        refuse_modules([*steered, name], nn.Module())


class _Permuting(nn.Module):
    """As vLLM's Llama 4."""

    def permute_qk_weight_for_rotary(self) -> None: ...


@pytest.mark.parametrize("last", ["q_proj", "k_proj"])
@pytest.mark.parametrize("is_inside", [False, True], ids=["text", "multimodal"])
def test_linears_whose_rows_vllm_has_moved_are_refused(last: str, is_inside: bool) -> None:
    model: nn.Module = _Permuting()
    if is_inside:
        model, model.language_model = nn.Module(), model
    refuse_modules([f"{ATTENTION}v_proj"], model)
    refuse_modules([f"{ATTENTION}{last}"], nn.Module())
    with pytest.raises(AdapterError, match=f"{last} has its outputs in another order in vLLM's {type(model).__name__}"):
        refuse_modules([f"{ATTENTION}v_proj", f"{ATTENTION}{last}"], model)


class _Elsewhere(nn.Identity):
    """As vLLM's stand-in for a layer of another rank."""


def rank_with(layers: list[nn.Module]) -> nn.Module:
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(layers)
    return model


def attention(*linears: str) -> nn.Module:
    layer = nn.Module()
    layer.self_attn = nn.ModuleDict({name: nn.Identity() for name in linears})
    return layer


NAMES = {f"model.layers.{layer}.self_attn.{last}": f"own.{layer}.{last}" for layer in range(2) for last in ("q", "v")}


def test_linears_of_other_ranks_are_not_missed() -> None:
    require_modules(NAMES, {"own.1.q", "own.1.v"}, rank_with([_Elsewhere(), attention("qv")]), _Elsewhere)
    require_modules(NAMES, {"own.0.q", "own.0.v"}, rank_with([attention("qv"), _Elsewhere()]), _Elsewhere)


@pytest.mark.parametrize(
    ("found", "layers", "said"),
    [
        ({"own.1.q"}, [_Elsewhere(), attention("q")], r"no linear for own\.1\.v \(1 of"),
        (set(), [_Elsewhere(), nn.Module()], r"no linear for own\.1\.q \(2 of"),
        (set(), [_Elsewhere()], r"no linear for own\.1\.q \(2 of"),
    ],
    ids=["linear", "attention", "layer"],
)
def test_what_a_rank_should_have_and_has_not_is_refused(found: set[str], layers: list[nn.Module], said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        require_modules(NAMES, found, rank_with(layers), _Elsewhere)


def test_a_model_that_names_its_modules_otherwise_is_refused_on_every_rank() -> None:
    names = {f"language_model.{name}": own for name, own in NAMES.items()}
    for layers in ([_Elsewhere(), attention("qv")], [attention("qv"), _Elsewhere()]):
        with pytest.raises(AdapterError, match=r"\(4 of the package's modules\)"):
            require_modules(names, set(), rank_with(layers), _Elsewhere)
