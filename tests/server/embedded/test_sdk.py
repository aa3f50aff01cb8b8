"""The real `openai` package against a running server: sync and async, streaming and not."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from server.embedded.scripted import BREAK, ScriptedEngine

MESSAGES: list[Any] = [{"role": "user", "content": "hello there"}]
STEERING = {"steering": {"atoms": {"list": 1.5}}}


@pytest.fixture
def sdk(server: Any):
    with OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_sdk(server: Any):
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


def test_chat(sdk: OpenAI, ids: list[str]) -> None:
    answer = sdk.chat.completions.create(model="demo", messages=MESSAGES, n=2, seed=1, extra_body=STEERING)
    assert [choice.message.content for choice in answer.choices] == ["one two three"] * 2
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer.model_extra is not None
    assert answer.model_extra["steering"]["atoms"] == {ids[0]: 1.5}


def test_chat_headers(sdk: OpenAI) -> None:
    raw = sdk.chat.completions.with_raw_response.create(
        model="demo:polite", messages=MESSAGES, extra_headers={"X-Request-Id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine"
    assert raw.headers["x-atomsteer-mix"] == raw.parse().model_extra["steering"]["mix"]


def test_chat_stream(sdk: OpenAI, ids: list[str]) -> None:
    stream = sdk.chat.completions.create(
        model="demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, logprobs=True,
        top_logprobs=2, extra_body=STEERING,
    )  # fmt: skip
    *chunks, usage = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two three"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[0].model_extra["steering"]["atoms"] == {ids[0]: 1.5}
    logprobs = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [len(entry.content[0].top_logprobs) for entry in logprobs] == [2, 2, 2]
    assert usage.choices == []
    assert usage.usage.completion_tokens == 3


def test_the_sdks_own_accumulator(sdk: OpenAI) -> None:
    with sdk.chat.completions.stream(model="demo", messages=MESSAGES) as stream:
        assert stream.get_final_completion().choices[0].message.content == "one two three"


def test_completions(sdk: OpenAI) -> None:
    answer = sdk.completions.create(model="demo", prompt=["a", "b"], logprobs=1)
    assert [choice.text for choice in answer.choices] == ["one two three"] * 2
    assert answer.choices[0].logprobs.tokens == ["one", " two", " three"]
    stream = sdk.completions.create(model="demo", prompt=[1, 2], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "one two three"


def test_models(sdk: OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["demo", "demo:polite", "demo:lists"]
    assert sdk.models.retrieve("demo").owned_by == "atomsteer"


def test_errors_become_the_sdks_exceptions(sdk: OpenAI, engine: ScriptedEngine) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.chat.completions.create(model="demo", messages=MESSAGES, extra_body={"steering": {"atom": {}}})
    assert bad.value.param == "steering.atom"
    engine.max_waiting = 0
    with pytest.raises(openai.RateLimitError):
        sdk.chat.completions.create(model="demo", messages=MESSAGES)


def test_a_broken_stream_raises(sdk: OpenAI, engine: ScriptedEngine) -> None:
    engine.script = f"one {BREAK}"
    with pytest.raises(openai.APIError, match="could not be generated"):
        list(sdk.chat.completions.create(model="demo", messages=MESSAGES, stream=True))


async def test_async_chat(async_sdk: AsyncOpenAI) -> None:
    answer = await async_sdk.chat.completions.create(model="demo", messages=MESSAGES, extra_body=STEERING)
    assert answer.choices[0].message.content == "one two three"


async def test_async_streams_with_different_mixes(
    async_sdk: AsyncOpenAI, engine: ScriptedEngine, ids: list[str]
) -> None:
    for coefficient in (1.0, 2.0):
        stream = await async_sdk.chat.completions.create(
            model="demo", messages=MESSAGES, stream=True, extra_body={"steering": {"atoms": {"list": coefficient}}}
        )
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "one two three"
    assert [request.mix.as_dict() for request in engine.requests] == [{ids[0]: 1.0}, {ids[0]: 2.0}]


async def test_async_completion_stream_left_early(
    async_sdk: AsyncOpenAI, engine: ScriptedEngine, wait_for: Any
) -> None:
    engine.script, engine.delay = " ".join(["word"] * 1000), 0.3
    stream = await async_sdk.completions.create(model="demo", prompt="a", stream=True, max_tokens=60)
    async for _ in stream:
        break
    await stream.close()
    assert wait_for(lambda: engine.running == 0)
    assert engine.cancelled
