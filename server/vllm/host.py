"""Our routes and middleware on vLLM's own application, and our mixes on its way to the engine.

vLLM calls `attach_router` once its routes are there and `init_state` once its handlers are. Everything that is to be
undone hangs on the application's lifespan.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from prometheus_client import REGISTRY
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute

from atoms.engine import Phase
from atoms.errors import AtomsteerError, ConfigError, EngineStoppedError
from atoms.mix import Mix
from atoms.package import Package
from server.auth import AuthMiddleware, KeyRing, warn_if_open
from server.body import BodyLimitMiddleware
from server.config import ServeConfig
from server.context import EXPOSED_HEADERS, RequestContextMiddleware, Traffic
from server.errors import ReloadError
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
from server.versions import reload_at_hangup
from server.vllm.exposure import OperatorMiddleware, operator_routes
from server.vllm.grammars import is_work_bounded
from server.vllm.identity import MixIdentities
from server.vllm.middleware import SteeredCall, SteeringMiddleware, current
from server.vllm.scoring import measure_drift
from server.vllm.settings import PACKAGE_VARIABLE, PLUGIN_NAME, read_settings, refuse_root_path
from server.vllm.versions import WorkerVersion, WorkerVersions

_LOOK_SECONDS, _LEAVING_SECONDS = 0.2, 3
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
        refuse_root_path(app.root_path)
        self._app, self._config = app, config
        self._model_path = app.state.args.model
        self._names = app.state.args.served_model_name
        operators = operator_routes(app.routes)
        package = Package.read(config.package)
        database = open_database(url) if (url := config.database_url()) else None
        self._state = State(database, package.manifest.name) if database else None
        set_up_logging(config.log_format, "atomsteer")  # vLLM sets up its own loggers alone
        _warn_if_open(config, app.state.args)
        self._traffic = Traffic()
        self._stopped = asyncio.Event()
        self._engine: Any = None
        self._phases: tuple[Phase, ...] = ("all",)
        self._length: int | None = None
        self._created = int(time.time())
        self._metrics = metrics = SteeringMetrics(REGISTRY)
        self._own_routes: list[BaseRoute] = []
        self._versions = versions = WorkerVersions(self._version(package), self._read, self._show)
        metrics.describe(lambda: versions.current.package.manifest)
        drift = DriftSampler(self._state.recorder, config.drift, metrics) if self._state else None
        if drift is not None:
            metrics.watch(drift.recorder)
        self._show(versions.current)
        install_error_handlers(app)
        app.add_middleware(SteeringMiddleware, versions=versions, metrics=metrics, traffic=self._traffic,
                           drift=drift, score=self._score, stopped=self._stopped,
                           limits=config.limits, is_work_bounded=is_work_bounded(app.state.args))  # fmt: skip
        app.add_middleware(BodyLimitMiddleware, limit=config.limits.max_body_bytes, seconds=config.body_timeout)
        app.add_middleware(OperatorMiddleware, routes=operators)
        app.add_middleware(QuotaMiddleware, quotas=Quotas(config.quota), refused=metrics.limited)
        app.add_middleware(AuthMiddleware, keys=KeyRing.of(config), refused=metrics.key_refused)
        app.add_middleware(RequestContextMiddleware, traffic=self._traffic, metrics=metrics, access_log=config.access_log,
                           log_prompts=config.log_prompts)  # fmt: skip
        app.add_middleware(CORSMiddleware, expose_headers=EXPOSED_HEADERS)  # vLLM's own, around it, knows who may call
        if (tracer := make_tracer(os.environ)) is not None:
            app.add_middleware(TracingMiddleware, tracer=tracer)
        if self._state is not None:
            _on_shutdown(app, self._state.close)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Puts mixes on the requests to the engine, and has every worker compose one. Raises what that raises."""
        parallel = engine_client.vllm_config.parallel_config
        self._phases = ("all",) if engine_client.vllm_config.use_v2_model_runner else ("all", "decode")
        identities = MixIdentities(parallel._api_process_rank, parallel._api_process_count)
        await _probe(engine_client, self._versions.current.package, identities)
        steer_engine(engine_client, identities, self._traffic, self._stopped, is_shared=parallel._api_process_count > 1)
        name_models(state.openai_serving_models, self._versions, self._model_path)
        self._traffic.slots = engine_client.vllm_config.scheduler_config.max_num_seqs
        self._length = engine_client.model_config.max_model_len
        self._show(self._versions.current)
        self._versions.connect(engine_client, parallel._api_process_count)
        if parallel._api_process_count == 1:
            reload_at_hangup(self._reload)
        self._engine, self._identities = engine_client, identities

    def _version(self, package: Package) -> WorkerVersion:
        """`package` as it is served; its atoms' weights are the workers' to read. Raises ConfigError for presets that cannot
        be applied, and what a broken package raises."""
        _ = package.drift_model  # read now: another version may lie there when it is needed
        state, config = self._state, self._config
        steering = Steering.of(package, config, (lambda: state.snapshot) if state else Snapshot)
        if self._names and config.served_model_name is None:
            steering = replace(steering, served_name=self._names[0])
        return WorkerVersion(package, replace(steering, phases=lambda: self._phases))

    def _read(self) -> WorkerVersion:
        """The version that lies at the package's path now."""
        return self._version(Package.read(self._config.package))

    def _show(self, version: WorkerVersion) -> None:
        """Puts our routes on `version` in the place of those before, and before vLLM's, whose paths they may replace. What
        runs on those before goes on. (An application that includes a router would keep it.)"""
        steering, metrics = version.steering, self._metrics
        routers = [
            atoms_router(version.package, allow_training_text=self._config.allow_training_text),
            preview_router(steering, metrics),
            presets_router(steering, self._state),
            experiments_router(steering, self._state),
            units_router(self._state),
            admin_router(self._reload),
        ]
        if self._length is not None:
            routers.append(models_router(steering, max_model_len=self._length, created=self._created))
        ours = [route for router in routers for route in router.routes]
        health = health_router(version.package.manifest, metrics, self._is_ready)
        ours += [route for route in health.routes if getattr(route, "path", "") in _OUR_HEALTH]
        routes = self._app.router.routes
        routes[:] = [*ours, *(route for route in routes if not any(route is own for own in self._own_routes))]
        self._own_routes = ours

    async def _reload(self) -> tuple[Package, Package]:
        """Raises what `Versions.reload` does. An engine that has stopped answers nobody, and ends the wait."""
        with self._metrics.counting_reloads():
            work = asyncio.create_task(self._versions.reload())
            stopped = asyncio.create_task(self._stopped.wait())
            try:
                await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise ReloadError("the server is shutting down")
                return work.result()
            finally:
                stopped.cancel()
                work.cancel()

    async def _score(self, version: WorkerVersion, answered: Answered) -> float:
        """While other requests wait for a place in the batch, so does this."""
        while self._traffic.generating >= self._traffic.slots:
            await asyncio.sleep(_LOOK_SECONDS)
        if self._traffic.draining:
            raise EngineStoppedError("the server is shutting down")
        with version.used():
            return await measure_drift(self._engine, answered, self._identities.of(answered.mix, answered.digest))

    def _is_ready(self) -> bool:
        return self._engine is not None and not self._engine.errored and not self._traffic.draining


