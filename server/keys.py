"""Key files: names and SHA-256 hashes of keys, and the quota of each. A key itself is shown once, when it is made.

    {"keys": [{"name": "shop", "sha256": "9f86…", "created": "2026-11-23", "requests_per_minute": 600}]}

Keys are 256 random bits, so one SHA-256 is enough: salts and slow hashes (bcrypt, argon2) guard secrets that can be
guessed, and would cost a quarter of a second of a core for every request.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, ValidationError

from atoms.errors import ConfigError
from atoms.storage import storage_errors, write_json
from server.limits import Quota
from server.validation import Strict

PREFIX = "atomsteer-"
"""So that secret scanners and people recognise a key."""
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_MAX_KEYS = 10_000


class KeyEntry(Strict):
    """One key of a file. A number that is absent or null is the server's default for all keys."""

    name: str = Field(pattern=rf"^{NAME}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: str | None = None
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    max_concurrent_requests: int | None = Field(None, ge=1)

    def quota(self, default: Quota) -> Quota:
        """`default`, with what the entry says in its place."""
        return Quota(
            requests_per_minute=self.requests_per_minute or default.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute or default.tokens_per_minute,
            max_concurrent_requests=self.max_concurrent_requests or default.max_concurrent_requests,
        )


class _KeyFile(Strict):
    keys: list[KeyEntry] = Field(max_length=_MAX_KEYS)


def hash_key(key: str) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> list[KeyEntry]:
    """Raises ConfigError for a file that is absent, unreadable or wrong, or names two keys alike."""
    try:
        entries = _KeyFile.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise ConfigError(f"key file {path} cannot be read ({error.strerror}); make it with "
                          f"`atomsteer keys create NAME --file {path}`") from error  # fmt: skip
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]  # the input may be a key in clear
        where = ".".join(str(part) for part in first["loc"]) or "its content"
        raise ConfigError(
            f"key file {path}: {where}: {first['msg'].lower()}; change keys with `atomsteer keys`"
        ) from None
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"key file {path} names two keys {twice!r}; a name belongs to one key")
    return entries


def create_key(path: Path, name: str, quota: Quota = Quota(), *, replace: bool = False) -> str:
    """Adds a key to a file, which is made if it is not there, and returns the key.

    Raises ConfigError for a name that is taken (unless `replace`) or cannot be one, StorageError.
    """
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"{name!r} is no name for a key; use 1-64 letters, digits, '.', '_' or '-'")
    key = PREFIX + secrets.token_urlsafe(32)
    entry = KeyEntry(
        name=name,
        sha256=hash_key(key),
        created=datetime.now(UTC).date().isoformat(),
        requests_per_minute=quota.requests_per_minute,
        tokens_per_minute=quota.tokens_per_minute,
        max_concurrent_requests=quota.max_concurrent_requests,
    )
    with _alone(path):
        entries = read_keys(path) if path.exists() else []
        if not replace and any(known.name == name for known in entries):
            raise ConfigError(f"key file {path} has a key {name!r}; choose another name, or replace it with --replace")
        _write(path, [*(known for known in entries if known.name != name), entry])
    return key


def delete_key(path: Path, name: str) -> None:
    """Raises ConfigError if the file has no such key, StorageError."""
    read_keys(path)  # a file that is not there has no directory to hold
    with _alone(path):
        entries = read_keys(path)
        kept = [entry for entry in entries if entry.name != name]
        if len(kept) == len(entries):
            raise ConfigError(
                f"key file {path} has no key {name[:64]!r}; it has {', '.join(e.name for e in entries) or 'none'}"
            )
        _write(path, kept)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds other changes of `path` up, so that none is lost. Raises StorageError.

    Its directory is locked and not the file, in whose place every change puts another one.
    """
    import fcntl  # changes are made where there is one; servers that only read need none

    with storage_errors(path):
        directory = Path(os.path.realpath(path)).parent
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    try:
        with storage_errors(path):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(path: Path, entries: Sequence[KeyEntry]) -> None:
    write_json(path, {"keys": [entry.model_dump(exclude_none=True) for entry in entries]})
