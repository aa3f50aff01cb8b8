"""`atomsteer attribute` on a package of the tiny model: one document or a file, for people or for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from atoms.package import Package
from clients.cli import main

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def attribute(
    tiny_package: Package, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`attribute("--text", …)`: exit status, standard output and standard error of the command."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: object) -> tuple[int, str, str]:
        command = ["atomsteer", "attribute", tiny_package.path, "--dtype", "float32", "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        with pytest.raises(SystemExit) as exit_status:
            main()
        output = capsys.readouterr()
        return int(exit_status.value.code or 0), output.out, output.err

    return run


def test_a_file_gives_one_json_line_a_document_with_the_documents_behind(
    attribute: Cli, tiny_package: Package, tiny_data: Path
) -> None:
    status, out, _ = attribute("--data", tiny_data, "--json", "--examples", "2", "--top", "3")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [line["id"] for line in lines] == [json.loads(row)["id"] for row in tiny_data.read_text().splitlines()]
    evidence = {line["atom"]: line["documents"] for line in tiny_package.evidence()}
    named = 0
    for line in lines:
        assert len(line["atoms"]) <= 3
        total = sum(atom["share"] for atom in line["atoms"]) + line["further_atoms"] + line["unexplained"]
        assert total == pytest.approx(1, abs=1e-4)
        for atom in line["atoms"]:
            behind = evidence[atom["atom"]][:2] if atom["atom"] else []
            assert atom["documents"] == [{"id": d["id"], "code": d["code"]} for d in behind]
            named += bool(behind)
    assert named > 10


def test_one_document_can_be_given_as_texts_or_as_a_chat(attribute: Cli) -> None:
    chat = [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": "Is water wet?"},
        {"role": "assistant", "content": "Yes."},
    ]
    texts = attribute("--system", "Answer.", "--prompt", "Is water wet?", "--text", "Yes.", "--json")
    messages = attribute("--messages", json.dumps(chat), "--json")
    assert texts[0] == messages[0] == 0
    as_text, as_chat = json.loads(texts[1]), json.loads(messages[1])
    assert as_text.pop("id") == "text" and as_chat.pop("id") == "messages"
    assert as_text == as_chat


def test_people_get_a_table(attribute: Cli, tiny_package: Package) -> None:
    status, out, err = attribute("--prompt", "Is water wet?", "--text", "Yes.")
    assert (status, err) == (0, "")
    assert "unexplained" in out and "%" in out and "loss" in out


def test_a_cut_prompt_is_said_on_standard_error(attribute: Cli) -> None:
    status, out, err = attribute("--prompt", "wet " * 400, "--text", "Yes.", "--json", "--max-length", "64")
    assert status == 0
    assert f"cut {json.loads(out)['truncated_prompt_tokens']} prompt tokens" in err


def test_markup_in_a_document_is_shown_as_it_is(attribute: Cli, tmp_path: Path) -> None:
    file = tmp_path / "odd.jsonl"
    file.write_text(json.dumps({"id": "[bold]x[/nope]", "prompt": "[red]", "response": "[/red] yes"}) + "\n")
    status, out, _ = attribute("--data", file)
    assert status == 0 and "[bold]x[/nope]" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--text"),
        (["--text", "a", "--messages", "[]"], "one way"),
        (["--prompt", "Is water wet?"], "--text"),
        (["--messages", "[]", "--prompt", "a"], "--prompt"),
        (["--text", " ", "--prompt", "Is water wet?"], "--text: the last message must be a non-empty assistant turn"),
        (["--messages", '[{"role": "user", "content": "Hi"}]'], "--messages: "),
        (["--messages", "{"], "no JSON"),
        (["--data", "absent.jsonl"], "absent.jsonl"),
        (["--text", "yes " * 900], "allow more with --max-length"),
        (["--text", "Yes.", "--max-length", "9999"], "context has 1024"),
    ],
    ids=[
        "nothing",
        "two ways",
        "only a prompt",
        "mixed",
        "empty",
        "no response",
        "no JSON",
        "no file",
        "long",
        "context",
    ],
)
def test_bad_input_ends_with_status_2_and_a_reason(attribute: Cli, arguments: list[str], named: str) -> None:
    status, out, err = attribute(*arguments)
    assert status == 2 and err.startswith("error: ") and named in err
    assert "{" not in out and "unexplained" not in out
