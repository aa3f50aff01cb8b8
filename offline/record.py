"""The record of a run: configuration, versions, seed, data hash and timings, made and read. Timings are outside the package's
hash."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from atoms.errors import PackageError
from atoms.package import Package
from offline.config import DiscoverConfig
from offline.progress import StageCost

_LIBRARIES = ("atomsteer", "torch", "transformers", "peft", "safetensors")
_NOT_HASHED = ("out", "work", "force", "data", "adapter", "model")
"""Where things lie does not change what they are: the data, adapter and model are recorded by hash."""


def run_record(config: DiscoverConfig, facts: Mapping[str, Any], costs: Mapping[str, StageCost]) -> dict[str, Any]:
    """JSON for the manifest. `facts` are counts and hashes of this run; `costs` of the stages become `timings`."""
    settings = {key: value for key, value in jsonable(dataclasses.asdict(config)).items() if key not in _NOT_HASHED}
    return {
        "config": settings,
        "seed": config.seed,
        "versions": versions(),
        **facts,
        "timings": {name: dataclasses.asdict(cost) for name, cost in costs.items()},
    }


def recorded_settings(package: Package) -> dict[str, Any]:
    """The configuration with which `package` was discovered. Raises PackageError if it lacks what new documents need."""
    settings = package.manifest.record.get("config", {})
    if "max_length" not in settings or not {"alpha", "nonnegative"} <= settings.get("dictionary", {}).keys():
        raise PackageError(
            f"{package.path} does not record how it was discovered; make it again with `atomsteer discover`"
        )
    return settings


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide results."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}}


def jsonable(value: Any) -> Any:
    """`value` with paths as text, tuples as lists, and whole floats as integers: 1 and 1.0 are one setting (RFC 8785)."""
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return str(value) if isinstance(value, Path) else value


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
