"""Paths: the steps against a loop of plain autograd, what documents are prepared to, and that θ0 comes back."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel

from offline import paths
from offline.config import FinetuneConfig, SteeringConfig
from offline.corpus import EncodedDocument
from offline.dictionary import Codes
from offline.gradients import lora_linear
from offline.lora import new_lora
from offline.paths import PathMaker, moved, prepared

POOL = [
    EncodedDocument(row, (1, *range(30 + row, 36 + row)), tuple(range(50 + row, 50 + row + length)))
    for row, length in enumerate((3, 9, 5, 14, 2, 7))
]


@pytest.fixture
def tiny_lora(tiny_model: PreTrainedModel):
    """The tiny model with a LoRA whose B is not zero, so that every gradient is there."""
    model, space = new_lora(tiny_model, FinetuneConfig(rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    for tensor in space.tensors:
        if tensor.key.endswith("lora_B"):
            weight = lora_linear(model, tensor.key).weight
            weight.data = torch.randn(weight.shape, generator=generator) * 0.05
    return model.eval().requires_grad_(False), space


def test_every_other_document_has_another_prompt_and_all_are_cut() -> None:
    made = prepared(POOL, POOL, 4, len(POOL))
    prompts = {document.prompt_ids for document in POOL}
    assert [document.response_ids for document in made] == [document.response_ids[:4] for document in POOL]
    assert [made[n].prompt_ids for n in (0, 2, 4)] == [POOL[n].prompt_ids for n in (0, 2, 4)]
    assert {document.prompt_ids for document in made} <= prompts
    assert any(made[n].prompt_ids != POOL[n].prompt_ids for n in (1, 3, 5))
    assert prepared(POOL, POOL, 4, len(POOL)) == made, "the choice of prompts is not repeatable"


def test_few_documents_are_taken_both_ways_and_never_more_than_asked_for() -> None:
    made = prepared(POOL[:3], POOL, 99, 8)
    assert [document.row for document in made] == [0, 1, 2, 0, 1, 2]
    own = [document.prompt_ids == POOL[document.row].prompt_ids for document in made]
    assert own[0] and own[2] and own[4], "a document was not taken with its own prompt"
    assert len(prepared(POOL, POOL, 4, 7)) == 7


def test_no_prepared_document_is_longer_than_the_corpus_has_them() -> None:
    pool = [EncodedDocument(0, tuple(range(1, 11)), (5,)), EncodedDocument(1, (1, 2), (7, 8, 9, 10, 11, 12))]
    exchanged = prepared([pool[0], pool[1], pool[1], pool[1]], pool, 6, 4)
    assert max(map(len, exchanged)) <= 11 and all(document.prompt_ids for document in exchanged)


def plain_gradient(model, space, documents) -> dict[str, torch.Tensor]:
    """Mean over documents of the gradient of the mean loss, one document at a time, by plain autograd."""
    weights = [lora_linear(model, tensor.key).weight.requires_grad_() for tensor in space.tensors]
    total = [torch.zeros_like(weight) for weight in weights]
    for document in documents:
        ids = torch.tensor([document.prompt_ids + document.response_ids])
        logits = model(input_ids=ids).logits[0, len(document.prompt_ids) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(document.response_ids))
        total = [a + b / len(documents) for a, b in zip(total, torch.autograd.grad(loss, weights), strict=True)]
    for weight in weights:
        weight.requires_grad_(False)
    return dict(zip((tensor.key for tensor in space.tensors), total, strict=True))


def length_of(direction) -> float:
    return math.sqrt(sum(float(value.square().sum()) for value in direction.values()))


def at_right_angles(gradient, shared) -> dict[str, torch.Tensor]:
    """−gradient without its part along `shared`, from all numbers as one vector."""
    g, s = (torch.cat([tensors[key].flatten() for key in gradient]) for tensors in (gradient, shared))
    left = -(g - s * torch.linalg.lstsq(s[:, None], g[:, None]).solution[0])
    parts = left.split([value.numel() for value in gradient.values()])
    return {key: part.view_as(gradient[key]) for key, part in zip(gradient, parts, strict=True)}


def test_a_step_leaves_what_all_documents_share_as_it_is(tiny_lora) -> None:
    model, space = tiny_lora
    maker = PathMaker.of(model, space, POOL, SteeringConfig(steps=1, tokens=4, reference_documents=6), 64)
    step = maker.direction(POOL[:2])
    along = sum(float((step[key] * maker.shared[key]).sum()) for key in step)
    assert abs(along) < 1e-4 * length_of(step) * length_of(maker.shared)
    own = plain_gradient(model, space, prepared(POOL[:2], POOL, 4, 4))
    assert sum(float((step[key] * own[key]).sum()) for key in step) < 0, "the documents became no likelier"


def test_a_path_is_a_loop_of_equal_steps_against_the_gradient(tiny_lora) -> None:
    model, space = tiny_lora
    config = SteeringConfig(steps=3, documents=4, tokens=4, reference_documents=6)
    maker = PathMaker.of(model, space, POOL, config, batch_tokens=64)
    path = maker.direction(POOL[1:3])
    given = prepared(POOL[1:3], POOL, 4, 4)
    shared = plain_gradient(model, space, maker.reference)
    expected = {key: torch.zeros_like(value) for key, value in shared.items()}
    start = {tensor.key: lora_linear(model, tensor.key).weight.data.clone() for tensor in space.tensors}
    length = None
    for _ in range(3):
        for key, value in start.items():
            lora_linear(model, key).weight.data = value + expected[key]
        gradient = plain_gradient(model, space, given)
        down = at_right_angles(gradient, shared)
        if length is None:  # the length is the code's own: that it costs what it should is the next test
            length = maker._first_length({key: value / length_of(down) for key, value in down.items()})
        expected = {key: expected[key] + length * down[key] / length_of(down) for key in down}
    for key, value in start.items():
        lora_linear(model, key).weight.data = value
    for key, value in expected.items():
        torch.testing.assert_close(path[key], value, rtol=2e-3, atol=1e-5)


def test_the_first_step_costs_two_hundredths_of_a_nat_on_the_reference(tiny_lora, monkeypatch) -> None:
    model, space = tiny_lora
    maker = PathMaker.of(model, space, POOL, SteeringConfig(steps=1, tokens=4, reference_documents=6), 64)
    step = maker.direction(POOL[:2])
    total = tokens = 0.0
    for document in maker.reference:
        ids = torch.tensor([document.prompt_ids + document.response_ids])
        rows = slice(len(document.prompt_ids) - 1, -1)
        base = torch.log_softmax(model(input_ids=ids).logits[0, rows], -1)
        with moved(model, space, step):
            there = torch.log_softmax(model(input_ids=ids).logits[0, rows], -1)
        total += float((base.exp() * (base - there)).sum())
        tokens += len(document.response_ids)
    assert total / tokens == pytest.approx(paths._STEP_NATS, rel=0.11)


def test_a_path_makes_its_documents_likelier_and_leaves_the_model_as_it_was(tiny_lora) -> None:
    model, space = tiny_lora
    before = {tensor.key: lora_linear(model, tensor.key).weight.data.clone() for tensor in space.tensors}
    maker = PathMaker.of(model, space, POOL, SteeringConfig(steps=4, tokens=4, reference_documents=6), 64)
    path = maker.direction(POOL[:2])
    assert all(torch.equal(lora_linear(model, key).weight.data, value) for key, value in before.items())

    def loss() -> float:
        with torch.no_grad():
            return sum(
                float(
                    torch.nn.functional.cross_entropy(
                        model(input_ids=torch.tensor([d.prompt_ids + d.response_ids])).logits[
                            0, len(d.prompt_ids) - 1 : -1
                        ],
                        torch.tensor(d.response_ids),
                    )
                )
                for d in prepared(POOL[:2], POOL, 4, 4)
            )

    unsteered = loss()
    with moved(model, space, path):
        assert loss() < unsteered


def test_theta0_comes_back_even_if_a_step_fails(tiny_lora) -> None:
    model, space = tiny_lora
    key = space.tensors[0].key
    before = lora_linear(model, key).weight.data.clone()
    with (
        pytest.raises(RuntimeError, match="stopped"),
        moved(model, space, {t.key: torch.ones(t.shape) for t in space.tensors}),
    ):
        raise RuntimeError("stopped")
    assert torch.equal(lora_linear(model, key).weight.data, before)


def test_the_strongest_documents_of_an_atom_are_of_the_sign_that_weighs_more() -> None:
    codes = Codes.of_matrix(
        torch.tensor([4, 7, 9, 12]), torch.tensor([[0.2, -0.5], [0.0, 0.1], [0.9, 0.0], [0.4, -0.3]])
    )
    assert codes.strongest(0, 2) == [9, 12] and codes.strongest(0, 9) == [9, 12, 4]
    assert codes.strongest(1, 9) == [4, 12], "the document of the other sign, 7, is not of this behaviour"
    assert (codes.sign(0), codes.sign(1)) == (1, -1)


def test_held_out_documents_of_an_atom_are_on_the_side_that_weighs_more() -> None:
    """Seven documents lie on the light side with larger codes than any on the heavy one."""
    codes = Codes.of_matrix(torch.arange(9), torch.tensor([[0.9]] * 6 + [[-0.2], [-0.3], [0.0]]))
    cosine = torch.tensor([0.9] * 6 + [-0.25, -0.35, -0.1])
    assert codes.on_side(0, -1, cosine, 6) == [7, 6, 8], "codes first, then what has none and points there"
    assert codes.on_side(0, 1, cosine, 3) == [0, 1, 2]
