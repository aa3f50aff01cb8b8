"""What a batch reads: one request a line, from OpenAI batch files, text, CSV, JSONL and Parquet, one at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atoms.errors import DataError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_PARQUET_ROWS = 256


class InvalidLineError(ValueError):
    """A line that no request can be made of. The message becomes the line's error."""


@dataclass(frozen=True)
class BatchLine:
    """One request. `error` says why there is none; `custom_id` is ``line-N`` where the input names none."""

    custom_id: str
    url: str = URLS[0]
    body: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Defaults:
    """Fields for bodies that lack them, the default steering, and how plain prompts are read and asked."""

    body: Mapping[str, Any]
    steering: Mapping[str, Any] | None = None
    column: str | None = None
    system: str | None = None


def read_lines(path: Path, defaults: Defaults) -> Iterator[BatchLine]:
    """The requests of a file by its suffix; blank lines of text and JSONL count as none.

    Raises DataError for a file that cannot be read at all; a bad line becomes a BatchLine with an `error`.
    """
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".parquet": _parquet, ".txt": _text}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is not {', '.join(readers)}; rename it, or convert it")
    try:
        for number, row in reader(path):
            yield _line(number, row, defaults)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _line(number: int, row: Any, defaults: Defaults) -> BatchLine:
    name = f"line-{number}"
    if isinstance(row, Mapping) and row.get("custom_id") not in (None, ""):
        name = str(row["custom_id"])
    try:
        if isinstance(row, InvalidLineError):
            raise row
        url, body = _openai_request(row) if _is_openai(row) else (URLS[0], _plain_body(row, defaults))
        if body.get("stream"):
            raise InvalidLineError("the body asks for a stream, which a batch has no place for; leave stream out")
        missing = {field: value for field, value in defaults.body.items() if field not in body}
        if isinstance(row, Mapping) and (asked := row.get("steering")) is not None:
            if "steering" in body:
                raise InvalidLineError("steering is in the line and in its body; leave one out")
            body["steering"] = json.loads(asked) if isinstance(asked, str) else asked
        if body.get("steering") is None and defaults.steering is not None:
            body["steering"] = defaults.steering
        return BatchLine(name, url, missing | body)
    except ValueError as error:
        return BatchLine(name, error=str(error))


def _is_openai(row: Any) -> bool:
    return isinstance(row, Mapping) and isinstance(row.get("body"), Mapping)


def _openai_request(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    url, method = row.get("url", URLS[0]), row.get("method", "POST")
    if method != "POST":
        raise InvalidLineError(f"method is {str(method)[:32]!r}; it must be POST")
    if url not in URLS:
        raise InvalidLineError(f"url is {str(url)[:80]!r}; it must be one of {', '.join(URLS)}")
    return url, dict(row["body"])


def _plain_body(row: Any, defaults: Defaults) -> dict[str, Any]:
    """A chat with the prompt of a row as the user's message."""
    prompt = row
    if isinstance(row, Mapping):
        column = defaults.column or "prompt"
        if column not in row:
            raise InvalidLineError(
                f"there is no {column!r} among {', '.join(map(str, row))[:200]}; name it with --column"
            )
        prompt = row[column]
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidLineError(f"the prompt is {repr(prompt)[:80]}; it must be a text that is not empty")
    system = [{"role": "system", "content": defaults.system}] if defaults.system else []
    return {"messages": [*system, {"role": "user", "content": prompt}]}


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    for number, text in _text(path):
        try:
            yield number, json.loads(text)
        except ValueError as error:
            yield number, InvalidLineError(f"line {number} is not JSON: {error}")


def _text(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, text in enumerate(file, 1):
            if stripped := text.strip():
                yield number, stripped


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from enumerate(csv.DictReader(file), 1)


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for rows in file.iter_batches(batch_size=_PARQUET_ROWS):
                for row in rows.to_pylist():
                    number += 1
                    yield number, {name: value for name, value in row.items() if value is not None}
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