def _warn_if_open(config: ServeConfig, args: Any) -> None:
    """By vLLM's options: a Unix socket is for whom its mode says, and a key of vLLM's own guards as well as one of ours."""
    if not (args.uds or args.api_key or os.environ.get("VLLM_API_KEY")):
        warn_if_open(config, args.host or "", f"{args.host or 'this machine'} port {args.port}")


def steer_engine(
    engine: Any, identities: MixIdentities, traffic: Traffic, stopped: asyncio.Event, *, is_shared: bool = False
) -> None:
    """Gives each request to `engine` the mix of the call it belongs to, and says when the engine drains and has stopped.
    Other API servers use one that `is_shared`.

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
        return _observed(generate(*args, **kwargs), call, lambda: traffic.draining and engine.errored)

    def draining(timeout: float | None = None) -> None:
        begins = not traffic.draining
        has_died = begins and engine.errored
        traffic.draining = True
        try:
            if begins and is_shared and not has_died:
                _wait_for_answers(traffic, timeout or 0)
            shutdown(timeout=timeout)
        finally:
            if not loop.is_closed():
                loop.call_soon_threadsafe(stopped.set)
        if has_died:
            raise SystemExit("the engine has died, so the server ends; the log above says why")

    engine.generate, engine.shutdown = steered, draining


def name_models(models: Any, versions: WorkerVersions, path: str) -> None:
    """Makes vLLM's handlers know the served name and its presets, and answer under the name that was asked for."""
    from server.vllm.upstream import BaseModelPath

    served_name = versions.current.steering.served_name

    def is_base_model(name: str) -> bool:
        call = current.get()
        version = call.version if call is not None else versions.current
        try:
            version.steering.preset_of_model(name)
        except AtomsteerError:
            return False
        return True

    def model_name(_lora_request: object = None) -> str:
        call = current.get()
        return call.model if call is not None else served_name

    models.base_model_paths[:] = [BaseModelPath(name=served_name, model_path=path)]
    models.is_base_model, models.model_name = is_base_model, model_name


def _wait_for_answers(traffic: Traffic, timeout: float) -> None:
    """Until no request is in flight. An engine of several API servers is not theirs to stop, so vLLM's leave at once; its
    launcher kills those that are there after `timeout` seconds, so what is left by then needs its error before."""
    end = time.monotonic() + max(timeout - _LEAVING_SECONDS, timeout / 2)
    while traffic.generating and time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)


async def _observed(
    outputs: AsyncGenerator[Any], call: SteeredCall, has_ended: Callable[[], bool]
) -> AsyncIterator[Any]:
    """Passes `outputs` on, and notes what was read and generated. Each output has either what is new or all that there
    is. The call's version is used until the engine has been told that nothing more is wanted.

    What fails because the server `has_ended` its engine waits for `SteeringMiddleware` to break it off: vLLM would call it an
    internal error."""
    begun = False
    with call.version.used():
        try:
            async for output in outputs:
                if not begun:
                    begun = True
                    call.read(output.request_id, output.prompt_token_ids or ())
                for answer in output.outputs:
                    call.observe(output.request_id, answer.index, answer.text, answer.token_ids, answer.finish_reason)
                yield output
        except Exception:
            if not has_ended():
                raise
            await asyncio.Event().wait()
        finally:
            await outputs.aclose()


async def _probe(engine: Any, package: Package, identities: MixIdentities) -> None:
    """Has every worker compose one atom: a worker without our manager refuses, and the server does not start."""
    from server.vllm.upstream import LoRARequest

    for card in package.manifest.atoms[:1]:
        mix = Mix.of({card.id: 1.0})
        name, number, path = identities.of(mix, package.digest(mix))
        await engine.add_lora(LoRARequest(lora_name=name, lora_int_id=number, lora_path=path))


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
