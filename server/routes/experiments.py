"""/v1/experiments: admin keys create, run and read experiments; clients report outcomes.

The spec is `server.experiments.spec.ExperimentSpec`; every answer about one experiment is `experiment_json`.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field
from sqlalchemy import Connection
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from server.auth import require_admin
from server.body import read_json
from server.errors import ConflictError, ExperimentNotFoundError, InvalidFieldError, ResponseNotFoundError
from server.experiments.export import TABLES, export
from server.experiments.recording import Outcome
from server.experiments.report import experiment_json, report
from server.experiments.spec import Arm, Experiment, ExperimentSpec, Name, Subject
from server.presets import Preset
from server.responses import JSONResponse
from server.routes.presets import preset_json, refuse_fixed
from server.state import State, required
from server.steering import Steering
from server.store.tables import RESPONSE
from server.validation import PlainText, Strict, parse

MAX_OUTCOMES = 10_000
_LARGEST_VALUE = 1e12
_MAX_LOOKS = 50


class RampBody(Strict):
    """The share of units that take part from now on."""

    coverage: float = Field(gt=0, le=1)


class StopBody(Strict):
    """Why, for the history."""

    reason: PlainText = Field("stopped by an operator", max_length=1000)


class PromoteBody(Strict):
    """The arm whose mix becomes a preset; `if_version` as for presets."""

    arm: str
    preset: Name
    description: PlainText | None = Field(None, max_length=4000)
    if_version: int | None = Field(None, ge=0)


class OutcomeBody(Strict):
    """One value of one metric for one response."""

    response_id: str = Field(min_length=1, max_length=RESPONSE)
    metric: str
    value: float | bool = Field(union_mode="left_to_right")


class OutcomesBody(Strict):
    """Many at once."""

    outcomes: list[OutcomeBody] = Field(min_length=1, max_length=MAX_OUTCOMES)


class _ExperimentName(Strict):
    name: Name


class _StatusFilter(Strict):
    status: Literal["draft", "running", "stopped"] | None = None


class _Table(Strict):
    table: Literal["exposures", "responses", "outcomes"] = "responses"


def experiments_router(steering: Steering, state: State | None) -> APIRouter:
    """`state` None: every route says that the server has no database."""
    router = APIRouter(prefix="/v1/experiments")
    version = steering.package.manifest.version

    @router.post("", response_model=None)
    async def create(request: Request) -> Response:
        live = _admin(request, state)
        spec = parse(ExperimentSpec, await read_json(request)).completed()
        arms = await _frozen(live, steering, spec)
        created = await asyncio.to_thread(live.experiments.create, spec, arms, version)
        return await _changed(live, created, 201)

    @router.get("", response_model=None)
    async def list_experiments(request: Request) -> Response:
        live = _admin(request, state)
        wanted = parse(_StatusFilter, dict(request.query_params)).status
        await asyncio.to_thread(live.refresh)
        found = [experiment for experiment in live.snapshot.experiments.values() if wanted in (None, experiment.status)]
        return JSONResponse({"object": "list", "data": [experiment_json(experiment) for experiment in found]})

    @router.get("/{name}", response_model=None)
    async def show(name: str, request: Request) -> Response:
        live = _admin(request, state)
        return JSONResponse(experiment_json(await asyncio.to_thread(live.experiments.get, name)))

    @router.put("/{name}", response_model=None)
    async def replace(name: str, request: Request) -> Response:
        live = _admin(request, state)
        spec = parse(ExperimentSpec, await read_json(request)).completed()
        if spec.name != name:
            raise InvalidFieldError(f"name is {spec.name!r} and the path says {name[:64]!r}; they must agree", "name")
        arms = await _frozen(live, steering, spec)
        replaced = await asyncio.to_thread(live.experiments.replace, spec, arms, version)
        return await _changed(live, replaced)

    @router.delete("/{name}", response_model=None)
    async def delete(name: str, request: Request) -> Response:
        live = _admin(request, state)
        await asyncio.to_thread(live.experiments.delete, name)
        await asyncio.to_thread(live.refresh)
        return JSONResponse({"object": "experiment.deleted", "name": name, "deleted": True})

    @router.post("/{name}/start", response_model=None)
    async def start(name: str, request: Request) -> Response:
        live = _admin(request, state)
        draft = await asyncio.to_thread(live.experiments.get, name)
        arms = await _frozen(live, steering, draft.spec)
        started = await asyncio.to_thread(live.experiments.start, draft, arms, version)
        return await _changed(live, started)

    @router.post("/{name}/ramp", response_model=None)
    async def ramp(name: str, request: Request) -> Response:
        live = _admin(request, state)
        body = parse(RampBody, await read_json(request))
        return await _changed(live, await asyncio.to_thread(live.experiments.ramp, name, body.coverage))

    @router.post("/{name}/stop", response_model=None)
    async def stop(name: str, request: Request) -> Response:
        live = _admin(request, state)
        body = parse(StopBody, await read_json(request))
        return await _changed(live, await asyncio.to_thread(live.experiments.stop, name, body.reason))

    @router.get("/{name}/report", response_model=None)
    async def show_report(name: str, request: Request) -> Response:
        live = _admin(request, state)
        looks = _looks(request.query_params.get("looks", "0"))
        return JSONResponse(await asyncio.to_thread(_report, live, name, looks))

    @router.post("/{name}/promote", response_model=None)
    async def promote(name: str, request: Request) -> Response:
        live = _admin(request, state)
        body = parse(PromoteBody, await read_json(request))
        return JSONResponse(await asyncio.to_thread(_promote, steering, live, name, body))

    @router.post("/{name}/outcomes", response_model=None)
    async def report_outcomes(name: str, request: Request) -> Response:
        live = required(state)
        experiment = _observed(live, name)
        body = await read_json(request)
        many = parse(OutcomesBody, body) if "outcomes" in body else OutcomesBody(outcomes=[parse(OutcomeBody, body)])
        outcomes = [_outcome(experiment, outcome, place) for place, outcome in enumerate(many.outcomes)]
        unknown = await asyncio.wrap_future(live.recorder.report(experiment.id, outcomes))
        stored = sum(outcome.response_id not in unknown for outcome in outcomes)
        if not stored:
            raise ResponseNotFoundError(
                f"no response {outcomes[0].response_id[:80]!r} was given under experiment {name!r}, or none that has been "
                "recorded yet; send the id of an answer whose steering.arm is not null", "response_id"
            )  # fmt: skip
        return JSONResponse({"object": "experiment.outcomes", "stored": stored, "unknown_responses": sorted(unknown)})

    @router.get("/{name}/export", response_model=None)
    async def export_table(name: str, request: Request) -> Response:
        live = _admin(request, state)
        table = parse(_Table, dict(request.query_params)).table
        experiment = await asyncio.to_thread(live.experiments.get, name)
        file = await asyncio.to_thread(export, live.database, experiment, TABLES[table])
        headers = {"Content-Disposition": f'attachment; filename="{name}-{table}.parquet"'}
        media = "application/vnd.apache.parquet"
        return FileResponse(file, media_type=media, headers=headers, background=BackgroundTask(file.unlink))

    return router


def units_router(state: State | None) -> APIRouter:
    """/v1/units: forgetting one."""
    router = APIRouter()

    @router.delete("/v1/units/{unit:path}", response_model=None)
    async def forget(unit: str, request: Request) -> Response:
        live = _admin(request, state)
        if Subject(user=unit).unit("user") is None:
            raise InvalidFieldError("the unit to forget is empty; write DELETE /v1/units/NAME", "unit")
        rows = await asyncio.wrap_future(live.recorder.erase(unit))
        return JSONResponse({"object": "unit.deleted", "unit": unit, "deleted": True, "rows": rows})

    return router


def _admin(request: Request, state: State | None) -> State:
    require_admin(request, "experiments are run")
    if (name := request.path_params.get("name")) is not None:
        parse(_ExperimentName, {"name": name})
    return required(state)


async def _frozen(live: State, steering: Steering, spec: ExperimentSpec) -> list[Arm]:
    """The arms of `spec` with presets as they are now, and not as this server last saw them: another replica may have
    changed one a moment ago. Raises StoreUnavailableError and what `Steering.freeze` does."""
    await asyncio.to_thread(live.refresh)
    return steering.freeze(spec)


async def _changed(live: State, experiment: Experiment, status: int = 200) -> Response:
    """The experiment as it is now, which this server's requests see from now on."""
    await asyncio.to_thread(live.refresh)
    return JSONResponse(experiment_json(experiment), status)


