"""An engine without a model: it recites a script, one word a token. For tests of whatever talks to a server.

Behaves as the real one where a client can see it: bounded slots and queue, context length, errors by prompt, freed
slots, one delta a step. Its answers tell the mix they were asked for with.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from atoms.engine import EngineStats, FinishReason, Generation, GenerationRequest, Grammar, TokenDelta, TokenLogprob
from atoms.errors import EngineError, EngineOverloadedError, EngineStoppedError, RequestTooLongError
from atoms.mix import Mix

BREAK = "<break>"
"""A word of the script at which generation fails."""


@dataclass
class ScriptedEngine:
    """Recites `script` word by word, `delay` seconds apart. A word costs one token; a prompt's words are its tokens.

    `requests` are all that were submitted, `cancelled` the ids of those left before their end, `tools` the last chat's,
    `scored` what was asked for its drift, which is always `kl`.
    """

    script: str = "one two three"
    delay: float = 0.0
    slots: int = 4
    max_waiting: int = 4
    max_model_len: int = 64
    healthy: bool = True
    died: bool = False
    requests: list[GenerationRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    running: int = 0
    waiting: int = 0
    tools: Sequence[dict[str, object]] = ()
    kl: float = 0.05
    scored: list[tuple[tuple[int, ...], tuple[int, ...], Mix]] = field(default_factory=list)
    _closed: bool = False

    def encode_chat(
        self, messages: Sequence[dict[str, object]], tools: Sequence[dict[str, object]] = ()
    ) -> tuple[int, ...]:
        self.tools = tools
        return self.encode_text(" ".join(f"{message['role']}: {message['content']}" for message in messages))

    def encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(sum(word.encode()) % 997 for word in text.split())

    async def compile_grammar(self, grammar: Grammar) -> None:
        """Grammars are taken note of in `requests`; the script is recited whatever they say."""

    def drift(self, prompt: Sequence[int], response: Sequence[int], mix: Mix) -> Future[float]:
        """Recites `kl`."""
        if self._closed:
            raise EngineStoppedError("the engine is shutting down")
        self.scored.append((tuple(prompt), tuple(response), mix))
        done: Future[float] = Future()
        done.set_result(self.kl)
        return done

    async def stream(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        self._admit(request)
        self.waiting += 1
        started = finished = False
        try:
            while self.running >= self.slots:
                await asyncio.sleep(0.001)
            self.waiting, self.running, started = self.waiting - 1, self.running + 1, True
            for delta in self._deltas(request):
                await asyncio.sleep(self.delay)
                if self._closed:
                    raise EngineStoppedError("the engine is shutting down")
                if delta.text.strip() == BREAK:
                    raise EngineError("the script broke off: /secret/path")
                finished = delta.finish_reason is not None
                yield delta
        finally:
            self.running -= started
            self.waiting -= not started
            if not finished:
                self.cancelled.append(request.request_id)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        answers = []
        for request in requests:
            self._admit(request)
            deltas = list(self._deltas(request))
            text = "".join(delta.text for delta in deltas)
            tokens = tuple(token for delta in deltas for token in delta.token_ids)
            answers.append(Generation(request.request_id, text, tokens, deltas[-1].finish_reason or "length"))
        return answers

    def stats(self) -> EngineStats:
        return EngineStats(self.running, self.waiting, self.slots)

    def close(self) -> None:
        self._closed = True
        self.healthy = False

    def _admit(self, request: GenerationRequest) -> None:
        if self._closed:
            raise EngineStoppedError("the engine is shutting down")
        if self.waiting >= self.max_waiting:
            raise EngineOverloadedError(f"{self.waiting} requests wait and the limit is {self.max_waiting}")
        asked = request.sampling.max_tokens or 0
        if len(request.prompt_token_ids) + asked > self.max_model_len:
            raise RequestTooLongError(
                f"{len(request.prompt_token_ids)} prompt tokens and {asked} more exceed {self.max_model_len}"
            )
        self.requests.append(request)

    def _deltas(self, request: GenerationRequest) -> list[TokenDelta]:
        words = self.script.split(" ")[: request.sampling.max_tokens]
        whole = len(words) == len(self.script.split(" "))
        last: FinishReason = "stop" if whole else "length"
        deltas = []
        for place, word in enumerate(words):
            text = word if place == 0 else f" {word}"
            reason = last if place == len(words) - 1 else None
            deltas.append(TokenDelta(text, (place,), _logprobs(text, place, request.sampling.logprobs), reason))
        return deltas


def _logprobs(text: str, token: int, count: int | None) -> tuple[TokenLogprob, ...]:
    if count is None:
        return ()
    raw = tuple(text.encode())
    top = tuple((token + rank, f"{text}{rank or ''}", raw, -0.5 - rank) for rank in range(count))
    return (TokenLogprob(token, text, raw, -0.5, top),)
