"""The settings of steering inside vLLM travel in environment variables: every process of vLLM sees those.

ATOMSTEER_PACKAGE    directory of the package; without it the plugin does nothing
ATOMSTEER_SETTINGS   a JSON object of further `ServeConfig` fields, such as {"presets": ["short=one-word=1.5"]}
ATOMSTEER_API_KEY, ATOMSTEER_ADMIN_KEY, ATOMSTEER_DATABASE   as for the embedded server
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from atoms.errors import ConfigError
from atoms.package import Package
from server.auth import KeyRing
from server.config import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, DATABASE_VARIABLE, ServeConfig
from server.limits import DriftBudget, Limits, Quota
from server.steering import Steering

PLUGIN_NAME = "atomsteer"
PACKAGE_VARIABLE, SETTINGS_VARIABLE, PLUGINS_VARIABLE = "ATOMSTEER_PACKAGE", "ATOMSTEER_SETTINGS", "VLLM_PLUGINS"
FIELDS = ("served_model_name", "presets", "default_mix", "limits", "quota", "api_key_file", "admin_key_file",
          "allow_training_text", "access_log", "log_prompts", "log_format", "body_timeout", "drift")  # fmt: skip
"""Fields of `ServeConfig` that mean the same inside vLLM; the others are vLLM's own options."""


def read_settings(environment: Mapping[str, str]) -> ServeConfig | None:
    """None without ``ATOMSTEER_PACKAGE``. Raises ConfigError for settings that cannot work."""
    package = environment.get(PACKAGE_VARIABLE)
    if not package:
        return None
    fields = _object(environment.get(SETTINGS_VARIABLE) or "{}")
    if unknown := sorted(fields.keys() - set(FIELDS)):
        raise ConfigError(f"{SETTINGS_VARIABLE} has {unknown[0]!r}; its fields are {', '.join(FIELDS)}")
    try:
        if "limits" in fields:
            fields["limits"] = Limits(**fields["limits"])
        if "drift" in fields:
            fields["drift"] = DriftBudget(**fields["drift"])
        if "quota" in fields:
            fields["quota"] = Quota(**fields["quota"])
        if "presets" in fields:
            fields["presets"] = tuple(fields["presets"])
        config = ServeConfig(package=Path(package), **fields)
    except TypeError as error:
        raise ConfigError(f"{SETTINGS_VARIABLE} cannot be used: {error}") from error
    return config.with_environment(environment)


def to_environment(config: ServeConfig) -> dict[str, str]:
    """What `read_settings` reads back."""
    fields = {name: value for name, value in asdict(config).items() if name in FIELDS and value is not None}
    variables = {
        PACKAGE_VARIABLE: str(config.package.absolute()),  # a link stays one: a reload follows it anew
        SETTINGS_VARIABLE: json.dumps(fields, default=lambda path: str(path.absolute())),
        API_KEY_VARIABLE: ",".join(config.api_keys),
        ADMIN_KEY_VARIABLE: ",".join(config.admin_keys),
        DATABASE_VARIABLE: config.database or "",
    }
    return {name: value for name, value in variables.items() if value}


def check(package: Package, config: ServeConfig) -> None:
    """What can be known before a model is loaded. Raises ConfigError, and what a broken package raises."""
    _ = replace(package).bank, package.drift  # of a copy, because a package keeps what it has read
    KeyRing.of(config)
    Steering.of(package, config)


def refuse_root_path(path: str | None) -> None:
    """Raises ConfigError for vLLM's ``--root-path``: limits, keys and steering go by paths without one."""
    if path:
        raise ConfigError(
            f"a root path ({path}) cannot go with steering; leave it out, and have the proxy take the prefix off"
        )


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{SETTINGS_VARIABLE} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{SETTINGS_VARIABLE} is a JSON {type(value).__name__}; it must be an object")
    return value
