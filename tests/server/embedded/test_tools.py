"""Tool calls: read from texts, forced by a grammar on a real engine, and refused where a model knows none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from httpx import ASGITransport, AsyncClient
from openai import AsyncOpenAI
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from atoms.package import Package
from server.config import ServeConfig
from server.embedded.app import create_app
from server.embedded.load import EngineOptions, LoadedPackage, load_package
from server.embedded.scripted import ScriptedEngine
from server.embedded.tools import CallReader, Tools, read_tools
from server.limits import Limits

TEMPLATE = (
    "{%- if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n"
    "Call one so: <tool_call>{\"name\": ..., \"arguments\": {...}}</tool_call><|im_end|>\n{%- endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{\"name\": \"{{ call.function.name }}\", \"arguments\": "
    "{{ call.function.arguments | tojson }}}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)  # fmt: skip
"""In the manner of Qwen's and Hermes'."""
WEATHER = {"type": "function", "function": {"name": "weather", "description": "The weather of a city", "parameters": {
    "type": "object", "required": ["city", "days"], "additionalProperties": False,
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}}}}}  # fmt: skip
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
USER = {"role": "user", "content": "What is the weather?"}
CHAT = {"model": "demo", "messages": [USER], "tools": [WEATHER, CLOCK]}
PATH = "/v1/chat/completions"
NAMED = {"type": "function", "function": {"name": "weather"}}


def tools(choice: object = "auto", parallel: bool = True) -> Tools:
    read = read_tools([WEATHER, CLOCK], choice, parallel, Limits())
    assert read is not None
    return read


def read_in_pieces(text: str, size: int, known: Tools) -> tuple[str, list[tuple[str, Any]]]:
    reader, content, calls = CallReader(known), "", []
    pieces = [text[start : start + size] for start in range(0, len(text), size)] or [""]
    for place, piece in enumerate(pieces):
        more, found = reader.feed(piece, last=place == len(pieces) - 1)
        content += more
        calls += [(call.name, json.loads(call.arguments)) for call in found]
    return content, calls


@pytest.mark.parametrize("size", [1, 2, 5, 11, 1000])
@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ("It rains.", "It rains.", []),
        (CALL, "", ["weather"]),
        (f"Let me see. {CALL}", "Let me see. ", ["weather"]),
        (f"{CALL}\n{CALL}\n", "", ["weather", "weather"]),
        ('<tool_call>{"name": "clock"}</tool_call>', "", ["clock"]),
        ("a < b and <tool", "a < b and <tool", []),
        ("<tool_call>{broken}</tool_call> x", "<tool_call>{broken}</tool_call> x", []),
        ('<tool_call>{"name": "rm"}</tool_call>', '<tool_call>{"name": "rm"}</tool_call>', []),
        ('<tool_call>{"name": "clock", "arguments": []}</tool_call>',) * 2 + ([],),
        ('<tool_call>{"name": "clo', '<tool_call>{"name": "clo', []),
        ("<tool_call>" + "[" * 3000 + "</tool_call>",) * 2 + ([],),
    ],
)  # fmt: skip
def test_calls_are_told_from_content_however_the_text_is_cut(
    text: str, content: str, names: list[str], size: int
) -> None:
    said, calls = read_in_pieces(text, size, tools())
    assert [name for name, _ in calls] == names
    assert said.strip() == content.strip() if names else said == content


def test_one_call_at_most_where_the_client_wants_one() -> None:
    content, calls = read_in_pieces(CALL + CALL, 7, tools(parallel=False))
    assert len(calls) == 1 and content == CALL


async def test_a_call_in_an_answer(client: AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = CALL
    answer = (await client.post(PATH, json=CHAT)).json()["choices"][0]
    assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] is None
    (call,) = answer["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"]["name"] == "weather" and json.loads(call["function"]["arguments"]) == {
        "city": "Oslo",
        "days": 2,
    }
    assert [tool["function"]["name"] for tool in engine.tools] == ["weather", "clock"]


async def test_without_tools_nothing_is_taken_for_a_call(client: AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = CALL
    for fields in ({"tools": []}, {"tools": None}, {"tool_choice": "none"}):
        answer = (await client.post(PATH, json=CHAT | fields)).json()["choices"][0]
        assert (answer["message"]["content"], answer["finish_reason"]) == (CALL, "stop")
        assert not engine.tools


async def test_the_sdk_reads_streamed_calls(server: Any, engine: ScriptedEngine) -> None:
    engine.script = f"Well: {CALL} {CALL}"
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as sdk:
        async with sdk.chat.completions.stream(model="demo", messages=[USER], tools=[WEATHER, CLOCK], n=2) as stream:
            final = await stream.get_final_completion()
    assert len({call.id for choice in final.choices for call in choice.message.tool_calls}) == 4
    for choice in final.choices:
        assert choice.finish_reason == "tool_calls" and choice.message.content.strip() == "Well:"
        assert [json.loads(call.function.arguments)["city"] for call in choice.message.tool_calls] == ["Oslo", "Oslo"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": "weather"}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]}, "tools[0].function.strict"),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": [CLOCK] * 129}, "tools"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "rm"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"response_format": {"type": "json_object"}}, "tools"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": {}, "content": "x"}, USER], "tool_choice": 1}, "tool_choice"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [1]}]}, "messages[1].tool_calls[0]"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "["}}]}]},
         "messages[1].tool_calls[0].function.arguments"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 1}]}, "messages[0].tool_call_id"),
    ],
)  # fmt: skip
async def test_wrong_tools(client: AsyncClient, engine: ScriptedEngine, fields: dict, param: str) -> None:
    refused = await client.post(PATH, json=CHAT | fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text
    assert not engine.requests


@pytest.fixture(scope="module")
def loaded(tiny_package: Package, tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerFast,
           tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadedPackage]:  # fmt: skip
    """The tiny random model, with a template that knows tools."""
    import shutil

    path = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(tiny_model_dir, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    options = EngineOptions(model=str(path), dtype="float32", device="cpu", slots=4)
    loaded = load_package(tiny_package.path, options)
    yield loaded
    loaded.engine.close()


@pytest.fixture
def ask(loaded: LoadedPackage) -> Callable[..., Any]:
    app = create_app(loaded.package, loaded.engine, ServeConfig(package=loaded.package.path))

    async def ask(**fields: Any) -> Any:
        async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
            return await client.post(PATH, json=CHAT | {"model": "tiny", "max_tokens": 200} | fields)

    return ask


@pytest.mark.parametrize("choice", ["required", NAMED])
async def test_a_random_model_makes_a_valid_call_when_it_must(ask: Callable[..., Any], choice: object) -> None:
    for seed in range(3):
        answer = (await ask(tool_choice=choice, seed=seed)).json()["choices"][0]
        (call,) = answer["message"]["tool_calls"]
        assert answer["finish_reason"] == "tool_calls" and answer["message"]["content"] is None
        if choice == NAMED:
            assert call["function"]["name"] == "weather"
        if call["function"]["name"] == "weather":
            jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER["function"]["parameters"])


ROUTE = {"type": "function", "function": {"name": "route", "parameters": {
    "type": "object", "required": ["stops"], "additionalProperties": False,
    "properties": {"stops": {"type": "array", "items": {"$ref": "#/$defs/Stop"}, "minItems": 1, "maxItems": 2}},
    "$defs": {"Stop": {"type": "object", "required": ["city"], "additionalProperties": False,
                       "properties": {"city": {"$ref": "#/$defs/City"}}}, "City": {"enum": ["Oslo", "Rome"]}}}}}  # fmt: skip
"""As `openai.pydantic_function_tool` writes a model that holds another."""


@pytest.mark.parametrize("given", [[ROUTE], [WEATHER, ROUTE]], ids=["alone", "one of two"])
async def test_parameters_may_refer_to_their_definitions(ask: Callable[..., Any], given: list[dict[str, Any]]) -> None:
    for seed in range(4):
        answer = await ask(tools=given, tool_choice="required", seed=seed)
        assert answer.status_code == 200, answer.text
        (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
        known = {tool["function"]["name"]: tool["function"]["parameters"] for tool in given}
        jsonschema.validate(json.loads(call["function"]["arguments"]), known[call["function"]["name"]])


@pytest.mark.parametrize("name", ["[]", "{}", "3", "null"])
async def test_a_call_whose_name_is_no_text_is_content(client: AsyncClient, engine: ScriptedEngine, name: str) -> None:
    engine.script = f'<tool_call>{{"name": {name}, "arguments": {{}}}}</tool_call>'
    message = (await client.post(PATH, json=CHAT)).json()["choices"][0]["message"]
    assert message["content"] == engine.script and not message.get("tool_calls")


async def test_a_forced_call_streams_to_the_same(ask: Callable[..., Any]) -> None:
    fields = {"tool_choice": NAMED, "seed": 1}
    whole = (await ask(**fields)).json()["choices"][0]["message"]["tool_calls"][0]["function"]
    events = [
        json.loads(line[6:])
        for line in (await ask(**fields, stream=True)).text.splitlines()
        if line.startswith("data: {")
    ]
    deltas = [event["choices"][0]["delta"] for event in events]
    (call,) = [call for delta in deltas for call in delta.get("tool_calls") or []]
    assert call["function"] == whole and call["index"] == 0
    assert not any(delta.get("content") for delta in deltas)
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_forced_call_that_is_cut_short_is_text(ask: Callable[..., Any]) -> None:
    answer = (await ask(tool_choice=NAMED, max_tokens=3)).json()["choices"][0]
    assert (
        answer["finish_reason"] == "length" and answer["message"]["content"] and "tool_calls" not in answer["message"]
    )


async def test_calls_and_results_go_into_the_prompt(loaded: LoadedPackage, ask: Callable[..., Any]) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'},
    }
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "tool_call_id": "call_1", "content": "rain"}]  # fmt: skip
    answer = await ask(messages=turns, max_tokens=2)
    assert answer.status_code == 200, answer.text
    plain = [turns[0], {"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}}}]}, turns[2]]  # fmt: skip
    prompt = loaded.engine._tokenizer.apply_chat_template(
        plain, tools=[WEATHER, CLOCK], tokenize=False, add_generation_prompt=True
    )
    assert (
        '"arguments": {"city": "Oslo", "days": 2}' in prompt and "rain" in prompt and "The weather of a city" in prompt
    )


async def test_a_model_without_tools_says_so(tiny_package: Package) -> None:
    loaded = load_package(tiny_package.path, EngineOptions(dtype="float32", device="cpu", slots=2))
    try:
        app = create_app(loaded.package, loaded.engine, ServeConfig(package=tiny_package.path))
        async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
            for body in ({"tools": [CLOCK]}, {"messages": [USER, {"role": "tool", "content": "x"}]}):
                refused = await client.post(PATH, json={"model": "tiny", "messages": [USER]} | body)
                assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_by_model")
                assert "response_format" in refused.json()["error"]["message"]
    finally:
        loaded.engine.close()
