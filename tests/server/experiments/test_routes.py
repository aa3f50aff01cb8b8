"""Experiments from draft to promotion through the routes, on both kinds of database."""

from __future__ import annotations

import asyncio
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest
from httpx import AsyncClient
from sqlalchemy import select

from atoms.mix import Mix
from atoms.package import Package
from server import state as state_module
from server.config import ServeConfig
from server.embedded.scripted import ScriptedEngine
from server.experiments.measures import EXPRESSIONS
from server.experiments.recording import Choice, FinishedResponse
from server.experiments.spec import AUTOMATIC, MEASURED_KL, Arm, Assignment, ExperimentSpec
from server.state import State
from server.steering import Steering
from server.store.schema import open_database
from server.store.tables import exposures, responses

Body = dict[str, Any]
Call = Callable[..., Any]


def settle(state: State) -> None:
    """Waits until all that was observed so far is stored."""
    state.recorder.erase("nobody at all").result(10)


async def test_a_life(admin: AsyncClient, client: AsyncClient, spec: Body, call: Call, ask: Call, ids: list[str],
                      state: State) -> None:  # fmt: skip
    draft = await call(admin, "POST", "experiments", spec, 201)
    assert (draft["status"], draft["control"], draft["seed"], draft["primary"]) == ("draft", "plain", "tone", "thumbs")
    assert [arm["atoms"] for arm in draft["arms"]] == [{}, {ids[0]: 2.0}, {ids[0]: -1.0, ids[1]: 1.0}]
    assert [arm["share"] for arm in draft["arms"]] == pytest.approx([1 / 3] * 3)
    await ask("u", 409)

    started = await call(admin, "POST", "experiments/tone/start", {})
    assert started["status"] == "running"
    arms: dict[str, str] = {}
    for n in range(60):
        answer = await ask(f"u{n}")
        arms[f"u{n}"] = answer["steering"]["arm"]
        expected = next(arm for arm in started["arms"] if arm["name"] == answer["steering"]["arm"])
        assert answer["steering"] | {"scaled_by": 0} == {
            "mix": expected["mix"], "atoms": expected["atoms"], "predicted_kl": expected["predicted_kl"], "scaled_by": 0,
            "preset": expected["preset"], "experiment": "tone", "arm": expected["name"], "phase": "all",
        }  # fmt: skip
        if n < 20:
            outcome = {"response_id": answer["id"], "metric": "thumbs", "value": arms[f"u{n}"] == "listed"}
            stored = await call(client, "POST", "experiments/tone/outcomes", outcome)
            assert stored == {"object": "experiment.outcomes", "stored": 1, "unknown_responses": []}
    assert (await ask("u3"))["steering"]["arm"] == arms["u3"], "sticky"
    assert set(arms.values()) == {"plain", "listed", "nice"}

    settle(state)
    report = await call(admin, "GET", "experiments/tone/report?looks=3")
    assert report["units"] == dict(Counter(arms.values()))
    assert report["sample_ratio"]["alarm"] is False
    thumbs, spent = report["metrics"][:2]
    assert (thumbs["name"], thumbs["primary"], thumbs["goal"]) == ("thumbs", True, "increase")
    rated = Counter(arms[f"u{n}"] for n in range(20))
    assert {arm["arm"]: (arm["units"], arm["mean"]) for arm in thumbs["arms"]} == {
        name: (rated[name], float(name == "listed")) for name in rated
    }
    assert {arm["arm"]: (arm["units"], arm["mean"]) for arm in spent["arms"]} == {
        name: (count, 0.0) for name, count in Counter(arms.values()).items()
    }
    assert {d["verdict"] for d in thumbs["differences"]} == {"fewer than 30 units"}
    tokens = next(metric for metric in report["metrics"] if metric["name"] == "tokens")
    assert {arm["mean"] for arm in tokens["arms"]} == {3.0}
    assert len(report["looks"]) == 3 and report["looks"][-1]["units"] == 60
    assert [event["kind"] for event in report["history"]] == ["created", "started"]

    stopped = await call(admin, "POST", "experiments/tone/stop", {"reason": "seen enough"})
    assert (stopped["status"], stopped["stop_reason"]) == ("stopped", "seen enough")
    after = await ask("u3")
    assert (after["steering"]["arm"], after["steering"]["atoms"]) == (None, {}), "the control's mix for all"

    promoted = await call(admin, "POST", "experiments/tone/promote", {"arm": "listed", "preset": "winner"})
    assert (promoted["name"], promoted["atoms"], promoted["version"]) == ("winner", {ids[0]: 2.0}, 1)
    by_preset = await call(client, "POST", "steering/preview", {"model": "demo:winner"})
    assert by_preset["steering"]["atoms"] == {ids[0]: 2.0}
    history = (await call(admin, "GET", "experiments/tone/report"))["history"]
    assert [event["kind"] for event in history] == ["created", "started", "stopped", "promoted"]
    assert (await call(admin, "DELETE", "experiments/tone"))["deleted"] is True
    await ask("u3", 404)


