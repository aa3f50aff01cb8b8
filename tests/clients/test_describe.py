"""`describe`: what a model is shown, what is kept of its answer, and what a failure leaves behind."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from atoms.errors import ConfigError, DataError, PackageError
from atoms.package import Package
from clients.describe import LONGEST, Asking, DescribingError, _question, describe_atoms, one_line
from offline.progress import Progress

Cli = Callable[..., tuple[int, str, str]]
QUIET = Progress(quiet=True)


def answer(content: object, ended: str = "stop") -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": ended}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "large", "choices": [choice]}


@contextmanager
def scripted(
    answers: Sequence[str | int | bytes | dict], models: object = ({"id": "large"},)
) -> Iterator[tuple[str, list[dict]]]:
    """A server that gives these answers in turn, the last for ever, a number being a status that is refused with; and what it
    was asked."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, json.dumps({"object": "list", "data": models}).encode())

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            asked[-1] |= {"path": self.path, "headers": str(self.headers)}
            given = answers[min(len(asked), len(answers)) - 1]
            if isinstance(given, int):
                self._send(given, json.dumps({"error": {"message": "no more of this", "type": "refused"}}).encode())
            elif isinstance(given, bytes):
                self._send(200, given, "text/html" if given.startswith(b"<") else "application/json")
            else:
                self._send(200, json.dumps(answer(given) if isinstance(given, str) else given).encode())

        def _send(self, status: int, content: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def describe(package: Package, url: str, again: bool = False, **asking: Any):
    return describe_atoms(package, url, None, Asking(**asking), again=again, progress=QUIET)


def test_nothing_of_openais_environment_is_sent(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "secret")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Team: secret")
    with scripted(["Answers with one word."]) as (url, asked):
        describe(package, url)
    assert asked and not any("secret" in request["headers"] for request in asked)


def test_a_real_model_describes_every_atom(cli: Cli, named_package: Package, real_server: str, tmp_path: Path) -> None:
    path = tmp_path / "package"
    shutil.copytree(named_package.path, path)
    status, out, _ = cli("describe", path, "--server", real_server.removesuffix("/v1"), "--documents", 2,
                         "--max-tokens", 120, "--temperature", 0)  # fmt: skip
    assert status == 0
    package = Package.read(path)
    page = (path / "report.html").read_text(encoding="utf-8")
    for before, card in zip(named_package.manifest.atoms, package.manifest.atoms, strict=True):
        assert card.description != before.description and card.described_by == "demo"
        assert card.without_prose == before
        assert f"{card.name}: {card.description}" in out
    assert page.count("said by demo") == len(package.manifest.atoms)
    assert "said by" not in (named_package.path / "report.html").read_text(encoding="utf-8")


def test_the_model_is_shown_the_atoms_documents_and_others(package: Package) -> None:
    with scripted(["They greet."]) as (url, asked):
        describe(package, f"{url}/some/where/v1", model="second", documents=3, max_tokens=99)
    evidence = {line["atom"]: line["documents"] for line in package.evidence()}
    assert len(asked) == len(evidence)
    for request, documents in zip(asked, evidence.values(), strict=True):
        assert (request["model"], request["max_completion_tokens"]) == ("second", 99)
        assert request["path"] == "/some/where/v1/chat/completions" and "temperature" not in request
        text = request["messages"][0]["content"]
        for n, document in enumerate(documents[:3], 1):
            assert f"GROUP, question {n}: {document['prompt'][:300]}" in text
            assert f"GROUP, answer {n}: {document['response'][:300]}" in text
    assert {card.described_by for card in Package.read(package.path).manifest.atoms} == {"second"}


def test_others_are_no_documents_of_the_atom_and_signs_are_kept_apart(package: Package) -> None:
    def document(name: str, code: float = 1.0) -> dict[str, Any]:
        return {"id": "the same for all", "prompt": f"ask {name}", "response": f"say {name}.", "code": code}

    evidence = {
        "a": [document("one"), document("both")],
        "b": [document("both"), document("two")],
        "c": [document("three")],
    }
    text = _question("a", evidence, 6)
    group, others = text.split("OTHER", 1)
    assert "say one." in group and "say both." in group
    assert "say two." in others and "say three." in others and "say both." not in others
    assert "OTHER" not in (alone := _question("a", {"a": evidence["a"]}, 6)) and "lack" not in alone
    lines = [json.loads(line) for line in (package.path / "evidence.jsonl").read_text().splitlines()]
    opposite = dict(lines[0]["documents"][0], prompt="the opposite", code=-lines[0]["documents"][0]["code"])
    lines[0]["documents"].insert(1, opposite)
    monkeyed = Package(package.path, package.manifest)
    object.__setattr__(monkeyed, "evidence", lambda: lines)
    with scripted(["They greet."]) as (url, asked):
        describe(monkeyed, url)
    assert "the opposite" not in asked[0]["messages"][0]["content"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (400, "refused with 400: .*no more of this"),
        (b"<html>log in</html>", "no answer of an OpenAI API"),
        (b"{broken", "no answer of an OpenAI API"),
        ({"id": "1", "choices": []}, "no answer of an OpenAI API"),
        ({"id": "1", "choices": [None]}, "no answer of an OpenAI API"),
        (answer(None), "said no sentence"),
        (answer([{"type": "text", "text": "parts"}]), "said no sentence"),
        (answer("They all are about", "length"), r"said no sentence within --max-tokens \(512\)"),
        (answer("<think>They all are. Or", "length"), "within --max-tokens"),
    ],
)
def test_an_atom_without_an_answer_is_passed_over_and_asked_about_again(
    package: Package, cli: Cli, bad: Any, reason: str
) -> None:
    first, second, *others = package.manifest.atoms
    with scripted([bad, "They greet."]) as (url, asked):
        status, out, err = cli("describe", package.path, "--server", url)
        assert status == 1 and f"{len(others) + 1} atoms described by large" in out
        assert len(asked) == len(others) + 2
        assert err.splitlines()[-1].startswith(f"{first.name}: ")
        assert re.search(reason, err), err
    kept = Package.read(package.path)
    assert kept.card(first.id).described_by is None and kept.card(second.id).description == "They greet."
    assert "They greet." in (package.path / "report.html").read_text(encoding="utf-8")
    with scripted(["They ask."]) as (url, asked):
        status, out, _ = cli("describe", package.path, "--server", url)
        assert status == 0 and len(asked) == 1 and f"; {len(others) + 1} were before (--again" in out
        done = describe(Package.read(package.path), url, again=True)
        assert done.before == 0 and done.package.card(second.id).description == "They ask."
    assert Package.read(package.path).manifest == done.package.manifest


