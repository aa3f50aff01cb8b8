"""Arguments of OpenAI's calls, for type checkers alone: nothing imports this when a program runs."""

from __future__ import annotations

from typing import Any, TypedDict

from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params


class CallOptions(TypedDict, total=False):
    """What every call of the SDK takes besides its body."""

    extra_headers: Any
    extra_query: Any
    extra_body: Any
    timeout: Any


class ChatBody(chat_params.CompletionCreateParamsNonStreaming, CallOptions, total=False):
    """Arguments of a chat completion."""


class StreamedChatBody(chat_params.CompletionCreateParamsStreaming, CallOptions):
    """Arguments of a streamed chat completion."""


class CompletionBody(completion_params.CompletionCreateParamsNonStreaming, CallOptions, total=False):
    """Arguments of a completion."""


class StreamedCompletionBody(completion_params.CompletionCreateParamsStreaming, CallOptions):
    """Arguments of a streamed completion."""


class ResponseBody(response_params.ResponseCreateParamsNonStreaming, CallOptions, total=False):
    """Arguments of a response."""


class StreamedResponseBody(response_params.ResponseCreateParamsStreaming, CallOptions):
    """Arguments of a streamed response."""
