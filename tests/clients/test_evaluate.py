"""`evaluate` and `sweep` from the command line on the tiny package, and once on the real model with the real engine."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest
from torch import nn

from atoms.engine import GenerationRequest, SamplingParams
from atoms.mix import Mix
from atoms.package import Package
from atoms.storage import sha256_file
from clients.harness import open_harness
from offline.evaluation.answers import Decoding
from offline.shipped import shipped_file
from server.embedded.load import EngineOptions, load_package
from server.embedded.packing import can_pack

Cli = Callable[..., tuple[int, str, str]]
FEW = ("--dev-prompts", 2, "--heldout-prompts", 3, "--kl-prompts", 2, "--coefficients", "1", "--max-tokens", 6,
       "--slots", 8, "--dtype", "float32", "--device", "cpu")  # fmt: skip


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_evaluate_reports_every_goal_and_leaves_the_package_alone(cli: Cli, package: Package, tmp_path: Path) -> None:
    before = package.manifest
    status, out, _ = cli(
        "evaluate", package.path, "--behaviours", "yes-no,fenced-code", "--out", tmp_path / "out", *FEW
    )
    assert status == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [(g["goal"]["behaviour"], g["goal"]["wanted"]) for g in result["goals"]] == [
        ("yes-no", "up"), ("yes-no", "down"), ("fenced-code", "up"), ("fenced-code", "down"),
    ]  # fmt: skip
    assert result["prompts"]["sha256"] == sha256_file(shipped_file("evaluation_prompts"))
    assert result["prompts"]["sha256"][:16] in out
    assert (result["decoding"]["temperature"], result["config"]["dev_samples"]) == (0.7, 3), (
        "sampled unless told otherwise"
    )
    rows = read_csv(tmp_path / "out" / "evaluation.csv")
    assert len(rows) == sum(len(g["conditions"]) for g in result["goals"]) >= 4
    assert all(row["n"] == "3" for row in rows)
    assert Package.read(package.path).manifest == before


def test_the_harness_runs_what_a_server_runs(package: Package, tmp_path: Path) -> None:
    """Packed weights where the CPU has them: the same answers, and an evaluation as fast as serving."""
    options = EngineOptions(dtype="float32", device="cpu", slots=2)
    served = load_package(package.path, options)
    sampling = SamplingParams(max_tokens=12, temperature=0.0)
    mixes = [Mix(), Mix.of({package.manifest.atoms[0].id: 2.0})]
    prompt = served.engine.encode_chat([{"role": "user", "content": "Name a river."}])
    expected = [
        g.token_ids for g in served.engine.generate([GenerationRequest("", prompt, m, sampling) for m in mixes])
    ]
    packs = can_pack(served.engine._batcher._model)
    served.engine.close()
    with open_harness(package, tmp_path, Decoding(12), options) as harness:
        answers = harness.answerer.answer(["Name a river."], mixes)
        weights = [module.weight.numel() for module in harness._steered.model.modules() if type(module) is nn.Linear]
    assert [row[0].token_ids for row in answers] == expected
    assert packs and not all(weights), "the weights are as they were loaded"


def test_evaluate_again_reads_its_answers(cli: Cli, package: Package, tmp_path: Path) -> None:
    order = ("evaluate", package.path, "--behaviours", "yes-no", "--out", tmp_path / "out", "--no-plots", *FEW)
    assert cli(*order)[0] == 0
    first = [(tmp_path / "out" / name).read_bytes() for name in ("answers.jsonl", "evaluation.json")]
    assert cli(*order)[0] == 0
    assert [(tmp_path / "out" / name).read_bytes() for name in ("answers.jsonl", "evaluation.json")] == first


def test_sampled_answers_come_from_the_engine_as_a_request_would_get_them(
    cli: Cli, package: Package, tmp_path: Path
) -> None:
    status, out, _ = cli("evaluate", package.path, "--behaviours", "yes-no", "--goals", "up", "--out", tmp_path / "out",
                         "--temperature", 0.8, "--top-p", 0.9, "--seed", 3, "--no-plots", *FEW)  # fmt: skip
    assert status == 0 and "answers temperature 0.8, top-p 0.9" in out
    decoding = {"max_tokens": 6, "temperature": 0.8, "top_p": 0.9, "seed": 3}
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["decoding"] == decoding
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    kept = next(answer for answer in answers if not answer["coefficients"])
    options = EngineOptions(dtype="float32", device="cpu", slots=8)
    with open_harness(package, tmp_path / "other", Decoding(**decoding), options) as harness:
        ((again,),) = harness.answerer.answer([kept["prompt"]], [Mix()])
    with open_harness(package, tmp_path / "greedy", Decoding(6), options) as harness:
        greedy = harness.answerer.answer(list(dict.fromkeys(a["prompt"] for a in answers)), [Mix()])[0]
    assert list(again.token_ids) == kept["token_ids"], "a seed makes a sampled answer repeatable"
    unsteered = {a["prompt"]: a["token_ids"] for a in answers if not a["coefficients"]}
    assert any(unsteered[a.prompt] != list(a.token_ids) for a in greedy if a.prompt in unsteered)


@pytest.mark.parametrize("command", ["evaluate", "sweep"])
def test_a_temperature_that_no_request_may_have_is_refused(
    cli: Cli, package: Package, tmp_path: Path, command: str
) -> None:
    given = ("--atoms", package.manifest.atoms[0].id, "--coefficients", "1") if command == "sweep" else ()
    status, _, error = cli(command, package.path, *given, "--temperature", 3, "--out", tmp_path / "out")
    assert status == 2 and "temperature is 3.0; it must be within 0 (greedy) and 2" in error
    assert not (tmp_path / "out").exists()


def test_a_killed_evaluation_goes_on(package: Package, tmp_path: Path) -> None:
    out = tmp_path / "out"
    order = [sys.executable, "-m", "clients.cli", "evaluate", package.path, "--behaviours", "yes-no,fenced-code", "--out", out,
             "--no-plots", *FEW, "--max-tokens", 8, "--heldout-prompts", 60]  # fmt: skip
    process = subprocess.Popen([str(part) for part in order], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    log = out / "answers.jsonl"
    while not (log.exists() and b"\n" in log.read_bytes()) and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    kept = [line for line in log.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]  # the last may be torn
    assert kept and not (out / "evaluation.json").exists()
    subprocess.run([str(part) for part in order], check=True, capture_output=True)
    whole = log.read_bytes().splitlines(keepends=True)
    assert whole[: len(kept)] == kept and len({json.loads(line)["key"] for line in whole}) == len(whole)
    assert (out / "evaluation.json").exists()


def test_sweep_writes_tables_and_figures(cli: Cli, package: Package, tmp_path: Path) -> None:
    a, b = (card.id for card in package.manifest.atoms[:2])
    texts = tmp_path / "prompts.txt"
    texts.write_text("Why is the sea salty?\n\nName a river.\n")
    status, out, _ = cli("sweep", package.path, "--atoms", f"{a},{b}", "--coefficients=-1,1", "--combine", "--mix", f"{a}=0.5",
                         "--texts", texts, "--detectors", "yes-no", "--max-tokens", 6, "--out", tmp_path / "out")  # fmt: skip
    mix = ",".join(sorted((f"{a}=-1", f"{b}=1")))  # a mix names its atoms in the order of their ids
    assert status == 0 and mix in out.replace("\n", "")
    rows = read_csv(tmp_path / "out" / "sweep.csv")
    assert rows[0]["mix"] == "unsteered" and len(rows) == 1 + 4 + 1
    assert all(row["n"] == "2" and float(row["perplexity"]) > 1 for row in rows)
    assert float(rows[0]["kl"]) == 0 and all(float(row["kl"]) > 0 for row in rows[1:])
    assert pyarrow.parquet.read_table(tmp_path / "out" / "sweep.parquet").num_rows == len(rows)
    figure = tmp_path / "out" / "heatmap-yes-no"
    assert (
        figure.with_suffix(".png").read_bytes()[:4] == b"\x89PNG" and "<svg" in figure.with_suffix(".svg").read_text()
    )


def test_a_line_sweep_draws_a_dose_response(cli: Cli, package: Package, tmp_path: Path) -> None:
    atom = package.manifest.atoms[0].id
    status, _, _ = cli("sweep", package.path, "--atoms", atom, "--coefficients", "1", "--limit", 2, "--max-tokens", 4,
                       "--out", tmp_path / "out")  # fmt: skip
    assert status == 0
    assert (tmp_path / "out" / f"dose-response-{atom}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("evaluate", "PKG", "--behaviours", "opera"), "opera"),
        (("evaluate", "PKG", "--coefficients", "-1"), "-1.0"),
        (("evaluate", "PKG", "--goals", "sideways"), "sideways"),
        (("evaluate", "PKG", "--temperature", "0", "--dev-samples", "3"), "dev_samples is 3"),
        (("evaluate", "PKG", "--dev-samples", "0", "--temperature", "1"), "dev_samples is 0"),
        (("evaluate", "PKG", "--data", "DATA", "--label", "yes-no"), "BEHAVIOUR=LABEL"),
        (("evaluate", "PKG", "--data", "absent.jsonl"), "absent.jsonl"),
        (("evaluate", "PKG", "--prompts", "absent.txt"), "absent.txt"),
        (("sweep", "PKG"), "--mix"),
        (("sweep", "PKG", "--atoms", "ATOM"), "--coefficients"),
        (("sweep", "PKG", "--mix", "nobody=1"), "nobody"),
        (("sweep", "PKG", "--mix", "ATOM=99"), "tested range"),
        (("sweep", "PKG", "--mix", "ATOM=1", "--texts", "absent.txt"), "absent.txt"),
        (("sweep", "PKG", "--mix", "ATOM=1", "--detectors", "opera"), "opera"),
        (("sweep", "PKG", "--mix", "ATOM=1", "--kind", "warm"), "no prompt"),
    ],
    ids=lambda value: "-".join(value[::2]) if isinstance(value, tuple) else "",
)
def test_bad_orders_end_with_status_2_and_the_value(
    cli: Cli, package: Package, tiny_data: Path, tmp_path: Path, arguments: tuple, named: str
) -> None:
    places = {"PKG": str(package.path), "DATA": str(tiny_data)}
    atom = package.manifest.atoms[0].id
    filled = [places.get(part, part.replace("ATOM", atom)) for part in arguments]
    status, _, err = cli(*filled, "--out", tmp_path / "out", "--quiet")
    assert status == 2 and "error: " in err and named in err and "Traceback" not in err
    assert not (tmp_path / "out" / "evaluation.json").exists() and not (tmp_path / "out" / "sweep.csv").exists()


def test_figures_without_matplotlib_are_refused_before_any_work(
    cli: Cli, package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offline.evaluation.figures.importlib.util.find_spec", lambda name: None)
    status, _, err = cli("evaluate", package.path, "--out", tmp_path / "out")
    assert status == 2 and "atomsteer[plots]" in err and "--no-plots" in err
    assert not (tmp_path / "out").exists()


def test_the_real_model_is_steered_measured_and_recorded(cli: Cli, real_package: Package, tmp_path: Path) -> None:
    """Real answers under atoms and under controls of the atom's measured KL, the supervised one among them; cards written."""
    shutil.copytree(real_package.path, tmp_path / "package")
    prompts = tmp_path / "prompts.jsonl"
    rows = [row for row in shipped_file("evaluation_prompts").read_text().splitlines()
            if json.loads(row)["behaviour"] == "yes-no" and json.loads(row)["kind"] == "inviting"]  # fmt: skip
    prompts.write_text("".join(row + "\n" for row in rows))
    status, _, _ = cli("evaluate", tmp_path / "package", "--prompts", prompts, "--goals", "down", "--out", tmp_path / "out",
                       "--data", shipped_file("demo_documents"), "--supervised-documents", 2, "--max-degenerate", 1, "--max-kl", 9,
                       "--write-cards", "--candidates", 9, "--temperature", 0, *FEW, "--coefficients", "3")  # fmt: skip
    assert status == 0
    (goal,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["goals"]
    assert goal["choice"], "not one of three atoms at ±3 moved one of two answers"
    by_name = {c["name"]: c for c in goal["conditions"]}
    assert set(by_name) == {"unsteered", "atom", "shuffled", "random-1", "random-documents-1", "supervised"}
    target = by_name.pop("atom")["kl"]
    assert target > 0.05 and by_name.pop("unsteered")["kl"] == 0
    assert all(abs(c["kl"] / target - 1) < 0.1 for c in by_name.values())
    card = Package.read(tmp_path / "package").card(goal["choice"]["atom"])
    assert [(e.detector, e.coefficient, e.n) for e in card.effects] == [("yes-no", goal["choice"]["coefficient"], 3)]
    assert (tmp_path / "out" / "dose-response.png").exists() and (tmp_path / "out" / "effects.svg").exists()
