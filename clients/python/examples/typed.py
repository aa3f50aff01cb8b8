"""What a type checker sees: `mypy --strict` reads this file, and holds each claim in it to be true.

An `ignore` that is not needed is an error there too, so the mistakes below are known to be found.
"""

from typing import assert_type

from atomsteer_client import (
    Arm,
    AsyncClient,
    Atom,
    Client,
    Compared,
    Echo,
    Experiment,
    Preset,
    SteeredChatCompletion,
    SteeredChatCompletionChunk,
    SteeredCompletion,
    SteeredResponse,
    Steering,
    echo_of,
)
from openai import AsyncStream, Stream
from openai.types.responses import ResponseStreamEvent

MIX = {"numbered-list": 2.0}
BUDGET: Steering = {"atoms": MIX, "max_kl": 0.5, "on_exceed": "scale"}


def generate(client: Client) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hi"}], max_tokens=8, steering=MIX
    )
    assert_type(answer, SteeredChatCompletion)
    assert_type(answer.steering.predicted_kl, float)
    assert_type(answer.choices[0].message.content, str | None)
    stream = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hi"}], stream=True, steering=BUDGET
    )
    assert_type(stream, Stream[SteeredChatCompletionChunk])
    for chunk in stream:
        assert_type(chunk.steering, Echo | None)
    assert_type(client.completions.create(model="demo", prompt="Hi", steering=MIX), SteeredCompletion)
    assert_type(client.completions.create(model="demo", prompt="Hi", stream=True), Stream[SteeredCompletion])
    assert_type(client.responses.create(model="demo", input="Hi", steering={"preset": "brief"}), SteeredResponse)
    events = client.responses.create(model="demo", input="Hi", stream=True, steering=MIX)
    assert_type(events, Stream[ResponseStreamEvent])
    for event in events:
        assert_type(echo_of(event), Echo | None)


async def generate_asynchronously(client: AsyncClient) -> None:
    answer = await client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hi"}], steering=MIX
    )
    assert_type(answer, SteeredChatCompletion)
    stream = await client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hi"}], stream=True, steering=MIX
    )
    assert_type(stream, AsyncStream[SteeredChatCompletionChunk])
    assert_type(await client.responses.create(model="demo", input="Hi", steering=MIX), SteeredResponse)
    assert_type(await client.atoms.get("numbered-list"), Atom)
    assert_type(await client.compare("Hi", [MIX]), list[Compared])


def look_around(client: Client) -> None:
    assert_type(client.atoms.list(), list[Atom])
    assert_type(client.atoms.get("numbered-list").kl_curve, list[list[float]])
    assert_type([atom.name for atom in client.atoms.search("list")], list[str])
    assert_type(client.steering.preview(BUDGET), Echo)
    assert_type(client.presets.set("brief", MIX), Preset)
    assert_type(client.experiments.start("lists"), Experiment)
    assert_type(client.experiments.get("lists").arms[0], Arm)
    assert_type(client.experiments.export("lists", "outcomes"), bytes)
    assert_type(client.compare("Hi", [MIX, BUDGET])[0].steering, Echo)


def mistakes(client: Client) -> None:
    client.chat.completions.create(model="demo", steering=MIX)  # type: ignore[call-overload]
    client.completions.create(model="demo", prompt="Hi", max_tokens="8")  # type: ignore[call-overload]
    client.steering.preview({"atoms": MIX, "on_exceed": "shrug"})  # type: ignore[dict-item]
    client.steering.preview(["numbered-list"])  # type: ignore[arg-type]
    client.experiments.export("lists", "units")  # type: ignore[arg-type]
    client.atoms.get(3)  # type: ignore[arg-type]
