"""What fails around a server: a full disk under its database and its log, a package and a database that cannot be
written, a database that is away. Real processes, files, mounts and databases; every answer is one of OpenAI's form.

Mounts are made in a mount namespace of the server's own, so nothing else sees them. Where the system allows none, those
tests are skipped.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from atoms.package import Package

CAN_MOUNT = (
    shutil.which("unshare") is not None
    and not subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
)
needs_mounts = pytest.mark.skipif(not CAN_MOUNT, reason="this system gives no mount namespace")
LIMIT = 40_000
KEY = "boss"


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    http: httpx.Client
    package: Package

    def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": self.package.manifest.name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        return self.http.post("/v1/chat/completions", json=body | fields)

    def steered(self) -> httpx.Response:
        return self.chat(steering={"atoms": {self.package.manifest.atoms[0].id: 1.0}})

    def put(self, name: str, description: str = "") -> httpx.Response:
        return self.http.put(f"/v1/presets/{name}", json={"atoms": {}, "description": description})


def command_of(package: Path, port: int, *options: str) -> list[str]:
    return [sys.executable, "-m", "clients.cli", "serve", f"--port={port}", f"--package={package}", "--dtype=float32",
            f"--admin-key={KEY}", *options]  # fmt: skip


def within(setup: str, *values: object) -> list[str]:
    """A command's beginning that runs the rest where `setup` was done first, with $1, $2 … for `values`."""
    shift = f"shift {len(values)}"
    return ["unshare", "-rm", "sh", "-ec", f'{setup}; {shift}; exec "$@"', "sh", *map(str, values)]


@contextmanager
def running(
    package: Package, *options: str, before: list[str] | None = None, output: Path | None = None
) -> Iterator[Running]:
    """A server that answers; SIGTERM must end it within its time, with status 0."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [*(before or []), *command_of(package.path, port, *options)]
    with (output or Path(os.devnull)).open("ab") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
    http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, headers={"Authorization": f"Bearer {KEY}"})
    try:
        while True:
            assert process.poll() is None, "the server did not start"
            try:
                if http.get("/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        yield Running(process, http, package)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        http.close()
        process.kill()
        process.wait()


def assert_refused(response: httpx.Response, code: str = "store_unavailable") -> None:
    assert response.status_code == 503, response.text
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert response.json()["error"]["code"] == code
    assert int(response.headers["Retry-After"]) >= 1


def eventually(ask: Callable[[], httpx.Response], status: int, seconds: float = 15) -> httpx.Response:
    """The first answer of `ask` with this status, or the last."""
    end = time.monotonic() + seconds
    while (response := ask()).status_code != status and time.monotonic() < end:
        time.sleep(0.2)
    assert response.status_code == status, response.text
    return response


def assert_serves_without_storing(server: Running) -> None:
    """Twice: what fails once may not spoil what comes next."""
    for _ in range(2):
        assert_refused(server.put("lost", "x" * 200))
        answer = server.steered()
        assert answer.status_code == 200 and answer.headers["X-Atomsteer-Mix"].startswith("m-")
    assert "kept" in server.http.get("/v1/presets").text, "what was stored before is served on"
    assert "lost" not in server.http.get("/v1/presets").text


@needs_mounts
def test_a_full_disk_under_the_database(tiny_package: Package, tmp_path: Path) -> None:
    before = within('mount -t tmpfs -o size=2m tmpfs "$1"', tmp_path)
    with running(tiny_package, f"--database=sqlite:///{tmp_path}/state.db", before=before) as server:
        assert server.put("kept").status_code == 200
        filler = Path(f"/proc/{server.process.pid}/root{tmp_path}/filler")
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(b"\0" * 4096)
        for number in range(200):  # what the file of the log has room for
            if server.put(f"p{number}", "x" * 4000).status_code != 200:
                break
        assert_serves_without_storing(server)
        filler.unlink()
        assert eventually(lambda: server.put("again"), 200).status_code == 200


def test_a_database_that_may_not_grow(tiny_package: Package, tmp_path: Path) -> None:
    """A quota in place of a full disk; the kernel refuses the same writes."""
    with running(tiny_package, f"--database=sqlite:///{tmp_path}/state.db", "--no-access-log") as server:
        assert server.put("kept").status_code == 200
        _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (LIMIT, hard))
        assert_serves_without_storing(server)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        assert eventually(lambda: server.put("again"), 200).status_code == 200


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_full_disk_under_the_log(tiny_package: Package, log_format: str) -> None:
    """stdout and stderr refuse every byte: no answer depends on a log line, nor does the start or the end."""
    options = ["--database=none", f"--log-format={log_format}", "--log-prompts"]
    with running(tiny_package, *options, output=Path("/dev/full")) as server:
        for _ in range(50):
            assert server.steered().status_code == 200
            assert server.chat(steering={"atoms": {"nothing": 1}}).status_code == 404
        assert server.http.get("/metrics").status_code == 200


@needs_mounts
def test_a_read_only_package_is_served_and_reloaded(tiny_package: Package) -> None:
    path = tiny_package.path
    before = within('mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"', path)
    with running(tiny_package, "--database=none", before=before) as server:
        with pytest.raises(OSError, match="Read-only"):
            Path(f"/proc/{server.process.pid}/root{path}/probe").touch()
        assert server.steered().status_code == 200
        assert server.http.post("/v1/admin/reload").status_code == 200
        assert server.steered().status_code == 200


@needs_mounts
def test_a_read_only_database_is_refused_at_the_start(tiny_package: Package, tmp_path: Path) -> None:
    before = within('mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"', tmp_path)
    command = [*before, *command_of(tiny_package.path, 0, f"--database=sqlite:///{tmp_path}/state.db")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert_refused_to_start(done, "state.db")


def test_a_database_that_is_away_is_refused_at_the_start(tiny_package: Package) -> None:
    """And is not waited for."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # a port where nobody listens
        url = f"postgresql://u:secret@127.0.0.1:{listener.getsockname()[1]}/d"
        done = subprocess.run(
            command_of(tiny_package.path, 0, f"--database={url}"), capture_output=True, text=True, timeout=60
        )
    assert_refused_to_start(done, "--database")
    assert "secret" not in done.stdout + done.stderr


def assert_refused_to_start(done: subprocess.CompletedProcess[str], named: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and named in done.stderr.splitlines()[-1]


def test_a_postgresql_that_stops_and_comes_back(
    tiny_package: Package, own_postgresql: Any, wait_for: Callable[..., bool]
) -> None:
    with running(tiny_package, f"--database={own_postgresql.get_uri()}") as server:
        assert server.put("kept").status_code == 200
        stopped = own_postgresql.get_pid()
        os.kill(stopped, signal.SIGQUIT)  # "immediate": connections are cut
        assert wait_for(lambda: not Path(f"/proc/{stopped}").exists(), 15)
        assert_serves_without_storing(server)
        own_postgresql.ensure_postgres_running()
        assert eventually(lambda: server.put("again"), 200).status_code == 200


def test_a_database_whose_file_was_removed(tiny_package: Package, tmp_path: Path) -> None:
    """The server has it open still; what it would write there would be lost."""
    with running(tiny_package, f"--database=sqlite:///{tmp_path}/state.db") as server:
        assert server.put("kept").status_code == 200
        for file in tmp_path.glob("state.db*"):
            file.unlink()
        assert_serves_without_storing(server)
