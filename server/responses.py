"""JSON and error responses in OpenAI's form, and the handlers that make them of exceptions."""

from __future__ import annotations

import json

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from atoms.errors import AtomsteerError
from server.errors import (
    InvalidFieldError,
    MethodNotAllowedError,
    RouteNotFoundError,
    error_body,
    error_headers,
    error_kind,
)


class JSONResponse(Response):
    """JSON as it is sent everywhere: UTF-8, compact; NaN and infinities are bugs and raise."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def error_response(error: BaseException) -> Response:
    """The response of the error table."""
    return JSONResponse(error_body(error), error_kind(error).status, headers=error_headers(error))


def install_error_handlers(app: FastAPI) -> None:
    """Answers atomsteer's and the router's own errors, and unexpected ones with a 500 that tells nothing; those go on to
    `RequestContextMiddleware`, which logs them."""
    app.add_exception_handler(AtomsteerError, _answer)
    app.add_exception_handler(HTTPException, _answer_router)
    app.add_exception_handler(Exception, _answer)


async def _answer(_request: Request, error: Exception) -> Response:
    return error_response(error)


async def _answer_router(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    where = f"{request.method} {request.url.path[:200]}"
    if status == 404:
        return await _answer(request, RouteNotFoundError(f"{where} is no route of this server; see its README"))
    if status == 405:
        response = await _answer(request, MethodNotAllowedError(f"{where}: the route does not know this method"))
        response.headers.update(dict(getattr(error, "headers", None) or {}))
        return response
    return await _answer(request, InvalidFieldError(f"{where}: {getattr(error, 'detail', 'bad request')}"))
