"""Requests at the edge of what OpenAI's API allows, and clients that misbehave, against the command with a real engine:
each is honoured or refused by name, and the server serves on with every slot free."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from atoms.package import Package

SLOTS = 4
KEY = "boss"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "log"


@pytest.fixture(scope="module")
def url(
    tiny_package: Package, log: Path, serving: Callable[[list[str], Path], AbstractContextManager[str]]
) -> Iterator[str]:
    options = [f"--package={tiny_package.path}", "--dtype=float32", "--database=none", f"--max-num-seqs={SLOTS}",
               "--admin-key=" + KEY, "--body-timeout=2"]  # fmt: skip
    with serving(options, log) as url:
        yield url
    assert "Traceback" not in log.read_text()


@pytest.fixture
def http(url: str, wait_for: Callable[..., bool]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {KEY}"}) as http:
        yield http
        assert ask(http).status_code == 200, "the server was harmed"
        # an answer is given before its slot is: the worker frees it after the step
        assert wait_for(lambda: running_requests(http) == 0), "a slot was leaked"


def running_requests(http: httpx.Client) -> float:
    found = re.search(r"^vllm:num_requests_running\S* (\S+)$", http.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def ask(http: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": "Name a fruit.", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    return http.post("/v1/completions", json=body | fields)


def chat(http: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 16, "temperature": 0}
    return http.post("/v1/chat/completions", json=body | fields)


def texts(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [choice["text"] for choice in response.json()["choices"]]


def test_each_choice_is_the_one_of_its_own_seed(http: httpx.Client) -> None:
    sampled = {"temperature": 1.5, "max_tokens": 12}
    together = texts(ask(http, n=3, seed=40, **sampled))
    assert together == [texts(ask(http, seed=40 + choice, **sampled))[0] for choice in range(3)]
    assert len(set(together)) == 3
    prompts = ["Name a fruit.", "Name a river."]
    assert texts(ask(http, prompt=prompts, n=3, seed=40, **sampled))[:3] == together


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 2, 0])
def test_seeds_at_the_ends_of_their_range(http: httpx.Client, seed: int) -> None:
    assert texts(ask(http, seed=seed, temperature=1, n=2)) == texts(ask(http, seed=seed, temperature=1, n=2))


def test_biases_at_their_extremes(http: httpx.Client) -> None:
    plain = texts(ask(http))[0]
    forced = ask(http, logit_bias={"7": 100}, logprobs=1).json()["choices"][0]
    assert len(set(forced["logprobs"]["tokens"])) == 1
    assert max(forced["logprobs"]["token_logprobs"]) <= 0, "log-probabilities are the model's, before the bias"
    all_down = texts(ask(http, logit_bias={str(token): -100 for token in range(400)}))[0]
    assert all_down == plain, "the same bias for all changes nothing"
    for bias in ({"7": 101}, {"7": "1"}, {"-1": 1}, {"999999": 1}, {"7.0": 1}, {"x": 1}):
        refused = ask(http, logit_bias=bias)
        assert refused.status_code == 400 and "logit_bias" in refused.json()["error"]["param"], refused.text


def test_a_stop_string_ends_the_text_wherever_tokens_meet(http: httpx.Client) -> None:
    whole = texts(ask(http, max_tokens=24))[0]
    for start in range(1, min(12, len(whole) - 4)):
        stop = whole[start : start + 3]
        cut = ask(http, max_tokens=24, stop=[stop]).json()["choices"][0]
        assert (cut["text"], cut["finish_reason"]) == (whole[: whole.index(stop)], "stop")
        kept = texts(ask(http, max_tokens=24, stop=[stop], include_stop_str_in_output=True))[0]
        assert kept == whole[: whole.index(stop) + 3]
    body = {"model": "tiny", "prompt": "Name a fruit.", "max_tokens": 24, "temperature": 0, "ignore_eos": True,
            "stop": whole[3:6], "stream": True}  # fmt: skip
    streamed = ""
    with http.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                streamed += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
    assert streamed == whole[: whole.index(whole[3:6])]


NUMBERS = {
    "max_tokens": (0, -1, 10**30, 1.5, "6", True),
    "temperature": (-0.1, 2.1, 1e308, "1", True),
    "top_p": (0, -1, 1.01),
    "n": (0, 17, 10**12, -1),
    "seed": (2**63, -(2**63) - 1, 0.5),
    "top_k": (-2, 1.5),
    "presence_penalty": (-2.01, 2.01),
    "frequency_penalty": (3,),
    "repetition_penalty": (0, -1, 11),
    "min_p": (-0.1, 1.1),
    "logprobs": (-1, 21, True),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in NUMBERS.items() for value in values])
def test_numbers_out_of_range_are_refused_by_name(http: httpx.Client, field: str, value: Any) -> None:
    refused = ask(http, **{field: value})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field), refused.text


def test_a_huge_number_that_is_in_range_is_no_number_of_steps(http: httpx.Client) -> None:
    assert ask(http, top_k=2**62, temperature=1).status_code == 200


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/list", "$defs": {"list": {"type": "array", "items": {"type": "integer"}, "maxItems": 1}}},
        {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {
            "left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}}, "additionalProperties": False}}},
        {"$ref": "#"},
        {"$ref": "#/$defs/missing"},
        {"$ref": "http://127.0.0.1:1/schema.json"},
        {"$ref": "file:///etc/passwd"},
        {"type": "string", "pattern": "(a+)+$"},
        {"type": "string", "pattern": "(((((((a{1,99}){1,99}){1,99}){1,99}){1,99}){1,99}){1,99}"},
        {"enum": []},
        {"type": "integer", "minimum": 5, "maximum": 1},
        {"type": "array", "minItems": 10**9},
        {"type": "string", "minLength": 10**12},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        False,
        {},
    ],
    ids=str,
)  # fmt: skip
def test_a_schema_is_followed_or_refused(http: httpx.Client, schema: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    answer = chat(http, response_format=form, max_tokens=60)
    if answer.status_code == 400:
        assert "response_format" in str(answer.json()["error"]["param"]), answer.text
        return
    choice = answer.json()["choices"][0]
    assert answer.status_code == 200, answer.text
    if choice["finish_reason"] == "stop":
        json.loads(choice["message"]["content"])
    assert "root:" not in answer.text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}, {"type": "function"}, "x", 7,
                                    {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}])  # fmt: skip
def test_tools_of_a_model_without_them(http: httpx.Client, choice: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/$defs/x"}}}]
    refused = chat(http, tools=tools, tool_choice=choice)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] or refused.json()["error"]["code"] == "unsupported_by_model"


def test_fields_nobody_knows_change_nothing_and_known_ones_are_not_ignored(http: httpx.Client) -> None:
    plain = texts(ask(http))
    assert texts(ask(http, **{"x-vendor": {"a": [1]}, "‮field": None, "safety_identifier": "u"})) == plain
    for field, value in (("min_tokens", 3), ("best_of", 2), ("echo", True), ("suffix", "x"), ("bad_words", ["a"]),
                         ("prompt_logprobs", 1), ("atoms", {"a": 1}), ("guided_json", {})):  # fmt: skip
        refused = ask(http, **{field: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field), refused.text


def test_clients_that_do_not_read_hold_nobody_up(http: httpx.Client, url: str) -> None:
    """More of them than there are slots; the rest of an answer that nobody takes must not stay in a slot."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 400, "stream": True, "ignore_eos": True}).encode()
    head = (f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n").encode()  # fmt: skip
    with ExitStack() as stack:
        for _ in range(3 * SLOTS):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.sendall(head + body)
        assert ask(http).status_code == 200


def test_many_idle_connections(http: httpx.Client, url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        for number in range(300):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\n" if number % 2 else b"")
        assert ask(http).status_code == 200


def test_reloads_under_load(http: httpx.Client, tiny_package: Package) -> None:
    atom = tiny_package.manifest.atoms[0].id
    expected = {value: texts(ask(http, steering={"atoms": {atom: value}}))[0] for value in (-1.0, 0.0, 1.0)}
    with ThreadPoolExecutor(12) as pool:
        answers = [(value, pool.submit(ask, http, steering={"atoms": {atom: value}})) for value in list(expected) * 20]
        reloads = [pool.submit(http.post, "/v1/admin/reload") for _ in range(3)]
        assert {reload.result().status_code for reload in reloads} <= {200, 409}
        assert any(reload.result().status_code == 200 for reload in reloads)
        for value, answer in answers:
            assert texts(answer.result())[0] == expected[value]
