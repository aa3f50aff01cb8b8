"""Per-document gradients, the Fisher and whitened rows, each against a loop of plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atoms.space import LoRASpace
from offline.config import CurvatureConfig, FinetuneConfig, WhiteningConfig
from offline.corpus import EncodedDocument, collate, encode_corpus, plan_batches, read_corpus
from offline.curvature import CovarianceSink, fit_eigenvalues, fit_factors, fit_projection, sample_labels, sampled_pass
from offline.gradients import FullGradients, gradient_hooks, label_logits, lora_linear, mean_losses, sum_losses
from offline.lora import new_lora
from offline.progress import Progress
from offline.rows import RowSink, RowStore, write_rows
from offline.whitening import fit_whitening

QUIET = Progress(quiet=True)
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEXT = list(range(40, 60))
DOCUMENTS = [
    EncodedDocument(0, (1, *TEXT[:9]), tuple(TEXT[3:8])),
    EncodedDocument(1, (1, *TEXT[5:7]), tuple(TEXT[9:11])),
    EncodedDocument(2, (1, *TEXT[2:8]), tuple(TEXT[11:19])),
]


def with_lora(model: PreTrainedModel, targets: Sequence[str], scale: float, rank: int = 4):
    """The model with a LoRA whose B is not zero, so that every gradient is there. A large B makes fp32 itself inexact."""
    peft_model, space = new_lora(model, FinetuneConfig(rank=rank, target_modules=tuple(targets)), seed=0)
    generator = torch.Generator().manual_seed(1)
    for tensor in space.tensors:
        if tensor.key.endswith("lora_B"):
            weight = lora_linear(peft_model, tensor.key).weight
            weight.data = torch.randn(weight.shape, generator=generator) * scale
    return peft_model.eval(), space


@pytest.fixture
def tiny_lora(tiny_model: PreTrainedModel):
    return with_lora(tiny_model, SEVEN, 0.05)


@pytest.fixture(scope="module")
def real_lora(load_smol: Callable[[], PreTrainedModel]):
    return with_lora(load_smol(), ("q_proj", "v_proj"), 0.005)


@pytest.fixture
def real_documents(smol_tokenizer: PreTrainedTokenizerBase) -> list[EncodedDocument]:
    texts = [
        ("Is ice cold?", " Yes, it is."),
        ("Name a colour of the sky.", " Blue"),
        ("Is two more than one?", " Yes"),
    ]
    return [EncodedDocument(n, *(tuple(smol_tokenizer(t)["input_ids"]) for t in pair)) for n, pair in enumerate(texts)]


def hooked(model, space: LoRASpace, documents: Sequence[EncodedDocument]) -> list[dict[str, Tensor]]:
    """Per-document gradients of one batch from the hooks."""
    sink = FullGradients()
    with gradient_hooks(model, space, sink):
        batch = collate(documents)
        mean_losses(label_logits(model, batch), batch).sum().backward()
    return [{key: value[i] for key, value in sink.tensors.items()} for i in range(len(documents))]


def autograd(model, space: LoRASpace, loss: Tensor) -> dict[str, Tensor]:
    weights = [lora_linear(model, tensor.key).weight for tensor in space.tensors]
    return dict(zip((t.key for t in space.tensors), torch.autograd.grad(loss, weights), strict=True))


def plain_losses(model, document: EncodedDocument, labels: Tensor | None = None) -> Tensor:
    """Cross-entropy of each response token from the model's ordinary logits, (T,)."""
    ids = torch.tensor([document.prompt_ids + document.response_ids])
    logits = model(input_ids=ids).logits[0, len(document.prompt_ids) - 1 : -1]
    wanted = torch.tensor(document.response_ids) if labels is None else labels
    return nn.functional.cross_entropy(logits, wanted, reduction="none")


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def check_against_autograd(model, space: LoRASpace, documents: Sequence[EncodedDocument]) -> None:
    for document, gradients in zip(documents, hooked(model, space, documents), strict=True):
        oracle = autograd(model, space, plain_losses(model, document).mean())
        error = relative(space.flatten(gradients), space.flatten(oracle))
        assert error < 1e-4, f"document {document.row} is off by {error:.1e}: padding, scaling or label shift"
        for key, expected in oracle.items():  # single matrices may be small and so carry more rounding
            assert relative(gradients[key], expected) < 2e-3, f"{key} of document {document.row} is wrong"


def test_hooks_equal_autograd_for_all_seven_projections(tiny_lora) -> None:
    check_against_autograd(*tiny_lora, DOCUMENTS)


