"""The versions of a package that a worker can compose mixes of, and one that is being read beside the serving.

    prepare(content hash)  a thread reads and stacks  ->  prepared(…) until it says so  ->  mixes of it are taken
    keep(content hashes)   all others are let go of

Every worker reads the package's path itself, and takes only what has the content hash that the API server has seen there.
Which version a mix belongs to its digest says. Nothing here raises, since what a worker raises ends the server.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from atoms.adapter import AtomBank
from atoms.errors import AtomsteerError
from atoms.mix import Mix, digest_in_phase
from atoms.package import Package
from server.vllm.identity import digest_of_name, phase_of_name

_log = logging.getLogger("atomsteer.vllm")
Stack = TypeVar("Stack")


@dataclass(frozen=True, eq=False)
class Resident(Generic[Stack]):
    """A version, and its atoms in the form that the worker composes them from."""

    package: Package
    atoms: Stack

    @classmethod
    def of(cls, package: Package, stack: Callable[[AtomBank], Stack]) -> Resident[Stack]:
        """Raises what a broken package raises."""
        bank = replace(package).bank  # of a copy, because a package keeps what it has read
        return cls(package, stack(bank))

    @property
    def content_hash(self) -> str:
        return self.package.manifest.content_hash

    def has(self, mix: Mix, name: str) -> bool:
        """Whether `mix`, of a LoRA request called `name`, is of this version."""
        try:
            digest = self.package.digest(mix)
        except KeyError:  # an atom that only another version has
            return False
        return digest_in_phase(digest, mix, phase_of_name(name)) == digest_of_name(name)


class Residents(Generic[Stack]):
    """The versions of the package at `path`; `stack` makes of a bank what the worker composes from, in any thread."""

    def __init__(self, path: Path, stack: Callable[[AtomBank], Stack]) -> None:
        self._path, self._stack = path, stack
        self._residents: list[Resident[Stack]] = []
        self._reading: _Reading[Stack] | None = None

    def add(self, package: Package) -> None:
        """Reads the atoms of `package` here and now. Raises what a broken package raises."""
        self._residents.append(Resident.of(package, self._stack))

    def find(self, mix: Mix, name: str) -> Resident[Stack] | None:
        """The version of the LoRA request called `name`; the newest of those whose mix is the same."""
        return next((resident for resident in reversed(self._residents) if resident.has(mix, name)), None)

    def prepare(self, content_hash: str) -> None:
        """Begins to read what lies at the path, unless that version is here. One is read at a time."""
        self._reading = None
        if not self._has(content_hash):
            self._reading = _Reading(self._path, content_hash, self._stack)

    def prepared(self, content_hash: str) -> str | None:
        """None while that version is being read, an empty text once mixes of it are taken, else why that will not be."""
        reading = self._reading
        if reading is not None and reading.content_hash == content_hash:
            if not reading.done():
                return None
            if isinstance(reading.result, str):
                return reading.result
            self._reading = None
            self._residents.append(reading.result)
        return "" if self._has(content_hash) else "another version was read meanwhile; reload again"

    def keep(self, content_hashes: Collection[str]) -> list[Resident[Stack]]:
        """Lets go of all others: those that are here, which are returned, and one that is being read."""
        if self._reading is not None and self._reading.content_hash not in content_hashes:
            self._reading = None
        others = [resident for resident in self._residents if resident.content_hash not in content_hashes]
        self._residents = [resident for resident in self._residents if resident not in others]
        return others

    def _has(self, content_hash: str) -> bool:
        return any(resident.content_hash == content_hash for resident in self._residents)


class _Reading(Generic[Stack]):
    """A version that a thread of its own reads; `result` is it, or why it cannot be had."""

    result: Resident[Stack] | str

    def __init__(self, path: Path, content_hash: str, stack: Callable[[AtomBank], Stack]) -> None:
        self.content_hash = content_hash
        self.result = "the package could not be loaded; the server's log says why"
        self._thread = threading.Thread(target=self._read, args=(path, content_hash, stack), name="atomsteer-read",
                                        daemon=True)  # fmt: skip
        try:
            self._thread.start()
        except RuntimeError:  # no more threads may be started
            _log.exception("version %s could not be loaded", content_hash)

    def done(self) -> bool:
        return not self._thread.is_alive()

    def _read(self, path: Path, content_hash: str, stack: Callable[[AtomBank], Stack]) -> None:
        try:
            package = Package.read(path)
            if package.manifest.content_hash == content_hash:
                self.result = Resident.of(package, stack)
            else:
                self.result = f"the package at {path} was replaced while it was read; reload again"
        except AtomsteerError as error:
            self.result = str(error)
        except Exception:  # memory, above all
            _log.exception("version %s could not be loaded", content_hash)
