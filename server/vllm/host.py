"""Our routes and middleware on vLLM's own application, and our mixes on its way to the engine.

vLLM calls `attach_router` once its routes are there and `init_state` once its handlers are. Everything that is to be
undone hangs on the application's lifespan.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from prometheus_client import REGISTRY

from atoms.engine import Phase
from atoms.errors import AtomsteerError, ConfigError, EngineStoppedError
from atoms.mix import Mix
from atoms.package import Package
from server.auth import AuthMiddleware, KeyRing
from server.body import BodyLimitMiddleware
from server.context import RequestContextMiddleware, Traffic
from server.errors import NotSupportedHereError
from server.experiments.drift import Answered, DriftSampler
from server.logs import set_up_logging
from server.metrics import SteeringMetrics
from server.quotas import QuotaMiddleware, Quotas
from server.responses import install_error_handlers
from server.routes.admin import admin_router
from server.routes.atoms import atoms_router
from server.routes.experiments import experiments_router, units_router
from server.routes.health import health_router
from server.routes.models import models_router
from server.routes.presets import presets_router
from server.routes.steering import preview_router
from server.state import Snapshot, State
from server.steering import Steering
from server.store.schema import open_database
from server.tracing import TracingMiddleware, make_tracer
from server.vllm.exposure import OperatorMiddleware, operator_routes
from server.vllm.identity import MixIdentities
from server.vllm.middleware import SteeredCall, SteeringMiddleware, current
from server.vllm.scoring import measure_drift
from server.vllm.settings import PACKAGE_VARIABLE, PLUGIN_NAME, read_settings

_LOOK_SECONDS = 0.2
_OUR_HEALTH = ("/ready", "/version")  # vLLM's own /health knows whether its engine lives, its /metrics has ours too


class SteeringEndpoint:
    """The ``vllm.endpoint_plugins`` entry point: an `EndpointPlugin`. vLLM goes on without one that cannot be made, so
    nothing happens here yet."""

    name = PLUGIN_NAME
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Adds middleware and routes. Raises AtomsteerError for settings that cannot work."""
        config = read_settings(os.environ)
        if config is None:
            raise ConfigError(f"plugin {PLUGIN_NAME} is named in VLLM_PLUGINS and {PACKAGE_VARIABLE} is not set; name the "
                              "package's directory there")  # fmt: skip
        package = Package.read(config.package)
        operators = operator_routes(app.routes)
        names = app.state.args.served_model_name
        self._app = app
        self._model_path = app.state.args.model
        database = open_database(url) if (url := config.database_url()) else None
        state = State(database, package.manifest.name) if database else None
        steering = Steering.of(package, config, (lambda: state.snapshot) if state else Snapshot)
        if names and config.served_model_name is None:
            steering = replace(steering, served_name=names[0])
        steering = replace(steering, phases=lambda: self._phases)
        self._steering = steering
        set_up_logging(config.log_format, "atomsteer")  # vLLM sets up its own loggers alone
        self._traffic = Traffic()
        self._stopped = asyncio.Event()
        self._engine: Any = None
        self._phases: tuple[Phase, ...] = ("all",)
        metrics = SteeringMetrics(REGISTRY)
        metrics.describe(lambda: package.manifest)
        drift = DriftSampler(state.recorder, config.drift, metrics) if state else None
        if drift is not None:
            metrics.watch(drift.recorder)
        health = health_router(package.manifest, metrics, self._is_ready)
        with _added_first(app):
            app.include_router(atoms_router(package, allow_training_text=config.allow_training_text))
            app.include_router(preview_router(steering, metrics))
            app.include_router(presets_router(steering, state))
            app.include_router(experiments_router(steering, state))
            app.include_router(units_router(state))
            app.include_router(admin_router(_cannot_reload))
            app.router.routes.extend(route for route in health.routes if getattr(route, "path", "") in _OUR_HEALTH)
        install_error_handlers(app)
        app.add_middleware(SteeringMiddleware, steering=steering, metrics=metrics, traffic=self._traffic,
                           drift=drift, score=self._score, stopped=self._stopped,
                           limits=config.limits)  # fmt: skip
        app.add_middleware(BodyLimitMiddleware, limit=config.limits.max_body_bytes, seconds=config.body_timeout)
        app.add_middleware(OperatorMiddleware, routes=operators)
        app.add_middleware(QuotaMiddleware, quotas=Quotas(config.quota), refused=metrics.limited)
        app.add_middleware(AuthMiddleware, keys=KeyRing.of(config), refused=metrics.key_refused)
        app.add_middleware(RequestContextMiddleware, traffic=self._traffic, metrics=metrics, access_log=config.access_log,
                           log_prompts=config.log_prompts)  # fmt: skip
        if (tracer := make_tracer(os.environ)) is not None:
            app.add_middleware(TracingMiddleware, tracer=tracer)
        if state is not None:
            _on_shutdown(app, state.close)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Puts mixes on the requests to the engine, and has every worker compose one. Raises what that raises."""
        parallel = engine_client.vllm_config.parallel_config
        self._phases = ("all",) if engine_client.vllm_config.use_v2_model_runner else ("all", "decode")
        identities = MixIdentities(parallel._api_process_rank, parallel._api_process_count)
        await _probe(engine_client, self._steering.package, identities)
        steer_engine(engine_client, identities, self._traffic, self._stopped)
        name_models(state.openai_serving_models, self._steering, self._model_path)
        length = engine_client.model_config.max_model_len
        self._traffic.slots = engine_client.vllm_config.scheduler_config.max_num_seqs
        with _added_first(self._app):
            self._app.include_router(models_router(self._steering, max_model_len=length, created=int(time.time())))
        self._engine, self._identities = engine_client, identities

    async def _score(self, answered: Answered) -> float:
        """While other requests wait for a place in the batch, so does this."""
        while self._traffic.generating >= self._traffic.slots:
            await asyncio.sleep(_LOOK_SECONDS)
        if self._traffic.draining:
            raise EngineStoppedError("the server is shutting down")
        return await measure_drift(self._engine, answered, self._identities.of(answered.mix, answered.digest))

    def _is_ready(self) -> bool:
        return self._engine is not None and not self._engine.errored and not self._traffic.draining


def steer_engine(engine: Any, identities: MixIdentities, traffic: Traffic, stopped: asyncio.Event) -> None:
    """Gives each request to `engine` the mix of the call it belongs to, and says when the engine drains and has stopped.

    To be called in the server's event loop; vLLM stops its engine from another thread, or from this one when it has died:
    then the process ends with status 1, where vLLM's would be 0 and nobody would start it again.
    """
    from server.vllm.upstream import LoRARequest

    generate, shutdown, loop = engine.generate, engine.shutdown, asyncio.get_running_loop()

    def steered(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        call = current.get()
        if call is None:
            return generate(*args, **kwargs)
        mix = call.steering.mix
        if mix:
            name, number, path = identities.of(mix, call.steering.digest)
            kwargs["lora_request"] = LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)
        return _observed(generate(*args, **kwargs), call)

    def draining(*args: Any, **kwargs: Any) -> None:
        has_died = engine.errored and not traffic.draining
        traffic.draining = True
        try:
            shutdown(*args, **kwargs)
        finally:
            if not loop.is_closed():
                loop.call_soon_threadsafe(stopped.set)
        if has_died:
            raise SystemExit("the engine has died, so the server ends; the log above says why")

    engine.generate, engine.shutdown = steered, draining


def name_models(models: Any, steering: Steering, path: str) -> None:
    """Makes vLLM's handlers know the served name and its presets, and answer under the name that was asked for."""
    from server.vllm.upstream import BaseModelPath

    def is_base_model(name: str) -> bool:
        try:
            steering.preset_of_model(name)
        except AtomsteerError:
            return False
        return True

    def model_name(_lora_request: object = None) -> str:
        call = current.get()
        return call.model if call is not None else steering.served_name

    models.base_model_paths[:] = [BaseModelPath(name=steering.served_name, model_path=path)]
    models.is_base_model, models.model_name = is_base_model, model_name