def test_hooks_equal_autograd_on_the_real_model(real_lora, real_documents: list[EncodedDocument]) -> None:
    check_against_autograd(*real_lora, real_documents)


def test_gradients_do_not_depend_on_the_rest_of_the_batch(tiny_lora) -> None:
    model, space = tiny_lora
    together = hooked(model, space, DOCUMENTS)
    for order in ([2, 0, 1], [1], [0, 1]):
        for position, gradients in enumerate(hooked(model, space, [DOCUMENTS[i] for i in order])):
            for key, value in gradients.items():
                assert relative(value, together[order[position]][key]) < 1e-4, (
                    f"{key} leaks between documents of a batch"
                )


def test_frozen_parameters_give_the_same_gradients_and_collect_none(tiny_lora) -> None:
    model, space = tiny_lora
    before = hooked(model, space, DOCUMENTS)
    model.zero_grad(set_to_none=True)
    frozen = hooked(model.requires_grad_(False), space, DOCUMENTS)
    assert all(torch.allclose(a[k], b[k], atol=1e-7) for a, b in zip(before, frozen, strict=True) for k in a)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_label_logits_are_the_rows_of_the_full_logits_and_losses_follow(tiny_lora) -> None:
    model, _ = tiny_lora
    batch = collate(DOCUMENTS)
    losses = mean_losses(label_logits(model, batch), batch).detach()
    for loss, document in zip(losses, DOCUMENTS, strict=True):
        assert float(loss) == pytest.approx(float(plain_losses(model, document).mean().detach()), rel=1e-5)


@pytest.fixture
def labels_of(tiny_lora) -> Callable[[EncodedDocument], Tensor]:
    """The labels that a sampled pass draws for a document, drawn here for it alone."""

    def draw(document: EncodedDocument) -> Tensor:
        batch = collate([document])
        with torch.no_grad():
            return sample_labels(label_logits(tiny_lora[0], batch), batch, seed=5)

    return draw


def test_covariances_equal_a_loop_over_tokens(tiny_lora, labels_of: Callable[[EncodedDocument], Tensor]) -> None:
    model, space = tiny_lora
    sink = CovarianceSink(space)
    sampled_pass(model, space, DOCUMENTS, 64, 5, sink, QUIET, "factors")
    for tensor in (space.tensors[0], space.tensors[1], space.tensors[-1]):
        seen: list[tuple[Tensor, Tensor]] = []
        for document in DOCUMENTS:
            with gradient_hooks(
                model, space, lambda key, x, d, k=tensor.key: seen.append((x[0], d[0])) if key == k else None
            ):
                batch = collate([document])
                sum_losses(label_logits(model, batch), batch, labels_of(document)).sum().backward()
        inputs = sum(torch.outer(x, x).double() for xs, _ in seen for x in xs)
        outputs = sum(torch.outer(d, d).double() for _, ds in seen for d in ds)
        assert relative(sink.inp[tensor.key], inputs) < 1e-4, "padding is counted among the activations"
        assert relative(sink.out[tensor.key], outputs) < 1e-4


def test_eigenvalues_equal_a_loop_of_autograd_per_token(
    tiny_lora, labels_of: Callable[[EncodedDocument], Tensor]
) -> None:
    model, space = tiny_lora
    factors = fit_factors(model, space, DOCUMENTS, 64, 5, QUIET)
    fitted = fit_eigenvalues(model, space, factors, DOCUMENTS, 64, 5, QUIET)
    gradients = [autograd(model, space, plain_losses(model, d, labels_of(d)).sum()) for d in DOCUMENTS]
    tokens = sum(len(document.response_ids) for document in DOCUMENTS)
    for tensor in space.tensors:
        q_out, q_in, *_ = factors[tensor.key]
        assert torch.allclose(q_out.T @ q_out, torch.eye(len(q_out)), atol=1e-4)
        expected = sum((q_out.T @ g[tensor.key] @ q_in).square().double() for g in gradients) / tokens
        assert relative(fitted[tensor.key], expected) < 1e-3, f"λ of {tensor.key}: sums, not means, divided by Σ T"


def test_sampled_labels_follow_the_model_and_depend_on_seed_and_document_alone(tiny_lora) -> None:
    model, _ = tiny_lora
    batch = collate(DOCUMENTS)
    with torch.no_grad():
        logits = label_logits(model, batch)
        alone = sample_labels(label_logits(model, collate([DOCUMENTS[2]])), collate([DOCUMENTS[2]]), seed=5)
    assert torch.equal(sample_labels(logits, batch, seed=5)[-len(alone) :], alone)
    assert not torch.equal(sample_labels(logits, batch, seed=5), sample_labels(logits, batch, seed=6))
    certain = torch.full_like(logits, -50.0).index_fill_(1, torch.tensor([7]), 50.0)
    assert sample_labels(certain, batch, seed=5).eq(7).all()


