"""/v1/responses as a thin layer over chats: the same body under other names, and the answer as OpenAI's response object.

    input, instructions        ->  messages              max_output_tokens  ->  max_completion_tokens
    text.format                ->  response_format       all else           ->  as in a chat
    deltas                     ->  response.created … response.output_text.delta … response.completed

Text in, text out. Nothing is stored, so an answer can be neither continued by its id nor fetched again; for tools there are
chats. Both are refused by name.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from openai import BaseModel
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseContentPartAddedEvent,
    ResponseContentPartDoneEvent,
    ResponseCreatedEvent,
    ResponseIncompleteEvent,
    ResponseInProgressEvent,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
    ResponseUsage,
)
from openai.types.responses.response import IncompleteDetails
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails

from atoms.engine import TokenDelta
from atoms.errors import RequestTooLongError
from server.embedded.generation import Answer
from server.embedded.protocol import ChatBody
from server.errors import InvalidFieldError, RequestError, UnsupportedFieldError

_TEXT_PARTS = ("input_text", "output_text", "text")
_RENAMED = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format"}
_EVENT_TYPE = re.compile(rb'"type":"(response\.[a-z_.]+)"')


def as_chat(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of the chat that asks for the same. Raises InvalidFieldError, UnsupportedFieldError."""
    chat = {
        name: value
        for name, value in body.items()
        if name not in ("input", "instructions", "max_output_tokens", "text")
    }
    instructions = body.get("instructions")
    if instructions is not None and not isinstance(instructions, str):
        raise InvalidFieldError("instructions must be a text", "instructions")
    system = [{"role": "system", "content": instructions}] if instructions else []
    return chat | {
        "messages": [*system, *_turns(body.get("input"))],
        "max_completion_tokens": body.get("max_output_tokens"),
        "response_format": _format(body.get("text")),
    }


@contextmanager
def blaming_own_fields() -> Iterator[None]:
    """Errors of the block name this API's fields where they name a chat's."""
    try:
        yield
    except (RequestError, RequestTooLongError) as error:
        for chats, ours in _RENAMED.items():
            if error.param and error.param.startswith(chats):
                error.param = ours + error.param.removeprefix(chats)
        raise


def sse(payload: bytes) -> bytes:
    """One event with its name, which OpenAI's have here. A quote in a text is escaped, so only the event's own type, or
    that of an error, is found."""
    found = _EVENT_TYPE.search(payload)
    return b"event: " + (found[1] if found else b"error") + b"\ndata: " + payload + b"\n\n"


