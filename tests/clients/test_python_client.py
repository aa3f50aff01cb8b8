"""atomsteer-client against the real server, and against one that ignores steering."""

from __future__ import annotations

import inspect
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import openai
import pyarrow.parquet
import pytest
from atomsteer_client import AsyncClient, Client, Echo, SteeringIgnoredError, echo_of, resources
from atomsteer_client.steering import wire_form

from atoms.errors import EngineStoppedError
from atoms.package import Package
from clients.plain_openai import without_environment
from server.errors import (
    CollisionError,
    ConflictError,
    NoStoreError,
    NotSupportedHereError,
    ReloadError,
    StoreOverloadedError,
    StoreUnavailableError,
    error_headers,
    error_kind,
)

ADMIN_KEY = "admin-key-of-the-tests"
ASK = {
    "model": "demo",
    "messages": [{"role": "user", "content": "Name three fruits."}],
    "max_tokens": 8,
    "temperature": 0,
}
COMPLETE = {"model": "demo", "prompt": "One, two,", "max_tokens": 4, "temperature": 0}
MIX = {"numbered-list": 2}
WHOLE = ASK | {"max_tokens": 64, "stop": ["a", "e", "i", "o", "u"]}
"""An answer that ends by itself, as OpenAI's helpers want it."""


@pytest.fixture
def client(real_server: str) -> Iterator[Client]:
    with Client(base_url=real_server, api_key=ADMIN_KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def expected(named_package: Package) -> Echo:
    mix = named_package.mix({"numbered-list": 2.0})
    return Echo(
        mix=named_package.digest(mix), atoms=mix.as_dict(), predicted_kl=named_package.predicted_kl(mix), scaled_by=1.0
    )


def check(echo: Echo | None, expected: Echo) -> None:
    assert isinstance(echo, Echo)
    assert (echo.mix, echo.atoms, echo.scaled_by) == (expected.mix, expected.atoms, 1.0)
    assert echo.predicted_kl == pytest.approx(expected.predicted_kl, abs=1e-5)


def test_every_call_that_generates_takes_steering_and_gives_a_typed_echo(client: Client, expected: Echo) -> None:
    whole = client.chat.completions.create(**ASK, steering=MIX)
    check(whole.steering, expected)
    chunks = list(client.chat.completions.create(**ASK, steering=MIX, stream=True))
    check(chunks[0].steering, expected)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    check(client.completions.create(**COMPLETE, steering=MIX).steering, expected)
    check(next(iter(client.completions.create(**COMPLETE, steering=MIX, stream=True))).steering, expected)
    raw = client.chat.completions.with_raw_response.create(**ASK, steering=MIX)
    assert raw.headers["x-atomsteer-mix"] == expected.mix
    check(raw.parse().steering, expected)
    with client.chat.completions.with_streaming_response.create(**ASK, steering=MIX) as streamed:
        check(streamed.parse().steering, expected)
    with client.chat.completions.stream(**WHOLE, steering=MIX) as stream:
        check(echo_of(stream.get_final_completion()), expected)
    check(echo_of(client.chat.completions.parse(**WHOLE, steering=MIX)), expected)
    for nothing in (openai.omit, openai.NOT_GIVEN):
        assert client.chat.completions.create(**ASK, steering=nothing).steering.atoms == {}
    check(echo_of(client.beta.chat.completions.parse(**WHOLE, steering=MIX)), expected)
    check(client.with_options(timeout=60).chat.completions.create(**ASK, steering=MIX).steering, expected)


def test_the_responses_api_is_steered_and_echoed(client: Client, expected: Echo) -> None:
    asked = {"model": "demo", "input": "Name three fruits.", "max_output_tokens": 8, "temperature": 0, "steering": MIX}
    whole = client.responses.create(**asked)
    check(whole.steering, expected)
    events = list(client.responses.create(**asked, stream=True))
    assert events[0].type == "response.created"
    check(echo_of(events[0]), expected)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert whole.output_text == client.chat.completions.create(**ASK, steering=MIX).choices[0].message.content


async def test_the_asynchronous_client_does_the_same(real_server: str, expected: Echo) -> None:
    async with AsyncClient(base_url=real_server, max_retries=0) as client:
        whole = await client.chat.completions.create(**ASK, steering=MIX)
        check(whole.steering, expected)
        stream = await client.chat.completions.create(**ASK, steering=MIX, stream=True)
        chunks = [chunk async for chunk in stream]
        check(chunks[0].steering, expected)
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
        check((await client.completions.create(**COMPLETE, steering=MIX)).steering, expected)
        response = await client.responses.create(model="demo", input="Hi", max_output_tokens=4, steering=MIX)
        check(response.steering, expected)
        async with client.chat.completions.stream(**WHOLE, steering=MIX) as helper:
            check(echo_of(await helper.get_final_completion()), expected)
        check((await client.beta.chat.completions.create(**ASK, steering=MIX)).steering, expected)
        check(await client.steering.preview(MIX), expected)
        assert [atom.name for atom in await client.atoms.search("numbered")] == ["numbered-list"]
        assert (await client.presets.get("lists")).fixed
        plain, steered = await client.compare("Name three fruits.", [{"numbered-list": 3}], max_tokens=8, temperature=0)
        assert plain.steering.atoms == {} and list(steered.steering.atoms.values()) == [3.0]


def test_steering_takes_the_wire_form_and_says_nothing_when_it_is_left_out(client: Client) -> None:
    assert client.chat.completions.create(**ASK).steering.atoms == {}
    assert client.chat.completions.create(**ASK, steering={}).steering.atoms == {}
    assert client.chat.completions.create(**ASK, steering={"preset": "lists"}).steering.preset == "lists"
    scaled = client.chat.completions.create(**ASK, steering={"atoms": MIX, "max_kl": 0.01, "on_exceed": "scale"})
    assert scaled.steering.scaled_by < 1 and scaled.steering.predicted_kl <= 0.01
    with pytest.raises(openai.NotFoundError, match="unknown atom 'nope'"):
        client.chat.completions.create(**ASK, steering={"nope": 1})
    with pytest.raises(TypeError, match="twice"):
        client.chat.completions.create(**ASK, steering=MIX, extra_body={"steering": {}})


def test_atoms_and_preview(client: Client, named_package: Package, expected: Echo) -> None:
    assert [atom.id for atom in client.atoms.list()] == [card.id for card in named_package.manifest.atoms]
    card = named_package.card("numbered-list")
    atom = client.atoms.get("numbered-list")
    assert (atom.id, tuple(atom.tested_range), atom.keywords) == (card.id, card.tested_range, card.keywords)
    assert client.atoms.search(f"{card.keywords[0]} numbered")[0].id == card.id
    assert not client.atoms.search("no-atom-is-called-so")
    with pytest.raises(openai.NotFoundError):
        client.atoms.get("../models")
    check(client.steering.preview(MIX), expected)
    assert client.steering.preview(model="demo:lists").preset == "lists"


def test_compare_sets_the_unsteered_answer_beside_the_steered_ones(client: Client) -> None:
    plain, low, high = client.compare(
        "Name three fruits.", [{"numbered-list": -3}, {"numbered-list": 3}], max_tokens=12, temperature=0.8
    )
    assert plain.mix is None and plain.steering.atoms == {}
    assert [list(c.steering.atoms.values()) for c in (low, high)] == [[-3.0], [3.0]]
    again = client.compare("Name three fruits.", [{"numbered-list": 3}], max_tokens=12, temperature=0.8)
    assert [c.text for c in again] == [plain.text, high.text], "the same seed must give the same answers"
    assert len({plain.text, low.text, high.text}) > 1


def test_presets_and_experiments(client: Client) -> None:
    preset = client.presets.set("brief", {"one-word": 1})
    assert (preset.version, preset.fixed, client.presets.get("brief").atoms) == (1, False, preset.atoms)
    assert client.chat.completions.create(**ASK, steering={"preset": "brief"}).steering.atoms == preset.atoms
    with pytest.raises(openai.ConflictError):
        client.presets.set("brief", {"one-word": 2}, if_version=7)
    client.presets.delete("brief")
    assert "brief" not in [preset.name for preset in client.presets.list()]
    arms = [{"name": "weak", "atoms": {"numbered-list": 1}}, {"name": "strong", "atoms": {"numbered-list": 2}}]
    client.experiments.create(
        name="lists", arms=arms, metrics=[{"name": "liked", "kind": "proportion", "goal": "increase"}]
    )
    assert client.experiments.start("lists").status == "running"
    answer = client.chat.completions.create(**ASK, user="u1", steering={"experiment": "lists"})
    assert answer.steering.arm in ("weak", "strong")
    stored = client.experiments.record("lists", answer.id, "liked", True)
    assert (stored.stored, stored.unknown_responses) == (1, [])
    assert client.experiments.report("lists")["object"]
    assert client.experiments.stop("lists", "enough").status == "stopped"
    assert client.experiments.promote("lists", "strong", "liked-lists").name == "liked-lists"
    assert [experiment.name for experiment in client.experiments.list()] == ["lists"]


def test_what_another_try_cannot_mend_is_asked_once(real_server: str) -> None:
    """OpenAI's client tries a 409 three times if nobody tells it better."""
    sent: list[str] = []
    counting = openai.DefaultHttpxClient(event_hooks={"request": [lambda request: sent.append(request.url.path)]})
    with openai.OpenAI(base_url=real_server, api_key=ADMIN_KEY, max_retries=2, http_client=counting) as client:
        draft = {"name": "still-a-draft", "arms": [{"name": "one", "atoms": {}}], "holdout": 0.5}
        client.post("/experiments", body=draft, cast_to=object)
        sent.clear()
        with pytest.raises(openai.ConflictError, match="has not been started"):
            client.chat.completions.create(**ASK, user="u", extra_body={"steering": {"experiment": "still-a-draft"}})
        with pytest.raises(openai.ConflictError, match="exists already"):
            client.post("/experiments", body=draft, cast_to=object)
        assert sent == ["/v1/chat/completions", "/v1/experiments"]
        client.delete("/experiments/still-a-draft", cast_to=object)


def test_only_a_collision_of_changes_is_worth_another_try() -> None:
    collision = CollisionError("somebody was faster")
    assert (error_kind(collision).status, error_headers(collision)) == (409, {"Retry-After": "1"})
    for final in (ConflictError("x"), ReloadError("x"), NoStoreError("x"), NotSupportedHereError("x")):
        assert error_headers(final) == {"x-should-retry": "false"}
    for passing in (EngineStoppedError("x"), StoreUnavailableError("x"), StoreOverloadedError("x")):
        assert "x-should-retry" not in error_headers(passing) and "Retry-After" in error_headers(passing)


def test_names_that_would_climb_the_path_are_names(client: Client) -> None:
    for name in (".", "..", "a/../b"):
        for found in (client.atoms.get, client.presets.get, client.presets.delete):
            with pytest.raises(openai.NotFoundError):
                found(name)
        with pytest.raises(openai.APIStatusError):
            client.experiments.get(name)
    arms = [{"name": "weak", "atoms": {"numbered-list": 1}}, {"name": "strong", "atoms": {"numbered-list": 2}}]
    client.experiments.create(name="dots", arms=arms)
    client.experiments.start("dots")
    client.chat.completions.create(**ASK, user="..", steering={"experiment": "dots"})
    assert client.experiments.forget("..") >= 2, "whoever calls themselves .. can be forgotten"
    client.experiments.stop("dots")
    client.experiments.delete("dots")


def test_arguments_that_are_no_steering_are_refused_before_anything_is_sent() -> None:
    with Client(base_url="http://127.0.0.1:9/v1", max_retries=0) as client:
        for wrong in ("numbered-list=2", [("numbered-list", 2)], 2):
            with pytest.raises(TypeError, match="must be a mapping"):
                client.chat.completions.create(**ASK, steering=wrong)  # type: ignore[call-overload]
        for out_of_place in ({"stream": True}, {"steering": MIX}, {"messages": []}):
            with pytest.raises(TypeError, match="compare takes no"):
                client.compare("hi", [MIX], model="demo", **out_of_place)
        with pytest.raises(TypeError, match="a list of mixes"):
            client.compare("hi", MIX, model="demo")  # type: ignore[arg-type]


async def test_an_experiment_asynchronously_from_draft_to_forgotten(real_server: str) -> None:
    arms = [{"name": "weak", "atoms": {"numbered-list": 1}}, {"name": "strong", "atoms": {"numbered-list": 2}}]
    async with AsyncClient(base_url=real_server, api_key=ADMIN_KEY, max_retries=0) as client:
        routes = client.experiments
        await routes.create(name="life", arms=arms)
        draft = await routes.replace("life", arms=arms, unit="header:X-Person", metrics=[{"name": "liked"}])
        assert (draft.status, draft.control, draft.started_at) == ("draft", "weak", None)
        assert [arm.share for arm in draft.arms] == [0.5, 0.5]
        assert "life" in [found.name for found in await routes.list("draft")]
        assert (await routes.start("life")).status == "running"
        assert "life" not in [found.name for found in await routes.list("draft")]
        asked = {"steering": {"experiment": "life"}, "extra_headers": {"X-Person": "ann/1"}}
        preview = await client.steering.preview(**asked)
        answer = await client.chat.completions.create(**ASK, **asked)
        assert answer.steering.arm == preview.arm is not None
        assert (await routes.record("life", answer.id, "liked", 1)).stored == 1
        assert (
            await routes.record_many("life", [{"response_id": answer.id, "metric": "liked", "value": 0}])
        ).stored == 1
        assert (await routes.ramp("life", 0.5)).coverage == 0.5
        report = await routes.report("life", looks=3)
        assert (sum(report["units"].values()), len(report["looks"])) == (1, 3)
        outcomes = pyarrow.parquet.read_table(io.BytesIO(await routes.export("life", "outcomes"))).to_pylist()
        assert [(row["unit"], row["value"]) for row in outcomes if row["metric"] == "liked"] == [("ann/1", 0.0)]
        assert await routes.forget("ann/1") >= 3
        assert (await routes.stop("life")).stop_reason == "stopped by an operator"
        preset = await routes.promote("life", "strong", "kept", description="better", if_version=0)
        assert (preset.version, preset.description) == (1, "better")
        with pytest.raises(openai.ConflictError):
            await routes.promote("life", "weak", "kept", if_version=0)
        assert [found.version for found in await client.presets.versions("kept")] == [1]
        await client.presets.delete("kept")
        await routes.delete("life")
        with pytest.raises(openai.NotFoundError):
            await routes.get("life")


@pytest.mark.parametrize("name", ["Atoms", "SteeringRoutes", "Presets", "Experiments"])
def test_both_clients_have_the_same_routes(name: str) -> None:
    def routes(kind: type) -> dict[str, inspect.Signature]:
        return {key: inspect.signature(value) for key, value in vars(kind).items() if key[0] != "_"}

    assert routes(getattr(resources, name)) == routes(getattr(resources, f"Async{name}")) != {}


def test_the_form_of_steering_is_told_from_a_mix() -> None:
    assert wire_form({"numbered-list": 2}) == {"atoms": {"numbered-list": 2}}
    assert wire_form({}) == {"atoms": {}}
    for fields in ({"max_kl": 0.5}, {"preset": "brief"}, {"atoms": MIX, "max_kl": 0.5, "on_exceed": "scale"}):
        assert wire_form(fields) == fields
    for mixed in ({"numbered-list": 2, "max_kl": 0.5}, {"numbered-list": 2, "preset": "brief"}):
        with pytest.raises(TypeError, match="numbered-list.*beside fields"):
            wire_form(mixed)


class _IgnorantServer(BaseHTTPRequestHandler):
    """Answers as OpenAI does, whatever `steering` says: vLLM without the plugin does the same."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        delta = {
            "index": 0,
            "finish_reason": "stop",
            "delta": {"content": "hi"},
            "message": {"role": "assistant", "content": "hi"},
        }
        answer = json.dumps(
            {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [delta]}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if body.get("stream") else "application/json")
        self.end_headers()
        self.wfile.write(b"data: " + answer + b"\n\ndata: [DONE]\n\n" if body.get("stream") else answer)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def ignorant_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _IgnorantServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_server_that_ignores_steering_is_an_error(ignorant_server: str, stream: bool) -> None:
    with Client(base_url=ignorant_server) as client:
        for asked in ({"steering": MIX}, {"extra_body": {"steering": {"atoms": MIX}}}):
            with pytest.raises(SteeringIgnoredError, match=ignorant_server):
                client.chat.completions.create(**ASK, **asked, stream=stream)
        with pytest.raises(SteeringIgnoredError):
            client.chat.completions.with_raw_response.create(**ASK, steering=MIX)
        with (
            pytest.raises(SteeringIgnoredError),
            client.chat.completions.with_streaming_response.create(**ASK, steering=MIX),
        ):
            pass
        assert client.chat.completions.create(**ASK), "whoever asks for no steering may use any server"
    async with AsyncClient(base_url=ignorant_server) as other:
        with pytest.raises(SteeringIgnoredError):
            await other.chat.completions.create(**ASK, steering=MIX, stream=stream)


@pytest.fixture
def openais_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ORG_ID", "PROJECT_ID", "WEBHOOK_SECRET", "ADMIN_KEY", "API_KEY"):
        monkeypatch.setenv(f"OPENAI_{name}", "secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Team: secret\nAuthorization: Bearer secret")


class _Recorder(httpx2.MockTransport):
    """Answers every request with nothing, and keeps its headers."""

    def __init__(self) -> None:
        self.sent: list[httpx2.Headers] = []
        super().__init__(self._answer)

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        self.sent.append(request.headers)
        return httpx2.Response(200, json={"object": "list", "data": []})


@pytest.mark.usefixtures("openais_environment")
async def test_nothing_of_openais_environment_is_sent_to_another_server() -> None:
    recorder = _Recorder()
    given = {"api_key": "mine", "base_url": "http://steering.example/v1", "default_headers": {"X-Own": "kept"}}
    with Client(**given, http_client=httpx2.Client(transport=recorder)) as client:
        client.models.list()
        client.with_options(max_retries=0).models.list()
        assert (client.organization, client.project, client.webhook_secret, client.admin_api_key) == (None,) * 4
    async with AsyncClient(**given, http_client=httpx2.AsyncClient(transport=recorder)) as other:
        await other.models.list()
        await other.with_options(max_retries=0).models.list()
    plain = openai.OpenAI(base_url=given["base_url"], api_key="mine", http_client=httpx2.Client(transport=recorder))
    with without_environment(plain) as client:
        client.models.list()
    assert len(recorder.sent) == 5
    for headers in recorder.sent:
        assert "secret" not in str(dict(headers)) and headers["authorization"] == "Bearer mine"
    assert [headers.get("x-own") for headers in recorder.sent] == ["kept"] * 4 + [None]


@pytest.mark.usefixtures("openais_environment")
def test_what_is_given_is_sent() -> None:
    recorder = _Recorder()
    with Client(organization="org", project="pro", http_client=httpx2.Client(transport=recorder)) as client:
        client.models.list()
    (headers,) = recorder.sent
    assert (headers["openai-organization"], headers["openai-project"]) == ("org", "pro")


def test_a_servers_list_of_keys_is_no_clients_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOMSTEER_API_KEY", "a,b")
    for make in (Client, AsyncClient, lambda: Client(api_key="a,b")):
        with pytest.raises(ValueError, match="one of them"):
            make()
    with Client(api_key="a") as client:
        assert client.api_key == "a"


def test_openais_key_is_not_sent_to_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://api.openai.com/v1")
    with Client() as client:
        assert client.api_key == "none" and str(client.base_url).startswith("http://127.0.0.1:8000")
    monkeypatch.setenv("ATOMSTEER_BASE_URL", "http://steering.example/v1")
    monkeypatch.setenv("ATOMSTEER_API_KEY", "mine")
    with Client() as client:
        assert client.api_key == "mine" and client.base_url.host == "steering.example"
