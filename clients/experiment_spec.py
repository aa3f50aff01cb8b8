"""An experiment's spec from the command line's short forms, and the number of units that one needs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoms.errors import ConfigError, DataError
from atoms.mix import parse_mix
from server.experiments.statistics import MIN_UNITS, required_units, steadied

_GUARDRAIL = re.compile(r"\s*([^<\s]+)\s*<\s*(\+?)\s*([0-9.eE+-]+)\s*")


def read_spec(file: Path) -> dict[str, Any]:
    """Raises DataError."""
    try:
        spec = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(spec, dict):
        raise DataError(f"{file} holds a JSON {type(spec).__name__}; it must be an object such as the docs show")
    return spec


def arms(texts: Sequence[str], weights: Sequence[str] = ()) -> list[dict[str, Any]]:
    """``name=atom=coefficient,…``, ``name=`` and ``name=@preset``; weights as ``name=2``. Raises ConfigError, MixError."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, separator, mix = (part.strip() for part in text.partition("="))
        if not separator or not name:
            raise ConfigError(f"arm {text!r} is not of the form NAME=atom=coefficient, NAME= or NAME=@preset")
        if name in found:
            raise ConfigError(f"two arms are called {name!r}; give each a name of its own")
        found[name] = {"name": name, **({"preset": mix[1:]} if mix.startswith("@") else {"atoms": parse_mix(mix)})}
    for text in weights:
        name, _, weight = (part.strip() for part in text.partition("="))
        if name not in found:
            raise ConfigError(f"--weight {text!r} is for none of the arms {', '.join(found) or '(none)'}; write NAME=2")
        found[name]["weight"] = _finite(weight, f"--weight {text!r} is not of the form NAME=2")
    return list(found.values())


def _finite(text: str, complaint: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(complaint)
    return value


def metrics(texts: Sequence[str]) -> list[dict[str, Any]]:
    """``name[:proportion|mean][:increase|decrease][:zero]``, the parts after the name in any order. Raises ConfigError."""
    fields = {"proportion": "kind", "mean": "kind", "increase": "goal", "decrease": "goal", "zero": "missing"}
    found = []
    for text in texts:
        name, *words = text.split(":")
        unknown = next((word for word in words if word not in fields), None)
        if unknown is not None:
            raise ConfigError(f"metric {text!r} says {unknown!r}; after the name may stand {', '.join(fields)}")
        found.append({"name": name, **{fields[word]: word for word in words}})
    return found


def guardrails(texts: Sequence[str]) -> list[dict[str, Any]]:
    """``metric<limit`` and ``metric<+increase``. Raises ConfigError."""
    found = []
    for text in texts:
        match = _GUARDRAIL.fullmatch(text)
        limit = _finite(
            match[3] if match else "", f"guardrail {text!r} is not of the form METRIC<LIMIT or METRIC<+LIMIT"
        )
        assert match is not None
        found.append({"metric": match[1], "max_increase" if match[2] else "max": limit})
    return found


def arm_shares(arms: int | None, shares: str | None) -> tuple[float, ...]:
    """Shares of the arms, the control's first: `arms` equal ones (default 2), or those of a text. Raises ConfigError."""
    if shares is None:
        return (1 / (arms or 2),) * (arms or 2)
    if arms is not None:
        raise ConfigError("--arms are equal and --shares say how they are not; give one of them")
    values = [_finite(part, f"--shares {shares!r} is not of the form 0.1,0.45,0.45") for part in shares.split(",")]
    if len(values) < 2 or min(values) <= 0:
        raise ConfigError(f"--shares {shares!r} must be two positive numbers or more, the control's first")
    return tuple(value / math.fsum(values) for value in values)


@dataclass(frozen=True)
class Plan:
    """What an experiment can find: `shares` of its arms (the control's first), and what one unit's value is like: a
    proportion that is `rate` today, or a mean with the standard deviation `deviation`.

    The comparison that counts is the control's with the smallest other arm. Raises ConfigError.
    """

    shares: tuple[float, ...]
    power: float
    alpha: float
    rate: float | None = None
    deviation: float | None = None

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.deviation is None):
            raise ConfigError("give --rate for a proportion, or --deviation for a mean")
        for name, value, high in (("rate", self.rate, 1), ("power", self.power, 1), ("alpha", self.alpha, 0.5)):
            if value is not None and not 0 < value < high:
                raise ConfigError(f"{name} is {value:g}; it must lie between 0 and {high}")
        if self.deviation is not None and not 0 < self.deviation < math.inf:
            raise ConfigError(f"deviation is {self.deviation:g}; it must be a finite number above 0")

    def units(self, effect: float) -> int:
        """Units of all arms that find `effect`, either way."""
        if not effect or not math.isfinite(effect):
            raise ConfigError(f"effect is {effect:g}; it must be a finite number other than 0")
        needed = required_units(effect, self._deviation(effect), alpha=self.alpha, power=self.power, shares=self._compared,
                                comparisons=len(self.shares) - 1)  # fmt: skip
        return max(needed, self._least)

    def effect(self, units: int) -> float:
        """The smallest effect that `units` units of all arms find: upwards, for a proportion, unless there is no room."""
        if units < self._least:
            raise ConfigError(f"units is {units}; below {self._least} the smallest arm has fewer than {MIN_UNITS}, and no "
                              "interval is given")  # fmt: skip
        low, high = 0.0, 1e6 * self.deviation if self.deviation else (1 - (self.rate or 0.0)) * (1 - 1e-9)
        if self.units(high) > units:
            raise ConfigError(
                f"{units} units find no difference that a rate of {self.rate:g} has room for; plan more units"
            )
        while high - low > 1e-9 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if self.units(middle) <= units else (middle, high)
        return high

    def smallest(self, units: int) -> int:
        """Units of the smallest arm among `units`."""
        return math.ceil(units * min(self.shares))

    @property
    def _least(self) -> int:
        """Units with which the smallest arm has an interval."""
        return math.ceil(MIN_UNITS / min(self.shares) - 1e-9)

    @property
    def _compared(self) -> tuple[float, float]:
        """Shares of the control and of the smallest other arm."""
        return self.shares[0], min(self.shares[1:])

    def _deviation(self, effect: float) -> float:
        """The standard deviation of one unit's value that stands for both arms'."""
        if self.rate is None:
            return self.deviation or 0.0
        changed = self.rate + effect
        if not 0 < changed < 1:
            raise ConfigError(f"a rate of {self.rate:g} cannot change by {effect:g}; rates lie between 0 and 1")
        control, arm = self._compared
        before, after = self.rate * (1 - self.rate), changed * (1 - changed)
        error = steadied(control, before, arm, after) / control + steadied(arm, after, control, before) / arm
        return math.sqrt(error / (1 / control + 1 / arm))
