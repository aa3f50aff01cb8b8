"""Errors of requests, and the one table that maps every error to an HTTP status and OpenAI's error body.

Knows no web framework: both servers read the table. What is not in it is a bug, and becomes a 500 that tells nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from atoms.errors import (
    AtomsteerError,
    CoefficientError,
    ConfigError,
    DataError,
    DriftBudgetError,
    EngineError,
    EngineOverloadedError,
    EngineStoppedError,
    GrammarError,
    MixError,
    RequestTooLongError,
    UnknownAtomError,
)


class RequestError(AtomsteerError):
    """A request that cannot be served as it is. `param` names the field at fault, None where it is no field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidJSONError(RequestError):
    """The body is no JSON object."""


class InvalidFieldError(RequestError):
    """A field is missing, of the wrong type or out of bounds."""


class UnsupportedFieldError(RequestError):
    """A field that would change the answer and is not supported: refused by name, never ignored."""


class AuthenticationError(RequestError):
    """No key, or a wrong one."""


class PermissionDeniedError(RequestError):
    """The key is good, but not for this."""


class ModelNotFoundError(RequestError):
    """No model of this name is served."""


class PresetNotFoundError(RequestError):
    """No preset has this name."""


class ExperimentNotFoundError(RequestError):
    """No experiment has this name."""


class ResponseNotFoundError(RequestError):
    """No response with this id was given under the experiment, or it has not been recorded yet."""


class MissingUnitError(RequestError):
    """An experiment needs to know whom it answers, and the request does not say."""


class ConflictError(RequestError):
    """What is asked does not fit the state that a preset or an experiment is in."""


class CollisionError(ConflictError):
    """Somebody else's change came first by a moment: the same request may succeed when it is sent again."""


class StoreUnavailableError(RequestError):
    """The database is locked, full, read-only or away. Nothing was stored."""


class DeadlockError(StoreUnavailableError):
    """Two transactions waited for each other, and this one was undone for the other to go on: it may be tried at once."""


class NoStoreError(RequestError):
    """The server runs without a database."""


class StoreOverloadedError(RequestError):
    """More records wait to be written than may."""


class DocumentsNotFoundError(RequestError):
    """The package holds no documents."""


class RouteNotFoundError(RequestError):
    """No route has this path."""


class MethodNotAllowedError(RequestError):
    """The route does not know this method."""


class BodyTooLargeError(RequestError):
    """The body is longer than the limit."""


class MediaTypeError(RequestError):
    """The body is not declared as JSON."""


class QuotaError(RequestError):
    """The key has used what it may. `limit` says which bound, `retry_after` when to come back, in seconds."""

    def __init__(self, message: str, limit: str, retry_after: float) -> None:
        super().__init__(message)
        self.limit = limit
        self.retry_after = retry_after


class BodyTimeoutError(RequestError):
    """The body did not arrive in time."""


class ReloadError(RequestError):
    """The package at the configured path cannot be served; the one that was served goes on."""


class NotSupportedHereError(RequestError):
    """This host cannot do what the other one can."""


class ClientDisconnectedError(RequestError):
    """The client hung up; nobody reads the answer. The status is for logs and metrics."""


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """What an error class is on the wire. `message` replaces the error's own where that may tell internals."""

    status: int
    type: str
    code: str
    message: str | None = None


_INVALID, _SERVER = "invalid_request_error", "server_error"
_STOPPED = "the server is shutting down or its engine has died; try again later, or on another replica"
_AWAY = "the server's database cannot be used at the moment and nothing was stored; try again"
_FAILED = "the answer could not be generated; the server's log says why, under this response's X-Request-Id"
UNEXPECTED = ErrorKind(500, _SERVER, "internal_error", _FAILED)

