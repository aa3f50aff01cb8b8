"""Throughput of steering inside vLLM against the same vLLM on the merged model with LoRA off.

    .venv-vllm/bin/python -m bench.serving PKG MODEL [--mixes 0 1 16] [--atoms 3] [--pairs 8] [--json FILE]

Both servers run, one is asked at a time: a pair is one round of the same prompts to each, in turns which goes first.
Every round has prompts and mixes never sent before, so neither prefix cache nor slots help. K = 0 is unsteered
requests on the steering server. The figure of a cell is the ratio of generated tokens a second, steered over plain:
the median of its pairs, with a bootstrap 95% interval of that median. vLLM compiles the plain model by default, and
nothing that has LoRA; --eager takes that from the plain one too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from atoms.package import Package


def merged_model(package: Package, model: str, directory: Path) -> Path:
    """The base model with θ0 merged, written to `directory`."""
    import torch

    from atoms.model import load_model, merge_adapter

    loaded, tokenizer = load_model(model, torch.float32, torch.device("cpu"))
    package.check_base(loaded)
    merge_adapter(loaded, package.base_adapter)
    loaded.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[str]:
    """Starts a server on a free port; gives its URL once it is healthy, and stops it at the end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, f"--port={port}"], stdout=output, stderr=subprocess.STDOUT,
                                   env=os.environ | environment)  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"a server ended:\n{log.read_text(errors='replace')[-4000:]}")
            try:
                httpx.get(f"{url}/health", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


async def tokens_per_second(url: str, bodies: list[dict]) -> float:
    """Generated tokens a second when all `bodies` are sent at once."""
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        start = time.perf_counter()
        responses = await asyncio.gather(*(client.post(f"{url}/v1/completions", json=body) for body in bodies))
        seconds = time.perf_counter() - start
    return sum(response.raise_for_status().json()["usage"]["completion_tokens"] for response in responses) / seconds


def round_bodies(args: argparse.Namespace, package: Package, mixes: int, salt: int) -> tuple[list[dict], list[dict]]:
    """The same prompts for the plain and the steering server, the latter with `mixes` distinct new mixes."""
    draw = random.Random(salt)
    ids = [card.id for card in package.manifest.atoms]
    plain, steered = [], []
    drawn = [
        {atom: round(draw.uniform(-2, 2), 4) for atom in draw.sample(ids, min(args.atoms, len(ids)))}
        for _ in range(mixes)
    ]
    for place in range(args.concurrency):
        prompt = f"Question {draw.random()}: " + "how does one bake good bread at home? " * args.prompt_words
        body = {"prompt": prompt, "max_tokens": args.tokens, "temperature": 0, "ignore_eos": True}
        plain.append({"model": "plain", **body})
        atoms = drawn[place % mixes] if mixes else {}
        steered.append({"model": package.manifest.name, "steering": {"atoms": atoms}, **body})
    return plain, steered


def interval(ratios: list[float]) -> tuple[float, float]:
    """Bootstrap 95% interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(4000))
    return medians[100], medians[-101]


def measure(args: argparse.Namespace, package: Package, plain_url: str, steered_url: str) -> list[dict]:
    rounds: dict[int, list[tuple[float, float]]] = {mixes: [] for mixes in args.mixes}
    salt = 0
    for pair in range(-1, args.pairs):  # the first is a warm-up
        for mixes in args.mixes:
            salt += 1
            plain, steered = round_bodies(args, package, mixes, salt)
            order = [(plain_url, plain), (steered_url, steered)]
            rates = {}
            for url, bodies in order if salt % 2 else reversed(order):
                rates[url] = asyncio.run(tokens_per_second(url, bodies))
            if pair >= 0:
                rounds[mixes].append((rates[plain_url], rates[steered_url]))
    cells = []
    for mixes, pairs in rounds.items():
        ratios = [steered / plain for plain, steered in pairs]
        low, high = interval(ratios)
        cells.append({
            "mixes": mixes, "atoms": args.atoms if mixes else 0, "concurrent": args.concurrency, "pairs": len(pairs),
            "plain_tokens_per_second": statistics.median(plain for plain, _ in pairs),
            "steered_tokens_per_second": statistics.median(steered for _, steered in pairs),
            "ratio": statistics.median(ratios), "low": low, "high": high,
        })  # fmt: skip
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("model")
    parser.add_argument("--mixes", type=int, nargs="+", default=[0, 1, 16])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true")
    for name, default in (("atoms", 3), ("pairs", 8), ("concurrency", 16), ("tokens", 32), ("prompt-words", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    package = Package.read(args.package)
    seqs = f"--max-num-seqs={max(args.concurrency, 16)}"
    options = ["--dtype", args.dtype, "--max-model-len=512", seqs]
    environment = {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"), "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        directory = Path(scratch)
        merged = merged_model(package, args.model, directory / "merged")
        plain = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(merged), "--served-model-name=plain",
                 *options, *(["--enforce-eager"] if args.eager else [])]  # fmt: skip
        steering = [sys.executable, "-m", "clients.cli", "serve", "--engine=vllm", f"--package={args.package}",
                    f"--model={args.model}", "--database=none", *options]  # fmt: skip
        plain_url = stack.enter_context(running(plain, environment | {"VLLM_PLUGINS": ""}, directory / "plain.log"))
        steered_url = stack.enter_context(running(steering, environment, directory / "steering.log"))
        cells = measure(args, package, plain_url, steered_url)
    from importlib.metadata import version

    machine = (
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, vLLM {version('vllm')}, {args.dtype}"
    )
    report = {"machine": machine, "load": os.getloadavg()[0], "package": package.manifest.name, "eager": args.eager,
              "bank": len(package.manifest.atoms), "cells": cells}  # fmt: skip
    print(f"{machine}; bank of {report['bank']} atoms; load {report['load']:.1f}; "
          f"plain {'eager' if args.eager else 'compiled'}")  # fmt: skip
    for cell in cells:
        print(f"K={cell['mixes']:<4} {cell['atoms']} atoms  plain {cell['plain_tokens_per_second']:7.1f}  steered "
              f"{cell['steered_tokens_per_second']:7.1f} tok/s  ratio {cell['ratio']:.2f} "
              f"[{cell['low']:.2f}, {cell['high']:.2f}] of {cell['pairs']} pairs")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
