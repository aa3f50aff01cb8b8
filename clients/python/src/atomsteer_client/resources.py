"""The routes that an atomsteer server adds to OpenAI's: atoms, preview, presets, experiments. Each sync, then async."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from openai._resource import AsyncAPIResource, SyncAPIResource

from atomsteer_client.models import (
    Atom,
    AtomList,
    Experiment,
    ExperimentList,
    Preset,
    PresetList,
    Preview,
    Stored,
    matching,
)
from atomsteer_client.steering import Echo, SteeringLike, wire_form

Answer = dict[str, Any]


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
    def preview(self, steering: SteeringLike | None = None, **fields: Any) -> Echo:
        """What a request would be steered with; `fields` may be `model`, `user`, `metadata`. Nothing is generated."""
        return self._post("/steering/preview", body=_preview(steering, fields), cast_to=Preview).steering


class AsyncSteeringRoutes(AsyncAPIResource):
    async def preview(self, steering: SteeringLike | None = None, **fields: Any) -> Echo:
        """What a request would be steered with; `fields` may be `model`, `user`, `metadata`. Nothing is generated."""
        return (await self._post("/steering/preview", body=_preview(steering, fields), cast_to=Preview)).steering


class Presets(SyncAPIResource):
    """Writing needs an admin key."""

    def list(self) -> list[Preset]:
        return self._get("/presets", cast_to=PresetList).data

    def get(self, name: str) -> Preset:
        return self._get(f"/presets/{_part(name)}", cast_to=Preset)

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

    def list(self) -> list[Experiment]:
        return self._get("/experiments", cast_to=ExperimentList).data

    def get(self, name: str) -> Experiment:
        return self._get(_experiment(name), cast_to=Experiment)

    def create(self, **spec: Any) -> Experiment:
        """Creates a draft; the fields of `spec` are those of ``POST /v1/experiments``: `name`, `arms`, …"""
        return self._post("/experiments", body=spec, cast_to=Experiment)

    def start(self, name: str) -> Experiment:
        return self._post(_experiment(name, "start"), cast_to=Experiment)

    def ramp(self, name: str, coverage: float) -> Experiment:
        """Sets the share of units that take part."""
        return self._post(_experiment(name, "ramp"), body={"coverage": coverage}, cast_to=Experiment)

    def stop(self, name: str, reason: str) -> Experiment:
        return self._post(_experiment(name, "stop"), body={"reason": reason}, cast_to=Experiment)

    def report(self, name: str) -> Answer:
        return self._get(_experiment(name, "report"), cast_to=Answer)

    def promote(self, name: str, arm: str, preset: str) -> Preset:
        """Makes an arm's mix a preset."""
        return self._post(_experiment(name, "promote"), body={"arm": arm, "preset": preset}, cast_to=Preset)

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

    async def list(self) -> list[Experiment]:
        return (await self._get("/experiments", cast_to=ExperimentList)).data

    async def get(self, name: str) -> Experiment:
        return await self._get(_experiment(name), cast_to=Experiment)

    async def create(self, **spec: Any) -> Experiment:
        """Creates a draft; the fields of `spec` are those of ``POST /v1/experiments``: `name`, `arms`, …"""
        return await self._post("/experiments", body=spec, cast_to=Experiment)

    async def start(self, name: str) -> Experiment:
        return await self._post(_experiment(name, "start"), cast_to=Experiment)

    async def ramp(self, name: str, coverage: float) -> Experiment:
        """Sets the share of units that take part."""
        return await self._post(_experiment(name, "ramp"), body={"coverage": coverage}, cast_to=Experiment)

    async def stop(self, name: str, reason: str) -> Experiment:
        return await self._post(_experiment(name, "stop"), body={"reason": reason}, cast_to=Experiment)

    async def report(self, name: str) -> Answer:
        return await self._get(_experiment(name, "report"), cast_to=Answer)

    async def promote(self, name: str, arm: str, preset: str) -> Preset:
        """Makes an arm's mix a preset."""
        return await self._post(_experiment(name, "promote"), body={"arm": arm, "preset": preset}, cast_to=Preset)

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
    """`name` as one part of a path, whatever it contains."""
    return quote(name, safe="")
