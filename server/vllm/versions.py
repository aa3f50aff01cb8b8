"""The versions of a package inside vLLM: one engine with θ0 in its weights, and the atoms of each version in its workers.

    read and check here  ->  every worker reads it beside its work  ->  new requests get the new version
    ->  the old one ends its requests  ->  the workers let go of it

So versions differ in their atoms alone. Another θ0 is refused: an engine has one set of weights, which every request runs
on, unsteered ones too, so all would have to end before the first of the new version began; and on CPUs vLLM packs them
into forms that its compiled graph refers to, which cannot be written again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from atoms.errors import EngineStoppedError
from atoms.package import Package
from server.errors import NotSupportedHereError, ReloadError
from server.steering import Steering
from server.versions import Versions, require_same_name

_log = logging.getLogger("atomsteer.vllm")
_LOOK_SECONDS = 0.1


@dataclass(eq=False)
class WorkerVersion:
    """A package and how requests are resolved against it. `requests` may have mixes of it in the workers; `ended` says that
    these have let go of it."""

    package: Package
    steering: Steering
    requests: int = field(default=0, init=False)
    ended: bool = field(default=False, init=False)

    @property
    def content_hash(self) -> str:
        return self.package.manifest.content_hash

    @contextmanager
    def used(self) -> Iterator[None]:
        """Keeps the version in the workers for as long as the block runs. Raises EngineStoppedError once it has ended: a
        worker that is given a mix of it then ends the server."""
        if self.ended:
            raise EngineStoppedError(f"version {self.package.manifest.version} of the package is not served any more; send "
                                     "the request again")  # fmt: skip
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1


class WorkerVersions(Versions[WorkerVersion]):
    """`read` makes a version of what lies at the package's path, in any thread; `serve` is called with each that becomes
    current. Cannot reload before `connect`."""

    def __init__(
        self, first: WorkerVersion, read: Callable[[], WorkerVersion], serve: Callable[[WorkerVersion], None]
    ) -> None:
        super().__init__(first)
        self._read, self._on_serving = read, serve
        self._engine: Any = None
        self._processes = 1
        self._preparing: WorkerVersion | None = None

    def connect(self, engine: Any, processes: int) -> None:
        """`engine` is vLLM's client of its engine, in one of `processes` API processes."""
        self._engine, self._processes = engine, processes

    async def _make(self) -> WorkerVersion:
        if self._processes > 1:
            raise NotSupportedHereError(f"this server has {self._processes} API processes, which do not learn of each other's "
                                        "reloads; start it with --api-server-count 1, or start a replica on the new version, "
                                        "move the traffic, then stop this one")  # fmt: skip
        new = await asyncio.to_thread(self._read)
        require_replaceable(self.current.package, new.package)
        self._preparing = new
        try:
            await self._call("atomsteer_prepare", new.content_hash)
            while None in (said := await self._call("atomsteer_prepared", new.content_hash)):
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            self._preparing = None
        if refused := next(filter(None, said), None):
            await self._keep_live()  # other workers may have it
            raise ReloadError(f"nothing was changed: {refused}")
        return new

    def _serve(self, version: WorkerVersion) -> None:
        super()._serve(version)
        self._on_serving(version)

    async def _end(self, version: WorkerVersion) -> None:
        version.ended = True
        await asyncio.sleep(
            _LOOK_SECONDS
        )  # by then the engine has been told of a stop string that ended the last request
        try:
            await self._keep_live()
        except Exception:  # the engine has died; then the server ends
            _log.exception("version %s could not be taken from the workers", version.package.manifest.version)

    async def _keep_live(self) -> None:
        versions = [version for version in self.live if not version.ended]
        versions += [self._preparing] if self._preparing is not None else []
        await self._call("atomsteer_keep", sorted({version.content_hash for version in versions}))

    async def _call(self, method: str, *arguments: Any) -> list[Any]:
        """What `server.vllm.worker.SteeringWorker` answers in every worker of every engine."""
        answers = await self._engine.engine_core.call_utility_all_async("collective_rpc", method, None, arguments)
        return [answer for engine in answers for answer in engine]


def require_replaceable(served: Package, found: Package) -> None:
    """Raises ReloadError unless `found` can be served by an engine that has θ0 of `served` in its weights."""
    require_same_name(served, found)
    old, new = served.manifest, found.manifest
    if new.base_model.weights != old.base_model.weights:
        raise ReloadError(f"nothing was changed: version {new.version} is for the base model {new.base_model.id!r}, of other "
                          "weights than the one that runs here; start a server of its own for it")  # fmt: skip
    if new.adapter_hash != old.adapter_hash:
        raise ReloadError(f"nothing was changed: version {new.version} has another base adapter (θ0), and vLLM has the one of "
                          f"version {old.version} in its weights; start a replica on the new version, move the traffic, then "
                          "stop this one, or discover atoms on the same base adapter (--adapter)")  # fmt: skip
    if new.conventions.composition != old.conventions.composition:
        raise ReloadError(f"nothing was changed: version {new.version} composes by {new.conventions.composition!r} and version "
                          f"{old.version} by {old.conventions.composition!r}; start a replica on the new version, move the "
                          "traffic, then stop this one")  # fmt: skip
