"""`atomsteer batch` under hostile files, a full disk, Ctrl-C, and servers that are busy, die, or come back.

The servers here are scripted, because a real one cannot be told when to refuse; batches on the real one are in
test_batch.py.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet

from atoms.errors import ConfigError, DataError
from clients import batch_lines, batch_requests
from clients.batch import BatchConfig, run_batch
from clients.batch_dry_run import scan_for_dry_run
from clients.batch_lines import Defaults, read_lines
from clients.batch_requests import BatchStoppedError

Plan = Callable[[dict, int], tuple]
"""A request's body and how often it has come -> status, headers, and the bytes of the answer if they are not the usual."""


class Scripted(BaseHTTPRequestHandler):
    """Answers as `server.plan(body, tries)` says, where `tries` counts the requests with this prompt."""

    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def do_GET(self) -> None:
        self._answer(*(self.server.version if self.path == "/version" else self.server.models))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["prompt"]
        with self.server.lock:
            self.server.asked.append((time.monotonic(), prompt))
            self.server.headers.append(str(self.headers))
            tries = sum(prompt == other for _, other in self.server.asked)
        status, headers, *raw = self.server.plan(body, tries)
        usage = {"completion_tokens": 1}
        answer = {
            "id": "x",
            "choices": [{"text": "t"}],
            "usage": usage,
            "error": {"message": "scripted", "code": "busy"},
        }
        self._answer(status, raw[0] if raw else answer, {"X-Atomsteer-Mix": "d", **headers})

    def _answer(self, status: int, body: dict | bytes, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


class ScriptedServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, plan: Plan, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Scripted)
        self.plan, self.lock = plan, threading.Lock()
        self.asked: list[tuple[float, str]] = []
        self.headers: list[str] = []
        self.version: tuple = (404, b"")
        self.models: tuple = (200, {"data": [{"id": "m", "parent": None}]})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextmanager
