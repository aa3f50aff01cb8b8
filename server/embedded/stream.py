"""Server-sent events, and work that ends when its client hangs up.

Each event is ``data: {json}\\n\\n``; the last is ``data: [DONE]``. A stream that fails after it has begun ends with
``data: {"error": …}`` and no ``[DONE]``; one that fails before its first event is an ordinary error response.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.context import RequestContext
from server.errors import ClientDisconnectedError, error_body, error_kind
from server.responses import JSONResponse, error_response

_log = logging.getLogger("atomsteer.server")
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold events back
}
DONE = b"data: [DONE]\n\n"

Result = TypeVar("Result")
Events = AbstractAsyncContextManager[AsyncIterator[bytes]]
"""A source of JSON events; leaving it frees what feeds it."""


def sse(payload: bytes) -> bytes:
    """One event. JSON has no raw line breaks, so one data line is enough."""
    return b"data: " + payload + b"\n\n"


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled, and waited for, as soon as the client hangs up.

    The request's body must have been read. Raises ClientDisconnectedError, and what `work` raises.
    """
    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnectedError("the client hung up before its answer was complete")
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class EventStream(Response):
    """Streams the events of `open_events`, which is entered only when the response begins, and always left. `frame` makes
    an event of JSON; `end` follows the last one."""

    def __init__(
        self,
        open_events: Callable[[], Events],
        context: RequestContext,
        frame: Callable[[bytes], bytes] = sse,
        end: bytes = DONE,
    ) -> None:
        super().__init__(headers=_HEADERS)
        self._frame = frame
        self._end = end
        del self.headers["content-length"]
        self._open_events = open_events
        self._context = context
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send_events(send))
        except Exception as error:
            await self._end_with(error, scope, receive, send)

    async def _send_events(self, send: Send) -> None:
        async with self._open_events() as events:
            async for payload in events:
                await self._begin(send)
                await send({"type": "http.response.body", "body": self._frame(payload), "more_body": True})
        await self._begin(send)
        await send({"type": "http.response.body", "body": self._end, "more_body": False})

    async def _begin(self, send: Send) -> None:
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def _end_with(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        kind = error_kind(error)
        if kind.status == 500:
            _log.error("request %s failed", self._context.request_id, exc_info=error)
        if not self._begun:
            return await error_response(error)(scope, receive, send)
        self._context.status = kind.status
        if not isinstance(error, ClientDisconnectedError | OSError):
            payload = JSONResponse().render(error_body(error))
            await send({"type": "http.response.body", "body": self._frame(payload), "more_body": False})


async def _disconnect(receive: Receive) -> None:
    """Returns when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass
