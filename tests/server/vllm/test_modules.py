"""Linears that vLLM's model computes otherwise than by calling them are refused, without vLLM."""

from __future__ import annotations

import pytest

from atoms.errors import AdapterError
from server.vllm.modules import refuse_modules

ATTENTION = "model.layers.1.self_attn."


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.3.up_proj", f"{ATTENTION}kv_b_proj"])
def test_a_linear_that_vllm_does_not_call_is_refused(name: str) -> None:
    refuse_modules(
        [f"{ATTENTION}q_proj", f"{ATTENTION}kv_a_proj_with_mqa", "model.layers.0.mlp.shared_experts.up_proj"]
    )
    with pytest.raises(AdapterError, match=f"{name} .*cannot be steered inside vLLM; use the embedded engine"):
        refuse_modules([f"{ATTENTION}q_proj", name])
