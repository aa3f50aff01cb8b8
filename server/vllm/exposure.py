"""Which of vLLM's routes clients may call. The others scale, abort, profile, cache or run code: they are the operator's."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from server.auth import OPEN_PATHS
from server.errors import PermissionDeniedError
from server.responses import error_response

CLIENT_PATHS = OPEN_PATHS | {
    "/ping", "/load", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/tokenize", "/detokenize", "/invocations",
    "/generative_scoring", "/pooling", "/classify", "/score", "/rerank", "/v2/rerank", "/v2/embed", "/static",
}  # fmt: skip
_CLIENT_PREFIX = "/v1/"
GENERATING_PATHS = frozenset({"/invocations", "/generative_scoring", "/v1/systemone"})
"""Of vLLM's own protocols: the server's default mix holds there, and none can be asked for."""


def operator_routes(routes: Iterable[BaseRoute]) -> tuple[BaseRoute, ...]:
    """Those of an application's `routes` that need an admin key, whatever a later vLLM adds to them."""
    return tuple(route for route in routes if not _is_for_clients(getattr(route, "path", "")))


def _is_for_clients(path: str) -> bool:
    return path in CLIENT_PATHS or path.startswith(_CLIENT_PREFIX)


class OperatorMiddleware:
    """Refuses an operator's `routes` to everybody but admins. `AuthMiddleware` has said who asks."""

    def __init__(self, app: ASGIApp, routes: tuple[BaseRoute, ...]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope["state"]["admin"] and self._is_operators(scope):
            error = PermissionDeniedError(f"{scope['path'][:80]} is called with an admin key; send one (the server is given "
                                          "it with --admin-key)")  # fmt: skip
            return await error_response(error)(scope, receive, send)
        await self._app(scope, receive, send)

    def _is_operators(self, scope: Scope) -> bool:
        """Paths of clients are looked at first: they are nearly all that are asked for."""
        if _is_for_clients(scope["path"]):
            return False
        return any(route.matches(scope)[0] is not Match.NONE for route in self._routes)
