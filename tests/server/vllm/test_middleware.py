"""Requests on their way into vLLM and answers on their way out, with a small application in vLLM's place."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from httpx import ASGITransport, AsyncClient
from sqlalchemy import select
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from atoms.package import Package
from server.auth import AuthMiddleware, KeyRing
from server.body import BodyLimitMiddleware
from server.config import ServeConfig
from server.context import RequestContextMiddleware, Traffic
from server.experiments.drift import DriftSampler
from server.experiments.recording import Outcome
from server.experiments.spec import ExperimentSpec
from server.limits import Limits
from server.metrics import SteeringMetrics
from server.state import Snapshot, State
from server.steering import Steering
from server.store.tables import exposures, responses
from server.vllm.exposure import OperatorMiddleware, operator_routes
from server.vllm.host import name_models, steer_engine
from server.vllm.middleware import SteeringMiddleware, current, with_echo
from server.vllm.versions import WorkerVersion, WorkerVersions

CHAT = "/v1/chat/completions"


async def _chat(request: Request) -> Any:
    """Answers as vLLM would: with what it was sent, and the mix that it saw in a task of its own."""
    body = await request.json()
    call = await asyncio.create_task(_seen())
    answer = {"id": "chatcmpl-1", "seen": call.steering.mix.as_dict() if call else None, "body": body}
    if not body.get("stream"):
        return JSONResponse(answer, headers={"x-id-seen": request.headers.get("x-request-id", "")})

    async def events() -> AsyncIterator[bytes]:
        yield b": keep-alive\n\n"
        for piece in (answer, {"id": "chatcmpl-1", "last": True}):
            if (failure := FAILURES.get(f"{body.get('messages')}")) and failure[0] in piece:
                yield f"data: {json.dumps(failure[1])}\n\n".encode()
                break
            yield f"data: {json.dumps(piece, separators=(',', ':'))}\n\n".encode()
            if body.get("messages") == "ramble":
                await asyncio.Event().wait()
            if body.get("messages") == "raise":
                raise RuntimeError("a bug")
        yield b"data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _error(code: int) -> dict[str, Any]:
    return {"error": {"message": 'said "code": 418', "type": "InternalServerError", "param": None, "code": code}}


FAILURES = {
    "fail first": ("seen", _error(500)),
    "fail later": ("last", _error(503)),
    "refuse first": ("seen", _error(400)),
}
"""What a request says -> in whose place, and with what, its stream fails: as vLLM's do, with an event, and then `[DONE]`."""


async def _seen() -> Any:
    return current.get()


async def _hang(request: Request) -> Any:
    """What is left of a request whose engine has gone: nothing comes any more."""

    async def events() -> AsyncIterator[bytes]:
        yield b'data: {"id":"resp_1"}\n\n'
        await asyncio.Event().wait()

    if (await request.json()).get("stream"):
        return StreamingResponse(events(), media_type="text/event-stream")
    await asyncio.Event().wait()


def _fail_at_the_end(traffic: Traffic) -> Callable[[Request], Any]:
    """What vLLM does with a request whose engine, or whose thread pool, has been stopped meanwhile."""

    async def events() -> AsyncIterator[bytes]:
        yield b'event: message_start\ndata: {"type":"message_start"}\n\n'
        raise RuntimeError("cannot schedule new futures after shutdown")

    async def fail(request: Request) -> Any:
        traffic.draining = True
        match (await request.json())["messages"]:
            case "raise":
                raise RuntimeError("cannot schedule new futures after shutdown")
            case "answer":
                return JSONResponse({"error": {"message": "EngineCore encountered an issue"}}, 500)
        return StreamingResponse(events(), media_type="text/event-stream")

    return fail


async def _unscored(_version: WorkerVersion, _answered: Any) -> float:
    pytest.fail("nothing was drawn to be measured")


async def _null(_request: Request) -> JSONResponse:
    """What vLLM answers where the client has hung up."""
    return JSONResponse(None)


async def _refuse(_request: Request) -> JSONResponse:
    return JSONResponse({"error": {"message": "no"}}, 400)


@pytest.fixture
def traffic() -> Traffic:
    return Traffic()


@pytest.fixture
def stopped() -> asyncio.Event:
    return asyncio.Event()