def test_a_server_that_refuses_the_key_or_is_gone_ends_the_run(package: Package) -> None:
    with scripted(["They greet.", 401]) as (url, asked), pytest.raises(DescribingError, match="401"):
        describe(package, url)
    assert len(asked) == 2
    assert [card.described_by for card in Package.read(package.path).manifest.atoms][:2] == ["large", None]
    assert "They greet." in (package.path / "report.html").read_text(encoding="utf-8")
    page = (package.path / "report.html").stat().st_mtime_ns
    with pytest.raises(DescribingError, match="cannot be reached"):
        describe(Package.read(package.path), url, model="other")
    assert (package.path / "report.html").stat().st_mtime_ns == page, (
        "nothing was described, yet the page was made again"
    )


@pytest.mark.parametrize(
    "models", [[], [{"id": "a"}, {"id": "b"}], [{"id": 7}], [{"id": None}], [{"id": "\u202e"}], "none", [None]]
)
def test_a_server_without_one_model_asks_for_its_name(package: Package, models: object) -> None:
    with scripted(["They greet."], models) as (url, asked):
        with pytest.raises((ConfigError, DescribingError), match="--model"):
            describe(package, url)
        assert not asked
        assert len(describe(package, url, model="a").done) == len(package.manifest.atoms)


def test_atoms_that_a_server_lists_beside_its_model_are_not_taken_for_models(package: Package) -> None:
    models = [{"id": "base", "parent": None}, {"id": "an-atom", "parent": "base"}]
    with scripted(["They greet."], models) as (url, _):
        assert describe(package, url).model == "base"


def test_what_others_write_meanwhile_is_kept_and_a_replaced_package_is_left_alone(package: Package) -> None:
    _, second, *_ = package.manifest.atoms
    with scripted(["They greet."]) as (url, _):
        Package.read(package.path).relabel(second.id, "terse")
        done = describe(package, url)
    assert (
        done.package.card(second.id).alias == "terse"
        and Package.read(package.path).card("terse").described_by == "large"
    )
    other = package.manifest.model_copy(
        update={"files": {**package.manifest.files, "drift.safetensors": "0" * 64}}
    ).sealed()
    (package.path / "manifest.json").write_text(other.model_dump_json())
    with scripted(["They ask."]) as (url, _), pytest.raises(PackageError, match="was replaced"):
        describe(done.package, url, again=True)
    assert json.loads((package.path / "manifest.json").read_text()) == other.model_dump(mode="json")


def test_an_answer_is_text_and_nothing_else(package: Package) -> None:
    hostile = "<think>hm</think><script>alert(1)</script>\x1b[31m\u202e\n\n**obey**"
    with scripted([hostile], [{"id": "<b>x\n"}]) as (url, _):
        described = describe(package, url)
    card = described.package.manifest.atoms[0]
    assert (card.description, card.described_by) == ("<script>alert(1)</script> [31m **obey**", "<b>x")
    page = (package.path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page and "<b>x" not in page
    with scripted([answer("They are lists. They also", "length")]) as (url, _):
        assert describe(package, url, again=True).package.manifest.atoms[0].description == "They are lists."


@pytest.mark.parametrize("server", ["localhost:8000", "ftp://host", ""])
def test_what_is_no_url_is_refused(package: Package, server: str) -> None:
    with pytest.raises(ConfigError, match="must begin with http"):
        describe(package, server)


def test_a_package_without_documents_is_refused(package: Package) -> None:
    files = {name: value for name, value in package.manifest.files.items() if name != "evidence.jsonl"}
    (package.path / "evidence.jsonl").unlink()
    bare = Package(package.path, package.manifest.model_copy(update={"files": files}).sealed())
    with pytest.raises(DataError, match="--no-documents"):
        describe(bare, "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('"All are lists."', "All are lists."),
        ("'", "'"),
        ("“All are lists.”", "All are lists."),
        ("'Yes' or 'no'", "'Yes' or 'no'"),
        ("a\n b\t c", "a b c"),
        ("x" * 500, "x" * (LONGEST - 1) + "…"),
        ("\x00", ""),
    ],
)
def test_one_line(text: str, line: str) -> None:
    assert one_line(text) == line
