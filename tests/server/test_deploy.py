"""The examples in deploy/ against the software: options, paths, variables and metrics that they name are there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from httpx import AsyncClient
from typer.main import get_command

from clients.cli import app
from server.config import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, DATABASE_VARIABLE
from server.embedded.serve import _LAST_WORDS
from server.state import State

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
VARIABLES = {API_KEY_VARIABLE, ADMIN_KEY_VARIABLE, DATABASE_VARIABLE}
PROMETHEUS_OWN = {"up": {"job", "instance"}}
DURATION = re.compile(r"\d+[smhd]")


def options_of(words: list[str]) -> dict[str, str]:
    """Option -> value of a command line of `serve`, which knows them all."""
    known = {option for parameter in get_command(app).commands["serve"].params for option in parameter.opts}  # type: ignore[attr-defined]
    joined = " ".join(words).replace("=", " ", sum(word.startswith("--") and "=" in word for word in words))
    given = dict(re.findall(r"(--[a-z-]+) (\S+)", joined))
    assert given.keys() <= known, given.keys() - known
    return given


@pytest.fixture
async def exposed(client_of: Callable[..., AsyncClient], sqlite_state: State) -> list[str]:
    """The lines of /metrics of a server that has a database and has answered nothing yet."""
    async with client_of(state=sqlite_state) as client:
        return (await client.get("/metrics")).text.splitlines()


def documented_labels() -> Iterator[tuple[str, set[str]]]:
    """Metric and labels, by the table of docs/operations.md."""
    table = (ROOT / "docs" / "operations.md").read_text().partition("| metric | labels |")[2].partition("\n\n")[0]
    for names, labels in re.findall(r"^\| (`.*?) \| (.*?) \|", table, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", names):
            yield name.replace("…", "atomsteer_experiment_records"), set(re.findall(r"\b[a-z_]+\b(?=[,:]|$)", labels))


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return group["rules"]


async def test_alerts_ask_for_metrics_and_labels_that_are_there(exposed: list[str]) -> None:
    kinds = dict(line.split()[2:4] for line in exposed if line.startswith("# TYPE") and "_created" not in line)
    ends = {
        "counter": ("", "_total"),
        "histogram": ("_sum", "_count", "_bucket"),
        "summary": ("_sum", "_count"),
        "gauge": ("",),
    }
    metrics = {name + end: name for name, kind in kinds.items() for end in ends[kind]}
    labels = dict(documented_labels())
    for rule in rules():
        asked = re.findall(r"\b(?:atomsteer_|vllm:)[a-z_]+|\bup\b", rule["expr"])
        assert asked, rule
        known = {"instance", "job"}
        for metric in asked:
            if metric in PROMETHEUS_OWN:
                continue
            assert metric in metrics, metric
            stem = metrics[metric]
            known |= labels.get(metric) or labels.get(stem) or labels.get(f"{stem}_total") or set()
        used = re.findall(r"([a-z_]+)=~?\"", rule["expr"])
        used += [name.strip() for by in re.findall(r"by \(([^)]*)\)", rule["expr"]) for name in by.split(",")]
        used += re.findall(r"\$labels\.([a-z_]+)", rule["annotations"]["summary"])
        assert set(used) <= known, (rule["alert"], set(used) - known)


async def test_counters_that_alerts_watch_are_there_before_anything_is_counted(exposed: list[str]) -> None:
    """A series that appears with a 1 has not increased."""
    for series in ('atomsteer_reloads_total{result="failed"} 0.0', "atomsteer_experiment_records_lost_total 0.0"):
        assert series in exposed


def test_alerts_are_rules_of_prometheus() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) >= 5
    for rule in rules():
        assert rule.keys() - {"for"} == {"alert", "expr", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert DURATION.fullmatch(rule.get("for", "0s"))
        assert all(DURATION.fullmatch(window) for window in re.findall(r"\[([^]]*)\]", rule["expr"]))
        assert rule["expr"].count("(") == rule["expr"].count(")")


def test_the_service_of_systemd() -> None:
    lines = (DEPLOY / "systemd" / "atomsteer.service").read_text().splitlines()
    settings = [line.partition("=")[::2] for line in lines if line and line[0] not in "#["]
    unit = dict(settings)
    assert [line for line in lines if line.startswith("[")] == ["[Unit]", "[Service]", "[Install]"]
    program, command, *words = shlex.split(unit["ExecStart"])
    assert Path(program).name == "atomsteer" and command == "serve"
    given = options_of(words)
    assert int(unit["TimeoutStopSec"]) > float(given["--shutdown-timeout"]) + _LAST_WORDS
    assert given["--database"].startswith(f"sqlite:////var/lib/{unit['StateDirectory']}/"), "the rest is read-only"
    assert unit["KillMode"] == "mixed" and unit["Restart"] == "on-failure" and "-HUP" in unit["ExecReload"]
    assert not any("key" in word for word in words), "a command line is for all to see"


@pytest.fixture
def manifests() -> dict[str, dict[str, Any]]:
    found = yaml.safe_load_all((DEPLOY / "kubernetes" / "atomsteer.yaml").read_text())
    return {manifest["kind"]: manifest for manifest in found}


async def test_the_deployment_of_kubernetes(
    manifests: dict[str, dict[str, Any]], client_of: Callable[..., AsyncClient]
) -> None:
    spec = manifests["Deployment"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["atomsteer", "serve"]
    given = options_of(container["args"])
    assert (
        container["ports"] == [{"name": "http", "containerPort": int(given["--port"])}] and given["--host"] == "0.0.0.0"
    )
    wait = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > wait + float(given["--shutdown-timeout"]) + _LAST_WORDS
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/health", "readiness": "/ready", "liveness": "/health",
    }  # fmt: skip
    async with client_of() as client:
        for probe in probes.values():
            assert probe["port"] == "http" and (await client.get(probe["path"])).status_code == 200
    secrets = {entry["name"] for entry in container["env"] if "valueFrom" in entry}
    assert secrets == VARIABLES
    assert not any("key" in word for word in container["args"])
    assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod["volumes"]}
    assert all(given[option].startswith("/srv/atomsteer/") for option in ("--package", "--model"))
    assert mounts["/srv/atomsteer"]["readOnly"]


def test_the_service_of_kubernetes_finds_the_pods(manifests: dict[str, dict[str, Any]]) -> None:
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifests["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert manifests["Service"]["spec"]["selector"] == labels
    assert [port["targetPort"] for port in manifests["Service"]["spec"]["ports"]] == ["http"]
