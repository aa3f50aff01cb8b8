"""Experiments inside vLLM, on the real engine: assignment, exposure, what is observed, outcomes, measured KL."""

from __future__ import annotations

import io
import time
from collections import Counter
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import torch

from atoms.model import find_linear, merge_adapter
from server.experiments.assignment import choose, place
from server.vllm.scoring import LIKELIEST, coarse_kl

UNITS = 16


@pytest.fixture
def api(server, admin_key):
    headers = {"Authorization": f"Bearer {admin_key}"}
    with httpx.Client(base_url=server.v1, headers=headers, timeout=300) as client:
        yield client


def call(api: httpx.Client, method: str, path: str, body: Any = None, status: int = 200) -> Any:
    response = api.request(method, path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def table(api: httpx.Client, name: str) -> list[dict[str, Any]]:
    response = api.get("/experiments/strength/export", params={"table": name})
    assert response.status_code == 200, response.text
    return pq.read_table(io.BytesIO(response.content)).to_pylist()


@pytest.fixture
def experiment(api: httpx.Client, real_package):
    """Unsteered against a strength of 2; deleted at the end."""
    atom = real_package.manifest.atoms[0].id
    arms = [{"name": "off", "atoms": {}}, {"name": "two", "atoms": {atom: 2.0}}]
    call(api, "POST", "/experiments", {"name": "strength", "arms": arms, "metrics": [{"name": "liked"}]}, 201)
    yield call(api, "POST", "/experiments/strength/start", {})
    api.post("/experiments/strength/stop", json={})
    call(api, "DELETE", "/experiments/strength")


def test_a_life_inside_vllm(server, api, experiment, prompts, real_package, merged_smol, load_smol) -> None:
    ranges = [tuple(arm["range"]) for arm in experiment["arms"]]
    answers = {}
    for n in range(UNITS):
        body = {"model": server.name, "prompt": prompts[n % len(prompts)], "max_tokens": 8, "temperature": 1, "seed": n,
                "return_token_ids": True, "user": f"user-{n}", "steering": {"experiment": "strength"}}  # fmt: skip
        answer = answers[f"user-{n}"] = call(api, "POST", "/completions", body)
        arm = experiment["arms"][choose(place("strength", f"user-{n}"), ranges)]
        echo = answer["steering"]
        assert (echo["arm"], echo["atoms"], echo["mix"]) == (arm["name"], arm["atoms"], arm["mix"])
    again = {"model": server.name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "user": "user-3",
             "steering": {"experiment": "strength"}, "stream": True}  # fmt: skip
    streamed = api.post("/chat/completions", json=again)
    arm = answers["user-3"]["steering"]["arm"]
    assert f'"arm":"{arm}"' in streamed.text and streamed.headers["x-atomsteer-arm"] == arm
    assert (
        call(api, "POST", "/chat/completions", again | {"user": None, "stream": False}, 400)["error"]["code"]
        == "missing_unit"
    )

    outcomes = [{"response_id": answer["id"], "metric": "liked", "value": 1} for answer in answers.values()]
    sent = call(
        api, "POST", "/experiments/strength/outcomes", {"outcomes": [*outcomes, outcomes[0] | {"response_id": "x"}]}
    )
    assert sent == {"object": "experiment.outcomes", "stored": UNITS, "unknown_responses": ["x"]}
    deadline = time.monotonic() + 120
    while len(measured := measured_kl(api)) < UNITS + 1 and time.monotonic() < deadline:
        time.sleep(0.5)

    arms = {unit: answer["steering"]["arm"] for unit, answer in answers.items()}
    report = call(api, "GET", "/experiments/strength/report")
    assert report["units"] == dict(Counter(arms.values())) and report["lost_records"] == 0
    assert {row["unit"]: row["arm"] for row in table(api, "exposures")} == arms
    rows = table(api, "responses")
    assert len(rows) == UNITS + 1
    for row in rows:
        if row["response_id"] == answers[row["unit"]]["id"]:
            choice = answers[row["unit"]]["choices"][0]
            assert (row["tokens"], row["characters"]) == (len(choice["token_ids"]), len(choice["text"]))
            assert (row["finish_reason"], row["status"]) == (choice["finish_reason"], 200)
        assert 0 < row["first_token_seconds"] <= row["seconds"]

    model = merged_with(real_package, load_smol(), experiment["arms"][1]["atoms"])
    compared, found = 0, []
    for n, (unit, answer) in enumerate(answers.items()):
        if arms[unit] == "off":
            assert measured[answer["id"]] == 0
            continue
        exact, coarse = oracles(merged_smol, model, prompts[n % len(prompts)], answer["choices"][0]["token_ids"])
        assert measured[answer["id"]] == pytest.approx(coarse, rel=0.01, abs=1e-5)
        assert measured[answer["id"]] <= 1.001 * exact
        compared += exact > 1e-3
        found.append((measured[answer["id"]], exact))
    assert sum(kl for kl, _ in found) > 0.5 * sum(exact for _, exact in found), "the bound says little"
    assert compared >= 3, "the mix hardly moves the model, so agreement would prove little"
    metrics = httpx.get(f"{server.url}/metrics", timeout=60).text
    assert 'atomsteer_measured_kl_count{arm="two",experiment="strength"}' in metrics


def measured_kl(api: httpx.Client) -> dict[str, float]:
    return {row["response_id"]: row["value"] for row in table(api, "outcomes") if row["metric"] == "measured_kl"}


def merged_with(package, model, atoms: dict[str, float]):
    merge_adapter(model, package.base_adapter)
    for name, factors in package.bank.compose(package.mix(atoms), package.composition).items():
        find_linear(model, name).weight.data += factors.scaling * (factors.lora_B @ factors.lora_A)
    return model


def oracles(base, steered, prompt: list[int], response: list[int]) -> tuple[float, float]:
    """KL(unsteered ‖ steered) by transformers: exact, and coarsened as from vLLM's lists."""
    tokens = torch.tensor([[*prompt, *response]])
    with torch.inference_mode():
        ours, theirs = (m(tokens).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for m in (base, steered))
    lists = [
        [{int(t): float(row[t]) for t in {*row.topk(LIKELIEST).indices.tolist(), token}}
         for row, token in zip(side, response, strict=True)] for side in (ours, theirs)
    ]  # fmt: skip
    return float((ours.exp() * (ours - theirs)).sum(-1).mean()), coarse_kl(*lists)
