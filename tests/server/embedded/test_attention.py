"""Grouped attention: what transformers computes with repeated keys and values, to rounding, and no copy of them."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from server.embedded import attention
from server.embedded.attention import group_heads


def llama(heads: int, shared: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=heads,
                         num_key_value_heads=shared, initializer_range=0.3)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gemma() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4, initializer_range=0.3, query_pre_attn_scalar=1,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


@torch.inference_mode()
def steps(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits of a prompt of two rows, one padded, and of three tokens after it."""
    tokens = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones((2, 12), dtype=torch.bool)
    mask[1, :4] = False
    cache, found = DynamicCache(config=model.config), []
    for start, end in ((0, 9), (9, 10), (10, 11), (11, 12)):
        positions = (torch.arange(start, end)[None] - torch.tensor([[0], [4]])).clamp(min=0)
        ids = tokens if start == 0 else tokens[:, start - 9 : end - 9]
        output = model(input_ids=ids, attention_mask=mask[:, :end], position_ids=positions, past_key_values=cache)
        found.append(output.logits[:, -1])
    return found


@pytest.mark.parametrize("make", [lambda: llama(4, 2), lambda: llama(4, 1), lambda: llama(4, 4), gemma])
def test_it_computes_what_transformers_does(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    expected = steps(model)
    assert group_heads(model)
    with patch.object(attention, "scaled_dot_product_attention", wraps=attention.scaled_dot_product_attention) as own:
        found = steps(model)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    config = model.config
    grouped = config.num_attention_heads > config.num_key_value_heads
    assert own.call_count == (3 * config.num_hidden_layers if grouped else 0)


def test_another_attention_is_left_alone() -> None:
    model = llama(4, 2)
    model.set_attn_implementation("eager")
    assert not group_heads(model)
    assert model.config._attn_implementation == "eager"