def _report(live: State, name: str, looks: int) -> dict[str, Any]:
    experiment = live.experiments.get(name)
    with live.database.read() as connection:
        return report(connection, experiment, looks=looks) | {
            "history": live.experiments.history(connection, experiment)
        }


def _looks(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) > _MAX_LOOKS:
        raise InvalidFieldError(f"looks is {text[:32]!r}; it must be a whole number from 0 to {_MAX_LOOKS}", "looks")
    return int(text)


def _promote(steering: Steering, live: State, name: str, body: PromoteBody) -> dict[str, Any]:
    experiment = live.experiments.get(name)
    if experiment.status == "draft":
        raise ConflictError(f"experiment {name!r} has not been started; nothing speaks for an arm yet")
    arm = experiment.arm(body.arm)
    if not steering.applies(arm.mix):
        raise ConflictError(f"the package lacks atoms of arm {arm.name!r}; it was started on another version")
    refuse_fixed(steering, body.preset)
    description = body.description if body.description is not None else f"arm {arm.name} of experiment {name}"

    def put(connection: Connection) -> Preset:
        version = steering.package.manifest.version
        return live.presets.put_in(connection, body.preset, arm.mix, description, version, expected=body.if_version)

    stored = live.experiments.promote(experiment, arm.name, put)
    live.refresh()
    return preset_json(steering, stored)


def _observed(live: State, name: str) -> Experiment:
    """An experiment that outcomes may be reported for. Raises ExperimentNotFoundError, ConflictError."""
    experiment = live.snapshot.experiments.get(name)
    if experiment is None:
        raise ExperimentNotFoundError(f"experiment {name[:64]!r} does not exist", "experiment")
    if experiment.status == "draft":
        raise ConflictError(f"experiment {name!r} has not been started; it has no responses")
    return experiment


def _outcome(experiment: Experiment, body: OutcomeBody, place: int) -> Outcome:
    """Raises InvalidFieldError for a metric that the experiment does not have, or a value that the metric cannot."""
    metric, value = experiment.metric(body.metric), float(body.value)
    low, high = (0.0, 1.0) if metric.kind == "proportion" else (-_LARGEST_VALUE, _LARGEST_VALUE)
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidFieldError(
            f"value {value:g} of {metric.name} is outside {low:g} to {high:g}, as a {metric.kind} must be",
            f"outcomes[{place}].value",
        )
    if not body.response_id.isprintable():
        raise InvalidFieldError("response_id has characters that cannot be printed", f"outcomes[{place}].response_id")
    return Outcome(body.response_id, metric.name, value)
