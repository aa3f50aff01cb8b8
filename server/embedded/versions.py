"""One server, one version of a package at a time, and a change of version that no request notices.

    current ──requests──> application + engine of version 1
    reload: load version 2 beside it  ->  current = version 2  ->  version 1 ends its requests  ->  its engine stops

Each version has an engine of its own, so their weights, mixes and caches never meet; both are in memory until the old one
has ended. What fails before the change leaves the old version serving.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from atoms.engine import EngineStats
from atoms.errors import AtomsteerError
from atoms.package import Package
from server.embedded.generation import ServedEngine
from server.errors import CollisionError, NotSupportedHereError, ReloadError

if TYPE_CHECKING:
    from server.embedded.load import LoadedPackage

_log = logging.getLogger("atomsteer.server")
_LOOK_SECONDS = 0.2


@dataclass
class Version:
    """A package, the engine that runs it, and the application that serves it. `requests` are in progress."""

    package: Package
    engine: ServedEngine
    app: ASGIApp
    requests: int = field(default=0, init=False)


class Versions:
    """An ASGI application: each request goes to the version that was current when it came.

    `build` makes a version of a loaded package and raises what its settings raise; `load` None cannot reload.
    """

    def __init__(
        self,
        first: Version,
        build: Callable[[LoadedPackage], Version],
        load: Callable[[], LoadedPackage] | None,
    ) -> None:
        self.current = first
        self._ending: list[Version] = []
        self._ended = EngineStats(0, 0, 0)
        self._build = build
        self._load = load
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        version = self.current
        version.requests += 1
        try:
            await version.app(scope, receive, send)
        finally:
            version.requests -= 1

    def stats(self) -> EngineStats:
        """Of all versions together, totals of those that have ended included; the slots are the current one's."""
        engines = [version.engine.stats() for version in (self.current, *self._ending)]
        totals = [self._ended, *engines]
        return EngineStats(
            running=sum(engine.running for engine in engines),
            waiting=sum(engine.waiting for engine in engines),
            slots=engines[0].slots,
            mixes_composed=sum(engine.mixes_composed for engine in totals),
            compose_seconds=sum(engine.compose_seconds for engine in totals),
        )

    async def reload(self) -> tuple[Package, Package]:
        """Reads the package at the configured path anew and serves it from now on. Returns the old and the new one.

        Raises ReloadError, CollisionError while another reload runs, NotSupportedHereError.
        """
        if self._load is None:
            raise NotSupportedHereError("this server was given a loaded engine and cannot reload; start it with "
                                        "`atomsteer serve`")  # fmt: skip
        if self._reloading.locked():
            raise CollisionError("a reload is in progress; wait for it to end")
        async with self._reloading:
            old = self.current
            new = await asyncio.to_thread(self._made, self._load)
            if self._closed:
                await asyncio.to_thread(new.engine.close)
                raise ReloadError("the server is shutting down")
            self.current = new
            self._ending.append(old)
            _log.info("package %s: version %s is served in place of %s", new.package.manifest.name,
                      new.package.manifest.version, old.package.manifest.version)  # fmt: skip
            task = asyncio.create_task(self._end(old))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return old.package, new.package

    def close(self) -> None:
        """Stops the engines of all versions. Idempotent; any thread may call it."""
        self._closed = True
        for version in (self.current, *self._ending):
            version.engine.close()

    def _made(self, load: Callable[[], LoadedPackage]) -> Version:
        try:
            loaded = load()
        except Exception as error:  # whatever is wrong with what lies there, the old version goes on
            raise _refusal(error) from error
        try:
            name, served = loaded.package.manifest.name, self.current.package.manifest.name
            if name != served:
                raise ReloadError(f"the package there is called {name!r} and this server serves {served!r}; start a server "
                                  "of its own for another package")  # fmt: skip
            return self._build(loaded)
        except Exception as error:
            loaded.engine.close()
            raise _refusal(error) from error

    async def _end(self, version: Version) -> None:
        while version.requests and not self._closed:
            await asyncio.sleep(_LOOK_SECONDS)
        await asyncio.to_thread(version.engine.close)
        last = version.engine.stats()
        self._ending.remove(version)
        self._ended = replace(self._ended, mixes_composed=self._ended.mixes_composed + last.mixes_composed,
                              compose_seconds=self._ended.compose_seconds + last.compose_seconds)  # fmt: skip
        _log.info("version %s has ended its last request", version.package.manifest.version)


def _refusal(error: Exception) -> ReloadError:
    if isinstance(error, ReloadError):
        return error
    if not isinstance(error, AtomsteerError):
        _log.error("a reload failed", exc_info=error)
        return ReloadError("nothing was changed: the package could not be loaded; the server's log says why")
    return ReloadError(f"nothing was changed: {error}")