@pytest.fixture
def metrics() -> SteeringMetrics:
    return SteeringMetrics()


def versions_of(package: Package, config: ServeConfig, state: State | None = None) -> WorkerVersions:
    """One version, and none to reload."""
    steering = Steering.of(package, config, (lambda: state.snapshot) if state else Snapshot)
    return WorkerVersions(WorkerVersion(package, steering), lambda: pytest.fail("read"), lambda _: None)


@pytest.fixture
def client_to(
    package: Package, traffic: Traffic, metrics: SteeringMetrics, stopped: asyncio.Event
) -> Callable[..., AsyncClient]:
    def make(config: ServeConfig, state: State | None = None) -> AsyncClient:
        versions = versions_of(package, config, state)
        routes = [Route(path, _chat, methods=["POST"]) for path in (CHAT, "/invocations", "/tokenize", "/v1/presets")]
        routes.append(Route("/v1/responses", _hang, methods=["POST"]))
        routes.append(Route("/v1/chat/completions/batch", _null, methods=["POST"]))
        routes.append(Route("/v1/messages", _fail_at_the_end(traffic), methods=["POST"]))
        app = Starlette(routes=[*routes, Route("/v1/completions", _refuse, methods=["POST"])])
        drift = DriftSampler(state.recorder, config.drift, metrics) if state else None
        app.add_middleware(SteeringMiddleware, versions=versions, metrics=metrics, traffic=traffic, drift=drift,
                           score=_unscored, stopped=stopped, limits=config.limits)  # fmt: skip
        app.add_middleware(BodyLimitMiddleware, limit=4096)
        app.add_middleware(AuthMiddleware, keys=KeyRing((), config.admin_keys))
        app.add_middleware(RequestContextMiddleware, traffic=traffic, metrics=metrics, access_log=False)
        return AsyncClient(transport=ASGITransport(app), base_url="http://test")

    return make


@pytest.fixture
def client(client_to: Callable[..., AsyncClient], config: ServeConfig) -> AsyncClient:
    return client_to(config)


async def test_the_handler_sees_the_mix_and_the_answer_says_it(client: AsyncClient, package: Package, ids) -> None:
    response = await client.post(CHAT, json={"model": "demo", "steering": {"atoms": {"list": 1.5}}, "messages": []})
    answer = response.json()
    digest = package.digest(package.mix({"list": 1.5}))
    assert answer["seen"] == answer["steering"]["atoms"] == {ids[0]: 1.5}
    assert answer["steering"]["mix"] == response.headers["x-atomsteer-mix"] == digest
    assert answer["id"] == "chatcmpl-1" and answer["body"]["messages"] == []
    assert int(response.headers["content-length"]) == len(response.content)
    assert current.get() is None, "the next request of this task would inherit the mix"


async def test_concurrent_requests_do_not_see_each_others_mix(client: AsyncClient, ids) -> None:
    async def ask(value: float) -> Any:
        return (await client.post(CHAT, json={"model": "demo", "steering": {"atoms": {"list": value}}})).json()["seen"]

    values = [0.5, -1.0, 2.5, 0.0]
    assert await asyncio.gather(*(ask(value) for value in values)) == [{ids[0]: v} if v else {} for v in values]
    assert current.get() is None


async def test_the_echo_is_on_the_first_event_alone(client: AsyncClient, ids) -> None:
    response = await client.post(CHAT, json={"model": "demo:lists", "stream": True})
    lines = [line for line in response.text.splitlines() if line]
    assert lines[0] == ": keep-alive" and lines[-1] == "data: [DONE]"
    first, last = (json.loads(line.removeprefix("data: ")) for line in lines[1:3])
    assert first["steering"]["preset"] == "lists" and first["steering"]["atoms"] == {ids[0]: 2.0}
    assert "steering" not in last
    assert response.headers["x-atomsteer-mix"] == first["steering"]["mix"]


