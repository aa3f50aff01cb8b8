"""`atomsteer batch` on the real model: killed and resumed, against a server, and with lines that cannot be answered."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from atomsteer_client import Client
from pyarrow import parquet

from atoms.errors import ConfigError, DataError
from atoms.package import Package
from clients.batch import BatchConfig, run_batch
from clients.batch_lines import Defaults, read_lines
from clients.batch_results import CustomIds, open_results, read_answered
from server.embedded.load import EngineOptions

ADMIN_KEY = "admin-key-of-the-tests"
LINES = 210
NO_DEFAULTS = Defaults({})


def request(number: int, steering: dict | None = None) -> dict:
    body = {"prompt": f"{number}, {number + 1},", "max_tokens": 3, "temperature": 0}
    line = {"custom_id": f"r-{number}", "method": "POST", "url": "/v1/completions", "body": body}
    return line | ({"steering": steering} if steering else {})


def write(path: Path, lines: list) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def results(path: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines), "a custom_id is there twice"
    return {line["custom_id"]: line for line in lines}


def batch(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "clients.cli", "batch", *map(str, arguments), "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def texts(found: dict[str, dict]) -> dict[str, tuple]:
    return {
        name: (line["response"]["body"]["choices"][0]["text"], line["response"]["body"]["steering"]["mix"])
        for name, line in found.items()
    }


def kill_after(process: subprocess.Popen[str], out: Path, lines: int) -> None:
    """Kills with -9 once `out` has at least `lines` lines."""
    while process.poll() is None:
        if out.exists() and out.read_bytes().count(b"\n") >= lines:
            process.kill()
            break
        time.sleep(0.02)
    _, errors = process.communicate()
    assert process.returncode == -9, f"the run ended before it could be killed:\n{errors}"


def test_a_run_killed_twice_gives_what_an_unbroken_one_gives(
    named_package: Package, real_server: str, smol_path: Path, tmp_path: Path
) -> None:
    """The killed runs decode in their own process, the unbroken one on a server: both ways must agree too."""
    mixes = [None, {"atoms": {"numbered-list": 3}}, {"atoms": {"one-word": -3}}]
    source = write(tmp_path / "in.jsonl", [request(n, mixes[n % 3]) for n in range(LINES)])
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    local = (source, "--out", out, "--package", named_package.path, "--model", smol_path, "--dtype", "float32")
    kill_after(batch(*local), out, 40)
    with out.open("ab") as file:
        file.write(b'{"id": "batch_req_torn", "custom_id": "r-2')  # what a write that was cut short leaves
    kept = set(results_of_whole_lines(out))
    kill_after(batch(*local), out, 120)
    assert kept <= set(results_of_whole_lines(out)), "a resumed run lost lines"
    last = batch(*local)
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    unbroken = batch(source, "--out", whole, "--server", real_server)
    _, errors = unbroken.communicate()
    assert unbroken.returncode == 0, errors
    resumed = texts(results(out))
    assert set(resumed) == {f"r-{n}" for n in range(LINES)}
    assert resumed == texts(results(whole))
    assert len({mix for _, mix in resumed.values()}) == 3


def results_of_whole_lines(out: Path) -> list[str]:
    return [
        json.loads(line)["custom_id"] for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")
    ]


def test_lines_that_cannot_be_answered_say_why_and_can_be_tried_again(real_server: str, tmp_path: Path) -> None:
    lines = [request(0), "not json", request(2) | {"url": "/v1/images"}, request(3, {"atoms": {"nope": 1}}), "\n"]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    for arguments in ((), ("--retry-failed",)):
        process = batch(source, "--out", out, "--server", real_server, *arguments)
        printed, errors = process.communicate()
        assert process.returncode == 1 and "3 of them failed" in printed, errors
        found = results(out)
        assert {name: (line["error"] or {}).get("code") for name, line in found.items()} == {
            "r-0": None, "line-2": "invalid_line", "r-2": "invalid_line", "r-3": "atom_not_found",
        }  # fmt: skip
    assert found["r-3"]["response"]["status_code"] == 404 and "nope" in found["r-3"]["error"]["message"]
    before = out.read_bytes()
    again = batch(source, "--out", out, "--server", real_server)
    again.communicate()
    assert out.read_bytes() == before, "all lines were there: nothing may be added"
    changed = batch(source, "--out", out, "--server", real_server, "--mix", "one-word=1")
    assert "was begun with steering" in changed.communicate()[1] and changed.returncode == 2
    gone = batch(source, "--out", tmp_path / "x.jsonl", "--server", "http://127.0.0.1:9", "--max-retries", 0)
    assert "cannot be reached" in gone.communicate()[1] and gone.returncode == 2


def test_whoever_has_the_package_may_leave_tested_ranges(
    package: Package, tiny_model_dir: Path, tmp_path: Path
) -> None:
    card = package.manifest.atoms[0]
    atoms = {card.id: card.tested_range[1] + 1}
    lines = [request(0, {"atoms": atoms}), request(1, {"atoms": atoms, "allow_out_of_range": True})]
    source = write(tmp_path / "in.jsonl", lines)
    config = BatchConfig(source, tmp_path / "out.jsonl", NO_DEFAULTS, 2, quiet=True)
    options = EngineOptions(model=str(tiny_model_dir), device="cpu", dtype="float32", slots=2)
    assert run_batch(config, package=package.path, server=None, key=None, options=options).done == 2
    found = results(tmp_path / "out.jsonl")
    assert found["r-0"]["error"]["code"] == "invalid_coefficient"
    assert found["r-1"]["response"]["body"]["steering"]["atoms"] == atoms


def test_a_dry_run_counts_predicts_and_writes_nothing(named_package: Package, tmp_path: Path) -> None:
    source = write(tmp_path / "in.txt", ["Name a fruit.", "", "Name a tree."])
    process = batch(
        source, "--out", tmp_path / "out.jsonl", "--package", named_package.path, "--mix", "one-word=2", "--dry-run"
    )
    printed, errors = process.communicate()
    kl = named_package.predicted_kl(named_package.mix({"one-word": 2.0}))
    assert process.returncode == 0 and "2 lines: 0 answered, 2 to do" in printed and f"{kl:.4f}" in printed, errors
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_a_dry_run_tells_the_arms_of_an_experiments_units(
    named_package: Package, real_server: str, tmp_path: Path
) -> None:
    with Client(base_url=real_server, api_key=ADMIN_KEY) as client:
        arms = [{"name": name, "atoms": {"numbered-list": value}} for name, value in (("weak", 1), ("strong", 2))]
        client.experiments.create(name="dry", arms=arms)
        client.experiments.start("dry")
        body = {"messages": [], "steering": {"experiment": "dry"}}
        lines = [{"custom_id": f"u{n}", "body": body | {"user": f"u{n}"}} for n in range(40)]
        lines.append({"custom_id": "nobody", "body": body})
        source = write(tmp_path / "in.jsonl", lines)
        expected = Counter(
            client.steering.preview({"experiment": "dry"}, user=line["custom_id"]).arm for line in lines[:40]
        )
        process = batch(source, "--out", tmp_path / "out.jsonl", "--server", real_server, "--dry-run")
        printed, errors = process.communicate()
        client.experiments.stop("dry", "seen")
        client.experiments.delete("dry")
    assert process.returncode == 0, errors
    for arm, count in expected.items():
        kl = named_package.predicted_kl(named_package.mix({"numbered-list": {"weak": 1.0, "strong": 2.0}[arm]}))
        assert re.search(rf"{count} .*arm {arm} .*{kl:.4f}", printed), printed
    assert re.search(r"1 .*no arm .*refused: .*user", printed), "the line without a unit would be refused"


def test_prompts_are_read_from_every_format(tmp_path: Path) -> None:
    prompts = ["Name a fruit.", 'Say "a,\nb".']
    write(tmp_path / "a.jsonl", [{"question": prompt} for prompt in prompts])
    (tmp_path / "a.csv").write_text('question,n\nName a fruit.,1\n"Say ""a,\nb"".",2\n')
    parquet.write_table(pyarrow.table({"question": prompts}), tmp_path / "a.parquet")
    defaults = Defaults({"max_tokens": 5}, {"preset": "x"}, "question", "Be brief.")
    for suffix in ("jsonl", "csv", "parquet"):
        lines = list(read_lines(tmp_path / f"a.{suffix}", defaults))
        assert [line.body["messages"][1]["content"] for line in lines] == prompts, suffix
        assert lines[0].body["steering"] == {"preset": "x"} and lines[0].body["max_tokens"] == 5
        assert len({line.custom_id for line in lines}) == 2
    with pytest.raises(DataError, match=r"\.docx"):
        list(read_lines(tmp_path / "a.docx", NO_DEFAULTS))
    wrong = list(read_lines(tmp_path / "a.csv", NO_DEFAULTS))
    assert "--column" in str(wrong[0].error)


def test_results_of_others_are_not_touched(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious\n")
    with pytest.raises(ConfigError, match="choose another --out"), open_results(out, {}):
        pass
    with pytest.raises(DataError, match="not a batch result"):
        read_answered(out, CustomIds(), cut=True)
    assert out.read_text() == "precious\n"
    with open_results(tmp_path / "mine.jsonl", {}):
        with pytest.raises(ConfigError, match="another run is writing"), open_results(tmp_path / "mine.jsonl", {}):
            pass
