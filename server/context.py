"""What is known of one request while it runs, and the outermost middleware that opens and closes it.

Gives every response its ``X-Request-Id`` and, once the mix is known, ``X-Atomsteer-Mix`` and ``X-Atomsteer-Arm``; turns
unexpected exceptions into a 500 that tells nothing; counts and logs. Never logs a body.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from dataclasses import dataclass, field

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atoms.errors import EngineStoppedError
from server.errors import ClientDisconnectedError, error_kind
from server.metrics import SteeringMetrics
from server.responses import error_response
from server.steering import ResolvedSteering

REQUEST_ID_HEADER, MIX_HEADER, ARM_HEADER = "X-Request-Id", "X-Atomsteer-Mix", "X-Atomsteer-Arm"
_LONGEST_ID = 128
_log = logging.getLogger("atomsteer.server")
_access_log = logging.getLogger("atomsteer.access")


@dataclass(slots=True)
class RequestContext:
    """One request. The routes fill in `generates`, `steering` and, where a stream breaks off, `status`."""

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    generates: bool = False
    steering: ResolvedSteering | None = None
    status: int = 0

    @property
    def seconds(self) -> float:
        """Since the request came in."""
        return time.perf_counter() - self.started


@dataclass(slots=True)
class Traffic:
    """The requests in progress, and whether new ones are refused because the server is about to stop."""

    active: int = 0
    draining: bool = False

    def refuse_if_draining(self) -> None:
        """Raises EngineStoppedError while the server drains."""
        if self.draining:
            raise EngineStoppedError("the server is shutting down")


class RequestContextMiddleware:
    """Puts a `RequestContext` into ``scope["state"]["context"]`` and closes it when the response has ended."""

    def __init__(self, app: ASGIApp, traffic: Traffic, metrics: SteeringMetrics, access_log: bool) -> None:
        self._app = app
        self._traffic = traffic
        self._metrics = metrics
        self._logs = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        context = RequestContext(request_id(dict(scope["headers"]).get(b"x-request-id", b"")))
        scope.setdefault("state", {})["context"] = context
        self._traffic.active += 1
        started = False

        async def send_marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                context.status = context.status or message["status"]
                _mark(MutableHeaders(scope=message), context)
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except Exception as error:  # the outermost place: whatever comes here is a bug
            _log.exception("request %s failed", context.request_id)
            context.status = error_kind(error).status
            if not started:
                await error_response(error)(scope, receive, send_marked)
        finally:
            self._traffic.active -= 1
            self._close(scope, context)

    def _close(self, scope: Scope, context: RequestContext) -> None:
        context.status = context.status or error_kind(ClientDisconnectedError("")).status  # no response was started
        if context.generates:
            self._metrics.request_finished(context.steering, context.status, context.seconds)
        if self._logs:
            self._write(scope, context)

    def _write(self, scope: Scope, context: RequestContext) -> None:
        mix = context.steering.digest if context.steering else "-"
        _access_log.info("%s %r %d %.3fs %s %s", scope["method"], scope["path"][:200], context.status, context.seconds,
                         context.request_id, mix)  # fmt: skip


def request_id(header: bytes) -> str:
    """The client's id with only letters, digits and ``._:-`` kept, cut to 128; a new one if nothing is left."""
    kept = re.sub(r"[^A-Za-z0-9._:-]", "", header.decode("latin-1"))[:_LONGEST_ID]
    return kept or uuid.uuid4().hex


def _mark(headers: MutableHeaders, context: RequestContext) -> None:
    headers[REQUEST_ID_HEADER] = context.request_id
    if context.steering is not None:
        headers[MIX_HEADER] = context.steering.digest
        if context.steering.arm is not None:
            headers[ARM_HEADER] = context.steering.arm
