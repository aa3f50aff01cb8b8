"""A change of version as an API process of vLLM makes it. In the engine's place stand workers that hold real versions."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atoms.adapter import AtomBank
from atoms.errors import EngineStoppedError, PackageCorruptError
from atoms.manifest import BaseModelRef, Conventions
from atoms.mix import Mix
from atoms.package import Package
from server.config import ServeConfig
from server.errors import CollisionError, NotSupportedHereError, ReloadError
from server.steering import Steering
from server.vllm.residents import Residents
from server.vllm.versions import WorkerVersion, WorkerVersions, require_replaceable


class Engines:
    """Two engines of two workers each, all of which read `path`."""

    def __init__(self, package: Package, path: Path) -> None:
        self.workers = [Residents(path, self._stack) for _ in range(4)]
        self.breaks = False
        for worker in self.workers:
            worker.add(package)

    @property
    def engine_core(self) -> Engines:
        return self

    async def call_utility_all_async(self, utility: str, method: str, timeout: None, arguments: Any) -> list[list[Any]]:
        assert utility == "collective_rpc" and timeout is None
        await asyncio.sleep(0)
        name = method.removeprefix("atomsteer_")
        answers = [getattr(worker, name)(*arguments) for worker in self.workers]
        return [answers[:2], answers[2:]]

    def held(self) -> list[set[str]]:
        """The versions in each worker."""
        return [{resident.package.manifest.version for resident in worker._residents} for worker in self.workers]

    def _stack(self, bank: AtomBank) -> AtomBank:
        if self.breaks:
            self.breaks = False  # the others go on
            raise MemoryError
        return bank


@pytest.fixture
def path(package: Package, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package.path, tmp_path / "served"))


@pytest.fixture
def engines(package: Package, path: Path) -> Engines:
    return Engines(package, path)


@pytest.fixture
def shown() -> list[str]:
    return []


@pytest.fixture
def versions(package: Package, path: Path, engines: Engines, config: ServeConfig, shown: list[str]) -> WorkerVersions:
    def version(package: Package) -> WorkerVersion:
        return WorkerVersion(package, Steering.of(package, config))

    made = WorkerVersions(version(package), lambda: version(Package.read(path)),
                          lambda version: shown.append(version.package.manifest.version))  # fmt: skip
    made.connect(engines, 1)
    return made


@pytest.fixture
def put(path: Path) -> Callable[[Package], None]:
    def make(package: Package) -> None:
        shutil.rmtree(path)
        shutil.copytree(package.path, path)

    return make


@contextmanager
def in_use(version: WorkerVersion) -> Iterator[None]:
    with version.used():
        yield


async def test_a_version_stays_in_all_workers_until_its_last_request_has_ended(
    versions: WorkerVersions, engines: Engines, put, negated, shown: list[str], until
) -> None:
    first, second = versions.current, negated("2")
    put(second)
    with first.used(), first.used():
        old, new = await versions.reload()
        assert (old.manifest.version, new.manifest.version) == ("1.0", "2")
        assert shown == ["2"] and versions.current.package.manifest == second.manifest
        await asyncio.sleep(0.5)
        assert engines.held() == [{"1.0", "2"}] * 4 and not first.ended
    await until(lambda: engines.held() == [{"2"}] * 4)
    assert first.ended and versions.live == [versions.current]
    with pytest.raises(EngineStoppedError, match=r"version 1\.0"), in_use(first):
        pass


async def test_the_same_package_again_changes_nothing(versions: WorkerVersions, engines: Engines, shown, until) -> None:
    first = versions.current
    with first.used():
        old, new = await versions.reload()
        assert old.manifest == new.manifest and shown == ["1.0"] and versions.current is not first
    await until(lambda: first.ended)
    assert engines.held() == [{"1.0"}] * 4, "what the new one shares with the old one was let go of"


async def test_another_alias_needs_nothing_of_the_workers(
    versions: WorkerVersions, engines: Engines, path: Path, package: Package
) -> None:
    atom = package.manifest.atoms[2].id
    Package.read(path).relabel(atom, "rows")
    for worker in engines.workers:
        worker._path = path / "nowhere"
    old, new = await versions.reload()
    assert old.manifest != new.manifest
    resolved = versions.current.steering.resolve({"atoms": {"rows": 1.0}})
    assert resolved.digest == package.digest(package.mix({atom: 1.0}))


async def test_back_to_a_version_that_still_has_requests(
    versions: WorkerVersions, engines: Engines, put, negated, until
) -> None:
    first, original = versions.current, versions.current.package
    put(negated("2"))
    with first.used():
        await versions.reload()
        put(original)
        await versions.reload()
        await until(lambda: engines.held() == [{"1.0"}] * 4)
    await until(lambda: first.ended)
    assert engines.held() == [{"1.0"}] * 4 and not versions.current.ended


async def test_many_reloads_leave_one_version(versions: WorkerVersions, engines: Engines, put, negated, until) -> None:
    for number in range(2, 14):
        put(negated(str(number)))
        await versions.reload()
    await until(lambda: versions.live == [versions.current])
    assert engines.held() == [{"13"}] * 4


async def test_a_worker_that_fails_leaves_the_old_version_in_all(
    versions: WorkerVersions, engines: Engines, put, negated, shown: list[str], monkeypatch
) -> None:
    """The others still read when it has said so."""
    first = versions.current
    put(negated("2"))
    engines.breaks = True
    prepared, polls = engines.workers[-1].prepared, iter([None, None])
    monkeypatch.setattr(engines.workers[-1], "prepared", lambda found: next(polls, prepared(found)))
    with pytest.raises(ReloadError, match="nothing was changed: .* log says why"):
        await versions.reload()
    assert engines.held() == [{"1.0"}] * 4 and versions.current is first and not first.ended and shown == []
    await versions.reload()
    assert versions.current.package.manifest.version == "2"


async def test_a_worker_that_finds_another_package_leaves_the_old_version_in_all(
    versions: WorkerVersions, engines: Engines, put, negated, tmp_path: Path, package: Package
) -> None:
    elsewhere = Path(shutil.copytree(package.path, tmp_path / "elsewhere"))
    engines.workers[2] = Residents(elsewhere, lambda bank: bank)
    engines.workers[2].add(package)
    put(negated("2"))
    with pytest.raises(ReloadError, match="replaced while it was read"):
        await versions.reload()
    assert engines.held() == [{"1.0"}] * 4


async def test_a_broken_package_is_refused_before_the_workers_hear_of_it(
    versions: WorkerVersions, engines: Engines, path: Path, config: ServeConfig
) -> None:
    (path / "drift.safetensors").write_bytes(b"")
    engines.workers = []
    with pytest.raises(ReloadError, match=r"nothing was changed: .*drift\.safetensors") as refused:
        await versions.reload()
    assert isinstance(refused.value.__cause__, PackageCorruptError)


async def test_an_old_version_that_ends_meanwhile_does_not_take_the_one_being_read(
    versions: WorkerVersions, engines: Engines, put, negated, monkeypatch, until
) -> None:
    first = versions.current
    put(negated("2"))
    with first.used():
        await versions.reload()
        put(negated("3"))
        waiting = asyncio.Event()
        prepared = engines.workers[0].prepared
        monkeypatch.setattr(engines.workers[0], "prepared", lambda found: prepared(found) if waiting.is_set() else None)
        reload = asyncio.create_task(versions.reload())
        await until(lambda: versions._preparing is not None)
        await asyncio.sleep(0.3)
    await until(lambda: first.ended)
    waiting.set()
    await reload
    await until(lambda: engines.held() == [{"3"}] * 4)


async def test_one_reload_at_a_time(versions: WorkerVersions, put, negated) -> None:
    put(negated("2"))
    first, second = await asyncio.gather(versions.reload(), versions.reload(), return_exceptions=True)
    assert isinstance(first, tuple) and isinstance(second, CollisionError)


async def test_several_api_processes_refuse_with_the_remedy(versions: WorkerVersions, engines: Engines) -> None:
    versions.connect(engines, 2)
    with pytest.raises(NotSupportedHereError, match="--api-server-count 1"):
        await versions.reload()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "other"}, "is called 'other'"),
        ({"adapter_hash": "2" * 64}, "another base adapter"),
        ({"base_model": BaseModelRef(id="toy/base", config_hash="0" * 64, weights="2" * 64)}, "other weights"),
        ({"conventions": Conventions(unprojection_exponent=0.5, composition="linear")}, "composes by 'linear'"),
    ],
)
def test_what_an_engine_cannot_change_is_refused(package: Package, changes: dict, said: str) -> None:
    found = SimpleNamespace(manifest=package.manifest.model_copy(update={"version": "2"} | changes))
    with pytest.raises(ReloadError, match=said):
        require_replaceable(package, found)  # type: ignore[arg-type]


def test_versions_are_told_apart_by_the_digest_of_every_mix(package: Package, negated) -> None:
    """The digest names the LoRA request and so keys the prefix cache: no two versions may share one whose weights differ."""
    second = negated("2")
    unchanged = Package(package.path, package.manifest.model_copy(update={"version": "1.1"}))
    for card in package.manifest.atoms:
        mix = Mix.of({card.id: 0.5})
        assert len({found.digest(mix) for found in (package, second, unchanged)}) == 3
