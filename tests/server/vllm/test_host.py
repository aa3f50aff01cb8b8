"""Our endpoint on an application like vLLM's, over HTTP: what changes at a reload. The engine behind it is a stand-in whose
worker holds real versions; the real one is in tests/vllm."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient
from prometheus_client import CollectorRegistry, generate_latest
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from atoms.package import Package
from server.vllm import host
from server.vllm.host import SteeringEndpoint
from server.vllm.middleware import current
from server.vllm.residents import Residents

RELOAD, COMPLETIONS = "/v1/admin/reload", "/v1/completions"
ADMIN = {"Authorization": "Bearer boss"}


class Engine:
    """vLLM's client of its engine, as far as we use it. Gives each request three outputs, the later ones once `go` is set.
    As a worker does, it ends at a mix that no version in it has."""

    def __init__(self, package: Package, path: Path) -> None:
        self.worker = Residents(path, lambda bank: bank)
        self.worker.add(package)
        self.go = asyncio.Event()
        self.running = 0
        self.errored = self.deaf = False
        parallel = SimpleNamespace(_api_process_rank=0, _api_process_count=1)
        self.vllm_config = SimpleNamespace(parallel_config=parallel, use_v2_model_runner=False,
                                           scheduler_config=SimpleNamespace(max_num_seqs=4))  # fmt: skip
        self.model_config = SimpleNamespace(max_model_len=64)

    @property
    def engine_core(self) -> Engine:
        return self

    async def call_utility_all_async(self, _rpc: str, method: str, _timeout: None, arguments: Any) -> list[list[Any]]:
        if self.deaf:
            await asyncio.Event().wait()
        return [[getattr(self.worker, method.removeprefix("atomsteer_"))(*arguments)]]

    async def add_lora(self, lora_request: Any) -> None:
        self._require(lora_request)

    async def generate(self, *_args: Any, lora_request: Any = None) -> AsyncIterator[Any]:
        self.running += 1
        try:
            for number in range(3):
                self._require(lora_request)
                answer = SimpleNamespace(index=0, text=f"{number} ", token_ids=[number], finish_reason=None)
                yield SimpleNamespace(request_id="r", prompt_token_ids=[1], outputs=[answer])
                await self.go.wait()
        finally:
            self.running -= 1

    def shutdown(self, timeout: float | None = None) -> None:
        return None

    def _require(self, lora_request: Any) -> None:
        from server.vllm.identity import decode_path

        if lora_request is not None:
            assert self.worker.find(decode_path(lora_request.lora_path), lora_request.lora_name), "the engine has died"


async def completions(request: Request) -> Response:
    """As vLLM's handler: checks the model's name, asks the engine, answers at the end or as it comes."""
    body, engine = await request.json(), request.app.state.engine
    if not request.app.state.models.is_base_model(body.get("model", "demo")):
        return JSONResponse({"error": {"message": "no such model"}}, 404)
    outputs = engine.generate("prompt")
    if not body.get("stream"):
        texts = [output.outputs[0].text async for output in outputs]
        return JSONResponse({"id": "cmpl-1", "text": "".join(texts)})

    async def events() -> AsyncIterator[bytes]:
        async for output in outputs:
            yield f"data: {json.dumps({'id': 'cmpl-1', 'text': output.outputs[0].text})}\n\n".encode()

    return StreamingResponse(events(), media_type="text/event-stream")


def options(**changes: Any) -> SimpleNamespace:
    """vLLM's, as far as we look at them."""
    grammars = SimpleNamespace(backend="guidance")
    given = {"model": "base", "served_model_name": None, "structured_outputs_config": grammars, "host": "127.0.0.1",
             "port": 8000, "uds": None, "api_key": None}  # fmt: skip
    return SimpleNamespace(**(given | changes))


@pytest.fixture
def path(package: Package, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package.path, tmp_path / "served"))


@pytest.fixture
def put(path: Path) -> Callable[[Package], None]:
    def make(package: Package) -> None:
        shutil.rmtree(path)
        shutil.copytree(package.path, path)

    return make


@pytest.fixture
def engine(package: Package, path: Path) -> Engine:
    return Engine(package, path)


@pytest.fixture
def endpoint() -> SteeringEndpoint:
    return SteeringEndpoint()


