"""A change of the package's version that no request notices; the same on both servers.

    reload: make version 2 beside version 1  ->  current = version 2  ->  version 1 ends its requests  ->  it is let go

What fails before the change leaves the old version serving. What a version consists of, and what making and ending one
takes, is a server's own.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, Generic, Protocol, TypeVar

from atoms.errors import AtomsteerError
from atoms.package import Package
from server.errors import CollisionError, NotSupportedHereError, ReloadError

_log = logging.getLogger("atomsteer.server")
_LOOK_SECONDS = 0.2


class Served(Protocol):
    """A package as it is served. `requests` are in progress on it."""

    package: Package
    requests: int


V = TypeVar("V", bound=Served)


class Versions(ABC, Generic[V]):
    """The version that new requests are to be given, and those that still end theirs. Used from one event loop."""

    def __init__(self, first: V) -> None:
        self.current = first
        self._ending: list[V] = []
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def live(self) -> list[V]:
        """All that may have requests, the current one first."""
        return [self.current, *self._ending]

    async def reload(self) -> tuple[Package, Package]:
        """Reads the package at the configured path anew and serves it from now on. Returns the old and the new one.

        Raises ReloadError, CollisionError while another reload runs, NotSupportedHereError.
        """
        if self._reloading.locked():
            raise CollisionError("a reload is in progress; wait for it to end")
        async with self._reloading:
            try:
                new = await self._make()
            except Exception as error:  # whatever is wrong with what lies there, the old version goes on
                raise _refusal(error) from error
            if self._closed:
                await self._end(new)
                raise ReloadError("the server is shutting down")
            old = self.current
            self._serve(new)
            self._ending.append(old)
            _log.info("package %s: version %s is served in place of %s", new.package.manifest.name,
                      new.package.manifest.version, old.package.manifest.version)  # fmt: skip
            task = asyncio.create_task(self._end_after_requests(old))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return old.package, new.package

    @abstractmethod
    async def _make(self) -> V:
        """Reads what lies at the path, and leaves nothing behind of what it refuses. Raises any exception."""

    def _serve(self, version: V) -> None:
        """Gives `version` to new requests. Does not wait, so that none falls between two versions."""
        self.current = version

    @abstractmethod
    async def _end(self, version: V) -> None:
        """Lets go of a version without requests."""

    async def _end_after_requests(self, version: V) -> None:
        while version.requests and not self._closed:
            await asyncio.sleep(_LOOK_SECONDS)
        await self._end(version)
        self._ending.remove(version)
        _log.info("version %s has ended its last request", version.package.manifest.version)


def require_same_name(served: Package, found: Package) -> None:
    """Raises ReloadError."""
    if found.manifest.name != served.manifest.name:
        raise ReloadError(f"the package there is called {found.manifest.name!r} and this server serves "
                          f"{served.manifest.name!r}; start a server of its own for another package")  # fmt: skip


def reload_at_hangup(reload: Callable[[], Awaitable[Any]]) -> None:
    """Has SIGHUP reload, from now on. To be called in the running loop of the main thread."""
    tasks: set[asyncio.Task[None]] = set()

    async def logged() -> None:
        try:
            await reload()
        except AtomsteerError as error:
            _log.error("SIGHUP: %s", error)

    def begin() -> None:
        task = asyncio.create_task(logged())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    if hasattr(signal, "SIGHUP"):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, begin)


def _refusal(error: Exception) -> AtomsteerError:
    if isinstance(error, ReloadError | NotSupportedHereError):
        return error
    if not isinstance(error, AtomsteerError):
        _log.error("a reload failed", exc_info=error)
        return ReloadError("nothing was changed: the package could not be loaded; the server's log says why")
    return ReloadError(f"nothing was changed: {error}")