def test_the_responses_api_has_the_echo_in_the_response() -> None:
    event = (
        b'event: response.created\ndata: {"response":{"id":"resp_1"},"sequence_number":0,"type":"response.created"}\n\n'
    )
    echoed = json.loads(with_echo(event, {"mix": "m-1"}, is_stream=True).splitlines()[1].removeprefix(b"data: "))
    assert echoed["response"] == {"steering": {"mix": "m-1"}, "id": "resp_1"} and "steering" not in echoed


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "demo", "steering": {"atoms": {"nope": 1}}}, 404, "steering.atoms.nope"),
        ({"model": "demo", "steering": {"strength": 1}}, 400, "steering.strength"),
        ({"model": "demo:nope"}, 404, "model"),
        ({"model": "another"}, 404, "model"),
        ({"model": 7}, 400, "model"),
        ({"model": "demo", "steering": {"allow_out_of_range": True}}, 403, "steering.allow_out_of_range"),
    ],
)
async def test_what_cannot_be_steered_never_reaches_vllm(client: AsyncClient, body, status: int, param: str) -> None:
    response = await client.post(CHAT, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


async def test_paths_that_cannot_be_steered_refuse_steering_and_are_left_alone_without(client: AsyncClient) -> None:
    refused = await client.post("/tokenize", json={"model": "demo", "steering": {"atoms": {"list": 1}}})
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "unsupported_parameter"
    answer = (await client.post("/tokenize", json={"model": "demo"})).json()
    assert answer == {"id": "chatcmpl-1", "seen": {}, "body": {"model": "demo"}}


async def test_a_preset_is_refused_where_the_default_mix_is_all_there_is(client: AsyncClient) -> None:
    """On a path that does not generate it changes nothing."""
    refused = await client.post("/invocations", json={"model": "demo:lists", "messages": []})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", "model")
    assert "demo:lists" in error["message"]
    unknown = await client.post("/invocations", json={"model": "demo:nope"})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "model")
    for path, body in (
        ("/invocations", {"model": "demo"}),
        ("/invocations", {}),
        ("/tokenize", {"model": "demo:lists"}),
    ):
        assert (await client.post(path, json=body)).json()["body"] == body


@pytest.mark.parametrize("written", [int, float, str])
@pytest.mark.parametrize("path", [CHAT, "/invocations"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 9), ("max_completion_tokens", 9), ("top_logprobs", 4), ("prompt_logprobs", -1), ("n", 3)],
)
async def test_limits_hold_however_a_number_is_written_and_on_every_path(
    client_to, config: ServeConfig, path: str, name: str, value: int, written
) -> None:
    client = client_to(replace(config, limits=Limits(max_tokens=8, max_logprobs=3, max_n=2, max_sequences=5)))
    response = await client.post(path, json={"model": "demo", name: written(value)})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)
    assert (await client.post(path, json={"model": "demo", name: written(2)})).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ["a"] * 6}, "prompt"),
        ({"prompt": [[1, 2]] * 3, "n": 2}, "prompt"),
        ({"messages": [[{"role": "user", "content": "x"}]] * 6}, "messages"),
        ({"prompt": list(range(100)), "n": 2}, None),
        ({"messages": [{"role": "user", "content": "x"}] * 100}, None),
        ({"prompt": ["a"] * 5}, None),
        ({"prompt": "x", "messages": [[{"role": "user", "content": "x"}]] * 6}, "messages"),
    ],
)
async def test_prompts_times_n_are_limited(client_to, config: ServeConfig, body: dict, param: str | None) -> None:
    client = client_to(replace(config, limits=Limits(max_n=2, max_sequences=5)))
    response = await client.post(CHAT, json={"model": "demo"} | body)
    assert response.status_code == (400 if param else 200)
    assert param is None or response.json()["error"]["param"] == param


@pytest.mark.parametrize("value", [True, 1, "true"])
@pytest.mark.parametrize("path", [CHAT, "/invocations"])
async def test_beam_search_is_refused(client: AsyncClient, path: str, value: object) -> None:
    """Its engine requests, one a beam and token, would be charged and recorded as if each were an answer."""
    response = await client.post(path, json={"model": "demo", "use_beam_search": value})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", "use_beam_search")
    assert (await client.post(path, json={"model": "demo", "use_beam_search": False})).status_code == 200


