"""atomsteer-client against vLLM: every call that generates, whole and streamed, both clients."""

from __future__ import annotations

import openai
import pytest
from atomsteer_client import AsyncClient, Client, Echo, SteeredResponse, echo_of

from atoms.package import Package

TOKENS = 8


@pytest.fixture
def client(server):
    with Client(base_url=server.v1, max_retries=0) as client:
        yield client


@pytest.fixture
def mix(real_package: Package) -> dict[str, float]:
    return {real_package.manifest.atoms[0].id: 3.0}


@pytest.fixture
def expected(real_package: Package, mix: dict[str, float]) -> tuple[str, dict[str, float]]:
    return real_package.digest(real_package.mix(mix)), mix


def applied(echo: Echo | None) -> tuple[str, dict[str, float]]:
    assert isinstance(echo, Echo)
    return echo.mix, echo.atoms


def asks(server) -> tuple[dict, dict, dict]:
    chat = {"messages": [{"role": "user", "content": "Name three fruits."}], "max_tokens": TOKENS}
    common = {"model": server.name, "temperature": 0}
    return (
        common | chat,
        common | {"prompt": "One, two,", "max_tokens": TOKENS},
        common | {"input": "Name three fruits.", "max_output_tokens": TOKENS},
    )


def test_every_call_is_steered_and_echoed(server, client: Client, mix, expected) -> None:
    chat, completion, response = asks(server)
    whole = client.chat.completions.create(**chat, steering=mix)
    chunks = list(client.chat.completions.create(**chat, steering=mix, stream=True))
    assert applied(whole.steering) == applied(chunks[0].steering) == expected
    text = whole.choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert text != client.chat.completions.create(**chat).choices[0].message.content, "the mix changed nothing"
    assert applied(client.completions.create(**completion, steering=mix).steering) == expected
    first = next(iter(client.completions.create(**completion, steering=mix, stream=True)))
    assert applied(first.steering) == expected
    answered = client.responses.create(**response, steering=mix)
    events = list(client.responses.create(**response, steering=mix, stream=True))
    assert isinstance(answered, SteeredResponse) and applied(answered.steering) == expected
    assert events[0].type == "response.created" and applied(echo_of(events[0])) == expected
    assert answered.output_text == text
    # OpenAI's helper wants an answer that ends by itself.
    with client.chat.completions.stream(
        **chat | {"max_tokens": 64, "stop": ["a", "e", "i", "o"]}, steering=mix
    ) as stream:
        assert applied(echo_of(stream.get_final_completion())) == expected


async def test_the_asynchronous_client_does_the_same(server, mix, expected) -> None:
    chat, _, response = asks(server)
    async with AsyncClient(base_url=server.v1, max_retries=0) as client:
        assert applied((await client.chat.completions.create(**chat, steering=mix)).steering) == expected
        stream = await client.chat.completions.create(**chat, steering=mix, stream=True)
        assert applied((await anext(aiter(stream))).steering) == expected
        assert applied((await client.responses.create(**response, steering=mix)).steering) == expected


def test_the_servers_own_routes(server, client: Client, real_package: Package, mix, expected) -> None:
    assert [atom.id for atom in client.atoms.list()] == [card.id for card in real_package.manifest.atoms]
    assert client.atoms.get(next(iter(mix))).id == next(iter(mix))
    assert applied(client.steering.preview(mix)) == expected
    assert client.presets.get("strong").fixed
    plain, steered = client.compare("Name three fruits.", [mix], max_tokens=TOKENS, temperature=0)
    assert plain.steering.atoms == {} and applied(steered.steering) == expected and plain.text != steered.text
    with pytest.raises(openai.NotFoundError, match="unknown atom 'nope'"):
        client.responses.create(model=server.name, input="Hi", steering={"nope": 1})
