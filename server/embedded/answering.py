"""One response in the making: its sequences run, are measured, and become a body or a stream of chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from atoms.errors import RequestTooLongError
from server.context import RequestContext
from server.embedded.formats import AnswerFormat, dump
from server.embedded.generation import Arrival, Sequences, ServedEngine, gather_answers
from server.metrics import ServerMetrics


@dataclass(frozen=True)
class Answering:
    """`prompt_field` is the body's name for the prompt, for errors that blame it."""

    engine: ServedEngine
    metrics: ServerMetrics
    context: RequestContext
    sequences: Sequences
    form: AnswerFormat
    prompt_field: str

    async def whole(self) -> bytes:
        """The body of a whole answer. Raises as `Engine.stream` does."""
        async with self._arrivals() as arrivals:
            answers = await gather_answers(arrivals, len(self.sequences.requests))
        return dump(self.form.whole(answers, self.sequences.prompt_tokens))

    @asynccontextmanager
    async def events(self, include_usage: bool) -> AsyncIterator[AsyncIterator[bytes]]:
        """Gives an iterator over the chunks. Leaving the block ends or cancels every sequence."""
        async with self._arrivals() as arrivals:
            yield self._chunks(arrivals, include_usage)

    @asynccontextmanager
    async def _arrivals(self) -> AsyncIterator[AsyncIterator[Arrival]]:
        try:
            async with self.sequences.run(self.engine) as arrivals:
                yield self._measured(arrivals)
        except RequestTooLongError as error:
            # the engine knows tokens and not which body they came in
            param = self.prompt_field if error.param == "messages" else error.param
            raise RequestTooLongError(str(error), param) from error

    async def _measured(self, arrivals: AsyncIterator[Arrival]) -> AsyncIterator[Arrival]:
        """Passes `arrivals` on; counts their tokens and times."""
        last: dict[int, float] = {}
        async for index, delta in arrivals:
            now = time.perf_counter()
            if index not in last:
                prompt_tokens = len(self.sequences.requests[index].prompt_token_ids)
                self.metrics.sequence_started(prompt_tokens, self.context.seconds)
            if delta.token_ids:
                self.metrics.tokens_generated(len(delta.token_ids), now - last[index] if index in last else None)
            last[index] = now
            yield index, delta

    async def _chunks(self, arrivals: AsyncIterator[Arrival], include_usage: bool) -> AsyncIterator[bytes]:
        tokens = 0
        async for index, delta in arrivals:
            tokens += len(delta.token_ids)
            for chunk in self.form.chunks(index, delta):
                yield dump(chunk)
        if include_usage:
            yield dump(self.form.usage_chunk(self.sequences.prompt_tokens, tokens))
