"""An admin and a client of one server with a database, and an experiment that runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from httpx import AsyncClient

from server.config import ServeConfig
from server.state import State

Body = dict[str, Any]


@pytest.fixture
def locked(config: ServeConfig) -> ServeConfig:
    return replace(config, api_keys=("client",), admin_keys=("boss",))


@pytest.fixture
def spec() -> Body:
    return {
        "name": "tone",
        "arms": [{"name": "plain", "atoms": {}}, {"name": "listed", "atoms": {"list": 2}}, {"name": "nice", "preset": "polite"}],
        "metrics": [{"name": "thumbs", "kind": "proportion"}, {"name": "spent", "missing": "zero"}],
    }  # fmt: skip


@pytest.fixture
def admin(client_of: Callable[..., AsyncClient], locked: ServeConfig, state: State) -> AsyncClient:
    return client_of(locked, "boss", state)


@pytest.fixture
def client(client_of: Callable[..., AsyncClient], locked: ServeConfig, state: State) -> AsyncClient:
    return client_of(locked, "client", state)


async def call(client: AsyncClient, method: str, path: str, body: Body | None = None, status: int = 200) -> Body:
    response = await client.request(method, f"/v1/{path}", json=body)
    assert response.status_code == status, response.text
    result: Body = response.json()
    return result


@pytest.fixture(name="call")
def call_fixture() -> Callable[..., Any]:
    return call


@pytest.fixture
async def running(admin: AsyncClient, spec: Body) -> Body:
    await call(admin, "POST", "experiments", spec, 201)
    return await call(admin, "POST", "experiments/tone/start", {})


@pytest.fixture
def ask(client: AsyncClient) -> Callable[..., Any]:
    """`await ask("user-1")`: the answer to one chat under the experiment."""

    async def ask(user: str | None, status: int = 200, experiment: str = "tone", **fields: Any) -> Body:
        body = {"model": "demo", "messages": [{"role": "user", "content": "hello"}], "user": user,
                "steering": {"experiment": experiment}} | fields  # fmt: skip
        return await call(client, "POST", "chat/completions", body, status)

    return ask
