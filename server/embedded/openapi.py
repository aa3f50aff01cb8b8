"""``GET /openapi.json``: what this server takes and gives, as OpenAPI 3.1. Bodies are described by the models that read them.

Every route of the application must stand in `OPERATIONS` and the other way round; a test holds them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from server.embedded.protocol import ChatBody, CompletionBody
from server.experiments.spec import ExperimentSpec
from server.responses import JSONResponse
from server.routes.experiments import OutcomesBody, PromoteBody, RampBody, StopBody
from server.routes.health import software_version
from server.routes.presets import NewPresetBody, PresetBody

_REF = "#/components/schemas/{model}"


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. `body` is the model of its body, or a schema of one that has no model. `open` needs no key,
    `admin` an admin key."""

    method: str
    path: str
    summary: str
    body: type[BaseModel] | dict[str, Any] | None = None
    answer: str = "application/json"
    created: bool = False
    open: bool = False
    admin: bool = False


_STEERING: dict[str, Any] = {
    "description": "Which atoms steer the answer, and how strongly. Null or absent: the server's default mix.",
    "type": ["object", "null"],
    "additionalProperties": False,
    "properties": {
        "atoms": {"type": ["object", "null"], "additionalProperties": {"type": "number"},
                  "description": "id or alias -> coefficient; 0 is absent"},
        "preset": {"type": ["string", "null"]},
        "experiment": {"type": ["string", "null"], "description": "no other field may stand beside it"},
        "max_kl": {"type": ["number", "null"], "minimum": 0, "description": "predicted KL at most, nats a token"},
        "on_exceed": {"enum": ["error", "scale", None]},
        "allow_out_of_range": {"type": ["boolean", "null"], "description": "admin keys only"},
        "phase": {"enum": ["all", "decode", None]},
    },
}  # fmt: skip
_PREVIEW: dict[str, Any] = {
    "type": "object", "additionalProperties": False,
    "properties": {"steering": _STEERING, "model": {"type": ["string", "null"]}, "user": {"type": ["string", "null"]},
                   "metadata": {"type": ["object", "null"]}},
}  # fmt: skip
_RESPONSES: dict[str, Any] = {
    "type": "object", "required": ["model", "input"],
    "properties": {
        "model": {"type": "string"}, "stream": {"type": "boolean"}, "instructions": {"type": ["string", "null"]},
        "input": {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1, "items": {
            "type": "object", "required": ["role", "content"],
            "properties": {"role": {"enum": ["user", "assistant", "system", "developer"]}, "content": {}}}}]},
        "max_output_tokens": {"type": ["integer", "null"], "minimum": 1}, "temperature": {"type": "number"},
        "top_p": {"type": "number"}, "text": {"type": ["object", "null"]}, "user": {"type": ["string", "null"]},
        "metadata": {"type": ["object", "null"]}, "steering": _STEERING,
    },
}  # fmt: skip
_EVENTS = "text/event-stream"

OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Answer a chat", ChatBody, _EVENTS),
    Operation("post", "/v1/responses", "Answer, by OpenAI's responses API", _RESPONSES, _EVENTS),
    Operation("post", "/v1/completions", "Continue texts", CompletionBody, _EVENTS),
    Operation("get", "/v1/models", "The served model and its presets"),
    Operation("get", "/v1/models/{name}", "One of them"),
    Operation("get", "/v1/atoms", "The atoms of the package"),
    Operation("get", "/v1/atoms/{atom}", "One atom, by id or alias"),
    Operation("get", "/v1/atoms/{atom}/documents", "The training documents behind an atom", admin=True),
    Operation("post", "/v1/steering/preview", "What a request would be steered with", _PREVIEW),
    Operation("get", "/v1/presets", "All presets"),
    Operation("post", "/v1/presets", "Make a preset", NewPresetBody, created=True, admin=True),
    Operation("get", "/v1/presets/{name}", "One preset"),
    Operation("get", "/v1/presets/{name}/versions", "Its versions, oldest first"),
    Operation("put", "/v1/presets/{name}", "Make a preset, or a new version of it", PresetBody, admin=True),
    Operation("delete", "/v1/presets/{name}", "Delete a preset", admin=True),
    Operation("post", "/v1/experiments", "Make an experiment", ExperimentSpec, created=True, admin=True),
    Operation("get", "/v1/experiments", "All experiments", admin=True),
    Operation("get", "/v1/experiments/{name}", "One experiment", admin=True),
    Operation("put", "/v1/experiments/{name}", "Change a draft", ExperimentSpec, admin=True),
    Operation("delete", "/v1/experiments/{name}", "Delete an experiment", admin=True),
    Operation("post", "/v1/experiments/{name}/start", "Start it", admin=True),
    Operation("post", "/v1/experiments/{name}/ramp", "Change the share of units that take part", RampBody, admin=True),
    Operation("post", "/v1/experiments/{name}/stop", "Stop it", StopBody, admin=True),
    Operation("get", "/v1/experiments/{name}/report", "What it has shown", admin=True),
    Operation("post", "/v1/experiments/{name}/promote", "Make a preset of an arm", PromoteBody, admin=True),
    Operation("post", "/v1/experiments/{name}/outcomes", "Report outcomes of responses", OutcomesBody),
    Operation("get", "/v1/experiments/{name}/export", "A table of it as Parquet", answer="application/vnd.apache.parquet",
              admin=True),
    Operation("delete", "/v1/units/{unit}", "Forget a unit", admin=True),
    Operation("post", "/v1/admin/reload", "Serve the package at its path anew", admin=True),
    Operation("get", "/health", "Whether the process answers", open=True),
    Operation("get", "/ready", "Whether it may be sent work", open=True),
    Operation("get", "/version", "Of the software and the package", open=True),
    Operation("get", "/metrics", "Prometheus' text format", answer="text/plain", open=True),
    Operation("get", "/openapi.json", "This document"),
)  # fmt: skip
_STATUSES = {
    "400": "The request is wrong; `param` names the field", "401": "A key is missing or wrong",
    "403": "The key may not do this", "404": "No such model, atom, preset, experiment or response",
    "405": "The route does not know this method", "408": "The body did not arrive in time",
    "409": "The state does not allow it", "413": "The body is too long", "415": "The body is not declared as JSON",
    "429": "The key's quota is used up, or the queue is full; see Retry-After", "501": "Not on this server",
    "503": "Shutting down, or the database is away; see Retry-After",
}  # fmt: skip
_ERROR: dict[str, Any] = {
    "type": "object", "required": ["error"], "properties": {"error": {
        "type": "object", "required": ["message", "type", "param", "code"], "properties": {
            "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
            "code": {"type": "string"}}}},
}  # fmt: skip


def openapi_router() -> APIRouter:
    """Serves the document, which is made once."""
    router = APIRouter()
    document = openapi_document()

    @router.get("/openapi.json", response_model=None)
    async def show() -> Response:
        return JSONResponse(document)

    return router


def openapi_document() -> dict[str, Any]:
    models = [operation.body for operation in OPERATIONS if isinstance(operation.body, type)]
    _, schemas = models_json_schema([(model, "validation") for model in dict.fromkeys(models)], ref_template=_REF)
    definitions = schemas["$defs"]
    for model in (ChatBody, CompletionBody):
        definitions[model.__name__]["properties"]["steering"] = _STEERING
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "atomsteer", "version": software_version()},
        "paths": paths,
        "components": {
            "schemas": definitions | {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _described(operation: Operation) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    answers: dict[str, Any] = {"application/json": {}, operation.answer: {}}
    if operation.answer not in ("application/json", _EVENTS):
        answers = {operation.answer: {}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.method} {operation.path}",
        "responses": {
            "201" if operation.created else "200": {"description": "Done", "content": answers},
            **{status: {"description": text, "content": error} for status, text in _STATUSES.items()},
        },
    }
    if not operation.open:
        described["security"] = [{"key": []}] if operation.admin else [{"key": []}, {}]
    names = [part[1:-1] for part in operation.path.split("/") if part.startswith("{")]
    if names:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in names
        ]
    if operation.body is not None:
        is_model = isinstance(operation.body, type)
        schema = {"$ref": _REF.format(model=operation.body.__name__)} if is_model else operation.body  # type: ignore[union-attr]
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return described
