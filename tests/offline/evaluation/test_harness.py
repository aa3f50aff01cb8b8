"""Drift and perplexity of the harness against plain forward passes; directions against the package's own composition."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from atoms.errors import AdapterError, MixError
from atoms.mix import Mix
from atoms.model import encode_prompt
from atoms.package import Package
from atoms.steered import SteeredModel
from offline import calibrate
from offline.evaluation.answers import Answer
from offline.evaluation.directions import Directions

PROMPTS = ("Why is the sea salty?", "Name a river.", "Is it far?")
TEXTS = ("Rain carries salt.", "The Rhine flows north to the sea.", "No.")


@pytest.fixture
def answers(tiny_tokenizer: PreTrainedTokenizerFast) -> list[Answer]:
    ids = [tuple(tiny_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    return [Answer(p, Mix(), t, i, "stop") for p, t, i in zip(PROMPTS, TEXTS, ids, strict=True)]


def log_probs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, answer: Answer) -> torch.Tensor:
    """(T, V) at the positions that predict the answer's tokens, one answer at a time, unpadded."""
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": answer.prompt}])
    ids = torch.tensor([[*prompt, *answer.token_ids]])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0]
    return torch.log_softmax(logits.float(), -1)[len(prompt) - 1 : -1]


def test_perplexity_is_that_of_every_answer_alone(
    scripted: Callable, merged_tiny: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, answers: list[Answer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    harness, _ = scripted(lambda prompt, mix: "")
    nll = [-log_probs(merged_tiny, tiny_tokenizer, a)[range(len(a.token_ids)), list(a.token_ids)] for a in answers]
    expected = math.exp(float(torch.cat(nll).mean()))
    assert harness.perplexity(answers) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(calibrate, "_LOGITS_BYTES", 1)  # a document at a time
    assert harness.perplexity(answers) == pytest.approx(expected, rel=1e-5)


def test_kl_is_that_of_unsteered_and_steered_forwards(
    scripted: Callable, merged_tiny: PreTrainedModel, tiny_package: Package, tiny_tokenizer: PreTrainedTokenizerFast,
    answers: list[Answer],
) -> None:  # fmt: skip
    harness, _ = scripted(lambda prompt, mix: "")
    mix = Mix.of({tiny_package.manifest.atoms[0].id: 2.0, tiny_package.manifest.atoms[-1].id: -1.0})
    base = [log_probs(merged_tiny, tiny_tokenizer, a) for a in answers]
    steered = SteeredModel(merged_tiny, tiny_package.base_adapter.space, 1)
    steered.set_slot(0, tiny_package.bank.compose(mix, tiny_package.composition))
    with steered.rows([0]):
        moved = [log_probs(merged_tiny, tiny_tokenizer, a) for a in answers]
    steered.close()
    total = sum(float((b.exp() * (b - m)).sum()) for b, m in zip(base, moved, strict=True))
    expected = total / sum(map(len, base))
    assert expected > 0.01, "the mix does nothing"
    assert harness.kl(harness.meter(answers), mix) == pytest.approx(expected, rel=1e-4)
    assert harness.kl(harness.meter(answers), Mix()) == 0.0


def test_drift_is_refused_along_steered_answers(scripted: Callable, answers: list[Answer]) -> None:
    harness, _ = scripted(lambda prompt, mix: "")
    moved = Answer(answers[0].prompt, Mix.of({"a-00000001": 1}), "x", (5,), "stop")
    with pytest.raises(ValueError, match="unsteered"):
        harness.meter([moved])


def test_directions_compose_atoms_and_additions(tiny_package: Package) -> None:
    directions = Directions(tiny_package)
    first, second = (card.id for card in tiny_package.manifest.atoms[:2])
    plain = Mix.of({first: 1.5})
    assert directions.digest(plain) == tiny_package.digest(plain)
    copy = directions.add("copy", tiny_package.bank.direction(Mix.of({second: 1.0})))
    mixed, expected = Mix.of({first: 1.5, "copy": -2.0}), Mix.of({first: 1.5, second: -2.0})
    ours, theirs = directions.compose(mixed), tiny_package.bank.compose(expected, tiny_package.composition)
    assert ours is not None and theirs is not None
    for name, factors in theirs.items():
        torch.testing.assert_close(
            ours[name].lora_B @ ours[name].lora_A, factors.lora_B @ factors.lora_A, rtol=1e-4, atol=1e-6
        )
    assert directions.compose(copy) is not None and directions.compose(Mix()) is None


def test_a_digest_follows_the_direction_not_its_name(tiny_package: Package) -> None:
    one, two = (tiny_package.bank.direction(Mix.of({card.id: 1.0})) for card in tiny_package.manifest.atoms[:2])
    digests = []
    for direction in (one, two, one):
        directions = Directions(tiny_package)
        digests.append(directions.digest(directions.add("control", direction)))
    assert digests[0] == digests[2] != digests[1]


def test_additions_must_be_new_and_fit(tiny_package: Package, tmp_path: Path) -> None:
    directions = Directions(tiny_package)
    direction = tiny_package.bank.direction(Mix.of({tiny_package.manifest.atoms[0].id: 1.0}))
    with pytest.raises(MixError, match=tiny_package.manifest.atoms[0].id):
        directions.add(tiny_package.manifest.atoms[0].id, direction)
    with pytest.raises(AdapterError):
        directions.add("short", dict(list(direction.items())[1:]))
