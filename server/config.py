"""Settings of a server: frozen, validated on construction, and free of torch, so that a command line starts quickly."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from atoms.errors import ConfigError
from server.limits import DriftBudget, Limits, Quota

API_KEY_VARIABLE, ADMIN_KEY_VARIABLE = "ATOMSTEER_API_KEY", "ATOMSTEER_ADMIN_KEY"
DATABASE_VARIABLE = "ATOMSTEER_DATABASE"
NO_DATABASE = "none"
LOG_FORMATS = ("text", "json")
DTYPES = ("auto", "float32", "bfloat16", "float16")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_PRESET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """All that `server.embedded.serve.serve` needs. Raises ConfigError for a setting that cannot work.

    package              directory of the package
    model                directory or hub id of the base model; None: the one that the package names
    port                 0 chooses a free one
    api_keys             keys for inference; none: anybody may ask
    admin_keys           keys that also see training documents and may leave tested ranges; none: nobody may
    api_key_file, admin_key_file   files that `atomsteer keys` writes, with hashes of further keys; read again on change
    quota                what each key may use a minute and at once, unless its file says otherwise
    served_model_name    `model` of requests; None: the package's name
    presets              texts ``name=atom=coefficient,...``
    default_mix          text ``atom=coefficient,...`` for requests that say nothing of steering; None: unsteered
    dtype, device        ``auto`` or a name that torch knows
    slots                sequences decoded at once
    max_model_len        context in tokens; None: the engine's choice
    max_waiting          sequences that may wait for a slot before requests are refused
    prefill_tokens_per_step   prompt tokens read in a step; a quarter of them between two decode steps
    prefix_cache_tokens   tokens of prompts whose keys and values are kept for prompts that begin alike; 0 is none
    cors_origins         web origins that browsers may call from; none: no cross-origin calls
    shutdown_timeout     seconds that requests in flight get after SIGTERM
    allow_training_text  whether admin keys may read training documents
    database             URL of SQLite or PostgreSQL for presets and experiments; None: a SQLite file in the user's state
                         directory; ``none``: no database
    access_log           one line a request: method, path, status, duration, request id, mix, key
    log_prompts          whether that line also holds the prompt
    log_format           ``text``, or ``json`` for one JSON object a line
    body_timeout         seconds within which a body must have arrived
    drift                how many of an experiment's responses are read again to measure their KL
    """

    package: Path
    model: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    api_key_file: Path | None = None
    admin_key_file: Path | None = None
    quota: Quota = Quota()
    served_model_name: str | None = None
    presets: tuple[str, ...] = ()
    default_mix: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    slots: int = 16
    max_model_len: int | None = None
    max_waiting: int = 256
    prefill_tokens_per_step: int = 512
    prefix_cache_tokens: int = 4096
    limits: Limits = Limits()
    cors_origins: tuple[str, ...] = ()
    shutdown_timeout: float = 30.0
    allow_training_text: bool = True
    access_log: bool = True
    log_prompts: bool = False
    log_format: str = "text"
    body_timeout: float = 30.0
    database: str | None = field(default=None, repr=False)
    drift: DriftBudget = DriftBudget()

    def __post_init__(self) -> None:
        for path in ("package", "api_key_file", "admin_key_file"):
            if getattr(self, path) is not None:
                object.__setattr__(self, path, Path(getattr(self, path)))
        _require(bool(self.host.strip()), "host", self.host, "an address or host name, such as 127.0.0.1")
        _require(_whole(self.port) and 0 <= self.port <= 65535, "port", self.port, "a whole number from 0 to 65535")
        for count in ("slots", "max_waiting", "prefill_tokens_per_step"):
            value = getattr(self, count)
            _require(_whole(value) and value >= 1, count, value, "a whole number of at least 1")
        kept = self.prefix_cache_tokens
        _require(_whole(kept) and kept >= 0, "prefix_cache_tokens", kept, "a whole number of at least 0")
        length = self.max_model_len
        _require(length is None or (_whole(length) and length >= 2), "max_model_len", length, "at least 2 tokens")
        _require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        timeout = self.shutdown_timeout
        _require(math.isfinite(timeout) and timeout >= 0, "shutdown_timeout", timeout, "0 seconds or more")
        _require(math.isfinite(self.body_timeout) and self.body_timeout > 0, "body_timeout", self.body_timeout,
                 "more than 0 seconds")  # fmt: skip
        _require(self.log_format in LOG_FORMATS, "log_format", self.log_format, f"one of {', '.join(LOG_FORMATS)}")
        name = self.served_model_name
        _require(name is None or bool(_NAME.fullmatch(name)), "served_model_name", name,
                 "1-128 letters, digits, '.', '_', '-' or '/', starting with a letter or digit")  # fmt: skip
        _check_keys("api_keys", self.api_keys)
        _check_keys("admin_keys", self.admin_keys)
        self.preset_texts()

    def preset_texts(self) -> dict[str, str]:
        """Preset name -> mix text. Raises ConfigError for a text of another form or a name given twice."""
        texts: dict[str, str] = {}
        for text in self.presets:
            name, separator, mix = (part.strip() for part in text.partition("="))
            if not separator or not mix or not _PRESET_NAME.fullmatch(name):
                raise ConfigError(f"preset {text!r} is not of the form name=atom=coefficient, as in short=one-word=1.5")
            if name in texts:
                raise ConfigError(f"preset {name!r} is given twice; give each preset one name")
            texts[name] = mix
        return texts

    def with_environment(self, environment: Mapping[str, str]) -> ServeConfig:
        """A copy with comma-separated keys of ``ATOMSTEER_API_KEY`` and ``ATOMSTEER_ADMIN_KEY``, and the URL of
        ``ATOMSTEER_DATABASE``, where none are set."""
        return replace(
            self,
            api_keys=self.api_keys or _split_keys(environment.get(API_KEY_VARIABLE, "")),
            admin_keys=self.admin_keys or _split_keys(environment.get(ADMIN_KEY_VARIABLE, "")),
            database=self.database or environment.get(DATABASE_VARIABLE) or None,
        )

    def database_url(self) -> str | None:
        """Where presets and experiments are kept; None for nowhere."""
        return None if self.database == NO_DATABASE else self.database or default_database()


def default_database() -> str:
    """A file of the user's, shared by all servers that the user runs on this machine."""
    from platformdirs import user_state_path

    return f"sqlite:///{user_state_path('atomsteer', appauthor=False) / 'atomsteer.db'}"


def _split_keys(text: str) -> tuple[str, ...]:
    return tuple(key for part in text.split(",") if (key := part.strip()))


def _check_keys(name: str, keys: Sequence[str]) -> None:
    for key in keys:  # the message must not show the key
        if not key.strip() or not key.isascii() or any(char.isspace() or char == "," for char in key):
            raise ConfigError(
                f"{name} holds a key that is empty or has spaces, commas or non-ASCII characters; choose another"
            )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(holds: bool, name: str, value: object, limit: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {value!r}; it must be {limit}")
