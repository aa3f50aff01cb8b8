"""Attention of one decode step without copies of keys and values, for models whose query heads share them.

transformers repeats every key and value for each query head that reads it, at every step. For one new token a row the
query heads of a group can stand where queries stand, and read the same keys at once: the same sums, without the copies.

    query (n, H, 1, D)  ->  (n, H/g, g, D)          key, value (n, H/g, W, D) as they lie in the cache

Anything but a masked decode step of such a model is left to transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "atomsteer_grouped"


def group_heads(model: PreTrainedModel) -> bool:
    """Makes `model` attend this way if it would use torch's attention. Whether it does now."""
    if model.config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return bool(model.config._attn_implementation == NAME)


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    """(n, t, H, D) of queries (n, H, t, D); as transformers' own for `sdpa`."""
    rows, heads, tokens, size = query.shape
    shared = key.shape[1]
    one_mask = attention_mask is not None and attention_mask.shape[1] == 1
    if tokens > 1 or shared == heads or not one_mask or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)  # type: ignore[arg-type]
    grouped = query.reshape(rows, shared, heads // shared, size)
    found = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return found.reshape(rows, 1, heads, value.shape[-1]), None
