"""A database that is locked or away: answers go on, what needs it says so, and nothing observed is lost."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from httpx import AsyncClient
from sqlalchemy import create_engine, select, text

from server.config import ServeConfig
from server.experiments.spec import Assignment
from server.state import State
from server.store import database as database_module
from server.store import writer as writer_module
from server.store.tables import exposures, outcomes, responses

Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "WAIT_SECONDS", 0.2)
    monkeypatch.setattr(writer_module, "_RETRY_SECONDS", 0.05)


async def test_a_locked_file(client_of: Callable[..., AsyncClient], locked: ServeConfig, state_of: Callable[[str], State],
                             tmp_path: Path, spec: dict, call: Call) -> None:  # fmt: skip
    state = state_of(f"sqlite:///{tmp_path}/a.db")
    admin = client_of(locked, "boss", state)
    await call(admin, "POST", "experiments", spec, 201)
    await call(admin, "POST", "experiments/tone/start", {})
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "hi"}],
        "user": "u",
        "steering": {"experiment": "tone"},
    }
    first = await call(admin, "POST", "chat/completions", body)
    outcome = {"response_id": first["id"], "metric": "thumbs", "value": 1}
    await call(admin, "POST", "experiments/tone/outcomes", outcome)

    holder = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    second = await call(admin, "POST", "chat/completions", body)
    assert second["steering"]["arm"] == first["steering"]["arm"], "answers need no database"
    tone = state.snapshot.experiments["tone"].id
    for n in range(1500):  # more than one transaction takes: what is acknowledged waits behind them
        state.recorder.exposed(Assignment(tone, f"u{n}", "plain"))
    for method, path, change in (
        ("POST", "experiments/tone/outcomes", outcome | {"value": 0}), ("PUT", "presets/x", {"atoms": {}}),
        ("POST", "experiments/tone/stop", {}), ("DELETE", "units/u", None),
    ):  # fmt: skip
        response = await admin.request(method, f"/v1/{path}", json=change)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unavailable"), path
        assert response.headers["Retry-After"] == "5"
        assert "a.db" not in response.text
    holder.execute("ROLLBACK")
    holder.close()

    outcome = {"response_id": second["id"], "metric": "thumbs", "value": 1}
    await call(admin, "POST", "experiments/tone/outcomes", outcome)
    with state.database.read() as connection:
        assert connection.execute(select(outcomes.c.value)).scalars().all() == [1.0, 1.0]
        assert len(connection.execute(select(responses)).all()) == 2
        assert len(connection.execute(select(exposures)).all()) == 1501


async def test_a_postgresql_that_drops_its_connections(
    client_of: Callable[..., AsyncClient], locked: ServeConfig, state_of: Callable[[str], State], postgresql: str,
    request: pytest.FixtureRequest, spec: dict, call: Call,
) -> None:  # fmt: skip
    from server.store.database import Database
    from server.store.schema import upgrade

    url = request.getfixturevalue("new_postgresql") + "&application_name=dropped"
    database = Database.at(url)
    upgrade(database)
    database.close()
    admin = client_of(locked, "boss", state_of(url))
    await call(admin, "POST", "experiments", spec, 201)
    killer = create_engine(postgresql.replace("postgresql:", "postgresql+psycopg:", 1), isolation_level="AUTOCOMMIT")
    with killer.connect() as connection:
        query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'dropped'"
        assert connection.execute(text(query)).all()
    killer.dispose()
    await asyncio.sleep(0.1)
    await call(admin, "POST", "experiments/tone/start", {})
