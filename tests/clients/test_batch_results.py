"""The output file of a batch: whose it is while a run lasts, and what a write that fails leaves in it."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
from pathlib import Path

import pytest

from atoms.errors import ConfigError, StorageError
from clients import batch_results
from clients.batch_results import CustomIds, Results, open_results


def result(custom_id: str, error: dict | None = None) -> dict:
    return {"id": "x", "custom_id": custom_id, "response": None, "error": error}


def test_a_second_run_does_not_touch_the_settings_of_the_first(tmp_path: Path) -> None:
    """The first may load its model for minutes before it writes a line."""
    out = tmp_path / "out.jsonl"
    with open_results(out, {"seed": 1}):
        with pytest.raises(ConfigError, match="another run is writing"), open_results(out, {"seed": 2}):
            pass
        assert json.loads((tmp_path / "out.jsonl.run.json").read_text()) == {"seed": 1}


def test_a_file_that_was_replaced_while_it_was_opened_is_another_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--retry-failed` puts a new file in the place of the old one, whose lock says nothing any more."""
    out = tmp_path / "out.jsonl"

    def lock(file: io.FileIO, how: int) -> None:
        os.replace(out, tmp_path / "old")
        out.touch()

    monkeypatch.setattr(fcntl, "flock", lock)
    with pytest.raises(ConfigError, match="another run is writing"), open_results(out, {}):
        pass


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lock(file: io.FileIO, how: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(batch_results.fcntl, "flock", lock)
    with pytest.raises(ConfigError, match=r"out\.jsonl cannot be locked.*another file system"):
        with open_results(tmp_path / "out.jsonl", {}):
            pass


class NearlyFull(io.FileIO):
    """Takes ten bytes, refuses the next ones, and has room again after that."""

    writes = 0

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.writes += 1
        if self.writes == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data[:10])


def test_nothing_is_written_behind_a_line_that_was_cut_short(tmp_path: Path) -> None:
    """Other workers have answers too, and a whole line behind a torn one would be lost with it."""
    out = tmp_path / "out.jsonl"
    ids = CustomIds()
    with NearlyFull(out, "ab") as file:
        results = Results(out, file, ids, {})
        for custom_id in ("a", "b"):
            with pytest.raises(StorageError, match="free disk space"):
                results.write(result(custom_id))
    ids.close()
    assert out.stat().st_size == 10
