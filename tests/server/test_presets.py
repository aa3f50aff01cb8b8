"""Presets in the database, through the routes, on both kinds of database."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from httpx import AsyncClient

from atoms.errors import ConfigError
from atoms.mix import Mix
from atoms.package import Package
from server.config import ServeConfig
from server.errors import ConflictError
from server.state import State
from server.steering import Steering

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def admin(client_of: Callable[..., AsyncClient], config: ServeConfig, state: State) -> AsyncClient:
    return client_of(replace(config, api_keys=("client",), admin_keys=("boss",)), "boss", state)


async def put(admin: AsyncClient, name: str, status: int = 200, **body: object) -> dict:
    response = await admin.put(f"/v1/presets/{name}", json=body)
    assert response.status_code == status, response.text
    return response.json()


async def test_a_preset_from_creation_to_deletion(admin: AsyncClient, ids: list[str]) -> None:
    created = await admin.post("/v1/presets", json={"name": "brief", "atoms": {"list": 1.5}, "description": "short"})
    assert created.status_code == 201
    brief = created.json()
    assert brief | {"created_at": 0, "mix": ""} == {
        "object": "preset", "name": "brief", "atoms": {ids[0]: 1.5}, "mix": "", "predicted_kl": 0.1125, "usable": True,
        "fixed": False, "description": "short", "version": 1, "package_version": "1.0", "created_at": 0,
    }  # fmt: skip
    assert (await admin.get("/v1/presets/brief")).json() == brief

    answer = await admin.post("/v1/chat/completions", json=CHAT | {"steering": {"preset": "brief"}})
    assert answer.json()["steering"]["atoms"] == {ids[0]: 1.5}
    assert answer.headers["X-Atomsteer-Mix"] == brief["mix"]
    by_model = await admin.post("/v1/chat/completions", json=CHAT | {"model": "demo:brief"})
    assert by_model.json()["steering"] == answer.json()["steering"]
    assert "demo:brief" in [model["id"] for model in (await admin.get("/v1/models")).json()["data"]]

    assert (await put(admin, "brief", atoms={"formal": -1}))["version"] == 2
    changed = await admin.post("/v1/chat/completions", json=CHAT | {"model": "demo:brief"})
    assert changed.json()["steering"]["atoms"] == {ids[1]: -1.0}
    versions = (await admin.get("/v1/presets/brief/versions")).json()["data"]
    assert [(version["version"], version["atoms"]) for version in versions] == [(1, {ids[0]: 1.5}), (2, {ids[1]: -1.0})]

    assert (await admin.delete("/v1/presets/brief")).json() == {
        "object": "preset.deleted", "name": "brief", "deleted": True,
    }  # fmt: skip
    for gone in (admin.get("/v1/presets/brief"), admin.delete("/v1/presets/brief"),
                 admin.post("/v1/chat/completions", json=CHAT | {"model": "demo:brief"})):  # fmt: skip
        response = await gone
        assert (response.status_code, response.json()["error"]["code"]) == (404, "preset_not_found")
    assert (await put(admin, "brief", atoms={}, if_version=0))["version"] == 4, "numbers are not used twice"


async def test_fixed_presets_are_listed_first_and_cannot_be_shadowed(
    admin: AsyncClient, state: State, package: Package, config: ServeConfig
) -> None:
    await put(admin, "brief", atoms={"list": 1})
    listed = (await admin.get("/v1/presets")).json()["data"]
    assert [(preset["name"], preset["fixed"]) for preset in listed] == [
        ("polite", True), ("lists", True), ("brief", False),
    ]  # fmt: skip
    for refused in (admin.put("/v1/presets/polite", json={"atoms": {}}), admin.delete("/v1/presets/polite"),
                    admin.post("/v1/presets", json={"name": "polite", "atoms": {}})):  # fmt: skip
        response = await refused
        assert (response.status_code, response.json()["error"]["code"]) == (409, "conflict")
        assert "--preset" in response.json()["error"]["message"]
    with pytest.raises(ConfigError, match="'brief' is set by --preset and is in the database"):
        Steering.of(package, replace(config, presets=("brief=list=2",)), lambda: state.snapshot)


async def test_a_version_that_is_expected_is_a_condition(admin: AsyncClient) -> None:
    await put(admin, "brief", atoms={"list": 1}, if_version=0)
    await put(admin, "brief", 409, atoms={"list": 2}, if_version=0)
    await put(admin, "brief", atoms={"list": 2}, if_version=1)
    await put(admin, "brief", 409, atoms={"list": 3}, if_version=1)
    assert (await admin.post("/v1/presets", json={"name": "brief", "atoms": {}})).status_code == 409


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "atoms"),
        ({"atoms": {"lits": 1}}, 404, "atoms.lits"),
        ({"atoms": {"list": 9}}, 400, "atoms.list"),
        ({"atoms": {"list": "1"}}, 400, "atoms.list"),
        ({"atoms": {"list": 10**400}}, 400, "atoms.list"),
        ({"atoms": {"list": 1}, "mix": 1}, 400, "mix"),
        ({"atoms": {"list": 1}, "if_version": -1}, 400, "if_version"),
        ({"atoms": {"list": 1}, "description": 5}, 400, "description"),
    ],
)
async def test_bad_presets_are_refused_by_field(admin: AsyncClient, body: dict, status: int, param: str) -> None:
    error = (await put(admin, "brief", status, **body))["error"]
    assert error["param"] == param
    assert (await admin.get("/v1/presets/brief")).status_code == 404


@pytest.mark.parametrize("name", ["a b", "ü", "-x", "x" * 65, "a%00"])
async def test_bad_names_are_refused(admin: AsyncClient, name: str) -> None:
    assert (await put(admin, name, 400, atoms={}))["error"]["param"] == "name"


async def test_clients_read_and_only_admins_write(
    client_of: Callable[..., AsyncClient], config: ServeConfig, sqlite_state: State
) -> None:
    locked = replace(config, api_keys=("client",), admin_keys=("boss",))
    async with client_of(locked, "client", sqlite_state) as client:
        assert (await client.get("/v1/presets")).status_code == 200
        assert (await client.get("/v1/presets/polite")).status_code == 200
        for refused in (client.post("/v1/presets", json={"name": "x", "atoms": {}}), client.delete("/v1/presets/x"),
                        client.put("/v1/presets/x", json={"atoms": {}})):  # fmt: skip
            assert (await refused).status_code == 403
    async with client_of(locked, None, sqlite_state) as nobody:
        assert (await nobody.get("/v1/presets")).status_code == 401


async def test_without_a_database_the_fixed_presets_remain(
    client_of: Callable[..., AsyncClient], config: ServeConfig
) -> None:
    async with client_of(replace(config, admin_keys=("boss",)), "boss") as admin:
        assert [preset["name"] for preset in (await admin.get("/v1/presets")).json()["data"]] == ["polite", "lists"]
        refused = await admin.put("/v1/presets/x", json={"atoms": {}})
        assert (refused.status_code, refused.json()["error"]["code"]) == (501, "no_database")


def test_another_replica_sees_a_change(state_of: Callable[[str], State], database_url: str) -> None:
    first, second = state_of(database_url), state_of(database_url)
    stored = first.presets.put("brief", Mix.of({"a-1": 1.0}), "", "1.0")
    second.refresh()
    assert second.snapshot.presets == {"brief": stored}


def test_another_package_sees_none_of_it(state: State) -> None:
    state.presets.put("brief", Mix.of({"a-1": 1.0}), "", "1.0")
    other = State(state.database, "other")
    assert not other.snapshot.presets
    other.presets.put("brief", Mix.of({"b-1": 1.0}), "", "1.0")
    state.refresh()
    assert state.snapshot.presets["brief"].mix == Mix.of({"a-1": 1.0})
    other.close()


async def test_a_preset_of_atoms_that_the_package_lacks_is_shown_and_refused(admin: AsyncClient, state: State) -> None:
    state.presets.put("old", Mix.of({"a-00000000": 1.0}), "", "0.9")
    state.refresh()
    shown = (await admin.get("/v1/presets/old")).json()
    assert (shown["usable"], shown["predicted_kl"], shown["mix"]) == (False, None, None)
    assert "old" in [preset["name"] for preset in (await admin.get("/v1/presets")).json()["data"]]
    assert "demo:old" not in (await admin.get("/v1/models")).text
    refused = await admin.post("/v1/chat/completions", json=CHAT | {"model": "demo:old"})
    assert refused.status_code == 409
    assert "version 0.9" in refused.json()["error"]["message"]


def test_of_concurrent_writers_none_is_lost(state: State) -> None:
    """Each either gets a version of its own or is told that it came too late."""
    done: list[int] = []
    refused: list[ConflictError] = []

    def write(n: int) -> None:
        try:
            done.append(state.presets.put("brief", Mix.of({"a-1": n}), "", "1.0").version)
        except ConflictError as error:
            refused.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) + len(refused) == 8
    assert sorted(done) == list(range(1, len(done) + 1))
    assert len(state.presets.versions("brief")) == len(done) >= 1
