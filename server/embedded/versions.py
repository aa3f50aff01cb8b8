"""The embedded server's versions of a package: each an engine and an application of its own, so that their weights, mixes
and caches never meet. Both are in memory until the old one has ended its requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Receive, Scope, Send

from atoms.engine import EngineStats
from atoms.package import Package
from server.embedded.generation import ServedEngine
from server.errors import NotSupportedHereError
from server.versions import Versions, require_same_name

if TYPE_CHECKING:
    from server.embedded.load import LoadedPackage


@dataclass(eq=False)
class EngineVersion:
    """A package, the engine that runs it, and the application that serves it. `requests` are in progress."""

    package: Package
    engine: ServedEngine
    app: ASGIApp
    requests: int = field(default=0, init=False)


class EngineVersions(Versions[EngineVersion]):
    """An ASGI application: each request goes to the version that was current when it came.

    `build` makes a version of a loaded package and raises what its settings raise; `load` None cannot reload.
    """

    def __init__(
        self,
        first: EngineVersion,
        build: Callable[[LoadedPackage], EngineVersion],
        load: Callable[[], LoadedPackage] | None,
    ) -> None:
        super().__init__(first)
        self._ended = EngineStats(0, 0, 0)
        self._build = build
        self._load = load

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        version = self.current
        version.requests += 1
        try:
            await version.app(scope, receive, send)
        finally:
            version.requests -= 1

    def stats(self) -> EngineStats:
        """Of all versions together, totals of those that have ended included; the slots are the current one's."""
        engines = [version.engine.stats() for version in self.live]
        totals = [self._ended, *engines]
        return EngineStats(
            running=sum(engine.running for engine in engines),
            waiting=sum(engine.waiting for engine in engines),
            slots=engines[0].slots,
            mixes_composed=sum(engine.mixes_composed for engine in totals),
            compose_seconds=sum(engine.compose_seconds for engine in totals),
        )

    def close(self) -> None:
        """Stops the engines of all versions. Idempotent; any thread may call it."""
        self._closed = True
        for version in self.live:
            version.engine.close()

    async def _make(self) -> EngineVersion:
        if self._load is None:
            raise NotSupportedHereError("this server was given a loaded engine and cannot reload; start it with "
                                        "`atomsteer serve`")  # fmt: skip
        return await asyncio.to_thread(self._made, self._load)

    def _made(self, load: Callable[[], LoadedPackage]) -> EngineVersion:
        loaded = load()
        try:
            require_same_name(self.current.package, loaded.package)
            return self._build(loaded)
        except Exception:
            loaded.engine.close()
            raise

    async def _end(self, version: EngineVersion) -> None:
        await asyncio.to_thread(version.engine.close)
        last = version.engine.stats()
        self._ended = replace(self._ended, mixes_composed=self._ended.mixes_composed + last.mixes_composed,
                              compose_seconds=self._ended.compose_seconds + last.compose_seconds)  # fmt: skip
