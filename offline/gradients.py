"""Per-document LoRA gradients for a whole batch, from one forward and one backward pass.

Hooks on every lora_A and lora_B linear see the inputs x (b, t, i) and, in the backward pass, the output gradients
δ (b, t, o). Per document and matrix G = Σ_t δ_t x_tᵀ = einsum("bto,bti->boi"). A *sink* consumes (x, δ) at once, so
neither N×d nor b×d need exist. Padding is on the right and carries no loss, hence δ = 0 there.

Rows and losses use the mean over response tokens; curvature uses sums (see offline/curvature.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from atoms.space import LoRASpace
from offline.corpus import Batch, EncodedDocument, make_batches
from offline.losses import cross_entropy

if TYPE_CHECKING:
    from peft import PeftModel

Sink = Callable[[str, Tensor, Tensor], None]
"""Called as sink(tensor key, x (b, t, i), δ (b, t, o)), once a matrix and backward pass."""


def lora_linear(model: PeftModel, key: str) -> nn.Linear:
    """The linear of LoRA matrix `key` (``<module>.lora_A`` or ``.lora_B``) in a PEFT model."""
    return model.get_base_model().get_submodule(key)["default"]  # type: ignore[index]


@contextmanager
def gradient_hooks(model: PeftModel, space: LoRASpace, sink: Sink) -> Iterator[None]:
    """Within the block, every backward pass calls `sink` for each LoRA matrix of `space`.

    The parameters may all be frozen: the embeddings' output is made to require a gradient, so that the backward pass
    reaches every layer and no weight gradient is computed.
    """
    handles = [model.get_input_embeddings().register_forward_hook(_require_gradient)]
    for tensor in space.tensors:
        handles.append(lora_linear(model, tensor.key).register_forward_hook(_capture(tensor.key, sink)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def label_logits(model: Any, batch: Batch) -> Tensor:
    """Logits at the label positions only, (n, V) in the model's dtype: the head runs on n rows instead of b·t.

    `model` is a transformers or PEFT causal LM. Works for any of them because it narrows the head's input; whatever
    the model does to logits afterwards (scaling, soft capping) is kept. No mask is given: padding is on the right, where
    causality hides it from every real token, and attention kernels are faster without one.
    """
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(
        lambda _module, inputs: (inputs[0][batch.label_rows, batch.label_columns],)  # (b, t, h) -> (n, h)
    )
    try:
        return model(input_ids=batch.input_ids, use_cache=False).logits
    finally:
        handle.remove()


def mean_losses(logits: Tensor, batch: Batch) -> Tensor:
    """(b,) float32 mean cross-entropy over each document's response tokens, nats a token."""
    return sum_losses(logits, batch) / batch.response_lengths


def sum_losses(logits: Tensor, batch: Batch, labels: Tensor | None = None) -> Tensor:
    """(b,) float32 cross-entropy summed over each document's response tokens, nats. None: the real labels."""
    per_token = cross_entropy(logits, batch.labels if labels is None else labels)
    return per_token.new_zeros(len(batch.documents)).index_add(0, batch.label_rows, per_token)


def mean_gradient(
    model: PeftModel, space: LoRASpace, documents: Sequence[EncodedDocument], batch_tokens: int
) -> dict[str, Tensor]:
    """The mean over documents of the gradient of their mean loss, per LoRA matrix, float32 on the CPU. `model` is frozen."""
    total = {tensor.key: torch.zeros(tensor.shape) for tensor in space.tensors}

    def add(key: str, x: Tensor, delta: Tensor) -> None:
        total[key] += torch.einsum("bto,bti->oi", delta, x).cpu()

    with gradient_hooks(model, space, add):
        for batch in make_batches(documents, batch_tokens, model.device):
            mean_losses(label_logits(model, batch), batch).sum().backward()
    return {key: value / len(documents) for key, value in total.items()}


def _require_gradient(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_()


def _capture(key: str, sink: Sink) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def forward_hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        x = inputs[0].detach()

        def backward_hook(delta: Tensor) -> None:
            with torch.no_grad():
                sink(key, x.float(), delta.float())

        output.register_hook(backward_hook)

    return forward_hook


class FullGradients:
    """A sink that keeps the whole per-document gradients of the last backward pass: key -> (b, o, i). For oracles and
    studies; discovery keeps none."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def __call__(self, key: str, x: Tensor, delta: Tensor) -> None:
        self.tensors[key] = torch.einsum("bto,bti->boi", delta, x)
