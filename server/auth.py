"""Who asks: anybody, a client with a key, or an admin. Everything but the open paths needs a key once keys are set.

Admin keys also serve for inference. Without admin keys nobody is an admin; without API keys anybody may infer, and a
client's placeholder key is not looked at (SDKs always send one). Key files are read again when they change: a key that is
gone from its file is refused within a second.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from atoms.errors import ConfigError
from server.config import ServeConfig
from server.errors import AuthenticationError, PermissionDeniedError
from server.keys import hash_key, read_keys
from server.limits import Quota
from server.responses import error_response

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})
"""Probes and scrapers carry no key, as with vLLM; none of these routes shows a prompt, an answer or a document."""
_LOOK_SECONDS = 1.0
_log = logging.getLogger("atomsteer.server")


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is. `name` is the key's, for logs; `quota` None is the server's default."""

    name: str
    admin: bool = False
    quota: Quota | None = None


ANONYMOUS = Caller("anonymous")


class KeyRing:
    """The configured keys, compared in constant time. Raises ConfigError for a key file that cannot be used."""

    def __init__(
        self,
        api_keys: Sequence[str] = (),
        admin_keys: Sequence[str] = (),
        *,
        api_key_file: Path | None = None,
        admin_key_file: Path | None = None,
        quota: Quota = Quota(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._needed = bool(api_keys) or api_key_file is not None  # an emptied file must not open the server
        self._given = [
            *_given_keys("api-key", api_keys, admin=False),
            *_given_keys("admin-key", admin_keys, admin=True),
        ]
        files = ((api_key_file, False), (admin_key_file, True))
        self._files = [_WatchedFile(path, admin, quota) for path, admin in files if path is not None]
        self._clock = clock
        self._looked = clock()

    @classmethod
    def of(cls, config: ServeConfig) -> KeyRing:
        """All keys of the settings."""
        return cls(config.api_keys, config.admin_keys, api_key_file=config.api_key_file,
                   admin_key_file=config.admin_key_file, quota=config.quota)  # fmt: skip

    def identify(self, headers: Headers) -> Caller:
        """Whose request has these headers. Raises AuthenticationError if keys are set and none of them is given."""
        sent = headers.getlist("authorization")
        if len(sent) > 1:  # a proxy may have checked the other one
            raise AuthenticationError(f"{len(sent)} Authorization headers were sent; send one")
        scheme, _, key = (sent[0] if sent else "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else ""
        caller = self._find(given) if given else None
        if caller is None and self._needed:
            raise AuthenticationError(
                ("the API key is wrong" if given else "an API key is needed and none was sent")
                + "; send the header 'Authorization: Bearer KEY'"
            )
        return caller or ANONYMOUS

    def _find(self, key: str) -> Caller | None:
        """Compares with every key, so that time does not tell which one was close."""
        if self._clock() - self._looked >= _LOOK_SECONDS:
            self._looked = self._clock()
            for file in self._files:
                file.look()
        digest = hash_key(key)
        known = [*self._given, *(pair for file in self._files for pair in file.callers.items())]
        found = [caller for known_digest, caller in known if hmac.compare_digest(known_digest, digest)]
        return max(found, key=lambda caller: caller.admin, default=None)


class _WatchedFile:
    """A key file and the callers in it. One that becomes unreadable leaves the last good ones in force, with an error in
    the log."""

    def __init__(self, path: Path, admin: bool, quota: Quota) -> None:
        self._path = path
        self._admin = admin
        self._quota = quota
        self._stamp = self._stamp_now()
        self.callers = self._read()

    def look(self) -> None:
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self.callers = self._read()
        except ConfigError as error:
            _log.error("the keys in force stay as they were: %s", error)
        else:
            _log.info("read %d keys from %s", len(self.callers), self._path)

    def _read(self) -> Mapping[str, Caller]:
        entries = read_keys(self._path)
        return {entry.sha256: Caller(entry.name, self._admin, entry.quota(self._quota)) for entry in entries}

    def _stamp_now(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


class AuthMiddleware:
    """Refuses requests without a good key with 401; sets ``scope["state"]["caller"]`` and ``["admin"]`` for the routes."""

    def __init__(self, app: ASGIApp, keys: KeyRing, refused: Callable[[], None] = lambda: None) -> None:
        self._app = app
        self._keys = keys
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return await self._connect(scope, receive, send)
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        caller = ANONYMOUS
        if scope["path"] not in OPEN_PATHS:
            try:
                caller = self._keys.identify(Headers(scope=scope))
            except AuthenticationError as error:
                self._refused()
                return await error_response(error)(scope, receive, send)
        scope["state"] |= {"caller": caller, "admin": caller.admin}
        scope["state"]["context"].caller = caller.name
        await self._app(scope, receive, send)

    async def _connect(self, scope: Scope, receive: Receive, send: Send) -> None:
        """vLLM has web sockets for some models."""
        try:
            self._keys.identify(Headers(scope=scope))
        except AuthenticationError as error:
            self._refused()
            await receive()
            return await send({"type": "websocket.close", "code": 1008, "reason": str(error)})
        await self._app(scope, receive, send)


def require_admin(request: Request, what: str) -> None:
    """Raises PermissionDeniedError unless the request came with an admin key; `what` is done with one."""
    if not request.state.admin:
        raise PermissionDeniedError(f"{what} with an admin key; send one (the server is given it with --admin-key)")


def warn_if_open(config: ServeConfig, host: str, where: str) -> None:
    """Logs a warning if anybody who reaches `where` may use the server. It listens at `host`, "" being every address."""
    if not (config.api_keys or config.api_key_file) and not _is_loopback(host):
        _log.warning("no API key is set: whoever reaches %s may use this server", where)


def _is_loopback(host: str) -> bool:
    """Whether `host`, an address or a name, is this machine's own; a name that cannot be resolved may be anybody's."""
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, None)} if host else set()
    except OSError:
        return False
    return bool(addresses) and all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def _given_keys(kind: str, keys: Sequence[str], *, admin: bool) -> list[tuple[str, Caller]]:
    return [(hash_key(key), Caller(f"{kind}-{number}", admin)) for number, key in enumerate(keys, 1)]
