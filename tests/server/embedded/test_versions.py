"""A change of the package's version under way: who is answered by which, and what a failing one leaves behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from httpx import ASGITransport, AsyncClient

from atoms.errors import PackageCorruptError
from atoms.package import Package, PackageContents, write_package
from server.config import ServeConfig
from server.embedded.app import Application, create_app
from server.embedded.scripted import ScriptedEngine

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hello"}], "steering": {"atoms": {"list": 1}}}
PATH, RELOAD = "/v1/chat/completions", "/v1/admin/reload"
ADMIN = {"Authorization": "Bearer boss"}


def version_of(package: Package, path: Path, **changes: Any) -> Package:
    """A copy of `package` whose manifest has `changes`."""
    directions = {card.id: package.bank.direction(package.mix({card.id: 1.0})) for card in package.manifest.atoms}
    contents = PackageContents(package.manifest.model_copy(update=changes), package.base_adapter, directions,
                               {"M": package.drift}, {"mean": torch.zeros(1)}, {})  # fmt: skip
    write_package(path, contents)
    return Package.read(path)


class Shelf:
    """What lies at the package's path: the next loads give these, each with an engine of its own, or raise them."""

    def __init__(self) -> None:
        self.next: list[Package | Exception] = []
        self.engines: list[ScriptedEngine] = []

    def load(self) -> Any:
        found = self.next.pop(0)
        if isinstance(found, Exception):
            raise found
        self.engines.append(ScriptedEngine(script="new words"))
        return SimpleNamespace(package=found, engine=self.engines[-1], vocabulary=1000)


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def app(package: Package, engine: ScriptedEngine, config: ServeConfig, shelf: Shelf) -> Application:
    return create_app(package, engine, replace(config, admin_keys=("boss",)), load=shelf.load)


@pytest.fixture
async def client(app: Application) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(transport=ASGITransport(app), base_url="http://test", headers=ADMIN) as client:
        yield client


async def test_requests_in_flight_end_on_their_version_and_new_ones_begin_on_the_new(
    client: AsyncClient, engine: ScriptedEngine, shelf: Shelf, package: Package, tmp_path: Path
) -> None:
    engine.script, engine.delay = "old " * 9 + "end", 0.4
    second = version_of(package, tmp_path / "second", version="2.0")
    shelf.next = [second]
    in_flight = asyncio.create_task(client.post(PATH, json=CHAT))
    while not engine.running:
        await asyncio.sleep(0.005)
    changed = await client.post(RELOAD)
    assert changed.json() == {"object": "package.reloaded", "package": "demo", "version": "2.0", "previous_version": "1.0",
                              "changed": True}  # fmt: skip
    after = (await client.post(PATH, json=CHAT)).json()
    assert not in_flight.done() and engine.healthy, "the old version was ended before its request"
    before = (await in_flight).json()
    assert before["choices"][0]["message"]["content"] == engine.script
    assert after["choices"][0]["message"]["content"] == "new words"
    assert before["steering"]["mix"] == package.digest(package.mix({"list": 1}))
    assert after["steering"]["mix"] == second.digest(second.mix({"list": 1})) != before["steering"]["mix"]
    assert before["system_fingerprint"] != after["system_fingerprint"]
    assert (await client.get("/version")).json()["package_version"] == "2.0"
    assert (await client.get("/v1/atoms")).json()["package"]["version"] == "2.0"
    for _ in range(100):
        await asyncio.sleep(0.02)
        if not engine.healthy:
            break
    assert not engine.healthy and shelf.engines[0].healthy, "the old engine must go, the new one stay"
    text = (await client.get("/metrics")).text
    assert 'vllm:generation_tokens_total{model_name="demo"} 12.0' in text, "metrics go on counting over versions"
    assert 'atomsteer_reloads_total{result="done"} 1.0' in text
    (info,) = [line for line in text.splitlines() if line.startswith("atomsteer_package_info{")]
    assert 'version="2.0"' in info


