"""Progress of long stages: a bar with rate and ETA on a terminal, a line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from offline.memory import trim

_LINE_EVERY_SECONDS = 15.0
_TRIM_EVERY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class StageCost:
    """Wall time of a stage, and the process's peak resident memory from its start to the end of the stage."""

    seconds: float
    peak_mib: int


class Task:
    """One stage's progress; `advance` as work is done."""

    def __init__(self, name: str, total: int, unit: str, done: int) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self.note = ""
        self._start, self._start_done = time.monotonic(), done
        self._trimmed = self._start

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        self.note = note or self.note
        if time.monotonic() - self._trimmed >= _TRIM_EVERY_SECONDS:  # holes between batches of many shapes add up
            trim()
            self._trimmed = time.monotonic()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    @property
    def eta(self) -> float | None:
        """Seconds left at the mean rate so far, or None before anything was done."""
        fresh = self.done - self._start_done
        return (self.total - self.done) * self.elapsed / fresh if fresh else None


class _RichTask(Task):
    def __init__(self, name: str, total: int, unit: str, done: int, bar, row) -> None:
        super().__init__(name, total, unit, done)
        self._bar, self._row = bar, row

    def advance(self, amount: int = 1, note: str = "") -> None:
        super().advance(amount, note)
        self._bar.update(self._row, completed=self.done, note=self.note)


class _LineTask(Task):
    def __init__(self, name: str, total: int, unit: str, done: int, stream: TextIO) -> None:
        super().__init__(name, total, unit, done)
        self._stream, self._last = stream, time.monotonic()

    def advance(self, amount: int = 1, note: str = "") -> None:
        super().advance(amount, note)
        now = time.monotonic()
        if now - self._last >= _LINE_EVERY_SECONDS and self.done < self.total:
            self._last = now
            eta = f", {self.eta:.0f} s left" if self.eta is not None else ""
            note = f", {self.note}" if self.note else ""
            print(f"  {self.name}: {self.done}/{self.total} {self.unit}{eta}{note}", file=self._stream, flush=True)


class Progress:
    """Reports stages to `stream` (default: standard error). `quiet` reports nothing. Keeps every stage's cost by name."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet, self.stream = quiet, stream or sys.stderr
        self.costs: dict[str, StageCost] = {}

    def say(self, text: str) -> None:
        """One line about what is going on."""
        if not self.quiet:
            print(text, file=self.stream, flush=True)

    @contextmanager
    def task(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        """A stage of `total` units, `done` of which were finished in an earlier run.

        What was freed before it and in it goes back to the system, so that it adds to no later peak.
        """
        trim()
        started = time.monotonic()
        if self.quiet:
            yield Task(name, total, unit, done)
        elif self.stream.isatty():
            yield from self._rich_task(name, total, unit, done)
        else:
            task = _LineTask(name, total, unit, done, self.stream)
            yield task
            self.say(f"  {name}: {task.done}/{total} {unit} in {time.monotonic() - started:.1f} s"
                     + (f", {task.note}" if task.note else ""))  # fmt: skip
        self.costs[name] = StageCost(round(time.monotonic() - started, 4), _peak_mib())
        trim()

    def _rich_task(self, name: str, total: int, unit: str, done: int) -> Iterator[Task]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("  {task.description:<22}"), BarColumn(28), MofNCompleteColumn(), TextColumn(unit),
            TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with RichProgress(*columns, console=Console(file=self.stream)) as bar:
            row = bar.add_task(name, total=total, completed=done, note="")
            yield _RichTask(name, total, unit, done, bar, row)


def _peak_mib() -> int:
    """ru_maxrss is in KiB on Linux, in bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)