async def test_the_arm_is_in_the_header_and_the_metrics(running: Body, client: AsyncClient, call: Call) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "user": "u1",
            "steering": {"experiment": "tone"}}  # fmt: skip
    response = await client.post("/v1/chat/completions", json=body)
    arm = response.json()["steering"]["arm"]
    assert response.headers["X-Atomsteer-Arm"] == arm
    text = (await client.get("/metrics")).text
    assert f'arm="{arm}",experiment="tone"' in text
    assert "atomsteer_experiment_records_waiting" in text
    assert "atomsteer_experiment_records_lost_total 0.0" in text


async def test_replicas_agree_on_every_unit(
    package: Package, config: ServeConfig, running: Body, state_of: Callable[[str], State], database_url: str
) -> None:
    from server.experiments.spec import Subject

    def arms_on(state: State) -> list[str | None]:
        steering = Steering.of(package, config, lambda: state.snapshot)
        return [steering.resolve({"experiment": "tone"}, subject=Subject(user=f"u{n}")).arm for n in range(300)]

    first, second = state_of(database_url), state_of(database_url)
    assert arms_on(first) == arms_on(second)


async def test_units_come_from_where_the_experiment_says(admin: AsyncClient, client: AsyncClient, spec: Body, call: Call,
                                                         ask: Call) -> None:  # fmt: skip
    for name, unit in (("by-header", "header:X-Account"), ("by-key", "metadata:account")):
        await call(admin, "POST", "experiments", spec | {"name": name, "unit": unit, "seed": "same"}, 201)
        await call(admin, "POST", f"experiments/{name}/start", {})
    assert (await ask(None, 400, "by-key"))["error"]["param"] == "metadata.account"
    assert (await ask("u", 400, "by-header"))["error"]["code"] == "missing_unit"
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "steering": {"experiment": "by-header"}}
    for name, sent in (
        ("acme", b"acme"),
        ("José", "José".encode()),
        ("日本", "日本".encode()),
        ("José", "José".encode("latin-1")),
    ):
        by_key = await ask("u", experiment="by-key", metadata={"account": name})
        by_header = await client.post("/v1/chat/completions", json=body, headers=[(b"x-account", sent)])
        assert by_header.json()["steering"]["arm"] == by_key["steering"]["arm"]
        assert (await call(admin, "DELETE", f"units/{quote(name)}"))["rows"] == 4, "one name, however it came"
    for bad in ("x" * 257, "a\nb"):
        assert (await ask("u", 400, "by-key", metadata={"account": bad}))["error"]["param"] == "metadata.account"


async def test_without_a_unit_only_if_the_experiment_says_so(
    admin: AsyncClient, spec: Body, call: Call, ask: Call, state: State
) -> None:
    for missing, status in (("error", 400), ("outside", 200)):
        await call(admin, "POST", "experiments", spec | {"name": missing, "missing_unit": missing}, 201)
        await call(admin, "POST", f"experiments/{missing}/start", {})
        for nobody in (None, ""):
            answer = await ask(nobody, status, missing)
    assert (answer["steering"]["arm"], answer["steering"]["experiment"]) == (None, "outside")
    settle(state)
    with state.database.read() as connection:
        assert connection.execute(select(exposures)).all() == []


