"""Who asks: anybody, a client with a key, or an admin. Everything but the open paths needs a key once keys are set.

Admin keys also serve for inference. Without admin keys nobody is an admin; without API keys anybody may infer, and a
client's placeholder key is not looked at (SDKs always send one).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import AuthenticationError, PermissionDeniedError
from server.responses import error_response

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})
"""Probes and scrapers carry no key, as with vLLM; none of these routes shows a prompt, an answer or a document."""


class KeyRing:
    """The configured keys, compared in constant time."""

    def __init__(self, api_keys: Sequence[str], admin_keys: Sequence[str]) -> None:
        self._api = [_digest(key) for key in api_keys]
        self._admin = [_digest(key) for key in admin_keys]

    def is_admin(self, authorization: str | None) -> bool:
        """Checks an ``Authorization`` header. True for an admin key; False for another key that may infer.

        Raises AuthenticationError if keys are set and this is none of them.
        """
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip()) if scheme.lower() == "bearer" else b""
        if _matches(given, self._admin):
            return True
        if self._api and not _matches(given, self._api):
            raise AuthenticationError(
                ("the API key is wrong" if given else "an API key is needed and none was sent")
                + "; send the header 'Authorization: Bearer KEY'"
            )
        return False


class AuthMiddleware:
    """Refuses requests without a good key with 401, and sets ``scope["state"]["admin"]`` for the routes."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        state = scope.setdefault("state", {})
        state["admin"] = False
        if scope["path"] not in OPEN_PATHS:
            header = dict(scope["headers"]).get(b"authorization")
            try:
                state["admin"] = self._keys.is_admin(header.decode("latin-1") if header else None)
            except AuthenticationError as error:
                return await error_response(error)(scope, receive, send)
        await self._app(scope, receive, send)


def require_admin(request: Request, what: str) -> None:
    """Raises PermissionDeniedError unless the request came with an admin key; `what` is done with one."""
    if not request.state.admin:
        raise PermissionDeniedError(f"{what} with an admin key; send one (the server is given it with --admin-key)")


def _digest(key: str) -> bytes:
    """Equal lengths for `hmac.compare_digest`, which tells lengths apart."""
    return hashlib.sha256(key.encode()).digest()


def _matches(given: bytes, keys: Sequence[bytes]) -> bool:
    """Compares with every key, so that time does not tell which one was close."""
    return sum(hmac.compare_digest(given, key) for key in keys) > 0
