"""What every host must do, on real weights, through the real `openai` package."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

MESSAGES: list[Any] = [{"role": "user", "content": "Name three fruits."}]


def steer(**steering: Any) -> dict[str, Any]:
    return {"steering": steering}


def ask(client: OpenAI, host: Any, body: dict[str, Any] | None = None, **more: Any) -> Any:
    fields = {"model": host.name, "messages": MESSAGES, "max_tokens": 8, "temperature": 0} | more
    return client.chat.completions.create(**fields, extra_body=body)


def text(answer: Any) -> str:
    return answer.choices[0].message.content


def test_models(host: Any, client: OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == [host.name, f"{host.name}:strong"]
    assert listed[f"{host.name}:strong"].parent == host.name and listed[host.name].max_model_len == 512
    assert client.models.retrieve(host.name).object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_chat_with_echo_headers_and_usage(host: Any, client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=host.name, messages=MESSAGES, max_tokens=8, temperature=0, extra_headers={"X-Request-Id": "conform-1"},
        extra_body=steer(atoms={host.atom: 1.5, host.other: 0}) | {"ignore_eos": True},
    )  # fmt: skip
    answer = raw.parse()
    echo = answer.steering
    assert echo["atoms"] == {host.atom: 1.5} and echo["scaled_by"] == 1 and echo["preset"] is None
    assert raw.headers["x-atomsteer-mix"] == echo["mix"] and raw.headers["x-request-id"] == "conform-1"
    assert (
        answer.object == "chat.completion"
        and answer.model == host.name
        and answer.choices[0].message.role == "assistant"
    )
    assert answer.usage.completion_tokens == 8 and answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer.choices[0].finish_reason == "length"


def test_requests_of_one_id_have_responses_of_their_own(host: Any, client: OpenAI) -> None:
    answers = [ask(client, host, max_tokens=1, extra_headers={"X-Request-Id": "trace-1"}) for _ in range(2)]
    assert len({answer.id for answer in answers}) == 2


def test_a_stream_is_the_whole_answer(host: Any, client: OpenAI) -> None:
    body = steer(atoms={host.atom: 1.5}) | {"ignore_eos": True}
    whole = ask(client, host, body)
    chunks = list(ask(client, host, body, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text(whole)
    assert chunks[0].steering == whole.steering and not hasattr(chunks[1], "steering")
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"


def test_the_raw_stream_is_well_formed(host: Any) -> None:
    body = {"model": host.name, "messages": MESSAGES, "max_tokens": 3, "stream": True}
    response = httpx.post(f"{host.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {host.key}"},
                          timeout=300)  # fmt: skip
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    assert all(json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {"))


def test_completions(host: Any, client: OpenAI) -> None:
    answer = client.completions.create(model=host.name, prompt=["One, two,", "The sky is"], max_tokens=4, temperature=0,
                                       logprobs=2, extra_body=steer(atoms={host.atom: 1}))  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1] and answer.object == "text_completion"
    assert all(len(choice.logprobs.tokens) == 4 for choice in answer.choices)
    one = client.completions.create(model=host.name, prompt="The sky is", max_tokens=4, temperature=0,
                                    extra_body=steer(atoms={host.atom: 1}))  # fmt: skip
    assert one.choices[0].text == answer.choices[1].text
    stream = client.completions.create(model=host.name, prompt="The sky is", max_tokens=4, temperature=0, stream=True,
                                       extra_body=steer(atoms={host.atom: 1}))  # fmt: skip
    assert "".join(chunk.choices[0].text for chunk in stream) == one.choices[0].text


def test_n_seeds_and_logprobs(host: Any, client: OpenAI) -> None:
    fields: dict[str, Any] = {"n": 3, "seed": 7, "temperature": 1, "logprobs": True, "top_logprobs": 2}
    first, second = (ask(client, host, {"ignore_eos": True}, **fields) for _ in range(2))
    assert [c.message.content for c in first.choices] == [c.message.content for c in second.choices]
    assert [c.index for c in first.choices] == [0, 1, 2] and len({c.message.content for c in first.choices}) > 1
    assert all(len(c.logprobs.content) == 8 and len(c.logprobs.content[0].top_logprobs) == 2 for c in first.choices)


def test_stop_strings_and_logit_bias(host: Any, client: OpenAI) -> None:
    whole = text(ask(client, host))
    cut = whole[3:6]
    stopped = ask(client, host, stop=[cut])
    assert text(stopped) == whole[: whole.index(cut)] and stopped.choices[0].finish_reason == "stop"
    first = ask(client, host, logprobs=True, max_tokens=1).choices[0].logprobs.content[0].token
    token = _token(host, client, first)
    banned = ask(client, host, logit_bias={str(token): -100}, logprobs=True, max_tokens=1)
    assert banned.choices[0].logprobs.content[0].token != first


def _token(host: Any, client: OpenAI, piece: str) -> int:
    """The id of the token that reads `piece`; `root` of the served model is where its tokenizer is."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(client.models.retrieve(host.name).root or "").convert_tokens_to_ids(piece)


