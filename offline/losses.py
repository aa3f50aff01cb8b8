"""Cross-entropy of next-token predictions, a few rows of logits at a time.

The plain way keeps the logits in float32, their log-probabilities, a zeroed gradient and the gradient: four times (n, V),
with vocabularies of 50,000 to 260,000 the largest things of a pass. Here the logits stay as the model made them and their
gradient is the only other (n, V); what is in float32 fits into a cache. (Passes that sample labels still make
probabilities of them all: offline/curvature.py.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_PART, _PART_ELSEWHERE = 2**20, 2**26
"""Elements of the logits that are in float32 at once: 4 MiB, which caches hold, on CPUs; on devices, where every part is a few
launches, 256 MiB."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] of each row: (n, V) floating and (n,) int64 to (n,) float32, nats. No label is ignored."""
    return _CrossEntropy.apply(logits, labels)


class _CrossEntropy(torch.autograd.Function):
    """loss = log Σ exp z − z_label; its gradient softmax(z) − e_label is worked out in the backward pass alone."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        norms = torch.cat([torch.logsumexp(logits[rows].float(), dim=-1) for rows in _parts(logits)])
        ctx.save_for_backward(logits, labels, norms)
        return norms - logits.gather(1, labels[:, None]).squeeze(1).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        logits, labels, norms = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in _parts(logits):
            part = (logits[rows].float() - norms[rows, None]).exp_()
            part.scatter_add_(1, labels[rows, None], part.new_full((len(part), 1), -1.0))
            gradient[rows] = part.mul_(upstream[rows, None])
        return gradient, None


def _parts(logits: Tensor) -> Iterator[slice]:
    size = max(1, (_PART if logits.device.type == "cpu" else _PART_ELSEWHERE) // logits.shape[1])
    return (slice(start, start + size) for start in range(0, len(logits), size))
