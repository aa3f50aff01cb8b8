"""`label --from-detectors`: measures every atom's effect with the embedded engine and names atoms by it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from atoms.errors import DataError
from atoms.package import Package
from offline.evaluation.answers import Answerer, Decoding
from offline.evaluation.cards import cards_with_measured, measure_atoms
from offline.evaluation.prompts import read_prompts
from offline.progress import Progress
from offline.report import write_report
from offline.shipped import shipped_file
from server.embedded.load import EngineOptions, load_package


def label_from_detectors(
    package: Package,
    prompts_file: Path | None,
    coefficients: Sequence[float],
    prompts_per_behaviour: int,
    max_tokens: int,
    options: EngineOptions,
    progress: Progress,
) -> Package:
    """Writes measured effects and aliases into the package's manifest and returns the package as it is now."""
    prompts = development_prompts(prompts_file or shipped_file("demo_prompts"), prompts_per_behaviour)
    engine = load_package(package.path, options).engine
    try:
        total = len(prompts) * (1 + len(package.manifest.atoms) * len(coefficients))
        with progress.task("measure effects", total, "answers") as bar:
            answerer = Answerer(engine, package.digest, Decoding(max_tokens))
            measured = measure_atoms(package, answerer, prompts, coefficients, bar.advance)
    finally:
        engine.close()
    named = package.update(lambda cards: cards_with_measured(cards, measured))
    write_report(named)
    return named


def development_prompts(path: Path, per_behaviour: int) -> list[str]:
    """The first neutral development prompts of every behaviour: steering has to bring the behaviour in by itself."""
    rows = [row for row in read_prompts(path) if row.kind == "neutral" and row.split == "dev"]
    chosen = []
    for behaviour in dict.fromkeys(row.behaviour for row in rows):
        chosen += [row.prompt for row in islice((r for r in rows if r.behaviour == behaviour), per_behaviour)]
    if not chosen:
        raise DataError(f"{path} has no neutral development prompts; rows need kind 'neutral' and split 'dev'")
    return chosen
