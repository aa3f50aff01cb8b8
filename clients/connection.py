"""A server to talk to: a running one, or one in this process on a loopback port that only this process has the key of."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from atoms.errors import ConfigError, EngineStoppedError

if TYPE_CHECKING:
    from atoms.manifest import Manifest
    from server.embedded.load import EngineOptions

_MOST_WAITING = 1 << 16
_START_SECONDS = 30


@dataclass(frozen=True)
class Connection:
    """`url` ends with /v1. `model` is what requests that name none are sent to. `source` tells who answers: the package, and of
    a running server the model too, or alone where it names no package."""

    url: str
    key: str
    model: str
    source: str


def check_source(package: Path | None, server: str | None) -> None:
    """Raises ConfigError unless exactly one is given."""
    if (package is None) == (server is None):
        raise ConfigError("give one of --package (served in this process) and --server (a running server)")


@contextmanager
def connect(
    package: Path | None, server: str | None, key: str | None, options: EngineOptions | None = None
) -> Iterator[Connection]:
    """The server at `server`, or `package` served in this process with `options` until the block is left.

    Raises ConfigError unless exactly one is given, ServerAnswerError, and what `load_package` raises.
    """
    check_source(package, server)
    if server is not None:
        yield _running(server, key)
    elif package is not None:
        with _in_process(package, options) as connection:
            yield connection


def _running(server: str, key: str | None) -> Connection:
    from clients.server_api import ServerAPI

    with ServerAPI(server, key) as api:
        answer, version = api.call("GET", "models"), api.version()
    try:
        named = [model["id"] for model in answer["data"] if model.get("parent") is None]
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{server} lists no models at /v1/models; is it an OpenAI API?") from error
    if not named:
        raise ConfigError(f"{server} serves no model")
    serves = [str(version[name]) for name in ("package", "package_version") if name in version]
    return Connection(
        f"{server.rstrip('/').removesuffix('/v1')}/v1",
        key or "none",
        named[0],
        " ".join([f"model {named[0]}", *serves]),
    )


def read_source(package: Path) -> str:
    """As `Connection.source`, where the package that lies there is served in this process. Raises PackageError."""
    from atoms.package import Package

    return _source(Package.read(package).manifest)


def _source(manifest: Manifest) -> str:
    return f"{manifest.name} {manifest.version} {manifest.content_hash[:16]}"


@contextmanager
def _in_process(package: Path, options: EngineOptions | None) -> Iterator[Connection]:
    import uvicorn

    from server.embedded.serve import reserve_port, set_up_threads

    set_up_threads()  # before torch is loaded, which comes with what follows
    from server.config import ServeConfig
    from server.embedded.app import create_app
    from server.embedded.load import EngineOptions, load_package

    key = secrets.token_urlsafe()
    with reserve_port("127.0.0.1", 0) as listener:
        loaded = load_package(
            package, replace(options or EngineOptions(), max_waiting=_MOST_WAITING)
        )  # the caller bounds the queue
        # Whoever has the package may leave tested ranges, too.
        config = ServeConfig(package=package, api_keys=(key,), admin_keys=(key,), access_log=False)
        app = create_app(loaded.package, loaded.engine, config, vocabulary=loaded.vocabulary)
        settings = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        host = uvicorn.Server(settings)
        thread = threading.Thread(target=host.run, kwargs={"sockets": [listener]}, name="loopback-server", daemon=True)
        thread.start()
        try:
            _wait_until_started(host, thread)
            port = listener.getsockname()[1]
            manifest = loaded.package.manifest
            yield Connection(f"http://127.0.0.1:{port}/v1", key, manifest.name, _source(manifest))
        finally:
            loaded.engine.close()
            host.should_exit = True
            thread.join()


def _wait_until_started(host: object, thread: threading.Thread) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not getattr(host, "started", False):
        if not thread.is_alive() or time.monotonic() > deadline:
            raise EngineStoppedError("the server of this process did not start; see the messages above")
        time.sleep(0.01)
