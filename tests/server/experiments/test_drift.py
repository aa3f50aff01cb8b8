"""The KL that is measured on answers: which ones, at what cost, what becomes of it; and on the real model, its value."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from httpx import ASGITransport, AsyncClient
from sqlalchemy import select
from transformers import PreTrainedModel

from atoms.errors import ConfigError, EngineStoppedError
from atoms.mix import Mix
from atoms.model import find_linear, merge_adapter
from atoms.package import Package
from server.config import ServeConfig
from server.embedded.app import create_app
from server.embedded.load import EngineOptions, load_package
from server.embedded.scripted import ScriptedEngine
from server.experiments.drift import Answered, DriftSampler
from server.experiments.spec import MEASURED_KL, Assignment
from server.limits import DriftBudget
from server.state import State
from server.steering import ResolvedSteering
from server.store.schema import open_database
from server.store.tables import outcomes

Body = dict[str, Any]
Call = Callable[..., Any]
STEERED, UNSTEERED = Mix.of({"a": 1.0}), Mix()


class Notes:
    """In place of recorder and metrics."""

    def __init__(self) -> None:
        self.stored: list[tuple[str, float]] = []
        self.skipped = 0

    def measured(self, _assignment: Assignment, response_id: str, kl: float) -> None:
        self.stored.append((response_id, kl))

    def drift_measured(self, _steering: ResolvedSteering, _kl: float) -> None:
        pass

    def drift_skipped(self) -> None:
        self.skipped += 1


def steering(arm: str = "listed", mix: Mix = STEERED) -> ResolvedSteering:
    return ResolvedSteering(mix, "m-1", 0.05, experiment="tone", arm=arm, assignment=Assignment(1, "u", arm))


def sampler(notes: Notes, clock: Callable[[], float] = lambda: 0.0, **budget: Any) -> DriftSampler:
    return DriftSampler(notes, DriftBudget(**budget), notes, clock)  # type: ignore[arg-type]


async def half(_answered: Answered) -> float:
    return 0.5


async def offer_all(drift: DriftSampler, count: int, arm: str = "listed", tokens: int = 1) -> None:
    for n in range(count):
        drift.offer(steering(arm), f"{arm}{n}", [1] * tokens, [2] * tokens, half)
        await asyncio.sleep(0)
    await asyncio.gather(*drift._tasks)


@pytest.mark.parametrize(("share", "expected"), [(0.01, 10), (1.0, 1000), (0.3, 250), (0.0, 0)])
async def test_the_share_is_kept_in_every_arm(share: float, expected: int) -> None:
    """0.3 is one of 4: never more than the share."""
    notes = Notes()
    drift = sampler(notes, share=share, tokens_per_minute=10**9)
    await offer_all(drift, 1000, "a")
    await offer_all(drift, 1000, "b")
    assert len(notes.stored) == 2 * expected and notes.skipped == 0


async def test_the_draw_is_the_same_on_another_day_and_has_no_rhythm() -> None:
    days = []
    for _ in range(2):
        notes = Notes()
        await offer_all(sampler(notes, share=0.1, tokens_per_minute=10**9), 500)
        days.append([int(response_id.removeprefix("listed")) for response_id, _ in notes.stored])
    assert days[0] == days[1]
    assert [place // 10 for place in days[0]] == list(range(50)), "one of every ten"
    assert len({place % 10 for place in days[0]}) > 5


async def test_a_minute_costs_no_more_than_its_tokens() -> None:
    now, notes = [0.0], Notes()
    drift = sampler(notes, lambda: now[0], share=1.0, tokens_per_minute=1000)
    await offer_all(drift, 20, tokens=50)  # 200 tokens each: both passes over prompt and answer
    assert (len(notes.stored), notes.skipped) == (5, 15)
    now[0] = 30.0
    await offer_all(drift, 20, tokens=50)
    assert (len(notes.stored), notes.skipped) == (7, 33)
    await offer_all(drift, 1, tokens=5000)
    assert notes.skipped == 34, "one that no minute can pay for"


async def test_one_at_a_time_and_few_may_wait() -> None:
    notes, running, gate = Notes(), [0], asyncio.Event()
    drift = sampler(notes, share=1.0)

    async def slow(_answered: Answered) -> float:
        running[0] += 1
        await gate.wait()
        return 0.1

    for n in range(20):
        drift.offer(steering(), f"r{n}", [1], [2], slow)
    await asyncio.sleep(0.01)
    assert (running[0], notes.skipped) == (1, 12)
    gate.set()
    await asyncio.gather(*drift._tasks)
    assert len(notes.stored) == 8


async def test_unsteered_answers_have_none_and_failures_cost_only_themselves() -> None:
    notes = Notes()
    drift = sampler(notes, share=1.0)

    async def broken(_answered: Answered) -> float:
        raise RuntimeError("no")

    async def stopped(_answered: Answered) -> float:
        raise EngineStoppedError("gone")

    for score in (broken, stopped, half):
        drift.offer(steering(), score.__name__, [1], [2], score)
    drift.offer(steering(mix=UNSTEERED), "unsteered", [1], [2], broken)
    for prompt, response in (([], [1]), ([1], [])):
        drift.offer(steering(), "empty", prompt, response, broken)
    drift.offer(replace(steering(), assignment=None), "outside", [1], [2], broken)
    await asyncio.gather(*drift._tasks)
    assert sorted(notes.stored) == [("half", 0.5), ("unsteered", 0.0)] and notes.skipped == 2


@pytest.mark.parametrize("bad", [{"share": -0.1}, {"share": 1.5}, {"share": float("nan")}, {"share": True}, {"share": "1"},
                                 {"tokens_per_minute": 0}, {"tokens_per_minute": 1.5}])  # fmt: skip
def test_bad_budgets_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        DriftBudget(**bad)


async def test_a_guardrail_on_measured_kl_stops_the_experiment(
    client_of: Callable[..., AsyncClient], locked: ServeConfig, state: State, spec: Body, call: Call,
    engine: ScriptedEngine, ids: list[str],
) -> None:  # fmt: skip
    admin = client_of(replace(locked, drift=DriftBudget(share=1.0, tokens_per_minute=10**9)), "boss", state)
    rails = [{"metric": MEASURED_KL, "max": 0.2}]
    await call(admin, "POST", "experiments", spec | {"guardrails": rails, "horizon": 200, "primary": MEASURED_KL}, 201)
    await call(admin, "POST", "experiments/tone/start", {})
    engine.kl = 0.4
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "steering": {"experiment": "tone"}}
    answers = [await call(admin, "POST", "chat/completions", body | {"user": f"u{n}"}) for n in range(150)]
    steered = [answer for answer in answers if answer["steering"]["atoms"]]
    async with asyncio.timeout(10):
        while len(engine.scored) < len(steered):
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)  # what is scored last is stored
    state.recorder.erase("nobody at all").result(10)

    assert len(engine.scored) == len(steered) < 150, "an unsteered answer needs no reading"
    prompt, response, mix = engine.scored[0]
    assert prompt == engine.encode_chat(body["messages"]) and response == (0, 1, 2)
    assert mix.as_dict() == steered[0]["steering"]["atoms"]
    report = await call(admin, "GET", "experiments/tone/report?looks=2")
    measured = report["metrics"][0]
    assert measured["name"] == MEASURED_KL and measured["automatic"] and measured["kind"] == "mean"
    assert {arm["arm"]: arm["mean"] for arm in measured["arms"]} == pytest.approx(
        {"plain": 0, "listed": 0.4, "nice": 0.4}
    )
    assert {check["arm"]: check["broken"] for check in report["guardrails"]} == {"listed": True, "nice": True}
    text = (await admin.get("/metrics")).text
    assert 'atomsteer_measured_kl_count{arm="listed",experiment="tone"}' in text
    await asyncio.to_thread(state.guard)
    stopped = await call(admin, "GET", "experiments/tone")
    assert stopped["status"] == "stopped" and "measured_kl of arm" in stopped["stop_reason"]

    outcome = {"response_id": answers[0]["id"], "metric": MEASURED_KL, "value": 0}
    assert "has no metric" in (await call(admin, "POST", "experiments/tone/outcomes", outcome, 400))["error"]["message"]
    unit = answers.index(steered[0])
    await call(admin, "DELETE", f"units/u{unit}", None)
    state.recorder.measured(
        Assignment(state.snapshot.experiments["tone"].id, f"u{unit}", "listed"), steered[0]["id"], 0.4
    )
    state.recorder.erase("nobody at all").result(10)
    with state.database.read() as connection:
        left = connection.execute(select(outcomes).where(outcomes.c.unit == f"u{unit}")).all()
    assert left == [], "a measurement that came late brought a forgotten unit back"


def exact_kl(
    base: PreTrainedModel, steered: PreTrainedModel, prompt: tuple[int, ...], response: tuple[int, ...]
) -> float:
    """The oracle: transformers, whole sequences, float64."""
    tokens = torch.tensor([[*prompt, *response]])
    with torch.inference_mode():
        ours, theirs = (
            model(tokens).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for model in (base, steered)
        )
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


async def test_measured_kl_is_that_of_the_merged_model(
    real_package: Package, smol_path: Path, load_smol: Callable[[], PreTrainedModel], merged_smol: PreTrainedModel,
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Chats through the API on the real engine, scored in chunks between the steps of others; against transformers on
    the model with the mix in its weights."""
    options = EngineOptions(str(smol_path), dtype="float32", slots=3, max_model_len=256, prefill_tokens_per_step=32)
    loaded = load_package(real_package.path, options)
    scored: list[tuple[Any, ...]] = []
    drift = loaded.engine.drift

    def noted(*answered: Any) -> Any:
        scored.append(answered)
        return drift(*answered)

    monkeypatch.setattr(loaded.engine, "drift", noted)
    atom = real_package.manifest.atoms[0].id
    arms = [{"name": "off", "atoms": {}}, {"name": "two", "atoms": {atom: 2.0}}]
    state = State(open_database(f"sqlite:///{tmp_path}/drift.db"), real_package.manifest.name)
    config = ServeConfig(package=real_package.path, admin_keys=("boss",), access_log=False,
                         drift=DriftBudget(share=1.0, tokens_per_minute=10**6))  # fmt: skip
    app = create_app(real_package, loaded.engine, config, state=state)
    headers = {"Authorization": "Bearer boss"}
    try:
        async with AsyncClient(transport=ASGITransport(app), base_url="http://test", headers=headers) as admin:  # type: ignore[arg-type]
            await call(admin, "POST", "experiments", {"name": "tone", "arms": arms}, 201)
            await call(admin, "POST", "experiments/tone/start", {})
            body = {"model": real_package.manifest.name, "max_tokens": 24, "temperature": 0.8, "seed": 1, "ignore_eos": True,
                    "messages": [{"role": "user", "content": "Name three fruits, and say where they grow."}],
                    "steering": {"experiment": "tone"}}  # fmt: skip
            answers = await asyncio.gather(
                *(call(admin, "POST", "chat/completions", body | {"user": f"u{n}", "seed": n}) for n in range(6))
            )
            steered = {answer["id"] for answer in answers if answer["steering"]["arm"] == "two"}
            assert 1 <= len(steered) < 6
            for _ in range(600):
                state.recorder.erase("nobody at all").result(10)
                with state.database.read() as connection:
                    rows = connection.execute(select(outcomes).where(outcomes.c.metric == MEASURED_KL)).all()
                if len(rows) == 6:
                    break
                await asyncio.sleep(0.1)
    finally:
        loaded.engine.close()
        state.close()
    measured = sorted(row.value for row in rows if row.response_id in steered)
    assert [row.value for row in rows if row.response_id not in steered] == [0.0] * (6 - len(steered))
    model = load_smol()
    merge_adapter(model, real_package.base_adapter)
    for name, factors in (
        real_package.bank.compose(real_package.mix({atom: 2.0}), real_package.composition) or {}
    ).items():
        find_linear(model, name).weight.data += factors.scaling * (factors.lora_B @ factors.lora_A)
    expected = sorted(exact_kl(merged_smol, model, prompt, response) for prompt, response, _ in scored)
    assert len(expected) == len(measured) and expected[0] > 1e-3, "the mix hardly moves the model"
    assert measured == pytest.approx(expected, rel=1e-3)
