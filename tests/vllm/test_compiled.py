"""Steering as an operator in a graph that is traced once, without guards, as vLLM's compiler traces."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore")


class Adding:
    """Adds `value` to what is steered."""

    value = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        y += self.value * x.sum()


def test_a_graph_traced_unsteered_steers_later(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.vllm import compiled

    layers: dict[str, Any] = {}
    monkeypatch.setattr(compiled, "get_forward_context", lambda: types.SimpleNamespace(no_compile_layers=layers))
    torch.manual_seed(0)
    linear, steering = nn.Linear(4, 3), Adding()
    linear.register_forward_hook(compiled.hook(steering, "q", layers))
    model = torch.compile(nn.Sequential(linear, nn.ReLU()), backend="aot_eager", fullgraph=True, dynamic=True)
    x = torch.randn(5, 4)
    plain = linear(x)
    assert torch.equal(model(x), plain.relu())
    steering.value = 0.5
    assert torch.allclose(model(x), (plain + 0.5 * x.sum()).relu()), "the graph does not ask the linear when it runs"
    assert torch.equal(linear(x), plain + 0.5 * x.sum()), "without a graph"


def config(mode: object, inductor: dict[str, object]) -> Any:
    compilation = types.SimpleNamespace(mode=mode, inductor_compile_config=inductor)
    return types.SimpleNamespace(compilation_config=compilation, additional_config={})


def test_compilation_comes_back_only_where_lora_alone_took_it_away() -> None:
    from server.vllm.compiled import compile_again
    from server.vllm.upstream import CompilationMode

    lora, environment = config(CompilationMode.NONE, {"dce": True}), {}
    compile_again(lora, ["b", "a"], environment)
    assert lora.compilation_config.mode == CompilationMode.DYNAMO_TRACE_ONCE
    assert lora.additional_config == {"atomsteer": ["a", "b"]}, (
        "the graph of other linears would be taken for this one's"
    )
    assert environment == {"VLLM_USE_AOT_COMPILE": "0"}
    eager, environment = config(CompilationMode.NONE, {}), {"VLLM_USE_AOT_COMPILE": "1"}
    compile_again(eager, ["a"], environment)
    assert eager.compilation_config.mode == CompilationMode.NONE and not eager.additional_config
    compile_again(config(CompilationMode.NONE, {"dce": True}), ["a"], environment)
    assert environment == {"VLLM_USE_AOT_COMPILE": "1"}, "the operator has chosen"
