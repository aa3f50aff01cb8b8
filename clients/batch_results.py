"""What a batch writes: one line a request, appended as answers come; and what a stopped run has left.

A line is written by one unbuffered write. What a killed run left torn is cut off; every whole line counts as done. One run
at a time has the file, from before it looks at anything in it.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from atoms.errors import ConfigError, DataError, StorageError
from atoms.storage import read_json, replaced_file, storage_errors, write_json

_SYNC_SECONDS = 1.0


class CustomIds:
    """Which custom ids have been answered and which have been read; on disk, so that memory does not grow with files."""

    def __init__(self) -> None:
        self._rows = sqlite3.connect("")  # "": a temporary file of SQLite's own, gone with the connection
        self._rows.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, answered INTEGER, read INTEGER) WITHOUT ROWID")
        self.answered = 0
        self.failed = 0

    def _execute(self, query: str, custom_id: str) -> sqlite3.Cursor:
        try:
            return self._rows.execute(query, (custom_id,))
        except sqlite3.Error as error:
            raise StorageError(
                f"the temporary file of custom ids cannot be written: {error}; free disk space in {tempfile.gettempdir()}, "
                "or set SQLITE_TMPDIR"
            ) from error

    def add_answered(self, custom_id: str, *, failed: bool = False) -> bool:
        """False if it had been answered before. One that `failed` is answered, too."""
        query = "INSERT OR IGNORE INTO ids VALUES (?, 1, 0)"
        added = self._execute(query, custom_id).rowcount == 1
        self.answered += added
        self.failed += added and failed
        return added

    def add_read(self, custom_id: str) -> bool:
        """False if the input has had it before."""
        query = "INSERT INTO ids VALUES (?, 0, 1) ON CONFLICT (id) DO UPDATE SET read = 1 WHERE read = 0"
        return self._execute(query, custom_id).rowcount == 1

    def is_answered(self, custom_id: str) -> bool:
        return self._execute("SELECT 1 FROM ids WHERE id = ? AND answered", custom_id).fetchone() is not None

    def close(self) -> None:
        self._rows.close()


class Results:
    """The output file of one run, and the ids in it. Made by `open_results`."""

    def __init__(
        self, path: Path, file: FileIO, ids: CustomIds, settings: Mapping[str, Any], *, retry_failed: bool = False
    ) -> None:
        self._path = path
        self._file = file
        self._settings = settings
        self._retry_failed = retry_failed
        self._synced = time.monotonic()
        self._failure: StorageError | None = None
        self.ids = ids

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Holds the run to further `settings`, which are known once the server is, and drops failures that are asked again.

        Raises ConfigError, StorageError.
        """
        _check_settings(self._path, {**self._settings, **settings})
        if self._retry_failed:
            self._file = _without_failures(self._path, self._file)

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line. Raises StorageError, and again after that: a line that was cut short must stay the last."""
        if self._failure is not None:
            raise self._failure
        # A lone surrogate, which UTF-8 has not, becomes \\udXXX, which is how JSON writes it.
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        try:
            written = self._file.write(data)
            while written < len(data):
                written += self._file.write(data[written:])
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            self._failure = StorageError(
                f"cannot write {os.fspath(self._file.name)}: {error.strerror or error}; the answers in it are kept: "
                "free disk space, then run the command again"
            )
            raise self._failure from error

    def sync(self) -> None:
        """Raises StorageError."""
        with storage_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


@contextmanager
def open_results(path: Path, settings: Mapping[str, Any], *, retry_failed: bool = False) -> Iterator[Results]:
    """The file `path`, to be gone on with. `settings` are what all of its lines must share; they are kept beside it.

    With `retry_failed`, lines that hold errors count as not answered. Raises ConfigError if another run writes `path` or it was
    begun with other settings or is no regular file, DataError if it holds something else than results, StorageError.
    """
    _check_file(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab", buffering=0)
    ids = CustomIds()
    results = Results(path, file, ids, settings, retry_failed=retry_failed)
    try:
        _lock(file, path)
        _check_settings(path, settings)  # not before: they may be those of a run that has just begun
        read_answered(path, ids, cut=True, but_failed=retry_failed)
        yield results
        results.sync()
    finally:
        ids.close()
        results.close()


def read_answered(path: Path, ids: CustomIds, *, cut: bool, but_failed: bool = False) -> None:
    """Notes the ids of all whole lines of `path`, `but_failed` ones; with `cut`, removes a torn last line.

    Raises DataError, ConfigError.
    """
    if not path.exists():
        return
    _check_file(path)
    end = 0
    for number, line in enumerate(_whole_lines(path), 1):
        end += len(line)
        result = _result(path, number, line)
        failed = result["error"] is not None
        if not (failed and but_failed) and not ids.add_answered(result["custom_id"], failed=failed):
            raise DataError(f"line {number} of {path} has a custom_id that an earlier one has; choose another --out")
    if cut and end < path.stat().st_size:
        with storage_errors(path):
            os.truncate(path, end)


def _check_file(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise ConfigError(
            f"--out is {path}, which is no regular file; a run is resumed from what it wrote: give a file"
        )


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _result(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(line)
        if isinstance(result["custom_id"], str) and "response" in result and "error" in result:
            return result
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(f"line {number} of {path} is not a batch result; choose another --out")


def _without_failures(path: Path, file: FileIO) -> FileIO:
    """Replaces `path` by a copy without failed lines, and opens and locks that."""
    with replaced_file(path) as kept:
        for number, line in enumerate(_whole_lines(path), 1):
            if _result(path, number, line)["error"] is None:
                kept.write(line)
    with storage_errors(path):
        fresh = path.open("ab", buffering=0)
    _lock(fresh, path)
    file.close()
    return fresh


def _lock(file: FileIO, path: Path) -> None:
    """Raises ConfigError if another run has `path`, or has put another file in its place since `file` was opened."""
    taken = ConfigError(f"another run is writing {path}; wait for it, or choose another --out")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        replaced = not os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except BlockingIOError as error:
        raise taken from error
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be locked against other runs: {error.strerror or error}; choose an --out on another file system"
        ) from error
    if replaced:
        raise taken


def _settings_in(kept: Path) -> dict[str, Any]:
    try:
        if isinstance(before := read_json(kept), dict):
            return before
        reason = "it holds no settings"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise ConfigError(
        f"{kept}, which says how the results beside it were made, cannot be read: {reason}; choose another --out"
    )


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Compares `settings` with those in ``OUT.run.json``, or writes them if nothing is answered yet."""
    kept = path.with_name(path.name + ".run.json")
    if path.exists() and path.stat().st_size:
        if not kept.exists():
            raise ConfigError(
                f"{path} exists, and {kept.name}, which says how it was made, does not; choose another --out"
            )
        before = _settings_in(kept)
        if changed := sorted(name for name in settings if before.get(name) != settings[name]):
            name = changed[0]
            raise ConfigError(
                f"{path} was begun with {name} {before.get(name)!r} and this run has {settings.get(name)!r}; go on with the "
                "same settings, or choose another --out"
            )
    else:
        write_json(kept, dict(settings))
