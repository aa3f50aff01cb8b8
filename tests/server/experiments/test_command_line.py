"""`atomsteer experiment`, `preset` and `db` against a server on a real socket."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import httpx
import pyarrow.parquet as pq
import pytest

from atoms.package import Package
from clients.cli import main
from clients.experiment_spec import Plan, arm_shares, arms, guardrails, metrics
from server.config import ServeConfig
from server.context import Traffic
from server.embedded.app import create_app
from server.embedded.scripted import ScriptedEngine
from server.embedded.serve import draining_server, reserve_port
from server.errors import ConflictError
from server.experiments.statistics import MIN_UNITS
from server.state import State

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`cli("experiment", "list")`: exit status, standard output, standard error of the command."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["atomsteer", *map(str, arguments)])
        capsys.readouterr()  # what the server in this process said
        with pytest.raises(SystemExit) as exit_status:
            main()
        output = capsys.readouterr()
        return int(exit_status.value.code or 0), output.out, output.err

    return run


@pytest.fixture
def url(
    package: Package, config: ServeConfig, engine: ScriptedEngine, sqlite_state: State, wait_for: Callable[..., bool],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:  # fmt: skip
    """A running server with keys, which the commands find through the environment."""
    locked, traffic = replace(config, api_keys=("client",), admin_keys=("boss",)), Traffic()
    app = create_app(package, engine, locked, traffic=traffic, state=sqlite_state)
    listener = reserve_port("127.0.0.1", 0)
    server = draining_server(app, engine, traffic, 5.0, "ready")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setenv("ATOMSTEER_SERVER", address)
    monkeypatch.setenv("ATOMSTEER_ADMIN_KEY", "boss")
    try:
        assert wait_for(lambda: server.started)
        yield address
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def ask(url: str, units: int, like: Callable[[str], float]) -> None:
    """One chat for each of `units` units, and thumbs by their arms, some at a time."""
    with httpx.Client(base_url=f"{url}/v1", headers={"Authorization": "Bearer client"}) as client:
        reports = []
        for n in range(units):
            body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "user": f"u{n}",
                    "steering": {"experiment": "tone"}}  # fmt: skip
            answer = client.post("/chat/completions", json=body).json()
            value = like(answer["steering"]["arm"])
            reports.append({"response_id": answer["id"], "metric": "thumbs", "value": value})
            if len(reports) == 10:
                assert client.post("/experiments/tone/outcomes", json={"outcomes": reports}).status_code == 200
                reports.clear()


def test_presets(cli: Cli, url: str, ids: list[str]) -> None:
    assert cli("preset", "set", "brief", "--mix", "list=1.5", "--description", "short [answers]")[:2] == (
        0, f"brief is at version 1: {ids[0]}=1.5\n",
    )  # fmt: skip
    status, out, _ = cli("preset", "list")
    assert status == 0
    assert re.search(rf"brief\s*│ 1\s*│ {ids[0]}=1.5\s*│ 0.11[23]\s*│ short \[answers\]", out)
    assert re.search(r"polite\s*│ fixed", out)
    assert json.loads(cli("preset", "list", "--json")[1])["data"][2]["name"] == "brief"
    assert cli("preset", "set", "brief", "--mix", "list=2", "--if-version", 7)[0] == 2
    assert cli("preset", "delete", "brief")[1] == "brief is deleted\n"
    status, _, error = cli("preset", "delete", "brief")
    assert (status, error) == (2, "error: preset 'brief' is not in the database (status 404)\n")


def test_an_experiment_from_plan_to_promotion(cli: Cli, url: str, ids: list[str], tmp_path: Path) -> None:
    status, out, _ = cli("experiment", "create", "tone", "--arm", "plain=", "--arm", "listed=list=2", "--arm", "nice=@polite",
                         "--metric", "thumbs:proportion", "--guardrail", "error<0.5", "--horizon", 300, "--start")  # fmt: skip
    assert status == 0, out
    assert "tone: running" in out and "plain (control)" in out and f"{ids[0]}=2" in out
    ask(url, 160, lambda arm: float(arm == "listed"))

    page, first = tmp_path / "report.html", cli("experiment", "report", "tone")
    assert "thumbs: listed is better: +1 [" in first[1]
    assert re.search(r"thumbs \(primary\)", first[1])
    assert re.search(r"error\s*│ listed\s*│ 0.5\s*│ 0\s*│ .*│ holds", first[1])
    report = json.loads(cli("experiment", "report", "tone", "--json", "--html", page, "--looks", 8)[1])
    assert sum(report["units"].values()) == 160
    check_page(page.read_text(), report)

    assert "coverage 50%" in cli("experiment", "ramp", "tone", 0.5)[1]
    assert "tone: stopped (clear enough)" in cli("experiment", "stop", "tone", "--reason", "clear enough")[1]
    assert cli("experiment", "promote", "tone", "listed", "winner")[1] == f"winner is at version 1: {ids[0]}=2\n"
    assert re.search(r"tone\s*│ stopped", cli("experiment", "list")[1])
    assert json.loads(cli("experiment", "status", "tone", "--json")[1])["stop_reason"] == "clear enough"

    assert cli("experiment", "export", "tone", "--out", tmp_path / "data")[0] == 0
    reported = pq.read_table(tmp_path / "data" / "tone-outcomes.parquet").to_pylist()
    assert sum(row["metric"] == "thumbs" for row in reported) == 160
    assert re.fullmatch(r"[34] records of u1 are deleted\n", cli("experiment", "forget", "u1")[1])
    assert cli("experiment", "delete", "tone")[1] == "tone is deleted\n"


def check_page(page: str, report: dict) -> None:
    """Well formed, nothing from outside, the plots there, and every interval of the report within its drawing."""
    for outside in ("http:", "https:", "<script", "@import", "url("):
        assert outside not in page
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    plots = {svg.attrib["aria-label"]: svg for svg in map(ElementTree.fromstring, drawings)}
    forest = plots["Differences of thumbs to the control with intervals"]
    bars = [line for line in forest.iter("line") if "stroke" in line.attrib]
    differences = report["metrics"][0]["differences"]
    assert len(bars) == len(differences) == 2
    zero = next(float(line.attrib["x1"]) for line in forest.iter("line") if line.attrib.get("class") == "zero")
    for bar, found in zip(bars, differences, strict=True):
        left, right = float(bar.attrib["x1"]), float(bar.attrib["x2"])
        assert 150 <= left < right <= 740
        assert (left > zero) == (found["low"] > 0) and (right < zero) == (found["high"] < 0)
    assert any("against units" in label for label in plots), "the plot over time is missing"


def test_a_spec_from_a_file(cli: Cli, url: str, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({"arms": [{"name": "a", "atoms": {}}], "holdout": 0.5, "unit": "header:X-User"}))
    created = json.loads(cli("experiment", "create", "tone", "--file", file, "--json")[1])
    assert (created["status"], created["control"], created["unit"]) == ("draft", "holdout", "header:X-User")
    file.write_text("[")
    assert cli("experiment", "create", "tone", "--file", file)[0] == 2
    started = cli("experiment", "start", "tone")
    assert started[0] == 0 and "tone: running" in started[1]


def test_a_start_that_fails_says_that_a_draft_is_left(
    cli: Cli, url: str, sqlite_state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object) -> None:
        raise ConflictError("the draft was replaced meanwhile")

    monkeypatch.setattr(sqlite_state.experiments, "start", start)
    status, _, error = cli("experiment", "create", "tone", "--arm", "a=", "--arm", "b=list=1", "--start")
    assert status == 2 and "replaced meanwhile" in error and "'tone' is a draft now" in error
    assert "tone: draft" in cli("experiment", "status", "tone")[1]


def test_a_server_that_is_away_or_another_is_said(cli: Cli, url: str, unused_tcp_port: int) -> None:
    status, _, error = cli("experiment", "list", "--server", f"http://127.0.0.1:{unused_tcp_port}")
    assert status == 2 and "cannot be reached" in error
    status, _, error = cli("experiment", "list", "--key", "client")
    assert status == 2 and "admin key" in error
    assert "not JSON" in cli("experiment", "list", "--server", f"{url}/metrics?x=")[2]


def test_plan(cli: Cli) -> None:
    planned = Plan(arm_shares(3, None), 0.8, 0.05, rate=0.3)
    status, out, _ = cli("experiment", "plan", "--rate", 0.3, "--effect", 0.1, "--arms", 3)
    units = planned.units(0.1)
    assert status == 0 and out.startswith(f"{units} units in all ({-(-units // 3)} in the smallest arm)")
    assert units > Plan(arm_shares(2, None), 0.8, 0.05, rate=0.3).units(0.1)
    assert planned.effect(units) == pytest.approx(0.1, rel=0.01), "both directions are one relation"
    status, out, _ = cli("experiment", "plan", "--rate", 0.3, "--units", units, "--arms", 3)
    assert status == 0 and re.search(r"a difference of 0.(1|09999) or more", out)
    uneven = Plan(arm_shares(None, "1, 4.5, 4.5"), 0.8, 0.05, deviation=2.0)
    assert uneven.shares == pytest.approx((0.1, 0.45, 0.45))
    assert uneven.units(0.5) > Plan(arm_shares(3, None), 0.8, 0.05, deviation=2.0).units(0.5)
    assert Plan((0.5, 0.5), 0.8, 0.05, deviation=1.0).units(1e3) == 2 * MIN_UNITS, "fewer have no interval"


@pytest.mark.parametrize(("options", "words"), [
    (("--effect", 0.1), "--rate"), (("--rate", 0.3, "--deviation", 1, "--effect", 1), "--rate"),
    (("--rate", 0.3, "--effect", 0.9), "rates lie between 0 and 1"), (("--deviation", 1, "--effect", 0), "effect is 0"),
    (("--rate", 0.3, "--effect", 0.1, "--power", 1), "power is 1"), (("--rate", 0.3), "--effect"),
    (("--rate", 0.3, "--effect", 0.1, "--units", 100), "--units"), (("--rate", 0.3, "--units", 59), "fewer than 30"),
    (("--rate", 0.9, "--units", 60), "plan more units"), (("--deviation", "inf", "--effect", 1), "deviation is inf"),
    (("--rate", 0.3, "--effect", 0.1, "--shares", "1,0"), "--shares '1,0'"),
    (("--rate", 0.3, "--effect", 0.1, "--shares", "1,1", "--arms", 2), "one of them"),
])  # fmt: skip
def test_plans_that_cannot_be_made_say_why(cli: Cli, options: tuple, words: str) -> None:
    status, _, error = cli("experiment", "plan", *options)
    assert status == 2 and words in " ".join(error.replace("│", "").split()) and "Traceback" not in error, error


def test_short_forms() -> None:
    assert arms(["a=", "b=x=1,y=-2", "c=@brief"]) == [
        {"name": "a", "atoms": {}}, {"name": "b", "atoms": {"x": 1.0, "y": -2.0}}, {"name": "c", "preset": "brief"},
    ]  # fmt: skip
    assert metrics(["a", "b:proportion:zero", "c:decrease"]) == [
        {"name": "a"}, {"name": "b", "kind": "proportion", "missing": "zero"}, {"name": "c", "goal": "decrease"},
    ]  # fmt: skip
    assert guardrails(["error<0.1", "latency_seconds < +0.5", "detector:json<1e-2"]) == [
        {"metric": "error", "max": 0.1}, {"metric": "latency_seconds", "max_increase": 0.5},
        {"metric": "detector:json", "max": 0.01},
    ]  # fmt: skip


def test_weights_and_the_other_fields_of_a_spec(cli: Cli, url: str) -> None:
    created = json.loads(cli("experiment", "create", "tone", "--arm", "a=", "--arm", "b=list=1", "--weight", "b=3", "--alpha",
                             0.1, "--seed", "s", "--missing-unit", "outside", "--json")[1])  # fmt: skip
    assert [arm["share"] for arm in created["arms"]] == [0.25, 0.75], "weights are relative: they need not add up to 1"
    assert (created["alpha"], created["seed"], created["missing_unit"]) == (0.1, "s", "outside")


def test_what_a_file_would_win_over_is_refused(cli: Cli, url: str, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({"arms": [{"name": "a", "atoms": {}}, {"name": "b", "atoms": {"list": 1}}]}))
    for option in (("--arm", "c="), ("--holdout", 0.0), ("--horizon", 2000), ("--alpha", 0.1)):
        status, _, error = cli("experiment", "create", "tone", "--file", file, *option)
        assert status == 2 and option[0] in error, option
    status, _, error = cli("experiment", "report", "tone", "--looks", 3)
    assert status == 2 and "--html" in error
    assert cli("experiment", "list")[1].count("tone") == 0


def test_what_cannot_be_sent_is_said_without_a_traceback(cli: Cli, url: str, tmp_path: Path) -> None:
    """JSON has no nan, and headers carry ASCII."""
    for arguments, words in (
        (("create", "tone", "--arm", "a=", "--arm", "b=list=nan"), "no finite coefficient"),
        (("create", "tone", "--arm", "a=", "--arm", "b=list=1", "--holdout", "nan"), "finite"),
        (("ramp", "tone", "inf"), "finite"),
        (("list", "--key", "clé"), "not ASCII"), (("list", "--key", "a\nb"), "blanks"),
    ):  # fmt: skip
        status, _, error = cli("experiment", *arguments)
        assert status == 2 and words in error, (arguments, error)
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({"name": "other", "arms": [{"name": "a", "atoms": {}}], "holdout": 0.5}))
    status, _, error = cli("experiment", "create", "tone", "--file", file)
    assert status == 2 and "'other', not of 'tone'" in error
    assert cli("experiment", "forget", "..")[1].startswith("0 records of .."), "a unit may be called so"


def test_a_report_without_any_unit(cli: Cli, url: str, tmp_path: Path) -> None:
    """Of a draft, and of one that has just been started: nothing is known, and that is what all forms say."""
    cli("experiment", "create", "tone", "--arm", "a=", "--arm", "b=list=1", "--metric", "thumbs:proportion", "--metric",
        "spent:zero", "--guardrail", "error<0.1", "--guardrail", "tokens<+5")  # fmt: skip
    for state in ("draft", "running"):
        page = tmp_path / f"{state}.html"
        status, out, error = cli("experiment", "report", "tone", "--html", page)
        assert status == 0, error
        assert f"tone, {state}" in out and "0 units: a 0, b 0." in out and "thumbs: b has fewer than 30 units." in out
        assert "ALARM" not in out and "no data" in out and "holds" in out
        assert "fewer than 30 units" in page.read_text() and "NaN" not in page.read_text()
        found = json.loads(cli("experiment", "report", "tone", "--json", "--looks", 2)[1])
        assert found["sample_ratio"] == {"p_value": None, "alarm": False}
        assert [look["units"] for look in found["looks"]] == ([] if state == "draft" else [0, 0])
        cli("experiment", "start", "tone")
    for table in ("exposures", "responses", "outcomes"):
        assert cli("experiment", "export", "tone", "--out", tmp_path)[0] == 0
        assert pq.read_table(tmp_path / f"tone-{table}.parquet").num_rows == 0


@pytest.mark.parametrize("arguments", [("--arm", "a"), ("--arm", "a=", "--arm", "a=x=1"), ("--arm", "a=", "--weight", "b=1"),
                                       ("--arm", "a=", "--weight", "a=many"), ("--metric", "a:median"), ("--guardrail", "error>1"),
                                       ("--guardrail", "error<."), ("--arm", "a=x")])  # fmt: skip
def test_bad_short_forms_are_refused(cli: Cli, arguments: tuple[str, str]) -> None:
    status, _, error = cli("experiment", "create", "x", *arguments)
    assert status == 2 and "Traceback" not in error


def test_db_upgrade(cli: Cli, new_postgresql: str, tmp_path: Path) -> None:
    for url in (new_postgresql, f"sqlite:///{tmp_path}/a.db"):
        assert "came from nothing" in cli("db", "upgrade", "--database", url)[1]
        assert "has been there already" in cli("db", "upgrade", "--database", url)[1]
    assert cli("db", "upgrade", "--database", "mysql://x/y")[0] == 2
