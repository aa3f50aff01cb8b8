"""From what a request says of steering to one bounded mix. READ FIRST: this is what the servers are for.

    body["steering"], "name:preset"  ->  SteeringRequest       parse(): form
    preset, atoms, default           ->  Mix                   resolve(): names, tested ranges, drift budget
    experiment, subject              ->  Mix of the unit's arm
    Mix, digest, predicted KL        ->  ResolvedSteering      echo(): what the answer says

Knows the package and no engine, no web framework, and of the database only a `Snapshot` in memory. Fields, meanings and
errors are the table of `SteeringRequest`; nothing is accepted and ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, get_args

from atoms.engine import Phase
from atoms.errors import CoefficientError, ConfigError, DriftBudgetError, MixError, UnknownAtomError
from atoms.mix import MAX_COEFFICIENT, Mix, digest_in_phase, parse_mix
from atoms.package import Package
from server.config import ServeConfig
from server.errors import (
    ConflictError,
    ExperimentNotFoundError,
    InvalidFieldError,
    MissingUnitError,
    ModelNotFoundError,
    PermissionDeniedError,
    PresetNotFoundError,
)
from server.experiments.spec import HOLDOUT, Arm, Assignment, Experiment, ExperimentSpec, Subject, shares
from server.state import Snapshot

OnExceed = Literal["error", "scale"]
FIELDS = ("atoms", "preset", "experiment", "max_kl", "on_exceed", "allow_out_of_range", "phase")
_LONGEST_NAME = 64  # of an alias or preset; a longer one cannot exist and is not echoed at length
_KL_DIGITS = 6
_HALVINGS = 24
"""Of the interval in which a mix's factor for `max_kl` is sought: 6e-8."""


@dataclass(frozen=True, slots=True)
class SteeringRequest:
    """The `steering` object of a request, checked for form; names are not resolved yet. A null field is an absent one.

    atoms                id or alias -> coefficient; None where absent, empty where explicitly none
    preset               name of a server-side mix; `atoms` override it entry by entry, a 0 removes
    experiment           name of an experiment, which chooses the mix by the request's unit; nothing may stand beside it
    max_kl, on_exceed    budget in nats a token, and whether to refuse (``error``) or to shrink the mix (``scale``)
    allow_out_of_range   beyond an atom's tested range; admin keys only
    phase                which tokens are steered: ``all``, or from the prompt's last one on (``decode``)
    """

    atoms: Mapping[str, float] | None = None
    preset: str | None = None
    experiment: str | None = None
    max_kl: float | None = None
    on_exceed: OnExceed = "error"
    allow_out_of_range: bool = False
    phase: Phase = "all"

    @classmethod
    def parse(cls, value: object) -> SteeringRequest:
        """Reads the raw JSON value; null is the empty request.

        Raises InvalidFieldError for a wrong type or value and for an experiment beside other fields, CoefficientError for
        a coefficient that is no finite number.
        """
        if value is None:
            return cls()
        if not isinstance(value, dict):
            raise InvalidFieldError(f"steering is {_show(value)}; it must be an object such as "
                                    '{"atoms": {"name": 1.0}}', "steering")  # fmt: skip
        for key in value:
            if key not in FIELDS:
                raise InvalidFieldError(f"steering has no field {_show(key)}; its fields are {', '.join(FIELDS)}",
                                        f"steering.{_cut(key)}")  # fmt: skip
        given = {key: field for key, field in value.items() if field is not None}
        if "experiment" in given and len(given) > 1:
            other = next(key for key in given if key != "experiment")
            raise InvalidFieldError(f"{other} stands beside experiment, which chooses the whole mix; give one of them",
                                    f"steering.{other}")  # fmt: skip
        return cls(
            atoms=_atoms(given["atoms"]) if "atoms" in given else None,
            preset=_text(given["preset"], "steering.preset") if "preset" in given else None,
            experiment=_text(given["experiment"], "steering.experiment") if "experiment" in given else None,
            max_kl=_max_kl(given["max_kl"]) if "max_kl" in given else None,
            on_exceed=_on_exceed(given.get("on_exceed", "error")),
            allow_out_of_range=_flag(given.get("allow_out_of_range", False), "steering.allow_out_of_range"),
            phase=_phase(given.get("phase", "all")),
        )


