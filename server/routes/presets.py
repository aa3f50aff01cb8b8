"""/v1/presets: named mixes. Whoever may infer may read them; admin keys write those of the database.

Presets of the server's settings are listed as ``fixed`` and cannot be changed here.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from atoms.mix import Mix
from server.auth import require_admin
from server.body import read_json
from server.errors import ConflictError, PresetNotFoundError
from server.experiments.spec import Name
from server.presets import Preset
from server.responses import JSONResponse
from server.state import State, required
from server.steering import Steering
from server.validation import PlainText, Strict, parse


class PresetBody(Strict):
    """`if_version` is the version that the caller means to replace, 0 for none; without it the last writer wins."""

    atoms: dict[str, Any]
    description: PlainText = Field("", max_length=4000)
    if_version: int | None = Field(None, ge=0)


class NewPresetBody(Strict):
    """A preset that must not exist yet."""

    name: Name
    atoms: dict[str, Any]
    description: PlainText = Field("", max_length=4000)


class _PresetName(Strict):
    name: Name


def presets_router(steering: Steering, state: State | None) -> APIRouter:
    """`state` None: the fixed presets alone; writing is refused."""
    router = APIRouter()

    @router.get("/v1/presets", response_model=None)
    async def list_presets() -> Response:
        names = dict.fromkeys([*steering.fixed, *steering.snapshot().presets])
        return JSONResponse({"object": "list", "data": [_show(steering, name) for name in names]})

    @router.post("/v1/presets", response_model=None)
    async def create(request: Request) -> Response:
        require_admin(request, "presets are written")
        body = parse(NewPresetBody, await read_json(request))
        stored = await asyncio.to_thread(put_preset, steering, state, body.name, body.atoms, body.description, 0)
        return JSONResponse(preset_json(steering, stored), 201)

    @router.get("/v1/presets/{name}", response_model=None)
    async def show(name: str) -> Response:
        return JSONResponse(_show(steering, name))

    @router.get("/v1/presets/{name}/versions", response_model=None)
    async def versions(name: str) -> Response:
        parse(_PresetName, {"name": name})
        found = await asyncio.to_thread(required(state).presets.versions, name)
        return JSONResponse({"object": "list", "data": [preset_json(steering, preset) for preset in found]})

    @router.put("/v1/presets/{name}", response_model=None)
    async def replace(name: str, request: Request) -> Response:
        require_admin(request, "presets are written")
        body = parse(PresetBody, await read_json(request))
        parse(_PresetName, {"name": name})
        stored = await asyncio.to_thread(
            put_preset, steering, state, name, body.atoms, body.description, body.if_version
        )
        return JSONResponse(preset_json(steering, stored))

    @router.delete("/v1/presets/{name}", response_model=None)
    async def delete(name: str, request: Request) -> Response:
        require_admin(request, "presets are deleted")
        refuse_fixed(steering, name)
        live = required(state)
        await asyncio.to_thread(live.presets.delete, name)
        await asyncio.to_thread(live.refresh)
        return JSONResponse({"object": "preset.deleted", "name": name, "deleted": True})

    return router


def put_preset(
    steering: Steering,
    state: State | None,
    name: str,
    atoms: dict[str, Any],
    description: str,
    expected: int | None,
) -> Preset:
    """Stores a preset and makes it known to this server. Blocks.

    Raises NoStoreError, ConflictError for the name of a fixed preset or another version than `expected`, and what
    `Steering.named_mix` does.
    """
    live = required(state)
    refuse_fixed(steering, name)
    mix = steering.named_mix(atoms)
    stored = live.presets.put(name, mix, description, steering.package.manifest.version, expected=expected)
    live.refresh()
    return stored


def preset_json(steering: Steering, preset: Preset) -> dict[str, Any]:
    """A preset of the database as it is sent. One with atoms that the package lacks is not usable."""
    usable = steering.applies(preset.mix)
    return _json(steering, preset.name, preset.mix, usable) | {
        "description": preset.description,
        "version": preset.version,
        "package_version": preset.package_version,
        "created_at": preset.created_at,
    }


def _show(steering: Steering, name: str) -> dict[str, Any]:
    if name in steering.fixed:
        return _json(steering, name, steering.fixed[name], usable=True) | {"fixed": True}
    preset = steering.snapshot().presets.get(name)
    if preset is None:
        raise PresetNotFoundError(f"preset {name[:64]!r} does not exist; GET /v1/presets lists those that do", "preset")
    return preset_json(steering, preset)


def _json(steering: Steering, name: str, mix: Mix, usable: bool) -> dict[str, Any]:
    return {
        "object": "preset",
        "name": name,
        "atoms": mix.as_dict(),
        "mix": steering.package.digest(mix) if usable else None,
        "predicted_kl": steering.predicted_kl(mix) if usable else None,
        "usable": usable,
        "fixed": False,
        "description": "",
        "version": None,
        "package_version": steering.package.manifest.version,
        "created_at": None,
    }


def refuse_fixed(steering: Steering, name: str) -> None:
    """Raises ConflictError for the name of a preset of the server's settings."""
    if name in steering.fixed:
        raise ConflictError(
            f"preset {name!r} is set by --preset on the server; change it there, or choose another name"
        )
