"""The routes that an atomsteer server adds to OpenAI's: atoms, preview, presets, experiments. Each sync, then async."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import quote

from openai import HttpxBinaryResponseContent
from openai._base_client import make_request_options
from openai._resource import AsyncAPIResource, SyncAPIResource

from atomsteer_client.models import (
    Atom,
    AtomList,
    Experiment,
    ExperimentList,
    Forgotten,
    Preset,
    PresetList,
    Preview,
    Stored,
    matching,
)
from atomsteer_client.steering import Echo, SteeringLike, wire_form

Answer = dict[str, Any]
Status = Literal["draft", "running", "stopped"]
Table = Literal["exposures", "responses", "outcomes"]


class Atoms(SyncAPIResource):
    def list(self) -> list[Atom]:
        return self._get("/atoms", cast_to=AtomList).data

    def get(self, atom: str) -> Atom:
        """The card of an id or alias. Raises openai.NotFoundError."""
        return self._get(f"/atoms/{_part(atom)}", cast_to=Atom)

    def search(self, words: str) -> Sequence[Atom]:
        """The atoms whose name, id, keywords or description contain each of `words`, in any order."""
        return matching(self.list(), words)


class AsyncAtoms(AsyncAPIResource):
    async def list(self) -> list[Atom]:
        return (await self._get("/atoms", cast_to=AtomList)).data

    async def get(self, atom: str) -> Atom:
        """The card of an id or alias. Raises openai.NotFoundError."""
        return await self._get(f"/atoms/{_part(atom)}", cast_to=Atom)

    async def search(self, words: str) -> Sequence[Atom]:
        """The atoms whose name, id, keywords or description contain each of `words`, in any order."""
        return matching(await self.list(), words)


class SteeringRoutes(SyncAPIResource):
    def preview(
        self, steering: SteeringLike | None = None, *, extra_headers: Mapping[str, str] | None = None, **fields: Any
    ) -> Echo:
        """What a request would be steered with; `fields` may be `model`, `user`, `metadata`. Nothing is generated."""
        options = make_request_options(extra_headers=extra_headers)
        body = _preview(steering, fields)
        return self._post("/steering/preview", body=body, options=options, cast_to=Preview).steering


class AsyncSteeringRoutes(AsyncAPIResource):
    async def preview(
        self, steering: SteeringLike | None = None, *, extra_headers: Mapping[str, str] | None = None, **fields: Any
    ) -> Echo:
        """What a request would be steered with; `fields` may be `model`, `user`, `metadata`. Nothing is generated."""
        options = make_request_options(extra_headers=extra_headers)
        body = _preview(steering, fields)
        return (await self._post("/steering/preview", body=body, options=options, cast_to=Preview)).steering


class Presets(SyncAPIResource):
    """Writing needs an admin key."""

    def list(self) -> list[Preset]:
        return self._get("/presets", cast_to=PresetList).data

    def get(self, name: str) -> Preset:
        return self._get(f"/presets/{_part(name)}", cast_to=Preset)

    def versions(self, name: str) -> Sequence[Preset]:
        """All versions that ever held, oldest first."""
        return self._get(f"/presets/{_part(name)}/versions", cast_to=PresetList).data

    def set(
        self, name: str, atoms: Mapping[str, float], description: str = "", if_version: int | None = None
    ) -> Preset:
        """Creates or replaces a preset; with `if_version`, only if that is its version (0: if there is none)."""
        body = {"atoms": dict(atoms), "description": description, "if_version": if_version}
        return self._put(f"/presets/{_part(name)}", body=body, cast_to=Preset)

    def delete(self, name: str) -> None:
        self._delete(f"/presets/{_part(name)}", cast_to=Answer)


class AsyncPresets(AsyncAPIResource):
    """Writing needs an admin key."""

    async def list(self) -> list[Preset]:
        return (await self._get("/presets", cast_to=PresetList)).data

    async def get(self, name: str) -> Preset:
        return await self._get(f"/presets/{_part(name)}", cast_to=Preset)

    async def versions(self, name: str) -> Sequence[Preset]:
        """All versions that ever held, oldest first."""
        return (await self._get(f"/presets/{_part(name)}/versions", cast_to=PresetList)).data

    async def set(
        self, name: str, atoms: Mapping[str, float], description: str = "", if_version: int | None = None
    ) -> Preset:
        """Creates or replaces a preset; with `if_version`, only if that is its version (0: if there is none)."""
        body = {"atoms": dict(atoms), "description": description, "if_version": if_version}
        return await self._put(f"/presets/{_part(name)}", body=body, cast_to=Preset)

    async def delete(self, name: str) -> None:
        await self._delete(f"/presets/{_part(name)}", cast_to=Answer)


class Experiments(SyncAPIResource):
    """All but `record` need an admin key."""

    def list(self, status: Status | None = None) -> list[Experiment]:
        """The experiments, newest first; with `status` those in that state."""
        options = make_request_options(query={"status": status} if status else None)
        return self._get("/experiments", options=options, cast_to=ExperimentList).data

    def get(self, name: str) -> Experiment:
        return self._get(_experiment(name), cast_to=Experiment)

    def create(self, **spec: Any) -> Experiment:
        """Creates a draft; the fields of `spec` are those of ``POST /v1/experiments``: `name`, `arms`, …"""
        return self._post("/experiments", body=spec, cast_to=Experiment)

    def replace(self, name: str, **spec: Any) -> Experiment:
        """Gives a draft another spec."""
        return self._put(_experiment(name), body={"name": name, **spec}, cast_to=Experiment)

    def start(self, name: str) -> Experiment:
        return self._post(_experiment(name, "start"), cast_to=Experiment)

    def ramp(self, name: str, coverage: float) -> Experiment:
        """Sets the share of units that take part."""
        return self._post(_experiment(name, "ramp"), body={"coverage": coverage}, cast_to=Experiment)

    def stop(self, name: str, reason: str = "stopped by an operator") -> Experiment:
        return self._post(_experiment(name, "stop"), body={"reason": reason}, cast_to=Experiment)

    def report(self, name: str, looks: int = 0) -> Answer:
        """What is known now; `looks` adds the primary metric at so many times since the start, 50 at most."""
        options = make_request_options(query={"looks": looks})
        return self._get(_experiment(name, "report"), options=options, cast_to=Answer)

    def promote(
        self, name: str, arm: str, preset: str, *, description: str | None = None, if_version: int | None = None
    ) -> Preset:
        """Makes an arm's mix a preset; `if_version` as for `presets.set`."""
        body = {"arm": arm, "preset": preset, "description": description, "if_version": if_version}
        return self._post(_experiment(name, "promote"), body=body, cast_to=Preset)

    def export(self, name: str, table: Table = "responses") -> bytes:
        """A Parquet file of what was observed, one row a record."""
        options = make_request_options(query={"table": table})
        answer = self._get(_experiment(name, "export"), options=options, cast_to=HttpxBinaryResponseContent)
        return answer.content

    def forget(self, unit: str) -> int:
        """Deletes all that was observed of a unit, in every experiment of the server's database, other packages' too; returns
        how many records that were."""
        return (self._delete(f"/units/{_part(unit)}", cast_to=Forgotten)).rows

    def record(self, name: str, response_id: str, metric: str, value: float) -> Stored:
        """Reports one outcome of one response, by the `id` of the answer."""
        return self.record_many(name, [{"response_id": response_id, "metric": metric, "value": value}])

    def record_many(self, name: str, outcomes: Sequence[Mapping[str, Any]]) -> Stored:
        """Reports many outcomes, each with `response_id`, `metric` and `value`."""
        return self._post(_experiment(name, "outcomes"), body={"outcomes": [*outcomes]}, cast_to=Stored)

    def delete(self, name: str) -> None:
        self._delete(_experiment(name), cast_to=Answer)