async def test_outside_the_coverage_nothing_is_recorded_and_a_ramp_keeps_arms(
    admin: AsyncClient, spec: Body, call: Call, ask: Call, state: State
) -> None:
    await call(admin, "POST", "experiments", spec | {"coverage": 0.3}, 201)
    await call(admin, "POST", "experiments/tone/start", {})
    before = {f"u{n}": (await ask(f"u{n}"))["steering"]["arm"] for n in range(80)}
    inside = {unit: arm for unit, arm in before.items() if arm}
    assert 10 <= len(inside) <= 40
    settle(state)
    report = await call(admin, "GET", "experiments/tone/report")
    assert sum(report["units"].values()) == len(inside)
    ramped = await call(admin, "POST", "experiments/tone/ramp", {"coverage": 1})
    assert ramped["coverage"] == 1
    after = {unit: (await ask(unit))["steering"]["arm"] for unit in before}
    assert None not in after.values()
    assert {unit: after[unit] for unit in inside} == inside


async def test_the_holdout_gets_the_default_mix_and_is_the_control(
    client_of: Callable[..., AsyncClient],
    locked: ServeConfig,
    spec: Body,
    call: Call,
    sqlite_state: State,
    ids: list[str],
) -> None:
    admin = client_of(replace(locked, default_mix="formal=0.5"), "boss", sqlite_state)
    created = await call(admin, "POST", "experiments", spec | {"holdout": 0.4}, 201)
    assert created["control"] == "holdout"
    assert created["arms"][-1] | {"mix": "", "range": []} == {
        "name": "holdout", "share": 0.4, "atoms": {ids[1]: 0.5}, "preset": None, "preset_version": None,
        "predicted_kl": 0.0125, "mix": "", "range": [],
    }  # fmt: skip
    assert sum(arm["share"] for arm in created["arms"]) == pytest.approx(1)


async def test_a_running_experiment_is_immutable(running: Body, admin: AsyncClient, spec: Body, call: Call) -> None:
    for method, path, body in (
        ("PUT", "tone", spec), ("DELETE", "tone", None), ("POST", "tone/start", {}),
    ):  # fmt: skip
        assert (await call(admin, method, f"experiments/{path}", body, 409))["error"]["code"] == "conflict"
    await call(admin, "POST", "experiments", spec, 409)
    assert await call(admin, "GET", "experiments/tone") == running


async def test_an_arm_of_a_preset_keeps_the_version_it_was_started_with(
    admin: AsyncClient, spec: Body, call: Call, ids: list[str]
) -> None:
    await call(admin, "PUT", "presets/brief", {"atoms": {"list": 1}})
    arms = [{"name": "off", "atoms": {}}, {"name": "brief", "preset": "brief"}]
    await call(admin, "POST", "experiments", spec | {"arms": arms}, 201)
    await call(admin, "PUT", "presets/brief", {"atoms": {"list": 2}})
    started = await call(admin, "POST", "experiments/tone/start", {})
    assert (started["arms"][1]["atoms"], started["arms"][1]["preset_version"]) == ({ids[0]: 2.0}, 2)
    await call(admin, "PUT", "presets/brief", {"atoms": {"list": 3}})
    assert (await call(admin, "GET", "experiments/tone"))["arms"][1]["atoms"] == {ids[0]: 2.0}


async def test_arms_are_frozen_to_presets_as_another_replica_has_just_left_them(
    admin: AsyncClient, spec: Body, call: Call, ids: list[str], state_of: Callable[[str], State], database_url: str
) -> None:
    other = state_of(database_url).presets
    arms = [{"name": "off", "atoms": {}}, {"name": "brief", "preset": "brief"}]

    def frozen(experiment: Body) -> tuple[Body, int]:
        return experiment["arms"][1]["atoms"], experiment["arms"][1]["preset_version"]

    other.put("brief", Mix.of({ids[0]: 1.0}), "", "1.0")
    assert frozen(await call(admin, "POST", "experiments", spec | {"arms": arms}, 201)) == ({ids[0]: 1.0}, 1)
    other.put("brief", Mix.of({ids[0]: 2.0}), "", "1.0")
    assert frozen(await call(admin, "PUT", "experiments/tone", spec | {"arms": arms})) == ({ids[0]: 2.0}, 2)
    other.put("brief", Mix.of({ids[0]: 3.0}), "", "1.0")
    assert frozen(await call(admin, "POST", "experiments/tone/start", {})) == ({ids[0]: 3.0}, 3)