def test_a_json_schema_is_kept(host: Any, client: OpenAI) -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"],
              "additionalProperties": False}  # fmt: skip
    answer = ask(client, host, steer(atoms={host.atom: 1}), max_tokens=32, response_format={
        "type": "json_schema", "json_schema": {"name": "c", "schema": schema}})  # fmt: skip
    assert json.loads(text(answer))["colour"] in ("red", "green")


def test_the_responses_api(host: Any, client: OpenAI) -> None:
    fields: dict[str, Any] = {"model": host.name, "input": "Name three fruits.", "max_output_tokens": 8, "temperature": 0,
                              "extra_body": steer(atoms={host.atom: 1.5})}  # fmt: skip
    whole = client.responses.create(**fields)
    events = list(client.responses.create(**fields, stream=True))
    assert whole.steering["atoms"] == {host.atom: 1.5} == events[0].response.steering["atoms"]
    assert events[0].type == "response.created" and events[-1].response.output_text == whole.output_text
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    chat = ask(client, host, steer(atoms={host.atom: 1.5}))
    assert whole.output_text == text(chat), "the mix did not reach the engine"
    assert whole.usage.output_tokens == chat.usage.completion_tokens


def test_steering_changes_answers_and_an_empty_mix_does_not(host: Any, client: OpenAI) -> None:
    plain = ask(client, host, logprobs=True)
    for unsteered in (None, {"steering": None}, steer(atoms={}), steer(atoms={host.atom: 0.00001})):
        answer = ask(client, host, unsteered, logprobs=True)
        assert answer.choices[0].logprobs == plain.choices[0].logprobs and answer.steering["atoms"] == {}
        assert answer.steering["mix"] == plain.steering["mix"]
    steered = ask(client, host, steer(atoms={host.atom: 3}), logprobs=True)
    assert steered.choices[0].logprobs != plain.choices[0].logprobs


def test_presets(host: Any, client: OpenAI) -> None:
    by_name = ask(client, host, model=f"{host.name}:strong")
    assert by_name.model == f"{host.name}:strong" and by_name.steering["preset"] == "strong"
    by_field = ask(client, host, steer(preset="strong"))
    by_atoms = ask(client, host, steer(atoms={host.atom: 2}))
    assert text(by_name) == text(by_field) == text(by_atoms)
    assert by_name.steering["mix"] == by_field.steering["mix"] == by_atoms.steering["mix"]
    over = ask(client, host, steer(preset="strong", atoms={host.atom: 0, host.other: 1}))
    assert over.steering["atoms"] == {host.other: 1}
    assert ask(client, host, steer(atoms={host.other: 1}), model=f"{host.name}:strong").steering["atoms"] == {
        host.atom: 2, host.other: 1,
    }  # fmt: skip


def test_the_drift_budget(host: Any, client: OpenAI) -> None:
    full = ask(client, host, steer(atoms={host.atom: 2})).steering["predicted_kl"]
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, host, steer(atoms={host.atom: 2}, max_kl=full / 4))
    assert (refused.value.code, refused.value.param) == ("drift_budget_exceeded", "steering.max_kl")
    scaled = ask(client, host, steer(atoms={host.atom: 2}, max_kl=full / 4, on_exceed="scale")).steering
    assert 0.99 * full / 4 <= scaled["predicted_kl"] <= full / 4
    assert scaled["atoms"][host.atom] == pytest.approx(2 * scaled["scaled_by"], abs=1e-4)


