"""The EKFAC eigenbasis of LoRA space: the Fisher per token, from labels sampled from the model.

For each matrix, over a sample of documents:
    factors      activation covariance Σ x xᵀ over all real tokens, output-gradient covariance Σ δ δᵀ; eigenvectors Q_A, Q_S
    eigenvalues  λ_oi = Σ_i (q_oᵀ G_i q_i)² / Σ_i T_i,  G_i the *summed* sampled-label gradient of document i;
                 or, without a second pass, the products of the factors' own eigenvalues (K-FAC; Martens & Grosse 2015)

For independent sampled labels E[s sᵀ] of a sum over T tokens is T times the Fisher per token, hence the division by the
token count. Labels of a document depend on the seed and its row alone, so both passes see the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from atoms.projection import MatrixBasis, Projection
from atoms.space import LoRASpace
from offline.config import CurvatureConfig
from offline.corpus import Batch, EncodedDocument, collate, plan_batches
from offline.gradients import gradient_hooks, label_logits, sum_losses
from offline.progress import Progress
from offline.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from peft import PeftModel


class Eigenfactors(NamedTuple):
    """One matrix's eigenvectors Q_S (o, o), Q_A (i, i) and eigenvalues (o,), (i,) of its covariances a token, float32."""

    q_out: Tensor
    q_in: Tensor
    out_values: Tensor
    in_values: Tensor


