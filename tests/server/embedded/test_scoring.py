"""Scoring answers beside serving: the exact value, and requests first."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from atoms.adapter import Delta
from atoms.engine import GenerationRequest, SamplingParams
from atoms.errors import EngineError, EngineStoppedError
from atoms.mix import Mix
from atoms.model import find_linear
from server.embedded import batcher
from server.embedded.engine import EmbeddedEngine

MakeEngine = Callable[..., EmbeddedEngine]
MIX = Mix.of({"a": 1.0})
PROMPT, RESPONSE = tuple(range(100, 140)), tuple(range(7, 30))


def oracle(model: PreTrainedModel, delta: Delta, prompt: tuple[int, ...], response: tuple[int, ...]) -> float:
    """Whole sequences, the delta merged into the weights of a copy, KL in float64."""
    merged = copy.deepcopy(model)
    for name, factors in delta.items():
        find_linear(merged, name).weight.data += factors.scaling * (factors.lora_B @ factors.lora_A)
    tokens = torch.tensor([[*prompt, *response]])
    with torch.inference_mode():
        ours, theirs = (m(tokens).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for m in (model, merged))
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


@pytest.mark.parametrize("prefill", [2, 24, 4096])
@pytest.mark.parametrize("lengths", [(40, 23), (1, 1), (1, 23), (40, 1)])
def test_chunks_add_up_to_the_exact_divergence(
    tiny: PreTrainedModel, make_engine: MakeEngine, compose_for: Callable, prefill: int, lengths: tuple[int, int]
) -> None:
    prompt, response = PROMPT[: lengths[0]], RESPONSE[: lengths[1]]
    engine = make_engine(tiny, prefill_tokens_per_step=prefill)
    found = engine.drift(prompt, response, MIX).result(60)
    engine.close()
    delta = compose_for(tiny)(MIX)
    assert found == pytest.approx(oracle(tiny, delta, prompt, response), rel=1e-4) and found > 1e-4


def test_a_large_vocabulary_is_scored_in_smaller_chunks(
    tiny: PreTrainedModel, make_engine: MakeEngine, compose_for: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher, "_SCORED_LOGITS", 3 * tiny.config.vocab_size)
    rows: list[int] = []
    handle = tiny.lm_head.register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0].shape[1]))
    found = make_engine(tiny).drift(PROMPT, RESPONSE, MIX).result(60)
    handle.remove()
    assert max(rows) == 3 and sum(rows) >= 2 * len(RESPONSE)
    assert found == pytest.approx(oracle(tiny, compose_for(tiny)(MIX), PROMPT, RESPONSE), rel=1e-4)


def test_an_unsteered_mix_does_not_drift(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    assert make_engine(tiny).drift(PROMPT, RESPONSE, Mix()).result(60) == 0.0


def test_requests_come_first(tiny: PreTrainedModel, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """More requests than slots, and scores asked for before them: what is scored takes neither a slot nor a turn."""
    engine = make_engine(tiny, slots=2, prefill_tokens_per_step=8)
    inner = engine._batcher
    score, seen = inner._score, []

    def noted() -> None:
        seen.append((inner.free, len(inner._arrived), inner._group))
        score()

    monkeypatch.setattr(inner, "_score", noted)
    sampling = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    requests = [GenerationRequest(str(n), PROMPT, Mix.of({"b": float(n)}), sampling) for n in range(5)]
    scores = [engine.drift(PROMPT, RESPONSE, MIX) for _ in range(3)]
    engine.generate(requests)
    assert [value.result(60) for value in scores] == pytest.approx([scores[0].result()] * 3)
    assert seen and all(free >= 1 and not arrived and group is None for free, arrived, group in seen)


def test_a_score_between_steps_leaves_rows_alone(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, slots=4, prefill_tokens_per_step=16)
    sampling = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    requests = [GenerationRequest(str(n), PROMPT[n:], Mix.of({"b": float(n)}), sampling) for n in range(3)]
    alone = [engine.generate([request])[0].token_ids for request in requests]
    once = engine.drift(PROMPT, RESPONSE, MIX).result(60)
    scores = [engine.drift(PROMPT, RESPONSE, MIX) for _ in range(3)]
    assert [answer.token_ids for answer in engine.generate(requests)] == alone
    assert [score.result(60) for score in scores] == pytest.approx([once] * 3, rel=1e-5)


def test_what_cannot_be_scored_harms_nobody(tiny: PreTrainedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny, slots=1)
    for prompt, response in (((), RESPONSE), (PROMPT, ())):
        with pytest.raises(EngineError, match="empty"):
            engine.drift(prompt, response, MIX)
    with pytest.raises(EngineError, match="broken"):
        engine.drift(PROMPT, RESPONSE, Mix.of({"broken": 1.0})).result(60)
    cancelled = engine.drift(PROMPT, RESPONSE, MIX)
    cancelled.cancel()
    assert engine.drift(PROMPT, RESPONSE, MIX).result(60) > 0 and engine.healthy
    left = [engine.drift(PROMPT * 20, RESPONSE, MIX) for _ in range(20)]
    left[-1].cancel()
    engine.close()
    assert left[-1].done() and any(isinstance(score.exception(), EngineStoppedError) for score in left[:-1])
    with pytest.raises(EngineStoppedError):
        engine.drift(PROMPT, RESPONSE, MIX)
