"""How vLLM's processes end that are killed or stopped at the wrong moment: promptly, together, and with an error for whoever
waits. Every test starts a server of its own, uncompiled where compiling is not what is interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

EAGER = "--enforce-eager"
ENDS_WITHIN = 90  # seconds; vLLM gives a worker 5 to end by itself


@pytest.fixture
def server_command(command, tmp_path: Path) -> Callable[..., list[str]]:
    """`server_command(*options)`: with options of vLLM's."""
    return lambda *options: command(
        "--database", f"sqlite:///{tmp_path}/state.db", "--shutdown-timeout", "8", "--", *options
    )


def named(pids: list[int], title: str) -> list[int]:
    return [pid for pid in pids if title in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")]


def assert_all_ends(process: subprocess.Popen[bytes], members, wait_for, log: Path) -> None:
    """The server's process and every other of its session."""
    begun = time.monotonic()
    assert wait_for(lambda: process.poll() is not None, ENDS_WITHIN), f"the server goes on:\n{log.read_text()[-3000:]}"
    assert wait_for(lambda: not members(process.pid), 5), f"left behind: {members(process.pid)}"
    print(f"all ended within {time.monotonic() - begun:.1f} s")


@pytest.mark.parametrize(
    ("stop", "whom", "during", "options"),
    [
        (signal.SIGTERM, "group", "Starting to load model", [EAGER]),
        (signal.SIGTERM, "server", "Starting to load model", [EAGER]),
        (signal.SIGINT, "server", "Starting to load model", [EAGER]),
        (signal.SIGTERM, "server", "Warming up model for the compilation", []),
        (signal.SIGINT, "group", "Starting to load model", [EAGER, "--api-server-count=2"]),
    ],
    ids=["term-group", "term", "int", "term-compiling", "int-group-of-two"],
)
def test_a_start_is_ended_by_a_signal(launch, server_command, members, wait_for, stop, whom, during, options) -> None:
    with launch(server_command(*options), "starting") as running:
        assert wait_for(lambda: re.search(during, running.log.read_text(errors="replace")), 300), (
            running.log.read_text()
        )
        assert running.process.poll() is None
        (os.killpg if whom == "group" else os.kill)(running.process.pid, stop)
        assert_all_ends(running.process, members, wait_for, running.log)
        # vLLM's launcher of several servers ends with 0 when it is told to end
        is_launcher = "--api-server-count=2" in options
        assert running.process.returncode != 0 or is_launcher, "the server has not served, and says that all was well"


@pytest.mark.parametrize(
    ("title", "options"),
    [
        ("VLLM::EngineCore", []),
        ("VLLM::Worker", []),
        ("vllm.entrypoints", []),
        ("VLLM::APIServer_0", ["--api-server-count=2"]),
        ("VLLM::EngineCore", ["--api-server-count=2"]),
        ("vllm.entrypoints", ["--api-server-count=2"]),
    ],
    ids=["engine", "worker", "server", "server-of-two", "engine-of-two", "launcher"],
)
def test_kill_9_under_load_gives_errors_and_ends_everything(
    start, server_command, real_package, members, wait_for, title, options
) -> None:
    with start(server_command(EAGER, *options), real_package.manifest.name) as running:
        asking = [Asking(running, real_package.manifest.atoms[0].id, is_stream=number % 2 == 0) for number in range(8)]
        assert wait_for(lambda: all(one.begun.is_set() for one in asking if one.is_stream), 120)
        (victim, *_) = named(members(running.process.pid), title)
        os.kill(victim, signal.SIGKILL)
        assert_all_ends(running.process, members, wait_for, running.log)
        assert running.process.returncode != 0, "whoever restarts servers that failed would not restart this one"
        for one in asking:
            one.join(10)
        assert [one.outcome for one in asking if not one.outcome.startswith(("error", "broken"))] == []
        print(sorted({one.outcome for one in asking}))


class Asking(threading.Thread):
    """A client that wants more tokens than it will get. `outcome` begins with "error" for an answer that says what happened,
    with "broken" for a connection that broke; a stream that simply ends is "ended"."""

    def __init__(self, running, atom: str, *, is_stream: bool) -> None:
        super().__init__(daemon=True)
        self.begun, self.is_stream, self.outcome = threading.Event(), is_stream, "hangs"
        self._url = f"{running.v1}/completions"
        self._body = {"model": running.name, "prompt": "Once upon a time", "max_tokens": 480, "ignore_eos": True,
                      "stream": is_stream, "steering": {"atoms": {atom: 1.0}}}  # fmt: skip
        self.start()

    def run(self) -> None:
        lines: list[str] = []
        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=120) as response:
                for line in filter(None, response.iter_lines()):
                    lines.append(line)
                    self.begun.set()
        except httpx.TransportError as error:
            self.outcome = f"broken {type(error).__name__}"
        else:
            failed = response.status_code >= 500 or any(line.startswith('data: {"error"') for line in lines)
            self.outcome = f"{'error' if failed else 'ended'} {response.status_code} {lines[-2:]}"
