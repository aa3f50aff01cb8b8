"""An experiment's spec from the command line's short forms, and the number of units that one needs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoms.errors import ConfigError, DataError
from atoms.mix import parse_mix
from server.experiments.statistics import required_units

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


def arms(texts: Sequence[str]) -> list[dict[str, Any]]:
    """``name=atom=coefficient,…``, ``name=`` and ``name=@preset``. Raises ConfigError, MixError."""
    found = []
    for text in texts:
        name, separator, mix = text.partition("=")
        if not separator or not name.strip():
            raise ConfigError(f"arm {text!r} is not of the form NAME=atom=coefficient, NAME= or NAME=@preset")
        treatment = {"preset": mix.strip()[1:]} if mix.strip().startswith("@") else {"atoms": parse_mix(mix)}
        found.append({"name": name.strip(), **treatment})
    return found


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
        try:
            limit = float(match[3]) if match else math.nan
        except ValueError:
            limit = math.nan
        if match is None or not math.isfinite(limit):
            raise ConfigError(f"guardrail {text!r} is not of the form METRIC<LIMIT or METRIC<+LIMIT")
        found.append({"metric": match[1], "max_increase" if match[2] else "max": limit})
    return found


def planned_units(
    effect: float, *, rate: float | None, deviation: float | None, arms: int, power: float, alpha: float
) -> int:
    """Units of `arms` equal arms that show `effect` between the control and any other. Raises ConfigError."""
    if (rate is None) == (deviation is None):
        raise ConfigError("give --rate for a proportion, or --deviation for a mean")
    for name, value, low, high in (("rate", rate, 0, 1), ("power", power, 0, 1), ("alpha", alpha, 0, 0.5)):
        if value is not None and not low < value < high:
            raise ConfigError(f"{name} is {value:g}; it must lie between {low} and {high}")
    if not effect or not math.isfinite(effect) or (deviation is not None and not 0 < deviation < math.inf):
        raise ConfigError("effect and deviation must be finite numbers other than 0")
    if rate is not None:
        if not 0 < rate + effect < 1:
            raise ConfigError(f"a rate of {rate:g} cannot change by {effect:g}; rates lie between 0 and 1")
        deviation = math.sqrt((rate * (1 - rate) + (rate + effect) * (1 - rate - effect)) / 2)
    return required_units(effect, deviation or 0.0, alpha=alpha, power=power, shares=(1 / arms, 1 / arms),
                          comparisons=arms - 1)  # fmt: skip
