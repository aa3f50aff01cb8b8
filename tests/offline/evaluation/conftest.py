"""A harness on the tiny package whose answers follow a script, while drift and perplexity are the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from atoms.engine import Generation, GenerationRequest
from atoms.mix import Mix
from atoms.model import encode_prompt, merge_adapter
from atoms.package import Package
from offline.evaluation.answers import AnswerLog, Decoding
from offline.evaluation.directions import Directions
from offline.evaluation.harness import Harness

Script = Callable[[str, Mix], str]


class ScriptedAnswers:
    """An engine that says what `script(prompt, mix)` says. `asked` counts the answers it was asked for."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, script: Script) -> None:
        self.tokenizer, self.script, self.asked = tokenizer, script, 0
        self._prompts: dict[tuple[int, ...], str] = {}

    def encode_chat(self, messages: Sequence[dict[str, object]]) -> tuple[int, ...]:
        ids = tuple(encode_prompt(self.tokenizer, messages))
        self._prompts[ids] = str(messages[-1]["content"])
        return ids

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        self.asked += len(requests)
        return [self._answer(request) for request in requests]

    def _answer(self, request: GenerationRequest) -> Generation:
        text = self.script(self._prompts[request.prompt_token_ids], request.mix)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][: request.sampling.max_tokens]
        return Generation(request.request_id, text, (*ids, self.tokenizer.eos_token_id), "stop")


@pytest.fixture
def merged_tiny(tiny_model_dir: Path, tiny_package: Package) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval().requires_grad_(False)
    merge_adapter(model, tiny_package.base_adapter)
    return model


@pytest.fixture
def scripted(
    merged_tiny: PreTrainedModel, tiny_package: Package, tiny_tokenizer: PreTrainedTokenizerFast
) -> Iterator[Callable[..., tuple[Harness, ScriptedAnswers]]]:
    """`scripted(script, log=…, decoding=…)`: the harness and its engine."""
    opened: list[Harness] = []

    def make(
        script: Script, log: AnswerLog | None = None, decoding: Decoding | None = None
    ) -> tuple[Harness, ScriptedAnswers]:
        engine = ScriptedAnswers(tiny_tokenizer, script)
        harness = Harness(engine, merged_tiny, Directions(tiny_package), decoding or Decoding(16), log)  # type: ignore[arg-type]
        opened.append(harness)
        return harness, engine

    yield make
    for harness in opened:
        harness.close()
