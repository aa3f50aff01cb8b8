"""Which of vLLM's routes clients may call. The others scale, abort, profile, cache or run code: they are the operator's."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from server.auth import OPEN_PATHS
from server.errors import PermissionDeniedError
from server.responses import error_response

CLIENT_PATHS = OPEN_PATHS | {
    "/ping", "/load", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/tokenize", "/detokenize", "/invocations",
    "/generative_scoring", "/pooling", "/classify", "/score", "/rerank", "/v2/rerank", "/v2/embed",
}  # fmt: skip
_CLIENT_PREFIX = "/v1/"
GENERATING_PATHS = frozenset({"/invocations", "/generative_scoring", "/v1/systemone"})
"""Of vLLM's own protocols: the server's default mix holds there, and none can be asked for."""


def operator_paths(paths: Iterable[str]) -> frozenset[str]:
    """Those among an application's `paths` that need an admin key, whatever a later vLLM adds to them."""
    return frozenset(path for path in paths if path not in CLIENT_PATHS and not path.startswith(_CLIENT_PREFIX))


class OperatorMiddleware:
    """Refuses an operator's `paths` to everybody but admins. `AuthMiddleware` has said who asks."""

    def __init__(self, app: ASGIApp, paths: frozenset[str]) -> None:
        self._app = app
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in self._paths and not scope["state"]["admin"]:
            error = PermissionDeniedError(f"{scope['path'][:80]} is called with an admin key; send one (the server is given "
                                          "it with --admin-key)")  # fmt: skip
            return await error_response(error)(scope, receive, send)
        await self._app(scope, receive, send)
