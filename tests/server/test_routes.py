"""The routes that do not generate: models, atoms, preview, health; keys, bodies, headers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from urllib.parse import quote

import pytest
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient

from atoms.package import Package
from server.config import ServeConfig
from server.embedded.scripted import ScriptedEngine
from server.limits import Limits
from server.routes.atoms import atoms_router

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def locked(config: ServeConfig) -> ServeConfig:
    return replace(config, api_keys=("client-1", "client-2"), admin_keys=("boss",))


async def test_models(client: AsyncClient) -> None:
    body = (await client.get("/v1/models")).json()
    assert body["object"] == "list"
    base, *presets = body["data"]
    assert base | {"created": 0} == {
        "id": "demo", "object": "model", "created": 0, "owned_by": "atomsteer", "root": "toy/base", "parent": None,
        "max_model_len": 64,
    }  # fmt: skip
    assert [(entry["id"], entry["parent"]) for entry in presets] == [("demo:polite", "demo"), ("demo:lists", "demo")]


async def test_one_model(client_of: Callable[..., AsyncClient], config: ServeConfig) -> None:
    async with client_of(replace(config, served_model_name="org/demo")) as client:
        assert (await client.get("/v1/models/org/demo")).json()["id"] == "org/demo"
        assert (await client.get("/v1/models/org/demo:polite")).json()["parent"] == "org/demo"
        missing = await client.get("/v1/models/demo")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_atoms(client: AsyncClient, ids: list[str]) -> None:
    body = (await client.get("/v1/atoms")).json()
    assert body["package"] == {"name": "demo", "version": "1.0"}
    assert [card["id"] for card in body["data"]] == ids
    card = (await client.get("/v1/atoms/list")).json()
    assert card == (await client.get(f"/v1/atoms/{ids[0]}")).json()
    assert {"alias", "name", "description", "keywords", "coherence", "n_documents", "tested_range", "sound_range",
            "kl_curve", "effects", "orientation", "stability"} <= card.keys()  # fmt: skip
    assert card["tested_range"] == [-3.0, 3.0]
    missing = await client.get("/v1/atoms/lits")
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "atom")
    assert "list" in missing.json()["error"]["message"], "near misses are named"


async def test_what_a_model_wrote_of_documents_is_not_sent_where_training_text_is_not(
    package: Package,
) -> None:
    first, *others = package.manifest.atoms
    said = first.model_copy(update={"description": "They quote a secret.", "described_by": "large"})
    described = Package(package.path, package.manifest.model_copy(update={"atoms": [said, *others]}))
    for allowed in (True, False):
        app = FastAPI()
        app.include_router(atoms_router(described, allow_training_text=allowed))
        async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
            answers = [(await client.get(path)).text for path in ("/v1/atoms", f"/v1/atoms/{said.id}")]
        assert all(("secret" in answer) == ("large" in answer) == allowed for answer in answers)


async def test_documents_are_for_admins(
    client_of: Callable[..., AsyncClient], config: ServeConfig, locked: ServeConfig
) -> None:
    for settings, key in ((config, None), (locked, "client-1"), (replace(locked, allow_training_text=False), "boss")):
        async with client_of(settings, key) as client:
            refused = await client.get("/v1/atoms/list/documents")
        assert refused.status_code == 403
        assert "secret" not in refused.text
    async with client_of(locked, "boss") as client:
        assert "a secret training document" in (await client.get("/v1/atoms/list/documents")).text
        assert (await client.get("/v1/atoms/formal/documents")).json()["data"] == []


@pytest.mark.parametrize("left", ["another version's documents", None])
async def test_documents_of_another_version_are_not_shown(
    package: Package, client_of: Callable[..., AsyncClient], locked: ServeConfig, left: str | None
) -> None:
    file, aside = package.path / "evidence.jsonl", package.path.with_name("evidence")
    file.rename(aside)
    try:
        if left is not None:
            file.write_text(left)
        async with client_of(locked, "boss") as client:
            answer = await client.get("/v1/atoms/list/documents")
    finally:
        aside.replace(file)
    assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")
    assert "reload" in answer.json()["error"]["message"]
    assert "another" not in answer.text


async def test_preview(client: AsyncClient, ids: list[str], engine: ScriptedEngine) -> None:
    response = await client.post("/v1/steering/preview", json={"steering": {"atoms": {"list": 1}}})
    echo = response.json()["steering"]
    assert echo["atoms"] == {ids[0]: 1.0}
    assert echo["predicted_kl"] == 0.05
    assert response.headers["X-Atomsteer-Mix"] == echo["mix"]
    assert "X-Atomsteer-Arm" not in response.headers
    assert (await client.post("/v1/steering/preview", json={"model": "demo:polite"})).json()["steering"][
        "preset"
    ] == "polite"
    assert (await client.post("/v1/steering/preview", json={"atoms": {}})).json()["error"]["param"] == "atoms"
    assert (await client.post("/v1/steering/preview", json={"model": 1})).status_code == 400
    assert not engine.requests


async def test_health_ready_version(client: AsyncClient, engine: ScriptedEngine) -> None:
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/ready")).status_code == 200
    engine.healthy = False
    unready = await client.get("/ready")
    assert (unready.status_code, unready.headers["Retry-After"]) == (503, "5")
    assert (await client.get("/health")).status_code == 200
    version = (await client.get("/version")).json()
    assert (version["package"], version["package_version"], version["format"]) == ("demo", "1.0", 1)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/atoms", "/v1/nothing", "/docs", "/"])
async def test_everything_but_probes_needs_a_key(
    client_of: Callable[..., AsyncClient], locked: ServeConfig, path: str
) -> None:
    for key in (None, "wrong", "client-", "client-1x"):
        async with client_of(locked, key) as client:
            refused = await client.get(path)
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert refused.headers["X-Request-Id"]


@pytest.mark.parametrize("key", ["client-1", "client-2", "boss"])
async def test_each_key_opens(client_of: Callable[..., AsyncClient], locked: ServeConfig, key: str) -> None:
    async with client_of(locked, key) as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_probes_need_no_key(client_of: Callable[..., AsyncClient], locked: ServeConfig) -> None:
    async with client_of(locked) as client:
        for path in ("/health", "/ready", "/version", "/metrics"):
            assert (await client.get(path)).status_code == 200


async def test_out_of_range_needs_an_admin_key(client_of: Callable[..., AsyncClient], locked: ServeConfig) -> None:
    body = CHAT | {"steering": {"atoms": {"list": 4}, "allow_out_of_range": True}}
    for key, status in (("client-1", 403), ("boss", 200)):
        async with client_of(locked, key) as client:
            assert (await client.post("/v1/chat/completions", json=body)).status_code == status


async def test_an_admin_key_alone_leaves_inference_open(
    client_of: Callable[..., AsyncClient], config: ServeConfig
) -> None:
    async with client_of(replace(config, admin_keys=("boss",)), "EMPTY") as client:
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        assert (await client.get("/v1/atoms/list/documents")).status_code == 403


@pytest.mark.parametrize(
    ("sent", "received"),
    [("req-1.a_b:c", "req-1.a_b:c"), ("a b\x07<script>", "abscript"), ("x" * 500, "x" * 128)],
)
async def test_request_ids_come_back_clean(client: AsyncClient, sent: str, received: str) -> None:
    assert (await client.get("/health", headers={"X-Request-Id": sent})).headers["X-Request-Id"] == received


async def test_request_ids_are_made_up_where_none_is_usable(client: AsyncClient) -> None:
    first = (await client.get("/health")).headers["X-Request-Id"]
    second = (await client.get("/health", headers={"X-Request-Id": "<>"})).headers["X-Request-Id"]
    assert len(first) == len(second) == 32
    assert first != second


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "route_not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/docs", 404, "route_not_found"),
    ],
)
async def test_router_errors_have_openais_form(
    client: AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    response = await client.request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert (status == 405) == ("Allow" in response.headers)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"a": "\\ud800"}', b"[" * 5000, b'{"a": ' + b"1" * 5000 + b"}"],
)
async def test_bodies_that_are_no_json_object(client: AsyncClient, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = await client.post("/v1/chat/completions", content=body, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_json_must_be_declared(client: AsyncClient, media_type: str) -> None:
    response = await client.post("/v1/chat/completions", content=b"{}", headers={"Content-Type": media_type})
    assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("declared", [True, False])
async def test_long_bodies_are_refused(
    client_of: Callable[..., AsyncClient], config: ServeConfig, declared: bool
) -> None:
    async def pieces():
        for _ in range(30):
            yield b" " * 100

    async with client_of(replace(config, limits=Limits(max_body_bytes=1000))) as client:
        response = await client.post("/v1/chat/completions", content=b" " * 1001 if declared else pieces(),
                                     headers={"Content-Type": "application/json"})  # fmt: skip
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_unexpected_errors_tell_nothing(
    client: AsyncClient, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "encode_chat", lambda *_: 1 / 0)
    response = await client.post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "division" not in response.text
    assert response.headers["X-Request-Id"]


async def test_cors_is_off_unless_set(client_of: Callable[..., AsyncClient], locked: ServeConfig) -> None:
    preflight = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    async with client_of(locked) as client:
        assert "access-control-allow-origin" not in (await client.options("/v1/models", headers=preflight)).headers
    async with client_of(replace(locked, cors_origins=("https://app.example",))) as client:
        allowed = await client.options("/v1/models", headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        other = await client.options("/v1/models", headers=preflight | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        asked = "authorization,content-type,x-stainless-os"  # some of what the SDK sends in a browser
        sdk = await client.options("/v1/models", headers=preflight | {"Access-Control-Request-Headers": asked})
        assert sdk.status_code == 200
        assert set(asked.split(",")) <= set(sdk.headers["access-control-allow-headers"].replace(" ", "").split(","))
        refused = await client.get("/v1/models", headers={"Origin": "https://app.example"})
        assert refused.status_code == 401
        assert {"Retry-After", "x-should-retry"} <= set(refused.headers["access-control-expose-headers"].split(", "))


async def test_logs_hold_no_prompt(client: AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "atomsteer.access")
    await client.post("/v1/chat/completions?key=sesame", json=CHAT, headers={"X-Request-Id": "r1"})
    line = next(record.getMessage() for record in caplog.records if record.name == "atomsteer.access")
    assert line.startswith("POST '/v1/chat/completions' 200 ")
    assert "r1" in line
    assert "hello" not in caplog.text
    assert "sesame" not in line


async def test_metrics(client: AsyncClient, ids: list[str], engine: ScriptedEngine) -> None:
    await client.post("/v1/chat/completions", json=CHAT | {"model": "demo:polite", "max_tokens": 2})
    await client.post("/v1/chat/completions", json=CHAT | {"steering": {"atoms": {"list": 99}}})
    await client.post("/v1/chat/completions", json=CHAT | {"steering": {"atoms": {"x1y2": 1}}})
    await client.post("/v1/chat/completions", json=CHAT | {"model": "unheard-of"})
    text = (await client.get("/metrics")).text
    for line in (
        'vllm:num_requests_running{model_name="demo"} 0.0',
        'vllm:num_requests_waiting{model_name="demo"} 0.0',
        'vllm:prompt_tokens_total{model_name="demo"} 2.0',
        'vllm:generation_tokens_total{model_name="demo"} 2.0',
        'vllm:time_to_first_token_seconds_count{model_name="demo"} 1.0',
        'vllm:inter_token_latency_seconds_count{model_name="demo"} 1.0',
        'vllm:e2e_request_latency_seconds_count{model_name="demo"} 1.0',
        'atomsteer_requests_total{arm="",experiment="",preset="polite",status="200"} 1.0',
        'atomsteer_requests_total{arm="",experiment="",preset="",status="400"} 1.0',
        'atomsteer_requests_total{arm="",experiment="",preset="",status="404"} 2.0',
        f'atomsteer_atom_requests_total{{atom="{ids[0]}"}} 1.0',
        "atomsteer_predicted_kl_count 1.0",
        'atomsteer_steering_errors_total{code="invalid_coefficient"} 1.0',
        'atomsteer_steering_errors_total{code="atom_not_found"} 1.0',
        'atomsteer_mix_requests_total{mix="new"} 1.0',
        "atomsteer_compose_seconds_count 0.0",
    ):
        assert line in text.splitlines()
    assert "x1y2" not in text
    assert "unheard-of" not in text


async def test_hostile_names_make_no_series(client_of: Callable[..., AsyncClient], locked: ServeConfig) -> None:
    async with client_of(locked, "boss") as client:

        async def series() -> set[str]:
            lines = (await client.get("/metrics")).text.splitlines()
            return {line.rpartition(" ")[0] for line in lines if not line.startswith("#") and "_created" not in line}

        async def ask(name: str) -> None:
            for body in (
                {"model": name}, {"model": f"demo:{name}"}, {"model": "demo", "steering": {"preset": name}},
                {"model": "demo", "steering": {"experiment": name}}, {"model": "demo", "steering": {"atoms": {name: 1}}},
                {"model": "demo", "user": name, "metadata": {name: name}, "steering": {name: 1}},
            ):  # fmt: skip
                await client.post("/v1/chat/completions", json=CHAT | body)
            await client.get(f"/v1/atoms/{quote(name, safe='')}", headers={"Authorization": f"Bearer {quote(name)}"})

        await ask("first")
        before = await series()
        for name in ("second", "../../etc/passwd", "a\nb", 'x"} 1', "\u202e", "x" * 300):
            await ask(name)
        assert await series() == before


async def test_mixes_do_not_grow_series_and_known_ones_are_told_from_new(client: AsyncClient) -> None:
    for value in (0.1, 0.2, 0.1, 0.3):
        await client.post("/v1/chat/completions", json=CHAT | {"steering": {"atoms": {"list": value}}})
    text = (await client.get("/metrics")).text
    assert (
        'atomsteer_mix_requests_total{mix="new"} 3.0' in text
        and 'atomsteer_mix_requests_total{mix="known"} 1.0' in text
    )
    assert "m-" not in text


async def test_refused_keys_are_counted(client_of: Callable[..., AsyncClient], locked: ServeConfig) -> None:
    async with client_of(locked, "wrong") as client:
        await client.get("/v1/models")
        assert "atomsteer_refused_keys_total 1.0" in (await client.get("/metrics")).text


async def test_each_application_has_metrics_of_its_own(client_of: Callable[..., AsyncClient]) -> None:
    async with client_of() as first, client_of() as second:
        await first.post("/v1/chat/completions", json=CHAT)
        assert 'vllm:generation_tokens_total{model_name="demo"} 0.0' in (await second.get("/metrics")).text


async def test_the_package_is_what_was_given(client: AsyncClient, package: Package) -> None:
    body = (await client.post("/v1/chat/completions", json=CHAT)).json()
    assert body["system_fingerprint"] == f"fp_{package.manifest.content_hash[:12]}"
