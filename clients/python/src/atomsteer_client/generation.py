"""OpenAI's calls that generate, each with `steering=`. Everything else of theirs is inherited."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Unpack, overload

from openai import AsyncStream, Stream
from openai.lib.streaming.chat import AsyncChatCompletionStreamManager, ChatCompletionStreamManager
from openai.lib.streaming.responses import AsyncResponseStreamManager, ResponseStreamManager
from openai.resources import beta, chat, completions, responses
from openai.types.chat import ParsedChatCompletion
from openai.types.responses import ParsedResponse, ResponseStreamEvent

from atomsteer_client.steering import (
    SteeredChatCompletion,
    SteeredChatCompletionChunk,
    SteeredCompletion,
    SteeredResponse,
    SteeringLike,
    with_steering,
)

if TYPE_CHECKING:
    from atomsteer_client.bodies import (
        ChatBody,
        CompletionBody,
        ResponseBody,
        StreamedChatBody,
        StreamedCompletionBody,
        StreamedResponseBody,
    )


class ChatCompletions(chat.Completions):
    @overload  # type: ignore[override]
    def create(self, *, steering: SteeringLike | None = None, **body: Unpack[ChatBody]) -> SteeredChatCompletion: ...
    @overload
    def create(
        self, *, steering: SteeringLike | None = None, **body: Unpack[StreamedChatBody]
    ) -> Stream[SteeredChatCompletionChunk]: ...
    def create(self, *, steering: SteeringLike | None = None, **body: Any) -> Any:
        return super().create(**with_steering(body, steering))

    def parse(self, *, steering: SteeringLike | None = None, **body: Any) -> ParsedChatCompletion[Any]:
        """OpenAI's `parse`; `echo_of` reads the echo of what it returns."""
        return super().parse(**with_steering(body, steering))

    def stream(self, *, steering: SteeringLike | None = None, **body: Any) -> ChatCompletionStreamManager[Any]:
        """OpenAI's `stream`; `echo_of` reads the echo of its final completion."""
        return super().stream(**with_steering(body, steering))


class AsyncChatCompletions(chat.AsyncCompletions):
    @overload  # type: ignore[override]
    async def create(
        self, *, steering: SteeringLike | None = None, **body: Unpack[ChatBody]
    ) -> SteeredChatCompletion: ...
    @overload
    async def create(
        self, *, steering: SteeringLike | None = None, **body: Unpack[StreamedChatBody]
    ) -> AsyncStream[SteeredChatCompletionChunk]: ...
    async def create(self, *, steering: SteeringLike | None = None, **body: Any) -> Any:
        return await super().create(**with_steering(body, steering))

    async def parse(self, *, steering: SteeringLike | None = None, **body: Any) -> ParsedChatCompletion[Any]:
        """OpenAI's `parse`; `echo_of` reads the echo of what it returns."""
        return await super().parse(**with_steering(body, steering))

    def stream(self, *, steering: SteeringLike | None = None, **body: Any) -> AsyncChatCompletionStreamManager[Any]:
        """OpenAI's `stream`; `echo_of` reads the echo of its final completion."""
        return super().stream(**with_steering(body, steering))


class Chat(chat.Chat):
    @cached_property
    def completions(self) -> ChatCompletions:
        return ChatCompletions(self._client)


class AsyncChat(chat.AsyncChat):
    @cached_property
    def completions(self) -> AsyncChatCompletions:
        return AsyncChatCompletions(self._client)


class Beta(beta.Beta):
    """``client.beta.chat``, by which older programs call `parse` and `stream`."""

    @cached_property
    def chat(self) -> Chat:
        return Chat(self._client)


class AsyncBeta(beta.AsyncBeta):
    """``client.beta.chat``, by which older programs call `parse` and `stream`."""

    @cached_property
    def chat(self) -> AsyncChat:
        return AsyncChat(self._client)


class Completions(completions.Completions):
    @overload  # type: ignore[override]
    def create(self, *, steering: SteeringLike | None = None, **body: Unpack[CompletionBody]) -> SteeredCompletion: ...
    @overload
    def create(
        self, *, steering: SteeringLike | None = None, **body: Unpack[StreamedCompletionBody]
    ) -> Stream[SteeredCompletion]: ...
    def create(self, *, steering: SteeringLike | None = None, **body: Any) -> Any:
        return super().create(**with_steering(body, steering))


class AsyncCompletions(completions.AsyncCompletions):
    @overload  # type: ignore[override]
    async def create(
        self, *, steering: SteeringLike | None = None, **body: Unpack[CompletionBody]
    ) -> SteeredCompletion: ...
    @overload
    async def create(
        self, *, steering: SteeringLike | None = None, **body: Unpack[StreamedCompletionBody]
    ) -> AsyncStream[SteeredCompletion]: ...
    async def create(self, *, steering: SteeringLike | None = None, **body: Any) -> Any:
        return await super().create(**with_steering(body, steering))


class Responses(responses.Responses):
    @overload  # type: ignore[override]
    def create(self, *, steering: SteeringLike | None = None, **body: Unpack[ResponseBody]) -> SteeredResponse: ...
    @overload
    def create(
        self, *, steering: SteeringLike | None = None, **body: Unpack[StreamedResponseBody]
    ) -> Stream[ResponseStreamEvent]: ...
    def create(self, *, steering: SteeringLike | None = None, **body: Any) -> Any:
        return super().create(**with_steering(body, steering))

    def parse(self, *, steering: SteeringLike | None = None, **body: Any) -> ParsedResponse[Any]:
        """OpenAI's `parse`; `echo_of` reads the echo of what it returns."""
        return super().parse(**with_steering(body, steering))

    def stream(self, *, steering: SteeringLike | None = None, **body: Any) -> ResponseStreamManager[Any]:
        """OpenAI's `stream`; `echo_of` reads the echo of the event ``response.created``."""
        return super().stream(**with_steering(body, steering))


class AsyncResponses(responses.AsyncResponses):
    @overload  # type: ignore[override]
    async def create(
        self, *, steering: SteeringLike | None = None, **body: Unpack[ResponseBody]
    ) -> SteeredResponse: ...
    @overload
    async def create(
        self, *, steering: SteeringLike | None = None, **body: Unpack[StreamedResponseBody]
    ) -> AsyncStream[ResponseStreamEvent]: ...
    async def create(self, *, steering: SteeringLike | None = None, **body: Any) -> Any:
        return await super().create(**with_steering(body, steering))

    async def parse(self, *, steering: SteeringLike | None = None, **body: Any) -> ParsedResponse[Any]:
        """OpenAI's `parse`; `echo_of` reads the echo of what it returns."""
        return await super().parse(**with_steering(body, steering))

    def stream(self, *, steering: SteeringLike | None = None, **body: Any) -> AsyncResponseStreamManager[Any]:
        """OpenAI's `stream`; `echo_of` reads the echo of the event ``response.created``."""
        return super().stream(**with_steering(body, steering))
