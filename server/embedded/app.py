"""The embedded server as an ASGI application: middleware outside, then the routes of the version that is served.

span (if set)  ->  request id, headers, metrics, log  ->  CORS (if set)  ->  keys  ->  quotas  ->  body limit
->  routes of the current version
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from atoms.package import Package
from server.auth import AuthMiddleware, KeyRing
from server.body import BodyLimitMiddleware
from server.config import ServeConfig
from server.context import EXPOSED_HEADERS, RequestContextMiddleware, Traffic
from server.embedded.generation import ServedEngine
from server.embedded.openai_routes import OpenAIRoutes
from server.embedded.openapi import openapi_router
from server.embedded.versions import EngineVersion, EngineVersions
from server.experiments.drift import DriftSampler
from server.metrics import ServerMetrics
from server.quotas import QuotaMiddleware, Quotas
from server.responses import install_error_handlers
from server.routes.admin import Reload, admin_router
from server.routes.atoms import atoms_router
from server.routes.experiments import experiments_router, units_router
from server.routes.health import health_router
from server.routes.models import models_router
from server.routes.presets import presets_router
from server.routes.steering import preview_router
from server.state import Snapshot, State
from server.steering import Steering
from server.tracing import TracingMiddleware, make_tracer

if TYPE_CHECKING:
    from server.embedded.load import LoadedPackage


class Application:
    """What uvicorn serves. Engines are closed by `close`, whichever version they belong to."""

    def __init__(self, versions: EngineVersions, outermost: ASGIApp, reload: Reload) -> None:
        self._versions = versions
        self._outermost = outermost
        self.reload = reload
        self.close = versions.close

    @property
    def died(self) -> bool:
        """Whether the engine of the version that is served has died; one that ends its last requests may."""
        return self._versions.current.engine.died

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._outermost(scope, receive, send)


def create_app(
    package: Package,
    engine: ServedEngine,
    config: ServeConfig,
    *,
    traffic: Traffic | None = None,
    vocabulary: int | None = None,
    state: State | None = None,
    load: Callable[[], LoadedPackage] | None = None,
) -> Application:
    """The application on a loaded engine, which it closes, and an open database (`state`), which stays its caller's.

    `traffic` lets the caller see what is in progress and refuse new work. `vocabulary` is the number of token ids that
    the model knows; ids at or above it are refused. `load` reads the package anew, for a reload. Raises ConfigError for
    presets that cannot be applied, and for key files that cannot be used.
    """
    traffic = traffic or Traffic()
    traffic.slots = engine.stats().slots
    metrics = ServerMetrics(config.served_model_name or package.manifest.name, lambda: versions.stats())
    metrics.describe(lambda: versions.current.package.manifest)
    drift = DriftSampler(state.recorder, config.drift, metrics) if state is not None else None
    if drift is not None:
        metrics.watch(drift.recorder)

    async def reload() -> tuple[Package, Package]:
        with metrics.counting_reloads():
            return await versions.reload()

    def version_of(package: Package, engine: ServedEngine, vocabulary: int | None) -> EngineVersion:
        return EngineVersion(package, engine, _routes(package, engine, vocabulary, config, metrics, traffic, state, drift,
                                                reload))  # fmt: skip

    versions = EngineVersions(
        version_of(package, engine, vocabulary),
        lambda loaded: version_of(loaded.package, loaded.engine, loaded.vocabulary),
        load,
    )
    return Application(versions, _guarded(versions, config, metrics, traffic), reload)


def _routes(
    package: Package,
    engine: ServedEngine,
    vocabulary: int | None,
    config: ServeConfig,
    metrics: ServerMetrics,
    traffic: Traffic,
    state: State | None,
    drift: DriftSampler | None,
    reload: Reload,
) -> ASGIApp:
    """All routes on one version of the package. Raises ConfigError for presets that cannot be applied."""
    steering = Steering.of(package, config, (lambda: state.snapshot) if state else Snapshot)
    fingerprint = f"fp_{package.manifest.content_hash[:12]}"
    openai = OpenAIRoutes(engine, steering, metrics, traffic, config.limits, fingerprint, vocabulary, drift)
    app = FastAPI(title="atomsteer", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.include_router(openai.router())
    app.include_router(models_router(steering, max_model_len=engine.max_model_len, created=int(time.time())))
    app.include_router(atoms_router(package, allow_training_text=config.allow_training_text))
    app.include_router(preview_router(steering, metrics))
    app.include_router(presets_router(steering, state))
    app.include_router(experiments_router(steering, state))
    app.include_router(units_router(state))
    app.include_router(admin_router(reload))
    app.include_router(openapi_router())
    app.include_router(health_router(package.manifest, metrics, lambda: engine.healthy and not traffic.draining))
    install_error_handlers(app)
    return app


def _guarded(app: ASGIApp, config: ServeConfig, metrics: ServerMetrics, traffic: Traffic) -> ASGIApp:
    """`app` behind all that a request passes first, innermost first.

    Raises ConfigError for a key file or an exporter of traces that cannot be used.
    """
    app = BodyLimitMiddleware(app, config.limits.max_body_bytes, config.body_timeout)
    app = QuotaMiddleware(app, Quotas(config.quota), metrics.limited)
    app = AuthMiddleware(app, KeyRing.of(config), metrics.key_refused)
    if config.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=list(config.cors_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],  # SDKs in browsers send a dozen of their own, such as X-Stainless-OS
            expose_headers=EXPOSED_HEADERS,
        )
    app = RequestContextMiddleware(app, traffic, metrics, config.access_log, config.log_prompts)
    tracer = make_tracer(os.environ)
    return TracingMiddleware(app, tracer) if tracer is not None else app
