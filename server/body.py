"""Request bodies: bounded in size and time while they arrive, declared as JSON, and one object."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import (
    BodyTimeoutError,
    BodyTooLargeError,
    ClientDisconnectedError,
    InvalidJSONError,
    MediaTypeError,
)
from server.responses import error_response

_DISCARDED = 16
"""Times the limit: as much of a body that is too large is read and thrown away. A server that answers and hangs up while
its client still writes has its answer lost with the connection."""


class BodyLimitMiddleware:
    """Refuses bodies above `limit` bytes, by their declared length or once they grow past it, and those that have not
    arrived within `seconds`."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float = 30.0) -> None:
        self._app = app
        self._limit = limit
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"")
        deadline = asyncio.get_running_loop().time() + self._seconds
        if declared.isdigit() and int(declared) > self._limit:
            if b"expect" not in headers:  # such a client sends its body once it is asked to
                await self._discard(receive, deadline)
            return await error_response(self._error(int(declared)))(scope, receive, send)
        received, complete = 0, False

        async def receive_bounded() -> Message:
            nonlocal received, complete
            if complete:  # what comes now is that the client hangs up, which may take as long as the answer
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise BodyTimeoutError(f"the body has not arrived within {self._seconds:g} s") from error
            received += len(message.get("body", b""))
            if received > self._limit:
                if message.get("more_body", False):
                    await self._discard(receive, deadline)
                raise self._error(received)
            complete = not message.get("more_body", False)
            return message

        await self._app(scope, receive_bounded, send)

    async def _discard(self, receive: Receive, deadline: float) -> None:
        size, more = 0, True
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while more and size < _DISCARDED * self._limit:
                    message = await receive()
                    size += len(message.get("body", b""))
                    more = message.get("more_body", False)

    def _error(self, size: int) -> BodyTooLargeError:
        return BodyTooLargeError(f"the body has {size} bytes or more; the limit is {self._limit}: shorten the prompt")


async def read_json(request: Request) -> dict[str, Any]:
    """The body as one JSON object.

    JSON must be declared: a web page may send any other type to a server on this machine without asking it first.

    Raises MediaTypeError, InvalidJSONError, BodyTooLargeError, ClientDisconnectedError.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise MediaTypeError(
            f"the body's type is {media_type[:80] or 'not given'!r}; send the header 'Content-Type: application/json'"
        )
    try:
        data = from_json(await request.body())
    except ClientDisconnect as error:
        raise ClientDisconnectedError("the client hung up while it sent its request") from error
    except ValueError as error:
        raise InvalidJSONError(f"the body is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise InvalidJSONError(f"the body is a JSON {type(data).__name__}; send an object")
    return data
