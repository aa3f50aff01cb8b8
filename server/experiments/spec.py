"""What an experiment is: the spec that an operator writes, and the experiment that it becomes.

The spec may be replaced while the experiment is a draft. Starting it freezes the arms to mixes of one package version;
from then on only `coverage` and `status` change. Knows no database and no HTTP.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from atoms.detectors import DETECTORS
from atoms.mix import Mix
from server.errors import InvalidFieldError
from server.experiments.assignment import Range, choose, place, ranges
from server.store.tables import UNIT
from server.validation import PlainText, Strict

Status = Literal["draft", "running", "stopped"]
HOLDOUT = "holdout"
"""The arm that gets the server's default mix."""
DETECTOR_PREFIX = "detector:"
MEASURED_KL = "measured_kl"
"""The metric that `drift` measures of a share of the responses."""
AUTOMATIC = frozenset({
    "error", "hung_up", "latency_seconds", "first_token_seconds", "tokens", "characters", "truncated", "degenerate",
    "refusal", MEASURED_KL,
    *(f"{DETECTOR_PREFIX}{name}" for name in DETECTORS),
})  # fmt: skip
"""Metrics that the server records of every response; `measures` says what they mean."""
_UNIT_SOURCE = re.compile(r"user|(metadata|header):[A-Za-z0-9._-]{1,64}")

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class ArmSpec(Strict):
    """One treatment: a mix (`atoms`) or a preset's. `weight` is relative to the other arms'."""

    name: Name
    atoms: dict[str, float] | None = None
    preset: str | None = None
    weight: float = Field(1.0, ge=1e-6, le=1e6)

    @model_validator(mode="after")
    def _one_mix(self) -> Self:
        if (self.atoms is None) == (self.preset is None):
            raise ValueError(f"arm {self.name!r} needs one of atoms and preset")
        return self


class MetricSpec(Strict):
    """An outcome that clients report for a response. `missing`: what a unit without any counts as."""

    name: Name
    kind: Literal["proportion", "mean"] = "mean"
    goal: Literal["increase", "decrease"] = "increase"
    missing: Literal["ignore", "zero"] = "ignore"


class GuardrailSpec(Strict):
    """Stops the experiment when a treated arm's mean of `metric` is surely above `max`, or surely more than
    `max_increase` above the control's."""

    metric: str
    max: float | None = None
    max_increase: float | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.max is None) == (self.max_increase is None):
            raise ValueError(f"the guardrail on {self.metric!r} needs one of max and max_increase")
        return self


class ExperimentSpec(Strict):
    """What an operator decides. Every default is written into what is stored.

    control          the arm that others are compared with; default: the holdout if there is one, else the first arm
    holdout          share of units that get the server's default mix, recorded as arm ``holdout``
    coverage         share of all units that take part; the rest get the control's mix and are not recorded
    unit             who is assigned: ``user``, ``metadata:KEY`` or ``header:NAME``
    missing_unit     a request without a unit is refused (``error``) or answered as if outside (``outside``)
    seed             of the hash; default: the name
    primary          the metric that decides; default: the first of `metrics`, else none
    max_kl           the most predicted KL, in nats a token, that any arm may have
    alpha            level of the intervals of one metric, all arms together
    horizon          units in all, at which the intervals are tightest; choose what you expect to need
    """

    name: Name
    description: PlainText = Field("", max_length=4000)
    arms: list[ArmSpec] = Field(min_length=1, max_length=16)
    control: str | None = None
    holdout: float = Field(0.0, ge=0, lt=1)
    coverage: float = Field(1.0, gt=0, le=1)
    unit: str = "user"
    missing_unit: Literal["error", "outside"] = "error"
    seed: str | None = Field(None, min_length=1, max_length=256)
    metrics: list[MetricSpec] = Field(default_factory=list, max_length=32)
    primary: str | None = None
    guardrails: list[GuardrailSpec] = Field(default_factory=list, max_length=16)
    max_kl: float | None = Field(None, ge=0)
    alpha: float = Field(0.05, ge=1e-6, lt=0.5)
    horizon: int = Field(2000, ge=10, le=10**9)

    @field_validator("unit")
    @classmethod
    def _known_source(cls, unit: str) -> str:
        if not _UNIT_SOURCE.fullmatch(unit):
            raise ValueError("unit must be user, metadata:KEY or header:NAME")
        return unit

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [arm.name for arm in self.arms]
        if HOLDOUT in names:
            raise ValueError(f"{HOLDOUT!r} is the name of the untreated arm; call yours otherwise, or set holdout")
        names += [HOLDOUT] if self.holdout else []
        _no_doublet("arm", names)
        if len(names) < 2:
            raise ValueError("an experiment compares at least two arms; add one, or a holdout")
        if self.control is not None and self.control not in names:
            raise ValueError(f"control is {self.control!r}; it must be one of {', '.join(names)}")
        metrics = [metric.name for metric in self.metrics]
        _no_doublet("metric", metrics)
        if taken := next((name for name in metrics if name in AUTOMATIC), None):
            raise ValueError(f"metric {taken!r} is recorded by the server itself; call yours otherwise")
        known = {*metrics, *AUTOMATIC}
        for asked in [self.primary, *(guardrail.metric for guardrail in self.guardrails)]:
            if asked is not None and asked not in known:
                raise ValueError(f"{str(asked)[:80]!r} is no metric; those are {', '.join(sorted(known))}")
        return self

    def completed(self) -> ExperimentSpec:
        """A copy in which every default that depends on other fields is written out."""
        return self.model_copy(
            update={
                "control": self.control or (HOLDOUT if self.holdout else self.arms[0].name),
                "seed": self.seed or self.name,
                "primary": self.primary or (self.metrics[0].name if self.metrics else None),
            }
        )


