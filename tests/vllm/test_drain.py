"""SIGTERM while more requests are in flight than run at once, of every API that generates, steered by many mixes and not at
all, and while more come: each is finished, or refused or broken off in so many words. Every test starts a server of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

IN_FLIGHT, RUNNING = 96, 16
SHUTDOWN_SECONDS = 8
HANGS_AFTER = 120
STREAM_ENDS = {
    "/v1/completions": "data: [DONE]",
    "/v1/chat/completions": "data: [DONE]",
    "/v1/responses": '"type":"response.completed"',
    "/v1/messages": '"type":"message_stop"',
}
ANSWER_ENDS = {
    "/v1/completions": '"finish_reason":"length"',
    "/v1/chat/completions": '"finish_reason":"length"',
    "/v1/responses": '"object":"response"',
    "/v1/messages": '"stop_reason":"max_tokens"',
}


def drawn(number: int, model: str, atoms: list[str]) -> tuple[str, dict[str, Any]]:
    """Path and body of request `number`: every API streamed and not, every third unsteered, answers of 4 to 400 tokens."""
    path = list(STREAM_ENDS)[number % 4]
    said = [{"role": "user", "content": f"Tell me about the number {number}."}]
    length = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    body = {"model": model, "stream": number % 8 < 4, "ignore_eos": True, "temperature": 0,
            length: (4, 24, 100, 400)[number // 8 % 4]}  # fmt: skip
    if number % 3:
        body["steering"] = {"atoms": {atoms[number % len(atoms)]: round(0.02 * number, 2)}}
    return path, body | {"/v1/completions": {"prompt": "Once"}, "/v1/responses": {"input": said}}.get(
        path, {"messages": said}
    )


async def outcome(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> str:
    """``finished``, ``refused``, ``broken off`` by an error event; else what is wrong."""
    try:
        async with asyncio.timeout(HANGS_AFTER):
            response = await client.post(path, json=body)
    except TimeoutError:
        return "hangs"
    except httpx.TransportError as error:
        return "no connection" if isinstance(error, httpx.ConnectError) else f"broken {type(error).__name__} {error}"
    text = response.text
    if response.status_code == 503 and "Retry-After" in response.headers:
        return "refused" if response.json()["error"]["code"] == "engine_stopped" else f"refused otherwise {text[:200]}"
    if response.status_code != 200:
        return f"{response.status_code} {text[:200]}"
    if not body["stream"]:
        return "finished" if ANSWER_ENDS[path] in text else f"cut off {text[-200:]}"
    event, last = ["", *filter(None, text.splitlines())][-2:]
    if STREAM_ENDS[path] in last:
        return "finished"
    is_said = last.startswith("data: ") and json.loads(last[6:]).get("error", {}).get("code") == "engine_stopped"
    is_seen = path != "/v1/messages" or event == "event: error"
    return "broken off" if is_said and is_seen else f"truncated {event} {last[:200]}"


async def running(client: httpx.AsyncClient) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))


@pytest.mark.parametrize("whom", ["server", "group"])
@pytest.mark.parametrize("servers", [1, 2])
async def test_sigterm_under_load_finishes_or_refuses_every_request(
    start, command, real_package, members, wait_for, tmp_path: Path, whom: str, servers: int
) -> None:
    atoms = [card.id for card in real_package.manifest.atoms]
    options = command("--database", f"sqlite:///{tmp_path}/state.db", "--shutdown-timeout", str(SHUTDOWN_SECONDS), "--",
                      "--enforce-eager", f"--api-server-count={servers}")  # fmt: skip
    with start(options, real_package.manifest.name) as server:
        numbers = count()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits) as client:

            def ask() -> asyncio.Task[str]:
                return asyncio.create_task(outcome(client, *drawn(next(numbers), server.name, atoms)))

            in_flight = [ask() for _ in range(IN_FLIGHT)]
            while await running(client) < RUNNING:
                await asyncio.sleep(0.1)
            before = [task.result() for task in in_flight if task.done()]
            assert IN_FLIGHT - len(before) >= 64 and set(before) <= {"finished"}
            (os.killpg if whom == "group" else os.kill)(server.process.pid, signal.SIGTERM)
            begun, late = time.monotonic(), []
            while server.process.poll() is None and time.monotonic() < begun + HANGS_AFTER:
                late.append(ask())
                await asyncio.sleep(0.25)
            took = time.monotonic() - begun
            outcomes = Counter(await asyncio.gather(*in_flight))
            after = list(await asyncio.gather(*late))
        print(f"{outcomes} of those in flight, {Counter(after)} of those that came later, all ended after {took:.1f} s")
        assert server.process.poll() == 0, server.log.read_text()[-3000:]
        assert took < SHUTDOWN_SECONDS + 40
        assert outcomes.keys() <= {"finished", "refused", "broken off"}
        if whom == "server":  # a worker that gets the signal too ends, and nothing can be finished
            assert outcomes["finished"] > len(before), "what was running has not been finished"
        assert_refused_until_the_port_is_closed(after)
        assert wait_for(lambda: not members(server.process.pid), 5), "a process of the server lives on"


def assert_refused_until_the_port_is_closed(after: list[str]) -> None:
    """A connection that the closing port had not taken yet is reset or closed."""
    closed = (
        "no connection",
        "broken ReadError",
        "broken WriteError",
        "broken RemoteProtocolError Server disconnected",
    )
    answered = [answer for answer in after if not answer.startswith(closed)]
    assert answered == after[: len(answered)], after
    assert set(answered) <= {"finished", "refused"} and "refused" in answered, answered
