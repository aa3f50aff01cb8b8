"""What steering costs a server, over HTTP: throughput by distinct mixes in flight and by atoms a mix, and first tokens.

    python -m bench.serving PKG MODEL --host embedded --out DIR [--seconds 220] [--cells 16x3 ttft]
    .venv-vllm/bin/python -m bench.serving PKG MODEL --host vllm --out DIR
    python -m bench.serving PKG MODEL --host embedded --out DIR --show [--plot FILE.svg]

A cell KxJ has K distinct mixes of J atoms in flight, spread over max(16, K) concurrent requests. It is measured in pairs
with the unsteered engine, one asked at a time, in turns which goes first: the embedded server against itself, vLLM
against vLLM on the merged model with LoRA off. Every round has prompts and mixes never sent before. The figure is the
ratio of generated tokens a second, the median of the pairs with its 95% interval (order statistics; the extremes of fewer
than nine pairs).

    0x0    unsteered requests on the steering server
    stockS vLLM's own LoRA with S slots and an adapter on disk for each of max(16, S) mixes, against the same unsteered engine
    disk   the same with 16 slots, when every round's adapters are new: written, loaded and removed within the round
    ttft   milliseconds to the first token, one request at a time: unsteered, a mix seen before, one never seen

Pairs are kept in DIR/HOST.json after each. A run goes on, with the cell that has fewest, for about --seconds; so the whole
is measured in pieces, when the machine is free.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import httpx

from atoms.machine import processor
from atoms.package import Package
from atoms.storage import write_json
from bench.embedded_decode import interval
from bench.hosts import (
    embedded_server,
    merged_model,
    running,
    steering_vllm_server,
    stock_vllm_server,
    widened,
)

_MIXES = ("0x0", "1x3", "16x3", "64x3", "256x3", "16x1", "16x8", "16x32")
CELLS = {
    "embedded": (*_MIXES, "ttft"),
    "vllm": (*_MIXES, "stock16", "stock64", "stock256", "disk", "ttft"),
}
FIRST_TOKENS = ("unsteered", "warm", "new")
_FIRSTS = 30
_VLLM_ROWS = 256


class Bench:
    """One host's servers, started when a cell needs them, and its results so far."""

    def __init__(self, args: argparse.Namespace, stack: ExitStack) -> None:
        self.args = args
        self._stack = stack
        self._urls: dict[tuple[str, int], str] = {}
        self._adapters: dict[str, list[str]] = {}  # of vLLM's own, by cell
        self.package = widened(Package.read(args.package), args.bank, args.out / f"package-{args.bank}")
        self._ids = [card.id for card in self.package.manifest.atoms]
        self._draw = random.Random(time.time_ns())

    def url(self, kind: str, rows: int) -> str:
        """The server of `kind` with room for at least `rows` sequences: vLLM has one, with the room that it has by default;
        the embedded server has another for each number."""
        rows = max(rows, _VLLM_ROWS) if self.args.host == "vllm" else rows
        if (kind, rows) not in self._urls:
            command, environment = self._command(kind, rows)
            log = self.args.out / f"{kind}-{rows}.log"
            self._urls[kind, rows] = self._stack.enter_context(running(command, log, environment))
        return self._urls[kind, rows]

    def _command(self, kind: str, rows: int) -> tuple[list[str], dict[str, str]]:
        args, path = self.args, self.package.path
        if args.host == "embedded":
            return embedded_server(path, args.model, rows, args.dtype), {}
        if kind == "steering":
            return steering_vllm_server(path, args.model, rows, args.dtype), {}
        merged = merged_model(self.package, args.model, args.out / "merged")
        slots = int(kind.removeprefix("stock")) if kind.startswith("stock") else 0
        command = stock_vllm_server(merged, rows, args.dtype, slots, self.package if slots else None)
        return command, {"VLLM_PLUGINS": "", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}

    def pair(self, cell: str, first: bool) -> tuple[float, float]:
        """Tokens a second without steering and in `cell`; `first` says whether the latter is asked first."""
        args = self.args
        slots = 0 if cell[0].isdigit() else 16 if cell == "disk" else int(cell.removeprefix("stock"))
        mixes, atoms = (max(16, slots), 3) if slots else (int(number) for number in cell.split("x"))
        rows = max(args.concurrency, mixes)
        tokens = max(4, args.tokens * 32 // max(rows, 32))
        prompts = [f"Question {self._draw.random()}: how does one bake good bread?" for _ in range(rows)]
        plain = [body(prompt, tokens, self.package.manifest.name) | {"steering": {"atoms": {}}} for prompt in prompts]
        plain_url = self.url("steering", rows) if args.host == "embedded" else self.url("plain", rows)
        if args.host == "vllm":
            plain = [body(prompt, tokens, "plain") for prompt in prompts]
        drawn = [self.new_mix(atoms) for _ in range(mixes)] or [{}]
        if not slots:
            url = self.url("steering", rows)
            bodies = [body(prompt, tokens, self.package.manifest.name) | {"steering": {"atoms": drawn[place % len(drawn)]}}
                      for place, prompt in enumerate(prompts)]  # fmt: skip
            runs = [lambda: rate(plain_url, plain), lambda: rate(url, bodies)]
        else:
            url = self.url(f"stock{slots}", rows)
            runs = [lambda: rate(plain_url, plain), lambda: self.stock_rate(url, cell, prompts, tokens, drawn)]
        figures = [run() for run in (reversed(runs) if first else runs)]
        return (figures[1], figures[0]) if first else (figures[0], figures[1])

    def stock_rate(self, url: str, cell: str, prompts: list[str], tokens: int, drawn: list[dict[str, float]]) -> float:
        """Tokens a second of vLLM's own adapters, one on disk for each mix; in cell `disk` with making and loading them, else
        with those of the first round, which a short round before the measured one puts into their slots."""
        start = time.perf_counter()
        names = self._adapters.get(cell) or self._load(url, drawn)
        bodies = [body(prompt, tokens, names[place % len(names)]) for place, prompt in enumerate(prompts)]
        if cell != "disk":
            self._adapters[cell] = names
            rate(url, [one | {"prompt": "x", "max_tokens": 1} for one in bodies])
            start = time.perf_counter()
        rate(url, bodies)
        seconds = time.perf_counter() - start
        if cell == "disk":
            for name in names:
                httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=120).raise_for_status()
        return sum(one["max_tokens"] for one in bodies) / seconds

    def _load(self, url: str, mixes: list[dict[str, float]]) -> list[str]:
        """Writes an adapter for each mix and has the server load it; their names."""
        names = [f"m{self._draw.randrange(10**12)}" for _ in mixes]
        for name, mix in zip(names, mixes, strict=True):
            path = self.args.out / "adapters" / name
            self.package.export(self.package.mix(mix), path, onto="merged")
            load = {"lora_name": name, "lora_path": str(path.resolve())}
            httpx.post(f"{url}/v1/load_lora_adapter", json=load, timeout=120).raise_for_status()
        return names

    def first_tokens(self) -> tuple[float, float, float]:
        """Seconds to the first token of an unsteered request, of a warm mix and of a new one, in random order."""
        url = self.url("steering", self.args.concurrency)
        warm = dict.fromkeys(self._ids[:3], 1.0)
        mixes = {"unsteered": {}, "warm": warm, "new": self.new_mix(3)}
        found = {}
        for kind in self._draw.sample(FIRST_TOKENS, 3):
            text = f"Question {self._draw.random()}: " + "how does one bake good bread at home? " * 4
            found[kind] = first_token(
                url, body(text, 2, self.package.manifest.name) | {"steering": {"atoms": mixes[kind]}}
            )
        return found["unsteered"], found["warm"], found["new"]

    def new_mix(self, atoms: int) -> dict[str, float]:
        return {atom: round(self._draw.uniform(-2, 2), 4) or 1.0 for atom in self._draw.sample(self._ids, atoms)}


def body(prompt: str, tokens: int, model: str) -> dict:
    return {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


def rate(url: str, bodies: list[dict]) -> float:
    """Generated tokens a second when all `bodies` are sent at once."""
    return asyncio.run(_rate(url, bodies))


async def _rate(url: str, bodies: list[dict]) -> float:
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        start = time.perf_counter()
        responses = await asyncio.gather(*(client.post(f"{url}/v1/completions", json=body) for body in bodies))
        seconds = time.perf_counter() - start
    return sum(response.raise_for_status().json()["usage"]["completion_tokens"] for response in responses) / seconds


def first_token(url: str, request: dict) -> float:
    start = time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/completions", json=request | {"stream": True}, timeout=600) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                return time.perf_counter() - start
    raise SystemExit("a stream ended without a token")


def measure(args: argparse.Namespace) -> None:
    """Adds pairs to the results until time is up or every cell has enough."""
    file = args.out / f"{args.host}.json"
    results = json.loads(file.read_text()) if file.exists() else {"cells": {}}
    end = time.monotonic() + args.seconds
    with ExitStack() as stack:
        bench = Bench(args, stack)
        results |= {"machine": f"{processor()}, {os.cpu_count()} CPUs", "bank": args.bank,
                    "package": Package.read(args.package).manifest.name, "dtype": args.dtype}  # fmt: skip
        warmed = set()
        while time.monotonic() < end:
            counts = {cell: len(results["cells"].get(cell, [])) / (_FIRSTS if cell == "ttft" else args.pairs)
                      for cell in args.cells or CELLS[args.host]}  # fmt: skip
            cell = min(counts, key=lambda name: counts[name])
            if counts[cell] >= 1:
                break
            count = len(results["cells"].get(cell, []))
            sample = bench.first_tokens if cell == "ttft" else lambda: bench.pair(cell, first=bool(count % 2))  # noqa: B023
            if cell not in warmed:  # starts servers, compiles, fills caches
                sample()
                warmed.add(cell)
            results["cells"].setdefault(cell, []).append(sample())
            write_json(file, results)


def show(args: argparse.Namespace) -> None:
    results = json.loads((args.out / f"{args.host}.json").read_text())
    print(f"{args.host} on {results['machine']}; {results['dtype']}, bank of {results['bank']} atoms\n")
    print("| cell | unsteered tokens/s | its own | ratio | interval | pairs |\n|---|---|---|---|---|---|")
    for cell, pairs in results["cells"].items():
        if cell == "ttft":
            continue
        low, middle, high = interval([own / plain for plain, own in pairs])
        plain, own = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"| {cell} | {plain:.0f} | {own:.0f} | {middle:.2f} | {low:.2f}-{high:.2f} | {len(pairs)} |")
    if firsts := results["cells"].get("ttft"):
        medians = [statistics.median(column) * 1000 for column in zip(*firsts, strict=True)]
        print(
            "\n| first token | ms | to unsteered | to warm | interval of that | requests |\n|---|---|---|---|---|---|"
        )
        for place, kind in enumerate(FIRST_TOKENS):
            low, _, high = interval([row[place] / row[1] for row in firsts])
            print(f"| {kind} | {medians[place]:.0f} | {medians[place] / medians[0]:.2f} | "
                  f"{medians[place] / medians[1]:.2f} | {low:.2f}-{high:.2f} | {len(firsts)} |")  # fmt: skip
    if args.plot:
        plot(args.host, results, args.plot)