async def test_a_server_has_died_with_the_engine_of_its_current_version_alone(
    app: Application, client: AsyncClient, engine: ScriptedEngine, shelf: Shelf, package: Package, tmp_path: Path
) -> None:
    assert not app.died
    engine.died = True
    assert app.died
    shelf.next = [version_of(package, tmp_path / "second", version="2.0")]
    assert (await client.post(RELOAD)).status_code == 200
    assert not app.died, "what is left of the old version concerns its own requests"
    shelf.engines[0].died = True
    assert app.died


async def test_a_stream_goes_on_across_a_reload(
    client: AsyncClient, engine: ScriptedEngine, shelf: Shelf, package: Package, tmp_path: Path
) -> None:
    engine.script, engine.delay = " ".join(map(str, range(20))), 0.02
    shelf.next = [version_of(package, tmp_path / "second", version="2.0")]
    stream = asyncio.create_task(client.post(PATH, json=CHAT | {"stream": True}))
    while not engine.running:
        await asyncio.sleep(0.005)
    assert (await client.post(RELOAD)).status_code == 200
    events = [line for line in (await stream).text.splitlines() if line.startswith("data: {")]
    words = [choice["delta"].get("content", "") for event in events for choice in json.loads(event[6:])["choices"]]
    assert "".join(words) == engine.script


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (PackageCorruptError("drift.safetensors was truncated"), "drift.safetensors"),
        (OSError("disk"), "log says why"),
        (MemoryError(), "log says why"),
    ],
)
async def test_a_failing_reload_leaves_the_old_version(
    client: AsyncClient, engine: ScriptedEngine, shelf: Shelf, broken: Exception, said: str
) -> None:
    shelf.next = [broken]
    refused = await client.post(RELOAD)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "reload_failed")
    assert said in refused.json()["error"]["message"] and "nothing was changed" in refused.json()["error"]["message"]
    assert (await client.post(PATH, json=CHAT)).status_code == 200 and engine.healthy


async def test_what_cannot_serve_is_not_left_running(
    client: AsyncClient, engine: ScriptedEngine, shelf: Shelf, package: Package, tmp_path: Path
) -> None:
    """Another package, and one without an atom that a configured preset names."""
    nameless = [card.model_copy(update={"alias": None}) for card in package.manifest.atoms]
    shelf.next = [
        version_of(package, tmp_path / "other", name="other"),
        version_of(package, tmp_path / "a", atoms=nameless),
    ]
    assert "'other'" in (await client.post(RELOAD)).json()["error"]["message"]
    assert "unknown atom" in (await client.post(RELOAD)).json()["error"]["message"]
    assert [made.healthy for made in shelf.engines] == [False, False]
    assert (await client.get("/ready")).status_code == 200 and engine.healthy


async def test_reloads_are_for_admins_one_at_a_time(
    client: AsyncClient, shelf: Shelf, package: Package, app: Application
) -> None:
    refused = await client.post(RELOAD, headers={"Authorization": "Bearer client"})
    assert refused.status_code == 403
    shelf.next = [package]
    load = shelf.load

    def slowly() -> Any:
        import time

        time.sleep(0.2)
        return load()

    app._versions._load = slowly
    answers = await asyncio.gather(client.post(RELOAD), client.post(RELOAD))
    assert sorted(answer.status_code for answer in answers) == [200, 409]
    assert answers[0].json()["changed"] is False


async def test_closing_ends_every_version(
    app: Application, client: AsyncClient, engine: ScriptedEngine, shelf: Shelf, package: Package
) -> None:
    engine.script, engine.delay = "word " * 1000, 0.1
    shelf.next = [package]
    stream = asyncio.create_task(client.post(PATH, json=CHAT | {"max_tokens": 60, "stream": True}))
    while not engine.running:
        await asyncio.sleep(0.005)
    await client.post(RELOAD)
    app.close()
    assert "engine_stopped" in (await stream).text
    assert not engine.healthy and not shelf.engines[0].healthy


async def test_an_application_without_a_package_to_read_cannot_reload(client_of: Callable[..., AsyncClient]) -> None:
    async with client_of(ServeConfig(package=Path("x"), admin_keys=("boss",)), "boss") as client:
        assert (await client.post(RELOAD)).status_code == 501
