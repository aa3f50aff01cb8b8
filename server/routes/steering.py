"""/v1/steering/preview: what a request would be steered with, without generating."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.body import read_json
from server.errors import InvalidFieldError
from server.experiments.spec import Subject
from server.metrics import SteeringMetrics
from server.responses import JSONResponse
from server.steering import Steering

_FIELDS = ("steering", "model", "user", "metadata")


def preview_router(steering: Steering, metrics: SteeringMetrics) -> APIRouter:
    """The body is ``{"steering": {...}, "model": "name:preset"}``, and ``user`` or ``metadata`` for an experiment; all
    optional, other fields are refused. Nothing is recorded."""
    router = APIRouter()

    @router.post("/v1/steering/preview", response_model=None)
    async def preview(request: Request) -> Response:
        body = await read_json(request)
        for name in body.keys() - set(_FIELDS):
            raise InvalidFieldError(f"{name[:64]} is no field of a preview, which has {', '.join(_FIELDS)}", name[:64])
        model = body.get("model") or steering.served_name
        if not isinstance(model, str):
            raise InvalidFieldError("model must be a text", "model")
        preset = steering.preset_of_model(model)
        user, metadata = body.get("user"), body.get("metadata") or {}
        if user is not None and not isinstance(user, str):
            raise InvalidFieldError("user must be a text", "user")
        if not isinstance(metadata, dict):
            raise InvalidFieldError("metadata must be an object", "metadata")
        subject = Subject(user, metadata, request.headers)
        with metrics.counting_refusals():
            resolved = steering.resolve(body.get("steering"), model_preset=preset, admin=request.state.admin,
                                        subject=subject)  # fmt: skip
        request.state.context.steering = resolved
        return JSONResponse({"object": "steering.preview", "model": model, "steering": resolved.echo()})

    return router
