"""Group commit: order, acknowledgement, outages, a full queue, a poisonous record, the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest

from server.errors import StoreOverloadedError, StoreUnavailableError
from server.store import writer as writer_module
from server.store.writer import Writer


class Disk:
    """Collects groups; `away` makes it fail, `gate` makes it wait."""

    def __init__(self) -> None:
        self.groups: list[list[object]] = []
        self.goes_away_after: object = None
        self.away, self.failures = False, 0
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def commit(self, records: Sequence[object]) -> list[object]:
        self.entered.set()
        assert self.gate.wait(5)
        if self.away:
            self.failures += 1
            raise StoreUnavailableError("away")
        if "poison" in records:
            raise ValueError("poison")
        self.groups.append(list(records))
        self.away = self.goes_away_after in records
        return [f"{record}!" for record in records]

    @property
    def stored(self) -> list[object]:
        return [record for group in self.groups for record in group]


@pytest.fixture
def disk() -> Disk:
    return Disk()


def test_large_records_fill_the_queue_and_a_transaction_by_their_size(disk: Disk) -> None:
    writer = Writer(disk.commit, capacity=10, group=5)
    disk.gate.clear()
    writer.submit("first")
    assert disk.entered.wait(5)
    accepted = [writer.submit("large", 4), writer.submit("larger", 6)]
    assert writer.waiting == 10 and not writer.offer("one too many")
    with pytest.raises(StoreOverloadedError, match="10 records"):
        writer.submit("one too many")
    disk.gate.set()
    assert [future.result(5) for future in accepted] == ["large!", "larger!"]
    assert writer.submit("small").result(5) == "small!" and writer.waiting == 0
    assert disk.groups == [["first"], ["large"], ["larger"], ["small"]]
    writer.close()


def test_records_that_come_during_a_commit_share_the_next(disk: Disk) -> None:
    writer = Writer(disk.commit)
    disk.gate.clear()
    first = writer.submit("a")
    assert disk.entered.wait(5)
    others = [writer.submit(n) for n in range(50)]
    disk.gate.set()
    assert first.result(5) == "a!"
    assert [future.result(5) for future in others] == [f"{n}!" for n in range(50)]
    assert disk.groups == [["a"], list(range(50))]
    assert writer.close() == 0


def test_patient_records_wait_for_what_comes_next(disk: Disk) -> None:
    """One that is in a hurry takes all with it, in their order; so do a full group, the end of patience, and the end."""
    writer = Writer(disk.commit, group=3)
    assert writer.offer("a", patience=60) and writer.offer("b", patience=60)
    assert not disk.entered.wait(0.05), "nothing is in a hurry"
    assert writer.submit("now").result(5) == "now!"
    assert disk.groups == [["a", "b", "now"]] and writer.waiting == 0
    disk.entered.clear()
    for name in "cde":
        writer.offer(name, patience=60)
    assert disk.entered.wait(5), "a group is full"
    disk.entered.clear()
    writer.offer("f", patience=60)
    writer.offer("g", patience=0.01)
    assert disk.entered.wait(5), "patience has an end"
    writer.offer("h", patience=60)
    assert writer.close() == 0
    assert disk.stored == [*"ab", "now", *"cdefgh"]


def test_patience_does_not_outlast_an_outage(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., bool]
) -> None:
    monkeypatch.setattr(writer_module, "_RETRY_SECONDS", 0.01)
    writer = Writer(disk.commit)
    disk.away = True
    writer.offer("a", patience=0.01)
    assert wait_for(lambda: disk.failures)
    disk.away = False
    assert wait_for(lambda: disk.stored == ["a"]), "what was kept is tried again"
    assert writer.close() == 0 and disk.stored == ["a"]


def test_a_group_is_bounded(disk: Disk) -> None:
    writer = Writer(disk.commit, group=10)
    disk.gate.clear()
    futures = [writer.submit(n) for n in range(35)]
    disk.gate.set()
    assert futures[-1].result(5) == "34!"
    writer.close()
    assert disk.stored == list(range(35))
    assert max(len(group) for group in disk.groups) == 10


def test_an_outage_fails_what_is_acknowledged_and_keeps_the_rest(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_RETRY_SECONDS", 0.01)
    writer = Writer(disk.commit)
    disk.away = True
    assert writer.offer("kept 1")
    refused = writer.submit("refused")
    assert writer.offer("kept 2")
    with pytest.raises(StoreUnavailableError):
        refused.result(5)
    disk.away = False
    assert writer.submit("later").result(5) == "later!"
    writer.close()
    assert disk.stored == ["kept 1", "kept 2", "later"]


def test_an_outage_fails_what_waits_behind_more_than_a_transaction(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., bool]
) -> None:
    """Every try takes the oldest records, which an outage keeps in front."""
    monkeypatch.setattr(writer_module, "_RETRY_SECONDS", 0.01)
    writer = Writer(disk.commit, group=2)
    disk.away = True
    for n in range(5):
        writer.offer(n)
    assert wait_for(lambda: disk.failures)
    refused = writer.submit("refused", 3)
    with pytest.raises(StoreUnavailableError):
        refused.result(5)
    assert writer.offer(5) and wait_for(lambda: writer.waiting == 6)
    disk.away = False
    assert wait_for(lambda: not writer.waiting)
    writer.close()
    assert disk.stored == [*range(6)]


def test_an_outage_after_a_record_that_cannot_be_stored_keeps_the_order(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, wait_for: Callable[..., bool]
) -> None:
    monkeypatch.setattr(writer_module, "_RETRY_SECONDS", 0.01)
    dropped: list[object] = []
    writer = Writer(disk.commit, dropped=dropped.append)
    disk.gate.clear()
    writer.offer("taken")
    assert disk.entered.wait(5)
    for record in ("poison", "a", "b", "c", "d"):
        writer.offer(record)
    disk.goes_away_after = "a"
    disk.gate.set()
    assert wait_for(lambda: disk.failures)
    disk.away, disk.goes_away_after = False, None
    assert wait_for(lambda: len(disk.stored) == 5)
    writer.close()
    assert disk.stored == ["taken", *"abcd"] and dropped == ["poison"]


def test_a_full_queue_drops_and_says_so(disk: Disk) -> None:
    writer = Writer(disk.commit, capacity=3)
    disk.gate.clear()
    writer.offer("taken")
    assert disk.entered.wait(5)
    assert [writer.offer(n) for n in range(4)] == [True, True, True, False]
    with pytest.raises(StoreOverloadedError):
        writer.submit("x")
    assert writer.waiting == 3
    disk.gate.set()
    writer.close()
    assert disk.stored == ["taken", 0, 1, 2]


def test_a_record_that_cannot_be_stored_takes_no_other_along(disk: Disk) -> None:
    writer = Writer(disk.commit)
    disk.gate.clear()
    writer.offer("taken")
    assert disk.entered.wait(5)
    good, bad, other = writer.submit("good"), writer.submit("poison"), writer.submit("other")
    disk.gate.set()
    assert (good.result(5), other.result(5)) == ("good!", "other!")
    with pytest.raises(ValueError, match="poison"):
        bad.result(5)
    writer.close()


def test_closing_writes_what_waits_and_refuses_more(disk: Disk) -> None:
    writer = Writer(disk.commit)
    disk.gate.clear()
    for n in range(5):
        writer.offer(n)
    threading.Timer(0.05, disk.gate.set).start()
    assert writer.close() == 0
    assert disk.stored == list(range(5))
    assert writer.offer("late") is False


def test_closing_during_an_outage_ends_and_counts_what_is_left(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_RETRY_SECONDS", 60.0)
    disk.away = True
    writer = Writer(disk.commit)
    writer.offer("lost")
    assert disk.entered.wait(5)
    assert writer.close(5) == 1


def test_a_caller_that_gave_up_disturbs_nobody(disk: Disk) -> None:
    writer = Writer(disk.commit)
    disk.gate.clear()
    writer.offer("taken")
    assert disk.entered.wait(5)
    gone, there = writer.submit("gone"), writer.submit("there")
    gone.cancel()
    disk.gate.set()
    assert there.result(5) == "there!"
    writer.close()
