"""From what a request says of steering to one bounded mix. READ FIRST: this is what the servers are for.

    body["steering"], "name:preset"  ->  SteeringRequest       parse(): form
    preset, atoms, default           ->  Mix                   resolve(): names, tested ranges, drift budget
    Mix, digest, predicted KL        ->  ResolvedSteering      echo(): what the answer says

Knows the package and no engine, no web framework. Fields, meanings and errors are the table of `SteeringRequest`;
nothing is accepted and ignored.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from atoms.errors import CoefficientError, ConfigError, DriftBudgetError, MixError, UnknownAtomError
from atoms.mix import MAX_COEFFICIENT, Mix, parse_mix
from atoms.package import Package
from server.config import ServeConfig
from server.errors import (
    InvalidFieldError,
    ModelNotFoundError,
    PermissionDeniedError,
    PresetNotFoundError,
    UnsupportedFieldError,
)

OnExceed = Literal["error", "scale"]
FIELDS = ("atoms", "preset", "experiment", "max_kl", "on_exceed", "allow_out_of_range")
_LONGEST_NAME = 64  # of an alias or preset; a longer one cannot exist and is not echoed at length
_KL_DIGITS = 6


@dataclass(frozen=True, slots=True)
class SteeringRequest:
    """The `steering` object of a request, checked for form; names are not resolved yet. A null field is an absent one.

    atoms                id or alias -> coefficient; None where absent, empty where explicitly none
    preset               name of a server-side mix; `atoms` override it entry by entry, a 0 removes
    max_kl, on_exceed    budget in nats a token, and whether to refuse (``error``) or to shrink the mix (``scale``)
    allow_out_of_range   beyond an atom's tested range; admin keys only
    """

    atoms: Mapping[str, float] | None = None
    preset: str | None = None
    max_kl: float | None = None
    on_exceed: OnExceed = "error"
    allow_out_of_range: bool = False

    @classmethod
    def parse(cls, value: object) -> SteeringRequest:
        """Reads the raw JSON value; null is the empty request.

        Raises InvalidFieldError for a wrong type or value, UnsupportedFieldError for an experiment, CoefficientError
        for a coefficient that is no finite number.
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
        if "experiment" in given:
            raise UnsupportedFieldError("experiments are not supported yet; leave steering.experiment out",
                                        "steering.experiment")  # fmt: skip
        return cls(
            atoms=_atoms(given["atoms"]) if "atoms" in given else None,
            preset=_text(given["preset"], "steering.preset") if "preset" in given else None,
            max_kl=_max_kl(given["max_kl"]) if "max_kl" in given else None,
            on_exceed=_on_exceed(given.get("on_exceed", "error")),
            allow_out_of_range=_flag(given.get("allow_out_of_range", False), "steering.allow_out_of_range"),
        )


@dataclass(frozen=True, slots=True)
class ResolvedSteering:
    """What a request is steered with. `scaled_by` is 1 unless the drift budget shrank the mix."""

    mix: Mix
    digest: str
    predicted_kl: float
    scaled_by: float = 1.0
    preset: str | None = None
    experiment: str | None = None
    arm: str | None = None

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
        }


@dataclass(frozen=True, slots=True)
class Steering:
    """Resolves requests against one package, its presets and its default mix."""

    package: Package
    served_name: str
    presets: Mapping[str, Mix]
    default: Mix
    max_atoms: int

    @classmethod
    def of(cls, package: Package, config: ServeConfig) -> Steering:
        """Raises ConfigError if a preset or the default mix cannot be applied."""
        most = config.limits.max_atoms_per_mix
        texts = config.preset_texts()
        presets = {name: _configured(package, text, f"preset {name!r}", most) for name, text in texts.items()}
        default = _configured(package, config.default_mix or "", "the default mix", most)
        return cls(package, config.served_model_name or package.manifest.name, presets, default, most)

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

    def resolve(self, value: object, *, model_preset: str | None = None, admin: bool = False) -> ResolvedSteering:
        """The bounded mix of a request whose `steering` is `value`; `model_preset` comes from ``name:preset``.

        Raises what `SteeringRequest.parse` does, and PresetNotFoundError, PermissionDeniedError, UnknownAtomError,
        CoefficientError (out of range), DriftBudgetError, MixError (too many atoms).
        """
        request = SteeringRequest.parse(value)
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
        preset = request.preset if request.preset is not None else model_preset
        mix = self._mix(request, preset)
        if not request.allow_out_of_range:
            self.package.check_range(mix)
        bounded, scaled_by = self._bound(mix, request)
        return ResolvedSteering(bounded, self.package.digest(bounded), self._kl(bounded), scaled_by, preset)

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
        if name not in self.presets:
            known = ", ".join(sorted(self.presets)) or "none"
            raise PresetNotFoundError(f"preset {_show(name)} does not exist; this server has: {known}", param)
        return self.presets[name]

    def _bound(self, mix: Mix, request: SteeringRequest) -> tuple[Mix, float]:
        """`mix` within the request's drift budget, and the factor that brought it there."""
        budget, kl = request.max_kl, self._kl(mix)
        if budget is None or kl <= budget:
            return mix, 1.0
        if request.on_exceed == "error":
            raise DriftBudgetError(
                f"the mix has a predicted KL of {kl:g} nats a token and max_kl is {budget:g}; use smaller "
                'coefficients, a larger max_kl, or "on_exceed": "scale"',
                param="steering.max_kl",
            )
        factor = math.sqrt(budget / kl)  # KL is quadratic in the coefficients
        scaled = mix.scaled(factor)
        while self._kl(scaled) > budget:  # rounding single coefficients towards zero can raise a cross term
            factor *= 0.999
            scaled = mix.scaled(factor)
        return scaled, factor

    def _kl(self, mix: Mix) -> float:
        return round(self.package.predicted_kl(mix), _KL_DIGITS)


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
