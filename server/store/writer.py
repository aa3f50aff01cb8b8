"""Group commit: many callers' records, few transactions, one thread.

Whatever has queued up while one transaction was being synced goes into the next, so that the cost of a sync is shared.
An *acknowledged* record is on disk when its future is done. An *unacknowledged* one is kept and tried again while the
database is away, and dropped when the queue is full: recording never holds an answer up. It may have patience, so that
it shares the transaction of what comes next instead of taking the interpreter from requests that are being read.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from server.errors import StoreOverloadedError, StoreUnavailableError

_log = logging.getLogger("atomsteer.store")
_RETRY_SECONDS = 1.0

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True, eq=False)
class _Entry(Generic[Record]):
    record: Record
    done: Future[Any] | None
    size: int = 1


class Writer(Generic[Record]):
    """`commit` makes a group of records durable in one transaction and returns a result for each, in order.

    `capacity` rows may wait; a record has as many as its `size` says. `group` rows are in one transaction, or one record.
    `dropped` is told of unacknowledged records that were taken and can never be stored.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[Record]], Sequence[Any]],
        *,
        capacity: int = 50_000,
        group: int = 1_000,
        dropped: Callable[[Record], None] = lambda _: None,
    ) -> None:
        self._commit = commit
        self._dropped = dropped
        self._capacity = capacity
        self._group = group
        self._queue: deque[_Entry[Record]] = deque()
        self._held = 0  # rows in the queue
        self._due = math.inf  # when the most impatient of them wants to be written, on the monotonic clock
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="atomsteer-writer", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows."""
        return self._held

    def submit(self, record: Record, size: int = 1) -> Future[Any]:
        """Queues a record to be acknowledged: the future ends with its result once it is durable.

        It ends with StoreUnavailableError if the database is away; nothing was stored then. Raises
        StoreOverloadedError if the queue is full.
        """
        done: Future[Any] = Future()
        if not self._enqueue(_Entry(record, done, size)):
            raise StoreOverloadedError(f"{self._held} records wait to be written; send this again in a moment")
        return done

    def offer(self, record: Record, patience: float = 0.0) -> bool:
        """Queues a record without acknowledgement, to be written in at most `patience` seconds. False if the queue is full
        and it was dropped."""
        return self._enqueue(_Entry(record, None), patience)

    def close(self, timeout: float = 10.0) -> int:
        """Writes what is queued and stops, after `timeout` seconds at most. Returns how many records were left."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        with self._changed:
            left = list(self._queue)
            self._queue.clear()
            self._held = 0
        for entry in left:
            _fail(entry, StoreUnavailableError("the server stopped before this was stored"))
        if left:
            _log.error("%d records were not stored before the server stopped", len(left))
        return len(left)

    def _enqueue(self, entry: _Entry[Record], patience: float = 0.0) -> bool:
        due = time.monotonic() + patience
        with self._changed:
            if self._closing or self._held + entry.size > self._capacity:
                return False
            self._queue.append(entry)
            self._held += entry.size
            if due < self._due or self._held >= self._group:
                self._due = min(due, self._due)
                self._changed.notify()
            return True

    def _run(self) -> None:
        while group := self._next_group():
            if not self._write(group) and self._pause():
                return  # closing, and the database is away

    def _next_group(self) -> list[_Entry[Record]]:
        """The oldest records, at most `group` rows; none when the writer is closing and the queue is empty."""
        group: list[_Entry[Record]] = []
        size = 0
        with self._changed:
            while not self._closing and self._held < self._group and (wait := self._due - time.monotonic()) > 0:
                self._changed.wait(None if math.isinf(wait) else wait)
            while self._queue and (not group or size + self._queue[0].size <= self._group):
                group.append(self._queue.popleft())
                size += group[-1].size
            self._held -= size
            self._due = time.monotonic() if self._queue else math.inf
        return group

    def _write(self, group: list[_Entry[Record]]) -> bool:
        """Whether to go on at once: while the database is away there is a pause between tries."""
        try:
            self._store(group)
        except StoreUnavailableError as error:
            return self._put_back(group, error)
        except Exception as error:
            if len(group) > 1:
                return self._write_singly(group)
            self._give_up(group[0], error)
        return True

    def _write_singly(self, group: list[_Entry[Record]]) -> bool:
        """A record that cannot be stored must not take its neighbours along."""
        for place, entry in enumerate(group):
            try:
                self._store([entry])
            except StoreUnavailableError as error:
                return self._put_back(group[place:], error)
            except Exception as error:
                self._give_up(entry, error)
        return True

    def _store(self, group: list[_Entry[Record]]) -> None:
        """Raises what `commit` raises."""
        results = self._commit([entry.record for entry in group])
        for entry, result in zip(group, results, strict=True):
            if entry.done is not None and entry.done.set_running_or_notify_cancel():
                entry.done.set_result(result)

    def _put_back(self, group: list[_Entry[Record]], error: StoreUnavailableError) -> bool:
        """The database is away: acknowledged records fail, and the others are kept in their order. Those that were queued
        meanwhile fail as well: behind what is kept they would not be tried before the database is back."""
        with self._changed:
            waiting = [*group, *self._queue]
            self._queue = deque(entry for entry in waiting if entry.done is None)
            self._held = sum(entry.size for entry in self._queue)
            self._due = time.monotonic()
            is_empty = not self._queue
        for entry in waiting:
            _fail(entry, error)
        return is_empty

    def _give_up(self, entry: _Entry[Record], error: Exception) -> None:
        _log.error("a record could not be stored", exc_info=error)
        _fail(entry, error)
        if entry.done is None:
            self._dropped(entry.record)

    def _pause(self) -> bool:
        """Waits before another try; True at once if the writer is closing."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closing, _RETRY_SECONDS)


def _fail(entry: _Entry[Any], error: Exception) -> None:
    if entry.done is not None and entry.done.set_running_or_notify_cancel():
        entry.done.set_exception(error)
