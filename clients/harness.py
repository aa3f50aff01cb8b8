"""Opens the offline harness on a package: one model in memory, shared by the embedded engine and the meters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atoms.package import Package, refuse_inside
from offline.evaluation.answers import AnswerLog, Decoding
from offline.evaluation.directions import Directions
from offline.evaluation.harness import Harness
from server.embedded.engine import EmbeddedEngine
from server.embedded.load import EngineOptions, load_served

ANSWERS = "answers.jsonl"


def results_of(package: Path, kind: str, out: Path | None) -> Path:
    """Where the results of a measurement go: `out`, or a directory beside the package that is named after both.

    Raises ConfigError for one in the package.
    """
    where = (
        package.resolve() if package.name in ("", "..") else package
    )  # "." has no name, and what lies beside it is not in it
    results = out or where.with_name(f"{where.name}.{kind}")
    refuse_inside(package, results)
    return results


@contextmanager
def open_harness(package: Package, work: Path, decoding: Decoding, options: EngineOptions) -> Iterator[Harness]:
    """A harness whose answers are kept in `work`. Raises as `load_package`, DataError for a damaged log of answers."""
    log = AnswerLog(work / ANSWERS)
    model, tokenizer = load_served(package, options)
    directions = Directions(package)
    engine = EmbeddedEngine(model, tokenizer, package.base_adapter.space, directions.compose, slots=options.slots)
    try:
        with Harness(engine, model, directions, decoding, log) as harness:
            yield harness
    finally:
        engine.close()
