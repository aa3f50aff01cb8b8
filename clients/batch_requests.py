"""One line of a batch, asked of a server: tries, waits between them, and the result line that comes of it.

Retried are answers that may be others the next time: 408, 425, 429 and 5xx but 501, and connections that break. Waits
are as long as ``Retry-After`` says, else they double from half a second to eight, with jitter.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from itertools import count
from typing import TYPE_CHECKING, Any

from atoms.errors import AtomsteerError
from clients.batch_lines import BatchLine

if TYPE_CHECKING:
    from httpx2 import Response
    from openai import APIStatusError, AsyncOpenAI

MIX_HEADER = "x-atomsteer-mix"
LONGEST_WAIT = 3600.0
"""Seconds that ``Retry-After`` is obeyed for at most."""
_AWAY = (502, 503)
"""Statuses of a server, or of a proxy before it, that can answer nobody: its engine has stopped, or nothing is behind it. A
500 or 504 may be its line's doing."""
_SHOWN = 200
"""Characters of an answer that is none, in its line's error."""


class BatchStoppedError(AtomsteerError):
    """Something that would fail every further line; what is done is kept."""


@dataclass(frozen=True)
class Asker:
    """Asks lines of the server that `client` (which must not retry by itself) speaks to; `model` is for those that name
    none, `max_retries` tries follow a line's first one."""

    client: AsyncOpenAI
    model: str
    max_retries: int

    async def result(self, line: BatchLine) -> dict[str, Any]:
        """The line to write: OpenAI's batch output. Raises BatchStoppedError for what would befall every further line."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        if line.error is not None:
            return _result(line, None, "invalid_line", line.error)
        try:
            response = await self._answer(line)
        except APITimeoutError as error:
            return _result(line, None, "timeout", f"no answer in time: {error}")
        except APIConnectionError as error:
            raise BatchStoppedError(
                f"{self.client.base_url} cannot be reached ({error.__cause__ or error}); what is answered is kept: run the "
                "command again once the server is back"
            ) from error
        except APIStatusError as error:
            if error.status_code == 401:  # a 403 concerns its line alone, such as one that leaves tested ranges
                raise BatchStoppedError(f"the server refuses the key with status 401: {error.message}") from error
            if error.status_code in _AWAY:
                raise BatchStoppedError(
                    f"{self.client.base_url} still answers with status {error.status_code} after {self.max_retries + 1} tries: "
                    f"{error.message}; what is answered is kept: run the command again once the server is back"
                ) from error
            return _result(line, error.response, error.code or f"status_{error.status_code}", error.message)
        if line.body.get("steering") is not None and MIX_HEADER not in response.headers:
            raise BatchStoppedError(f"{self.client.base_url} ignores steering: its answers have no {MIX_HEADER}; is it an "
                                    "atomsteer server?")  # fmt: skip
        if not _is_completion(_json(response)):
            return _result(line, response, "invalid_answer", f"the server answered with status {response.status_code} and "
                           f"no completion: {response.text[:_SHOWN]!r}; is {self.client.base_url} an OpenAI API?")  # fmt: skip
        return _result(line, response)

    async def _answer(self, line: BatchLine) -> Response:
        """The answer of the first try that succeeds, or the error of the last."""
        import httpx2 as httpx
        from openai import APIConnectionError, APIStatusError

        body = {"model": self.model, **line.body}
        for tries in count():
            try:
                return await self.client.post(line.url.removeprefix("/v1"), body=body, cast_to=httpx.Response)
            except APIConnectionError:
                if tries >= self.max_retries:
                    raise
                wait = _backoff(tries)
            except APIStatusError as error:
                if tries >= self.max_retries or not _may_pass(error.status_code):
                    raise
                wait = _asked_wait(error) or _backoff(tries)
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")


def generated_tokens(result: Mapping[str, Any]) -> int:
    """Of the answer in a result line; 0 where it does not say."""
    body = (result["response"] or {}).get("body")
    usage = body.get("usage") if isinstance(body, Mapping) else None
    counts = [usage.get(name) for name in ("completion_tokens", "output_tokens")] if isinstance(usage, Mapping) else []
    return next((count for count in counts if isinstance(count, int)), 0)


def _may_pass(status: int) -> bool:
    return status in (408, 425, 429) or (status >= 500 and status != 501)


def _backoff(tries: int) -> float:
    return float(min(8.0, 0.5 * 2 ** min(tries, 10)) * random.uniform(0.75, 1.0))


def _asked_wait(error: APIStatusError) -> float | None:
    """Seconds that the server asks to wait, a number or a date; None where it says nothing, or nothing sensible."""
    asked = error.response.headers.get("retry-after", "")
    try:
        seconds = float(asked)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(asked).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(seconds, LONGEST_WAIT) if seconds > 0 else None


def _result(line: BatchLine, response: Response | None, code: str | None = None, message: str = "") -> dict[str, Any]:
    answered = None
    if response is not None:
        answered = {"status_code": response.status_code, "request_id": response.headers.get("x-request-id"),
                    "body": _json(response)}  # fmt: skip
    error = None if code is None else {"code": code, "message": message}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": line.custom_id, "response": answered, "error": error}


def _json(response: Response) -> Any:
    """The body as it can be written again; its text if that is not JSON, or has numbers that JSON has not."""
    try:
        body = response.json()
        json.dumps(body, allow_nan=False)
    except (ValueError, RecursionError):
        return response.text
    return body


def _is_completion(body: object) -> bool:
    return isinstance(body, Mapping) and any(isinstance(body.get(name), list) for name in ("choices", "output"))