async def test_a_draft_can_be_replaced(admin: AsyncClient, spec: Body, call: Call) -> None:
    await call(admin, "POST", "experiments", spec, 201)
    changed = await call(admin, "PUT", "experiments/tone", spec | {"coverage": 0.5, "description": "half"})
    assert (changed["coverage"], changed["description"]) == (0.5, "half")
    assert (await call(admin, "PUT", "experiments/tone", spec | {"name": "x"}, 400))["error"]["param"] == "name"


BAD_SPECS: list[tuple[Body, int, str | None]] = [
    ({"name": "a b"}, 400, "name"),
    ({"arms": []}, 400, "arms"),
    ({"arms": [{"name": "a", "atoms": {}}]}, 400, None),
    ({"arms": [{"name": "a", "atoms": {}}, {"name": "a", "atoms": {}}]}, 400, None),
    ({"arms": [{"name": "a"}, {"name": "b", "atoms": {}}]}, 400, "arms[0]"),
    ({"arms": [{"name": "a", "atoms": {}, "preset": "polite"}, {"name": "b", "atoms": {}}]}, 400, "arms[0]"),
    ({"arms": [{"name": "a", "atoms": {}}, {"name": "holdout", "atoms": {}}]}, 400, None),
    ({"arms": [{"name": "a", "atoms": {}}, {"name": "b", "atoms": {"lits": 1}}]}, 404, "arms[1].atoms.lits"),
    ({"arms": [{"name": "a", "atoms": {}}, {"name": "b", "atoms": {"list": 4}}]}, 400, "arms[1].atoms.list"),
    ({"arms": [{"name": "a", "atoms": {}}, {"name": "b", "atoms": {"list": "2"}}]}, 400, "arms[1].atoms.list"),
    ({"arms": [{"name": "a", "atoms": {}}, {"name": "b", "preset": "rude"}]}, 404, "arms[1].preset"),
    ({"arms": [{"name": "a", "atoms": {}, "weight": 0}, {"name": "b", "atoms": {}}]}, 400, "arms[0].weight"),
    ({"max_kl": 0.1}, 400, "arms[1]"),
    ({"control": "c"}, 400, None),
    ({"coverage": 0}, 400, "coverage"),
    ({"coverage": True}, 400, "coverage"),
    ({"holdout": 1}, 400, "holdout"),
    ({"unit": "cookie"}, 400, "unit"),
    ({"metrics": [{"name": "tokens"}]}, 400, None),
    ({"metrics": [{"name": "a", "kind": "median"}]}, 400, "metrics[0].kind"),
    ({"primary": "speed"}, 400, None),
    ({"guardrails": [{"metric": "speed", "max": 1}]}, 400, None),
    ({"guardrails": [{"metric": "error"}]}, 400, "guardrails[0]"),
    ({"alpha": 0}, 400, "alpha"),
    ({"horizon": 2.5}, 400, "horizon"),
    ({"traffic": 0.1}, 400, "traffic"),
]


async def test_bad_specs_are_refused_by_field(
    client_of: Callable[..., AsyncClient], locked: ServeConfig, sqlite_state: State, spec: Body, call: Call
) -> None:
    admin = client_of(locked, "boss", sqlite_state)
    for change, status, param in BAD_SPECS:
        error = (await call(admin, "POST", "experiments", spec | change, status))["error"]
        assert error["param"] == param, (change, error)
    assert (await call(admin, "GET", "experiments"))["data"] == []