@pytest.fixture
async def client(
    path: Path, engine: Engine, endpoint: SteeringEndpoint, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[AsyncClient]:
    monkeypatch.setenv("ATOMSTEER_PACKAGE", str(path))
    monkeypatch.setenv("ATOMSTEER_SETTINGS", json.dumps({"presets": ["lists=list=2"]}))
    monkeypatch.setenv("ATOMSTEER_ADMIN_KEY", "boss")
    monkeypatch.setenv("ATOMSTEER_API_KEY", "client")
    monkeypatch.setenv("ATOMSTEER_DATABASE", "none")
    upstream = SimpleNamespace(LoRARequest=SimpleNamespace, BaseModelPath=lambda name, model_path: (name, model_path))
    monkeypatch.setitem(sys.modules, "server.vllm.upstream", upstream)
    registry = CollectorRegistry()
    monkeypatch.setattr(host, "REGISTRY", registry)
    app = FastAPI()
    app.add_api_route(COMPLETIONS, completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", lambda: {"data": "vLLM's"}, methods=["GET"])
    app.add_api_route("/metrics", lambda: Response(generate_latest(registry)), methods=["GET"], response_model=None)
    app.state.args = options()
    app.state.engine, app.state.models = engine, SimpleNamespace(base_model_paths=[])
    endpoint.attach_router(app)
    app.add_middleware(CORSMiddleware, allow_origins=["https://app.example"], allow_methods=["*"], allow_headers=["*"])
    await endpoint.init_state(engine, SimpleNamespace(openai_serving_models=app.state.models), None)
    async with AsyncClient(transport=ASGITransport(app), base_url="http://test", headers=ADMIN) as client:
        yield client


@pytest.mark.parametrize(
    ("changes", "key", "warns"),
    [({"host": "0.0.0.0"}, "", True), ({"host": None}, "", True), ({"host": "::"}, "", True), ({"host": "no such host"}, "", True),
     ({}, "", False), ({"host": "localhost"}, "", False), ({"host": "::1"}, "", False), ({"host": "0.0.0.0"}, "client", False),
     ({"host": None, "uds": "/run/vllm"}, "", False), ({"host": "0.0.0.0", "api_key": ["vllms"]}, "", False)],
)  # fmt: skip
def test_a_server_that_is_open_to_others_is_warned_of(
    path: Path, endpoint: SteeringEndpoint, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    changes: dict, key: str, warns: bool,
) -> None:  # fmt: skip
    monkeypatch.setenv("ATOMSTEER_PACKAGE", str(path))
    monkeypatch.setenv("ATOMSTEER_API_KEY", key)
    monkeypatch.setenv("ATOMSTEER_DATABASE", "none")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr(host, "REGISTRY", CollectorRegistry())
    app = FastAPI()
    app.state.args = options(**changes)
    endpoint.attach_router(app)
    assert ("no API key is set: whoever reaches" in capfd.readouterr().err) == warns


async def test_what_is_in_flight_ends_on_its_version_and_all_else_is_the_new_ones(
    client: AsyncClient, engine: Engine, put, negated, package: Package, until
) -> None:
    second = negated("2")
    ask = {"model": "demo:lists", "prompt": "x"}
    whole = asyncio.create_task(client.post(COMPLETIONS, json=ask))
    stream = asyncio.create_task(client.post(COMPLETIONS, json=ask | {"stream": True}))
    await until(lambda: engine.running == 2)
    put(second)
    answer = await client.post(RELOAD)
    assert answer.json() == {"object": "package.reloaded", "package": "demo", "version": "2", "previous_version": "1.0",
                             "changed": True}  # fmt: skip
    after = asyncio.create_task(client.post(COMPLETIONS, json=ask))
    await until(lambda: engine.running == 3)
    await asyncio.sleep(0.5)
    assert len(engine.worker._residents) == 2, "the old version was let go of before its requests had ended"
    engine.go.set()
    mixes = [version.digest(version.mix({"list": 2.0})) for version in (package, second)]
    assert (await whole).json()["steering"]["mix"] == (await whole).headers["x-atomsteer-mix"] == mixes[0]
    assert (await whole).json()["text"] == (await after).json()["text"] == "0 1 2 "
    assert (await after).json()["steering"]["mix"] == mixes[1]
    events = [json.loads(line[6:]) for line in (await stream).text.splitlines() if line.startswith("data: ")]
    assert "".join(event["text"] for event in events) == "0 1 2 " and events[0]["steering"]["mix"] == mixes[0]
    await until(lambda: len(engine.worker._residents) == 1)
    assert (await client.get("/version")).json()["package_version"] == "2"
    assert (await client.get("/ready")).json()["steering"]["package_version"] == "2"
    assert (await client.get("/v1/atoms")).json()["package"]["version"] == "2"
    assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["demo", "demo:lists"]
    metrics = (await client.get("/metrics")).text
    assert 'atomsteer_reloads_total{result="done"} 1.0' in metrics and 'version="2"' in metrics


async def test_routes_do_not_pile_up(client: AsyncClient, endpoint: SteeringEndpoint, put, negated) -> None:
    router = endpoint._app.router
    known, lifespan = len(router.routes), router.lifespan_context
    for number in range(2, 6):
        put(negated(str(number)))
        assert (await client.post(RELOAD)).status_code == 200
    assert len(router.routes) == known
    assert router.lifespan_context is lifespan, "it grows by the routes of each version, and keeps them"
    assert (await client.get("/v1/atoms")).json()["package"]["version"] == "5"


async def test_what_is_refused_leaves_the_old_version(
    client: AsyncClient, engine: Engine, path: Path, put, negated, package: Package, another_version, tmp_path: Path
) -> None:
    engine.go.set()
    assert (await client.post(RELOAD, headers={"Authorization": "Bearer client"})).status_code == 403
    put(another_version(package, tmp_path / "base", "2", base_scale=2.0))
    other = await client.post(RELOAD)
    put(another_version(package, tmp_path / "wrong", "2", broken=True))
    wrong = await client.post(RELOAD)
    put(negated("3", keep=0))  # without the atom of the preset
    missing = await client.post(RELOAD)
    shutil.rmtree(path)
    gone = await client.post(RELOAD)
    for refused, said in (
        (other, "θ0"),
        (wrong, "its card describes"),
        (missing, "unknown atom 'list'"),
        (gone, "served"),
    ):
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (409, "reload_failed") and said in error["message"]
        assert error["message"].startswith("nothing was changed: ")
    answer = (await client.post(COMPLETIONS, json={"model": "demo:lists", "prompt": "x"})).json()
    assert answer["steering"]["mix"] == package.digest(package.mix({"list": 2.0}))
    assert 'atomsteer_reloads_total{result="failed"} 4.0' in (await client.get("/metrics")).text


async def test_several_api_processes_do_not_reload(
    client: AsyncClient, endpoint: SteeringEndpoint, engine: Engine
) -> None:
    endpoint._versions.connect(engine, 2)
    refused = await client.post(RELOAD)
    assert (refused.status_code, refused.json()["error"]["code"]) == (501, "not_supported")
    assert "--api-server-count 1" in refused.json()["error"]["message"]


async def test_a_reload_ends_with_the_engine(client: AsyncClient, engine: Engine, put, negated) -> None:
    """An engine that has been stopped answers no call."""
    put(negated("2"))
    engine.deaf = True
    reload = asyncio.create_task(client.post(RELOAD))
    await asyncio.sleep(0.3)
    engine.shutdown()
    refused = await asyncio.wait_for(reload, 5)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "reload_failed")
    assert "shutting down" in refused.json()["error"]["message"]


async def test_a_task_that_outlives_its_request_keeps_the_version_or_is_told(
    client: AsyncClient, endpoint: SteeringEndpoint, engine: Engine, put, negated, until
) -> None:
    """As a response in the background does: the engine is asked after the request has been answered."""
    outputs: list[Any] = []

    async def later(request: Request) -> JSONResponse:
        outputs.extend(engine.generate("prompt") for _ in range(2))
        outputs.append(current.get())
        return JSONResponse({"id": "resp_1"})

    endpoint._app.add_api_route("/v1/responses", later, methods=["POST"], response_model=None)
    await client.post("/v1/responses", json={"model": "demo:lists", "input": "x"})
    begun, late, call = outputs
    assert (await anext(begun)).outputs[0].text == "0 "
    put(negated("2"))
    await client.post(RELOAD)
    await asyncio.sleep(0.5)
    assert not call.version.ended, "the version was let go of under an answer"
    await begun.aclose()
    assert engine.running == 0
    await until(lambda: call.version.ended)
    with pytest.raises(Exception, match="is not served any more"):
        await anext(late)


@pytest.mark.parametrize("route", ["/v1/atoms", COMPLETIONS, RELOAD])
async def test_web_pages_of_allowed_origins_may_ask_and_read_our_headers(client: AsyncClient, route: str) -> None:
    origin = {"Origin": "https://app.example"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    del client.headers["Authorization"]
    preflight = await client.options(route, headers=origin | asked)
    refused = await client.post(route, headers=origin | {"Authorization": "Bearer wrong"})
    assert (preflight.status_code, refused.status_code) == (200, 401)
    for answer in (preflight, refused):
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
    exposed = refused.headers["access-control-expose-headers"].split(", ")
    assert {"X-Request-Id", "X-Atomsteer-Mix", "X-Atomsteer-Arm", "Retry-After", "x-should-retry"} == set(exposed)
    other = await client.post(route, headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers
