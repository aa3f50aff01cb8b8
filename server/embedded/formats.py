"""Answers in OpenAI's wire format, with the types of the `openai` package, so that the format is theirs and not ours.

Knows no engine state and no HTTP. The one addition is the field `steering`: in a whole answer's body, in a stream on
the first chunk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast

from openai import BaseModel
from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta, ChoiceDeltaToolCall, ChoiceDeltaToolCallFunction
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_message_function_tool_call import (
    ChatCompletionMessageFunctionToolCall,
    Function,
)
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs

from atoms.engine import TokenDelta, TokenLogprob
from server.embedded.generation import Answer
from server.embedded.tools import CallReader, ToolCall, Tools

_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say; OpenAI's and vLLM's own number."""


class AnswerFormat(Protocol):
    """Turns answers into bodies, and deltas into chunks. One instance serves one response."""

    def whole(self, answers: Sequence[Answer], prompt_tokens: int) -> BaseModel:
        """The body of a whole answer."""
        ...

    def chunks(self, index: int, delta: TokenDelta) -> Iterator[BaseModel]:
        """The chunks of one delta, in order; possibly none."""
        ...

    def usage_chunk(self, prompt_tokens: int, completion_tokens: int) -> BaseModel:
        """The last chunk of a stream with `include_usage`."""
        ...


def dump(model: BaseModel) -> bytes:
    """Compact JSON of the fields that were set, nulls included."""
    return model.model_dump_json(exclude_unset=True).encode()


class ChatFormat:
    """/v1/chat/completions. The first chunk of a choice carries its role, the last its finish reason. With `tools` calls
    are told from content; a call comes in one chunk."""

    def __init__(
        self,
        answer_id: str,
        model: str,
        fingerprint: str,
        echo: dict[str, object],
        usage: bool,
        tools: Tools | None = None,
    ) -> None:
        self._common: dict[str, Any] = {
            "id": answer_id, "created": int(time.time()), "model": model, "system_fingerprint": fingerprint,
        }  # fmt: skip
        self._echo = echo
        self._first: dict[str, Any] = {"steering": echo}
        self._usage: dict[str, Any] = {"usage": None} if usage else {}
        self._begun: set[int] = set()
        self._tools = tools
        self._readers: dict[int, CallReader] = {}

    def whole(self, answers: Sequence[Answer], prompt_tokens: int) -> ChatCompletion:
        return ChatCompletion(
            **self._common,
            object="chat.completion",
            choices=[_chat_choice(index, answer, self._tools) for index, answer in enumerate(answers)],
            usage=_usage(prompt_tokens, answers),
            steering=self._echo,  # type: ignore[call-arg]
        )

    def chunks(self, index: int, delta: TokenDelta) -> Iterator[ChatCompletionChunk]:
        if index not in self._begun:
            self._begun.add(index)
            yield self._chunk(index, ChoiceDelta(role="assistant", content=""))
        content, reason = delta.text, cast(str | None, delta.finish_reason)
        calls: list[ToolCall] = []
        if self._tools is not None:
            reader = self._readers.setdefault(index, CallReader(self._tools))
            before = reader.calls
            content, calls = reader.feed(delta.text, last=reason is not None)
            if reason is not None and reader.calls:
                reason = "tool_calls"
        if content or delta.logprobs:
            logprobs = ChunkLogprobs(content=_chat_logprobs(delta.logprobs), refusal=None) if delta.logprobs else None
            yield self._chunk(index, ChoiceDelta(content=content), logprobs)
        if calls:
            yield self._chunk(index, ChoiceDelta(tool_calls=_call_deltas(calls, before)))
        if reason is not None:
            yield self._chunk(index, ChoiceDelta(), None, reason)

    def usage_chunk(self, prompt_tokens: int, completion_tokens: int) -> ChatCompletionChunk:
        usage = _token_usage(prompt_tokens, completion_tokens)
        return ChatCompletionChunk(**self._common, object="chat.completion.chunk", choices=[], usage=usage)

    def _chunk(
        self, index: int, delta: ChoiceDelta, logprobs: ChunkLogprobs | None = None, finish_reason: Any = None
    ) -> ChatCompletionChunk:
        first, self._first = self._first, {}
        choice = ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        return ChatCompletionChunk(
            **self._common, object="chat.completion.chunk", choices=[choice], **self._usage, **first
        )


class CompletionFormat:
    """/v1/completions. Whole answers and chunks have one type."""

    def __init__(self, answer_id: str, model: str, fingerprint: str, echo: dict[str, object], usage: bool) -> None:
        self._common: dict[str, Any] = {
            "id": answer_id, "object": "text_completion", "created": int(time.time()), "model": model,
            "system_fingerprint": fingerprint,
        }  # fmt: skip
        self._echo = echo
        self._first: dict[str, Any] = {"steering": echo}
        self._usage: dict[str, Any] = {"usage": None} if usage else {}
        self._offsets: dict[int, int] = {}  # characters of each choice so far, by its tokens

    def whole(self, answers: Sequence[Answer], prompt_tokens: int) -> Completion:
        choices = [
            CompletionChoice(
                index=index,
                text=answer.text,
                logprobs=self._logprobs(index, answer.logprobs),
                finish_reason=answer.finish_reason,
            )
            for index, answer in enumerate(answers)
        ]
        usage = _usage(prompt_tokens, answers)
        return Completion(**self._common, choices=choices, usage=usage, steering=self._echo)  # type: ignore[call-arg]

    def chunks(self, index: int, delta: TokenDelta) -> Iterator[Completion]:
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return
        choice = CompletionChoice.construct(
            index=index,
            text=delta.text,
            logprobs=self._logprobs(index, delta.logprobs),
            finish_reason=delta.finish_reason,  # null but in the last chunk, which the type does not foresee
        )
        first, self._first = self._first, {}
        yield Completion.construct(**self._common, choices=[choice], **self._usage, **first)

    def usage_chunk(self, prompt_tokens: int, completion_tokens: int) -> Completion:
        return Completion(**self._common, choices=[], usage=_token_usage(prompt_tokens, completion_tokens))

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> Logprobs | None:
        if not logprobs:
            return None
        offsets, end = [], self._offsets.get(index, 0)
        for entry in logprobs:
            offsets.append(end)
            end += len(entry.text)
        self._offsets[index] = end
        return Logprobs(
            tokens=[entry.text for entry in logprobs],
            token_logprobs=[_finite(entry.logprob) for entry in logprobs],
            top_logprobs=[
                {text: _finite(value) for _, text, _, value in entry.top} | {entry.text: _finite(entry.logprob)}
                for entry in logprobs
            ],
            text_offset=offsets,
        )


def _chat_choice(index: int, answer: Answer, tools: Tools | None) -> Choice:
    logprobs = ChoiceLogprobs(content=_chat_logprobs(answer.logprobs), refusal=None) if answer.logprobs else None
    content, calls = CallReader(tools).feed(answer.text, last=True) if tools is not None else (answer.text, [])
    if not calls:
        message = ChatCompletionMessage(role="assistant", content=content, refusal=None)
        return Choice(index=index, message=message, logprobs=logprobs, finish_reason=answer.finish_reason)
    message = ChatCompletionMessage(
        role="assistant",
        content=content.strip() or None,
        refusal=None,
        tool_calls=[_message_call(call) for call in calls],
    )
    return Choice(index=index, message=message, logprobs=logprobs, finish_reason="tool_calls")


def _message_call(call: ToolCall) -> ChatCompletionMessageFunctionToolCall:
    function = Function(name=call.name, arguments=call.arguments)
    return ChatCompletionMessageFunctionToolCall(id=call.id, type="function", function=function)


def _call_deltas(calls: Sequence[ToolCall], first: int) -> list[ChoiceDeltaToolCall]:
    return [
        ChoiceDeltaToolCall(
            index=first + place, id=call.id, type="function",
            function=ChoiceDeltaToolCallFunction(name=call.name, arguments=call.arguments),
        )
        for place, call in enumerate(calls)
    ]  # fmt: skip


def _chat_logprobs(logprobs: Sequence[TokenLogprob]) -> list[ChatCompletionTokenLogprob]:
    return [
        ChatCompletionTokenLogprob(
            token=entry.text,
            bytes=list(entry.bytes),
            logprob=_finite(entry.logprob),
            top_logprobs=[
                TopLogprob(token=text, bytes=list(raw), logprob=_finite(value)) for _, text, raw, value in entry.top
            ],
        )
        for entry in logprobs
    ]


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)


def _usage(prompt_tokens: int, answers: Sequence[Answer]) -> CompletionUsage:
    return _token_usage(prompt_tokens, sum(answer.tokens for answer in answers))


def _token_usage(prompt_tokens: int, completion_tokens: int) -> CompletionUsage:
    total = prompt_tokens + completion_tokens
    return CompletionUsage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=total)
