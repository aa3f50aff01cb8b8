"""kill -9 of a real server process while clients report outcomes: what was acknowledged is there, once, as it was sent.

On SQLite and on PostgreSQL. ``ATOMSTEER_TEST_KILLS`` says how often; a start costs seconds.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select, text

from atoms.package import Package
from server.experiments.measures import metric_moments
from server.experiments.rollups import moments as sums
from server.experiments.store import ExperimentStore
from server.store.schema import open_database
from server.store.tables import exposures, outcomes, responses

KILLS = int(os.environ.get("ATOMSTEER_TEST_KILLS", "3"))
CLIENTS = 4
SPEC = {
    "name": "tone",
    "arms": [{"name": "plain", "atoms": {}}, {"name": "listed", "atoms": {"list": 2}}],
    "metrics": [{"name": "score"}],
    "guardrails": [{"metric": "score", "max": 2}, {"metric": "error", "max": 1}],
}


def start(package: Package, url: str, log: Path) -> tuple[subprocess.Popen[str], str]:
    script = Path(__file__).with_name("scripted_server.py")
    with log.open("a") as errors:
        process = subprocess.Popen([sys.executable, str(script), str(package.path), url], stdout=subprocess.PIPE,
                                   stderr=errors, text=True)  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "serves on" in line, log.read_text()
    return process, line.split()[-1] + "/v1"


class Client:
    """What one client was promised: `acknowledged` answers, and for each the value that was acknowledged last followed
    by those sent since, of which there is one at most: the one on its way when the server died."""

    def __init__(self) -> None:
        self.acknowledged: set[str] = set()
        self.values: dict[str, list[float]] = {}


def report_until_it_dies(url: str, client_number: int, promised: Client) -> None:
    """Asks and reports, one after the other, and again from time to time on an answer that was reported before."""
    rng = random.Random(client_number)
    mine: list[str] = []
    with httpx.Client(base_url=url, timeout=10) as client:
        try:
            while True:
                body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1,
                        "user": f"u{rng.randrange(200)}", "steering": {"experiment": "tone"}}  # fmt: skip
                mine.append(client.post("/chat/completions", json=body).json()["id"])
                again = rng.choice(mine)
                value = rng.random()
                promised.values.setdefault(again, []).append(value)
                body = {"response_id": again, "metric": "score", "value": value}
                if client.post("/experiments/tone/outcomes", json=body).status_code == 200:
                    promised.acknowledged.add(again)
                    promised.values[again] = [value]
                else:
                    raise AssertionError("an outcome was refused")
        except httpx.TransportError:
            return


def stop_cleanly(process: subprocess.Popen[str], url: str) -> set[str]:
    """Asks for some answers, then sends SIGTERM; gives the answers' ids, none of which was reported on."""
    with httpx.Client(base_url=url, timeout=10) as client:
        body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "steering": {"experiment": "tone"}}
        ids = {client.post("/chat/completions", json=body | {"user": f"u{n}"}).json()["id"] for n in range(30)}
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert process.stdout is not None
    process.stdout.close()
    return ids


def count(clients: list[Client]) -> int:
    return sum(len(client.acknowledged) for client in clients)


def test_acknowledged_outcomes_survive_kills(package: Package, database_url: str, tmp_path: Path) -> None:
    url, log = database_url, tmp_path / "log"
    clients: list[Client] = []
    failures: list[threading.ExceptHookArgs] = []
    rng = random.Random(0)
    for kill in range(KILLS):
        process, address = start(package, url, log)
        try:
            if kill == 0:
                admin = httpx.Client(base_url=address, headers={"Authorization": "Bearer boss"})
                assert admin.post("/experiments", json=SPEC).status_code == 201
                assert admin.post("/experiments/tone/start").status_code == 200
                admin.close()
            clients += [Client() for _ in range(CLIENTS)]
            threads = [
                threading.Thread(target=report_until_it_dies, args=(address, kill * CLIENTS + n, promised))
                for n, promised in enumerate(clients[-CLIENTS:])
            ]
            hook, threading.excepthook = threading.excepthook, failures.append
            for thread in threads:
                thread.start()
            enough = count(clients) + rng.randrange(20, 60)
            while count(clients) < enough and any(thread.is_alive() for thread in threads):
                threads[0].join(0.01)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        for thread in threads:
            thread.join(20)
        threading.excepthook = hook
        assert not failures, failures[0].exc_value
    last = stop_cleanly(*start(package, url, log))
    database = open_database(url)
    with database.read() as connection:
        if database.is_sqlite:
            assert connection.scalar(text("PRAGMA integrity_check")) == "ok"
        stored = {row.response_id: row.value for row in connection.execute(select(outcomes))}
        units = {row.unit for row in connection.execute(select(exposures))}
        answered = connection.execute(select(responses.c.response_id, responses.c.unit)).all()
        experiment = ExperimentStore(database, package.manifest.name).all(connection)["tone"]
        summed, scanned = (moments(connection, experiment, ["score", "error"]) for moments in (sums, metric_moments))
    database.close()
    for metric in summed:
        for arm, found in summed[metric].items():
            assert (found.n, found.mean) == (scanned[metric][arm].n, pytest.approx(scanned[metric][arm].mean)), metric
    lost = [a for c in clients for a in c.acknowledged if stored.get(a) not in c.values[a]]
    assert not lost, f"{len(lost)} of {count(clients)} acknowledged outcomes are gone or have another value"
    assert count(clients) >= 10 * KILLS
    assert {unit for _, unit in answered} <= units
    assert last <= {answer for answer, _ in answered}, "a server that was asked to stop wrote less than it had observed"
