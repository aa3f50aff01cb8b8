"""What an atomsteer server's own routes answer with. Fields that are not named here are kept as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from openai import BaseModel

from atomsteer_client.steering import Echo


class Atom(BaseModel):
    """The card of an atom: `name` is its alias if it has one, else its id. Ranges are [low, high]; the curve is of
    [coefficient, nats a token]."""

    id: str
    name: str
    alias: str | None = None
    description: str
    described_by: str | None = None
    keywords: list[str]
    stability: float | None = None
    stability_halves: float | None = None
    n_documents: int
    tested_range: list[float]
    sound_range: list[float] | None = None
    kl_curve: list[list[float]]
    effects: list[dict[str, Any]]
    """Measured rates. Left out: a `temperature` of 0 (greedy), a `top_p` of 1, and what was not measured."""


class AtomList(BaseModel):
    data: list[Atom]


class Preview(BaseModel):
    steering: Echo


class Preset(BaseModel):
    """A named mix. `mix` and `predicted_kl` are None where the package lacks one of its atoms; `fixed`: not to be changed."""

    name: str
    atoms: dict[str, float]
    mix: str | None = None
    predicted_kl: float | None = None
    usable: bool
    fixed: bool
    description: str
    version: int | None = None


class PresetList(BaseModel):
    data: list[Preset]


class Arm(BaseModel):
    """One treatment of an experiment: its `share` of the units that take part, and the mix that it was frozen to.
    `range` is the part of [0, 1) whose units it gets."""

    name: str
    share: float
    atoms: dict[str, float]
    mix: str
    predicted_kl: float
    range: list[float]
    preset: str | None = None
    preset_version: int | None = None


class Experiment(BaseModel):
    """An experiment: what it was created with, and its state. Times are Unix seconds."""

    name: str
    status: Literal["draft", "running", "stopped"]
    coverage: float
    arms: list[Arm]
    control: str
    primary: str | None = None
    package_version: str
    created_at: float
    started_at: float | None = None
    stopped_at: float | None = None
    stop_reason: str | None = None


class ExperimentList(BaseModel):
    data: list[Experiment]


class Forgotten(BaseModel):
    rows: int


class Stored(BaseModel):
    """How many outcomes were stored, and the response ids that the experiment does not know."""

    stored: int
    unknown_responses: list[str]


def matching(atoms: Sequence[Atom], words: str) -> list[Atom]:
    """The atoms whose name, id, keywords or description contain each of `words`; those that match by name come first."""
    wanted = words.lower().split()

    def text(atom: Atom) -> str:
        return " ".join((atom.id, atom.name, *atom.keywords, atom.description)).lower()

    found = [atom for atom in atoms if all(word in text(atom) for word in wanted)]
    return sorted(found, key=lambda atom: not all(word in atom.name.lower() for word in wanted))
