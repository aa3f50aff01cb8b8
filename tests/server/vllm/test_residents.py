"""The versions that a worker holds, on real packages and without vLLM."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from atoms.adapter import AtomBank
from atoms.errors import PackageCorruptError
from atoms.package import Package
from server.vllm.residents import Residents


def stack(bank: AtomBank) -> AtomBank:
    return bank


@pytest.fixture
def path(package: Package, tmp_path: Path) -> Path:
    """Where the package of a server lies."""
    return Path(shutil.copytree(package.path, tmp_path / "served"))


@pytest.fixture
def residents(package: Package, path: Path) -> Residents[AtomBank]:
    made = Residents(path, stack)
    made.add(package)
    return made


def put(package: Package, path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(package.path, path)


def finished(residents: Residents[AtomBank], version: Package, wait_for) -> str | None:
    """What is said of a version once it has been read."""
    said: list[str | None] = []
    assert wait_for(lambda: said.append(residents.prepared(version.manifest.content_hash)) or said[-1] is not None)
    return said[-1]


def test_a_version_is_taken_beside_the_first_and_let_go_of(
    residents: Residents[AtomBank], path: Path, package: Package, negated: Callable[..., Package], wait_for
) -> None:
    second = negated("2")
    mix = package.mix({"list": 1.5})
    old, new = package.digest(mix), second.digest(mix)
    assert old != new and residents.find(mix, new) is None
    put(second, path)
    residents.prepare(second.manifest.content_hash)
    assert finished(residents, second, wait_for) == ""
    for digest, version, sign in ((old, package, 1), (new, second, -1), (f"{new}-decode", second, -1)):
        found = residents.find(mix, digest)
        assert found is not None and found.package.manifest.version == version.manifest.version
        key = next(iter(package.bank.a))
        assert (found.atoms.a[key] == sign * package.bank.a[key]).all()
    (gone,) = residents.keep([second.manifest.content_hash])
    assert gone.package is package
    assert residents.find(mix, old) is None and residents.find(mix, new) is not None


def test_a_version_that_is_here_is_not_read_again(residents: Residents[AtomBank], path: Path, package: Package) -> None:
    shutil.rmtree(path)
    residents.prepare(package.manifest.content_hash)
    assert (
        residents.prepared(package.manifest.content_hash) == ""
        and residents.keep([package.manifest.content_hash]) == []
    )


def test_atoms_that_only_one_version_has(
    residents: Residents[AtomBank], path: Path, package: Package, negated: Callable[..., Package], wait_for
) -> None:
    fewer = negated("2", keep=2)
    put(fewer, path)
    residents.prepare(fewer.manifest.content_hash)
    assert finished(residents, fewer, wait_for) == ""
    mix = package.mix({package.manifest.atoms[2].id: 1.0})
    found = residents.find(mix, package.digest(mix))
    assert found is not None and found.package is package


def test_what_cannot_be_had_is_said_and_leaves_nothing(
    residents: Residents[AtomBank], path: Path, package: Package, negated: Callable[..., Package], wait_for, monkeypatch
) -> None:
    second = negated("2")
    put(second, path)

    def refusal(version: Package) -> str | None:
        residents.prepare(version.manifest.content_hash)
        return finished(residents, version, wait_for)

    assert "was replaced while it was read" in str(refusal(negated("3")))
    (path / "drift.safetensors").write_bytes(b"")
    assert "drift.safetensors" in str(refusal(second))
    with pytest.raises(PackageCorruptError):
        Package.read(path)
    put(second, path)

    def fail(_bank: AtomBank) -> AtomBank:
        raise MemoryError

    monkeypatch.setattr(residents, "_stack", fail)
    assert "log says why" in str(refusal(second))
    assert residents.keep([package.manifest.content_hash]) == [], "a version that was refused is here"


def test_what_is_being_read_can_be_given_up(
    residents: Residents[AtomBank], path: Path, package: Package, negated: Callable[..., Package]
) -> None:
    second = negated("2")
    put(second, path)
    residents.prepare(second.manifest.content_hash)
    residents.keep([package.manifest.content_hash])
    assert "reload again" in str(residents.prepared(second.manifest.content_hash))
    mix = second.mix({"list": 1.0})
    assert residents.find(mix, second.digest(mix)) is None


def test_without_a_thread_to_read_it_a_version_is_refused(
    residents: Residents[AtomBank], path: Path, negated: Callable[..., Package], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    second = negated("2")
    put(second, path)
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", start)
        residents.prepare(second.manifest.content_hash)
        said = residents.prepared(second.manifest.content_hash)
    assert said is not None and "log says why" in said
