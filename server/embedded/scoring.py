"""One answer read again, unsteered and steered, a chunk of columns at a time: how far the mix moved its tokens.

Knows tensors and transformers' cache; which row of the model is steered, and when there is time, is the batcher's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from atoms.mix import Mix
from server.embedded.kv import prompt_cache

Forward = Callable[..., Tensor]


class DriftScore:
    """`done` becomes the mean over the response's tokens of KL(unsteered ‖ steered), nats, over the whole vocabulary.

    Exact, where the ratio of the two probabilities of the tokens drawn would be an estimate, and of the drift only for
    answers sampled at temperature 1: both distributions are at hand, and the forward passes cost the rest.
    """

    def __init__(self, prompt: Sequence[int], response: Sequence[int], mix: Mix) -> None:
        self.mix = mix
        self.done: Future[float] = Future()
        self._tokens = torch.tensor([[*prompt, *response[:-1]]])  # (1, N): what predicts the response's tokens
        self._first = len(prompt) - 1  # the column that predicts the response's first token
        self._caches = prompt_cache(), prompt_cache()
        self._column = 0
        self._total = 0.0

    @property
    def complete(self) -> bool:
        return self._column == self._tokens.shape[1]

    def begin(self) -> bool:
        """Whether anybody still wants it; nobody can call it off from then on."""
        return self.done.set_running_or_notify_cancel()

    def fail(self, error: Exception) -> None:
        if self.done.running() or self.begin():
            self.done.set_exception(error)

    def advance(self, columns: int, forwards: tuple[Forward, Forward]) -> None:
        """Reads up to `columns` more columns of each; `forwards` run the unsteered and the steered model."""
        start, end = self._column, min(self._column + columns, self._tokens.shape[1])
        wanted = end - max(start, self._first)
        unsteered, steered = (
            forward(self._tokens[:, start:end], start, cache, max(1, wanted))
            for forward, cache in zip(forwards, self._caches, strict=True)
        )
        if wanted > 0:
            self._total += float(kl_divergence(unsteered[0, -wanted:], steered[0, -wanted:]).cpu().double().sum())
        self._column = end
        if self.complete:
            self.done.set_result(max(0.0, self._total / (self._tokens.shape[1] - self._first)))


def kl_divergence(logits: Tensor, others: Tensor) -> Tensor:
    """(T,) float32, nats: KL(softmax(logits) ‖ softmax(others)) of each row; both (T, V)."""
    ours, theirs = torch.log_softmax(logits.float(), dim=-1), torch.log_softmax(others.float(), dim=-1)
    theirs = torch.sub(ours, theirs, out=theirs)  # in place: V numbers a row are many
    return theirs.mul_(ours.exp_()).sum(dim=-1)
