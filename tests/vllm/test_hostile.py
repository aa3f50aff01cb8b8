"""Requests that mean harm, or know no better, to vLLM with our plugin: each gets an answer of its own, none a 5xx that is not
meant, and the engine serves on."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import suppress
from typing import Any

import httpx
import pytest

STEERED = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 2},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/chat/completions/batch": {"messages": [[{"role": "user", "content": "Hi"}]], "max_tokens": 2},
}
OTHER = {
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1, 2]},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hi"}]},
    "/invocations": {"prompt": "Hi", "max_tokens": 2},
    "/v1/systemone": {},
    "/generative_scoring": {},
}
ODD_STEERING: list[tuple[Any, int]] = [
    ("strong", 400), (7, 400), ([], 400), (True, 400), ({"atoms": []}, 400), ({"atoms": "x"}, 400),
    ({"atoms": {"nothing": 1}}, 404), ({"atoms": {"": 1}}, 404), ({"atoms": {"../../etc/passwd": 1}}, 404),
    ({"atoms": {"ATOM": "1"}}, 400), ({"atoms": {"ATOM": None}}, 400), ({"atoms": {"ATOM": True}}, 400),
    ({"atoms": {"ATOM": 1e300}}, 400), ({"atoms": {"ATOM": {"x": 1}}}, 400), ({"atoms": {f"a{n}": 1 for n in range(2000)}}, 400),
    ({"preset": "nothing"}, 404), ({"preset": 1}, 400), ({"experiment": "x"}, 404),
    ({"max_kl": -1}, 400), ({"max_kl": "a"}, 400), ({"on_exceed": "explode", "max_kl": 1}, 400), ({"phase": "prompt"}, 400),
    ({"allow_out_of_range": True, "atoms": {"ATOM": 50}}, 403), ({"unknown": 1}, 400), ({"lora_path": "/etc/passwd"}, 400),
]  # fmt: skip


@pytest.fixture
async def http(server):
    async with httpx.AsyncClient(
        base_url=server.url, timeout=300, limits=httpx.Limits(max_connections=None, keepalive_expiry=2)
    ) as client:
        yield client


@pytest.fixture(scope="module")
def atom(real_package) -> str:
    return real_package.manifest.atoms[0].id


@pytest.fixture(autouse=True)
async def nothing_is_left_behind(http, server, atom):
    """After each test: nothing runs or waits, and a steered request is answered."""
    yield
    async with asyncio.timeout(60):
        while any(count > 0 for count in await in_flight(http)):
            await asyncio.sleep(0.1)
    answer = await http.post("/v1/completions", json={"model": server.name, "prompt": "Hi", "max_tokens": 2,
                                                      "steering": {"atoms": {atom: 1}}})  # fmt: skip
    assert answer.status_code == 200, answer.text
    assert server.process.poll() is None


async def in_flight(http: httpx.AsyncClient) -> list[float]:
    lines = (await http.get("/metrics")).text.splitlines()
    return [float(line.split()[-1]) for line in lines
            if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))]  # fmt: skip


@pytest.mark.parametrize("path", STEERED)
async def test_odd_steering_is_refused_on_every_path_that_can_be_steered(http, server, atom, path: str) -> None:
    for steering, status in ODD_STEERING:
        sent = json.loads(json.dumps(steering).replace("ATOM", atom))
        response = await http.post(path, json=STEERED[path] | {"model": server.name, "steering": sent})
        assert response.status_code == status, (steering, response.text)
        assert response.json()["error"]["param"].startswith("steering"), response.text
    good = await http.post(path, json=STEERED[path] | {"model": server.name, "steering": {"atoms": {atom: 1}}})
    assert good.status_code == 200 and good.json()["steering"]["atoms"] == {atom: 1.0}, good.text


@pytest.mark.parametrize("path", OTHER)
async def test_steering_is_refused_where_it_cannot_hold(http, server, atom, path: str) -> None:
    response = await http.post(path, json=OTHER[path] | {"model": server.name, "steering": {"atoms": {atom: 1}}})
    assert response.status_code == 400 and response.json()["error"]["code"] == "unsupported_parameter", response.text
    without = await http.post(path, json=OTHER[path] | {"model": server.name})
    assert without.status_code < 500, without.text


async def test_unknown_models_and_presets(http, server) -> None:
    for name in ("nothing", f"{server.name}:", f"{server.name}:nothing", f"{server.name}:strong:strong", f"{server.name}@1",
                 "../etc/passwd", "", "x" * 10_000, "mix:{}", "m-00", server.name.upper()):  # fmt: skip
        for path in STEERED:
            response = await http.post(path, json=STEERED[path] | {"model": name})
            expected = (200, 400) if name == "" else (404,)  # an empty name is no name, which Anthropic's API needs
            assert response.status_code in expected, (path, name[:40], response.text[:300])


async def test_operators_routes_are_closed_and_adapters_cannot_be_loaded(http, admin_key: str) -> None:
    for method, path in (
        ("POST", "/scale_elastic_ep"),
        ("POST", "/is_scaling_elastic_ep"),
        ("GET", "/kv_event_sources"),
    ):
        assert (await http.request(method, path, json={})).status_code == 403, path
        opened = await http.request(method, path, json={}, headers={"Authorization": f"Bearer {admin_key}"})
        assert opened.status_code in (200, 400), (path, opened.text)
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/collective_rpc", "/server_info", "/sleep", "/wake_up",
                 "/reset_prefix_cache", "/start_profile", "/abort_requests", "/pause"):  # fmt: skip
        body = {"lora_name": "x", "lora_path": "/tmp", "method": "exit"}
        for method in ("GET", "POST"):
            assert (await http.request(method, path, json=body)).status_code in (403, 404), path


async def test_limits_of_one_request(http, server) -> None:
    for fields, status in (
        ({"n": 16_384}, 400), ({"n": "16384"}, 400), ({"n": 20.0}, 400), ({"n": 0}, 400), ({"n": -1}, 400),
        ({"prompt": ["Hi"] * 1000}, 400), ({"prompt": []}, 400), ({"prompt": ""}, None), ({"prompt": [[]]}, 400),
        ({"prompt": [10**9]}, 400), ({"prompt": [-1]}, 400), ({"prompt": None}, 400), ({"max_tokens": 10**9}, 400),
        ({"max_tokens": -1}, 400), ({"temperature": -1}, 400), ({"temperature": 1e300}, None), ({"top_p": 2}, 400),
        ({"logprobs": 10**6}, 400), ({"prompt_logprobs": -1}, 400), ({"stop": ["x"] * 1000}, 400), ({"seed": 2**70}, 400),
        ({"logit_bias": {"999999": 5}}, 400), ({"logit_bias": {"x": 5}}, 400), ({"priority": 10**30}, None),
        ({"kv_transfer_params": {"do_remote_decode": True}}, None), ({"min_tokens": 10**6}, 400),
        ({"structured_outputs": {"regex": "(" * 1000}}, 400), ({"structured_outputs": {"json": "{"}}, 400),
        ({"stream": True, "stream_options": {"include_usage": 1}}, None), ({"truncate_prompt_tokens": -5}, 400),
    ):  # fmt: skip
        response = await http.post(
            "/v1/completions", json={"model": server.name, "prompt": "Hi", "max_tokens": 2} | fields
        )
        assert response.status_code == status if status else response.status_code < 500, (fields, response.text[:300])


async def test_prompts_at_the_limit_of_the_context(http, server, atom, context: int) -> None:
    async def ask(tokens: int, most: int) -> httpx.Response:
        return await http.post("/v1/completions", json={
            "model": server.name, "prompt": [100] * tokens, "max_tokens": most, "ignore_eos": True,
            "steering": {"atoms": {atom: 1}}})  # fmt: skip

    fits = await ask(context - 1, 1)
    assert fits.status_code == 200 and fits.json()["usage"] == fits.json()["usage"] | {"prompt_tokens": context - 1}
    assert (await ask(context - 8, 8)).json()["usage"]["completion_tokens"] == 8
    assert (await ask(context - 1, 50)).json()["usage"]["completion_tokens"] == 1, "vLLM ends answers with the context"
    for tokens, most in ((context, 1), (context * 100, 1), (context + 1, 0)):
        assert (await ask(tokens, most)).status_code == 400, (tokens, most)


async def test_headers_and_bodies(http, server, admin_key: str) -> None:
    body = json.dumps({"model": server.name, "prompt": "Hi", "max_tokens": 2}).encode()
    kind = ("Content-Type", "application/json")
    twice = [kind, ("Authorization", "Bearer a"), ("Authorization", f"Bearer {admin_key}")]
    assert (await http.post("/v1/completions", content=body, headers=twice)).status_code == 401
    odd = [
        kind,
        ("X-Request-Id", "a"),
        ("X-Request-Id", "b\t\x7f"),
        ("Traceparent", "zz"),
        ("X-data-parallel-rank", "99"),
    ]
    assert (await http.post("/v1/completions", content=body, headers=odd)).status_code < 500
    assert (
        await http.post("/v1/completions", content=b"{" + b" " * (1 << 20) + b"}", headers=[kind])
    ).status_code == 413

    async def endless():
        while True:
            yield b" " * 65536

    with suppress(httpx.TransportError):  # the server answers and hangs up while we write
        assert (await http.post("/v1/completions", content=endless(), headers=[kind])).status_code == 413
    for content, status in (
        (b"", 400),
        (b"null", 400),
        (b"[]", 400),
        (b"\xff\xfe{\x00}\x00", 400),
        (b'{"a":' * 100_000, 400),
    ):
        assert (await http.post("/v1/completions", content=content, headers=[kind])).status_code == status, content[:10]
    for media in ("text/plain", "application/json; charset=utf-16", "application/x-www-form-urlencoded", ""):
        assert (await http.post("/v1/completions", content=body, headers={"Content-Type": media})).status_code < 500
    hidden = body.replace(b"{", b'{"steering": {"atoms": {"nothing": 1}}, ', 1)
    for media in ("text/plain", "application/vnd.api+json", "application/json, text/plain", "APPLICATION/JSON"):
        answer = await http.post("/v1/completions", content=hidden, headers={"Content-Type": media})
        assert answer.status_code in (400, 404, 415), f"steering was not looked at as {media}: {answer.text}"


async def test_streams_that_are_closed_midway(http, server, atom) -> None:
    async def leave(number: int) -> None:
        body = {"model": server.name, "prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True,
                "n": 1 + number % 3, "logprobs": 3, "steering": {"atoms": {atom: number / 20}}}  # fmt: skip
        async with http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for _ in response.aiter_lines():
                if random.random() < 0.3:
                    return

    await asyncio.gather(*(leave(number) for number in range(24)))


async def test_more_mixes_at_once_than_may_run_or_wait(http, server, real_package) -> None:
    """300 distinct ones on 16 slots and 256 waiting places: each is answered, those too many with 503."""
    ids = [card.id for card in real_package.manifest.atoms]

    async def ask(number: int) -> httpx.Response:
        atoms = {ids[0]: round(-2 + number / 100, 2), ids[-1]: 1.5}
        return await http.post("/v1/completions", json={
            "model": server.name, "prompt": "Once", "max_tokens": 4, "ignore_eos": True, "steering": {"atoms": atoms}})  # fmt: skip

    answers = await asyncio.gather(*(ask(number) for number in range(300)))
    assert {answer.status_code for answer in answers} <= {200, 503}
    served = [answer for answer in answers if answer.status_code == 200]
    assert len(served) >= 272 and len({answer.headers["X-Atomsteer-Mix"] for answer in served}) == len(served)
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers if answer.status_code == 503)
    print(f"{len(served)} of 300 served")


async def test_web_pages_of_the_allowed_origin_read_refusals_too(http, server, atom, web_origin: str) -> None:
    origin = {"Origin": web_origin}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    assert (await http.options("/v1/completions", headers=origin | asked)).status_code == 200
    for name, status in ((atom, 200), ("nothing", 404)):
        body = {"model": server.name, "prompt": "Once", "max_tokens": 2, "steering": {"atoms": {name: 1}}}
        answer = await http.post("/v1/completions", json=body, headers=origin)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, web_origin)
        assert {"X-Atomsteer-Mix", "Retry-After"} <= set(answer.headers["access-control-expose-headers"].split(", "))
    other = await http.post("/v1/completions", json=body, headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
