"""/v1/admin: what an operator does to a running server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from atoms.package import Package
from server.auth import require_admin
from server.responses import JSONResponse

Reload = Callable[[], Awaitable[tuple[Package, Package]]]
"""Serves the package at the configured path from now on; gives the old and the new one."""


def admin_router(reload: Reload) -> APIRouter:
    """The body of a reload is not read: which package is served is the command line's to say."""
    router = APIRouter()

    @router.post("/v1/admin/reload", response_model=None)
    async def reload_package(request: Request) -> Response:
        require_admin(request, "packages are reloaded")
        old, new = await reload()
        return JSONResponse({
            "object": "package.reloaded", "package": new.manifest.name, "version": new.manifest.version,
            "previous_version": old.manifest.version, "changed": old.manifest != new.manifest,
        })  # fmt: skip

    return router
