"""The working directory of a run: one folder a stage, reused while everything the stage depends on is unchanged."""

from __future__ import annotations

import shutil
from pathlib import Path

from atoms.storage import canonical_hash, read_json, storage_errors, write_json
from offline.record import jsonable

_KEYS = "stages.json"


class Workspace:
    """Stages are opened in order; a stage's key covers its own inputs and the keys of those opened before it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with storage_errors(root):
            root.mkdir(parents=True, exist_ok=True)
        self._file = root / _KEYS
        self._keys: dict[str, str] = read_json(self._file) if self._file.exists() else {}
        self._chain = ""

    def open(self, stage: str, **inputs: object) -> Path:
        """The stage's folder: with its earlier results if they were made from the same inputs, else empty."""
        self._chain = canonical_hash([self._chain, stage, jsonable(inputs)])
        folder = self.root / stage
        if self._keys.get(stage) != self._chain:
            with storage_errors(folder):
                shutil.rmtree(folder, ignore_errors=True)
            self._keys[stage] = self._chain
            write_json(self._file, self._keys)
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder
