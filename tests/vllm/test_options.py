"""A server with vLLM's tool parser, its developers' routes and keys: grammars do not hold the engine up, forced calls are held to
their schema, and nothing of the operator's opens without an admin key."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

CLIENT_KEY = "client-key"
LIMIT = 8000
SAID = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
          "additionalProperties": False}  # fmt: skip
TOOL = {"name": "weather", "description": "The weather of a city.", "parameters": SCHEMA}
OTHER_TOOL = {"name": "clock", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
PATHS = {
    "/v1/chat/completions": {"messages": SAID, "max_tokens": 60},
    "/v1/completions": {"prompt": "The city is", "max_tokens": 60},
    "/v1/responses": {"input": "What is the weather in Paris?", "max_output_tokens": 60},
    "/v1/messages": {"messages": SAID, "max_tokens": 60},
    "/v1/chat/completions/batch": {"messages": [SAID], "max_tokens": 60},
    "/invocations": {"messages": SAID, "max_tokens": 60},
}
BEYOND_BOUND = 500  # what vLLM answers where llguidance ends an answer that has begun
HEAVY = [
    {"regex": "((a{1,1000}){1,1000}){1,1000}"},  # xgrammar does not come back from the first token
    {"regex": "x((a{1,1000}){1,1000}){1,1000}"},
    {"regex": "|".join(f"({chr(97 + n % 26)}.*{chr(97 + n * 7 % 26)})" for n in range(600))},
    {"regex": ".*a.{500}"},
    {"json": {"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"}},
    {"json": {"type": "object", "properties": {f"p{n}": {} for n in range(600)}}},
    {"json": {"type": "array", "minItems": 10**6, "items": {"type": "string"}}},
    {"json": {"type": "integer", "multipleOf": 999_983, "minimum": 0, "maximum": 10**18}},
    {"json": {"allOf": [{"type": "string", "pattern": f"^.*{letter}.{{30}}$"} for letter in "abcdef"]}},
    {"json": {"$ref": "#/$defs/d0", "$defs": {"d30": {"type": "string"}} | {
        f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"type": "array", "items": {"$ref": f"#/$defs/d{n + 1}"}}]}
        for n in range(30)}}},
]  # fmt: skip


@pytest.fixture(scope="module")
def options_server(start, command, real_package, admin_key: str, tmp_path_factory) -> Iterator[Any]:
    options = command("--api-key", CLIENT_KEY, "--admin-key", admin_key, "--max-grammar-bytes", str(LIMIT), "--database", "none",
                      "--", "--enforce-eager", "--enable-auto-tool-choice", "--tool-call-parser=hermes")  # fmt: skip
    with start(options, real_package.manifest.name, {"VLLM_SERVER_DEV_MODE": "1"}) as running:
        yield running


@pytest.fixture
async def http(options_server):
    headers = {"Authorization": f"Bearer {CLIENT_KEY}"}
    async with httpx.AsyncClient(base_url=options_server.url, timeout=120, headers=headers) as client:
        yield client


@pytest.fixture
def body(options_server, real_package):
    """`body(path, **fields)`: a steered request where `path` can be steered."""
    steering = {"steering": {"atoms": {real_package.manifest.atoms[0].id: 0.5}}}

    def made(path: str, **fields: Any) -> dict[str, Any]:
        steered = {} if path == "/invocations" else steering
        return {"model": options_server.name, "temperature": 0} | PATHS[path] | steered | fields

    return made


def constrained(path: str, schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The fields by which `path` takes a JSON schema for its answer."""
    form = {"type": "json_schema", "name": "x", "schema": schema}
    if path == "/v1/messages":
        return [{"output_config": {"format": {"type": "json_schema", "schema": schema}}}]
    ways = [{"structured_outputs": {"json": schema}}, {"structured_outputs": {"json": json.dumps(schema)}}]
    if path == "/v1/responses":
        return [*ways, {"text": {"format": form}}]
    return [*ways, {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}]


def said(path: str, answer: dict[str, Any]) -> str:
    if path == "/v1/responses":
        return "".join(part["text"] for item in answer["output"] for part in item.get("content") or [])
    if path == "/v1/messages":
        return "".join(part["text"] for part in answer["content"])
    choice = answer["choices"][0]
    return choice["text"] if path == "/v1/completions" else choice["message"]["content"]


@pytest.mark.parametrize("path", PATHS)
async def test_answers_are_held_to_a_schema_that_is_not_too_long(http, body, path: str) -> None:
    large = SCHEMA | {"description": "x" * LIMIT}
    for fields, too_long in zip(constrained(path, SCHEMA), constrained(path, large)):
        answer = await http.post(path, json=body(path, **fields))
        assert answer.status_code == 200, answer.text
        assert json.loads(said(path, answer.json())) in ({"city": "Paris"}, {"city": "Rome"}), (fields, answer.text)
        refused = await http.post(path, json=body(path, **too_long))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value"), refused.text
        assert f"the limit is {LIMIT}" in refused.json()["error"]["message"]


