"""Faster forward and backward passes through a frozen model on CPUs. The same function, up to rounding.

Two things cost time there and need not:

    products     float32 ``nn.Linear`` goes to MKL, which on CPUs of other makers than its own keeps to AVX2; oneDNN, which
                 torch brings as well, uses what the CPU has. Weights are read as they lie: nothing is packed or kept twice
    attention    the backward pass of torch's fused CPU kernel is slow, most of all in bfloat16; a few batched products in
                 float32 do the same. Only q, k and v are kept for it

Both are left alone on other devices, and wherever a model does something else than the plain thing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = "atomsteer_products"
_ROWS = 32
"""Fewer rows than this (a decoding step) are left to MKL: oneDNN rearranges a weight on every call, whatever the rows."""
_PLAIN_OPTIONS = {"dropout", "scaling", "is_causal", "position_ids", "sliding_window", "use_cache", "output_attentions"}
"""Options of an attention call that do not change what is computed here; any other, if set, does."""


def quicken(model: PreTrainedModel) -> PreTrainedModel:
    """Replaces what is slow in a frozen `model` on a CPU, in place, and returns it. Weights may still be changed later."""
    if next(model.parameters()).device.type != "cpu":
        return model
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for module in model.modules():
            if type(module) is nn.Linear and module.weight.dtype == torch.float32:
                module.forward = _linear_forward(module)  # type: ignore[method-assign, assignment]
    if model.config._attn_implementation == "sdpa":
        _register_attention()
        model.set_attn_implementation(_ATTENTION)
    return model


def _linear_forward(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if linear.weight.requires_grad or x.numel() < _ROWS * x.shape[-1]:
            return nn.functional.linear(x, linear.weight, linear.bias)
        return _FrozenLinear.apply(x, linear.weight, linear.bias)

    return forward


class _FrozenLinear(torch.autograd.Function):
    """y = x Wᵀ + b with a gradient of x alone. The operator is the one that torch's compiler emits for CPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        back = ctx.weight.T
        return torch.ops.mkldnn._linear_pointwise(gradient.contiguous(), back, None, "none", [], ""), None, None


def _register_attention() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: q (b, h, t, d), k and v (b, h_kv, t, d) to (b, t, h, d). Passes that need no
    gradient, and whatever is not plain attention of t tokens to each other, go to the function that this one replaces."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = options.get("is_causal") is not False and getattr(module, "is_causal", True)
    masked = causal if attention_mask is None else attention_mask.dtype == torch.bool
    extra = any(option is not None for name, option in options.items() if name not in _PLAIN_OPTIONS)
    plain = masked and not extra and not options.get("dropout") and query.shape[2] == key.shape[2]
    if not plain or not torch.is_grad_enabled():
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling") or query.shape[3] ** -0.5
    return _ProductAttention.apply(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None


class _ProductAttention(torch.autograd.Function):
    """softmax(s q kᵀ) v in float32 with any dtype outside; the probabilities are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.mask, ctx.scale = mask, scale
        q, k, v = _by_key_head(query, key, value)
        return torch.bmm(_probabilities(q, k, mask, scale, key.shape), v).view(query.shape).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        q, k, v = _by_key_head(query, key, value)
        p = _probabilities(q, k, ctx.mask, ctx.scale, key.shape)
        d_out = gradient.float().reshape(q.shape)
        d_v = torch.bmm(p.transpose(1, 2), d_out)
        d_scores = torch._softmax_backward_data(torch.bmm(d_out, v.transpose(1, 2)), p, -1, torch.float32)
        d_q = torch.bmm(d_scores, k).mul_(ctx.scale)
        d_k = torch.bmm(d_scores.transpose(1, 2), q).mul_(ctx.scale)
        return (
            d_q.view(query.shape).to(query.dtype),
            d_k.view(key.shape).to(key.dtype),
            d_v.view(value.shape).to(value.dtype),
            None,
            None,
        )


def _by_key_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 with the query heads that share a key head one after the other: (b·h_kv, g·t, d) and twice (b·h_kv, t, d)."""
    b, heads, t, d = key.shape
    q = query.float().reshape(b * heads, -1, d)
    return q, key.float().reshape(b * heads, t, d), value.float().reshape(b * heads, t, value.shape[3])


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, shape: torch.Size) -> Tensor:
    """(b·h_kv, g·t, t): each of the g·t queries over the keys that `mask` (b, 1, t, t), or causality, lets it see; over all
    of them where it lets it see none (padding on the left)."""
    b, heads, t, _ = shape
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale).view(b, -1, t, t)
    if mask is None:
        mask = torch.ones(t, t, dtype=torch.bool, device=q.device).tril_()
    return torch.softmax(scores.masked_fill_(~mask, torch.finfo(scores.dtype).min), -1).view(b * heads, -1, t)
