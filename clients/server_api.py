"""A server's own routes over HTTP, for commands: requests and answers as plain data, errors as one exception."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx2 as httpx

from atoms.errors import AtomsteerError, ConfigError

TIMEOUT = 60.0
PATIENCE = 900.0
"""Seconds for an answer that the server works out from all that was observed of an experiment, or deletes it."""


class ServerAnswerError(AtomsteerError):
    """The server could not be reached, or refused; the message is its own. `status` is None where there was no answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ServerAPI:
    """The server at `url` (with or without ``/v1``), asked with `key`. Use it as a context manager.

    Raises ConfigError for a URL that is none, and for a key that no header can carry or that is a list of several.
    """

    def __init__(self, url: str, key: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        if key and "," in key:
            raise ConfigError(
                "the key has a comma: the variables of a server separate several keys so (ATOMSTEER_API_KEY=a,b), and a client "
                "sends one; give one of them"
            )
        if key and not all("!" <= character <= "~" for character in key):
            raise ConfigError(
                "the key has blanks or letters that are not ASCII, which no HTTP header carries; give another"
            )
        base = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._client = httpx.Client(base_url=f"{base}/v1/", headers=headers, transport=transport)
        except httpx.InvalidURL as error:
            raise ConfigError(
                f"{url!r} is no URL of a server ({error}); give one such as http://127.0.0.1:8000"
            ) from error
        self._url = base

    def __enter__(self) -> ServerAPI:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._client.close()

    def call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, seconds: float = TIMEOUT, **query: Any
    ) -> dict[str, Any]:
        """The JSON object that ``/v1/{path}`` answers with, within `seconds`.

        Raises ServerAnswerError, ConfigError for a NaN in `body`.
        """
        answer = self._request(method, path, body, query, seconds)
        try:
            result = answer.json()
        except ValueError:
            raise ServerAnswerError(
                f"{self._url} answered something that is not JSON; is it an atomsteer server?"
            ) from None
        if not isinstance(result, dict):
            raise ServerAnswerError(
                f"{self._url} answered with a JSON {type(result).__name__} and no object; is it an atomsteer server?"
            )
        return result

    def version(self) -> dict[str, Any]:
        """What ``/version`` answers, which names the package of an atomsteer server; empty where there is no such route."""
        try:
            return self.call("GET", f"{self._url}/version")
        except ServerAnswerError:
            return {}

    def download(self, path: str, out: Path, **query: Any) -> None:
        """Writes the answer's bytes to `out`, whole or not at all. Raises ServerAnswerError, StorageError."""
        from atoms.storage import write_bytes

        write_bytes(out, self._request("GET", path, None, query, PATIENCE).content)

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None, query: dict[str, Any], seconds: float
    ) -> httpx.Response:
        content = None if body is None else _json(body)
        headers = {} if content is None else {"Content-Type": "application/json"}
        try:
            answer = self._client.request(
                method,
                path,
                content=content,
                headers=headers,
                params=query,
                timeout=httpx.Timeout(TIMEOUT, read=seconds),
            )
        except httpx.ReadTimeout as error:
            raise ServerAnswerError(
                f"{self._url} did not answer within {seconds:g} s; what it was asked may still be done, so look first"
            ) from error
        except httpx.HTTPError as error:
            raise ServerAnswerError(
                f"{self._url} cannot be reached ({error}); start the server, or give another --server"
            ) from error
        if answer.is_redirect:
            raise ServerAnswerError(
                f"{self._url} redirects to {answer.headers.get('location', '')[:200]}; give that address"
            )
        if answer.is_error:
            raise ServerAnswerError(_message(answer), answer.status_code)
        return answer


def _json(body: dict[str, Any]) -> bytes:
    try:
        return json.dumps(body, allow_nan=False).encode()
    except ValueError as error:
        raise ConfigError("one of the numbers is infinite or none at all (nan); give one that is finite") from error


def _message(answer: httpx.Response) -> str:
    try:
        return f"{answer.json()['error']['message']} (status {answer.status_code})"
    except (ValueError, KeyError, TypeError):
        return f"the server answered with status {answer.status_code}"


def path_part(name: str) -> str:
    """`name` as one part of a path, whatever it contains: . and .., too, which as they are would climb."""
    return quote(name, safe="") if name.strip(".") else name.replace(".", "%2E")
