"""`describe`: what a model is shown, what is kept of its answer, and what a failure leaves behind."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from atoms.errors import DataError
from atoms.package import Package
from clients.describe import LONGEST, DescribingError, describe_atoms, one_line
from offline.progress import Progress

Cli = Callable[..., tuple[int, str, str]]
QUIET = Progress(quiet=True)


@contextmanager
def scripted(answers: list[str | int]) -> Iterator[tuple[str, list[dict]]]:
    """A server that gives these answers in turn, a number being a status that is refused with; and what it was asked."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": "first"}, {"id": "second"}]})

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = answers[min(len(asked), len(answers)) - 1]
            if isinstance(answer, int):
                self._send(answer, {"error": {"message": "no more of this", "type": "refused"}})
            else:
                message = {"role": "assistant", "content": answer}
                self._send(200, {"id": "1", "object": "chat.completion", "created": 1, "model": "first",
                                 "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})  # fmt: skip

        def _send(self, status: int, body: dict) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
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


def test_a_real_model_describes_every_atom(cli: Cli, named_package: Package, real_server: str, tmp_path: Path) -> None:
    shutil.copytree(named_package.path, tmp_path / "package")
    status, out, _ = cli(
        "describe", tmp_path / "package", "--server", real_server, "--documents", 2, "--max-tokens", 24
    )
    assert status == 0
    package = Package.read(tmp_path / "package")
    page = (tmp_path / "package" / "report.html").read_text(encoding="utf-8")
    for before, card in zip(named_package.manifest.atoms, package.manifest.atoms, strict=True):
        assert card.description != before.description and card.described_by == "demo"
        assert card.model_copy(update={"description": before.description, "described_by": None}) == before
        assert f"{card.name}: {card.description}" in out
    assert page.count("said by demo") == len(package.manifest.atoms)
    assert "said by" not in (named_package.path / "report.html").read_text(encoding="utf-8")


def test_the_model_is_shown_the_atoms_documents_and_others(package: Package) -> None:
    with scripted(["They greet."]) as (url, asked):
        describe_atoms(package, url, None, "second", 3, 99, progress=QUIET)
    evidence = {line["atom"]: line["documents"] for line in package.evidence()}
    assert len(asked) == len(evidence)
    for request, (atom, documents) in zip(asked, evidence.items(), strict=True):
        assert (request["model"], request["max_completion_tokens"]) == ("second", 99)
        text = request["messages"][0]["content"]
        for n, document in enumerate(documents[:3], 1):
            assert f"GROUP, question {n}: {document['prompt'][:300]}" in text, atom
            assert f"GROUP, answer {n}: {document['response'][:300]}" in text
        own = {document["response"][:300] for document in documents}
        others = [part.splitlines()[0] for part in text.split("OTHER, answer ")[1:]]
        assert len(others) == 3 and not any(response in other for other in others for response in own)
    assert {card.described_by for card in Package.read(package.path).manifest.atoms} == {"second"}


def test_a_failure_keeps_what_was_described_and_the_next_run_goes_on(package: Package) -> None:
    first, second, *_ = package.manifest.atoms
    with scripted(["They greet.", 400]) as (url, _), pytest.raises(DescribingError, match=f"{second.name}: .*no more"):
        describe_atoms(package, url, None, None, 2, 99, progress=QUIET)
    kept = Package.read(package.path)
    assert [card.described_by for card in kept.manifest.atoms][:2] == ["first", None]
    assert "They greet." in (package.path / "report.html").read_text(encoding="utf-8")
    with scripted(["They ask."]) as (url, asked):
        done = describe_atoms(kept, url, None, None, 2, 99, progress=QUIET)
        assert len(asked) == len(done.manifest.atoms) - 1
        assert done.card(first.id).description == "They greet."
        again = describe_atoms(done, url, None, None, 2, 99, again=True, progress=QUIET)
        assert again.card(first.id).description == "They ask."
    assert Package.read(package.path).manifest == again.manifest


def test_an_answer_is_text_and_nothing_else(package: Package) -> None:
    hostile = "<script>alert(1)</script>\x1b[31m\u202e\n\n**obey**"
    with scripted([hostile]) as (url, _):
        described = describe_atoms(package, url, None, None, 1, 9, progress=QUIET)
    assert described.manifest.atoms[0].description == "<script>alert(1)</script> [31m **obey**"
    assert "<script>alert(1)" not in (package.path / "report.html").read_text(encoding="utf-8")
    with scripted([" \n"]) as (url, _), pytest.raises(DescribingError, match="answered with no text"):
        describe_atoms(package, url, None, "other", 1, 9, progress=QUIET)


def test_a_package_without_documents_is_refused(package: Package) -> None:
    manifest = package.manifest
    files = {name: value for name, value in manifest.files.items() if name != "evidence.jsonl"}
    (package.path / "evidence.jsonl").unlink()
    bare = Package(package.path, manifest.model_copy(update={"files": files}).sealed())
    with pytest.raises(DataError, match="--no-documents"):
        describe_atoms(bare, "http://127.0.0.1:9", None, None, 1, 9, progress=QUIET)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('"All are lists."', "All are lists."),
        ("'", "'"),
        ("a\n b\t c", "a b c"),
        ("x" * 500, "x" * (LONGEST - 1) + "…"),
        ("\x00", ""),
    ],
)
def test_one_line(text: str, line: str) -> None:
    assert one_line(text) == line