async def test_other_constraints_are_bounded_too(http, body) -> None:
    path = "/v1/completions"
    for good, large in (({"regex": "(yes|no)"}, {"regex": "a" * (LIMIT + 1)}),
                        ({"choice": ["yes", "no"]}, {"choice": ["a" * LIMIT, "b"]})):  # fmt: skip
        answer = await http.post(path, json=body(path, structured_outputs=good))
        assert answer.status_code == 200 and said(path, answer.json()) in ("yes", "no"), answer.text
        refused = await http.post(path, json=body(path, structured_outputs=large))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value"), refused.text
    for unbounded in ({"structured_outputs": {"grammar": 'start: "a"'}}, {"structured_outputs": {"structural_tag": "{}"}},
                      {"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}}):  # fmt: skip
        refused = await http.post(path, json=body(path, **unbounded))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_parameter"), refused.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_forced_call_is_held_to_its_tools_schema(http, body, choice: Any, stream: bool) -> None:
    tools = [{"type": "function", "function": tool} for tool in (TOOL, OTHER_TOOL)]
    path = "/v1/chat/completions"
    answer = await http.post(path, json=body(path, tools=tools, tool_choice=choice, stream=stream,
                                                  parallel_tool_calls=False))  # fmt: skip
    assert answer.status_code == 200, answer.text
    if stream:
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        pieces = [call["function"] for event in events for choice in event["choices"]
                  for call in choice["delta"].get("tool_calls") or []]  # fmt: skip
        name = next(piece["name"] for piece in pieces if piece.get("name"))
        arguments = "".join(piece.get("arguments") or "" for piece in pieces)
    else:
        (choice_made,) = answer.json()["choices"]
        assert choice_made["message"].get("tool_calls"), answer.text
        call = choice_made["message"]["tool_calls"][0]["function"]
        name, arguments = call["name"], call["arguments"]
    assert (name, json.loads(arguments)) in [
        ("weather", {"city": "Paris"}),
        ("weather", {"city": "Rome"}),
        ("clock", {}),
    ]
    assert isinstance(choice, str) or name == "weather"
    large = [{"type": "function", "function": TOOL | {"description": "x" * LIMIT}}]
    refused = await http.post(path, json=body(path, tools=large, tool_choice=choice))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools"), refused.text
    free = await http.post(path, json=body(path, tools=large, max_tokens=2))
    assert free.status_code in (200, 400) and "limit is" not in free.text, "a call that is not forced has no grammar"


@pytest.mark.parametrize("heavy", HEAVY, ids=lambda heavy: json.dumps(heavy)[:40])
async def test_a_heavy_grammar_holds_nobody_up(http, body, heavy: dict[str, Any]) -> None:
    path = "/v1/completions"
    asking = [
        asyncio.create_task(http.post(path, json=body(path, structured_outputs=heavy, temperature=1))) for _ in range(3)
    ]
    longest = 0.0
    while not all(task.done() for task in asking):
        begun = time.monotonic()
        async with asyncio.timeout(60):
            answer = await http.post(path, json=body(path, max_tokens=2))
        longest = max(longest, time.monotonic() - begun)
        assert answer.status_code == 200, answer.text
    answers = [task.result() for task in asking]
    assert {answer.status_code for answer in answers} <= {200, 400, BEYOND_BOUND}, answers[0].text
    print(f"{json.dumps(heavy)[:60]} {answers[0].status_code}; others waited {longest:.2f} s at most")


async def test_every_route_that_is_not_for_clients_needs_an_admin_key(http, options_server, admin_key: str) -> None:
    served = re.findall(r"Route: (\S+), Methods: ([A-Z, ]+)", options_server.log.read_text())
    closed = {path: method for path, methods in served for method in methods.split(", ")
              if not path.startswith("/v1/") and (status_of(options_server, method, path) == 403)}  # fmt: skip
    developers = {"/reset_prefix_cache", "/reset_mm_cache", "/sleep", "/wake_up", "/is_sleeping", "/collective_rpc",
                  "/server_info", "/abort_requests", "/pause", "/resume"}  # fmt: skip
    assert developers & {path for path, _ in served} <= closed.keys()
    assert {"/reset_prefix_cache", "/sleep", "/wake_up", "/collective_rpc", "/server_info"} <= closed.keys(), closed
    for path, method in closed.items():
        bare = await http.request(method, path, headers={"Authorization": ""})
        assert bare.status_code == 401, (path, bare.text)
    admin = {"Authorization": f"Bearer {admin_key}"}
    assert (await http.post("/reset_prefix_cache", headers=admin)).status_code == 200
    assert (await http.get("/is_sleeping", headers=admin)).json() == {"is_sleeping": False}
    print(f"closed to clients: {sorted(closed)}")


def status_of(server: Any, method: str, path: str) -> int:
    filled = re.sub(r"\{[^}]*\}", "x", path)
    return httpx.request(method, server.url + filled, json={} if method != "GET" else None, timeout=60,
                         headers={"Authorization": f"Bearer {CLIENT_KEY}"}).status_code  # fmt: skip
