"""/v1/models: the served name, and each preset as ``name:preset`` below it."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from server.responses import JSONResponse
from server.steering import Steering


def models_router(steering: Steering, *, max_model_len: int, created: int) -> APIRouter:
    """`created` is the server's start in Unix seconds: a package does not know its own."""
    router = APIRouter()

    def entry(name: str, parent: str | None) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "atomsteer",
            "root": steering.package.manifest.base_model.id,
            "parent": parent,
            "max_model_len": max_model_len,
        }

    @router.get("/v1/models", response_model=None)
    async def list_models() -> Response:
        base = steering.served_name
        presets = [entry(f"{base}:{preset}", base) for preset in steering.presets]
        return JSONResponse({"object": "list", "data": [entry(base, None), *presets]})

    @router.get("/v1/models/{name:path}", response_model=None)
    async def show_model(name: str) -> Response:
        preset = steering.preset_of_model(name)
        return JSONResponse(entry(name, steering.served_name if preset is not None else None))

    return router
