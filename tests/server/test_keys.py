"""Key files: made by the command, read by the server, changed while it runs."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from httpx import AsyncClient
from starlette.datastructures import Headers
from typer.testing import CliRunner

from atoms.errors import ConfigError
from clients.cli import app
from server.auth import ANONYMOUS, AuthMiddleware, KeyRing
from server.config import ServeConfig
from server.errors import AuthenticationError
from server.keys import _alone, create_key, delete_key, hash_key, read_keys
from server.limits import Quota


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def bearer(key: str) -> Headers:
    return Headers({"authorization": f"Bearer {key}"})


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_key_is_shown_once_and_kept_as_a_hash(file: Path) -> None:
    key = run("keys", "create", "shop", "--file", file, "--requests-per-minute", 60).strip()
    assert key.startswith("atomsteer-") and len(key) > 50
    assert key not in file.read_text() and key.removeprefix("atomsteer-") not in file.read_text()
    (entry,) = json.loads(file.read_text())["keys"]
    assert entry["sha256"] == hashlib.sha256(key.encode()).hexdigest()
    assert (entry["name"], entry["requests_per_minute"]) == ("shop", 60)
    caller = KeyRing(api_key_file=file, quota=Quota(tokens_per_minute=9)).identify(bearer(key))
    assert caller.name == "shop" and not caller.admin
    assert caller.quota == Quota(requests_per_minute=60, tokens_per_minute=9)
    assert "shop" in run("keys", "list", "--file", file)
    run("keys", "delete", "shop", "--file", file)
    assert read_keys(file) == []


def test_two_keys_of_one_name_are_refused_unless_one_takes_the_others_place(file: Path) -> None:
    first = create_key(file, "shop")
    with pytest.raises(ConfigError, match="--replace"):
        create_key(file, "shop")
    second = create_key(file, "shop", replace=True)
    ring = KeyRing(api_key_file=file)
    assert ring.identify(bearer(second)).name == "shop"
    with pytest.raises(AuthenticationError):
        ring.identify(bearer(first))


def test_changes_at_the_same_time_lose_no_key(file: Path) -> None:
    for number in range(8):
        create_key(file, f"old-{number}")
    with ThreadPoolExecutor(16) as pool:
        deleted = [pool.submit(delete_key, file, f"old-{number}") for number in range(8)]
        keys = list(pool.map(lambda number: create_key(file, f"new-{number}"), range(8)))
    assert [change.result() for change in deleted] == [None] * 8
    assert {entry.name for entry in read_keys(file)} == {f"new-{number}" for number in range(8)}
    assert {entry.sha256 for entry in read_keys(file)} == {hash_key(key) for key in keys}
    assert list(file.parent.iterdir()) == [file]


def test_another_process_that_changes_the_file_is_waited_for(file: Path) -> None:
    create_key(file, "first")
    program = "import sys; from pathlib import Path; from server.keys import create_key; create_key(Path(sys.argv[1]), 'second')"
    with _alone(file):
        other = subprocess.Popen([sys.executable, "-c", program, str(file)])
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(2)
    assert other.wait(60) == 0
    assert [entry.name for entry in read_keys(file)] == ["first", "second"]


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 65, "a\nb", "ü"])
def test_names_that_could_upset_a_log_are_refused(file: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no name for a key"):
        create_key(file, name)
    assert not file.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "json"),
        ("[]", "object"),
        ('{"keys": [{"name": "a", "key": "atomsteer-secret"}]}', r"keys\.0"),
        ('{"keys": [{"name": "a", "sha256": "atomsteer-secret"}]}', "sha256"),
        ('{"keys": [{"name": "a", "sha256": "%s", "requests_per_minute": 0}]}' % ("0" * 64), "requests_per_minute"),
        (json.dumps({"keys": [{"name": "a", "sha256": "0" * 64}] * 2}), "two keys 'a'"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_without_showing_what_is_in_it(file: Path, content: str, said: str) -> None:
    file.write_text(content)
    with pytest.raises(ConfigError, match=said) as refused:
        KeyRing(api_key_file=file)
    assert "secret" not in str(refused.value)
    with pytest.raises(ConfigError, match="atomsteer keys create"):
        KeyRing(admin_key_file=file.with_name("absent"))


def test_a_changed_file_is_read_without_a_restart(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    old = create_key(file, "old")
    ring = KeyRing(api_key_file=file, clock=clock)
    new = create_key(file, "new")
    with pytest.raises(AuthenticationError):
        ring.identify(bearer(new))
    clock.now = 1.5
    assert [ring.identify(bearer(key)).name for key in (old, new)] == ["old", "new"]
    delete_key(file, "old")
    clock.now = 3.0
    with pytest.raises(AuthenticationError):
        ring.identify(bearer(old))
    for broken in ("{", None):
        file.write_text(broken) if broken else file.unlink()
        clock.now += 2
        assert ring.identify(bearer(new)).name == "new", "the last good keys stay in force"
    assert "stay as they were" in caplog.text and new not in caplog.text


def test_an_emptied_file_does_not_open_the_server(file: Path) -> None:
    create_key(file, "only")
    delete_key(file, "only")
    with pytest.raises(AuthenticationError):
        KeyRing(api_key_file=file).identify(Headers({}))
    assert KeyRing(admin_key_file=file).identify(Headers({})) is ANONYMOUS


def test_the_kind_of_a_key_is_its_files(file: Path) -> None:
    admins = file.with_name("admins.json")
    client, boss = create_key(file, "client"), create_key(admins, "boss")
    ring = KeyRing(["plain"], ["root"], api_key_file=file, admin_key_file=admins)
    callers = [ring.identify(bearer(key)) for key in (client, boss, "plain", "root")]
    assert [(caller.name, caller.admin) for caller in callers] == [
        ("client", False), ("boss", True), ("api-key-1", False), ("admin-key-1", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "sent",
    [
        [("authorization", "Bearer good"), ("authorization", "Bearer bad")],
        [("authorization", "Bearer bad"), ("authorization", "Bearer good")],
        [("authorization", "Basic good")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer good extra")],
        [("authorization", "Bearer g\u00f6od")],
        [("x-api-key", "good")],
        [],
    ],
)
def test_headers_that_are_no_single_good_key(sent: list[tuple[str, str]]) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in sent]
    with pytest.raises(AuthenticationError):
        KeyRing(["good"]).identify(Headers(raw=raw))


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[str, str]] = []

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("server.auth.hmac.compare_digest", compare)
    KeyRing(["first", "second", "third"]).identify(bearer("first"))
    assert len(compared) == 3 and all(len(one) == len(other) == 64 for one, other in compared)


@pytest.mark.parametrize(("key", "reached"), [("good", True), ("bad", False), (None, False)])
async def test_web_sockets_need_a_key_too(key: str | None, reached: bool) -> None:
    opened, sent = [], []

    async def app(*_: object) -> None:
        opened.append(True)

    async def receive() -> dict:
        return {"type": "websocket.connect"}

    async def send(message: dict) -> None:
        sent.append(message)

    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    await AuthMiddleware(app, KeyRing(["good"]))({"type": "websocket", "path": "/x", "headers": headers}, receive, send)
    assert bool(opened) is reached and [message["code"] for message in sent] == ([] if reached else [1008])


async def test_the_log_names_the_key_and_never_shows_it(
    client_of: Callable[..., AsyncClient], config: ServeConfig, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = create_key(file, "shop")
    caplog.set_level("INFO", "atomsteer.access")
    async with client_of(replace(config, api_key_file=file), key) as client:
        assert (await client.get("/v1/models")).status_code == 200
    async with client_of(replace(config, api_key_file=file), "wrong-secret") as client:
        assert (await client.get("/v1/models")).status_code == 401
    lines = [record.getMessage() for record in caplog.records if record.name == "atomsteer.access"]
    assert lines[0].endswith(" - shop") and lines[1].endswith(" - -")
    assert key not in caplog.text and "wrong-secret" not in caplog.text and key not in repr(config)
