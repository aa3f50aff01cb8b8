"""`batch --dry-run`: what a file of requests asks for, and what each of its mixes would cost. Loads no model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from atoms.errors import AtomsteerError, ConfigError
from clients.batch import MOST_MIXES, BatchConfig, Scan, scan_input
from clients.batch_results import CustomIds, read_answered
from clients.connection import check_source
from clients.tables import print_table

Preview = tuple[int, str, float | str]
"""Of a steering: its lines, what was asked for, and its predicted KL or why it is refused."""


def print_dry_run(config: BatchConfig, *, package: Path | None, server: str | None, key: str | None) -> None:
    """Prints what a run would do: lines, what is done, and the predicted KL of each mix."""
    check_source(package, server)
    scan = scan_for_dry_run(config)
    table = Table(title=f"{scan.lines} lines: {scan.answered} answered, {scan.lines - scan.answered} to do, {scan.invalid} "
                  "that hold no request", title_justify="left")  # fmt: skip
    for heading in ("lines", "steering", "predicted KL, nats a token"):
        table.add_column(heading, overflow="fold")
    rows: Counter[tuple[str, float | str]] = Counter()
    for count, asked, kl in _previews(scan, package, server, key):
        rows[asked, kl] += count  # units of one arm are one row
    for (asked, kl), count in rows.most_common():
        table.add_row(str(count), Text(asked), Text(f"refused: {kl}" if isinstance(kl, str) else f"{kl:.4f}"))
    if scan.other_mixes:
        table.add_row(str(scan.other_mixes), f"beyond {MOST_MIXES} different ones, or too long", "not looked up")
    print_table(table)


def scan_for_dry_run(config: BatchConfig) -> Scan:
    """As `run_batch` would see the files; nothing is written."""
    ids = CustomIds()
    try:
        read_answered(config.out, ids, cut=False)
        return scan_input(config, ids)
    finally:
        ids.close()


def _previews(scan: Scan, package: Path | None, server: str | None, key: str | None) -> Iterator[Preview]:
    if server is not None:
        return _on_server(scan, server, key)
    assert package is not None, "there is one of the two"
    return _of_package(scan, package)


def _on_server(scan: Scan, server: str, key: str | None) -> Iterator[Preview]:
    """By the server's own preview."""
    from clients.server_api import ServerAnswerError, ServerAPI

    with ServerAPI(server, key) as api:
        for asked, count in scan.mixes.most_common():
            request = json.loads(asked)
            try:
                echo = api.call("POST", "steering/preview", {k: v for k, v in request.items() if v is not None})
                yield count, _text(request, echo["steering"].get("arm")), echo["steering"]["predicted_kl"]
            except ServerAnswerError as error:
                if error.status is None:
                    raise
                yield count, _text(request), str(error)
            except (KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{server} previews no steering; is it an atomsteer server?") from error


def _of_package(scan: Scan, path: Path) -> Iterator[Preview]:
    """As a server of the package would resolve it."""
    from atoms.package import Package
    from server.config import ServeConfig
    from server.errors import RequestError
    from server.steering import Steering

    steering = Steering.of(Package.read(path), ServeConfig(package=path))
    for asked, count in scan.mixes.most_common():
        request = json.loads(asked)
        try:
            preset = steering.preset_of_model(request["model"] or steering.served_name)
            yield count, _text(request), steering.resolve(request["steering"], model_preset=preset).predicted_kl
        except (AtomsteerError, RequestError) as error:
            yield count, _text(request), str(error)


def _text(request: Mapping[str, Any], arm: str | None = None) -> str:
    """A request's steering for people; of an experiment, with the arm that its unit has."""
    steering, model = request["steering"], request["model"]
    if not steering:
        return "unsteered" if not model or ":" not in model else f"model {model}"
    text = json.dumps(steering, ensure_ascii=False)
    return text if "user" not in request else f"{text}: {f'arm {arm}' if arm else 'no arm'}"