@pytest.mark.parametrize(
    ("steering", "status", "param"),
    [
        ({"atoms": {"no-such-atom": 1}}, 404, "steering.atoms.no-such-atom"),
        ({"preset": "no-such-preset"}, 404, "steering.preset"),
        ({"experiment": "no-such-experiment"}, 404, "steering.experiment"),
        ({"atoms": {"ATOM": 99}}, 400, "steering.atoms.ATOM"),
        ({"atoms": {"ATOM": "1"}}, 400, "steering.atoms.ATOM"),
        ({"atoms": []}, 400, "steering.atoms"),
        ({"strength": 1}, 400, "steering.strength"),
        ({"atoms": {"ATOM": 99}, "allow_out_of_range": True}, 403, "steering.allow_out_of_range"),
        ({"max_kl": -1}, 400, "steering.max_kl"),
        ({"on_exceed": "ignore"}, 400, "steering.on_exceed"),
        ("strong", 400, "steering"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_steering(host: Any, client: OpenAI, steering: Any, status: int, param: str, stream: bool) -> None:
    written = json.loads(json.dumps(steering).replace("ATOM", host.atom))
    with pytest.raises(openai.APIStatusError) as refused:
        ask(client, host, {"steering": written}, stream=stream)
    assert (refused.value.status_code, refused.value.param) == (status, param.replace("ATOM", host.atom))
    assert refused.value.body.keys() == {"message", "type", "param", "code"}  # type: ignore[union-attr]


def test_a_preset_twice_is_refused(host: Any, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="give one"):
        ask(client, host, steer(preset="strong"), model=f"{host.name}:strong")


def test_admins_may_leave_the_tested_range(host: Any) -> None:
    with host.sdk(host.admin_key) as admin:
        answer = ask(admin, host, steer(atoms={host.atom: 4}, allow_out_of_range=True))
    assert answer.steering["atoms"] == {host.atom: 4}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError),
        ({"max_tokens": 65}, openai.BadRequestError),
        ({"max_tokens": 0}, openai.BadRequestError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"messages": []}, openai.BadRequestError),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, openai.BadRequestError),
        ({"tools": [{"type": "function", "function": {"name": "clock"}}]}, openai.BadRequestError),
    ],
)
def test_wrong_requests(host: Any, client: OpenAI, fields: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        ask(client, host, **fields)


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"model": NaN}', b"[" * 5000])
def test_bodies_that_are_no_json(host: Any, body: bytes) -> None:
    headers = {"Authorization": f"Bearer {host.key}", "Content-Type": "application/json"}
    refused = httpx.post(f"{host.url}/v1/chat/completions", content=body, headers=headers, timeout=60)
    assert refused.status_code in (400, 422) and "error" in refused.json()


def test_keys(host: Any) -> None:
    with host.sdk("wrong") as stranger, pytest.raises(openai.AuthenticationError) as refused:
        ask(stranger, host)
    assert refused.value.code == "invalid_api_key"
    for path, status in (("/health", 200), ("/ready", 200), ("/version", 200), ("/metrics", 200), ("/v1/models", 401)):
        assert httpx.get(host.url + path, timeout=60).status_code == status
    bearer = {"Authorization": f"Bearer {host.key}"}
    assert httpx.get(f"{host.url}/v1/atoms/{host.atom}/documents", headers=bearer, timeout=60).status_code == 403
    assert httpx.post(f"{host.url}/v1/admin/reload", headers=bearer, timeout=60).status_code == 403


def test_our_routes(host: Any) -> None:
    with httpx.Client(base_url=host.url, headers={"Authorization": f"Bearer {host.key}"}, timeout=60) as http:
        assert http.get(f"/v1/atoms/{host.atom}").json()["id"] == host.atom
        preview = http.post("/v1/steering/preview", json={"model": f"{host.name}:strong"}).json()
        assert preview["steering"]["atoms"] == {host.atom: 2}
        assert http.get("/v1/presets").json()["data"][0]["name"] == "strong"
        assert http.get("/ready").json()["steering"]["active"] is True
        metrics = http.get("/metrics").text
    for name in (
        "atomsteer_requests_total",
        "atomsteer_atom_requests_total",
        "vllm:generation_tokens_total",
        "atomsteer_package_info",
    ):
        assert name in metrics
    assert "running_lora_adapters=" not in metrics


async def test_many_mixes_at_once_answer_as_each_alone(host: Any) -> None:
    """Greedy, fp32. Where two differ, the two best tokens must have been within 1e-4 of each other."""
    async with AsyncOpenAI(base_url=f"{host.url}/v1", api_key=host.key, max_retries=0, timeout=300) as client:

        async def choice(value: float) -> Any:
            answer = await client.chat.completions.create(
                model=host.name, messages=MESSAGES, max_tokens=6, temperature=0, logprobs=True, top_logprobs=2,
                extra_body=steer(atoms={host.atom: value}),
            )  # fmt: skip
            return answer.choices[0].logprobs.content

        values = [-2.0, -1.0, 0.0, 1.0, 2.0, 2.5]
        alone = [await choice(value) for value in values]
        together = await asyncio.gather(*(choice(value) for value in values))
    for one, other in zip(alone, together, strict=True):
        place = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a.token != b.token), None)
        assert place is None or one[place].top_logprobs[0].logprob - one[place].top_logprobs[1].logprob <= 1e-4
    assert len({entry[0].logprob for entry in alone}) == len(values), "the mixes made no difference"


async def test_a_client_that_leaves_harms_nobody(host: Any) -> None:
    fields = {"model": host.name, "messages": MESSAGES, "temperature": 0}
    async with AsyncOpenAI(base_url=f"{host.url}/v1", api_key=host.key, max_retries=0, timeout=300) as client:
        before = await client.chat.completions.create(**fields, max_tokens=2)
        for _ in range(12):  # more than there are slots
            stream = await client.chat.completions.create(**fields, stream=True, max_tokens=64)
            async for _ in stream:
                break
            await stream.close()
        after = await client.chat.completions.create(**fields, max_tokens=2)
    assert after.usage.completion_tokens == 2 and text(after) == text(before)