@dataclass(frozen=True, slots=True)
class ResolvedSteering:
    """What a request is steered with. `digest` identifies mix and phase. `scaled_by` is 1 unless the drift budget shrank
    the mix. `assignment` is what a host hands to the `Recorder`; None for a request that takes no part in an
    experiment."""

    mix: Mix
    digest: str
    predicted_kl: float
    scaled_by: float = 1.0
    preset: str | None = None
    experiment: str | None = None
    arm: str | None = None
    assignment: Assignment | None = None
    phase: Phase = "all"

    def echo(self) -> dict[str, object]:
        """The `steering` object of the answer; `atoms` maps ids to the coefficients that were applied."""
        return {
            "mix": self.digest,
            "atoms": self.mix.as_dict(),
            "predicted_kl": self.predicted_kl,
            "scaled_by": self.scaled_by,
            "preset": self.preset,
            "experiment": self.experiment,
            "arm": self.arm,
            "phase": self.phase,
        }


@dataclass(frozen=True, slots=True)
class Steering:
    """Resolves requests against one package, its presets and its default mix.

    `fixed` are the presets of the server's settings. Those of the database, and experiments, are in what `snapshot`
    returns; a fixed preset hides none of them, because no name may be both. `phases` are those that the host can steer.
    """

    package: Package
    served_name: str
    fixed: Mapping[str, Mix]
    default: Mix
    max_atoms: int
    snapshot: Callable[[], Snapshot] = Snapshot
    phases: Callable[[], Sequence[Phase]] = lambda: get_args(Phase)

    @classmethod
    def of(cls, package: Package, config: ServeConfig, snapshot: Callable[[], Snapshot] = Snapshot) -> Steering:
        """Raises ConfigError if a preset or the default mix cannot be applied, or a preset's name is also in the
        database."""
        most = config.limits.max_atoms_per_mix
        texts = config.preset_texts()
        presets = {name: _configured(package, text, f"preset {name!r}", most) for name, text in texts.items()}
        default = _configured(package, config.default_mix or "", "the default mix", most)
        if taken := sorted(presets.keys() & snapshot().presets.keys()):
            raise ConfigError(f"preset {taken[0]!r} is set by --preset and is in the database too; remove one of them")
        return cls(package, config.served_model_name or package.manifest.name, presets, default, most, snapshot)

    @property
    def presets(self) -> list[str]:
        """The names of the presets that may be asked for, the fixed ones first."""
        stored = self.snapshot().presets.items()
        return [*self.fixed, *(name for name, preset in stored if name not in self.fixed and self.applies(preset.mix))]

    def preset_of_model(self, model: str) -> str | None:
        """The preset that a request's `model` asks for, None for the plain served name.

        Raises ModelNotFoundError for another model, PresetNotFoundError.
        """
        if model == self.served_name:
            return None
        name, separator, preset = model.rpartition(":")
        if not separator or name != self.served_name:
            raise ModelNotFoundError(
                f"model {_show(model)} does not exist here; this server serves {self.served_name!r}", "model"
            )
        self._preset(preset, "model")
        return preset

    def resolve(
        self, value: object, *, model_preset: str | None = None, admin: bool = False, subject: Subject = Subject()
    ) -> ResolvedSteering:
        """The bounded mix of a request whose `steering` is `value`; `model_preset` comes from ``name:preset``, and
        `subject` says for whom it is.

        Raises what `SteeringRequest.parse` does, and PresetNotFoundError, PermissionDeniedError, UnknownAtomError,
        CoefficientError (out of range), DriftBudgetError, MixError (too many atoms), ExperimentNotFoundError,
        MissingUnitError, ConflictError (an experiment or preset that cannot be applied now).
        """
        request = SteeringRequest.parse(value)
        if request.experiment is not None:
            if model_preset is not None:
                raise InvalidFieldError(f"the model's preset {model_preset!r} stands beside experiment, which chooses the "
                                        "whole mix; give one of them", "steering.experiment")  # fmt: skip
            return self._assigned(request.experiment, subject)
        if request.preset is not None and model_preset is not None:
            raise InvalidFieldError(
                f"preset {_show(request.preset)} and the model's preset {model_preset!r} are both given; give one",
                "steering.preset",
            )
        if request.allow_out_of_range and not admin:
            raise PermissionDeniedError(
                "allow_out_of_range is true, which needs an admin key; leave it out or send an admin key",
                "steering.allow_out_of_range",
            )
        if request.phase not in self.phases():
            raise InvalidFieldError(f'phase "{request.phase}" is not to be had from the engine that serves here; use '
                                    f'"{self.phases()[0]}" or leave it out', "steering.phase")  # fmt: skip
        preset = request.preset if request.preset is not None else model_preset
        mix = self._mix(request, preset)
        if not request.allow_out_of_range:
            self.package.check_range(mix)
        bounded, scaled_by = self._bound(mix, request)
        digest = digest_in_phase(self.package.digest(bounded), bounded, request.phase)
        return ResolvedSteering(bounded, digest, self.predicted_kl(bounded), scaled_by, preset, phase=request.phase)

    def named_mix(self, atoms: Mapping[str, float]) -> Mix:
        """The mix of a preset or an arm, checked as a client's would be. `param` of an error is within ``atoms``.

        Raises UnknownAtomError, CoefficientError, MixError.
        """
        with _params_from(""):
            checked = _atoms(dict(atoms))
            _check_count(len(checked), self.max_atoms)
            mix = Mix.of(_named(self.package, checked))
            self.package.check_range(mix)
            return mix

    def freeze(self, spec: ExperimentSpec) -> list[Arm]:
        """The arms of an experiment as they would be from now on, the holdout last.

        Raises what `named_mix` does, PresetNotFoundError, and DriftBudgetError for an arm above the spec's `max_kl`.
        """
        arms = []
        for place, (name, share) in enumerate(shares(spec).items()):
            treatment = None if name == HOLDOUT else spec.arms[place]
            with _params_from(f"arms[{place}]."):
                preset = treatment.preset if treatment else None
                if treatment is None:
                    mix = self.default
                elif preset is not None:
                    mix = self._preset(preset, "preset")
                else:
                    mix = self.named_mix(treatment.atoms or {})
            kl = self.predicted_kl(mix)
            if spec.max_kl is not None and kl > spec.max_kl:
                raise DriftBudgetError(f"arm {name!r} has a predicted KL of {kl:g} nats a token and max_kl is "
                                       f"{spec.max_kl:g}; use smaller coefficients", param=f"arms[{place}]")  # fmt: skip
            stored = self.snapshot().presets.get(preset or "")
            version = stored.version if stored and preset not in self.fixed else None
            arms.append(Arm(name, share, mix, self.package.digest(mix), kl, preset, version))
        return arms

    def _assigned(self, name: str, subject: Subject) -> ResolvedSteering:
        """The mix of the unit's arm; the control's for one that takes no part, and for all once it has been stopped."""
        experiment = self.snapshot().experiments.get(name)
        if experiment is None:
            raise ExperimentNotFoundError(f"experiment {_show(name)} does not exist", "steering.experiment")
        if experiment.status == "draft":
            raise ConflictError(f"experiment {name!r} has not been started", "steering.experiment")
        unit = subject.unit(experiment.spec.unit)
        if unit is None and experiment.spec.missing_unit == "error" and experiment.status == "running":
            raise MissingUnitError(f"experiment {name!r} assigns by {experiment.spec.unit}, which the request lacks",
                                   experiment.spec.unit.replace(":", "."))  # fmt: skip
        arm = experiment.assign(unit) if unit is not None and experiment.status == "running" else None
        given = arm or experiment.control
        if experiment.status == "stopped":
            given = self._as_it_is_now(experiment, given)
        else:
            self._check_frozen(experiment, given)
        assignment = Assignment(experiment.id, unit, arm.name) if arm and unit else None
        return ResolvedSteering(given.mix, given.digest, given.predicted_kl, preset=given.preset, experiment=name,
                                arm=arm.name if arm else None, assignment=assignment)  # fmt: skip

    def _as_it_is_now(self, experiment: Experiment, control: Arm) -> Arm:
        """The control of an experiment that was stopped, of the package in force, which may be a later version. Raises
        ConflictError where that lacks one of its atoms."""
        if not self.applies(control.mix):
            raise ConflictError(
                f"experiment {experiment.name!r} was stopped, and version {self.package.manifest.version} of the package lacks "
                "an atom of its control; leave steering.experiment out",
                "steering.experiment",
            )
        return replace(control, digest=self.package.digest(control.mix), predicted_kl=self.predicted_kl(control.mix))

    def _check_frozen(self, experiment: Experiment, arm: Arm) -> None:
        """Raises ConflictError where `arm` would not be what the experiment was started with."""
        if not self.applies(arm.mix) or self.package.digest(arm.mix) != arm.digest:
            raise ConflictError(
                f"experiment {experiment.name!r} was started on version {experiment.package_version} of the package and "
                f"this server has {self.package.manifest.version}; stop it, or serve that version",
                "steering.experiment",
            )

    def applies(self, mix: Mix) -> bool:
        """Whether the package has all atoms of `mix`."""
        return all(atom in self.package.index for atom, _ in mix)

    def _mix(self, request: SteeringRequest, preset: str | None) -> Mix:
        """The requested mix: `atoms` over the preset's, else `atoms` alone, else the preset, else the default."""
        base = self._preset(preset, "steering.preset") if preset is not None else Mix()
        if request.atoms is None:
            return base if preset is not None else self.default
        _check_count(len(request.atoms), self.max_atoms)
        mix = Mix.of(base.as_dict() | _named(self.package, request.atoms))
        _check_count(len(mix), self.max_atoms)
        return mix

    def _preset(self, name: str, param: str) -> Mix:
        """The mix of a preset. Raises PresetNotFoundError, ConflictError if the package lacks one of its atoms."""
        if name in self.fixed:
            return self.fixed[name]
        stored = self.snapshot().presets.get(name)
        if stored is None:
            known = ", ".join(sorted(self.presets)) or "none"
            raise PresetNotFoundError(f"preset {_show(name)} does not exist; this server has: {known}", param)
        if not self.applies(stored.mix):
            raise ConflictError(
                f"preset {name!r} was made on version {stored.package_version} of the package and names atoms that version "
                f"{self.package.manifest.version} lacks; set it anew",
                param,
            )
        return stored.mix

    def _bound(self, mix: Mix, request: SteeringRequest) -> tuple[Mix, float]:
        """`mix` within the request's drift budget, and the factor that brought it there."""
        budget, kl = request.max_kl, self.predicted_kl(mix)
        if budget is None or kl <= budget:
            return mix, 1.0
        if request.on_exceed == "error":
            raise DriftBudgetError(
                f"the mix has a predicted KL of {kl:g} nats a token and max_kl is {budget:g}; use smaller "
                'coefficients, a larger max_kl, or "on_exceed": "scale"',
                param="steering.max_kl",
            )
        factor, above = 0.0, 1.0
        for _ in range(_HALVINGS):  # what a mix costs has no closed inverse; `factor` always keeps to the budget
            middle = (factor + above) / 2
            if self.predicted_kl(mix.scaled(middle)) <= budget:
                factor = middle
            else:
                above = middle
        return mix.scaled(factor), factor

    def predicted_kl(self, mix: Mix) -> float:
        """Nats a token, rounded to 1e-6."""
        return round(self.package.predicted_kl(mix), _KL_DIGITS)


