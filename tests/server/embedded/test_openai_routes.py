"""The generation routes in process: fields read, fields refused, and what the engine is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from httpx import AsyncClient, Response
from openai.types import Completion
from openai.types.chat import ChatCompletion

from atoms.engine import Grammar
from atoms.errors import GrammarError
from server.config import ServeConfig
from server.embedded.scripted import BREAK, ScriptedEngine
from server.limits import Limits

CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hello there"}]}
TEXT: dict[str, Any] = {"model": "demo", "prompt": "hello there"}


async def chat(client: AsyncClient, **fields: object) -> Response:
    return await client.post("/v1/chat/completions", json=CHAT | fields)


async def complete(client: AsyncClient, **fields: object) -> Response:
    return await client.post("/v1/completions", json=TEXT | fields)


async def test_a_chat_completion(client: AsyncClient, ids: list[str], engine: ScriptedEngine) -> None:
    response = await chat(client, steering={"atoms": {"list": 1.5}})
    body = response.json()
    assert ChatCompletion.model_validate(body).choices[0].message.content == "one two three"
    assert body["object"] == "chat.completion"
    assert body["model"] == "demo"
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "one two three", "refusal": None}, "logprobs": None,
         "finish_reason": "stop"}
    ]  # fmt: skip
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert body["steering"] == {
        "mix": response.headers["X-Atomsteer-Mix"], "atoms": {ids[0]: 1.5}, "predicted_kl": 0.1125, "scaled_by": 1.0,
        "preset": None, "experiment": None, "arm": None, "phase": "all",
    }  # fmt: skip
    assert engine.requests[0].mix.as_dict() == {ids[0]: 1.5}


async def test_a_phase_reaches_the_engine(client: AsyncClient, engine: ScriptedEngine, ids: list[str]) -> None:
    response = await chat(client, steering={"atoms": {"list": 1.5}, "phase": "decode"})
    assert response.json()["steering"]["phase"] == "decode"
    assert response.headers["X-Atomsteer-Mix"].endswith("-decode")
    assert engine.requests[0].phase == "decode"


async def test_a_completion(client: AsyncClient, engine: ScriptedEngine) -> None:
    body = (await complete(client)).json()
    assert Completion.model_validate(body).choices[0].text == "one two three"
    assert body["object"] == "text_completion"
    assert engine.requests[0].sampling.max_tokens == 16, "OpenAI's default"


async def test_model_stays_the_requested_name(client: AsyncClient) -> None:
    body = (await chat(client, model="demo:polite")).json()
    assert (body["model"], body["steering"]["preset"]) == ("demo:polite", "polite")


async def test_sampling_fields_reach_the_engine(client: AsyncClient, engine: ScriptedEngine) -> None:
    response = await chat(
        client, max_completion_tokens=7, temperature=0, top_p=0.5, top_k=-1, min_p=0.1, seed=5, stop="END",
        presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.1, logit_bias={"42": -100}, logprobs=True,
        top_logprobs=3, ignore_eos=True, include_stop_str_in_output=True, user="u", metadata={"k": "v"},
    )  # fmt: skip
    assert response.status_code == 200
    sampling = engine.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (7, 0.0, 0.5, 0)
    assert (sampling.min_p, sampling.seed, sampling.stop, sampling.repetition_penalty) == (0.1, 5, ("END",), 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.logprobs) == (1.0, -1.0, 3)
    assert (sampling.logit_bias, sampling.ignore_eos, sampling.include_stop) == (((42, -100.0),), True, True)


async def test_defaults_and_nulls(client: AsyncClient, engine: ScriptedEngine) -> None:
    await chat(client)
    fields = ("max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "logprobs",
              "top_logprobs", "logit_bias", "user", "metadata", "tools", "steering")  # fmt: skip
    assert (await chat(client, **dict.fromkeys(fields))).status_code == 200
    assert engine.requests[0].sampling == engine.requests[1].sampling


async def test_choices_have_seeds_of_their_own(client: AsyncClient, engine: ScriptedEngine) -> None:
    body = (await chat(client, n=3, seed=10)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [request.sampling.seed for request in engine.requests] == [10, 11, 12]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12}
    assert len({request.request_id for request in engine.requests}) == 3


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a b", [(97, 98)]),
        (["a", "b"], [(97,), (98,)]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
async def test_prompts_of_completions(
    client: AsyncClient, engine: ScriptedEngine, prompt: object, prompts: list[tuple[int, ...]]
) -> None:
    body = (await complete(client, prompt=prompt, n=2, seed=1)).json()
    asked = [request.prompt_token_ids for request in engine.requests]
    assert asked == [ids for ids in prompts for _ in range(2)]
    assert [request.sampling.seed for request in engine.requests] == [1, 2] * len(prompts)
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(prompts)))
    assert body["usage"]["prompt_tokens"] == sum(len(ids) for ids in prompts)


@pytest.mark.parametrize(
    "prompt", [None, "", "  ", [], [""], [[]], [1, "a"], [-1], [True], [1.5], {}, 7, ["a", []], [[1], 2], [1000]]
)
async def test_bad_prompts(client: AsyncClient, prompt: object) -> None:
    response = await complete(client, prompt=prompt)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")


async def test_logprobs_of_a_chat(client: AsyncClient) -> None:
    body = (await chat(client, logprobs=True, top_logprobs=1, max_tokens=1)).json()
    assert body["choices"][0]["logprobs"] == {
        "content": [
            {"token": "one", "bytes": [111, 110, 101], "logprob": -0.5,
             "top_logprobs": [{"token": "one", "bytes": [111, 110, 101], "logprob": -0.5}]}
        ],
        "refusal": None,
    }  # fmt: skip
    assert body["choices"][0]["finish_reason"] == "length"
    alone = (await chat(client, logprobs=True, max_tokens=1)).json()
    assert alone["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_logprobs_of_a_completion(client: AsyncClient) -> None:
    body = (await complete(client, logprobs=2, max_tokens=2)).json()
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["one", " two"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"one": -0.5, "one1": -1.5}, {" two": -0.5, " two1": -1.5}],
        "text_offset": [0, 3],
    }


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"stop": [1]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 2000}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"1000": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 30: 1}}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_use": True}}, "stream_options.include_use"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"user": 1}, "user"),
        ({"metadata": []}, "metadata"),
        ({"ignore_eos": 1}, "ignore_eos"),
    ],
)
async def test_bad_values(client: AsyncClient, engine: ScriptedEngine, fields: dict[str, Any], param: str) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        content = json.dumps(body | fields)  # httpx refuses NaN; clients in other languages do not
        response = await client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
        assert len(response.text) < 500
    assert not engine.requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
    ],
)
async def test_bad_chat_values(client: AsyncClient, fields: dict[str, Any], param: str) -> None:
    response = await chat(client, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (None, "messages"),
        ([], "messages"),
        ("hi", "messages"),
        ([5], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "x", "tool_calls": [{}]}],
         "messages[1].tool_calls[0]"),
        ([{"role": "user", "content": "x"}] * 1025, "messages"),
    ],
)  # fmt: skip
async def test_bad_messages(client: AsyncClient, messages: object, param: str) -> None:
    response = await chat(client, messages=messages)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_messages_as_templates_read_them(
    client: AsyncClient, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(engine, "encode_chat", lambda messages, tools: seen.extend(messages) or (1,))
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    echoed = {"role": "assistant", "content": "x", "tool_calls": None, "annotations": [], "refusal": None}
    await chat(client, messages=[{"role": "developer", "content": parts, "name": "me"}, echoed])
    assert seen == [{"role": "system", "content": "a\nb", "name": "me"}, {"role": "assistant", "content": "x"}]


REFUSED: dict[str, object] = {
    "functions": [{}], "function_call": {"name": "f"},
    "audio": {}, "modalities": ["audio"], "prediction": {},
    "reasoning_effort": "high", "web_search_options": {}, "store": True, "verbosity": "low",
    "guided_json": {}, "guided_regex": "a", "guided_choice": ["a"], "guided_grammar": "g",
    "min_tokens": 1, "stop_token_ids": [1], "bad_words": ["x"], "use_beam_search": True, "best_of": 2, "echo": True,
    "suffix": "x", "prompt_logprobs": 0, "chat_template": "{}", "chat_template_kwargs": {"a": 1},
    "add_generation_prompt": False, "continue_final_message": True, "truncate_prompt_tokens": 5,
    "skip_special_tokens": False, "length_penalty": 1.5, "logits_processors": ["x"], "allowed_token_ids": [1],
    "lora": [{"id": 0, "scale": 1}], "lora_path": "x", "grammar": "g", "typical_p": 0.5, "mirostat": 2,
    "extra_body": {"steering": {}}, "atoms": {"list": 1}, "preset": "polite", "mix": "list=1", "max_kl": 1,
}  # fmt: skip
NEUTRAL: dict[str, object] = {
    "tools": [], "tool_choice": "auto", "functions": [], "function_call": "none", "parallel_tool_calls": True,
    "response_format": {"type": "text"}, "modalities": ["text"], "reasoning_effort": None, "store": False,
    "min_tokens": 0, "stop_token_ids": [], "bad_words": [], "use_beam_search": False, "best_of": 1, "echo": False,
    "suffix": None, "prompt_logprobs": None, "chat_template": None, "add_generation_prompt": True,
    "continue_final_message": False, "skip_special_tokens": True, "length_penalty": 1.0, "typical_p": 1.0,
    "service_tier": "auto", "prompt_cache_key": "k", "some_client": {"field": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
async def test_unsupported_fields_are_refused_by_name(client: AsyncClient, name: str) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)):
        response = await client.post(path, json=body | {name: REFUSED[name]})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", name)
        assert name in error["message"]


async def test_neutral_and_foreign_fields_are_accepted(client: AsyncClient) -> None:
    assert (await chat(client, **NEUTRAL)).status_code == 200
    assert (await complete(client, **NEUTRAL)).status_code == 200


SCHEMA: dict[str, Any] = {"type": "object", "properties": {"é": {"type": "integer"}}}
ANY_OBJECT = Grammar("json_schema", '{"type":"object"}')


def json_schema(**fields: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA} | fields}


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
        ({"response_format": json_schema(strict=True, description="d")},
         Grammar("json_schema", '{"type":"object","properties":{"é":{"type":"integer"}}}')),
        ({"structured_outputs": {"json": '{"type": "object"}'}}, ANY_OBJECT),
        ({"structured_outputs": {"json_object": True, "regex": None}}, ANY_OBJECT),
        ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
        ({"structured_outputs": {"choice": ["yes", "é"]}, "response_format": {"type": "text"}},
         Grammar("choice", '["yes","é"]')),
    ],
)  # fmt: skip
async def test_grammars_reach_the_engine(
    client: AsyncClient, engine: ScriptedEngine, fields: dict[str, Any], grammar: Grammar | None
) -> None:
    assert (await chat(client, **fields)).status_code == 200
    assert (await complete(client, **fields)).status_code == 200
    assert [request.sampling.grammar for request in engine.requests] == [grammar] * 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x"),
        ({"response_format": {"type": "json_object", "json_schema": {}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": json_schema(name=5)}, "response_format.json_schema.name"),
        ({"response_format": json_schema(strict=1)}, "response_format.json_schema.strict"),
        ({"response_format": json_schema(schema=None)}, "response_format.json_schema.schema"),
        ({"response_format": json_schema(schema=[])}, "response_format.json_schema.schema"),
        ({"response_format": json_schema(schema="{")}, "response_format.json_schema.schema"),
        ({"response_format": json_schema(schema={"enum": ["x" * 70_000]})}, "response_format.json_schema.schema"),
        ({"response_format": json_schema(extra=1)}, "response_format.json_schema.extra"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: A"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ],
)
async def test_bad_grammars(client: AsyncClient, engine: ScriptedEngine, fields: dict[str, Any], param: str) -> None:
    response = await chat(client, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert len(response.text) < 500
    assert not engine.requests


async def test_a_grammar_that_the_engine_refuses_is_blamed_on_its_field(
    client: AsyncClient, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(grammar: Grammar) -> None:
        raise GrammarError(f"cannot follow {grammar.kind}")

    monkeypatch.setattr(engine, "compile_grammar", refuse)
    for stream in (False, True):
        response = await chat(client, response_format=json_schema(), stream=stream)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "response_format.json_schema.schema")
        assert "cannot follow json_schema" in error["message"]


async def test_true_is_no_neutral_one(client: AsyncClient) -> None:
    assert (await chat(client, best_of=True)).status_code == 400
    assert (await chat(client, echo=0)).status_code == 400


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "gpt-4"}, 404, "model_not_found", "model"),
        ({"model": "demo:rude"}, 404, "preset_not_found", "model"),
        ({"steering": {"atoms": {"lits": 1}}}, 404, "atom_not_found", "steering.atoms.lits"),
        ({"steering": {"atoms": {"list": 9}}}, 400, "invalid_coefficient", "steering.atoms.list"),
        ({"steering": {"atoms": {"list": 1}, "strength": 2}}, 400, "invalid_value", "steering.strength"),
        ({"steering": {"atoms": {"list": 2}, "max_kl": 0.1}}, 400, "drift_budget_exceeded", "steering.max_kl"),
        ({"steering": {"experiment": "e"}}, 404, "experiment_not_found", "steering.experiment"),
        ({"steering": {"preset": "polite"}, "model": "demo:polite"}, 400, "invalid_value", "steering.preset"),
        ({"max_tokens": 500}, 400, "context_length_exceeded", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_token(
    client: AsyncClient, engine: ScriptedEngine, fields: dict[str, Any], status: int, code: str, param: str | None,
    stream: bool,
) -> None:  # fmt: skip
    for path, body, prompt in (("/v1/chat/completions", CHAT, "messages"), ("/v1/completions", TEXT, "prompt")):
        response = await client.post(path, json=body | fields | {"stream": stream})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (status, code, param or prompt)
        assert response.headers["content-type"] == "application/json"
    assert not engine.requests


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue(client: AsyncClient, engine: ScriptedEngine, stream: bool) -> None:
    engine.max_waiting = 0
    response = await chat(client, stream=stream)
    assert (response.status_code, response.headers["Retry-After"]) == (429, "5")
    assert response.json()["error"]["code"] == "engine_overloaded"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_queue_too_short_for_all_choices_refuses_them_all(
    client: AsyncClient, engine: ScriptedEngine, stream: bool
) -> None:
    engine.slots, engine.max_waiting = 1, 2
    assert (await chat(client, stream=stream, n=4)).status_code == 429
    assert engine.stats().running == engine.stats().waiting == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stopped_engine(client: AsyncClient, engine: ScriptedEngine, stream: bool) -> None:
    engine.close()
    response = await chat(client, stream=stream)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_stopped")
    assert response.headers["Retry-After"]


async def test_a_failing_engine_tells_nothing(client: AsyncClient, engine: ScriptedEngine) -> None:
    engine.script = BREAK
    response = await chat(client)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")
    assert "secret" not in response.text


async def test_limits_are_settings(client_of: Callable[..., AsyncClient], config: ServeConfig) -> None:
    limits = Limits(max_n=1, max_sequences=2, max_stop=1, max_logprobs=1, max_messages=1, max_atoms_per_mix=1)
    async with client_of(replace(config, presets=(), limits=limits)) as client:
        for fields, param in (
            ({"n": 2}, "n"),
            ({"stop": ["a", "b"]}, "stop"),
            ({"logprobs": True, "top_logprobs": 2}, "top_logprobs"),
            ({"messages": CHAT["messages"] * 2}, "messages"),
            ({"steering": {"atoms": {"list": 1, "formal": 1}}}, "steering.atoms"),
        ):
            assert (await chat(client, **fields)).json()["error"]["param"] == param
        assert (await complete(client, prompt=["a", "b"])).status_code == 200
        assert (await complete(client, prompt=["a", "b", "c"])).json()["error"]["param"] == "prompt"
