"""Requests that mean harm, over a real socket: each is refused with a 4xx, nothing hangs, nothing leaks, and the server serves on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx
import pytest

from server.config import ServeConfig

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}
PATH = "/v1/chat/completions"
KEY = "the-good-key"


@pytest.fixture
def config(config: ServeConfig) -> ServeConfig:
    return replace(config, body_timeout=2.0, api_keys=(KEY,))


@pytest.fixture
def http(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=20) as http:
        yield http
        assert http.post(PATH, json=CHAT).status_code == 200, "the server was harmed"


def raw(server: Any, data: bytes, seconds: float = 5.0) -> bytes:
    """What comes back for these bytes until the server closes, or for so long."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(data)
        received = b""
        try:
            while part := connection.recv(65536):
                received += part
        except TimeoutError:
            pass
    return received


def head(*lines: str, path: str = PATH) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", *lines, "", ""]).encode(
        "latin-1"
    )


BODY = json.dumps(CHAT).encode()
SMUGGLED = b"GET /v1/atoms HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "framing",
    [
        (f"Content-Length: {len(BODY)}", "Content-Length: 5"),
        (f"Content-Length: {len(BODY)}, 5",),
        ("Content-Length: -5",),
        ("Content-Length: 1e3",),
        ("Content-Length: 9" + "9" * 30,),
        ("Transfer-Encoding: chunked, identity", f"Content-Length: {len(BODY)}"),
        ("Transfer-Encoding: xchunked",),
        ("Transfer-Encoding : chunked",),
    ],
)
def test_ambiguous_framing_is_refused(server: Any, http: httpx.Client, framing: tuple[str, ...]) -> None:
    answer = raw(server, head("Content-Type: application/json", "Connection: close", *framing) + BODY + SMUGGLED, 2)
    assert answer.count(b"HTTP/1.1 ") <= 1, "the smuggled request was answered too"
    assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501")) or answer == b"", answer[:200]


@pytest.mark.parametrize(
    "line",
    ["X-Request-Id: a\r\nX-Evil: 1", "X-Request-Id: \x00\x07", "Authorization: Bearer other", "X-Request-Id: " + "é" * 4000],
)  # fmt: skip
def test_headers_are_not_reflected_or_mixed_up(server: Any, http: httpx.Client, line: str) -> None:
    answer = raw(
        server, head("Content-Type: application/json", f"Content-Length: {len(BODY)}", "Connection: close", line) + BODY
    )
    assert b"X-Evil" not in answer.partition(b"\r\n\r\n")[0] and "é".encode("latin-1") not in answer
    assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400", b"HTTP/1.1 401", b"HTTP/1.1 431"))
    if "other" in line:
        assert answer.startswith(b"HTTP/1.1 401")


def test_a_body_that_trickles_is_given_up(server: Any, http: httpx.Client) -> None:
    start = time.monotonic()
    answer = raw(server, head("Content-Type: application/json", "Content-Length: 100") + b'{"model"', 10)
    assert answer.startswith(b"HTTP/1.1 408") and time.monotonic() - start < 8
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_timeout"
    assert server.traffic.active == 0


