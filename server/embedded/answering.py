"""One response in the making: its sequences run, are measured, and become a body or a stream of chunks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from atoms.errors import RequestTooLongError
from server.context import RequestContext
from server.embedded.formats import AnswerFormat, dump
from server.embedded.generation import Answer, Arrival, Sequences, ServedEngine, gather_answers
from server.errors import error_kind
from server.experiments.measures import HUNG_UP
from server.experiments.recording import Choice, FinishedResponse, Recorder
from server.experiments.spec import Assignment
from server.metrics import ServerMetrics


@dataclass(frozen=True)
class Recording:
    """Hands a response that belongs to an experiment to the recorder. `prompts` are what its choices answer; `measure`
    takes the tokens of the first choice's prompt and answer."""

    recorder: Recorder
    assignment: Assignment
    response_id: str
    context: RequestContext
    prompts: Sequence[str]
    measure: Callable[[Sequence[int], Sequence[int]], None]

    def begun(self) -> None:
        """The unit is being answered under its arm. One whose request the engine refuses is not."""
        self.recorder.exposed(self.assignment)

    def finished(self, answers: Sequence[Answer], first_token_seconds: float | None) -> None:
        choices = tuple(Choice(answer.text, answer.tokens, answer.finish_reason, prompt)
                        for answer, prompt in zip(answers, self.prompts, strict=True))  # fmt: skip
        self.recorder.finished(
            self.assignment, FinishedResponse(self.response_id, choices, self.context.seconds, first_token_seconds)
        )

    def failed(self, error: Exception) -> None:
        """Records a failure of the server's; a client that asked for too much is none."""
        status = error_kind(error).status
        if status >= 500:
            self._left(status)

    def hung_up(self) -> None:
        """Records that the client left. Without this the answers that users stop would be missing, and an arm that rambles
        would look better for it."""
        self._left(HUNG_UP)

    def _left(self, status: int) -> None:
        """Of a response that has been recorded as finished the first row counts."""
        self.recorder.exposed(self.assignment)
        self.recorder.finished(
            self.assignment, FinishedResponse(self.response_id, (), self.context.seconds, status=status)
        )


@dataclass(frozen=True)
class Answering:
    """`prompt_field` is the body's name for the prompt, for errors that blame it. `recording` is for experiments."""

    engine: ServedEngine
    metrics: ServerMetrics
    context: RequestContext
    sequences: Sequences
    form: AnswerFormat
    prompt_field: str
    recording: Recording | None = None

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
        except asyncio.CancelledError:
            if self.recording is not None:
                self.recording.hung_up()
            raise
        except Exception as error:
            if self.recording is not None:
                self.recording.failed(error)
            raise

    async def _measured(self, arrivals: AsyncIterator[Arrival]) -> AsyncIterator[Arrival]:
        """Passes `arrivals` on; counts their tokens and times, and records the response once all have come."""
        last: dict[int, float] = {}
        answers = [Answer() for _ in self.sequences.requests]
        first_token: float | None = None
        tokens: list[int] = []
        async for index, delta in arrivals:
            now = time.perf_counter()
            if self.recording is not None:
                if not last:
                    self.recording.begun()
                answers[index].add(delta)
                tokens += delta.token_ids if index == 0 else ()
                first_token = first_token or self.context.seconds
            if index not in last:
                prompt_tokens = len(self.sequences.requests[index].prompt_token_ids)
                self.metrics.sequence_started(prompt_tokens, self.context.seconds)
                self.context.read(prompt_tokens)
            if delta.token_ids:
                self.context.generated(len(delta.token_ids))
                self.metrics.tokens_generated(len(delta.token_ids), now - last[index] if index in last else None)
            last[index] = now
            yield index, delta
        if self.recording is not None:
            self.recording.finished(answers, first_token)
            self.recording.measure(self.sequences.requests[0].prompt_token_ids, tokens)

    async def _chunks(self, arrivals: AsyncIterator[Arrival], include_usage: bool) -> AsyncIterator[bytes]:
        tokens = 0
        async for index, delta in arrivals:
            tokens += len(delta.token_ids)
            for chunk in self.form.chunks(index, delta):
                yield dump(chunk)
        if include_usage:
            yield dump(self.form.usage_chunk(self.sequences.prompt_tokens, tokens))