@contextmanager
def _params_from(prefix: str) -> Iterator[None]:
    """Errors of the block blame fields of a body that has `prefix` where a request has ``steering.``."""
    try:
        yield
    except (MixError, InvalidFieldError, PresetNotFoundError) as error:
        error.param = f"{prefix}{(error.param or '').removeprefix('steering.')}"
        raise


def _named(package: Package, atoms: Mapping[str, float]) -> dict[str, float]:
    """`atoms` by id, zeros kept: over a preset they remove. Raises UnknownAtomError, and MixError for a doublet."""
    named: dict[str, float] = {}
    for name, value in atoms.items():
        if len(name) > _LONGEST_NAME:
            raise UnknownAtomError(f"unknown atom {_show(name)}; names have at most {_LONGEST_NAME} characters",
                                   param="steering.atoms")  # fmt: skip
        atom = package.card(name).id
        if atom in named:
            raise MixError(f"atom {atom} is named twice, once as {name!r}; give it one coefficient",
                           param=f"steering.atoms.{name}")  # fmt: skip
        named[atom] = value
    return named


def _configured(package: Package, text: str, what: str, most: int) -> Mix:
    try:
        mix = package.mix(parse_mix(text))
        _check_count(len(mix), most)
        package.check_range(mix)
    except MixError as error:
        raise ConfigError(f"{what} cannot be used: {error}") from error
    return mix