_KINDS: dict[type[Exception], ErrorKind] = {
    InvalidJSONError: ErrorKind(400, _INVALID, "invalid_json"),
    InvalidFieldError: ErrorKind(400, _INVALID, "invalid_value"),
    UnsupportedFieldError: ErrorKind(400, _INVALID, "unsupported_parameter"),
    ConfigError: ErrorKind(400, _INVALID, "unsupported_by_model"),
    DataError: ErrorKind(400, _INVALID, "invalid_messages"),
    AuthenticationError: ErrorKind(401, _INVALID, "invalid_api_key"),
    PermissionDeniedError: ErrorKind(403, "permission_error", "admin_key_required"),
    ModelNotFoundError: ErrorKind(404, _INVALID, "model_not_found"),
    PresetNotFoundError: ErrorKind(404, _INVALID, "preset_not_found"),
    ExperimentNotFoundError: ErrorKind(404, _INVALID, "experiment_not_found"),
    ResponseNotFoundError: ErrorKind(404, _INVALID, "response_not_found"),
    MissingUnitError: ErrorKind(400, _INVALID, "missing_unit"),
    ConflictError: ErrorKind(409, _INVALID, "conflict"),
    StoreUnavailableError: ErrorKind(503, _SERVER, "store_unavailable", _AWAY),
    StoreOverloadedError: ErrorKind(503, _SERVER, "store_overloaded"),
    NoStoreError: ErrorKind(501, _INVALID, "no_database"),
    DocumentsNotFoundError: ErrorKind(404, _INVALID, "documents_not_found"),
    RouteNotFoundError: ErrorKind(404, _INVALID, "route_not_found"),
    MethodNotAllowedError: ErrorKind(405, _INVALID, "method_not_allowed"),
    BodyTooLargeError: ErrorKind(413, _INVALID, "body_too_large"),
    MediaTypeError: ErrorKind(415, _INVALID, "unsupported_media_type"),
    BodyTimeoutError: ErrorKind(408, _INVALID, "body_timeout"),
    QuotaError: ErrorKind(429, "rate_limit_error", "rate_limit_exceeded"),
    ReloadError: ErrorKind(409, _INVALID, "reload_failed"),
    NotSupportedHereError: ErrorKind(501, _INVALID, "not_supported"),
    ClientDisconnectedError: ErrorKind(499, _INVALID, "client_disconnected"),
    UnknownAtomError: ErrorKind(404, _INVALID, "atom_not_found"),
    CoefficientError: ErrorKind(400, _INVALID, "invalid_coefficient"),
    DriftBudgetError: ErrorKind(400, _INVALID, "drift_budget_exceeded"),
    MixError: ErrorKind(400, _INVALID, "invalid_steering"),
    RequestTooLongError: ErrorKind(400, _INVALID, "context_length_exceeded"),
    GrammarError: ErrorKind(400, _INVALID, "invalid_grammar"),
    EngineOverloadedError: ErrorKind(429, "rate_limit_error", "engine_overloaded"),
    EngineStoppedError: ErrorKind(503, _SERVER, "engine_stopped", _STOPPED),
    EngineError: ErrorKind(500, _SERVER, "generation_failed", _FAILED),
}

_FINAL = ConflictError | ReloadError | NoStoreError | NotSupportedHereError
"""Errors with a status that OpenAI's clients try again, 409 or a 5xx, and that stay until somebody changes something."""


def error_kind(error: BaseException) -> ErrorKind:
    """The nearest class of the table, `UNEXPECTED` if there is none."""
    return next((_KINDS[cls] for cls in type(error).__mro__ if cls in _KINDS), UNEXPECTED)


def error_body(error: BaseException) -> dict[str, dict[str, str | None]]:
    """OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``."""
    kind = error_kind(error)
    message = kind.message or str(error)
    return {"error": {"message": message, "type": kind.type, "param": getattr(error, "param", None), "code": kind.code}}


def error_headers(error: BaseException) -> dict[str, str]:
    """Headers that belong to the error's status: ``WWW-Authenticate``, ``Retry-After`` in whole seconds, and
    ``x-should-retry: false``, which OpenAI's clients obey, where they would try again what another try cannot mend.

    How long to wait for a place in a full queue the engine need not know; then `RequestContextMiddleware` says it.
    """
    if isinstance(error, AuthenticationError):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, EngineOverloadedError | QuotaError) and error.retry_after is not None:
        return {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, BodyTimeoutError | BodyTooLargeError):
        return {"Connection": "close"}  # what is left of the body is not waited for
    if isinstance(error, EngineStoppedError | StoreUnavailableError):
        return {"Retry-After": "5"}
    if isinstance(error, StoreOverloadedError | CollisionError):
        return {"Retry-After": "1"}
    if isinstance(error, _FINAL):
        return {"x-should-retry": "false"}
    return {}