class ResponseFormat:
    """Turns one answer into a response object or its events."""

    def __init__(self, answer_id: str, body: ChatBody, instructions: str | None, echo: dict[str, object]) -> None:
        self._message_id = answer_id.replace("resp_", "msg_")
        self._number = 0
        self._text = ""
        self._reason: str | None = None
        self._fields: dict[str, Any] = {
            "id": answer_id, "object": "response", "created_at": float(int(time.time())), "model": body.model, "error": None,
            "instructions": instructions, "metadata": body.metadata, "parallel_tool_calls": True, "tool_choice": "auto",
            "tools": [], "temperature": body.temperature, "top_p": body.top_p, "truncation": "disabled", "store": False,
            "max_output_tokens": body.max_completion_tokens, "previous_response_id": None, "user": body.user,
            "text": {"format": body.response_format or {"type": "text"}}, "steering": echo,
        }  # fmt: skip

    def whole(self, answers: Sequence[Answer], prompt_tokens: int) -> Response:
        (answer,) = answers
        return self._ended(answer.text, answer.finish_reason, prompt_tokens, answer.tokens)

    def chunks(self, index: int, delta: TokenDelta) -> Iterator[BaseModel]:
        place: dict[str, Any] = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        if self._number == 0:
            running = self._response("in_progress", [])
            yield ResponseCreatedEvent.construct(
                type="response.created", response=running, sequence_number=self._next()
            )
            yield ResponseInProgressEvent.construct(
                type="response.in_progress", response=running, sequence_number=self._next()
            )
            empty = self._message("in_progress", None)
            yield ResponseOutputItemAddedEvent.construct(
                type="response.output_item.added", item=empty, output_index=0, sequence_number=self._next()
            )
            yield ResponseContentPartAddedEvent.construct(
                type="response.content_part.added", part=_part(""), **place, sequence_number=self._next()
            )
        self._text += delta.text
        if delta.text:
            yield ResponseTextDeltaEvent.construct(
                type="response.output_text.delta", delta=delta.text, logprobs=[], **place, sequence_number=self._next()
            )
        if delta.finish_reason is not None:
            self._reason = delta.finish_reason
            yield ResponseTextDoneEvent.construct(
                type="response.output_text.done", text=self._text, logprobs=[], **place, sequence_number=self._next()
            )
            yield ResponseContentPartDoneEvent.construct(
                type="response.content_part.done", part=_part(self._text), **place, sequence_number=self._next()
            )
            item = self._message(_status(self._reason), self._text)
            yield ResponseOutputItemDoneEvent.construct(
                type="response.output_item.done", item=item, output_index=0, sequence_number=self._next()
            )

    def usage_chunk(self, prompt_tokens: int, completion_tokens: int) -> BaseModel:
        """The last event, which holds all of the response."""
        response = self._ended(self._text, self._reason, prompt_tokens, completion_tokens)
        number = self._next()
        if response.status == "incomplete":
            return ResponseIncompleteEvent.construct(
                type="response.incomplete", response=response, sequence_number=number
            )
        return ResponseCompletedEvent.construct(type="response.completed", response=response, sequence_number=number)

    def _next(self) -> int:
        self._number += 1
        return self._number - 1

    def _ended(self, text: str, reason: str | None, prompt_tokens: int, completion_tokens: int) -> Response:
        status = _status(reason)
        usage = ResponseUsage(
            input_tokens=prompt_tokens, output_tokens=completion_tokens, total_tokens=prompt_tokens + completion_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=0, cache_write_tokens=0),
            output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        )  # fmt: skip
        return self._response(status, [self._message(status, text)], usage)

    def _response(
        self,
        status: Literal["in_progress", "completed", "incomplete"],
        output: list[ResponseOutputMessage],
        usage: ResponseUsage | None = None,
    ) -> Response:
        details = IncompleteDetails(reason="max_output_tokens") if status == "incomplete" else None
        return Response.construct(**self._fields, status=status, output=output, usage=usage, incomplete_details=details)

    def _message(
        self, status: Literal["in_progress", "completed", "incomplete"], text: str | None
    ) -> ResponseOutputMessage:
        content = [_part(text)] if text is not None else []
        return ResponseOutputMessage.construct(
            id=self._message_id, type="message", role="assistant", status=status, content=content
        )


def _status(reason: str | None) -> Literal["completed", "incomplete"]:
    return "incomplete" if reason == "length" else "completed"


def _part(text: str) -> ResponseOutputText:
    return ResponseOutputText(type="output_text", text=text, annotations=[], logprobs=[])


def _turns(value: object) -> list[Any]:
    if isinstance(value, str) and value:
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise InvalidFieldError("input must be a text, or a list of messages, and not empty", "input")
    return [_turn(item, f"input[{place}]") for place, item in enumerate(value)]


def _turn(item: object, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise InvalidFieldError(f"{where} must be a message with role and content", where)
    if item.get("type", "message") != "message":
        raise UnsupportedFieldError(
            f"{where}.type is {repr(item['type'])[:64]}; this server reads messages", f"{where}.type"
        )
    content = item.get("content")
    if isinstance(content, list):
        content = [_chat_part(part) for part in content]
    return {"role": item.get("role"), "content": content}  # id, status and the like describe where it came from


def _chat_part(part: object) -> object:
    """A part of a chat's content; what is none is left for the chat to refuse."""
    if isinstance(part, dict) and part.get("type") in _TEXT_PARTS:
        return {"type": "text", "text": part.get("text")}
    return part


def _format(text: object) -> object:
    """`response_format`. A schema stands in the format itself here, and one level deeper in chats."""
    if text is None:
        return None
    if not isinstance(text, dict):
        raise InvalidFieldError('text must be an object such as {"format": {"type": "text"}}', "text")
    for name, value in text.items():
        if name != "format" and (name, value) != ("verbosity", "medium") and value is not None:
            raise UnsupportedFieldError(
                f"text.{name[:64]} is not supported by this server; leave it out", f"text.{name[:64]}"
            )
    form = text.get("format")
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}
