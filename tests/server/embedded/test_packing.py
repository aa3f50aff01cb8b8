"""Packed weights: the same model, row by row, in no more memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from server.embedded.packing import can_pack, pack_linears


@torch.inference_mode()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def test_packed_linears_compute_what_linears_compute() -> None:
    torch.manual_seed(0)
    for bias in (True, False):
        linear = nn.Linear(96, 40, bias=bias).requires_grad_(False)
        packed = copy.deepcopy(linear)
        assert pack_linears(packed) == 1
        for shape in ((1, 96), (7, 96), (3, 5, 96)):
            x = torch.randn(shape)
            torch.testing.assert_close(packed(x), linear(x), rtol=1e-5, atol=1e-5)


def test_a_packed_model_is_the_model_and_takes_no_second_copy(load_smol: Callable[[], PreTrainedModel]) -> None:
    model = load_smol()
    ids = torch.tensor([[1, 30, 31, 32, 33]])
    plain, before = logits(model, ids), sum(p.numel() for p in model.parameters())
    assert pack_linears(model) == 30 * 7 + 1
    assert float((logits(model, ids) - plain).abs().max()) < 1e-4 * float(plain.abs().max())
    embeddings = model.get_input_embeddings().weight.numel()
    norms = 61 * model.config.hidden_size
    assert sum(p.numel() for p in model.parameters()) == embeddings + norms < before, "linears keep their plain weights"


def test_a_row_does_not_depend_on_its_company(load_smol: Callable[[], PreTrainedModel]) -> None:
    """Bit for bit, which the plain kernel does not promise."""
    model = load_smol()
    pack_linears(model)
    x = torch.randn(16, 1, model.config.hidden_size)
    for linear in (model.get_submodule("model.layers.0.mlp.up_proj"), model.lm_head):
        with torch.inference_mode():
            assert torch.equal(linear(x)[:1], linear(x[:1]))


def test_bf16_is_packed_where_the_cpu_computes_in_it(load_smol: Callable[[], PreTrainedModel]) -> None:
    model = load_smol().bfloat16()
    ids = torch.tensor([[1, 30, 31, 32, 33]])
    plain = logits(model, ids)
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert pack_linears(model) == 0
        return
    x = torch.randn(16, 1, model.config.hidden_size, dtype=torch.bfloat16)
    up = model.get_submodule("model.layers.0.mlp.up_proj")
    with torch.inference_mode():
        expected = up(x)
        assert pack_linears(model) == 30 * 7 + 1
        torch.testing.assert_close(up(x), expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(logits(model, ids).argmax(-1), plain.argmax(-1))


def test_half_precision_is_left_alone(tiny_model: PreTrainedModel) -> None:
    assert can_pack(tiny_model)
    assert pack_linears(tiny_model.half()) == 0
    assert all(linear.weight.numel() for linear in tiny_model.modules() if isinstance(linear, nn.Linear))
