"""`Client` and `AsyncClient`: OpenAI's clients, with `steering=` and the routes of an atomsteer server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from openai import AsyncOpenAI, AsyncStream, OpenAI, Stream

from atomsteer_client import comparison
from atomsteer_client.comparison import Compared
from atomsteer_client.generation import (
    AsyncBeta,
    AsyncChat,
    AsyncCompletions,
    AsyncResponses,
    Beta,
    Chat,
    Completions,
    Responses,
)
from atomsteer_client.resources import (
    AsyncAtoms,
    AsyncExperiments,
    AsyncPresets,
    AsyncSteeringRoutes,
    Atoms,
    Experiments,
    Presets,
    SteeringRoutes,
)
from atomsteer_client.steering import SteeringLike, asks_for_steering, ignored, is_steered, typed

DEFAULT_URL = "http://127.0.0.1:8000/v1"
URL_VARIABLE, KEY_VARIABLE = "ATOMSTEER_BASE_URL", "ATOMSTEER_API_KEY"
_AT_ONCE = 8


class Client(OpenAI):
    """`openai.OpenAI` for an atomsteer server.

    `base_url` and `api_key` default to ``ATOMSTEER_BASE_URL`` (else a server on this machine) and ``ATOMSTEER_API_KEY``;
    of OpenAI's own variables nothing is sent: no key, organization, project or header. `options` are OpenAI's. Every
    call that asks for steering, also through `extra_body`, raises SteeringIgnoredError if the answer shows no sign of it.
    Raises ValueError for a key with a comma.
    """

    def __init__(self, *, base_url: Any = None, api_key: Any = None, **options: Any) -> None:
        super().__init__(base_url=base_url or _default_url(), api_key=_one_key(api_key), **options)
        _keep_given(self, options)

    @cached_property
    def chat(self) -> Chat:
        return Chat(self)

    @cached_property
    def beta(self) -> Beta:
        return Beta(self)

    @cached_property
    def completions(self) -> Completions:
        return Completions(self)

    @cached_property
    def responses(self) -> Responses:
        return Responses(self)

    @cached_property
    def atoms(self) -> Atoms:
        return Atoms(self)

    @cached_property
    def steering(self) -> SteeringRoutes:
        return SteeringRoutes(self)

    @cached_property
    def presets(self) -> Presets:
        return Presets(self)

    @cached_property
    def experiments(self) -> Experiments:
        return Experiments(self)

    def compare(
        self,
        prompt: str | Sequence[Any],
        mixes: Iterable[SteeringLike],
        *,
        model: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> list[Compared]:
        """The answer without steering and under each of `mixes`, with the same seed, in that order.

        `prompt` is a text or a list of messages; `options` are those of a chat completion. `model` may be left out where
        the server has one. Raises TypeError for options that have no place here: `stream`, `steering`, `messages`.
        """
        options["model"] = model or comparison.served_model(self.models.list())
        asked = comparison.requests(prompt, mixes, seed, options)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            answers = pool.map(lambda item: self.chat.completions.create(**item[1]), asked)
            return [Compared(mix, answer) for (mix, _), answer in zip(asked, answers, strict=True)]

    def post(self, path: str, *, cast_to: Any, body: Any = None, options: Any = None, **more: Any) -> Any:
        """OpenAI's `post`, with typed echoes. Raises SteeringIgnoredError."""
        options = options or {}
        more["stream_cls"] = typed(more.get("stream_cls"))
        answer: Any = super().post(path, cast_to=typed(cast_to), body=body, options=options, **more)
        if asks_for_steering(body, options) and not is_steered(answer):
            if isinstance(answer, Stream):
                answer.close()
            raise ignored(self.base_url)
        return answer


class AsyncClient(AsyncOpenAI):
    """`openai.AsyncOpenAI` for an atomsteer server; as `Client` otherwise."""

    def __init__(self, *, base_url: Any = None, api_key: Any = None, **options: Any) -> None:
        super().__init__(base_url=base_url or _default_url(), api_key=_one_key(api_key), **options)
        _keep_given(self, options)

    @cached_property
    def chat(self) -> AsyncChat:
        return AsyncChat(self)

    @cached_property
    def beta(self) -> AsyncBeta:
        return AsyncBeta(self)

    @cached_property
    def completions(self) -> AsyncCompletions:
        return AsyncCompletions(self)

    @cached_property
    def responses(self) -> AsyncResponses:
        return AsyncResponses(self)

    @cached_property
    def atoms(self) -> AsyncAtoms:
        return AsyncAtoms(self)

    @cached_property
    def steering(self) -> AsyncSteeringRoutes:
        return AsyncSteeringRoutes(self)

    @cached_property
    def presets(self) -> AsyncPresets:
        return AsyncPresets(self)

    @cached_property
    def experiments(self) -> AsyncExperiments:
        return AsyncExperiments(self)

    async def compare(
        self,
        prompt: str | Sequence[Any],
        mixes: Iterable[SteeringLike],
        *,
        model: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> list[Compared]:
        """As `Client.compare`."""
        options["model"] = model or comparison.served_model((await self.models.list()).data)
        asked = comparison.requests(prompt, mixes, seed, options)
        answers = await asyncio.gather(*(self.chat.completions.create(**call) for _, call in asked))
        return [Compared(mix, answer) for (mix, _), answer in zip(asked, answers, strict=True)]

    async def post(self, path: str, *, cast_to: Any, body: Any = None, options: Any = None, **more: Any) -> Any:
        """OpenAI's `post`, with typed echoes. Raises SteeringIgnoredError."""
        options = options or {}
        more["stream_cls"] = typed(more.get("stream_cls"))
        answer: Any = await super().post(path, cast_to=typed(cast_to), body=body, options=options, **more)
        if asks_for_steering(body, options) and not is_steered(answer):
            if isinstance(answer, AsyncStream):
                await answer.close()
            raise ignored(self.base_url)
        return answer


def _keep_given(client: OpenAI | AsyncOpenAI, options: Mapping[str, Any]) -> None:
    """Takes back what OpenAI's constructor has read from ``OPENAI_ORG_ID``, ``OPENAI_CUSTOM_HEADERS`` and the like."""
    client.organization, client.project = options.get("organization"), options.get("project")
    client.webhook_secret, client.admin_api_key = options.get("webhook_secret"), options.get("admin_api_key")
    client._custom_headers = options.get("default_headers") or {}  # no argument keeps the variable out


def _default_url() -> str:
    return os.environ.get(URL_VARIABLE) or DEFAULT_URL


def _one_key(key: Any) -> Any:
    """`key` (a text, or OpenAI's function that gives one), else the variable's. Raises ValueError for a list of several."""
    found = key or os.environ.get(KEY_VARIABLE) or "none"
    if isinstance(found, str) and "," in found:
        raise ValueError(
            f"the API key has a comma: a server's {KEY_VARIABLE} separates several keys so, and a client sends one; "
            "give one of them as api_key"
        )
    return found