@dataclass(frozen=True, slots=True)
class Arm:
    """A frozen treatment. `share` of the units that take part; all arms' add up to 1. `digest` identifies the mix on the
    package version that the experiment was started on."""

    name: str
    share: float
    mix: Mix
    digest: str
    predicted_kl: float
    preset: str | None = None
    preset_version: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "share": self.share,
            "atoms": self.mix.as_dict(),
            "preset": self.preset,
            "preset_version": self.preset_version,
            "predicted_kl": self.predicted_kl,
            "mix": self.digest,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Arm:
        return cls(data["name"], data["share"], Mix.of(data["atoms"]), data["mix"], data["predicted_kl"], data["preset"],
                   data["preset_version"])  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """An experiment as it stands. The times are Unix seconds."""

    id: int
    status: Status
    spec: ExperimentSpec
    arms: tuple[Arm, ...]
    package_version: str
    coverage: float
    created_at: float
    started_at: float | None = None
    stopped_at: float | None = None
    stop_reason: str | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def control(self) -> Arm:
        return self.arm(self.spec.control or "")

    @cached_property
    def ranges(self) -> list[Range]:
        return self.ranges_at(self.coverage)

    def ranges_at(self, coverage: float) -> list[Range]:
        """The arms' ranges as they are, or were, at a coverage."""
        return ranges([arm.share for arm in self.arms], coverage)

    def arm(self, name: str) -> Arm:
        """Raises InvalidFieldError."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise InvalidFieldError(
            f"experiment {self.name!r} has no arm {name[:64]!r}; its arms are {', '.join(a.name for a in self.arms)}",
            "arm",
        )

    def assign(self, unit: str) -> Arm | None:
        """The arm of `unit`, None for one that does not take part. The same on every server."""
        index = choose(place(self.spec.seed or self.name, unit), self.ranges)
        return None if index is None else self.arms[index]

    def counts_silence(self, metric: str) -> bool:
        """Whether a unit without any value of `metric` counts as 0."""
        return any(own.name == metric and own.missing == "zero" for own in self.spec.metrics)

    def metric(self, name: str) -> MetricSpec:
        """A metric that clients report. Raises InvalidFieldError."""
        for metric in self.spec.metrics:
            if metric.name == name:
                return metric
        known = ", ".join(metric.name for metric in self.spec.metrics) or "none"
        raise InvalidFieldError(f"experiment {self.name!r} has no metric {name[:64]!r}; it has {known}", "metric")


@dataclass(frozen=True, slots=True)
class Assignment:
    """A unit that takes part, and its arm."""

    experiment_id: int
    unit: str
    arm: str


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom a request is for, as far as it says: its ``user``, its ``metadata``, its headers (names in lower case, values
    as HTTP frameworks give them: bytes as Latin-1)."""

    user: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def unit(self, source: str) -> str | None:
        """The unit that `source` of an `ExperimentSpec` names, None where it is absent or empty.

        Raises InvalidFieldError for one that is no text of 1 to 256 printable characters.
        """
        kind, _, key = source.partition(":")
        if kind == "user":
            value: object = self.user
        elif kind == "metadata":
            value = self.metadata.get(key)
        else:
            value = _as_sent(self.headers.get(key.lower()))
        if value is None or value == "":
            return None
        if not isinstance(value, str) or len(value) > UNIT or not value.isprintable():
            where = {"user": "user", "metadata": f"metadata.{key}"}.get(kind, key)
            raise InvalidFieldError(
                f"{where} is {repr(value)[:80]}; a unit is a text of 1 to {UNIT} printable characters", where
            )
        return value


def _as_sent(header: str | None) -> str | None:
    """A header's value: UTF-8, as clients send names, else Latin-1."""
    if header is None:
        return None
    try:
        return header.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return header


def shares(spec: ExperimentSpec) -> dict[str, float]:
    """Arm -> share, in order, the holdout last. They add up to 1."""
    total = math.fsum(arm.weight for arm in spec.arms)
    treated = {arm.name: (1 - spec.holdout) * arm.weight / total for arm in spec.arms}
    return treated | ({HOLDOUT: spec.holdout} if spec.holdout else {})


def _no_doublet(what: str, names: list[str]) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two {what}s are called {twice!r}; give each a name of its own")
