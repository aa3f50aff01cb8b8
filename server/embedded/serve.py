"""Runs the embedded server until a signal ends it.

    reserve the port  ->  open the database  ->  load package and model  ->  serve  ->  on SIGTERM or SIGINT drain
    ->  stop the engine  ->  write what was observed

SIGHUP serves the package at its path anew, as ``POST /v1/admin/reload`` does.

An engine that dies drains the server as a signal does, and ends the process with status 1, so that whatever restarts
failed services starts it again.

Draining: `/ready` turns 503 and new generations are refused with 503 and Retry-After, while the socket stays open, so
that a router sees it. Requests in progress have `shutdown_timeout` seconds; what is left then ends with an error event.
A second signal ends them at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import uvicorn

from atoms.errors import ConfigError
from server.auth import warn_if_open
from server.config import ServeConfig
from server.logs import set_up_logging

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from server.context import Traffic
    from server.embedded.load import EngineOptions

_log = logging.getLogger("atomsteer.server")
_LAST_WORDS = 5
"""Seconds that responses get to send their end once the engine has stopped."""


def serve(config: ServeConfig) -> None:
    """Serves `config.package`; blocks until SIGTERM or SIGINT has been obeyed, then returns.

    Raises ConfigError (a port that is taken, first of all), and what `load_package` raises.
    """
    set_up_threads()
    config = config.with_environment(os.environ)
    set_up_logging(config.log_format)
    with ExitStack() as stack:
        listener = stack.enter_context(reserve_port(config.host, config.port))
        from server.context import Traffic
        from server.embedded.app import create_app
        from server.embedded.load import load_package
        from server.state import State
        from server.store.schema import open_database

        database = open_database(url) if (url := config.database_url()) else None
        load = partial(load_package, config.package, engine_options(config))
        loaded = load()
        state = State(database, loaded.package.manifest.name) if database else None
        if state is not None:
            stack.callback(state.close)
        stack.callback(loaded.engine.close)
        traffic = Traffic()
        app = create_app(loaded.package, loaded.engine, config, traffic=traffic, vocabulary=loaded.vocabulary, state=state,
                         load=load)  # fmt: skip
        stack.callback(app.close)
        manifest = loaded.package.manifest
        name = config.served_model_name or manifest.name
        warn_if_open(config, listener.getsockname()[0], _url(listener))
        greeting = f"atomsteer serves {name!r} ({len(manifest.atoms)} atoms) on {_url(listener)}"
        server = draining_server(app, app, traffic, config.shutdown_timeout, greeting, reload=app.reload)
        server.run(sockets=[listener])


def set_up_threads() -> None:
    """Has idle OpenMP threads sleep, so that they do not starve the event loop, but only after some microseconds: a step has
    hundreds of short parallel parts, and to wake up for each takes a sixth of it. Has no effect once torch is loaded, nor
    where the operator has set either variable.

    ``ACTIVE`` is needed for that: the count is ignored otherwise as soon as two threads use OpenMP, as a server's do.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ |= {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "2000"}


def engine_options(config: ServeConfig) -> EngineOptions:
    """The part of `config` that loading needs."""
    from server.embedded.load import EngineOptions

    return EngineOptions(
        model=config.model,
        dtype=config.dtype,
        device=config.device,
        slots=config.slots,
        max_model_len=config.max_model_len,
        max_waiting=config.max_waiting,
        prefill_tokens_per_step=config.prefill_tokens_per_step,
        prefix_cache_tokens=config.prefix_cache_tokens,
    )


class Answering(Protocol):
    """What answers requests, an engine or an application of several, and ends those in progress when it is closed."""

    @property
    def died(self) -> bool: ...

    def close(self) -> None: ...


Reload = Callable[[], Awaitable[Any]]


def draining_server(
    app: ASGIApp, engine: Answering, traffic: Traffic, timeout: float, greeting: str, reload: Reload | None = None
) -> DrainingServer:
    """A server of `app`, to be run on a bound socket. Prints `greeting` once requests are accepted; SIGHUP calls `reload`."""
    settings = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=_LAST_WORDS,
    )
    return DrainingServer(settings, engine, traffic, timeout, greeting, reload)


class DrainingServer(uvicorn.Server):
    """A uvicorn server that answers a signal by draining, and returns instead of dying of the signal. It drains as well when
    its engine has died, and raises SystemExit then."""

    def __init__(
        self,
        config: uvicorn.Config,
        engine: Answering,
        traffic: Traffic,
        timeout: float,
        greeting: str,
        reload: Reload | None = None,
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._traffic = traffic
        self._timeout = timeout
        self._greeting = greeting
        self._deadline = 0.0
        self._has_died = False
        self._reload = reload

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:
            raise ConfigError(f"cannot listen: {error.strerror or error}; choose another --port") from error
        if self._reload is not None:
            from server.versions import reload_at_hangup

            reload_at_hangup(self._reload)
        _say(self._greeting)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run(sockets)
        if self._has_died:
            raise SystemExit("the engine has died, so the server ends; the log above says why")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to drain; a second signal ends the wait."""
        self._drain()

    def _drain(self) -> None:
        now = time.monotonic()
        self._deadline = now if self._traffic.draining else now + self._timeout
        self._traffic.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self._engine.died and not self._has_died:
            self._has_died = True
            _log.error("the engine has died: the server ends once other requests in progress have, or their time is up")
            if not self._traffic.draining:
                self._drain()
        if self._traffic.draining and (not self._traffic.active or time.monotonic() >= self._deadline):
            _log.info("stopping with %d requests in progress", self._traffic.active)
            await asyncio.to_thread(self._engine.close)  # what is left ends with an error event
            self.should_exit = True
        return await super().on_tick(counter)


def _say(line: str) -> None:
    """Prints `line`. A stdout that takes nothing (a full disk, a closed pipe) is given up, and nothing else."""
    try:
        print(line, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # what is buffered must not fail again when the process ends
        os.close(nowhere)


def reserve_port(host: str, port: int) -> socket.socket:
    """A socket bound to `host` and `port`, not listening yet: a taken port is found before a model is loaded.

    Raises ConfigError that names host, port and the remedy.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"host {host!r} cannot be resolved ({error}); choose an address such as 127.0.0.1") from error
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on port {port} of {host}: {error.strerror or error}; stop what uses it, or choose another "
            "with --port"
        ) from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
