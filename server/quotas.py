"""How much one key may ask for: requests and tokens a minute, and requests at once.

Each rate is a token bucket: full at a minute's worth, refilled evenly. What an answer costs is known only as it is
generated, so tokens are taken afterwards and a bucket may fall below zero; the key then waits until it is above again,
and over any span gets no more than its rate and one minute's worth. (Libraries of rate limits test and take at once; one
that forgives what came on top, as fixed windows do, would let a key exceed its rate by its longest answers.)

Buckets live in one process: with several API processes or replicas each grants its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth import Caller
from server.errors import QuotaError
from server.limits import Quota
from server.responses import error_response
from server.routes import is_own_path

_MINUTE = 60.0


class Bucket:
    """Holds at most `capacity`, which is also what flows in within a minute. May be overdrawn."""

    def __init__(self, capacity: int, clock: Callable[[], float]) -> None:
        self.capacity = capacity
        self._clock = clock
        self._level = float(capacity)
        self._seen = clock()

    @property
    def level(self) -> float:
        now = self._clock()
        self._level = min(self.capacity, self._level + (now - self._seen) * self.capacity / _MINUTE)
        self._seen = now
        return self._level

    def take(self, amount: int) -> None:
        self._level = self.level - amount

    def seconds_until(self, level: float) -> float:
        """From now until the bucket holds `level`, if nothing is taken."""
        return max(0.0, (level - self.level) * _MINUTE / self.capacity)


class Account:
    """What one key has used of its quota."""

    def __init__(self, name: str, quota: Quota, clock: Callable[[], float]) -> None:
        self.quota = quota
        self._name = name
        self._running = 0
        self._requests = Bucket(quota.requests_per_minute, clock) if quota.requests_per_minute else None
        self._tokens = Bucket(quota.tokens_per_minute, clock) if quota.tokens_per_minute else None

    def begin(self) -> None:
        """Counts a request, which `end` must follow. Raises QuotaError, and counts nothing then."""
        most = self.quota.max_concurrent_requests
        if most is not None and self._running >= most:
            raise self._refusal("concurrent_requests", f"{self._running} requests at once and may have {most}", 1.0)
        if self._requests is not None and self._requests.level < 1:
            raise self._refusal("requests", f"used its {self._requests.capacity} requests a minute",
                                self._requests.seconds_until(1))  # fmt: skip
        if self._tokens is not None and self._tokens.level < 1:
            raise self._refusal("tokens", f"used its {self._tokens.capacity} tokens a minute",
                                self._tokens.seconds_until(1))  # fmt: skip
        if self._requests is not None:
            self._requests.take(1)
        self._running += 1

    def end(self) -> None:
        self._running -= 1

    def spend(self, tokens: int) -> None:
        """Takes prompt or generated tokens."""
        if self._tokens is not None:
            self._tokens.take(tokens)

    def headers(self) -> dict[str, str]:
        """OpenAI's ``x-ratelimit-*``, of the rates that are bounded. Resets are times until a bucket is full."""
        headers = {}
        for kind, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{kind}"] = str(bucket.capacity)
                headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.level)))
                headers[f"x-ratelimit-reset-{kind}"] = f"{bucket.seconds_until(bucket.capacity):.3f}s"
        return headers

    def _refusal(self, limit: str, what: str, retry_after: float) -> QuotaError:
        return QuotaError(f"key {self._name!r} has {what}; try again in {max(1, math.ceil(retry_after))} s", limit,
                          retry_after)  # fmt: skip


class Quotas:
    """The accounts of all keys. `default` holds for keys without a quota of their own."""

    def __init__(self, default: Quota = Quota(), clock: Callable[[], float] = time.monotonic) -> None:
        self._default = default
        self._clock = clock
        self._accounts: dict[tuple[bool, str], Account] = {}

    def account(self, caller: Caller) -> Account:
        """A changed quota begins anew. Keys of clients and of admins have accounts of their own, whatever their names."""
        wanted = caller.quota or self._default
        account = self._accounts.get((caller.admin, caller.name))
        if account is None or account.quota != wanted:
            account = self._accounts[caller.admin, caller.name] = Account(caller.name, wanted, self._clock)
        return account


class QuotaMiddleware:
    """Holds requests that may generate to the quota of their key, which `AuthMiddleware` has found."""

    def __init__(self, app: ASGIApp, quotas: Quotas, refused: Callable[[str], None]) -> None:
        self._app = app
        self._quotas = quotas
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or is_own_path(scope["path"]):
            return await self._app(scope, receive, send)
        caller = scope["state"]["caller"]
        account = scope["state"]["context"].account = self._quotas.account(caller)

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(account.headers())
            await send(message)

        try:
            account.begin()
        except QuotaError as error:
            self._refused(error.limit)
            return await error_response(error)(scope, receive, send_with_limits)
        try:
            await self._app(scope, receive, send_with_limits)
        finally:
            account.end()
