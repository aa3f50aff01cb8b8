"""kill -9 of a real server process while clients report outcomes: what was acknowledged is there, once, as it was sent.

``ATOMSTEER_TEST_KILLS`` says how often; a start costs seconds.
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
from sqlalchemy import select, text

from atoms.package import Package
from server.store.schema import open_database
from server.store.tables import exposures, outcomes, responses

KILLS = int(os.environ.get("ATOMSTEER_TEST_KILLS", "3"))
CLIENTS = 4
SPEC = {
    "name": "tone",
    "arms": [{"name": "plain", "atoms": {}}, {"name": "listed", "atoms": {"list": 2}}],
    "metrics": [{"name": "score"}],
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


def report_until_it_dies(url: str, client_number: int, acknowledged: dict[str, float]) -> None:
    """Asks and reports, one after the other, and again from time to time what was reported before."""
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
                body = {"response_id": again, "metric": "score", "value": value}
                if client.post("/experiments/tone/outcomes", json=body).status_code == 200:
                    acknowledged[again] = value
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


def test_acknowledged_outcomes_survive_kills(package: Package, tmp_path: Path) -> None:
    url, log = f"sqlite:///{tmp_path}/state.db", tmp_path / "log"
    acknowledged: list[dict[str, float]] = []
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
            acknowledged += [{} for _ in range(CLIENTS)]
            threads = [
                threading.Thread(target=report_until_it_dies, args=(address, kill * CLIENTS + n, seen))
                for n, seen in enumerate(acknowledged[-CLIENTS:])
            ]
            hook, threading.excepthook = threading.excepthook, failures.append
            for thread in threads:
                thread.start()
            enough = sum(map(len, acknowledged)) + rng.randrange(20, 60)
            while sum(map(len, acknowledged)) < enough and any(thread.is_alive() for thread in threads):
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
        assert connection.scalar(text("PRAGMA integrity_check")) == "ok"
        stored = {row.response_id: row.value for row in connection.execute(select(outcomes))}
        units = {row.unit for row in connection.execute(select(exposures))}
        answered = connection.execute(select(responses.c.response_id, responses.c.unit)).all()
    database.close()
    sent = {answer: value for seen in acknowledged for answer, value in seen.items()}
    lost = {answer: value for answer, value in sent.items() if stored.get(answer) != value}
    # One report of each client may have been stored, or have replaced its answer's value, without an acknowledgement.
    assert len(lost) <= KILLS * CLIENTS and lost.keys() <= stored.keys(), f"{len(lost)} of {len(sent)} are gone"
    assert len(sent) >= 10 * KILLS
    assert {unit for _, unit in answered} <= units
    assert last <= {answer for answer, _ in answered}, "a server that was asked to stop wrote less than it had observed"
