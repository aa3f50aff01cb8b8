"""The working directory of a run: one folder a stage, reused while everything the stage depends on is unchanged."""

from __future__ import annotations

import shutil
from pathlib import Path

from atoms.storage import canonical_hash, read_json, storage_errors, write_json
from offline.ranks import ALONE, Ranks
from offline.record import jsonable

_KEYS = "stages.json"


class Workspace:
    """Stages are opened in order; a stage's key covers its own inputs and the keys of those opened before it.

    All ranks open the same stages; the first makes and empties folders, and the others wait for it.
    """

    def __init__(self, root: Path, ranks: Ranks = ALONE) -> None:
        self.root, self.ranks = root, ranks
        with storage_errors(root):
            root.mkdir(parents=True, exist_ok=True)
        self._file = root / _KEYS
        self._keys: dict[str, str] = read_json(self._file) if self._file.exists() else {}
        self._chain = ""

    def open(self, stage: str, **inputs: object) -> Path:
        """The stage's folder: with its earlier results if they were made from the same inputs, else empty.

        Raises ConfigError if the inputs are not the same on every rank.
        """
        self._chain = canonical_hash([self._chain, stage, jsonable(inputs)])
        self.ranks.check_same(self._chain, f"the inputs of the stage {stage}")
        folder = self.root / stage
        if self.ranks.first:
            self._prepare(stage, folder)
        self.ranks.wait()
        return folder

    def _prepare(self, stage: str, folder: Path) -> None:
        if self._keys.get(stage) != self._chain:
            # The key goes first: a kill while the folder is emptied must not leave half of it with a key.
            if self._keys.pop(stage, None):
                write_json(self._file, self._keys)
            with storage_errors(folder):
                if folder.exists():
                    shutil.rmtree(folder)
            self._keys[stage] = self._chain
            write_json(self._file, self._keys)
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