def plot(host: str, results: dict, file: Path) -> None:
    """Ratio by distinct mixes, and by atoms a mix, with intervals; other ways as horizontal lines."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    ratios = {cell: interval([own / plain for plain, own in pairs])
              for cell, pairs in results["cells"].items() if cell != "ttft"}  # fmt: skip
    for axis, cells, place, label in (
        (axes[0], ("0x0", "1x3", "16x3", "64x3", "256x3"), 0, "distinct mixes in flight, 3 atoms each"),
        (axes[1], ("16x1", "16x3", "16x8", "16x32"), 1, "atoms a mix, 16 mixes in flight"),
    ):
        known = [cell for cell in cells if cell in ratios]
        middles = [ratios[cell][1] for cell in known]
        errors = [
            [ratios[cell][1] - ratios[cell][0] for cell in known],
            [ratios[cell][2] - ratios[cell][1] for cell in known],
        ]
        axis.errorbar(
            [cell.split("x")[place] for cell in known], middles, errors, marker="o", capsize=3, label="atomsteer"
        )
        for name, style in (("stock16", "--"), ("stock64", "-."), ("stock256", (0, (1, 1))), ("disk", ":")):
            if name in ratios:
                axis.axhline(ratios[name][1], linestyle=style, color="grey", label=_LINES[name])
        axis.set_xlabel(label)
        axis.set_ylim(0, 1.2)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("throughput / unsteered")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{host}, {results['machine']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(file)


_LINES = {
    "stock16": "vLLM LoRA, 16 slots, 16 mixes",
    "stock64": "vLLM LoRA, 64 slots, 64 mixes",
    "stock256": "vLLM LoRA, 256 slots, 256 mixes",
    "disk": "one adapter on disk for each strength",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("model")
    parser.add_argument("--host", choices=tuple(CELLS), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="only these; any KxJ")
    parser.add_argument("--seconds", type=float, default=220)
    parser.add_argument("--pairs", type=int, default=8, help="of a cell, after which it has enough")
    parser.add_argument("--bank", type=int, default=32, help="atoms in the package that is served")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--show", action="store_true", help="print the tables of what has been measured")
    parser.add_argument("--plot", type=Path)
    for name, default in (("concurrency", 16), ("tokens", 24)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.show:
        measure(args)
    show(args)


if __name__ == "__main__":
    main()
