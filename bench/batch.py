"""Throughput of a batch in this process beside a loop of single requests, over the same lines.

    OMP_WAIT_POLICY=PASSIVE python -m bench.batch PKG [--model MODEL] [--lines 48] [--tokens 16] [--slots 16] [--rounds 4]

Both go through the command's own code, and differ in how many requests are in flight. Rounds alternate, so that what
else runs on the machine meets both; the ratio is taken in each round. Loading the model is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from atoms.machine import machine
from atoms.package import Package
from clients.batch import BatchConfig, answer_all, scan_input
from clients.batch_lines import Defaults
from clients.batch_results import open_results
from clients.connection import Connection, connect
from server.embedded.load import EngineOptions


def write_lines(path: Path, package: Package, lines: int, tokens: int) -> None:
    """Every line has one of the package's atoms, in turn, and generates exactly `tokens` tokens."""
    atoms = [card.id for card in package.manifest.atoms]
    with path.open("w") as file:
        for number in range(lines):
            body = {
                "messages": [{"role": "user", "content": f"Tell me something about the number {number}."}],
                "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
                "steering": {"atoms": {atoms[number % len(atoms)]: 1.0}},
            }  # fmt: skip
            file.write(json.dumps({"custom_id": str(number), "url": "/v1/chat/completions", "body": body}) + "\n")


def tokens_per_second(source: Path, out: Path, concurrency: int, connection: Connection) -> float:
    config = BatchConfig(source, out, Defaults({}), concurrency, quiet=True)
    with open_results(out, {}) as results:
        outcome = asyncio.run(answer_all(config, results, scan_input(config, results.ids), connection))
    if outcome.failed:
        raise SystemExit(f"{outcome.failed} lines failed; see {out}")
    return outcome.tokens / outcome.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--model")
    for name, default in (("lines", 48), ("tokens", 16), ("slots", 16), ("rounds", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    rates: dict[str, list[float]] = {"batch": [], "one by one": []}
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "in.jsonl"
        write_lines(source, Package.read(args.package), args.lines, args.tokens)
        with connect(args.package, None, None, EngineOptions(model=args.model, slots=args.slots)) as connection:
            for turn in range(args.rounds):
                for name, concurrency in (("batch", 2 * args.slots), ("one by one", 1))[:: 1 if turn % 2 else -1]:
                    out = Path(directory) / f"{concurrency}-{turn}.jsonl"
                    rates[name].append(tokens_per_second(source, out, concurrency, connection))
                    print(f"{name:>10}: {rates[name][-1]:.1f} tok/s", file=sys.stderr, flush=True)
    ratios = [batch / single for batch, single in zip(rates["batch"], rates["one by one"], strict=True)]
    found = {
        "machine": machine(), "load": load, "lines": args.lines, "tokens": args.tokens, "slots": args.slots,
        "tokens_per_second": rates, "ratios": ratios,
    }  # fmt: skip
    if args.json:
        print(json.dumps(found))
        return
    print(f"{machine()}, load {load:.1f} before; {args.lines} lines of {args.tokens} tokens, {args.slots} slots")
    for name, values in rates.items():
        print(f"{name:>10}: {' '.join(f'{value:.1f}' for value in values)} tok/s")
    print(
        f"     ratio: {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] median and range of rounds"
    )


if __name__ == "__main__":
    main()
