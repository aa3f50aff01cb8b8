"""The sequences of one request: made from prompts and n, run at the same time, their deltas merged in order of arrival.

Knows the engine and no wire format.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from atoms.engine import (
    Engine,
    FinishReason,
    GenerationRequest,
    Grammar,
    Phase,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
)
from atoms.errors import EngineError
from atoms.mix import Mix

Arrival = tuple[int, TokenDelta]
"""Index of the sequence in its request, and what came."""


class ServedEngine(Engine, Protocol):
    """An engine that can say whether it still works, and what it cannot do before it is asked to."""

    @property
    def healthy(self) -> bool:
        """Whether it should be sent requests now."""
        ...

    @property
    def died(self) -> bool:
        """Whether it will never answer again, though nobody closed it."""
        ...

    def drift(self, prompt: Sequence[int], response: Sequence[int], mix: Mix) -> Future[float]:
        """The mean over the response's tokens of KL(unsteered ‖ steered), nats, when there is time. Raises as `stream`."""
        ...

    async def compile_grammar(self, grammar: Grammar) -> None:
        """Makes `grammar` ready for use. Raises GrammarError, ConfigError, EngineStoppedError."""
        ...


@dataclass(frozen=True, slots=True)
class Sequences:
    """What one request asks the engine for: for each prompt n sequences, in the order of choices."""

    requests: tuple[GenerationRequest, ...]
    prompt_tokens: int

    @classmethod
    def of(
        cls,
        answer_id: str,
        prompts: Sequence[tuple[int, ...]],
        n: int,
        mix: Mix,
        sampling: SamplingParams,
        phase: Phase = "all",
    ) -> Sequences:
        """Choice i of a prompt is seeded with seed + i, so choices differ and no prompt depends on another."""
        requests = tuple(
            GenerationRequest(f"{answer_id}-{place * n + choice}", prompt, mix, _seeded(sampling, choice), phase)
            for place, prompt in enumerate(prompts)
            for choice in range(n)
        )
        return cls(requests, sum(len(prompt) for prompt in prompts))

    @asynccontextmanager
    async def run(self, engine: Engine) -> AsyncIterator[AsyncIterator[Arrival]]:
        """Gives an iterator over all deltas. However the block is left, every sequence has ended or been cancelled.

        The first failing sequence ends the iterator with its error. All are submitted before any delta is given, so a
        full queue refuses the request as a whole.
        """
        arrived: asyncio.Queue[Arrival | Exception] = asyncio.Queue()
        tasks = [
            asyncio.create_task(_pump(engine, request, index, arrived)) for index, request in enumerate(self.requests)
        ]
        try:
            yield _arrivals(arrived, len(tasks))
        finally:
            await _cancel(tasks)


@dataclass(slots=True)
class Answer:
    """A whole sequence, gathered from its deltas."""

    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason = "length"

    def add(self, delta: TokenDelta) -> None:
        self.text += delta.text
        self.tokens += len(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason or self.finish_reason


async def gather_answers(arrivals: AsyncIterator[Arrival], count: int) -> list[Answer]:
    """The answers by index."""
    answers = [Answer() for _ in range(count)]
    async for index, delta in arrivals:
        answers[index].add(delta)
    return answers


def _seeded(sampling: SamplingParams, choice: int) -> SamplingParams:
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + choice)


async def _pump(engine: Engine, request: GenerationRequest, index: int, arrived: asyncio.Queue) -> None:
    """Moves one sequence's deltas into `arrived`; its error, if any, comes last."""
    finished = False
    try:
        async with aclosing(engine.stream(request)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                finished = delta.finish_reason is not None
                arrived.put_nowait((index, delta))
        if not finished:
            raise EngineError(f"sequence {request.request_id} ended without a finish reason")
    except Exception as error:
        arrived.put_nowait(error)


async def _arrivals(arrived: asyncio.Queue[Arrival | Exception], count: int) -> AsyncIterator[Arrival]:
    while count:
        item = await arrived.get()
        if isinstance(item, Exception):
            raise item
        yield item
        count -= item[1].finish_reason is not None


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
