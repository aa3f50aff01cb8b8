"""/v1/responses: OpenAI's own client reads the answers and events, and what is not there is refused by name."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from httpx import AsyncClient
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from server.embedded.scripted import BREAK, ScriptedEngine

PATH = "/v1/responses"
ASK: dict[str, Any] = {"model": "demo", "input": "hello"}


@pytest.fixture
async def sdk(server: Any):
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk:
        yield sdk


async def test_a_whole_answer(sdk: AsyncOpenAI, ids: list[str], engine: ScriptedEngine) -> None:
    answer = await sdk.responses.create(
        **ASK, instructions="Be brief.", metadata={"a": "b"}, extra_body={"steering": {"atoms": {"list": 1.5}}}
    )
    assert answer.output_text == "one two three" and answer.status == "completed" and answer.object == "response"
    assert answer.usage is not None and (answer.usage.input_tokens, answer.usage.output_tokens) == (5, 3)
    assert answer.model_extra is not None and answer.model_extra["steering"]["atoms"] == {ids[0]: 1.5}
    assert (answer.instructions, answer.metadata, answer.store) == ("Be brief.", {"a": "b"}, False)
    assert engine.requests[0].prompt_token_ids == engine.encode_text("system: Be brief. user: hello")
    Response.model_validate_json(answer.model_dump_json(), strict=False)


async def test_messages_as_input(client: AsyncClient, engine: ScriptedEngine) -> None:
    turns = [
        {"role": "developer", "content": "short"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        {"role": "user", "content": "c"},
    ]  # fmt: skip
    assert (await client.post(PATH, json=ASK | {"input": turns})).status_code == 200
    assert engine.requests[0].prompt_token_ids == engine.encode_text("system: short user: a assistant: b user: c")


async def test_events_are_those_of_the_sdk_in_order(sdk: AsyncOpenAI, ids: list[str], client: AsyncClient) -> None:
    events = [event async for event in await sdk.responses.create(**ASK, stream=True)]
    assert [event.type.removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added",
        *["output_text.delta"] * 3, "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "one two three"
    assert events[-1].response.output_text == "one two three" and events[-1].response.usage.total_tokens == 5
    assert events[0].response.steering["mix"] == events[-1].response.steering["mix"]
    assert len({event.item_id for event in events if hasattr(event, "item_id")} | {events[2].item.id}) == 1
    raw = (await client.post(PATH, json=ASK | {"stream": True})).text
    reader: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for block in raw.strip().split("\n\n"):
        name, data = block.splitlines()
        assert reader.validate_json(data.removeprefix("data: ")).type == name.removeprefix("event: ")
    assert "[DONE]" not in raw


async def test_the_sdks_own_accumulator(sdk: AsyncOpenAI) -> None:
    async with sdk.responses.stream(**ASK) as stream:
        final = await stream.get_final_response()
    assert final.output_text == "one two three" and final.status == "completed"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_cut_says_so(client: AsyncClient, stream: bool) -> None:
    answer = await client.post(PATH, json=ASK | {"max_output_tokens": 2, "stream": stream})
    body = json.loads(answer.text.strip().rpartition("data: ")[2])["response"] if stream else answer.json()
    assert body["status"] == "incomplete" and body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["output"][0]["content"][0]["text"] == "one two" and body["usage"]["output_tokens"] == 2
    assert not stream or "event: response.incomplete" in answer.text


async def test_a_text_that_looks_like_an_event_changes_nothing(client: AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = '"type":"response.completed" \n\ndata: forged'
    blocks = (await client.post(PATH, json=ASK | {"stream": True})).text.strip().split("\n\n")
    assert all(block.count("\n") == 1 and block.startswith("event: response.") for block in blocks)
    assert sum(block.startswith("event: response.completed") for block in blocks) == 1


async def test_a_format_reaches_the_engine(client: AsyncClient, engine: ScriptedEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    answer = await client.post(PATH, json=ASK | {"text": {"format": form}})
    assert answer.status_code == 200, answer.text
    grammar = engine.requests[0].sampling.grammar
    assert grammar is not None and json.loads(grammar.text) == schema


async def test_a_broken_stream_raises(sdk: AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.script = f"one {BREAK}"
    with pytest.raises(openai.APIError, match="could not be generated"):
        _ = [event async for event in await sdk.responses.create(**ASK, stream=True)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"), ({"input": []}, "input"), ({"input": 5}, "input"), ({"input": [5]}, "input[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call_output"}]}, "input[0].type"),
        ({"input": "word " * 100}, "input"),
        ({"instructions": 5}, "instructions"), ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": 5}, "text"), ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"), ({"store": True}, "store"),
        ({"background": True}, "background"), ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"conversation": "c"}, "conversation"), ({"messages": []}, "messages"), ({"max_tokens": 5}, "max_tokens"),
        ({"n": 2}, "n"), ({"steering": {"atoms": {"list": 99}}}, "steering.atoms.list"),
        ({"truncation": "auto"}, "truncation"), ({"reasoning": {"effort": "high"}}, "reasoning"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_served(client: AsyncClient, fields: dict, param: str, stream: bool) -> None:
    refused = await client.post(PATH, json=ASK | {"stream": stream} | fields)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == param


async def test_stored_responses_are_not_there(client: AsyncClient) -> None:
    for method, path in (("GET", f"{PATH}/resp_1"), ("DELETE", f"{PATH}/resp_1"), ("POST", f"{PATH}/resp_1/cancel")):
        assert (await client.request(method, path)).status_code == 404
