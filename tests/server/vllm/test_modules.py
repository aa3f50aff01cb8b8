"""Linears that vLLM's model computes otherwise than by calling them are refused, without vLLM."""

from __future__ import annotations

import pytest
from torch import nn

from atoms.errors import AdapterError
from server.vllm.modules import refuse_modules

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
