"""docs/operations.md against the software: every option with its default, every metric."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from httpx import AsyncClient
from typer.main import get_command

from clients.cli import app
from server.state import State

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "operations.md").read_text()
DASHBOARD = ROOT / "deploy" / "grafana-dashboard.json"


def test_every_option_of_serve_is_listed_with_its_default() -> None:
    rows = [line for line in TEXT.partition("## Options")[2].splitlines() if line.startswith("| `--")]
    listed = {name: row.split("|")[2] for row in rows for name in re.findall(r"--[a-z][a-z-]*", row.split("|")[1])}
    parameters = {parameter.opts[0]: parameter for parameter in get_command(app).commands["serve"].params}  # type: ignore[attr-defined]
    options = {name: parameter for name, parameter in parameters.items() if name.startswith("--")}
    assert listed.keys() - {"--no-access-log"} == options.keys() - {"--help"}
    for name, parameter in options.items():
        value = parameter.default
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert (f"{value:g}" if isinstance(value, float) else str(value)) in re.sub(
                r"(?<=\d),(?=\d{3})", "", listed[name]
            ), (name, value)


async def test_every_metric_is_listed_and_the_dashboard_asks_for_none_that_is_not_there(
    client_of: Callable[..., AsyncClient], sqlite_state: State
) -> None:
    async with client_of(state=sqlite_state) as client:
        await client.post("/v1/completions", json={"model": "demo", "prompt": "a", "max_tokens": 3})
        lines = (await client.get("/metrics")).text.splitlines()
    kinds = dict(line.split()[2:4] for line in lines if line.startswith("# TYPE") and "_created" not in line)
    for name, kind in kinds.items():
        named = name if kind != "counter" or name.endswith("_total") else f"{name}_total"
        stem = named.removeprefix("atomsteer_experiment_records")
        assert f"`{named}`" in TEXT or f"`…{stem}`" in TEXT, f"{named} is not in docs/operations.md"
    series = {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}
    series |= {
        name if name.endswith("_total") else f"{name}_total" for name, kind in kinds.items() if kind == "counter"
    }
    asked = re.findall(r"(?:atomsteer_|vllm:)[a-z_]+", " ".join(
        target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]))  # fmt: skip
    assert set(asked) <= series, set(asked) - series
    assert len(asked) >= 10
