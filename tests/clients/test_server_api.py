"""A server's own routes as commands ask them: how long they wait, and what they say where there is no answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from atoms.errors import ConfigError
from clients import server_api
from clients.server_api import PATIENCE, TIMEOUT, ServerAnswerError, ServerAPI

Cli = Callable[..., tuple[int, str, str]]


def silent(request: httpx2.Request) -> httpx2.Response:
    raise httpx2.ReadTimeout("", request=request)


def test_a_server_that_does_not_answer_in_time_is_not_one_that_is_away(tmp_path: Path) -> None:
    with ServerAPI("http://x.example", transport=httpx2.MockTransport(silent)) as api:
        with pytest.raises(ServerAnswerError, match="http://x.example did not answer within 60 s"):
            api.call("GET", "models")
        with pytest.raises(ServerAnswerError, match=f"did not answer within {PATIENCE:g} s"):
            api.download("experiments/a/export", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "patient"),
    [
        (("report", "a"), True),
        (("delete", "a"), True),
        (("forget", "u"), True),
        (("export", "a"), True),
        (("status", "a"), False),
    ],
    ids=str,
)
def test_what_is_worked_out_from_all_observations_is_waited_for(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...], patient: bool
) -> None:
    waited = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        waited.append(request.extensions["timeout"]["read"])
        return httpx2.Response(404, json={"error": {"message": "there is none"}})

    monkeypatch.setattr(server_api.httpx, "Client", _answered_by(answer))
    out = ("--out", tmp_path) if arguments[0] == "export" else ()
    assert cli("experiment", *arguments, *out)[0] == 2
    assert waited == [PATIENCE if patient else TIMEOUT]


def _answered_by(answer: Callable[[httpx2.Request], httpx2.Response]) -> Callable[..., httpx2.Client]:
    client = httpx2.Client
    return lambda **options: client(**(options | {"transport": httpx2.MockTransport(answer)}))


@pytest.mark.parametrize("url", ["http://x.example:port", "http://[::1"])
def test_what_is_no_url_is_said(cli: Cli, url: str) -> None:
    with pytest.raises(ConfigError, match="is no URL of a server"):
        ServerAPI(url)
    status, _, error = cli("experiment", "list", "--server", url)
    assert status == 2 and url in error and "Traceback" not in error


def test_a_place_that_cannot_be_exported_to_is_said(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, _, error = cli(
        "experiment", "export", "a", "--out", tmp_path / "file" / "tables", "--server", "http://127.0.0.1:9"
    )
    assert (
        status == 2
        and error.startswith(f"error: cannot write {tmp_path / 'file' / 'tables'}")
        and "Traceback" not in error
    )