class AsyncExperiments(AsyncAPIResource):
    """All but `record` need an admin key."""

    async def list(self, status: Status | None = None) -> list[Experiment]:
        """The experiments, newest first; with `status` those in that state."""
        options = make_request_options(query={"status": status} if status else None)
        return (await self._get("/experiments", options=options, cast_to=ExperimentList)).data

    async def get(self, name: str) -> Experiment:
        return await self._get(_experiment(name), cast_to=Experiment)

    async def create(self, **spec: Any) -> Experiment:
        """Creates a draft; the fields of `spec` are those of ``POST /v1/experiments``: `name`, `arms`, …"""
        return await self._post("/experiments", body=spec, cast_to=Experiment)

    async def replace(self, name: str, **spec: Any) -> Experiment:
        """Gives a draft another spec."""
        return await self._put(_experiment(name), body={"name": name, **spec}, cast_to=Experiment)

    async def start(self, name: str) -> Experiment:
        return await self._post(_experiment(name, "start"), cast_to=Experiment)

    async def ramp(self, name: str, coverage: float) -> Experiment:
        """Sets the share of units that take part."""
        return await self._post(_experiment(name, "ramp"), body={"coverage": coverage}, cast_to=Experiment)

    async def stop(self, name: str, reason: str = "stopped by an operator") -> Experiment:
        return await self._post(_experiment(name, "stop"), body={"reason": reason}, cast_to=Experiment)

    async def report(self, name: str, looks: int = 0) -> Answer:
        """What is known now; `looks` adds the primary metric at so many times since the start, 50 at most."""
        options = make_request_options(query={"looks": looks})
        return await self._get(_experiment(name, "report"), options=options, cast_to=Answer)

    async def promote(
        self, name: str, arm: str, preset: str, *, description: str | None = None, if_version: int | None = None
    ) -> Preset:
        """Makes an arm's mix a preset; `if_version` as for `presets.set`."""
        body = {"arm": arm, "preset": preset, "description": description, "if_version": if_version}
        return await self._post(_experiment(name, "promote"), body=body, cast_to=Preset)

    async def export(self, name: str, table: Table = "responses") -> bytes:
        """A Parquet file of what was observed, one row a record."""
        options = make_request_options(query={"table": table})
        answer = await self._get(_experiment(name, "export"), options=options, cast_to=HttpxBinaryResponseContent)
        return answer.content

    async def forget(self, unit: str) -> int:
        """Deletes all that was observed of a unit, in every experiment of the server's database, other packages' too; returns
        how many records that were."""
        return (await self._delete(f"/units/{_part(unit)}", cast_to=Forgotten)).rows

    async def record(self, name: str, response_id: str, metric: str, value: float) -> Stored:
        """Reports one outcome of one response, by the `id` of the answer."""
        return await self.record_many(name, [{"response_id": response_id, "metric": metric, "value": value}])

    async def record_many(self, name: str, outcomes: Sequence[Mapping[str, Any]]) -> Stored:
        """Reports many outcomes, each with `response_id`, `metric` and `value`."""
        return await self._post(_experiment(name, "outcomes"), body={"outcomes": [*outcomes]}, cast_to=Stored)

    async def delete(self, name: str) -> None:
        await self._delete(_experiment(name), cast_to=Answer)


def _preview(steering: SteeringLike | None, fields: Mapping[str, Any]) -> Answer:
    return {**fields, "steering": wire_form(steering) if steering is not None else None}


def _experiment(name: str, action: str = "") -> str:
    return f"/experiments/{_part(name)}" + (f"/{action}" if action else "")


def _part(name: str) -> str:
    """`name` as one part of a path, whatever it contains: . and .., too, which as they are would climb."""
    return quote(name, safe="") if name.strip(".") else name.replace(".", "%2E")