async def test_only_outcomes_are_open_to_clients(running: Body, client: AsyncClient, call: Call, ask: Call) -> None:
    for method, path, body in (
        ("POST", "experiments", {}), ("GET", "experiments", None), ("GET", "experiments/tone", None),
        ("PUT", "experiments/tone", {}), ("DELETE", "experiments/tone", None), ("POST", "experiments/tone/start", {}),
        ("POST", "experiments/tone/ramp", {}), ("POST", "experiments/tone/stop", {}),
        ("POST", "experiments/tone/promote", {}), ("GET", "experiments/tone/report", None),
        ("GET", "experiments/tone/export", None), ("DELETE", "units/u1", None),
    ):  # fmt: skip
        assert (await call(client, method, path, body, 403))["error"]["code"] == "admin_key_required"
    answer = await ask("u1")
    outcome = {"response_id": answer["id"], "metric": "thumbs", "value": 1}
    await call(client, "POST", "experiments/tone/outcomes", outcome)


async def test_outcomes_count_once_and_the_last_holds(
    running: Body, admin: AsyncClient, client: AsyncClient, call: Call, ask: Call
) -> None:
    ids = [(await ask(f"u{n}"))["id"] for n in range(3)]
    many = [{"response_id": answer, "metric": "spent", "value": 2.0} for answer in ids]
    for _ in range(3):
        sent = await call(client, "POST", "experiments/tone/outcomes", {"outcomes": many})
        assert sent["stored"] == 3
    many += [{"response_id": "chatcmpl-x", "metric": "spent", "value": 1}]
    many[0] = many[0] | {"value": 5.0}
    sent = await call(client, "POST", "experiments/tone/outcomes", {"outcomes": many})
    assert sent == {"object": "experiment.outcomes", "stored": 3, "unknown_responses": ["chatcmpl-x"]}
    spent = (await call(admin, "GET", "experiments/tone/report"))["metrics"][1]
    assert sum(arm["units"] * (arm["mean"] or 0) for arm in spent["arms"]) == pytest.approx(9.0)


BAD_OUTCOMES: list[tuple[Body, int, str]] = [
    ({"response_id": "nope", "metric": "thumbs", "value": 1}, 404, "response_id"),
    ({"response_id": "x", "metric": "thumb", "value": 1}, 400, "metric"),
    ({"response_id": "x", "metric": "tokens", "value": 1}, 400, "metric"),
    ({"response_id": "x", "metric": "thumbs", "value": 1.5}, 400, "outcomes[0].value"),
    ({"response_id": "x", "metric": "spent", "value": 1e13}, 400, "outcomes[0].value"),
    ({"response_id": "", "metric": "thumbs", "value": 1}, 400, "response_id"),
    ({"response_id": "a\u0000", "metric": "thumbs", "value": 1}, 400, "outcomes[0].response_id"),
    ({"response_id": "x", "metric": "thumbs"}, 400, "value"),
    ({"outcomes": []}, 400, "outcomes"),
]


async def test_bad_outcomes_are_refused(running: Body, client: AsyncClient, call: Call) -> None:
    for outcome, status, param in BAD_OUTCOMES:
        error = (await call(client, "POST", "experiments/tone/outcomes", outcome, status))["error"]
        assert error["param"] == param, (outcome, error)


