"""What is known of one request while it runs, and the outermost middleware that opens and closes it.

Gives every response its ``X-Request-Id`` and, once the mix is known, ``X-Atomsteer-Mix`` and ``X-Atomsteer-Arm``; says on
overload when to come back; turns unexpected exceptions into a 500 that tells nothing; counts and logs. Logs no body but
for the prompt, and that only where it is asked for.
"""

from __future__ import annotations

import logging
import math
import re
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atoms.errors import EngineStoppedError
from server.errors import ClientDisconnectedError, error_kind
from server.metrics import SteeringMetrics
from server.quotas import Account
from server.responses import error_response
from server.steering import ResolvedSteering

REQUEST_ID_HEADER, MIX_HEADER, ARM_HEADER = "X-Request-Id", "X-Atomsteer-Mix", "X-Atomsteer-Arm"
EXPOSED_HEADERS = (REQUEST_ID_HEADER, MIX_HEADER, ARM_HEADER, "Retry-After", "x-should-retry")
"""Those that a web page of an allowed origin may read."""
_LONGEST_ID = 128
_OVERLOADED = (429, 503)
_log = logging.getLogger("atomsteer.server")
_access_log = logging.getLogger("atomsteer.access")


@dataclass(slots=True)
class RequestContext:
    """One request. The middleware and routes that it passes fill in what they find out; `status` also where a stream
    breaks off."""

    request_id: str
    started: float = field(default_factory=time.perf_counter)
    generates: bool = False
    steering: ResolvedSteering | None = None
    status: int = 0
    caller: str = "-"
    account: Account | None = None
    prompt: Any = None
    prompt_tokens: int = 0
    generated_tokens: int = 0

    @property
    def seconds(self) -> float:
        """Since the request came in."""
        return time.perf_counter() - self.started

    def read(self, tokens: int) -> None:
        """Prompt tokens were computed for the request."""
        self.prompt_tokens += tokens
        if self.account is not None:
            self.account.spend(tokens)

    def generated(self, tokens: int) -> None:
        self.generated_tokens += tokens
        if self.account is not None:
            self.account.spend(tokens)


class Traffic:
    """The requests in progress, how fast they have been ending, and whether new ones are refused because the server is
    about to stop. `slots` is how many the engine works on at once."""

    def __init__(self, slots: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self.active = 0
        self.generating = 0
        self.draining = False
        self.slots = slots
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=_MOST_ENDS)

    def refuse_if_draining(self) -> None:
        """Raises EngineStoppedError while the server drains."""
        if self.draining:
            raise EngineStoppedError("the server is shutting down")

    def ended(self) -> None:
        """A request got its whole answer."""
        self._ends.append(self._clock())

    def retry_after(self) -> int:
        """Whole seconds until those that now wait will have been taken on, at the rate of the last minute's endings."""
        now = self._clock()
        while self._ends and now - self._ends[0] > _WINDOW:
            self._ends.popleft()
        if not self._ends:
            return _UNKNOWN_WAIT
        rate = len(self._ends) / max(1.0, now - self._ends[0])
        waiting = max(1, self.generating - self.slots)
        return max(1, min(_LONGEST_WAIT, math.ceil(waiting / rate)))


_WINDOW = 60.0
_MOST_ENDS = 10_000
_UNKNOWN_WAIT = 5
"""Seconds to wait where no answer has ended within the last minute."""
_LONGEST_WAIT = 120


class RequestContextMiddleware:
    """Puts a `RequestContext` into ``scope["state"]["context"]`` and closes it when the response has ended."""

    def __init__(
        self, app: ASGIApp, traffic: Traffic, metrics: SteeringMetrics, access_log: bool, log_prompts: bool = False
    ) -> None:
        self._app = app
        self._traffic = traffic
        self._metrics = metrics
        self._logs = access_log
        self._logs_prompts = log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        context = RequestContext(request_id(dict(scope["headers"]).get(b"x-request-id", b"")))
        scope["state"] = {**scope.get("state", {}), "context": context}
        self._traffic.active += 1
        started = False

        async def send_marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                context.status = context.status or message["status"]
                self._mark(MutableHeaders(scope=message), context, message["status"])
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

    def _mark(self, headers: MutableHeaders, context: RequestContext, status: int) -> None:
        headers[REQUEST_ID_HEADER] = context.request_id
        if status in _OVERLOADED and "retry-after" not in headers:
            headers["Retry-After"] = str(self._traffic.retry_after())
        if context.steering is not None:
            headers[MIX_HEADER] = context.steering.digest
            if context.steering.arm is not None:
                headers[ARM_HEADER] = context.steering.arm

    def _close(self, scope: Scope, context: RequestContext) -> None:
        context.status = context.status or error_kind(ClientDisconnectedError("")).status  # no response was started
        if context.generates:
            self._traffic.generating -= 1
            if context.status == 200:
                self._traffic.ended()
            self._metrics.request_finished(context.steering, context.status, context.seconds)
        if self._logs:
            self._write(scope, context)

    def _write(self, scope: Scope, context: RequestContext) -> None:
        """One line in the text format; in JSON the same and each thing known, as a field of its own."""
        steering = context.steering
        known = {
            "method": scope["method"], "path": scope["path"][:200], "status": context.status,
            "seconds": round(context.seconds, 3), "request_id": context.request_id, "key": context.caller,
            "mix": steering.digest if steering else None, "preset": steering.preset if steering else None,
            "experiment": steering.experiment if steering else None, "arm": steering.arm if steering else None,
            "prompt_tokens": context.prompt_tokens, "generated_tokens": context.generated_tokens,
        }  # fmt: skip
        line = "%s %r %d %.3fs %s %s %s"
        values = [known["method"], known["path"], context.status, context.seconds, context.request_id,
                  known["mix"] or "-", context.caller]  # fmt: skip
        if self._logs_prompts and context.prompt is not None:
            known["prompt"] = context.prompt
            line, values = f"{line} %r", [*values, context.prompt]
        _access_log.info(line, *values, extra=known)


def request_id(header: bytes) -> str:
    """The client's id with only letters, digits and ``._:-`` kept, cut to 128; a new one if nothing is left."""
    kept = re.sub(r"[^A-Za-z0-9._:-]", "", header.decode("latin-1"))[:_LONGEST_ID]
    return kept or uuid.uuid4().hex


def begin_generating(context: RequestContext, traffic: Traffic) -> None:
    """Counts the request among those that generate. Raises EngineStoppedError while the server drains."""
    context.generates = True
    traffic.generating += 1
    traffic.refuse_if_draining()
