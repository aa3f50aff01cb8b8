"""Starting and stopping: the port, signals, requests in progress. The server runs in a process of its own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from atoms.errors import ConfigError
from atoms.package import Package
from server.config import ServeConfig
from server.embedded.scripted import ScriptedEngine
from server.embedded.serve import reserve_port, serve

PROGRAM = """
import sys
from pathlib import Path
from atoms.package import Package
from server.config import ServeConfig
from server.context import Traffic
from server.embedded.app import create_app
from server.embedded.scripted import ScriptedEngine
from server.embedded.scripted import ScriptedEngine
from server.embedded.serve import draining_server, reserve_port

path = Path(sys.argv[1])
engine, traffic = ScriptedEngine(script=" ".join(["word"] * 40), delay=0.15), Traffic()
app = create_app(Package.read(path), engine, ServeConfig(package=path), traffic=traffic)
listener = reserve_port("127.0.0.1", 0)
server = draining_server(app, engine, traffic, 20, f"ready on http://127.0.0.1:{listener.getsockname()[1]}")
server.run(sockets=[listener])
print("stopped", flush=True)
"""
CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hello"}], "stream": True}


@pytest.fixture
def config(config: ServeConfig, request: pytest.FixtureRequest) -> ServeConfig:
    """With the shutdown timeout of the test's parameter."""
    return replace(config, shutdown_timeout=getattr(request, "param", 30.0))


class Reader(threading.Thread):
    """Reads one stream to its end."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self.begun = threading.Event()
        self.text = ""

    def run(self) -> None:
        with httpx.stream("POST", f"{self._url}/v1/chat/completions", json=CHAT, timeout=30) as response:
            for part in response.iter_text():
                self.text += part
                self.begun.set()


def test_sigterm_lets_requests_finish_and_exits_with_0(package: Package) -> None:
    command = [sys.executable, "-c", PROGRAM, str(package.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().removeprefix("ready on ").strip()
            reader = Reader(url)
            reader.start()
            assert reader.begun.wait(10)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            assert httpx.get(f"{url}/ready").status_code == 503, "a router must see that the server is about to go"
            assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 503
            assert process.wait(15) == 0
            assert process.stdout.read() == "stopped\n"
        finally:
            process.kill()
    reader.join(5)
    assert reader.text.count('"content":"') == 41
    assert reader.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(("config", "signals"), [(0.2, 1), (30.0, 2)], indirect=["config"])
def test_what_outlasts_the_timeout_or_a_second_signal_ends_with_an_error(
    server: Any, engine: ScriptedEngine, signals: int
) -> None:
    engine.script, engine.delay = " ".join(["word"] * 1000), 0.02
    reader = Reader(server.url)
    reader.start()
    assert reader.begun.wait(5)
    for _ in range(signals):
        server.uvicorn.handle_exit(signal.SIGINT, None)
    server.thread.join(5)
    assert not server.thread.is_alive()
    reader.join(5)
    last = json.loads(reader.text.strip().rpartition("data: ")[2])
    assert last["error"]["code"] == "engine_stopped"
    assert not engine.healthy


def test_a_server_whose_engine_has_died_ends_with_status_1(package: Package) -> None:
    """A process that stays, alive and never ready, is restarted by nobody."""
    dying = PROGRAM.replace("server.run(", "engine.died = True\nserver.run(")
    command = [sys.executable, "-c", dying, str(package.path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=60)
    assert done.returncode == 1 and "stopped" not in done.stdout
    assert "the engine has died" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # the server's SystemExit, on a thread
def test_what_other_versions_answer_ends_before_a_server_whose_engine_has_died(
    server: Any, engine: ScriptedEngine
) -> None:
    engine.script, engine.delay = " ".join(["word"] * 40), 0.02
    reader = Reader(server.url)
    reader.start()
    assert reader.begun.wait(5)
    engine.died = True
    time.sleep(0.2)
    assert httpx.get(f"{server.url}/ready").status_code == 503
    assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT).status_code == 503
    server.thread.join(10)
    assert not server.thread.is_alive()
    reader.join(5)
    assert reader.text.endswith("data: [DONE]\n\n")


def test_an_idle_server_stops_at_once(server: Any) -> None:
    with httpx.Client() as client:  # a kept-alive connection must not hold it up
        assert client.get(f"{server.url}/health").status_code == 200
        server.uvicorn.handle_exit(signal.SIGTERM, None)
        server.thread.join(4)  # uvicorn would give it five seconds
    assert not server.thread.is_alive()


def test_one_line_says_that_it_is_ready(capsys: pytest.CaptureFixture[str], server: Any) -> None:
    assert capsys.readouterr().out == f"ready on {server.url}\n"


def test_a_busy_port_is_found_before_anything_is_loaded(package: Package) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} of 127\.0\.0\.1.*in use.*--port"):
            serve(ServeConfig(package=package.path / "does-not-exist", port=port))


def test_a_host_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="cannot"):
        reserve_port("203.0.113.7", 0)
    with pytest.raises(ConfigError, match="cannot be resolved"):
        reserve_port("no such host", 0)


def test_a_reserved_port_does_not_answer_yet() -> None:
    with reserve_port("127.0.0.1", 0) as listener, pytest.raises(ConnectionRefusedError):
        socket.create_connection(listener.getsockname())
