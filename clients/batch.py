"""`batch`: a file of requests through the engine in this process or a server; one line out for each line in.

    scan      read the input once: count, check that ids are unique, see what an earlier run has answered
    connect   a running server, or the package served in this process
    work      as many requests at once as keep every slot busy; each answer is written as it comes

Memory holds the requests in flight and nothing else. Run again after a stop, it goes on where the output ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoms.errors import AtomsteerError, ConfigError, DataError
from clients.batch_lines import Defaults, read_lines
from clients.batch_requests import Asker, generated_tokens
from clients.batch_results import CustomIds, Results, open_results
from clients.connection import Connection, check_source, connect, read_source
from clients.plain_openai import without_environment

if TYPE_CHECKING:
    from rich.progress import Progress

    from server.embedded.load import EngineOptions

MOST_MIXES, _LONGEST_MIX = 10_000, 4096
"""What a scan counts one by one: so many different steerings, each of at most so many characters."""


@dataclass(frozen=True)
class BatchConfig:
    """`input` and `out` are files, `settings` what all lines of `out` share. `concurrency` requests run at once, each for
    `timeout` seconds at most."""

    input: Path
    out: Path
    defaults: Defaults
    concurrency: int
    max_retries: int = 10
    timeout: float | None = None
    retry_failed: bool = False
    quiet: bool = False

    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it goes on with, besides who answers."""
        defaults = self.defaults
        return {
            "input": self.input.name, "body": dict(defaults.body), "steering": defaults.steering,
            "column": defaults.column, "system": defaults.system,
        }  # fmt: skip


@dataclass
class Scan:
    """What a file holds. `mixes` counts the lines of each steering, as JSON; further ones are in `other_mixes`."""

    lines: int = 0
    answered: int = 0
    invalid: int = 0
    mixes: Counter[str] = field(default_factory=Counter)
    other_mixes: int = 0


@dataclass
class Outcome:
    """How a run went. `failed_before` lines of OUT hold errors of earlier runs; `tokens` are generated ones."""

    done: int = 0
    failed: int = 0
    failed_before: int = 0
    tokens: int = 0
    seconds: float = 0.0


def run_batch(
    config: BatchConfig, *, package: Path | None, server: str | None, key: str | None, options: EngineOptions | None
) -> Outcome:
    """Answers every line of the input that the output lacks.

    Raises DataError (a file that cannot be read, or ids that are not unique), ConfigError, StorageError,
    BatchStoppedError, and what `connect` raises.
    """
    check_source(package, server)
    if config.out.exists() and config.input.exists() and config.out.samefile(config.input):
        raise ConfigError(f"--out is {config.out}, which is the input; choose another file")
    settings = config.settings()
    if package is not None:  # a server is asked who it is once there is something to ask it
        settings["source"] = read_source(package)
    with open_results(config.out, settings, retry_failed=config.retry_failed) as results:
        scan = scan_input(config, results.ids)
        if scan.answered == scan.lines:
            return Outcome(failed_before=results.ids.failed)
        with connect(package, server, key, options) as connection:
            results.begin({"source": connection.source})
            return asyncio.run(answer_all(config, results, scan, connection))


def scan_input(config: BatchConfig, ids: CustomIds) -> Scan:
    """Reads the whole input once. Raises DataError for a custom_id that two lines have."""
    scan = Scan()
    for line in read_lines(config.input, config.defaults):
        if not ids.add_read(line.custom_id):
            raise DataError(f"{config.input} has the custom_id {line.custom_id[:80]!r} twice; ids must be unique")
        scan.lines += 1
        scan.answered += ids.is_answered(line.custom_id)
        scan.invalid += line.error is not None
        if line.error is None:
            mix = json.dumps(_steered_by(line.body), sort_keys=True)
            if mix in scan.mixes or (len(scan.mixes) < MOST_MIXES and len(mix) <= _LONGEST_MIX):
                scan.mixes[mix] += 1
            else:
                scan.other_mixes += 1
    return scan


def _steered_by(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that decide a request's mix; an experiment asks for whom it is."""
    steering = body.get("steering")
    by_unit = isinstance(steering, Mapping) and steering.get("experiment") is not None
    return {name: body.get(name) for name in ("model", "steering", *(("user", "metadata") if by_unit else ()))}


async def answer_all(config: BatchConfig, results: Results, scan: Scan, connection: Connection) -> Outcome:
    from openai import AsyncOpenAI

    left = (line for line in read_lines(config.input, config.defaults) if not results.ids.is_answered(line.custom_id))
    outcome, started = Outcome(failed_before=results.ids.failed), time.monotonic()
    with _progress(config.quiet) as bar:
        task = bar.add_task("batch", total=scan.lines, completed=scan.answered, rate=0.0, failed=0)

        async def work(asker: Asker) -> None:
            for line in left:  # all workers share one iterator: whoever is free takes the next line
                result = await asker.result(line)
                results.write(result)
                outcome.done += 1
                outcome.failed += result["error"] is not None
                outcome.tokens += generated_tokens(result)
                outcome.seconds = time.monotonic() - started
                bar.update(task, advance=1, failed=outcome.failed, rate=outcome.tokens / max(outcome.seconds, 1e-9))

        async with without_environment(
            AsyncOpenAI(base_url=connection.url, api_key=connection.key, max_retries=0, timeout=config.timeout)
        ) as client:
            asker = Asker(client, connection.model, config.max_retries)
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(config.concurrency):
                        group.create_task(work(asker))
            except ExceptionGroup as group_error:
                known = group_error.subgroup(AtomsteerError)
                if known is None:
                    raise
                raise _first(known) from group_error
    return outcome


def _first(group: ExceptionGroup[AtomsteerError]) -> AtomsteerError:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, ExceptionGroup) else first


def _progress(quiet: bool) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"),
        TextColumn("{task.fields[rate]:.1f} tok/s"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=Console(file=sys.stderr), disable=quiet,
    )  # fmt: skip