async def test_an_operators_routes_need_an_admin_key(
    config: ServeConfig, traffic: Traffic, metrics: SteeringMetrics
) -> None:
    paths = (
        CHAT,
        "/tokenize",
        "/health",
        "/collective_rpc",
        "/scale_elastic_ep",
        "/inference/v1/generate",
        "/new_in_0_99",
        "/new_in_0_99/{number}",
    )
    app = Starlette(routes=[Route(path, _chat, methods=["POST"]) for path in paths])
    app.add_middleware(OperatorMiddleware, routes=operator_routes(app.routes))
    app.add_middleware(AuthMiddleware, keys=KeyRing((), ("boss",)))
    app.add_middleware(RequestContextMiddleware, traffic=traffic, metrics=metrics, access_log=False)
    client = AsyncClient(transport=ASGITransport(app), base_url="http://test")
    for path in paths:
        anybody = await client.post(path, json={})
        assert anybody.status_code == (200 if path in paths[:3] else 403), path
        assert (await client.post(path, json={}, headers={"Authorization": "Bearer boss"})).status_code == 200
    assert (await client.post("/nothing", json={})).status_code == 404


async def test_while_the_server_drains_no_path_generates(client: AsyncClient, traffic: Traffic) -> None:
    traffic.draining = True
    assert [(await client.post(path, json={"model": "demo"})).status_code for path in (CHAT, "/invocations", "/tokenize")] == [
        503, 503, 200
    ]  # fmt: skip


async def test_our_own_routes_read_their_own_bodies(client: AsyncClient) -> None:
    body = {"name": "x", "steering": "anything"}
    assert (await client.post("/v1/presets", json=body)).json()["body"] == body


async def test_the_default_mix_steers_every_path_that_generates(client_to, config: ServeConfig, ids) -> None:
    client = client_to(replace(config, default_mix="list=1"))
    assert (await client.post(CHAT, json={})).json()["seen"] == {ids[0]: 1.0}
    assert (await client.post("/tokenize", json={})).json()["seen"] == {ids[0]: 1.0}
    assert (await client.post(CHAT, json={"steering": {"atoms": {}}})).json()["seen"] == {}


STEERED = b'"steering": {"atoms": {"list": 1}}, "model": "demo"'


@pytest.mark.parametrize(
    "body",
    [b"{", b"[]", b'{"x": "\\ud800", ' + STEERED + b"}",
     b'{"x": ' + b"[" * 300 + b"]" * 300 + b", " + STEERED + b"}"],
)  # fmt: skip
async def test_what_only_a_laxer_parser_reads_never_reaches_vllm(client: AsyncClient, body: bytes) -> None:
    """vLLM would serve some of these, and see no steering."""
    json.loads(body) if len(body) > 9 else None
    response = await client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


async def test_bodies_that_are_not_declared_as_json_are_left_to_vllm(client: AsyncClient) -> None:
    response = await client.post("/v1/completions", content=b"{", headers={"Content-Type": "text/plain"})
    assert response.json() == {"error": {"message": "no"}}


async def test_refusals_of_vllm_carry_no_echo_but_the_header(client: AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"model": "demo"})
    assert response.json() == {"error": {"message": "no"}} and "x-atomsteer-mix" in response.headers


async def test_a_body_over_the_limit_is_refused(client: AsyncClient) -> None:
    response = await client.post(CHAT, json={"model": "demo", "messages": "x" * 5000})
    assert response.status_code == 413


async def test_requests_are_refused_and_counted_while_the_server_drains(client, traffic, metrics) -> None:
    traffic.draining = True
    response = await client.post(CHAT, json={"model": "demo"})
    assert response.status_code == 503 and response.headers["retry-after"]
    assert b'atomsteer_requests_total{arm="",experiment="",preset="",status="503"} 1.0' in metrics.render()


@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_stopped_engine_leaves_unanswered_ends_with_an_error(client, stopped, stream: bool) -> None:
    asking = asyncio.create_task(client.post("/v1/responses", json={"model": "demo", "stream": stream}))
    await asyncio.sleep(0.05)
    assert not asking.done()
    stopped.set()
    response = await asyncio.wait_for(asking, 5)
    if stream:
        first, last = (json.loads(line[6:]) for line in response.text.splitlines() if line)
        assert first["steering"]["atoms"] == {} and last["error"]["code"] == "engine_stopped"
    else:
        assert response.status_code == 503 and response.json()["error"]["code"] == "engine_stopped"


