"""Detector rates against coefficient on held-out prompts, with 95% intervals.

    python -m bench.steering --package demo/package [--behaviours bulleted-list,yes-no] [--json FILE]

For every named atom, its own detector is counted over the held-out prompts of its behaviour, inviting and neutral apart,
at each coefficient. Naming used development prompts only, so nothing was tuned on these. Greedy answers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from atoms.detectors import get_detector
from atoms.package import Package
from offline.evaluation.answers import Answerer, Decoding
from offline.evaluation.measures import degenerate_share, outcomes
from offline.evaluation.prompts import read_prompts
from offline.evaluation.statistics import wilson_interval
from offline.progress import Progress
from offline.shipped import shipped_file
from server.embedded.load import EngineOptions, load_package

COEFFICIENTS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--behaviours", help="comma separated; default: every named atom")
    parser.add_argument("--prompts", type=Path, default=shipped_file("demo_prompts"))
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = measure(options, Progress())
    for row in results:
        low, high = row["interval"]
        print(f"{row['behaviour']:<15}{row['kind']:<9}{row['coefficient']:+3.0f}  {row['rate']:>4.0%} [{low:.0%}, {high:.0%}]"
              f"  degenerate {row['degenerate']:.0%}  n={row['n']}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def measure(options: argparse.Namespace, progress: Progress) -> list[dict]:
    """One row for each behaviour, kind of prompt and coefficient."""
    loaded = load_package(options.package, EngineOptions(slots=options.slots))
    package, engine = Package.read(options.package), loaded.engine
    names = (
        options.behaviours.split(",") if options.behaviours else [c.alias for c in package.manifest.atoms if c.alias]
    )
    heldout = [row for row in read_prompts(options.prompts) if row.split == "heldout"]
    results: list[dict] = []
    answerer = Answerer(engine, package.digest, Decoding(options.max_tokens))
    try:
        with progress.task("answers", len(names) * len(COEFFICIENTS), "cells") as bar:
            for name in names:
                prompts = [row for row in heldout if row.behaviour == name]
                mixes = [package.mix({name: c}) for c in COEFFICIENTS]
                answers = answerer.answer([row.prompt for row in prompts], mixes)
                for coefficient, given in zip(COEFFICIENTS, answers, strict=True):
                    results += _rows(name, coefficient, prompts, given)
                bar.advance(len(COEFFICIENTS))
    finally:
        engine.close()
    return results


def _rows(name: str, coefficient: float, prompts, answers) -> list[dict]:
    rows = []
    for kind in ("neutral", "inviting"):
        chosen = [a for p, a in zip(prompts, answers, strict=True) if p.kind == kind]
        count = sum(outcomes(chosen, get_detector(name)))
        rows.append({"behaviour": name, "kind": kind, "coefficient": coefficient, "rate": count / len(chosen),
                     "n": len(chosen), "interval": wilson_interval(count, len(chosen)),
                     "degenerate": degenerate_share(chosen)})  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
