"""Weights packed once for oneDNN: faster decoding on CPUs, in fp32 and where the CPU has bf16 instructions in bf16.

A decode step multiplies a few rows by every weight of the model. The plain kernel rearranges the weight on every call,
which at 16 rows costs as much as the product; packed at load, the product alone is left (bench/embedded_decode.py
measures both). A row's result then does not depend on how many rows there are either.

The two operators are those that torch's own compiler emits for frozen CPU models; they have no public name, so their
presence is asked for, and a test compares them with `nn.Linear`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

_OPERATORS = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")
_ROWS = 16
"""Rows of a typical decode step, for which the packed layout is chosen; other counts work too."""


def can_pack(model: nn.Module) -> bool:
    """Whether `model` is on a CPU that computes in its dtype, fp32 or bf16, and this torch has the operators."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" or not all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS):
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


@torch.no_grad()
def pack_linears(model: nn.Module) -> int:
    """Packs every linear of `model` if that is possible, for inference only. Returns how many were packed.

    A packed linear's own weight is emptied, so that memory stays what it was; one that another module shares (a tied
    embedding) is kept beside the packed copy. Whatever reads or changes weights must come before.
    """
    if not can_pack(model):
        return 0
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    for linear in linears:
        linear.forward = _packed_forward(linear.weight, linear.bias)  # type: ignore[method-assign, assignment]
        if owners[id(linear.weight)] == 1:
            linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
    return len(linears)


def _packed_forward(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)

    def forward(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    return forward
