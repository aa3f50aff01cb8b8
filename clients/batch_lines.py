"""What a batch reads: one request a line, from OpenAI batch files, text, CSV, JSONL and Parquet, one at a time.

A line that no request can be made of becomes a BatchLine with an `error`, so that it is answered like the others.
"""

from __future__ import annotations

import csv
import json
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atoms.errors import DataError

_TOKEN_LIMITS = {
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
}
"""What each URL calls the longest answer; a body has one of its names at most, and gets the first where it has none."""
URLS = tuple(_TOKEN_LIMITS)
LONGEST_LINE = 16 << 20
"""In bytes. Longer lines are skipped piece by piece, so that memory stays bounded."""
LONGEST_ID = 512
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
    """Fields for bodies that lack them, `max_tokens` by the URL's own name, the steering of lines that say nothing of it, and
    how plain prompts are read and asked."""

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
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no regular file, and a batch reads its input twice; write it to a file first")
    try:
        for number, row in reader(path):
            yield _line(number, row, defaults)
    except (OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _line(number: int, row: Any, defaults: Defaults) -> BatchLine:
    name = f"line-{number}"
    try:
        if isinstance(row, InvalidLineError):
            raise row
        name = _custom_id(row) or name
        url, body = _openai_request(row) if _is_openai(row) else (URLS[0], _plain_body(row, defaults))
        if body.get("stream"):
            raise InvalidLineError("the body asks for a stream, which a batch has no place for; leave stream out")
        missing = _missing(url, body, defaults.body)
        if isinstance(row, Mapping) and (asked := row.get("steering")) not in (None, ""):
            if "steering" in body:
                raise InvalidLineError("steering is in the line and in its body; leave one out")
            body["steering"] = json.loads(asked) if isinstance(asked, str) else asked
        if defaults.steering is not None and body.get("steering") is None and not _names_preset(body.get("model")):
            body["steering"] = defaults.steering
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        return BatchLine(name, url, missing | body)
    except (ValueError, TypeError, RecursionError) as error:
        return BatchLine(name, error=_reason(error))


def _names_preset(model: object) -> bool:
    """Whether `model` is ``name:preset``, by which a request says its steering as well."""
    return isinstance(model, str) and ":" in model


def _missing(url: str, body: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The default fields that `body` says nothing of; a server refuses a limit of tokens under two names or a foreign one."""
    missing = {name: value for name, value in defaults.items() if name != "max_tokens" and name not in body}
    limits = _TOKEN_LIMITS[url]
    if "max_tokens" in defaults and not any(name in body for name in limits):
        missing[limits[0]] = defaults["max_tokens"]
    return missing


def _custom_id(row: Any) -> str | None:
    found = row.get("custom_id") if isinstance(row, Mapping) else None
    if found in (None, ""):
        return None
    if isinstance(found, bool) or not isinstance(found, str | int) or len(str(found)) > LONGEST_ID:
        raise InvalidLineError(f"custom_id is {repr(found)[:80]}; it must be a text of at most {LONGEST_ID} characters")
    str(found).encode()
    return str(found)


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return f"the line holds text that is not UTF-8 (or half of a surrogate pair): {error.reason}"  # type: ignore[attr-defined]
    if isinstance(error, RecursionError):
        return "the line is nested too deeply"
    return str(error)


def _is_openai(row: Any) -> bool:
    return isinstance(row, Mapping) and isinstance(row.get("body"), Mapping)


def _openai_request(row: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    url, method = row.get("url") or URLS[0], row.get("method") or "POST"
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
        if isinstance(text, InvalidLineError):
            yield number, text
            continue
        try:
            yield number, json.loads(text, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            yield number, InvalidLineError(f"line {number} is not JSON: {error}")


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


def _text(path: Path) -> Iterator[tuple[int, Any]]:
    for number, raw in enumerate(_raw_lines(path), 1):
        if raw is None:
            yield number, InvalidLineError(f"line {number} is longer than {LONGEST_LINE} bytes")
            continue
        try:
            if stripped := raw.decode("utf-8").strip():
                yield number, stripped
        except UnicodeDecodeError as error:
            yield number, InvalidLineError(f"line {number} is not UTF-8: {error.reason} at byte {error.start + 1}")


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    """Bytes that are not UTF-8 become lone surrogates here, which `_line` refuses: so a bad cell costs its row alone."""

    def texts() -> Iterator[str]:
        for number, raw in enumerate(_raw_lines(path), 1):
            if raw is None:
                raise DataError(f"line {number} of {path} is longer than {LONGEST_LINE} bytes; shorten or remove it")
            yield raw.decode("utf-8", "surrogateescape")

    csv.field_size_limit(LONGEST_LINE)  # of the whole process: the module has no other
    yield from enumerate(csv.DictReader(texts()), 1)


def _raw_lines(path: Path) -> Iterator[bytes | None]:
    """The lines with their ends and without a byte order mark; None for one that is too long, which is never held whole."""
    with path.open("rb") as file:
        start = file.read(len(BOM_UTF8))
        if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            raise DataError(f"{path} is UTF-16; save it as UTF-8, or run: iconv -f UTF-16 -t UTF-8 {path.name}")
        if start != BOM_UTF8:
            file.seek(0)
        while line := file.readline(LONGEST_LINE):
            if len(line) < LONGEST_LINE or line.endswith(b"\n"):
                yield line
                continue
            while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass
            yield None


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for rows in file.iter_batches(batch_size=_PARQUET_ROWS):
                for row in rows.to_pylist(maps_as_pydicts="lossy"):
                    number += 1
                    yield number, {name: _without_nulls(value) for name, value in row.items()}
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _without_nulls(value: Any) -> Any:
    """A cell without the nulls by which Arrow fills up structs: all rows have the keys of all, of `atoms` as of `body`."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
