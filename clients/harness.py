"""Opens the offline harness on a package: one model in memory, shared by the embedded engine and the meters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atoms.package import Package
from offline.evaluation.answers import AnswerLog, Decoding
from offline.evaluation.directions import Directions
from offline.evaluation.harness import Harness
from server.embedded.engine import EmbeddedEngine
from server.embedded.load import EngineOptions, load_served

ANSWERS = "answers.jsonl"


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