def scripted(plan: Plan, port: int = 0) -> Iterator[ScriptedServer]:
    server = ScriptedServer(plan, port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def good(body: dict, tries: int) -> tuple[int, dict[str, str]]:
    return 200, {}


def write_requests(path: Path, count: int) -> Path:
    line = '{{"custom_id": "r{0}", "url": "/v1/completions", "body": {{"prompt": "p{0}"}}}}\n'
    path.write_text("".join(line.format(number) for number in range(count)))
    return path


def config(source: Path, **changes: object) -> BatchConfig:
    settings = {"out": source.with_name("out.jsonl"), "defaults": Defaults({}), "concurrency": 4, "quiet": True}
    return BatchConfig(source, **(settings | changes))  # type: ignore[arg-type]


def answered(source: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in source.with_name("out.jsonl").read_bytes().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines), "a custom_id is there twice"
    return {line["custom_id"]: line for line in lines}


def run(source: Path, url: str, **changes: object):
    return run_batch(config(source, **changes), package=None, server=url, key=None, options=None)


def command(source: Path, url: str, *more: str) -> list[str]:
    out = str(source.with_name("out.jsonl"))
    return [sys.executable, "-m", "clients.cli", "batch", str(source), "--out", out, "--server", url, "--quiet", *more]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_tried_again_when_it_says(tmp_path: Path, status: int) -> None:
    def busy(body: dict, tries: int) -> tuple[int, dict[str, str]]:
        return (status, {"Retry-After": "1"}) if tries <= 2 and body["prompt"] == "p1" else (200, {})

    source = write_requests(tmp_path / "in.jsonl", 3)
    with scripted(busy) as server:
        outcome = run(source, server.url)
        times = [when for when, prompt in server.asked if prompt == "p1"]
    assert (outcome.done, outcome.failed) == (3, 0)
    assert len(times) == 3 and all(after - before >= 1 for before, after in pairwise(times))
    assert all(line["error"] is None for line in answered(source).values())


def test_a_line_that_stays_refused_is_an_error_and_can_be_tried_again(tmp_path: Path) -> None:
    source = write_requests(tmp_path / "in.jsonl", 3)

    def broken(body: dict, tries: int) -> tuple[int, dict[str, str]]:
        return (500, {"Retry-After": "0.01"}) if body["prompt"] == "p1" else (200, {})

    with scripted(broken) as server:
        assert run(source, server.url, max_retries=2).failed == 1
        assert [prompt for _, prompt in server.asked].count("p1") == 3
        line = answered(source)["r1"]
        assert (
            line["error"]["code"] == "busy"
            and "scripted" in line["error"]["message"]
            and line["response"]["status_code"] == 500
        )
        server.plan = good
        again = run(source, server.url, retry_failed=True)
    assert (again.done, again.failed) == (1, 0)
    assert all(line["error"] is None for line in answered(source).values())


@pytest.mark.parametrize("status", [502, 503])
def test_a_server_that_can_answer_nobody_stops_the_run(tmp_path: Path, status: int) -> None:
    """Its engine has stopped, or a proxy finds nobody: every further line would fail as well, after all of its tries."""
    source = write_requests(tmp_path / "in.jsonl", 50)

    def stopped(body: dict, tries: int) -> tuple[int, dict[str, str]]:
        return (200, {}) if body["prompt"] == "p0" else (status, {"Retry-After": "0.01"})

    with scripted(stopped) as server:
        with pytest.raises(BatchStoppedError, match=f"status {status} after 3 tries: .*run the command again"):
            run(source, server.url, max_retries=2)
        assert len({prompt for _, prompt in server.asked}) <= 6, "no worker goes on to other lines"
        assert answered(source).keys() <= {"r0"}
        server.plan = good
        assert run(source, server.url).failed == 0
    assert set(answered(source)) == {f"r{number}" for number in range(50)}


def test_a_rerun_is_no_success_while_failures_are_in_the_output(tmp_path: Path) -> None:
    """Whoever runs a batch until it succeeds must not take the second run's silence for that."""
    source = write_requests(tmp_path / "in.jsonl", 3)
    with scripted(lambda body, tries: (400 if body["prompt"] == "p1" else 200, {})) as server:
        first, second = (subprocess.run(command(source, server.url), capture_output=True, text=True) for _ in range(2))
        assert first.returncode == 1 and "1 of them failed" in first.stdout
        assert second.returncode == 1 and "1 lines of earlier runs have failed; --retry-failed" in second.stdout
        source.write_text(
            source.read_text() + '{"custom_id": "r3", "url": "/v1/completions", "body": {"prompt": "p3"}}\n'
        )
        third = subprocess.run(command(source, server.url), capture_output=True, text=True)
        assert third.returncode == 1 and "1 lines answered, 0 of them failed" in third.stdout
        server.plan = good
        last = subprocess.run(command(source, server.url, "--retry-failed"), capture_output=True, text=True)
    assert last.returncode == 0 and "earlier" not in last.stdout


def test_a_resumed_run_notices_that_somebody_else_answers(tmp_path: Path) -> None:
    source = write_requests(tmp_path / "in.jsonl", 2)
    kept = tmp_path / "out.jsonl"
    with scripted(lambda body, tries: (400 if body["prompt"] == "p1" else 200, {})) as server:
        server.version = (200, {"version": "0.1.0", "package": "lists", "package_version": "1"})
        assert run(source, server.url).failed == 1
        before = kept.read_bytes()
        server.version = (200, {"version": "0.1.0", "package": "lists", "package_version": "2"})
        with pytest.raises(ConfigError, match="begun with source 'model m lists 1' and this run has 'model m lists 2'"):
            run(source, server.url, retry_failed=True)
        assert kept.read_bytes() == before, "the failures of the run before are its results until they are asked again"
        server.plan, server.version = good, (200, {"package": "lists", "package_version": "1"})
        assert run(source, server.url, retry_failed=True).done == 1
        server.version, server.models = (404, b""), (200, {"data": [{"id": "other", "parent": None}]})
        source.write_text(
            source.read_text() + '{"custom_id": "r2", "url": "/v1/completions", "body": {"prompt": "p2"}}\n'
        )
        with pytest.raises(ConfigError, match="this run has 'model other'"):
            run(source, server.url)


def test_a_rerun_with_nothing_to_do_needs_no_server(tmp_path: Path) -> None:
    source = write_requests(tmp_path / "in.jsonl", 2)
    with scripted(good) as server:
        run(source, server.url)
    assert run(source, server.url).done == 0


def test_what_will_not_pass_is_not_asked_again(tmp_path: Path) -> None:
    """A conflict is no bad moment: an experiment that is a draft, or a preset of another package, stays one."""
    source = write_requests(tmp_path / "in.jsonl", 2)
    for status in (400, 404, 409, 422, 501):
        with scripted(lambda body, tries, status=status: (status, {"Retry-After": "30"})) as server:
            assert run(source, server.url, out=tmp_path / f"{status}.jsonl").failed == 2
            assert len(server.asked) == 2, status


def test_a_refused_line_costs_itself_and_a_refused_key_the_run(tmp_path: Path) -> None:
    """Leaving tested ranges needs an admin key (403): the other lines do without."""
    source = write_requests(tmp_path / "in.jsonl", 3)
    with scripted(lambda body, tries: (403 if body["prompt"] == "p1" else 200, {})) as server:
        outcome = run(source, server.url)
        assert (outcome.done, outcome.failed) == (3, 1)
        assert answered(source)["r1"]["response"]["status_code"] == 403
        server.plan = lambda body, tries: (401, {})
        with pytest.raises(BatchStoppedError, match="refuses the key"):
            run(source, server.url, out=tmp_path / "other.jsonl")


def test_the_wait_that_a_server_asks_for_is_kept() -> None:
    def asked(value: str) -> float | None:
        return batch_requests._asked_wait(SimpleNamespace(response=SimpleNamespace(headers={"retry-after": value})))

    assert (asked("7"), asked("0.25"), asked("300"), asked("1e9")) == (7, 0.25, 300, batch_requests.LONGEST_WAIT)
    assert asked(format_datetime(datetime.now(UTC) + timedelta(seconds=90))) == pytest.approx(90, abs=3)
    for nothing in ("", "0", "-3", "nan", "soon", format_datetime(datetime.now(UTC) - timedelta(days=1))):
        assert asked(nothing) is None, nothing


def test_answers_that_are_none_are_errors(tmp_path: Path) -> None:
    """Behind a login page or a broken proxy everything is a 200."""
    page = b"<html>Please log in</html>"
    answers = {
        "p0": (200, {"Content-Type": "text/html"}, page),
        "p1": (200, {}, b"[1]"),
        "p2": (200, {}, b'{"error": {"message": "no"}}'),
        "p3": (200, {}, b'{"choices": [{"logprob": NaN}]}'),
        "p4": (200, {}, b'{"choices": [1e999]}'),
        "p5": (200, {}, b"\xff\xfe\x00"),
        "p6": (200, {}, b""),
        "p7": (200, {}, b"[" * 100_000),
        "p8": (200, {}, b'{"choices": [], "usage": {"completion_tokens": "7"}}'),
        "p9": (200, {}, b'{"choices": [], "usage": [7]}'),
        "p10": (302, {"Location": "/elsewhere"}, b""),
        "p11": (500, {"Content-Type": "text/html"}, page),
    }
    source = write_requests(tmp_path / "in.jsonl", len(answers))
    with scripted(lambda body, tries: answers[body["prompt"]]) as server:
        outcome = run(source, server.url, max_retries=0)
    found = answered(source)
    assert (outcome.done, outcome.failed, outcome.tokens) == (12, 10, 0)
    assert {name for name, line in found.items() if line["error"] is None} == {"r8", "r9"}
    assert found["r0"]["error"]["code"] == "invalid_answer" and "log in" in found["r0"]["error"]["message"]
    assert found["r11"]["response"]["status_code"] == 500
    for line in source.with_name("out.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_servers_that_are_none_are_refused_before_any_line(tmp_path: Path) -> None:
    source = write_requests(tmp_path / "in.jsonl", 1)
    for models, words in (
        ((200, b"<html>"), "not JSON"), ((200, b"[]"), "no object"), ((200, b'{"detail": 1}'), "lists no models"),
        ((200, b'{"data": [7]}'), "lists no models"), ((302, b"", {"Location": "https://login.example/"}), "redirects to https"),
        ((200, b'{"data": []}'), "serves no model"),
    ):  # fmt: skip
        with scripted(good) as server:
            server.models = models
            done = subprocess.run(command(source, server.url), capture_output=True, text=True)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, (models, done.stderr)
        assert not server.asked


def test_outputs_that_cannot_be_written_are_refused_before_any_line(tmp_path: Path) -> None:
    source = write_requests(tmp_path / "in.jsonl", 1)
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "out.jsonl", Path("/proc/out.jsonl")):
        with scripted(good) as server:
            arguments = [str(out) if word.endswith("out.jsonl") else word for word in command(source, server.url)]
            done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == 2 and str(out) in done.stderr and "Traceback" not in done.stderr, (out, done.stderr)
        assert not server.asked


def test_a_server_that_dies_midway_stops_the_run_and_a_resumed_one_completes_it(tmp_path: Path) -> None:
    """The first server drops dead after 20 answers, with requests in flight; the second takes its place."""
    source = write_requests(tmp_path / "in.jsonl", 60)
    with scripted(good) as server:
        port = server.server_port

        def dying(body: dict, tries: int) -> tuple[int, dict[str, str]]:
            if len(server.asked) > 20:
                server.socket.close()
                raise ConnectionError("the server is dead")
            return 200, {}

        server.plan, server.handle_error = dying, lambda request, address: None
        stopped = subprocess.run(command(source, server.url, "--max-retries", "1"), capture_output=True, text=True)
    assert stopped.returncode == 2 and "cannot be reached" in stopped.stderr and "Traceback" not in stopped.stderr
    kept = answered(source)
    assert 1 <= len(kept) <= 20
    with scripted(good, port) as server:
        resumed = subprocess.run(command(source, server.url), capture_output=True, text=True)
        assert not {f"p{name[1:]}" for name in kept} & {prompt for _, prompt in server.asked}, (
            "an answer was asked twice"
        )
    assert resumed.returncode == 0, resumed.stderr
    assert set(answered(source)) == {f"r{number}" for number in range(60)}


def test_ctrl_c_keeps_what_is_answered(tmp_path: Path) -> None:
    def slow(body: dict, tries: int) -> tuple[int, dict[str, str]]:
        time.sleep(0.05)
        return 200, {}

    source = write_requests(tmp_path / "in.jsonl", 400)
    with scripted(slow) as server:
        process = subprocess.Popen(
            command(source, server.url), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        while len(server.asked) < 100 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130 and errors == "interrupted; what was finished is kept\n", errors
        before = answered(source)
        assert 0 < len(before) < 400
        subprocess.run(command(source, server.url), check=True, capture_output=True)
    assert len(answered(source)) == 400 and before.items() <= answered(source).items()


def test_a_full_disk_stops_the_run_and_room_completes_it(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writing fails in the middle of a line."""
    source = write_requests(tmp_path / "in.jsonl", 60)

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    with scripted(good) as server:
        full = subprocess.run(command(source, server.url), capture_output=True, text=True, preexec_fn=small_disk)
        assert full.returncode == 2 and "free disk space" in full.stderr and "Traceback" not in full.stderr, full.stderr
        assert (tmp_path / "out.jsonl").stat().st_size == 5000, (
            "the last line must be torn for this test to mean something"
        )
        subprocess.run(command(source, server.url), check=True, capture_output=True)
    assert set(answered(source)) == {f"r{number}" for number in range(60)}


def test_every_bad_line_is_answered_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "LONGEST_LINE", 4096)
    body = b'"url": "/v1/completions", "body": {"prompt": "p"}}\r\n'
    lines = [
        (b"\xef\xbb\xbf" + b'{"custom_id": "bom-and-crlf", ' + body, None),
        (b'{"prompt": "\xff\xfe"}\n', "not UTF-8"),
        (b'{"prompt": "\\ud800"}\n', "surrogate"),
        (b'{"custom_id": "\\ud800", ' + body, "surrogate"),
        (b'{"prompt": "a", "steering": {"atoms": {"x": NaN}}}\n', "NaN"),
        (b'{"prompt": "a", "steering": {"atoms": {"x": 1e999}}}\n', "JSON compliant"),
        (b"[" * 2000 + b"\n", "not JSON"),
        (b'{"prompt": "' + b"x" * 100_000 + b'"}\n', "longer than"),
        (b'{"custom_id": {"a": 1}, ' + body, "custom_id"),
        (b'{"custom_id": "' + b"i" * 600 + b'", ' + body, "custom_id"),
        (b'{"custom_id": "get", "method": "GET", ' + body, "method"),
        (b'{"custom_id": "stream", "body": {"messages": [], "stream": true}}\n', "stream"),
        (b"3\n", "prompt"),
        (b'{"prompt": ""}\n', "prompt"),
        (b'{"custom_id": "no-newline-at-the-end", ' + body.strip(), None),
    ]  # fmt: skip
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"".join(line for line, _ in lines))
    read = list(read_lines(source, Defaults({})))
    for line, (raw, reason) in zip(read, lines, strict=True):
        assert (line.error is None) if reason is None else (reason in str(line.error)), (raw[:80], line)
    with scripted(good) as server:
        outcome = run(source, server.url)
        assert [prompt for _, prompt in server.asked] == ["p", "p"]
    assert (outcome.done, outcome.failed) == (len(lines), len(lines) - 2)
    assert {line.custom_id for line in read} == set(answered(source))
    assert {"bom-and-crlf", "no-newline-at-the-end", "line-2", "line-4", "line-9", "get"} < set(answered(source))


def test_zero_bytes_and_other_encodings(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(
        b'{"custom_id": "a\\u0000b", "prompt": "x"}\n{"custom_id": "a\\u0000c", "prompt": "y\\u0000"}\n\0\0\n'
    )
    scan = scan_for_dry_run(config(source))
    assert (scan.lines, scan.invalid) == (3, 1), "ids that differ after a zero byte are two"
    for encoding in ("utf-16", "utf-16-be"):
        source.write_bytes("\ufeff".encode(encoding)[-2:] + "Name a fruit.\n".encode(encoding))
        with pytest.raises(DataError, match="iconv -f UTF-16"):
            scan_for_dry_run(config(source))


def test_tables_with_bad_cells_cost_a_row_each(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes(
        b'\xef\xbb\xbfprompt,steering,custom_id\r\nok,,a\r\n"\xff",,b\r\nok,not json,c\r\nok,"{""preset"": ""p""}",d\r\n'
    )
    read = {line.custom_id: line for line in read_lines(source, Defaults({}))}
    assert {name: bool(line.error) for name, line in read.items()} == {"a": False, "b": True, "c": True, "d": False}
    assert read["d"].body["steering"] == {"preset": "p"} and "steering" not in read["a"].body


def test_nulls_of_parquet_say_nothing(tmp_path: Path) -> None:
    """Arrow gives every struct the keys of all rows, and null where a row has none: no atom is asked for by a null."""
    source = tmp_path / "in.parquet"
    rows = [
        {"custom_id": "a", "body": {"prompt": "x", "max_tokens": 3}, "url": "/v1/completions", "steering": {"atoms": {"p": 1.0}}},
        {"custom_id": None, "body": {"messages": [{"role": "user", "content": "y"}]}, "url": None, "steering": {"atoms": {"q": 2.0}}},
        {"custom_id": "c", "body": {"messages": [{"role": "system", "content": "z", "name": "n"}]}, "url": None, "steering": None},
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    first, second, third = read_lines(source, Defaults({}))
    assert (first.custom_id, first.url, first.error) == ("a", "/v1/completions", None)
    assert first.body == {"prompt": "x", "max_tokens": 3, "steering": {"atoms": {"p": 1.0}}}
    assert (second.custom_id, second.url) == ("line-2", "/v1/chat/completions")
    assert second.body == {"messages": [{"role": "user", "content": "y"}], "steering": {"atoms": {"q": 2.0}}}
    assert third.body == {"messages": [{"role": "system", "content": "z", "name": "n"}]}
    mixes = pyarrow.array([[("p", 1.0)], None], pyarrow.map_(pyarrow.string(), pyarrow.float64()))
    steering = pyarrow.StructArray.from_arrays([mixes], ["atoms"])
    parquet.write_table(pyarrow.table({"prompt": ["x", None], "steering": steering}), source)
    good_row, empty = read_lines(source, Defaults({}))
    assert good_row.body["steering"] == {"atoms": {"p": 1.0}}
    assert "the prompt is None" in str(empty.error)


def test_settings_that_cannot_be_read_and_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    source, kept = write_requests(tmp_path / "in.jsonl", 1), tmp_path / "out.jsonl.run.json"
    with scripted(good) as server:
        for more in (
            ("--temperature", "nan"),
            ("--temperature", "-1"),
            ("--mix", "a=inf"),
            ("--key", "clé"),
            ("--key", "a,b"),
        ):
            done = subprocess.run(command(source, server.url, *more), capture_output=True, text=True)
            assert done.returncode == 2 and "Traceback" not in done.stderr, (more, done.stderr)
        assert not server.asked
        assert run(source, server.url).done == 1
        for broken in ("{bad", "[1]", "\x00", ""):
            kept.write_text(broken)
            with pytest.raises(ConfigError, match=r"out\.jsonl\.run\.json.*cannot be read"):
                run(source, server.url)


def test_pipes_and_devices_are_refused_before_they_block(tmp_path: Path) -> None:
    """The input is read twice, and the output is what a run is resumed from."""
    source = write_requests(tmp_path / "in.jsonl", 1)
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    for arguments, words in (
        ((pipe, "--out", tmp_path / "out.jsonl"), "reads its input twice"),
        ((source, "--out", pipe), "no regular file"),
        ((source, "--out", "/dev/null"), "no regular file"),
    ):
        for more in ((), ("--dry-run",)):
            command = [
                sys.executable,
                "-m",
                "clients.cli",
                "batch",
                *map(str, arguments),
                "--server",
                "http://127.0.0.1:9",
                *more,
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, (
                command,
                done.stderr,
            )
    assert not Path("/dev/null.run.json").exists()


def test_files_that_cannot_be_a_batch_are_refused_whole(tmp_path: Path) -> None:
    empty = tmp_path / "in.jsonl"
    empty.touch()
    with scripted(good) as server:
        assert run(empty, server.url).done == 0 and not answered(empty)
        twice = write_requests(tmp_path / "twice.jsonl", 1)
        twice.write_text(twice.read_text() * 2)
        with pytest.raises(DataError, match="'r0' twice"):
            run(twice, server.url)
        with pytest.raises(ConfigError, match="which is the input"):
            run(twice, server.url, out=twice)
        with pytest.raises(DataError, match="absent"):
            run(tmp_path / "absent.jsonl", server.url, out=tmp_path / "new.jsonl")
        assert not server.asked
    unclosed = tmp_path / "in.csv"
    unclosed.write_bytes(b'prompt\n"' + b"x\n" * (batch_lines.LONGEST_LINE // 2 + 10))
    with pytest.raises(DataError, match="field limit"):
        list(read_lines(unclosed, Defaults({})))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A gigabyte in one line, and a hundred thousand lines: the scan of either keeps less than 50 MiB above that of one."""
    line = b'{"custom_id": "r%d", "prompt": "Name a fruit.", "steering": {"atoms": {"a": %d}}}\n'
    one, long, many = (tmp_path / f"{name}.jsonl" for name in ("one", "long", "many"))
    one.write_bytes(line % (0, 0))
    with long.open("wb") as file:
        file.truncate(1 << 30)  # a hole of zeros
    many.write_bytes(b"".join(line % (n, n % 50) for n in range(100_000)))
    script = (
        "import resource, sys; from pathlib import Path; from clients.batch import *\n"
        "from clients.batch_dry_run import scan_for_dry_run; from clients.batch_lines import Defaults\n"
        "config = BatchConfig(Path(sys.argv[1]), Path(sys.argv[1] + '.out'), Defaults({}), 1)\n"
        "scan = scan_for_dry_run(config)\n"
        "print(scan.lines, scan.invalid, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    found = {}
    for path in (one, long, many):
        done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
        lines, invalid, kib = map(int, done.stdout.split())
        found[path] = kib
        assert (lines, invalid) == {one: (1, 0), long: (1, 1), many: (100_000, 0)}[path]
    assert found[long] < found[one] + (50 << 10) and found[many] < found[one] + (50 << 10), found


def test_a_scan_counts_what_is_left(tmp_path: Path) -> None:
    source = write_requests(tmp_path / "in.jsonl", 5)
    with scripted(good) as server:
        run(source, server.url)
    source.write_text(source.read_text() + '{"prompt": "more"}\n')
    scan = scan_for_dry_run(config(source))
    assert (scan.lines, scan.answered, scan.invalid) == (6, 5, 0)


def test_nothing_of_openais_environment_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_PROJECT_ID", "secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Team: secret")
    source = write_requests(tmp_path / "in.jsonl", 1)
    with scripted(good) as server:
        run(source, server.url)
    assert len(server.headers) == 1 and "secret" not in server.headers[0]


def test_options_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    source = write_requests(tmp_path / "in.jsonl", 1)
    for more in (["--package", "pkg"], ["--slots", "4"], ["--model", "m"], ["--dtype", "float32"]):
        done = subprocess.run(command(source, "http://127.0.0.1:9", *more), capture_output=True, text=True)
        assert done.returncode == 2 and "--package" in done.stderr and "Traceback" not in done.stderr, more
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