@pytest.mark.parametrize("way", ["raise", "answer"])
async def test_what_fails_because_the_server_ends_is_refused_and_no_internal_error(client, way: str) -> None:
    response = await client.post("/v1/messages", json={"model": "demo", "messages": way})
    assert response.status_code == 503 and response.json()["error"]["code"] == "engine_stopped"
    assert response.headers["retry-after"]


async def test_a_stream_of_anthropics_api_that_breaks_off_has_an_event_that_is_called_error(client) -> None:
    response = await client.post("/v1/messages", json={"model": "demo", "messages": "stream"})
    *_, event, last = filter(None, response.text.splitlines())
    error = json.loads(last.removeprefix("data: "))
    assert (event, error["type"], error["error"]["code"]) == ("event: error", "error", "engine_stopped")


@pytest.fixture
def trial(config: ServeConfig, sqlite_state: State, package: Package) -> State:
    """A state in which the experiment `trial` runs."""
    spec = ExperimentSpec.model_validate(
        {"name": "trial", "arms": [{"name": "a", "atoms": {"list": 1.0}}, {"name": "b", "atoms": {}}]}
    ).completed()
    steering = Steering.of(package, config)
    draft = sqlite_state.experiments.create(spec, steering.freeze(spec), "1.0")
    sqlite_state.experiments.start(draft, steering.freeze(spec), "1.0")
    sqlite_state.refresh()
    return sqlite_state


TRIAL = {"model": "demo", "user": "anna", "steering": {"experiment": "trial"}, "stream": True}


def recorded(state: State) -> list[tuple[int, str]]:
    """Status and id of what is stored of responses."""
    state.recorder.erase("nobody at all").result(10)
    with state.database.read() as connection:
        return [tuple(row) for row in connection.execute(select(responses.c.status, responses.c.response_id))]


async def test_an_experiments_answer_is_recorded_as_the_engine_gave_it(
    client_to, config: ServeConfig, trial: State
) -> None:
    answer = await client_to(config, trial).post(CHAT, json=TRIAL)
    arm = answer.headers["x-atomsteer-arm"]
    unknown = trial.recorder.report(
        trial.snapshot.experiments["trial"].id,
        [Outcome("chatcmpl-1", "liked", 1.0), Outcome("other", "liked", 1.0)],
    )
    assert await asyncio.wrap_future(unknown) == {"other"}, f"the response of arm {arm} was not recorded under its id"
    assert recorded(trial) == [(200, "chatcmpl-1")]


async def test_a_stream_that_fails_is_recorded_as_a_failure_though_its_status_is_200(
    client_to, config: ServeConfig, trial: State
) -> None:
    client = client_to(config, trial)
    answer = await client.post(CHAT, json=TRIAL | {"messages": "fail later"})
    assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
    assert recorded(trial) == [(503, "chatcmpl-1")]
    await client.post(CHAT, json=TRIAL | {"messages": "fail first"})
    (_, (status, response_id)) = sorted(recorded(trial), key=lambda row: row[1])
    assert status == 500 and response_id.startswith("failed-")
    await client.post(CHAT, json=TRIAL | {"messages": "refuse first"})
    assert len(recorded(trial)) == 2, "what was the client's fault is no failure"


async def test_a_stream_that_raises_is_recorded_as_a_failure(client_to, config: ServeConfig, trial: State) -> None:
    with pytest.raises(AssertionError):  # httpx's: no end came
        await client_to(config, trial).post(CHAT, json=TRIAL | {"messages": "raise"})
    assert recorded(trial) == [(500, "chatcmpl-1")]


async def test_a_stream_that_the_server_ends_is_recorded_as_a_failure(
    client_to, config: ServeConfig, trial: State, stopped: asyncio.Event
) -> None:
    stopped.set()
    await client_to(config, trial).post("/v1/responses", json=TRIAL)
    ((status, _),) = recorded(trial)
    assert status == 503


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_the_client_stopped_is_recorded_as_that(
    client_to, config: ServeConfig, trial: State, hang_up: Callable[..., Any], stream: bool
) -> None:
    client = client_to(config, trial)
    if stream:
        await hang_up(client, CHAT, TRIAL | {"messages": "ramble"})
        assert recorded(trial) == [(499, "chatcmpl-1")]
    else:  # vLLM answers null to nobody
        await client.post("/v1/chat/completions/batch", json=TRIAL | {"stream": False})
        ((status, response_id),) = recorded(trial)
        assert status == 499 and response_id.startswith("failed-")


