"""`atomsteer demo`: the whole path on one machine without a model hub, ending with a conversation with a real server.

demo model -> discover -> label by measured effect -> serve -> the same prompts unsteered and steered, side by side
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from atoms.errors import EngineError
from atoms.manifest import AtomCard
from atoms.package import Package
from clients.labels import label_from_detectors
from clients.tables import LEAST_WIDTH
from offline.config import (
    CalibrateConfig,
    CurvatureConfig,
    DictionaryConfig,
    DiscoverConfig,
    FinetuneConfig,
    SelectConfig,
)
from offline.demo_model import prepare_demo_model
from offline.evaluation.prompts import read_prompts
from offline.memory import unbounded_environment
from offline.pipeline import discover
from offline.progress import Progress
from offline.shipped import shipped_file
from server.embedded.load import EngineOptions

SHOWN_ATOMS = 4
COEFFICIENTS = (-2.0, 0.0, 1.0, 2.0)
PROMPTS_PER_ATOM = 2
MAX_TOKENS = 40
_START_SECONDS = 120


@dataclass(frozen=True)
class Shown:
    """One row of the comparison: a prompt, and one answer per coefficient."""

    atom: str
    prompt: str
    answers: tuple[str, ...]


def demo_config(directory: Path, model: Path) -> DiscoverConfig:
    """Sized for 15 minutes on two cores without bf16: one pass of training and one of gradients, few calibration tokens."""
    return DiscoverConfig(
        model=str(model), data=shipped_file("demo_documents"), out=directory / "package", name="demo", batch_tokens=768,
        work=directory / "work",
        finetune=FinetuneConfig(epochs=1.0),
        curvature=CurvatureConfig(factor_documents=48, eigenvalue_documents=64),
        dictionary=DictionaryConfig(),
        select=SelectConfig(keep=16, min_documents=6),  # 16 behaviours, each with 34 documents to learn from
        calibrate=CalibrateConfig(prompts=4, continuation_tokens=24, coefficients=(-3.0, -1.0, 1.0, 3.0),
                                  orientation_documents=4),
    )  # fmt: skip


def run_demo(directory: Path, port: int) -> None:
    """Runs or resumes the demo in `directory`. Raises AtomsteerError."""
    started = time.monotonic()
    progress, console = Progress(), Console(width=max(LEAST_WIDTH, Console().width), markup=False)
    package = _prepared_package(directory, progress)
    port = port or _free_port()
    progress.say(f"starting the server on port {port}")
    with _server(package, port, directory / "server.log"):
        rows = asyncio.run(_ask(package, f"http://127.0.0.1:{port}/v1"))
    _print_comparison(console, rows)
    _print_next_steps(console, package, directory)
    progress.say(f"demo finished in {time.monotonic() - started:.0f} s")


def _prepared_package(directory: Path, progress: Progress) -> Package:
    """The demo package, discovered and named; each part only if it is not there yet."""
    target = directory / "package"
    if target.exists():
        package = Package.read(target)
    else:
        progress.say("preparing the demo model")
        package = discover(demo_config(directory, prepare_demo_model(directory / "model").resolve()), progress)
    if not any(card.effects for card in package.manifest.atoms):
        package = label_from_detectors(package, None, (2.0,), 2, 24, EngineOptions(slots=32), progress)
    return package


def best_atoms(package: Package) -> list[AtomCard]:
    """The named atoms that raise their detector most, best first."""
    named = [card for card in package.manifest.atoms if card.alias]
    return sorted(named, key=lambda card: -_gain(card))[:SHOWN_ATOMS]


def _gain(card: AtomCard) -> float:
    own = (e for e in card.effects if e.detector == card.alias and not e.invited and e.coefficient > 0)
    return max((effect.change for effect in own), default=0.0)


@contextmanager
def _server(package: Package, port: int, log: Path) -> Iterator[None]:
    """Runs `atomsteer serve` until the block ends. Raises EngineError if it does not get ready."""
    command = [sys.executable, "-m", "clients.cli", "serve", "--package", str(package.path), "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=unbounded_environment())
        try:
            _wait_until_ready(process, f"http://127.0.0.1:{port}/ready", log)
            yield
        finally:
            process.terminate()
            process.wait(timeout=60)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise EngineError(f"the server did not get ready within {_START_SECONDS} s; its log is {log}")


async def _ask(package: Package, base_url: str) -> list[Shown]:
    """Asks neutral held-out prompts with each of the best atoms at every coefficient, all at once."""
    from openai import AsyncOpenAI

    heldout = [
        row for row in read_prompts(shipped_file("demo_prompts")) if row.kind == "neutral" and row.split == "heldout"
    ]
    async with AsyncOpenAI(base_url=base_url, api_key="none") as client:

        async def one(atom: AtomCard, prompt: str, coefficient: float) -> str:
            completion = await client.chat.completions.create(
                model=package.manifest.name, messages=[{"role": "user", "content": prompt}], max_tokens=MAX_TOKENS,
                temperature=0, extra_body={"steering": {"atoms": {atom.name: coefficient}}},
            )  # fmt: skip
            return completion.choices[0].message.content or ""

        async def row(atom: AtomCard, prompt: str) -> Shown:
            return Shown(atom.name, prompt, tuple(await asyncio.gather(*(one(atom, prompt, c) for c in COEFFICIENTS))))

        asked = [
            (atom, prompt.prompt)
            for atom in best_atoms(package)
            for prompt in [p for p in heldout if p.behaviour == atom.alias][:PROMPTS_PER_ATOM]
        ]
        return list(await asyncio.gather(*(row(atom, prompt) for atom, prompt in asked)))


def _print_comparison(console: Console, rows: Sequence[Shown]) -> None:
    for shown in rows:
        table = Table(title=f"{shown.atom}: {shown.prompt}", title_justify="left", width=console.width)
        for coefficient in COEFFICIENTS:
            table.add_column("unsteered" if coefficient == 0 else f"{coefficient:+g}", ratio=1, overflow="fold")
        table.add_row(*(answer.strip() for answer in shown.answers))
        console.print(table)


def _print_next_steps(console: Console, package: Package, directory: Path) -> None:
    best = best_atoms(package)
    atom = best[0].name if best else package.manifest.atoms[0].id
    name = package.manifest.name
    body = {"model": name, "messages": [{"role": "user", "content": "How do I keep houseplants alive?"}], "max_tokens": 80,
            "steering": {"atoms": {atom: 2}}}  # fmt: skip
    make = "make serve" if shutil.which("make") else f"atomsteer serve --package {directory / 'package'}"
    lines = f"""
Go on: start the server with `{make}`, then

curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'

from openai import OpenAI
client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
answer = client.chat.completions.create(
    model="{name}", messages=[{{"role": "user", "content": "How do I keep houseplants alive?"}}], max_tokens=80,
    extra_body={{"steering": {{"atoms": {{"{atom}": 2}}}}}},
)
print(answer.choices[0].message.content)

atomsteer inspect {directory / "package"}
atomsteer generate --package {directory / "package"} --mix "{atom}=2" "How do I keep houseplants alive?"
"""
    console.print(lines, highlight=False, soft_wrap=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
