"""The embedded server as an ASGI application: middleware outside, then the shared routes and the OpenAI routes.

request id, headers, metrics, log  ->  CORS (if set)  ->  keys  ->  body limit  ->  routes
"""

from __future__ import annotations

import time

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from atoms.package import Package
from server.auth import AuthMiddleware, KeyRing
from server.body import BodyLimitMiddleware
from server.config import ServeConfig
from server.context import ARM_HEADER, MIX_HEADER, REQUEST_ID_HEADER, RequestContextMiddleware, Traffic
from server.embedded.generation import ServedEngine
from server.embedded.openai_routes import OpenAIRoutes
from server.metrics import ServerMetrics
from server.responses import install_error_handlers
from server.routes.atoms import atoms_router
from server.routes.experiments import experiments_router, units_router
from server.routes.health import health_router
from server.routes.models import models_router
from server.routes.presets import presets_router
from server.routes.steering import preview_router
from server.state import Snapshot, State
from server.steering import Steering


def create_app(
    package: Package,
    engine: ServedEngine,
    config: ServeConfig,
    *,
    traffic: Traffic | None = None,
    vocabulary: int | None = None,
    state: State | None = None,
) -> FastAPI:
    """The application on a loaded engine and an open database (`state`), both of which stay their caller's to close.

    `traffic` lets the caller see what is in progress and refuse new work. `vocabulary` is the number of token ids that
    the model knows; ids at or above it are refused. Raises ConfigError for presets that cannot be applied.
    """
    traffic = traffic or Traffic()
    steering = Steering.of(package, config, (lambda: state.snapshot) if state else Snapshot)
    metrics = ServerMetrics(steering.served_name, engine.stats)
    fingerprint = f"fp_{package.manifest.content_hash[:12]}"
    openai = OpenAIRoutes(engine, steering, metrics, traffic, config.limits, fingerprint, vocabulary,
                          state.recorder if state else None)  # fmt: skip
    if state is not None:
        metrics.watch(state.recorder)

    app = FastAPI(title="atomsteer", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.include_router(openai.router())
    app.include_router(models_router(steering, max_model_len=engine.max_model_len, created=int(time.time())))
    app.include_router(atoms_router(package, allow_training_text=config.allow_training_text))
    app.include_router(preview_router(steering, metrics))
    app.include_router(presets_router(steering, state))
    app.include_router(experiments_router(steering, state))
    app.include_router(units_router(state))
    app.include_router(health_router(package.manifest, metrics, lambda: engine.healthy and not traffic.draining))
    install_error_handlers(app)

    app.add_middleware(BodyLimitMiddleware, limit=config.limits.max_body_bytes)  # innermost first
    app.add_middleware(AuthMiddleware, keys=KeyRing(config.api_keys, config.admin_keys))
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type", REQUEST_ID_HEADER],
            expose_headers=[REQUEST_ID_HEADER, MIX_HEADER, ARM_HEADER],
        )
    app.add_middleware(RequestContextMiddleware, traffic=traffic, metrics=metrics, access_log=config.access_log)
    return app
