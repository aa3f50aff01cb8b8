"""The installed command, a real model, a discovered package, and the real OpenAI SDK, over a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel, ConfigDict, Field

from atoms.package import Package

PROMPT = [{"role": "user", "content": "Name three fruits."}]


@pytest.fixture(scope="module")
def server(
    real_package: Package, smol_path: Path, tmp_path_factory: pytest.TempPathFactory,
    serving: Callable[[list[str], Path], AbstractContextManager[str]],
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """(base URL, name of the model); asserts at the end that SIGTERM stops the server cleanly."""
    log = tmp_path_factory.mktemp("serve") / "log"
    options = ["--package", str(real_package.path), "--model", str(smol_path), "--dtype", "float32"]
    with serving(options, log) as url:
        yield url + "/v1", real_package.manifest.name


def _steer(**atoms: float) -> dict:
    return {"steering": {"atoms": {name.replace("_", "-"): value for name, value in atoms.items()}}}


def _ask(client: OpenAI, model: str, body: dict | None = None, **more):
    return client.chat.completions.create(
        model=model, messages=PROMPT, max_tokens=10, temperature=0, extra_body=body, **more
    )


def test_an_answer_carries_the_echo_and_an_unsteered_one_says_so(server, real_package: Package) -> None:
    url, model = server
    atom = real_package.manifest.atoms[0].id
    with OpenAI(base_url=url, api_key="none") as client:
        raw = client.chat.completions.with_raw_response.create(
            model=model, messages=PROMPT, max_tokens=4, temperature=0, extra_body={"steering": {"atoms": {atom: 1}}}
        )
        answer = raw.parse()
        assert answer.steering["atoms"] == {atom: 1.0}
        assert (
            answer.steering["mix"] == raw.headers["x-atomsteer-mix"] == real_package.digest(real_package.mix({atom: 1}))
        )
        assert answer.steering["predicted_kl"] == pytest.approx(
            real_package.predicted_kl(real_package.mix({atom: 1})), abs=1e-5
        )
        assert _ask(client, model).steering["atoms"] == {}


def test_streamed_pieces_are_the_whole_answer(server) -> None:
    url, model = server
    with OpenAI(base_url=url, api_key="none") as client:
        whole = _ask(client, model)
        chunks = list(_ask(client, model, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].steering["atoms"] == {}, "the first chunk carries the echo"
    assert chunks[-1].usage == whole.usage


async def test_concurrent_mixes_answer_as_each_does_alone(server, real_package: Package) -> None:
    """Greedy texts in fp32: rows of one batch that leaked into each other would differ from their solo answers."""
    url, model = server
    ids = [card.id for card in real_package.manifest.atoms]
    mixes = [{}, {ids[0]: 3.0}, {ids[0]: -3.0}, {ids[-1]: 3.0}, {}, {ids[-1]: -3.0}]

    async with AsyncOpenAI(base_url=url, api_key="none") as client:

        async def ask(mix: dict) -> str:
            answer = await client.chat.completions.create(
                model=model, messages=PROMPT, max_tokens=10, temperature=0, extra_body={"steering": {"atoms": mix}}
            )
            return answer.choices[0].message.content

        alone = [await ask(mix) for mix in mixes]
        together = await asyncio.gather(*(ask(mix) for mix in mixes))
    assert together == alone
    assert len(set(alone)) > 1, "no mix changed the answer, so equality would prove nothing"


async def test_an_asynchronous_stream_that_is_left_frees_the_server_for_others(server) -> None:
    url, model = server
    async with AsyncOpenAI(base_url=url, api_key="none") as client:
        stream = await client.chat.completions.create(model=model, messages=PROMPT, max_tokens=400, stream=True)
        async for _ in stream:
            break
        await stream.close()
        answer = await client.completions.create(model=model, prompt="One, two,", max_tokens=4, temperature=0)
    assert answer.choices[0].text


def test_errors_have_openai_form(server) -> None:
    url, model = server
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        with pytest.raises(NotFoundError, match="unknown atom 'nope'"):
            _ask(client, model, _steer(nope=1))
        with pytest.raises(NotFoundError, match="model"):
            _ask(client, "another-model")
        with pytest.raises(BadRequestError, match="tools"):
            _ask(client, model, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
        with pytest.raises(BadRequestError, match="strength"):
            _ask(client, model, {"steering": {"strength": 2}})


class _Person(BaseModel):
    model_config = ConfigDict(extra="forbid")  # else an answer may go on with properties of its own
    name: Annotated[str, Field(max_length=12)]
    age: Annotated[int, Field(ge=0, le=150)]
    tags: Annotated[list[Literal["red", "green"]], Field(min_length=1, max_length=2)]


def _person(**fields: object) -> dict[str, Any]:
    schema = _Person.model_json_schema() | fields
    return {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema}}


async def test_answers_match_a_schema_whatever_the_mix_and_temperature(server, real_package: Package) -> None:
    """One batch of constrained and free rows, steered and not: every constrained one validates, no free one changes."""
    url, model = server
    atom = real_package.manifest.atoms[0].id
    async with AsyncOpenAI(base_url=url, api_key="none") as client:

        async def ask(temperature: float, mix: dict, constrained: bool) -> str:
            answer = await client.chat.completions.create(
                model=model, messages=PROMPT, max_tokens=90 if constrained else 8, temperature=temperature, seed=1,
                extra_body={"steering": {"atoms": mix}} | ({"response_format": _person()} if constrained else {}),
            )  # fmt: skip
            assert not constrained or answer.choices[0].finish_reason == "stop"
            return answer.choices[0].message.content

        free = [await ask(0, mix, False) for mix in ({}, {atom: 3})]
        cells = [(t, mix, constrained) for constrained in (True, False) for t in (0, 1) for mix in ({}, {atom: 3})]
        texts = await asyncio.gather(*(ask(*cell) for cell in cells))
    for text in texts[:4]:
        jsonschema.validate(json.loads(text), _Person.model_json_schema())
    assert texts[4:6] == free, "a row without a grammar was changed by those with one"


def test_the_sdks_own_parser_and_stream_of_a_schema(server) -> None:
    url, model = server
    with OpenAI(base_url=url, api_key="none") as client:
        parsed = client.chat.completions.parse(
            model=model, messages=PROMPT, max_tokens=90, temperature=0, response_format=_Person
        )
        assert isinstance(parsed.choices[0].message.parsed, _Person)
        chunks = list(_ask_json(client, model, stream=True))
        cut = _ask_json(client, model, max_tokens=3)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == parsed.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert cut.choices[0].finish_reason == "length"
    assert parsed.choices[0].message.content.startswith(cut.choices[0].message.content)


def _ask_json(client: OpenAI, model: str, **more):
    options: dict[str, Any] = {"max_tokens": 90, "temperature": 0, "response_format": _person(), **more}
    return client.chat.completions.create(model=model, messages=PROMPT, **options)


def test_json_mode_choices_and_refused_schemas(server) -> None:
    url, model = server
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        text = client.completions.create(
            model=model, prompt="Is fire hot? Answer:", temperature=1, n=3, max_tokens=9,
            extra_body={"structured_outputs": {"choice": ["certainly", "no"]}},
        )  # fmt: skip
        assert {choice.text for choice in text.choices} <= {"certainly", "no"}
        mode = _ask_json(client, model, response_format={"type": "json_object"}, max_tokens=3, temperature=1)
        assert mode.choices[0].message.content.startswith("{")
        with pytest.raises(BadRequestError, match="not") as refused:
            _ask_json(client, model, response_format=_person(**{"not": {"type": "string"}}))
        assert refused.value.param == "response_format.json_schema.schema"
        with pytest.raises(BadRequestError, match="not"):
            _ask_json(client, model, response_format=_person(**{"not": {"type": "string"}}), stream=True)
