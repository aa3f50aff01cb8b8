"""Operators and clients who are careless or mean: each gets an answer in the API's own form, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from httpx import AsyncClient
from sqlalchemy import func, select

from atoms.package import Package
from server import state as state_module
from server.config import ServeConfig
from server.errors import CollisionError, ConflictError, StoreUnavailableError
from server.experiments.recording import Choice, FinishedResponse
from server.experiments.spec import Assignment, Experiment, ExperimentSpec
from server.state import State
from server.steering import Steering, Subject
from server.store.tables import outcomes, responses

Body = dict[str, Any]
Call = Callable[..., Any]
TWO = [{"name": "a", "atoms": {}}, {"name": "b", "atoms": {"list": 1}}]
BODIES = ("null", "[]", "7", '"x"', "", "{", '{"name": NaN}', '{"arms": [{"name": "a", "weight": NaN}]}', '{"a": "\\ud800"}',
          "[" * 5000, '{"outcomes": null}', '{"outcomes": {"a": 1}}', '{"coverage": 1e999}', '{"reason": "a\\u0000b"}',
          '{"arm": "a", "preset": "x", "description": "\\u0000"}', '{"value": ' + "9" * 5000 + "}")  # fmt: skip
PATHS = ("experiments", "experiments/tone/start", "experiments/tone/ramp", "experiments/tone/stop",
         "experiments/tone/promote", "experiments/tone/outcomes", "presets")  # fmt: skip
NAMES = ("%00", "a%00b", "x" * 5000, "%0d%0aSet-Cookie:%20a", "..%2f..%2fetc", "%F0%9F%99%82", "%20", "tone%20", "TONE",
         "tone%0a", "tone" + "x" * 61)  # fmt: skip


async def test_bodies_of_every_wrong_kind(running: Body, admin: AsyncClient) -> None:
    for path in PATHS:
        for body in BODIES:
            response = await admin.post(f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})
            assert 400 <= response.status_code < 500, (path, body, response.text)
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert len(response.text) < 2000, (path, body)
    assert (await admin.get("/v1/experiments/tone")).json() == running


async def test_names_of_every_wrong_kind(running: Body, admin: AsyncClient) -> None:
    for name in NAMES:
        for method, path, body in (
            ("GET", "", None), ("DELETE", "", None), ("POST", "/start", {}), ("POST", "/ramp", {"coverage": 0.5}),
            ("POST", "/stop", {}), ("GET", "/report", None), ("GET", "/export", None),
            ("POST", "/promote", {"arm": "plain", "preset": "x"}),
            ("POST", "/outcomes", {"response_id": "x", "metric": "thumbs", "value": 1}),
        ):  # fmt: skip
            response = await admin.request(method, f"/v1/experiments/{name}{path}", json=body)
            assert response.status_code in (400, 404), (name, path, response.status_code, response.text)
            assert len(response.text) < 2000
        for method in ("GET", "DELETE"):
            assert (await admin.request(method, f"/v1/presets/{name}")).status_code in (400, 404), name
        assert (await admin.get(f"/v1/presets/{name}/versions")).status_code in (400, 404), name
    assert (await admin.get("/v1/experiments/tone")).json() == running


async def test_units_of_every_kind(
    running: Body, admin: AsyncClient, client: AsyncClient, call: Call, ask: Call
) -> None:
    for unit in ("x" * 257, "x" * 900_000, "a\u0000", "a\nb", "\u200e", "\ufffe"):
        assert (await ask(unit, 400))["error"]["param"] == "user"
    for kind in (7, True, {"a": 1}, ["u"]):
        assert (await ask(kind, 400))["error"]["type"] == "invalid_request_error"
    for unit in ("ü" * 256, "🙂", "日本 語", " ", "%00", "../../x", "'; DROP TABLE exposures; --"):
        answer = await ask(unit)
        assert (await ask(unit))["steering"]["arm"] == answer["steering"]["arm"] is not None
        gone = await call(admin, "DELETE", f"units/{quote(unit, safe='')}")
        assert gone["rows"] == 3, unit
    for unit in ("%00", "x" * 300, "%1b"):
        await call(admin, "DELETE", f"units/{unit}", None, 400)


async def test_extreme_but_legal_specs_can_be_run_and_reported(
    admin: AsyncClient, call: Call, ask: Call, state: State
) -> None:
    extremes: list[Body] = [
        {"arms": [{"name": "a", "atoms": {}, "weight": 1e6}, {"name": "b", "atoms": {}, "weight": 1e-6}]},
        {"arms": [{"name": f"arm{n}", "atoms": {}} for n in range(16)], "horizon": 10},
        {"arms": TWO, "holdout": 1 - 1e-12}, {"arms": TWO, "holdout": 5e-324}, {"arms": TWO, "coverage": 5e-324},
        {"arms": TWO, "alpha": 1e-6, "horizon": 10**9}, {"arms": TWO, "alpha": 0.4999},
        {"arms": TWO, "guardrails": [{"metric": "tokens", "max": -1e308}, {"metric": "error", "max_increase": 1e308}]},
        {"arms": TWO, "seed": "🙂" * 256, "description": "\u200e<script>"},
    ]  # fmt: skip
    for number, extreme in enumerate(extremes):
        name = f"e{number}"
        await call(admin, "POST", "experiments", {"name": name} | extreme, 201)
        await call(admin, "POST", f"experiments/{name}/start", {})
        for unit in range(6):
            await ask(f"u{unit}", experiment=name)
        state.recorder.erase("nobody at all").result(10)
        report = await call(admin, "GET", f"experiments/{name}/report?looks=3")
        assert json.loads(json.dumps(report, allow_nan=False))
        await asyncio.to_thread(state.guard)
    assert {e["status"] for e in (await call(admin, "GET", "experiments"))["data"]} <= {"running", "stopped"}


async def test_outcomes_of_another_experiment_or_again_and_again(
    running: Body, admin: AsyncClient, client: AsyncClient, call: Call, ask: Call, spec: Body, state: State
) -> None:
    await call(admin, "POST", "experiments", spec | {"name": "other"}, 201)
    path = "experiments/other/outcomes"
    answer = (await ask("u1"))["id"]
    outcome = {"response_id": answer, "metric": "thumbs", "value": 1}
    await call(client, "POST", path, outcome, 409)
    await call(admin, "POST", "experiments/other/start", {})
    await call(client, "POST", path, outcome, 404)
    same = [outcome | {"value": n % 2} for n in range(1000)]
    sent = await asyncio.gather(
        *(call(client, "POST", "experiments/tone/outcomes", {"outcomes": same}) for _ in range(5))
    )
    assert [answer["stored"] for answer in sent] == [1000] * 5
    many = {"outcomes": [outcome] * 10_001}
    assert (await call(client, "POST", "experiments/tone/outcomes", many, 400))["error"]["param"] == "outcomes"
    for value in ("1", None, [], 1e308, -1e308, 10**400):
        await call(client, "POST", "experiments/tone/outcomes", outcome | {"metric": "spent", "value": value}, 400)
    with state.database.read() as connection:
        assert connection.execute(select(outcomes.c.value)).scalars().all() == [1.0]
    await call(admin, "POST", "experiments/tone/stop", {})
    await call(
        client, "POST", "experiments/tone/outcomes", outcome | {"value": 0}
    )  # what was answered may still be judged
    await call(admin, "DELETE", "experiments/tone", None)
    await call(client, "POST", "experiments/tone/outcomes", outcome, 404)


async def test_one_of_many_operators_creates_starts_and_stops(
    package: Package, config: ServeConfig, state: State, state_of: Callable[[str], State], database_url: str, spec: Body
) -> None:
    """Two replicas, eight threads each: every change succeeds exactly once."""
    replicas = [state, state_of(database_url)]
    parsed = ExperimentSpec.model_validate(spec).completed()
    arms = Steering.of(package, config).freeze(parsed)

    async def race(change: Callable[[State], object]) -> int:
        def attempt(replica: State) -> int:
            try:
                change(replica)
            except ConflictError:
                return 0
            return 1

        return sum(await asyncio.gather(*(asyncio.to_thread(attempt, replicas[n % 2]) for n in range(16))))

    assert await race(lambda replica: replica.experiments.create(parsed, arms, "1.0")) == 1
    draft = state.experiments.get("tone")
    assert await race(lambda replica: replica.experiments.start(draft, arms, "1.0")) == 1
    assert await race(lambda replica: replica.experiments.stop("tone", "me first")) == 1
    with state.database.read() as connection:
        history = state.experiments.history(connection, state.experiments.get("tone"))
    assert [event["kind"] for event in history] == ["created", "started", "stopped"]


async def test_promoting_while_others_stop(running: Body, admin: AsyncClient, call: Call) -> None:
    """Each promotion that succeeds is a version of its own; one of the stops succeeds; nothing is a 5xx."""
    promote, stop = {"arm": "listed", "preset": "winner"}, {"reason": "enough"}
    sent = await asyncio.gather(
        *(
            admin.post("/v1/experiments/tone/promote", json=promote | ({"if_version": 0} if n % 2 else {}))
            for n in range(8)
        ),
        *(admin.post("/v1/experiments/tone/stop", json=stop) for _ in range(8)),
    )
    promoted, stopped = ([answer.status_code for answer in part] for part in (sent[:8], sent[8:]))
    assert set(promoted) <= {200, 409} and sorted(stopped) == [200] + [409] * 7
    versions = [answer.json()["version"] for answer in sent[:8] if answer.status_code == 200]
    assert sorted(versions) == list(range(1, len(versions) + 1)) and len(versions) >= 1
    assert (await call(admin, "GET", "presets/winner"))["version"] == max(versions)
    history = (await call(admin, "GET", "experiments/tone/report"))["history"]
    assert [event["kind"] for event in history].count("promoted") == len(versions)


async def test_a_promotion_is_done_whole_or_not_at_all(
    running: Body, admin: AsyncClient, call: Call, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StoreUnavailableError("away")

    promote = {"arm": "listed", "preset": "winner"}
    with monkeypatch.context() as patch:
        patch.setattr(state.experiments, "_note", fail)
        await call(admin, "POST", "experiments/tone/promote", promote, 503)
    await call(admin, "GET", "presets/winner", None, 404)
    assert (await call(admin, "POST", "experiments/tone/promote", promote | {"if_version": 0}))["version"] == 1
    read = state.experiments.get("tone")
    await call(admin, "POST", "experiments/tone/stop", {})
    await call(admin, "DELETE", "experiments/tone", None)
    monkeypatch.setattr(state.experiments, "get", lambda _: read)  # it was there a moment ago
    await call(admin, "POST", "experiments/tone/promote", promote, 404)
    assert len((await call(admin, "GET", "presets/winner/versions"))["data"]) == 1


async def test_renamed_arms_of_a_draft(admin: AsyncClient, call: Call, spec: Body) -> None:
    await call(admin, "POST", "experiments", spec | {"control": "plain"}, 201)
    renamed = [spec["arms"][0] | {"name": "old"}, *spec["arms"][1:]]
    refused = await call(admin, "PUT", "experiments/tone", spec | {"arms": renamed, "control": "plain"}, 400)
    assert "control is 'plain'; it must be one of old, listed, nice" in refused["error"]["message"]
    replaced = await call(admin, "PUT", "experiments/tone", spec | {"arms": renamed})
    assert replaced["control"] == "old"
    await call(admin, "POST", "experiments/tone/start", {})
    await call(admin, "PUT", "experiments/tone", spec, 409)
    await call(admin, "POST", "experiments/tone/promote", {"arm": "plain", "preset": "x"}, 400)


async def test_a_clock_that_is_wrong_moves_no_unit_and_breaks_no_report(
    running: Body, admin: AsyncClient, call: Call, ask: Call, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {f"u{n}": (await ask(f"u{n}"))["steering"]["arm"] for n in range(10)}
    for wrong in (1.0, 4e9):
        with monkeypatch.context() as clock:
            clock.setattr("server.experiments.recording.time.time", lambda wrong=wrong: wrong)
            assert {unit: (await ask(unit))["steering"]["arm"] for unit in before} == before
            state.recorder.erase("nobody at all").result(10)
    report = await call(admin, "GET", "experiments/tone/report?looks=5")
    assert sum(report["units"].values()) == 10 and len(report["looks"]) == 5


async def test_records_of_a_deleted_experiment_do_not_become_those_of_the_next(
    running: Body, admin: AsyncClient, spec: Body, call: Call, state: State
) -> None:
    """A response that was being written when its experiment was deleted, and another was created in its place."""
    old = state.snapshot.experiments["tone"].id
    await call(admin, "POST", "experiments/tone/stop", {})
    await call(admin, "DELETE", "experiments/tone", None)
    await call(admin, "POST", "experiments", spec, 201)
    await call(admin, "POST", "experiments/tone/start", {})
    late = Assignment(old, "u1", "listed")
    state.recorder.exposed(late)
    state.recorder.finished(late, FinishedResponse("late", (Choice("x", 1, "stop"),), 1.0))
    state.recorder.measured(late, "late", 0.1)
    state.recorder.erase("nobody at all").result(10)
    with state.database.read() as connection:
        assert connection.scalar(select(func.count()).select_from(responses)) == 0


def start(state: State, steering: Steering, spec: Body) -> None:
    """Without the routes."""
    parsed = ExperimentSpec.model_validate(spec).completed()
    arms = steering.freeze(parsed)
    state.experiments.start(state.experiments.create(parsed, arms, "1.0"), arms, "1.0")
    state.refresh()


def test_arms_that_are_gone_from_the_package_say_so(
    package: Package, config: ServeConfig, spec: Body, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    steering = Steering.of(package, config, lambda: state.snapshot)
    start(state, steering, spec)
    monkeypatch.setattr(Steering, "applies", lambda self, mix: not mix)
    units = [f"u{n}" for n in range(30)]
    seen = set()
    for unit in units:
        try:
            seen.add(steering.resolve({"experiment": "tone"}, subject=Subject(user=unit)).arm)
        except ConflictError as error:
            assert "version 1.0" in str(error)
            seen.add("refused")
    assert seen == {"plain", "refused"}


def test_a_draft_that_was_replaced_is_not_started_with_its_old_arms(
    package: Package, config: ServeConfig, spec: Body, state: State
) -> None:
    steering = Steering.of(package, config, lambda: state.snapshot)
    one, other = (ExperimentSpec.model_validate(spec | {"horizon": n}).completed() for n in (500, 900))
    read = state.experiments.create(one, steering.freeze(one), "1.0")
    state.experiments.replace(other, steering.freeze(other), "1.0")
    with pytest.raises(CollisionError, match="replaced"):
        state.experiments.start(read, steering.freeze(one), "1.0")
    assert state.experiments.get("tone").status == "draft"
    assert state.experiments.start(state.experiments.get("tone"), steering.freeze(other), "1.0").status == "running"


def test_one_experiment_that_cannot_be_checked_leaves_the_others_guarded(
    package: Package, config: ServeConfig, spec: Body, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    steering = Steering.of(package, config, lambda: state.snapshot)
    rails = {"guardrails": [{"metric": "error", "max": 0.5}]}
    for name in ("a", "b", "c"):
        start(state, steering, spec | rails | {"name": name})
    looked = []

    def check(_connection: object, experiment: Experiment) -> list[object]:
        looked.append(experiment.name)
        raise ValueError("no such arm")

    monkeypatch.setattr(state_module, "check_guardrails", check)
    state.guard()
    assert sorted(looked) == ["a", "b", "c"]


def test_an_experiment_that_was_stopped_serves_its_control_on_a_later_version(
    package: Package, config: ServeConfig, spec: Body, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    steering = Steering.of(package, config, lambda: state.snapshot)
    start(state, steering, spec)
    monkeypatch.setattr(type(package), "digest", lambda self, mix: "m-of-another-version")
    with pytest.raises(ConflictError, match="version 1.0"):
        steering.resolve({"experiment": "tone"}, subject=Subject(user="u1"))
    state.experiments.stop("tone", "enough")
    state.refresh()
    found = steering.resolve({"experiment": "tone"}, subject=Subject(user="u1"))
    assert (found.arm, found.digest, found.assignment) == (None, "m-of-another-version", None)
