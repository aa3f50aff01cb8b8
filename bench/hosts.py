"""What the serving benchmark runs: servers on free ports, a package with as many atoms as asked for, the merged model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch

from atoms.manifest import AtomCard
from atoms.mix import Mix
from atoms.package import Package, PackageContents, atom_id, write_package

CONTEXT = 512
ATOMSTEER = [sys.executable, "-m", "clients.cli", "serve"]
VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextmanager
def running(command: list[str], log: Path, environment: dict[str, str] | None = None) -> Iterator[str]:
    """Starts a server on a free port; gives its URL once it is healthy, and stops it at the end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, f"--port={port}"], stdout=output, stderr=subprocess.STDOUT,
                                   env=os.environ | QUIET | (environment or {}))  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"a server ended:\n{log.read_text(errors='replace')[-4000:]}")
            try:
                httpx.get(f"{url}/health", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


def embedded_server(package: Path, model: str, slots: int, dtype: str) -> list[str]:
    return [*ATOMSTEER, f"--package={package}", f"--model={model}", "--database=none", f"--max-num-seqs={slots}",
            f"--dtype={dtype}", f"--max-model-len={CONTEXT}", "--max-waiting=1024"]  # fmt: skip


def vllm_options(rows: int, dtype: str) -> list[str]:
    return [f"--dtype={dtype}", f"--max-model-len={CONTEXT}", f"--max-num-seqs={rows}"]


def steering_vllm_server(package: Path, model: str, rows: int, dtype: str) -> list[str]:
    return [*ATOMSTEER, "--engine=vllm", f"--package={package}", f"--model={model}", "--database=none",
            *vllm_options(rows, dtype)]  # fmt: skip


def stock_vllm_server(merged: Path, rows: int, dtype: str, slots: int, package: Package | None) -> list[str]:
    """vLLM alone on the merged model; with `package`, with its own LoRA on the package's modules and `slots` slots."""
    lora = []
    if package is not None:
        modules = package.base_adapter.space.modules
        names = sorted({module.name.rpartition(".")[2] for module in modules})
        rank = 2 * max(module.rank for module in modules)
        lora = ["--enable-lora", f"--max-loras={slots}", f"--max-cpu-loras={max(slots, 64)}", f"--max-lora-rank={rank}",
                "--lora-target-modules", *names]  # fmt: skip
    return [*VLLM, str(merged), "--served-model-name=plain", *vllm_options(rows, dtype), *lora]


def merged_model(package: Package, model: str, directory: Path) -> Path:
    """The base model with θ0 merged, written to `directory` unless it is there."""
    from atoms.model import load_model, merge_adapter

    if not (directory / "config.json").exists():
        loaded, tokenizer = load_model(model, torch.float32, torch.device("cpu"))
        package.check_base(loaded)
        merge_adapter(loaded, package.base_adapter)
        loaded.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return directory


def widened(package: Package, atoms: int, directory: Path) -> Package:
    """A copy of `package` with `atoms` atoms: its own, and random sums of them at the same size. For their cost alone."""
    if (directory / "manifest.json").exists():
        return Package.read(directory)
    generator = torch.Generator().manual_seed(0)
    own = [package.bank.direction(Mix.of({card.id: 1.0})) for card in package.manifest.atoms]
    cards: list[AtomCard] = []
    directions = {}
    for place in range(atoms):
        source = package.manifest.atoms[place % len(own)]
        weights = torch.randn(len(own), generator=generator) / len(own) ** 0.5
        mixed = own[place] if place < len(own) else {
            key: sum(float(w) * direction[key] for w, direction in zip(weights, own, strict=True)) for key in own[0]
        }  # fmt: skip
        content = package.base_adapter.space.hash_tensors(mixed)
        card = source.model_copy(update={"id": atom_id(content), "content_hash": content, "alias": None})
        cards.append(card)
        directions[card.id] = mixed
    drift = {"M": 0.1 * torch.eye(atoms)}
    manifest = package.manifest.model_copy(update={"name": "bench", "atoms": cards})
    contents = PackageContents(manifest, package.base_adapter, directions, drift, package.projection_tensors, {})
    return write_package(directory, contents)