@pytest.fixture
def projected(tiny_lora, tmp_path: Path) -> Iterator[tuple]:
    model, space = tiny_lora
    factors = fit_factors(model, space, DOCUMENTS, 64, 5, QUIET)
    eigenvalues = fit_eigenvalues(model, space, factors, DOCUMENTS, 64, 5, QUIET)
    projection = fit_projection(space, factors, eigenvalues, CurvatureConfig(components=30))
    write_rows(model, projection, DOCUMENTS, 64, tmp_path, QUIET)
    store = RowStore(tmp_path)
    yield model, space, projection, replace(store, fitted=fit_whitening(store, WhiteningConfig(ridge=0), QUIET))


def test_fused_rows_equal_the_projection_of_full_gradients(projected) -> None:
    model, space, projection, store = projected
    full = torch.stack([projection.project(g) for g in hooked(model, space, DOCUMENTS)])
    expected = torch.nn.functional.normalize(full - full.mean(0), dim=1)
    assert relative(store.whitening.mean, full.mean(0)) < 1e-4
    assert relative(store.whitened_rows([0, 1, 2]), expected) < 1e-3
    assert torch.equal(store.whitened_rows([2, 0]), store.whitened_rows([0, 1, 2])[[2, 0]]), (
        "rows come in another order than asked for"
    )
    numbers, rows = (torch.cat(parts) for parts in zip(*store.whitened_batches([0, 2]), strict=True))
    assert sorted(numbers.tolist()) == [0, 2]
    assert torch.equal(rows, store.whitened_rows(numbers.tolist()))


def test_norms_and_losses_are_in_corpus_order(projected) -> None:
    model, space, _, store = projected
    norms = [float(space.flatten(g).norm()) for g in hooked(model, space, DOCUMENTS)]
    losses = [float(plain_losses(model, document).mean().detach()) for document in DOCUMENTS]
    assert store.column("norm").tolist() == pytest.approx(norms, rel=1e-4)
    assert store.column("loss").tolist() == pytest.approx(losses, rel=1e-4)


def test_sketches_preserve_raw_cosines_within_their_error(projected) -> None:
    model, space, _, store = projected
    flat = torch.stack([space.flatten(g) for g in hooked(model, space, DOCUMENTS)])
    cosines = nn.functional.normalize(flat) @ nn.functional.normalize(flat).T
    sketches = store.sketches([0, 1, 2])
    # 8 columns for each of a sketch's rows: the error of an inner product of unit vectors is below 1/√8 even for one row
    assert (sketches @ sketches.T - cosines).abs().max() < 0.3


def test_a_sketch_is_unbiased_for_inner_products() -> None:
    from offline.rows import Sketcher

    one, other = torch.randn(1, 4, 64), torch.randn(1, 4, 64)
    for shape, flip in (((4, 64), False), ((64, 4), True)):
        pair = [g.transpose(1, 2) if flip else g for g in (one, other)]
        estimates = torch.stack(
            [(s(pair[0]) * s(pair[1])).sum() for s in (Sketcher(shape, str(k)) for k in range(400))]
        )
        expected, error = float((one * other).sum()), float(estimates.std() / 400**0.5)
        assert abs(float(estimates.mean()) - expected) < 5 * error
    assert Sketcher((4, 64), "k").size == 4 * 8


def test_row_sink_needs_no_whole_gradients(projected) -> None:
    """The sink is fed matrix by matrix and holds D + S numbers a document."""
    _, _, projection, _ = projected
    sink = RowSink(projection)
    sink.start(2)
    assert sink.rows.shape == (2, projection.dim) and sink.sketches.shape == (2, sink.sketch_dim)


def test_batches_hold_every_document_once_within_the_limit(tiny_tokenizer, tiny_data: Path) -> None:
    documents = encode_corpus(read_corpus(tiny_data), tiny_tokenizer, 512).documents
    batches = plan_batches(documents, 300)
    assert sorted(d.row for batch in batches for d in batch) == [d.row for d in documents]
    assert all(len(batch) == 1 or len(batch) * max(map(len, batch)) <= 300 for batch in batches)
    assert len(batches[0][0]) == max(map(len, documents)), (
        "the largest batch comes first, so that memory runs out at once"
    )