async def test_a_unit_whose_request_vllm_refuses_is_not_exposed(client_to, config: ServeConfig, trial: State) -> None:
    client = client_to(config, trial)

    def exposed() -> list[str]:
        trial.recorder.erase("nobody at all").result(10)
        with trial.database.read() as connection:
            return sorted(connection.execute(select(exposures.c.unit)).scalars())

    assert (await client.post("/v1/completions", json=TRIAL)).status_code == 400
    await client.post(CHAT, json=TRIAL | {"messages": "refuse first"})
    assert exposed() == []
    await client.post(CHAT, json=TRIAL | {"messages": "fail first"})
    await client.post(CHAT, json=TRIAL | {"user": "ben"})
    await client.post(CHAT, json=TRIAL | {"user": "cleo", "stream": False})
    assert exposed() == ["anna", "ben", "cleo"]


async def test_vllm_gets_an_id_of_the_servers_own_for_every_request(client_to, config: ServeConfig) -> None:
    client, ids = client_to(config), set()
    for _ in range(2):
        answer = await client.post(CHAT, json={"model": "demo"}, headers={"X-Request-Id": "trace-1"})
        assert answer.headers["x-request-id"] == "trace-1"
        ids.add(answer.headers["x-id-seen"])
    assert len(ids) == 2 and "trace-1" not in ids, "responses would be recorded under one id"


class _Engine:
    """Notes the LoRA requests it is given, and how it was shut down."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.errored, self.shut_down = False, 0

    def generate(self, *_args: Any, lora_request: Any = None) -> str:
        self.given.append(lora_request)
        return "outputs"

    def shutdown(self, timeout: float | None = None) -> None:
        self.errored = True  # as vLLM's is from then on
        self.shut_down += 1


def test_models_are_known_by_name_and_preset(package: Package, config: ServeConfig, monkeypatch) -> None:
    upstream = SimpleNamespace(BaseModelPath=lambda name, model_path: (name, model_path))
    monkeypatch.setitem(__import__("sys").modules, "server.vllm.upstream", upstream)
    models = SimpleNamespace(base_model_paths=["before"])
    name_models(models, versions_of(package, config), "path")
    assert models.base_model_paths == [("demo", "path")]
    assert models.is_base_model("demo") and models.is_base_model("demo:lists") and not models.is_base_model("demo:x")
    assert models.model_name() == "demo"


async def test_the_engine_gets_no_adapter_outside_a_call_and_says_when_it_drains(monkeypatch) -> None:
    from server.vllm.identity import MixIdentities

    monkeypatch.setitem(__import__("sys").modules, "server.vllm.upstream", SimpleNamespace(LoRARequest=SimpleNamespace))
    engine, traffic, stopped = _Engine(), Traffic(), asyncio.Event()
    steer_engine(engine, MixIdentities(), traffic, stopped)
    assert engine.generate("prompt") == "outputs" and engine.given == [None]
    await asyncio.to_thread(engine.shutdown, timeout=3)
    assert traffic.draining and await asyncio.wait_for(stopped.wait(), 1)
    engine.shutdown(timeout=3)
    assert engine.shut_down == 2


async def test_an_engine_that_has_died_is_shut_down_and_ends_the_process_with_an_error(monkeypatch) -> None:
    from server.vllm.identity import MixIdentities

    monkeypatch.setitem(__import__("sys").modules, "server.vllm.upstream", SimpleNamespace(LoRARequest=SimpleNamespace))
    engine, traffic, stopped = _Engine(), Traffic(), asyncio.Event()
    steer_engine(engine, MixIdentities(), traffic, stopped)
    engine.errored = True
    with pytest.raises(SystemExit, match="the engine has died"):
        engine.shutdown(timeout=3)
    assert engine.shut_down == 1 and traffic.draining and await asyncio.wait_for(stopped.wait(), 1)