def _check_count(count: int, most: int) -> None:
    if count > most:
        raise MixError(f"the mix names {count} atoms and the limit is {most}; leave the weakest out",
                       param="steering.atoms")  # fmt: skip


def _atoms(value: object) -> dict[str, float]:
    if not isinstance(value, dict):
        raise InvalidFieldError(
            f"steering.atoms is {_show(value)}; it must be an object that maps atoms to coefficients", "steering.atoms"
        )
    return {name: _coefficient(name, number) for name, number in value.items()}


def _coefficient(name: str, value: object) -> float:
    param = f"steering.atoms.{_cut(name)}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidFieldError(
            f"coefficient {_show(value)} of atom {_show(name)} is not a number; write one such as 1.5", param
        )
    if not abs(value) <= MAX_COEFFICIENT:  # NaN too; an integer of any size compares without overflow
        raise CoefficientError(
            f"coefficient {_show(value)} of atom {_show(name)} is not a finite number within ±{MAX_COEFFICIENT:g}; "
            "usual values lie within ±3",
            param=param,
        )
    return float(value)


def _max_kl(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
        raise InvalidFieldError(f"max_kl is {_show(value)}; it must be a finite number of nats a token, 0 or more",
                                "steering.max_kl")  # fmt: skip
    return float(value)


def _on_exceed(value: object) -> OnExceed:
    if value == "error":
        return "error"
    if value == "scale":
        return "scale"
    raise InvalidFieldError(f'on_exceed is {_show(value)}; it must be "error" or "scale"', "steering.on_exceed")


def _phase(value: object) -> Phase:
    if value == "all":
        return "all"
    if value == "decode":
        return "decode"
    raise InvalidFieldError(f'phase is {_show(value)}; it must be "all" or "decode"', "steering.phase")


def _text(value: object, param: str) -> str:
    if not isinstance(value, str):
        raise InvalidFieldError(f"{param} is {_show(value)}; it must be a text", param)
    return value


def _flag(value: object, param: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidFieldError(f"{param} is {_show(value)}; it must be true or false", param)
    return value


def _show(value: object) -> str:
    """`value` for a message, at most a line long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _cut(name: str) -> str:
    return name[:_LONGEST_NAME]
