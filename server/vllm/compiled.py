"""Steering inside the graph that vLLM compiles of the model on CPUs. vLLM itself turns compilation off wherever there is
LoRA, for its own kernels; ours are one operator, which the compiler neither looks into nor leaves out.

The graph is traced once a start, without guards, and what the compiler makes of it is kept on disk. So it must depend on
nothing but which linears are steered: the operator finds everything else by the linear's name when it runs, as vLLM's attention
does.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from server.vllm.upstream import CompilationMode, get_forward_context

_LIBRARY = torch.library.Library("atomsteer", "FRAGMENT")
_LIBRARY.define("add_steering(Tensor x, Tensor(a!) y, str key) -> ()")


class SteeredLinear(Protocol):
    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds the steering of the rows of this pass to `y` (t, d_out) in place; `x` (t, d_in)."""


def _add_steering(x: Tensor, y: Tensor, key: str) -> None:
    get_forward_context().no_compile_layers[key].add(x, y)


_LIBRARY.impl("add_steering", _add_steering, "CPU")
torch.library.register_fake("atomsteer::add_steering", lambda x, y, key: None, lib=_LIBRARY)


def hook(linear: SteeredLinear, name: str, layers: dict[str, Any]) -> Any:
    """A forward hook for vLLM's linear `name`. `layers` is what the forward context gives its layers by name."""
    key = f"{name}.steering"
    layers[key] = linear

    def add_steering(_module: object, inputs: tuple[Tensor, ...], output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        if torch.compiler.is_compiling():
            torch.ops.atomsteer.add_steering(inputs[0], y, key)
        else:
            linear.add(inputs[0], y)

    return add_steering


def compile_again(engine_config: Any, modules: Sequence[str], environment: MutableMapping[str, str]) -> None:
    """Undoes that vLLM has turned compilation off for LoRA, if it would compile without; `modules` are the linears that the
    package adapts, which become part of the name under which the graph is kept.

    Unless the operator has chosen, vLLM keeps no graph ahead of time: it cannot read one of a CPU back ('function' object has
    no attribute 'finalize_loading'), and then starts slower than with what the compiler itself keeps."""
    compilation = engine_config.compilation_config
    off_for_lora = compilation.mode == CompilationMode.NONE and "dce" in compilation.inductor_compile_config
    if off_for_lora and isinstance(engine_config.additional_config, dict):
        compilation.mode = CompilationMode.DYNAMO_TRACE_ONCE
        engine_config.additional_config = engine_config.additional_config | {"atomsteer": sorted(modules)}
        environment.setdefault("VLLM_USE_AOT_COMPILE", "0")
