"""`atomsteer chat` with its input from a pipe, and at a real terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pexpect
import pytest

from atoms.package import Package
from server.config import ServeConfig
from server.context import Traffic
from server.embedded.app import create_app
from server.embedded.scripted import BREAK, ScriptedEngine
from server.embedded.serve import draining_server, reserve_port


def chat(lines: list[str], *arguments: object, status: int = 0) -> tuple[list[str], str]:
    """Lines of standard output, and standard error."""
    command = [
        sys.executable,
        "-m",
        "clients.cli",
        "chat",
        *map(str, arguments),
        "--temperature",
        "0",
        "--max-tokens",
        "6",
    ]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=300)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_a_piped_conversation_prints_answers_and_obeys_commands(real_server: str, named_package: Package) -> None:
    asked = "Name a fruit."
    out, errors = chat(
        [asked, "/mix numbered-list=3", "/mix", "/reset", asked, "/compare " + asked, "/mix nope=1", "/atoms", "/what",
         "/mix none", "/reset", asked, "/quit", "never read"],
        "--server", real_server, status=1,  # some of the commands fail
    )  # fmt: skip
    kl = named_package.predicted_kl(named_package.mix({"numbered-list": 3.0}))
    assert f"[numbered-list=3; predicted KL {kl:.3f} nats a token]" in errors
    assert "unknown atom 'nope'" in errors and "'/what' is no command" in errors
    assert all(card.name in errors for card in named_package.manifest.atoms)
    plain, steered, compared_plain, compared_steered, last = out
    assert plain == compared_plain == last, "the same question without steering, after a reset, has the same answer"
    assert steered == compared_steered
    assert "never read" not in errors


@pytest.fixture
def scripted(package: Package, wait_for: Callable[..., bool]) -> Iterator[tuple[str, ScriptedEngine]]:
    """The URL of a server in this process, and the engine whose script it recites."""
    engine = ScriptedEngine()
    app = create_app(package, engine, ServeConfig(package=package.path, api_keys=("right",)))
    with reserve_port("127.0.0.1", 0) as listener:
        running = draining_server(app, engine, Traffic(), 1.0, "ready")
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        assert wait_for(lambda: running.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", engine
        running.should_exit = True
        thread.join(10)


def test_nothing_of_openais_environment_is_sent(
    scripted: tuple[str, ScriptedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer secret")
    assert chat(["Hi"], "--server", scripted[0], "--key", "right")[0] == ["one two three"]


def test_a_piped_chat_in_which_a_turn_failed_says_so(scripted: tuple[str, ScriptedEngine]) -> None:
    url, engine = scripted
    assert chat(["Hi"], "--server", url, "--key", "right")[0] == ["one two three"]
    engine.script = f"one {BREAK} three"
    out, errors = chat(["Hi", "/history"], "--server", url, "--key", "right", status=1)
    assert out == ["one"] and "error: " in errors and "user: " not in errors
    assert "is no command" in chat(["/what"], "--server", url, "--key", "right", status=1)[1]


def test_a_mix_that_the_server_refuses_is_a_plain_error(scripted: tuple[str, ScriptedEngine]) -> None:
    url, engine = scripted
    out, errors = chat(["Hi"], "--server", url, "--key", "right", "--mix", "nope=1", status=2)
    assert not out and errors.startswith("error: ") and "unknown atom 'nope'" in errors
    assert not engine.requests


def test_a_server_without_atoms_ends_a_chat_at_a_terminal_with_a_plain_error(tmp_path: Path) -> None:
    class Plain(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listed = self.path == "/v1/models"
            self.send_response(200 if listed else 404)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "m"}]}' if listed else b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Plain) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        arguments = ["-m", "clients.cli", "chat", "--server", f"http://127.0.0.1:{server.server_port}"]
        child = pexpect.spawn(
            sys.executable, arguments, env=os.environ | {"XDG_STATE_HOME": str(tmp_path)}, encoding="utf-8"
        )
        child.expect(pexpect.EOF)
        child.close()
        server.shutdown()
    assert child.exitstatus == 2 and "error: " in child.before and "Traceback" not in child.before, child.before


def test_what_cannot_be_compared_is_said(real_server: str) -> None:
    out, errors = chat(
        ["/mix numbered-list=1e400", "/mix numbered-list=nan", "/compare", "/compare Name a fruit.", "/history", "/quit"],
        "--server", real_server, status=1,
    )  # fmt: skip
    assert not out
    assert errors.count("no finite coefficient") == 2
    assert "there is no question to compare yet" in errors and "the mix is empty" in errors


Terminal = Callable[..., pexpect.spawn]


@pytest.fixture
def terminal(real_server: str, tmp_path: Path) -> Iterator[Terminal]:
    """`terminal(columns)`: a chat at a terminal, greedy, with its state in `tmp_path`; it must end well."""
    started = []

    def start(columns: int = 120, max_tokens: int = 8) -> pexpect.spawn:
        arguments = ["-m", "clients.cli", "chat", "--server", real_server, "--temperature", "0"]
        environment = {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        child = pexpect.spawn(sys.executable, [*arguments, "--max-tokens", str(max_tokens)], dimensions=(40, columns),
                              env=environment, encoding="utf-8", timeout=120)  # fmt: skip
        started.append(child)
        child.expect_exact("> ")
        return child

    yield start
    for child in started:
        # A line is kept when it comes before the prompt is there; an end of file is lost.
        child.sendline("/quit")
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0


def test_commands_and_atoms_complete_and_lines_are_remembered(terminal: Terminal) -> None:
    child = terminal()
    child.send("/mi\tnum\t2\r")
    child.expect_exact("[numbered-list=2; predicted KL")
    child.expect_exact("> ")
    child.send("/mix numbered-list=2,one\t1\r")
    child.expect_exact("[numbered-list=2, one-word=1; predicted KL")
    child.expect_exact("> ")
    child.sendline("/history")
    child.expect_exact("> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child = terminal()
    child.send("\x1b[A\x1b[A\r")  # twice up: the line before the last of the run before
    child.expect_exact("[numbered-list=2, one-word=1; predicted KL")


def test_answers_stand_side_by_side_where_the_terminal_is_wide(terminal: Terminal) -> None:
    for columns, together in ((120, True), (60, False)):
        child = terminal(columns)
        child.sendline("/mix numbered-list=3")
        child.expect_exact("nats a token]")
        child.sendline("/compare Name three fruits.")
        child.expect("unsteered.*> ")
        headed = [line for line in child.after.splitlines() if "unsteered" in line]
        assert len(headed) == 1 and ("numbered-list=3" in headed[0]) == together


def test_a_question_is_compared_again_where_it_was_asked(terminal: Terminal) -> None:
    child = terminal()
    child.sendline("Name a fruit.")
    child.expect_exact("> ")
    child.sendline("/history")
    child.expect(r"user: Name a fruit\.\s+assistant: (\S+)")
    first_word = child.match[1]
    child.sendline("/mix numbered-list=3")
    child.expect_exact("nats a token]")
    child.sendline("/compare")
    child.expect("unsteered.*> ")
    assert first_word in child.after
    child.sendline("/history")
    child.expect("user: .*> ")
    assert child.after.count("user: ") == 1, "a comparison is no part of the conversation"


def test_ctrl_c_stops_the_answer_and_drops_the_line_but_not_the_chat(terminal: Terminal) -> None:
    child = terminal(max_tokens=2000)
    child.sendline("Count from one to a thousand, one number a line.")
    child.expect(r"one number a line\.\s+\S+")
    child.sendintr()
    child.expect_exact("[stopped]")
    child.send("half a line")
    child.sendintr()
    child.expect_exact("> ")
    child.sendline("/history")
    child.sendline("/mix")
    child.expect_exact("[unsteered]")
    assert not re.search("user: ", child.before), "a turn that was stopped is not kept"