def fit_factors(
    model: PeftModel,
    space: LoRASpace,
    documents: Sequence[EncodedDocument],
    batch_tokens: int,
    seed: int,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> dict[str, Eigenfactors]:
    """The eigendecomposition of every matrix's covariances, in float64; on the first rank alone, nothing on the others."""
    sink = CovarianceSink(space)
    sampled_pass(model, space, documents, batch_tokens, seed, sink, progress, "factors", ranks)
    ranks.add(sink.tokens, *sink.out.values(), *sink.inp.values())
    factors = {}
    for tensor in space.tensors if ranks.first else ():
        out_values, q_out = _eigh(sink.out.pop(tensor.key) / sink.tokens)
        in_values, q_in = _eigh(sink.inp.pop(tensor.key) / sink.tokens)
        factors[tensor.key] = Eigenfactors(q_out, q_in, out_values, in_values)
    return factors


def factors_to_tensors(factors: Mapping[str, Eigenfactors]) -> dict[str, Tensor]:
    """For safetensors; `factors_from_tensors` reads it back."""
    return {f"{key}.{name}": value for key, f in factors.items() for name, value in f._asdict().items()}


def factors_from_tensors(tensors: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Eigenfactors]:
    """Raises KeyError if `tensors` lacks one of the matrices `keys`."""
    return {key: Eigenfactors(*(tensors[f"{key}.{name}"] for name in Eigenfactors._fields)) for key in keys}


def kronecker_eigenvalues(factors: Mapping[str, Eigenfactors]) -> dict[str, Tensor]:
    """λ_oi = λ_o λ_i (o, i) float64 of every matrix: exact only if activations and output gradients were independent."""
    return {key: torch.outer(f.out_values.double(), f.in_values.double()) for key, f in factors.items()}


def fit_eigenvalues(
    model: PeftModel,
    space: LoRASpace,
    factors: Mapping[str, Eigenfactors],
    documents: Sequence[EncodedDocument],
    batch_tokens: int,
    seed: int,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """λ (o, i) float64 of every matrix, in nats a token per squared unit of parameter."""
    sink = EigenvalueSink(factors)
    sampled_pass(model, space, documents, batch_tokens, seed, sink, progress, "eigenvalues", ranks)
    ranks.add(*sink.squares.values())
    tokens = sum(len(document.response_ids) for document in documents)
    return {key: total / tokens for key, total in sink.squares.items()}


def fit_projection(
    space: LoRASpace, factors: Mapping[str, Eigenfactors], eigenvalues: Mapping[str, Tensor], config: CurvatureConfig
) -> Projection:
    """Keeps the `components` largest eigenvalues of every matrix."""
    return Projection(space, {
        key: MatrixBasis.of(f.q_out, f.q_in, eigenvalues[key], config.components, config.damping,
                            relative=not config.absolute_damping)
        for key, f in factors.items()
    })  # fmt: skip


class BatchSink(Protocol):
    """A sink that is told which batch comes next."""

    def start(self, batch: Batch) -> None: ...

    def __call__(self, key: str, x: Tensor, delta: Tensor) -> None: ...


def sampled_pass(
    model: PeftModel,
    space: LoRASpace,
    documents: Sequence[EncodedDocument],
    batch_tokens: int,
    seed: int,
    sink: BatchSink,
    progress: Progress,
    name: str,
    ranks: Ranks = ALONE,
) -> None:
    """One backward pass a batch, of this rank's share, of the summed cross-entropy of sampled labels; `sink` sees every
    matrix. `name` is the stage's, for `progress`."""
    groups = ranks.share(plan_batches(documents, batch_tokens))
    with gradient_hooks(model, space, sink), progress.task(name, sum(map(len, groups)), "documents") as bar:
        for group in groups:
            batch = collate(group).to(model.device)
            sink.start(batch)
            logits = label_logits(model, batch)
            sum_losses(logits, batch, sample_labels(logits.detach(), batch, seed)).sum().backward()
            bar.advance(len(group))


def sample_labels(logits: Tensor, batch: Batch, seed: int) -> Tensor:
    """(n,) labels drawn from the model's own next-token distributions; per document from (seed, row) alone."""
    probabilities = torch.softmax(logits.float(), dim=-1).cpu()
    labels, start = [], 0
    for document in batch.documents:
        stop = start + len(document.response_ids)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + document.row)
        labels.append(torch.multinomial(probabilities[start:stop], 1, generator=generator).squeeze(1))
        start = stop
    return torch.cat(labels).to(logits.device)


class CovarianceSink:
    """Sums Σ x xᵀ (i, i) and Σ δ δᵀ (o, o) over tokens in float64. Padding has δ = 0, and is masked out of x."""

    def __init__(self, space: LoRASpace) -> None:
        self.out = {t.key: torch.zeros(t.shape[0], t.shape[0], dtype=torch.float64) for t in space.tensors}
        self.inp = {t.key: torch.zeros(t.shape[1], t.shape[1], dtype=torch.float64) for t in space.tensors}
        self._mask: Tensor | None = None
        self.tokens = torch.zeros((), dtype=torch.int64)

    def start(self, batch: Batch) -> None:
        """Tells the sink which positions of the next backward pass are real tokens."""
        self._mask = batch.attention_mask.bool()
        self.tokens += batch.attention_mask.sum().cpu()

    def __call__(self, key: str, x: Tensor, delta: Tensor) -> None:
        tokens, gradients = x[self._mask], delta[self._mask]  # (tokens, i), (tokens, o)
        self.inp[key] += (tokens.T @ tokens).cpu()
        self.out[key] += (gradients.T @ gradients).cpu()


class EigenvalueSink:
    """Sums (q_oᵀ G_i q_i)² over documents, (o, i) float64 a matrix."""

    def __init__(self, factors: Mapping[str, Eigenfactors]) -> None:
        self.factors = factors
        self.squares = {
            key: torch.zeros(len(f.out_values), len(f.in_values), dtype=torch.float64) for key, f in factors.items()
        }

    def start(self, batch: Batch) -> None:
        """Nothing: padding has δ = 0, so it adds nothing to a document's gradient."""

    def __call__(self, key: str, x: Tensor, delta: Tensor) -> None:
        q_out, q_in = self.factors[key].q_out.to(x.device), self.factors[key].q_in.to(x.device)
        gradients = torch.einsum("bto,bti->boi", delta, x)
        rotated = torch.einsum("op,boi->bpi", q_out, gradients) @ q_in  # (b, o, i) in the eigenbasis
        self.squares[key] += rotated.square().sum(0).cpu().double()


def _eigh(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and orthonormal columns, each with its largest entry positive (so that reruns agree)."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0), vectors.flip(1)
    pivots = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values.clamp_min(0).float(), (vectors * pivots.sign()).float()
