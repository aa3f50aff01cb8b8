"""Free-running answers: batched over prompts and mixes, and each generated only once.

Takes any `Engine`; knows no package, detector or statistic. What a mix means is the business of `digest`, which names a
mix's weights: an answer in the log stands for (digest, prompt, decoding, sample, dtype).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from atoms.engine import Engine, FinishReason, GenerationRequest, SamplingParams, decoding_name
from atoms.errors import ConfigError, DataError
from atoms.mix import Mix
from atoms.storage import canonical_hash, storage_errors

_BATCH = 128
"""Answers generated, then written, at once: what a kill can lose."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How answers are decoded: `temperature` 0 is greedy.

    Sampled answers to a prompt are drawn with a seed that depends on `seed` and the prompt alone, so mixes are compared
    with the same random numbers. Further samples of a prompt have seeds of their own. Raises ConfigError for values outside
    what the API takes.
    """

    max_tokens: int = 48
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"temperature is {self.temperature}; it must be within 0 (greedy) and 2")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (1: off)")
        if self.top_p < 1 and self.temperature == 0:
            raise ConfigError(f"top_p is {self.top_p}, but temperature 0 is greedy; give a temperature above 0 as well")

    def sampling(self, prompt: str, sample: int = 0) -> SamplingParams:
        """The sampling parameters of answer number `sample` to `prompt`."""
        if self.temperature == 0:
            return SamplingParams(max_tokens=self.max_tokens, temperature=0.0)
        own = int(canonical_hash([prompt, *self._seeds(sample)])[:8], 16)
        return SamplingParams(self.max_tokens, self.temperature, self.top_p, seed=own)

    def __str__(self) -> str:
        return decoding_name(self.temperature, self.top_p)

    def identity(self, sample: int = 0) -> list[float]:
        """What tells its answers from others: nothing but the length of greedy ones, which have no seed."""
        return [self.max_tokens, *([self.temperature, self.top_p, *self._seeds(sample)] if self.temperature else [])]

    def _seeds(self, sample: int) -> list[int]:
        return [self.seed, sample] if sample else [self.seed]


class Question(NamedTuple):
    """What is asked: answer number `sample` to a prompt under a mix."""

    prompt: str
    mix: Mix
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """`token_ids` includes the end token, if the answer ended by itself."""

    prompt: str
    mix: Mix
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


class AnswerLog:
    """Answers by key, appended to a JSON-lines file in synced batches. A line that a kill tore is dropped.

    Raises DataError if a whole line of the file is no answer, StorageError if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, dict] = {}
        if path.exists():
            self._read()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Mapping | None:
        return self._known.get(key)

    def append(self, records: Sequence[dict]) -> None:
        """Writes records (each with its `key`) and waits until they are on the disk."""
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
                file.flush()
                os.fsync(file.fileno())
        self._known.update((record["key"], record) for record in records)

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                self._known[record["key"]] = record
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{self.path}, line {number} is no answer ({error}); delete the file to start anew"
                ) from None
        if whole < len(data):
            with storage_errors(self.path):
                os.truncate(self.path, whole)


class Answerer:
    """Answers prompts under mixes with an engine; asks it only for what the log does not hold.

    `digest` names a mix's weights, and `identity` whatever else decides an answer, such as the dtype.
    """

    def __init__(
        self,
        engine: Engine,
        digest: Callable[[Mix], str],
        decoding: Decoding,
        log: AnswerLog | None = None,
        identity: str = "",
    ) -> None:
        self.decoding = decoding
        self._engine, self._digest, self._log, self._identity = engine, digest, log, identity

    def answer(
        self, prompts: Sequence[str], mixes: Sequence[Mix], advance: Callable[[int], None] = lambda _: None
    ) -> list[list[Answer]]:
        """One list a mix, in the order of `prompts`. `advance` is told how many answers were added.

        Different mixes share a batch, so that answers that end early leave no slot idle.
        """
        answers = self.answer_questions([Question(prompt, mix) for mix in mixes for prompt in prompts], advance)
        return [answers[n * len(prompts) : (n + 1) * len(prompts)] for n in range(len(mixes))]

    def answer_questions(
        self, questions: Sequence[Question], advance: Callable[[int], None] = lambda _: None
    ) -> list[Answer]:
        """One answer a question, in order."""
        keys = [self._key(question) for question in questions]
        found: dict[str, Answer] = {}
        missing: dict[str, Question] = {}
        for key, question in zip(keys, questions, strict=True):
            record = self._log.get(key) if self._log is not None else None
            if record is None:
                missing[key] = question
            else:
                found[key] = Answer(
                    question.prompt, question.mix, record["text"], tuple(record["token_ids"]), record["finish_reason"]
                )
        advance(len(questions) - len(missing))
        order = list(missing.items())
        for start in range(0, len(order), _BATCH):
            chunk = order[start : start + _BATCH]
            found.update(self._generate(chunk))
            advance(len(chunk))
        return [found[key] for key in keys]

    def _generate(self, chunk: Sequence[tuple[str, Question]]) -> dict[str, Answer]:
        requests = [
            GenerationRequest(
                key,
                self._engine.encode_chat([{"role": "user", "content": question.prompt}]),
                question.mix,
                self.decoding.sampling(question.prompt, question.sample),
            )
            for key, question in chunk
        ]
        answers = {
            key: Answer(question.prompt, question.mix, g.text, g.token_ids, g.finish_reason)
            for (key, question), g in zip(chunk, self._engine.generate(requests), strict=True)
        }
        if self._log is not None:
            self._log.append([self._record(key, answer) for key, answer in answers.items()])
        return answers

    def _record(self, key: str, answer: Answer) -> dict:
        return {"key": key, "mix": self._digest(answer.mix), "coefficients": answer.mix.as_dict(),
                "prompt": answer.prompt, "text": answer.text, "token_ids": list(answer.token_ids),
                "finish_reason": answer.finish_reason}  # fmt: skip

    def _key(self, question: Question) -> str:
        decoded = self.decoding.identity(question.sample)
        return canonical_hash([self._digest(question.mix), question.prompt, *decoded, self._identity])
