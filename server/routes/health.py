"""/health, /ready, /version, /metrics: for probes and scrapers, without a key."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from atoms.manifest import Manifest
from server.metrics import SteeringMetrics
from server.responses import JSONResponse


def health_router(manifest: Manifest, metrics: SteeringMetrics, is_ready: Callable[[], bool]) -> APIRouter:
    """`/health` says that the process answers; `/ready` that it may be sent work, and that it steers: a vLLM server
    without the plugin has no such route."""
    router = APIRouter()
    identity = {"package": manifest.name, "package_version": manifest.version}

    @router.get("/health", response_model=None)
    async def health() -> Response:
        return JSONResponse({"status": "alive"})

    @router.get("/ready", response_model=None)
    async def ready() -> Response:
        if is_ready():
            return JSONResponse({"status": "ready", "steering": {"active": True, **identity}})
        return JSONResponse({"status": "not ready"}, 503, headers={"Retry-After": "5"})

    @router.get("/version", response_model=None)
    async def show_version() -> Response:
        return JSONResponse({
            "version": software_version(),
            **identity,
            "format": manifest.format_version,
        })  # fmt: skip

    @router.get("/metrics", response_model=None)
    async def show_metrics() -> Response:
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


def software_version() -> str:
    """Of the installed distribution; ``unknown`` where the source tree runs without one."""
    try:
        return version("atomsteer")
    except PackageNotFoundError:
        return "unknown"