async def test_streams_several_choices_and_failures_are_observed(
    running: Body, client: AsyncClient, ask: Call, engine: ScriptedEngine, state: State
) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "user": "s", "stream": True,
            "steering": {"experiment": "tone"}, "n": 2, "max_tokens": 2}  # fmt: skip
    text = (await client.post("/v1/chat/completions", json=body)).text
    assert text.endswith("data: [DONE]\n\n")
    engine.script = "one <break> two"
    await ask("s", 500)
    engine.max_model_len = 1
    await ask("s", 400)  # the client's fault
    settle(state)
    with state.database.read() as connection:
        rows = connection.execute(select(responses).order_by(responses.c.at, responses.c.choice)).mappings().all()
    seen = [(row["status"], row["choice"], row["finish_reason"], row["tokens"], row["characters"]) for row in rows]
    assert seen == [(200, 0, "length", 2, 7), (200, 1, "length", 2, 7), (500, 0, None, None, None)]
    assert all(0 < row["first_token_seconds"] <= row["seconds"] for row in rows[:2])


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_the_client_stopped_is_known_and_may_be_judged(
    running: Body, admin: AsyncClient, client: AsyncClient, call: Call, ask: Call, engine: ScriptedEngine, state: State,
    hang_up: Call, stream: bool,
) -> None:  # fmt: skip
    """Else an arm that rambles until its users press Stop would lose its worst answers."""
    engine.script, engine.delay = " ".join(["word"] * 50), 0.01
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "user": "s", "stream": stream,
            "steering": {"experiment": "tone"}}  # fmt: skip
    text = await hang_up(client, "/v1/chat/completions", body)
    settle(state)
    with state.database.read() as connection:
        row = connection.execute(select(responses)).mappings().one()
    assert (row["status"], row["tokens"], row["finish_reason"], row["unit"]) == (499, None, None, "s")
    if stream:
        response_id = json.loads(text.split("\n")[0].removeprefix("data: "))["id"]
        outcome = {"response_id": response_id, "metric": "thumbs", "value": 0}
        assert (await call(client, "POST", "experiments/tone/outcomes", outcome))["stored"] == 1
    engine.script, engine.delay = "one", 0.0
    await ask("s")
    settle(state)
    report = await call(admin, "GET", "experiments/tone/report")
    means = {metric["name"]: [arm["mean"] for arm in metric["arms"] if arm["units"]] for metric in report["metrics"]}
    assert means["hung_up"] == [0.5] and means["tokens"] == [1.0] and "error" not in means


async def test_a_unit_whose_request_is_refused_is_not_exposed(
    running: Body, ask: Call, engine: ScriptedEngine, state: State
) -> None:
    engine.max_model_len = 1
    await ask("too long", 400)
    engine.max_model_len, engine.max_waiting = 64, 0
    await ask("too many", 429)
    engine.max_waiting, engine.script = 4, "<break>"
    await ask("failed", 500)
    settle(state)
    with state.database.read() as connection:
        assert connection.execute(select(exposures.c.unit)).scalars().all() == ["failed"]


async def test_an_exposure_is_one_a_unit(running: Body, ask: Call, state: State) -> None:
    await asyncio.gather(*(ask("same") for _ in range(4)))
    await ask("same")
    settle(state)
    with state.database.read() as connection:
        assert len(connection.execute(select(exposures)).all()) == 1
        assert len(connection.execute(select(responses)).all()) == 5


async def test_a_unit_can_be_forgotten(running: Body, admin: AsyncClient, client: AsyncClient, call: Call, ask: Call,
                                       state: State) -> None:  # fmt: skip
    answer = await ask("a/b c")
    await ask("kept")
    outcome = {"response_id": answer["id"], "metric": "thumbs", "value": 1}
    await call(client, "POST", "experiments/tone/outcomes", outcome)
    gone = await call(admin, "DELETE", "units/a%2Fb%20c")
    assert gone == {"object": "unit.deleted", "unit": "a/b c", "deleted": True, "rows": 3}
    with state.database.read() as connection:
        assert {row.unit for row in connection.execute(select(exposures))} == {"kept"}
    await call(client, "POST", "experiments/tone/outcomes", outcome, 404)


async def test_a_unit_is_forgotten_in_the_experiments_of_all_packages(
    running: Body, admin: AsyncClient, call: Call, ask: Call, state: State, database_url: str
) -> None:
    other = State(open_database(database_url), "another package")
    try:
        spec = ExperimentSpec.model_validate(
            {"name": "theirs", "arms": [{"name": n, "atoms": {}} for n in "ab"]}
        ).completed()
        arms = [Arm(name, 0.5, Mix(), "m-0", 0.0) for name in "ab"]
        other.experiments.start(other.experiments.create(spec, arms, "1.0"), arms, "1.0")
        assignment = Assignment(other.experiments.get("theirs").id, "u1", "a")
        other.recorder.exposed(assignment)
        other.recorder.finished(assignment, FinishedResponse("r", (Choice("x", 1, "stop"),), 1.0))
    finally:
        other.close()
    await ask("u1")
    assert (await call(admin, "DELETE", "units/u1"))["rows"] == 4
    with state.database.read() as connection:
        assert connection.execute(select(exposures)).all() == connection.execute(select(responses)).all() == []