async def _observed(outputs: AsyncIterator[Any], call: SteeredCall) -> AsyncIterator[Any]:
    """Passes `outputs` on, and notes what was read and generated. Each output has either what is new or all that there
    is."""
    begun = False
    async for output in outputs:
        if not begun:
            begun = True
            call.read(output.request_id, output.prompt_token_ids or ())
        for answer in output.outputs:
            call.observe(output.request_id, answer.index, answer.text, answer.token_ids, answer.finish_reason)
        yield output


async def _cannot_reload() -> tuple[Package, Package]:
    raise NotSupportedHereError("vLLM has the base adapter in its weights and cannot change the package in place; start a "
                                "replica on the new version, move the traffic, then stop this one")  # fmt: skip


async def _probe(engine: Any, package: Package, identities: MixIdentities) -> None:
    """Has every worker compose one atom: a worker without our manager refuses, and the server does not start."""
    from server.vllm.upstream import LoRARequest

    for card in package.manifest.atoms[:1]:
        mix = Mix.of({card.id: 1.0})
        name, number, path = identities.of(mix, package.digest(mix))
        await engine.add_lora(LoRARequest(lora_name=name, lora_int_id=number, lora_path=path))


@contextmanager
def _added_first(app: FastAPI) -> Iterator[None]:
    """Routes that the block adds come before those that are there, whose paths they may replace."""
    routes = app.router.routes
    known = len(routes)
    yield
    routes[:] = [*routes[known:], *routes[:known]]


def _on_shutdown(app: FastAPI, close: Callable[[], None]) -> None:
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(application: Any) -> AsyncIterator[Any]:
        async with inner(application) as state:
            try:
                yield state
            finally:
                close()

    app.router.lifespan_context = lifespan