def test_an_answer_may_take_longer_than_a_body(server: Any, http: httpx.Client) -> None:
    server.engine.script, server.engine.delay = " ".join(["word"] * 20), 0.15
    assert http.post(PATH, json=CHAT).status_code == 200
    server.engine.delay = 0.0


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("[" * 100_000, 400),
        ('{"a":' * 50_000, 400),
        ('{"model":"demo","messages":' + "[" * 150 + "]" * 150 + "}", 400),
        ('{"model":"demo","messages":[],"steering":{"atoms":{"list":NaN}}}', 400),
        ('{"model":"demo","messages":[],"steering":{"atoms":{"list":1e999}}}', 400),
        ('{"model":"demo","messages":[],"steering":{"atoms":{"list":-Infinity}}}', 400),
        ('{"model":"demo","messages":[],"steering":{"atoms":{"list":' + "9" * 4000 + "}}}", 400),
        ('{"model":"demo","messages":[{"role":"user","content":"\\ud800"}]}', 400),
        ('{"model":"demo","messages":[{"role":"user","content":"x","\\u0000":1}]}', 400),
    ],
)  # fmt: skip
def test_json_made_to_break_parsers(http: httpx.Client, text: str, status: int) -> None:
    start = time.monotonic()
    answer = http.post(PATH, content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"} and len(answer.text) < 1000
    assert time.monotonic() - start < 15


def test_a_million_atoms(http: httpx.Client) -> None:
    many = {f"a{number}": 1 for number in range(1_000_000)}
    assert http.post(PATH, json=CHAT | {"steering": {"atoms": many}}).status_code == 413
    fitting = {f"a{number}": 1 for number in range(60_000)}
    start = time.monotonic()
    refused = http.post(PATH, json=CHAT | {"steering": {"atoms": fitting}})
    assert refused.status_code == 400 and "32" in refused.json()["error"]["message"]
    assert len(refused.text) < 1000 and time.monotonic() - start < 15


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_too_long_is_answered_and_not_cut_off(http: httpx.Client, declared: bool) -> None:
    """A client that still writes when the server hangs up never sees the answer."""
    body = b" " * (5 << 20)
    for _ in range(10):
        pieces = body if declared else (body[at : at + 65536] for at in range(0, len(body), 65536))
        refused = http.post(PATH, content=pieces, headers={"Content-Type": "application/json"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")


def test_a_body_without_end_is_not_read_without_end(http: httpx.Client) -> None:
    sent = 0

    def pieces():
        nonlocal sent
        for _ in range(1000):
            sent += 1 << 20
            yield b" " * (1 << 20)

    with suppress(httpx.TransportError):
        http.post(PATH, content=pieces(), headers={"Content-Type": "application/json"})
    assert sent < 64 << 20


NAMES = ("../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "os.system", "__class__", "a\x00b", "a\r\nSet-Cookie: x", "‮abc",
         "𝕒", "é" * 64, "x" * 5000, "", " ", "%2e%2e%2f", "mix:{}", "${jndi:ldap://x}", "{{7*7}}", "'; DROP TABLE presets;--")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_are_looked_up_and_nothing_else(http: httpx.Client, name: str) -> None:
    for fields in (
        {"steering": {"atoms": {name: 1}}}, {"steering": {"preset": name}}, {"steering": {"experiment": name}},
        {"model": name}, {"model": f"demo:{name}"},
    ):  # fmt: skip
        refused = http.post(PATH, json=CHAT | fields)
        assert refused.status_code == 404, (fields, refused.text)
        assert len(refused.text) < 1000 and "root:" not in refused.text
        assert "Set-Cookie" not in refused.headers


def test_tool_arguments_are_parsed_with_care(http: httpx.Client) -> None:
    for arguments in ("[" * 900, '{"a":' * 900 + "1" + "}" * 900, '{"a": "\\ud800"}', '{"a": NaN}', "x" * 100_000):
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
        turns = [*CHAT["messages"], {"role": "assistant", "content": None, "tool_calls": [call]}]  # type: ignore[misc]
        refused = http.post(PATH, json=CHAT | {"messages": turns})
        assert (refused.status_code, refused.json()["error"]["param"]) == (
            400,
            "messages[1].tool_calls[0].function.arguments",
        )


def test_nested_schemas_are_refused_or_served(http: httpx.Client) -> None:
    for depth in (50, 500, 900, 3000):
        schema = '{"type":"object","properties":{"a":' * depth + "{}" + "}}" * depth
        answer = http.post(PATH, json=CHAT | {"structured_outputs": {"json": schema}})
        assert answer.status_code in (200, 400), (depth, answer.text)


def test_wrong_keys_are_refused_alike(server: Any, http: httpx.Client) -> None:
    """That each key is compared in constant time is tested in `test_keys`; timing one here would be noise."""
    keys = (KEY[:-1], KEY + "x", KEY.upper(), "x" * 10_000)
    answers = [httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"}) for key in keys]
    assert {answer.status_code for answer in answers} == {401} and len({answer.text for answer in answers}) == 1