async def test_the_export_is_parquet(running: Body, admin: AsyncClient, client: AsyncClient, call: Call, ask: Call,
                                     engine: ScriptedEngine) -> None:  # fmt: skip
    engine.script = "Yes."
    answer = await ask("u1")
    await call(
        client, "POST", "experiments/tone/outcomes", {"response_id": answer["id"], "metric": "thumbs", "value": 1}
    )
    tables = {}
    for name in ("exposures", "responses", "outcomes"):
        file = await admin.get(f"/v1/experiments/tone/export?table={name}")
        assert file.headers["content-disposition"] == f'attachment; filename="tone-{name}.parquet"'
        tables[name] = pq.read_table(io.BytesIO(file.content))
    assert tables["exposures"].to_pylist()[0]["unit"] == "u1"
    response = tables["responses"].to_pylist()[0]
    assert (response["response_id"], response["finish_reason"]) == (answer["id"], "stop")
    assert {"detector:yes-no", "detector:one-word"} <= set(response["marks"])
    assert response["at"].tzinfo is not None
    assert tables["outcomes"].to_pylist()[0]["value"] == 1.0
    assert tables["responses"].schema.metadata[b"atomsteer.experiment"] == b"tone"
    assert (await call(admin, "GET", "experiments/tone/export?table=x", None, 400))["error"]["param"] == "table"


@pytest.mark.parametrize("looks", ["51", "-1", "1e1", "٣", "0000000000005000", "9" * 5000])
async def test_looks_are_bounded_however_they_are_written(running: Body, admin: AsyncClient, looks: str) -> None:
    answer = await admin.get("/v1/experiments/tone/report", params={"looks": looks})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "looks")


async def test_a_broken_guardrail_stops_the_experiment(
    admin: AsyncClient, spec: Body, call: Call, ask: Call, state: State, engine: ScriptedEngine
) -> None:
    rails = [{"metric": "detector:one-word", "max": 0.5}, {"metric": "error", "max_increase": 0.9}]
    await call(admin, "POST", "experiments", spec | {"guardrails": rails, "horizon": 200}, 201)
    await call(admin, "POST", "experiments/tone/start", {})
    engine.script = "Word."
    for n in range(150):
        await ask(f"u{n}")
    settle(state)
    report = await call(admin, "GET", "experiments/tone/report")
    assert {(check["metric"], check["broken"]) for check in report["guardrails"]} == {
        ("detector:one-word", True), ("error", False),
    }  # fmt: skip
    await asyncio.to_thread(state.guard)
    stopped = await call(admin, "GET", "experiments/tone")
    assert stopped["status"] == "stopped"
    assert "detector:one-word of arm 'listed' is 1" in stopped["stop_reason"]
    assert (await ask("u1"))["steering"]["arm"] is None
    await asyncio.to_thread(state.guard)  # a second replica that sees the same finds it done


