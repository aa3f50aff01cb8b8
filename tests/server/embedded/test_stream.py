"""Server-sent events, byte for byte, and what happens when a stream breaks off or its client leaves."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from httpx import AsyncClient

from server.embedded.scripted import BREAK, ScriptedEngine

CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hello there"}], "stream": True}
TEXT: dict[str, Any] = {"model": "demo", "prompt": "hello there", "stream": True}


def events(body: str) -> list[Any]:
    """The payloads of a stream; checks the framing."""
    assert body.endswith("\n\n")
    lines = body.split("\n\n")[:-1]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [json.loads(line[6:]) if line != "data: [DONE]" else "[DONE]" for line in lines]


async def test_a_chat_stream_byte_for_byte(client: AsyncClient, package: Any) -> None:
    response = await client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 2})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert "content-length" not in response.headers
    answer_id = re.search(r"chatcmpl-[0-9a-f]{32}", response.text)[0]  # type: ignore[index]
    created = re.search(r'"created":(\d+)', response.text)[1]  # type: ignore[index]
    head = (
        f'"id":"{answer_id}","created":{created},"model":"demo",'
        f'"system_fingerprint":"fp_{package.manifest.content_hash[:12]}","object":"chat.completion.chunk"'
    )
    mix = response.headers["X-Atomsteer-Mix"]
    echo = (
        f'"steering":{{"mix":"{mix}","atoms":{{}},"predicted_kl":0.0,"scaled_by":1.0,"preset":null,'
        '"experiment":null,"arm":null,"phase":"all"}'
    )
    parts = [
        ('{"role":"assistant","content":""}', "null", f",{echo}"),
        ('{"content":"one"}', "null", ""),
        ('{"content":" two"}', "null", ""),
        ("{}", '"length"', ""),
    ]
    expected = [
        json.loads(
            f'{{{head},"choices":[{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{reason}}}]{extra}}}'
        )
        for delta, reason, extra in parts
    ]
    compact = [json.dumps(event, separators=(",", ":")) for event in events(response.text)[:-1]]
    assert [json.loads(event) for event in compact] == expected
    assert response.text == "".join(f"data: {event}\n\n" for event in [*compact, "[DONE]"])


async def test_a_completion_stream(client: AsyncClient) -> None:
    response = await client.post("/v1/completions", json=TEXT | {"logprobs": 0})
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["one", " two", " three"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks] == [[0], [3], [7]]
    assert ["steering" in chunk for chunk in chunks] == [True, False, False]
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
async def test_usage_is_one_more_chunk(client: AsyncClient, path: str, body: dict[str, Any]) -> None:
    response = await client.post(path, json=body | {"n": 2, "stream_options": {"include_usage": True}})
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6
    assert usage["usage"]["total_tokens"] == usage["usage"]["prompt_tokens"] + 6


async def test_choices_interleave_by_index(client: AsyncClient, engine: ScriptedEngine) -> None:
    engine.delay = 0.005
    chunks = events((await client.post("/v1/chat/completions", json=CHAT | {"n": 3})).text)[:-1]
    order = [chunk["choices"][0]["index"] for chunk in chunks]
    assert order != sorted(order), "choices should come as they are generated, not one after the other"
    for index in range(3):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in own) == "one two three"
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]
    assert sum("steering" in chunk for chunk in chunks) == 1


async def test_text_that_json_must_escape(client: AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = 'line\nbreak "quoted" \u2028 é 漢'
    response = await client.post("/v1/chat/completions", json=CHAT)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events(response.text)[:-1])
    assert text == engine.script


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
async def test_a_failure_in_the_middle(
    client: AsyncClient, engine: ScriptedEngine, path: str, body: dict[str, Any]
) -> None:
    engine.script = f"one {BREAK} three"
    response = await client.post(path, json=body | {"n": 2})
    assert response.status_code == 200
    *chunks, last = events(response.text)
    assert chunks
    assert last["error"]["code"] == "generation_failed"
    assert "secret" not in response.text
    assert "[DONE]" not in response.text
    assert engine.stats().running == 0
    metrics = (await client.get("/metrics")).text
    assert 'atomsteer_requests_total{arm="",experiment="",preset="",status="500"} 1.0' in metrics


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_frees_its_slots(
    server: Any, engine: ScriptedEngine, wait_for: Callable[..., bool], stream: bool
) -> None:
    engine.script, engine.delay, engine.slots = " ".join(["word"] * 1000), 0.02, 2
    body = json.dumps(CHAT | {"stream": stream, "n": 3}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        if stream:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 OK")
        assert await asyncio.to_thread(wait_for, lambda: engine.running == 2 and engine.waiting == 1)
    assert await asyncio.to_thread(wait_for, lambda: engine.running == engine.waiting == 0)
    assert len(engine.cancelled) == 3
    assert await asyncio.to_thread(wait_for, lambda: server.traffic.active == 0)
    async with AsyncClient(base_url=server.url) as client:
        metrics = (await client.get("/metrics")).text
    assert 'atomsteer_requests_total{arm="",experiment="",preset="",status="499"} 1.0' in metrics


async def test_a_client_that_hangs_up_while_it_sends(server: Any, wait_for: Callable[..., bool]) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        )
        connection.sendall(head + b'{"model"')
        assert await asyncio.to_thread(wait_for, lambda: server.traffic.active == 1)
    assert await asyncio.to_thread(wait_for, lambda: server.traffic.active == 0)


async def test_events_arrive_as_they_are_made(server: Any, engine: ScriptedEngine) -> None:
    engine.delay = 0.4
    loop, times = asyncio.get_running_loop(), []
    async with AsyncClient(base_url=server.url) as client:
        async with client.stream("POST", "/v1/chat/completions", json=CHAT) as response:
            async for line in response.aiter_lines():
                if '"content":' in line:
                    times.append(loop.time())
    assert times[-1] - times[1] > 0.4, "the stream was held back and sent at once"


async def test_a_draining_server_refuses_new_work_and_finishes_the_old(server: Any, engine: ScriptedEngine) -> None:
    engine.delay = 0.5
    async with AsyncClient(base_url=server.url) as client:
        async with client.stream("POST", "/v1/chat/completions", json=CHAT) as running:
            server.uvicorn.handle_exit(signal.SIGTERM, None)
            refused = await client.post("/v1/chat/completions", json=CHAT | {"stream": False})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_stopped")
            assert (await client.get("/ready")).status_code == 503
            assert (await client.get("/health")).status_code == 200
            assert (await running.aread()).endswith(b"data: [DONE]\n\n")


async def test_keep_alive_survives_an_error(server: Any) -> None:
    async with AsyncClient(base_url=server.url, limits=httpx.Limits(max_connections=1)) as client:
        assert (await client.post("/v1/chat/completions", json=CHAT | {"model": "x"})).status_code == 404
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
