"""A process of vLLM's ends with its parent, however it was started. Real processes; vLLM's own are in tests/vllm."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.queues import Queue
from pathlib import Path

import pytest

from server.vllm.lifetime import follow_parent

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")


def sleep_on(pids: Queue[int]) -> None:
    pids.put(os.getpid())
    time.sleep(60)


def follow(pids: Queue[int]) -> None:
    """A child that follows, with a forked one of its own, which loads nothing."""
    follow_parent()
    multiprocessing.get_context("fork").Process(target=sleep_on, args=(pids,)).start()
    sleep_on(pids)


def start_one(method: str, pids: Queue[int]) -> None:
    multiprocessing.get_context(method).Process(target=follow, args=(pids,)).start()
    time.sleep(60)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_children_and_what_they_fork_end_with_the_process_that_started_them_and_at_no_hangup(
    method: str, wait_for
) -> None:
    spawn = multiprocessing.get_context("spawn")
    pids: Queue[int] = spawn.Queue()
    top = spawn.Process(target=start_one, args=(method, pids))
    top.start()
    followers = [pids.get(timeout=60), pids.get(timeout=60)]
    time.sleep(1)
    for pid in followers:
        os.kill(pid, signal.SIGHUP)
    time.sleep(0.5)
    assert all(map(is_alive, followers)), "a child ended while its parent lived"
    os.kill(top.pid, signal.SIGKILL)
    try:
        assert wait_for(lambda: not any(map(is_alive, followers)), 10)
    finally:
        top.join()
        for pid in filter(is_alive, followers):
            os.kill(pid, signal.SIGKILL)