async def test_guardrails_are_watched_without_being_asked(
    admin: AsyncClient, spec: Body, call: Call, ask: Call, engine: ScriptedEngine, state_of: Callable[[str], State],
    database_url: str, state: State, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(state_module, "REFRESH_SECONDS", 0.05)
    monkeypatch.setattr(state_module, "GUARDRAIL_SECONDS", 0.05)
    rails = [{"metric": "detector:one-word", "max": 0.1}]
    await call(admin, "POST", "experiments", spec | {"guardrails": rails, "horizon": 200}, 201)
    await call(admin, "POST", "experiments/tone/start", {})
    engine.script = "Word."
    for n in range(120):
        await ask(f"u{n}")
    settle(state)
    state_of(database_url)  # another replica, which looks often
    for _ in range(100):
        if (await call(admin, "GET", "experiments/tone"))["status"] == "stopped":
            return
        await asyncio.sleep(0.1)
    raise AssertionError("no replica stopped the experiment")


async def test_an_uneven_split_raises_the_alarm(running: Body, admin: AsyncClient, call: Call, state: State) -> None:
    experiment = state.snapshot.experiments["tone"]
    for n in range(200):
        state.recorder.exposed(Assignment(experiment.id, f"u{n}", "plain" if n % 3 else "listed"))
    settle(state)
    ratio = (await call(admin, "GET", "experiments/tone/report"))["sample_ratio"]
    assert ratio["alarm"] is True and ratio["p_value"] < 1e-6


async def test_a_small_coverage_raises_no_alarm_before_or_after_a_ramp(
    admin: AsyncClient, spec: Body, call: Call, state: State
) -> None:
    """Of ten places the first of three equal arms has four."""
    await call(admin, "POST", "experiments", spec | {"coverage": 0.001}, 201)
    await call(admin, "POST", "experiments/tone/start", {})

    def expose(counts: dict[str, int], wave: int) -> None:
        tone = state.snapshot.experiments["tone"].id
        for arm, count in counts.items():
            for n in range(count):
                state.recorder.exposed(Assignment(tone, f"{arm}-{wave}-{n}", arm))
        settle(state)

    async def p_value() -> float:
        return (await call(admin, "GET", "experiments/tone/report"))["sample_ratio"]["p_value"]

    expose({"plain": 400, "listed": 300, "nice": 300}, 0)
    assert await p_value() == pytest.approx(1.0)
    await call(admin, "POST", "experiments/tone/ramp", {"coverage": 1})
    expose({"plain": 300, "listed": 300, "nice": 300}, 1)
    assert await p_value() > 0.99
    expose({"plain": 150}, 2)
    assert await p_value() < 0.001, "this is one"


async def test_another_package_version_refuses_a_running_experiment(
    running: Body, client_of: Callable[..., AsyncClient], locked: ServeConfig, state: State, package: Package,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    client = client_of(locked, "client", state)
    monkeypatch.setattr(type(package), "digest", lambda self, mix: "m-other")
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "hi"}],
        "user": "u",
        "steering": {"experiment": "tone"},
    }
    refused = await client.post("/v1/chat/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")


async def test_a_preview_shows_the_arm_and_records_nothing(
    running: Body, client: AsyncClient, call: Call, ask: Call, state: State
) -> None:
    seen = await call(client, "POST", "steering/preview", {"steering": {"experiment": "tone"}, "user": "u7"})
    settle(state)
    with state.database.read() as connection:
        assert connection.execute(select(exposures)).all() == []
    assert (await ask("u7"))["steering"] == seen["steering"]
    for bad in ({"user": 5}, {"metadata": []}, {"metadata": 0.5}):
        await call(client, "POST", "steering/preview", {"steering": {"experiment": "tone"}} | bad, 400)


async def test_a_presets_model_beside_an_experiment_is_refused(running: Body, ask: Call) -> None:
    assert (await ask("u", 400, model="demo:polite"))["error"]["param"] == "steering.experiment"


async def test_a_full_queue_costs_records_and_says_so(running: Body, ask: Call, admin: AsyncClient, call: Call,
                                                      state: State, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(state.recorder._writer, "_capacity", 0)
    await ask("u1")
    monkeypatch.undo()
    await ask("u2")
    settle(state)
    report = await call(admin, "GET", "experiments/tone/report")
    assert (report["lost_records"], sum(report["units"].values())) == (2, 1)
    assert "atomsteer_experiment_records_lost_total 2.0" in (await admin.get("/metrics")).text


async def test_a_record_that_cannot_be_stored_is_lost_and_counted(
    running: Body, ask: Call, admin: AsyncClient, call: Call, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.experiments.recording.marks", lambda *_: 1 / 0)
    await ask("u1")
    settle(state)
    monkeypatch.undo()
    await ask("u2")
    settle(state)
    report = await call(admin, "GET", "experiments/tone/report")
    assert (report["lost_records"], sum(report["units"].values())) == (1, 2)
    assert "atomsteer_experiment_records_lost_total 1.0" in (await admin.get("/metrics")).text


def test_every_automatic_metric_has_an_expression() -> None:
    assert set(EXPRESSIONS) | {MEASURED_KL} == AUTOMATIC
